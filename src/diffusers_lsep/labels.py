# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Classes by their names or ids: one rule for the pipeline, the scripts and training."""

import difflib
import html
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .argument_checks import MAX_COUNT, check_count, check_type, describe


NUM_LISTED = 20  # classes and names, until there are too many to read

# The classes of data without labels: one, which is the null class. That has the index of the classes' number, here 1.
UNLABELED = ("unconditional",)

# Of classes that only have numbers. A larger number is one of something else.
MAX_CLASSES = 100_000

MAX_NAME_LENGTH = 1_000  # of a class, in characters; ImageNet's longest has 132


def check_names(id2label: Any, argument: str = "id2label") -> dict[int, str] | None:
    """
    The names of classes by their ids, which are strings in JSON.

    Raises:
        `ValueError`: if they are no names by ids, or one has more than 1,000 characters.
    """
    check_type(argument, id2label, Mapping, "a dict of names by class ids")
    if id2label is None:
        return None
    names = {}
    for class_id, name in id2label.items():
        is_id = _is_number(class_id) if isinstance(class_id, str) else isinstance(class_id, (int, np.integer))
        if not is_id or not 0 <= int(class_id) < MAX_COUNT or not isinstance(name, str):
            raise ValueError(
                f"`{argument}` has to be a dict of names by class ids, but holds {describe(class_id)}:"
                f" {describe(name)}."
            )
        if len(name) > MAX_NAME_LENGTH:
            raise ValueError(
                f"`{argument}` has to hold names of at most {MAX_NAME_LENGTH:,} characters, but that of the class"
                f" {class_id} has {len(name):,}: {name[:40]!r}..."
            )
        names[int(class_id)] = name
    return names


def check_largest_id(largest_id: int, what: str = "the labels"):
    """Raises a `ValueError` if classes that only have numbers, from 0 to this one, are more than 100,000."""
    if largest_id >= MAX_CLASSES:
        raise ValueError(
            f"{what} have to number the classes from 0 on, and below {MAX_CLASSES:,}, but one is {largest_id}."
        )


def number_names(largest_id: int) -> list[str]:
    """The names of classes that only have numbers, from 0 to the largest. Errors as in [`check_largest_id`]."""
    check_largest_id(largest_id)
    return [str(index) for index in range(largest_id + 1)]


def in_one_line(name: str) -> str:
    """A name as it can be written and drawn, whatever line breaks and half characters JSON has let into it."""
    return " ".join(name.encode("utf-8", "replace").decode("utf-8").split())


