# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What an [`LSEPPipeline`] does otherwise than diffusers where it is saved, uploaded and loaded."""

import inspect
import os
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo


PipelineClass = TypeVar("PipelineClass", bound=type[DiffusionPipeline])


def show_components(pipeline_class: PipelineClass) -> PipelineClass:
    """
    Shows diffusers which arguments of a class are components. `DiffusionPipeline.from_pretrained` asks its own class
    what is optional, and else keeps what was saved in place of what is given; without a default in the signature that
    it looks at, `vae=vae` is taken as for every other pipeline. How the class is called does not change.
    """
    signature = inspect.signature(pipeline_class.__init__)
    parameters = []
    for name, parameter in signature.parameters.items():
        if name in pipeline_class._optional_components:
            parameter = parameter.replace(default=parameter.empty)
        if name not in ("self", "transformer", "scheduler"):
            parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
        parameters.append(parameter)
    pipeline_class.__init__.__signature__ = signature.replace(parameters=parameters)
    return pipeline_class


class LSEPSavingMixin:
    """Saves and uploads with a model card, and loads folders with code by this package's own classes."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Here a folder that brings its code along is one like the others: this package's own classes are taken."""
        from .hub.remote_code import without_code

        return without_code(super()._dict_from_json_file(json_file))  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs,
    ):
        """
        Saves the pipeline in a folder, as [`DiffusionPipeline.save_pretrained`] does.

        Args:
            push_to_hub (`bool`, defaults to `False`):
                Whether to upload the pipeline afterwards, but nothing else that the folder may hold.
            kwargs:
                For uploading: `repo_id` (the name of the folder if not given), `license`, `token`, `private`,
                `revision`, `commit_message` and `create_pr`, as for [`push_to_hub`].

        Raises:
            `ValueError`: if an adapter is loaded, whose layers are no part of the model.
        """
        for name, model in self.components.items():  # type: ignore[attr-defined]
            # Deleted adapters leave their layers, which have weights under other names.
            if isinstance(model, torch.nn.Module) and any(".base_layer." in key for key in model.state_dict()):
                adapters = sorted(getattr(model, "peft_config", {})) or "their layers"
                raise ValueError(
                    f"`{name}` has to be without adapters for saving, but has {adapters}. `fuse_lora()` and then"
                    " `unload_lora_weights()` makes them a part of its weights; `save_lora_weights` saves an adapter"
                    " by itself."
                )
        if push_to_hub:
            from .hub.push import push_folder

            known = inspect.signature(push_folder).parameters.keys() - {"folder"}
            if unknown := kwargs.keys() - known:
                raise ValueError(
                    f"`{min(unknown)}` is none of the arguments for uploading, which are {', '.join(sorted(known))}."
                )
        super().save_pretrained(  # type: ignore[misc]
            save_directory, safe_serialization, variant, max_shard_size, use_flashpack=use_flashpack
        )
        if push_to_hub:
            defaults = {"repo_id": os.path.basename(os.path.abspath(save_directory)), "license": None}
            push_folder(save_directory, **{**defaults, **kwargs})

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        with_code: bool = False,
    ) -> CommitInfo:
        """
        Uploads the pipeline to the Hub, as safetensors and with a model card. If it is the one that the folder still
        holds that it was loaded from, that folder's card is taken, with its images, the probe and the evaluation.

        Args:
            repo_id (`str`): The repository, `"namespace/name"`; created if it does not exist.
            commit_message (`str`, *optional*): Title of the commit.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): Access token; the one of `hf auth login` if not given.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request in place of a commit.
            safe_serialization (`bool`, defaults to `True`): Pickles are not uploaded, so nothing else is allowed.
            variant (`str`, *optional*): The variant to save the weights as, such as `"fp16"`.
            subfolder (`str`, *optional*): Not supported: the model card belongs at the top of the repository.
            revision (`str`, *optional*): The branch to push to, made if it does not exist.
            license (`str`, *optional*):
                Licence of the weights, as the Hub spells it. The model card claims none if not given.
            with_code (`bool`, defaults to `False`):
                Whether to add the code, with which diffusers loads the pipeline with `trust_remote_code=True` where
                diffusers_lsep is not installed.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit.

        Raises:
            `ValueError`: if `safe_serialization` is False, or `subfolder` is given.
            `ConnectionError`: if the connection breaks. Calling it again completes the upload.
        """
        from .hub.push import bring_card, push_folder
        from .hub.remote_code import add_code

        if not safe_serialization:
            raise ValueError("`safe_serialization` has to be True for uploading, but is False.")
        if subfolder is not None:
            raise ValueError(
                f"`subfolder` has to be None, since the model card belongs at the top of the repository, but is"
                f" {subfolder!r}."
            )
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if with_code:
                add_code(folder)
            if self.name_or_path is not None:  # type: ignore[attr-defined]
                bring_card(self.name_or_path, folder, repo_id)  # type: ignore[attr-defined]
            return push_folder(folder, repo_id, license, token, private, revision, commit_message, create_pr)
