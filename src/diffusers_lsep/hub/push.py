# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Uploads saved pipelines to the Hugging Face Hub."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled, RemoteEntryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from ..files import hash_saved_weights
from .model_card import (
    CARD_NAME,
    LORA_WEIGHTS_NAME,
    declare_license,
    is_about_other_weights,
    load_card,
    merge_model_cards,
    point_usage_at,
    read_sampling,
    save_card,
    write_model_card,
)
from .remote_code import REMOTE_PIPELINE_FILE, without_code
from .saved_pipeline import EVAL_RESULTS_NAME, SavedPipeline


logger = logging.get_logger(__name__)

PROBE_FOLDER = "probe"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")

# Of the client, which itself tries again after the first three, and of its library for large files.
CONNECTION_FAILURES = (
    *(httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError),
    *(ConnectionError, TimeoutError),
)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    license: str | None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Uploads a saved pipeline to the Hub, in one commit: its components, its probe, the model card with its images and
    the evaluation's results. Whatever else is in the folder stays here: checkpoints, optimiser states, logs. A folder
    without a model card gets one. Weights of an earlier push that have another name now (other shards) are removed.

    What somebody wrote into the model card on the Hub is kept; what was generated there about other weights is not.

    Args:
        folder (`str` or `os.PathLike`): A folder that `LSEPPipeline.save_pretrained` wrote.
        repo_id (`str`): The repository, `"namespace/name"`; created if it does not exist.
        license (`str`):
            Licence of the weights, as the Hub spells it. None is to claim none beyond what the model card in `folder`
            says; the command lines of this package insist on one.
        token (`str`, *optional*): Access token; the one of `hf auth login` if not given.
        private (`bool`, *optional*): Whether a new repository is private.
        revision (`str`, *optional*): The branch to push to, made from `main` if it does not exist.
        commit_message (`str`, *optional*): Title of the commit.
        create_pr (`bool`, defaults to `False`): Whether to open a pull request in place of a commit to the branch.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        `ValueError`: before anything is sent, if `folder` holds no pipeline of this package, if weights of a
        component are missing or are pickles, or if a file or a link leads out of it.
        `ConnectionError`: if the connection breaks. Nothing is visible on the Hub then; pushing again completes it.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    pipeline = SavedPipeline(folder)
    has_card = (folder / CARD_NAME).is_file()
    if has_card and is_about_other_weights(load_card(folder / CARD_NAME), pipeline.hashes):
        logger.warning(f"{folder / CARD_NAME} is about other weights than those beside it: it is written anew.")
        has_card = False
    if not has_card:
        write_model_card(folder, repo_id=repo_id, license=license)
    card = load_card(folder / CARD_NAME)
    files = _files_to_push(pipeline, card)
    logger.warning(f"Uploading to {repo_id}: {', '.join([CARD_NAME, *files])}")
    arguments = (token, private, revision, commit_message or "Upload LSEPPipeline", create_pr)
    return _commit(folder, files, card, pipeline.hashes, repo_id, license, *arguments)


def bring_card(origin: str | os.PathLike, folder: str | os.PathLike, repo_id: str):
    """
    Brings the model card of a saved pipeline, with its images, the evaluation's results and the probe, to the same
    pipeline in another folder; with other usage if that one alone brings its code along. Does nothing if the pipelines
    differ, and no more than to warn where `origin` holds what cannot be brought.

    Args:
        origin (`str` or `os.PathLike`): A folder; does nothing for an id on the Hub.
        folder (`str` or `os.PathLike`): The other folder, without a card.
        repo_id (`str`): Where the model is going to be on the Hub.
    """
    origin, folder = Path(origin), Path(folder)
    if not all((origin / name).is_file() for name in (CARD_NAME, "model_index.json")):
        return
    now = SavedPipeline(folder)
    try:
        before = SavedPipeline(origin)
        if not _are_the_same(before, now):
            return
        card = load_card(origin / CARD_NAME)
        files, sampling = _files_to_push(before, card), read_sampling(card)
    except ValueError as error:
        logger.warning(f"The model card of {origin}, from where the pipeline was loaded, is left there: {error}")
        return
    for name in [CARD_NAME, *files]:
        is_beside = Path(name).parts[0] not in before.index and Path(name).suffix != ".py"
        if is_beside and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin / name, folder / name)
    if now.has_code != before.has_code:
        (folder / CARD_NAME).unlink()
        generated = load_card(write_model_card(folder, repo_id=repo_id, sampling=sampling))
        save_card(folder / CARD_NAME, merge_model_cards(card, generated))


def _are_the_same(one: SavedPipeline, other: SavedPipeline) -> bool:
    """Whether weights, configs, classes and scheduler of two pipelines are equal, with code or without."""

    def own(config: dict[str, Any] | None) -> dict[str, Any]:
        return {key: value for key, value in without_code(config or {}).items() if key[0] != "_"}

    names = ("index", "transformer", "scheduler", "vae")
    return one.hashes == other.hashes and all(own(getattr(one, name)) == own(getattr(other, name)) for name in names)