def as_markdown(name: str) -> str:
    """The name of a class as it is to be read, whatever HTML or Markdown it holds."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(in_one_line(name), quote=False))


def find_names(id2label: dict[int, str] | None) -> dict[str, list[int]]:
    """
    The classes of every name. A label is a name as a whole (a folder's may hold commas), and so are its parts between
    commas, as in `facebook/DiT-XL-2-256`.
    """
    ids_of_name: dict[str, list[int]] = {}
    for class_id, label in (id2label or {}).items():
        for name in dict.fromkeys(name.strip() for name in (*label.split(","), label)):
            if name:
                ids_of_name.setdefault(name, []).append(class_id)
    return ids_of_name


def unique_names(ids_of_name: dict[str, list[int]]) -> dict[str, int]:
    """The names that one class has alone, in alphabetical order, with its id. Those with commas are parts already."""
    return {name: ids[0] for name, ids in sorted(ids_of_name.items()) if len(ids) == 1 and "," not in name}


def find_class_ids(
    class_labels: Iterable[Any],
    id2label: dict[int, str] | None,
    num_classes: int,
    argument: str = "class_labels",
    with_null: bool = False,
) -> list[int]:
    """
    Maps classes to their ids. A text that could be both a name and an id, as in a command line, is the name: `"1"` is
    the class of that name, or where there is none the class with the id 1. An integer is an id.

    Args:
        class_labels (iterable of `int` or `str`): Ids and names of classes.
        id2label (`dict[int, str]`, *optional*): Names of the classes, see [`find_names`].
        num_classes (`int`): How many classes there are.
        argument (`str`, defaults to `"class_labels"`): What messages call `class_labels`.
        with_null (`bool`, defaults to `False`): Whether the integer `num_classes` is allowed, which is no class.

    Returns:
        `list[int]`: An id in `0..num_classes - 1` for each of them, or in `0..num_classes` with `with_null`.

    Raises:
        `ValueError`: if there is no such class, or if several classes have the name.
    """
    ids: list[int] = []
    id2label = id2label or {}
    ids_of_name = find_names(id2label)
    for label in class_labels:
        if isinstance(label, str):
            candidates = ids_of_name.get(label, [])
            if len(candidates) > 1:
                described = ", ".join(f"{i} ({id2label[i]})" for i in candidates)
                raise ValueError(f"`{argument}`: {label!r} is the name of several classes: {described}. Pass the id.")
            if not candidates and not _is_number(label.removeprefix("-")):
                raise ValueError(
                    f"`{argument}`: there is no class {describe(label)}. {_describe_names(label, ids_of_name)}"
                )
            class_id = candidates[0] if candidates else int(label)
        else:
            try:
                if isinstance(label, bool):
                    raise TypeError
                class_id = operator.index(label)  # integers of all kinds, numpy's too
            except TypeError:
                raise ValueError(
                    f"`{argument}` has to be a class id, the name of a class, or a list of these, but holds"
                    f" {describe(label)} of type {type(label).__name__}."
                ) from None
        is_null = with_null and class_id == num_classes and not isinstance(label, str)
        if not 0 <= class_id < num_classes and not is_null:
            is_digits = isinstance(label, str) and not candidates
            hint = f" {_describe_names(label, ids_of_name)}" if is_digits and ids_of_name else ""
            raise ValueError(f"`{argument}` has to lie in 0..{num_classes - 1}, but holds {describe(class_id)}.{hint}")
        ids.append(class_id)
    return ids


def find_call_ids(
    find: Callable[..., list[int]],
    class_labels: Any,
    negative_class_labels: Any,
    num_images_per_label: int,
    null_id: int,
) -> tuple[list[int], list[int]]:
    """
    The class of every image of a pipeline's call, and the class that its guidance leads away from; images of one label
    stand next to each other.

    Args:
        find (`Callable`): Maps labels to ids, as `find(labels, name of the argument)`.
        class_labels, negative_class_labels: What the call was given; None is no class.
        num_images_per_label (`int`): Images of each of `class_labels`.
        null_id (`int`): What stands for no class.

    Raises:
        `ValueError`: if there are no labels, or if their numbers do not go together.
    """
    num_images_per_label = check_count("num_images_per_label", num_images_per_label, high=10_000)
    ids = [null_id] if class_labels is None else find(class_labels)
    if not ids:
        raise ValueError("`class_labels` has to hold at least one class, but is empty.")
    negative_ids = [null_id]
    if negative_class_labels is not None:
        negative_ids = find(negative_class_labels, "negative_class_labels")
    if len(negative_ids) not in (1, len(ids)):
        raise ValueError(
            f"`negative_class_labels` has to be one class, or one for each of the {len(ids)} `class_labels`, but holds"
            f" {len(negative_ids)}."
        )
    if len(negative_ids) == 1:
        negative_ids = negative_ids * len(ids)
    ids, negative_ids = ([i for i in each for _ in range(num_images_per_label)] for each in (ids, negative_ids))
    return ids, negative_ids


def _is_number(text: str) -> bool:
    """Whether a text is an integer, and of no more digits than one that counts something."""
    return text.isdecimal() and len(text) <= 20


def _describe_names(name: str, ids_of_name: dict[str, list[int]]) -> str:
    if not ids_of_name:
        return "The pipeline has no names of classes (`id2label`); pass ids."
    close = difflib.get_close_matches(name, ids_of_name, n=5)
    if close:
        return f"Close names are {close}."
    names = list(unique_names(ids_of_name))
    more = f" and {len(names) - NUM_LISTED:,} more" if len(names) > NUM_LISTED else ""
    return f"The names are {names[:NUM_LISTED]}{more}."


def describe_classes(class_ids: Iterable[int], id2label: dict[int, str] | None) -> str:
    """What is drawn, to be printed: each class by id and name, with the number of its images; of many, a summary."""
    counts, names = Counter(map(int, class_ids)), id2label or {}

    def describe(class_id: int) -> str:
        return f"class {class_id}, {names[class_id]!r}" if class_id in names else f"class {class_id}"

    total = f"images to draw: {counts.total():,}"
    if len(counts) > NUM_LISTED:
        first, last, each = describe(min(counts)), describe(max(counts)), sorted(counts.values())
        return f"{total}, {each[0]:,} to {each[-1]:,} of each of {len(counts):,} classes, from {first}, to {last}"
    return "\n".join([total, *(f"  {describe(class_id)}: {count:,}" for class_id, count in counts.items())])
