# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo of a pipeline as a Space for the Hugging Face Hub."""

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement

from ..files import whole_folder
from .push import explain_connection_failures, find_outdated_weights
from .saved_pipeline import SavedPipeline


PACKAGE = Path(__file__).parents[1]

MODEL_FOLDER = "model"  # in a Space of a pipeline that is not on the Hub

APP = '''\
"""A page on which {model_id} draws, made by `diffusers-lsep space`. `python app.py` opens it on your own machine."""

from pathlib import Path

import torch

from diffusers_lsep.demo import launch_demo
from diffusers_lsep.sampling import load_pipeline


MODEL = {model}

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = load_pipeline(MODEL, device, dtype=dtype{options})

if __name__ == "__main__":
    launch_demo(pipe, {title!r})
'''

README = """\
---
{metadata}
---

# {title}

{model} draws images of a class, and shows how they come out of noise.

`diffusers_lsep/` is the package that the page needs, as it was when `diffusers-lsep space` made this Space;
`requirements.txt` has the versions of all else.
"""


def read_requirements() -> list[str]:
    """What this package and its `demo` extra require, `name==version` as it is installed here."""
    requirements = map(Requirement, importlib.metadata.requires("diffusers_lsep") or [])
    names = [
        requirement.name
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": "demo"})
    ]
    # Without the part after a "+", which names a build: the index that a Space installs from has no others.
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in sorted(names, key=str.lower)]


def write_space(model: str, output_dir: str | os.PathLike, title: str | None = None) -> Path:
    """
    Writes a Space with the demo: `app.py`, `requirements.txt`, `README.md` and this package.

    Args:
        model (`str`):
            Hub id of the pipeline, which the Space loads from there, or a folder, which is copied into the Space.
        output_dir (`str` or `os.PathLike`):
            The folder to write, whole or not at all. What it held before is replaced.
        title (`str`, *optional*):
            What the Space and its page are called; made of the name of the model if not given.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: if `model` is neither the id of a repository nor a folder with a pipeline of this package.
        `ImportError`: if gradio is not installed, whose version is a part of the Space.
    """
    try:
        gradio_version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("A Space needs gradio: pip install 'diffusers_lsep[demo]'.") from error
    is_folder = Path(model).is_dir()
    if is_folder:
        saved = SavedPipeline(Path(model))
        model_files = ["model_index.json", *saved.component_files()]
        saved.check_inside(*model_files)
    elif not re.fullmatch(r"[^/\s]+/[^/\s]+", model):
        raise ValueError(
            "`pretrained_model_name_or_path` has to be an id on the Hub, `namespace/name`, or the folder of a"
            f" pipeline, but is {model!r}."
        )
    else:
        validate_repo_id(model)
    name = Path(model).resolve().name if is_folder else model.rpartition("/")[2]
    title = title or name.replace("-", " ").replace("_", " ")

    metadata = SpaceCardData(
        title=title,
        emoji="🎲",
        colorFrom="indigo",
        colorTo="blue",
        sdk="gradio",
        sdk_version=gradio_version,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        pinned=False,
        models=None if is_folder else [model],
        tags=["diffusers", "image-generation"],
    )
    target = Path(output_dir).resolve()
    if target.is_relative_to(PACKAGE.resolve()):
        raise ValueError(f"`output_dir` has to lie outside of the package, but is {target}.")
    with whole_folder(target) as folder:
        # Without the scripts: in a clone that is the folder where one works, with whatever has been trained there.
        ignored = shutil.ignore_patterns("__pycache__", "examples")
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
        if is_folder:
            for file in model_files:
                (folder / MODEL_FOLDER / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(saved.folder / file, folder / MODEL_FOLDER / file)
        texts = {
            "app.py": APP.format(
                model=f'Path(__file__).parent / "{MODEL_FOLDER}"' if is_folder else repr(model),
                model_id=name if is_folder else model,
                title=title,
                options=f", variant={saved.variant!r}" if is_folder and saved.variant is not None else "",
            ),
            "README.md": README.format(
                metadata=metadata.to_yaml(),
                title=title,
                model=f"`{name}`" if is_folder else f"[{model}](https://huggingface.co/{model})",
            ),
            "requirements.txt": "".join(f"{line}\n" for line in read_requirements()),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    return target


def is_space(names: set[str]) -> bool:
    """Whether a folder with files of these names holds what [`write_space`] writes and nothing else."""
    return names - {MODEL_FOLDER} == {"app.py", "requirements.txt", "README.md", PACKAGE.name}


def push_space(folder: str | os.PathLike, repo_id: str, token: str | None = None) -> CommitInfo:
    """
    Uploads a Space in one commit. Files that are in the repository and not in `folder` stay, but for weights of an
    earlier push that have another name now (other shards).

    Args:
        folder (`str` or `os.PathLike`): The folder that [`write_space`] wrote.
        repo_id (`str`): The Space, `"namespace/name"`; created if it does not exist.
        token (`str`, *optional*): Access token; the one of `hf auth login` if not given.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        `ConnectionError`: if the connection breaks. Nothing is visible on the Hub then; pushing again completes it.
    """
    validate_repo_id(repo_id)
    folder, api = Path(folder), HfApi(token=token)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = [path.relative_to(folder).as_posix() for path in files]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in zip(names, files)
    ]
    with explain_connection_failures(folder, repo_id):
        repo_id = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True).repo_id
        outdated = find_outdated_weights(api.list_repo_files(repo_id, repo_type="space"), names)
        operations += [CommitOperationDelete(path_in_repo=name) for name in outdated]
        return api.create_commit(repo_id, operations, commit_message="Upload demo", repo_type="space")