def push_lora(folder: str | os.PathLike, repo_id: str, license: str | None, token: str | None = None) -> CommitInfo:
    """
    Uploads an adapter to a repository of its own, in one commit: the file of its layers and its model card. What
    somebody wrote into the card on the Hub is kept.

    Args:
        folder (`str` or `os.PathLike`): The folder `lora` that `train_lsep.py --lora_rank` wrote.
        repo_id (`str`): The repository, `"namespace/name"`; created if it does not exist.
        license (`str`): Licence of the layers, as the Hub spells it.
        token (`str`, *optional*): Access token; the one of `hf auth login` if not given.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        `ValueError`: if there is no adapter in `folder`.
        `ConnectionError`: if the connection breaks. Pushing again completes it.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    for name in (LORA_WEIGHTS_NAME, CARD_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"`folder` has to hold LoRA layers and their card, but there is no {name} in {folder}.")
    card, hashes = load_card(folder / CARD_NAME), {"lora": hash_saved_weights([folder / LORA_WEIGHTS_NAME])}
    arguments = (token, None, None, "Upload LoRA layers", False)
    return _commit(folder, [LORA_WEIGHTS_NAME], card, hashes, repo_id, license, *arguments)


def _commit(
    folder: Path,
    files: list[str],
    card: ModelCard,
    hashes: dict[str, str],
    repo_id: str,
    license: str | None,
    token: str | None,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> CommitInfo:
    """Uploads these files of a folder, and its card brought together with the one on the Hub."""
    if license is None and getattr(card.data, "license", None) is None:
        logger.warning(f"`license` is not given: the model card of {repo_id} claims none.")

    api = HfApi(token=token)
    with explain_connection_failures(folder, repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)

        point_usage_at(card, repo_id)
        if license is not None:
            declare_license(card, license)
        card_on_hub = _card_on_hub(api, repo_id, revision) or card
        outdated = {EVAL_RESULTS_NAME} - {*files} if is_about_other_weights(card_on_hub, hashes) else set()
        card = merge_model_cards(card_on_hub, card, hashes)

        # Not `upload_folder`: with hf_xet it may make several commits, and the card is not the one in the folder.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=str(card).encode()),
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in files),
        ]
        on_hub = api.list_repo_files(repo_id, revision=revision)
        outdated |= {*find_outdated_weights(on_hub, files)}
        operations += [CommitOperationDelete(path_in_repo=path) for path in on_hub if path in outdated]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


@contextmanager
def explain_connection_failures(folder: Path, repo_id: str) -> Iterator[None]:
    """Makes one `ConnectionError`, which says what to do, of all the ways in which an upload may break off."""
    try:
        yield
    except (*CONNECTION_FAILURES, RuntimeError) as error:
        # What ends the upload of a file is the cause of a RuntimeError of the client, which names the file.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, CONNECTION_FAILURES) or isinstance(cause, OfflineModeIsEnabled):
            raise
        reason = str(error) if cause is error else f"{error} {cause}"
        raise ConnectionError(
            f"Pushing {folder} to {repo_id} did not end: {reason} Nothing of it is visible on the Hub. Push again:"
            " files that arrived are not sent twice."
        ) from error


def _files_to_push(pipeline: SavedPipeline, card: ModelCard) -> list[str]:
    """The files to upload, without the model card: by what they are for, so that no others slip in."""
    folder = pipeline.folder
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card.text)
    images = [name for name in shown if "://" not in name and name.lower().endswith(IMAGE_SUFFIXES)]
    code = [REMOTE_PIPELINE_FILE] if pipeline.has_code else []
    results = [EVAL_RESULTS_NAME] if pipeline.read_evaluation() is not None else []
    files = [name for name in ["model_index.json", *results, *code, *images] if (folder / name).is_file()]

    extra = (PROBE_FOLDER,) if (folder / PROBE_FOLDER).is_dir() else ()
    pipeline.check_inside(CARD_NAME, *files)
    return [*files, *pipeline.component_files(extra)]


def _weights_key(path: str) -> tuple[str, str | None] | None:
    """What weights a file is a part of, whatever its shards: component and name, and variant; None if it is none."""
    shard = re.fullmatch(r"(.+/[^.]+?)(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors", path)
    index = re.fullmatch(r"(.+/[^.]+)\.safetensors\.index(?:\.([^.]+))?\.json", path)
    match = shard or index
    return (match[1], match[2]) if match else None


def find_outdated_weights(on_hub: list[str], files: list[str]) -> list[str]:
    """diffusers would load the shards of an earlier push in place of a single new file."""
    keys = {_weights_key(path) for path in files} - {None}
    return [path for path in on_hub if _weights_key(path) in keys and path not in files]


def _card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
    except RemoteEntryNotFoundError:
        return None
    return load_card(path, ignore_metadata_errors=True)
