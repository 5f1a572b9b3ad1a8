# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags of a command line, and what else there is to know of each."""

import argparse

from ..command_line import ArgumentParser


class Epochs(argparse.Action):
    """A length in epochs, which takes the place of one in steps that was given before it."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.num_train_epochs, namespace.max_train_steps = values, None


class Flags:
    """
    A group of flags in the help.

    Args:
        parser (`ArgumentParser`): Where they are added.
        title (`str`): Heading of the group.
    """

    def __init__(self, parser: ArgumentParser, title: str):
        self.group = parser.add_argument_group(title)

    def add(
        self,
        name: str,
        changeable: bool = False,
        is_length: bool = False,
        is_kept: bool = False,
        on_card: bool = True,
        **options,
    ):
        """
        Adds a flag.

        Args:
            name (`str`): The flag.
            changeable (`bool`, defaults to `False`):
                Whether a run that is continued may change it; what it comes to is compared even so (`Setup.facts`).
            is_length (`bool`, defaults to `False`):
                Whether it may be changed if the learning rate does not depend on the length of the run.
            is_kept (`bool`, defaults to `False`):
                Whether a run that is continued keeps what it began with where the flag is not given: it follows from
                other flags, or an older version had another default.
            on_card (`bool`, defaults to `True`): Whether it says something about the model.
            options: As for `argparse.ArgumentParser.add_argument`.
        """
        action = self.group.add_argument(name, **options)
        action.says = {  # type: ignore[attr-defined]
            "changeable": changeable,
            "is_length": is_length,
            "is_kept": is_kept,
            "on_card": on_card,
        }
