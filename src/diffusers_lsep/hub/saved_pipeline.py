# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What the files of a saved pipeline say about it, without building it."""

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from safetensors import safe_open

from ..argument_checks import describe
from ..autoencoders import describe_normalization, get_latent_channels, get_scale_factor
from ..files import hash_saved_weights, parse_json
from ..labels import UNLABELED, check_names
from ..presets import SIT_PRESETS
from ..transformer_sit import SiTTransformer2DModel


logger = logging.get_logger(__name__)

EVAL_RESULTS_NAME = "eval_results.json"
COMPONENT_SUFFIXES = (".json", ".safetensors", ".txt", ".py")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".msgpack", ".pkl", ".pt", ".pth")


class SavedPipeline:
    """
    A folder that `LSEPPipeline.save_pretrained` wrote.

    Args:
        folder (`Path`): The folder.

    Attributes:
        index (`dict`): `model_index.json`.
        transformer, scheduler (`dict`): Their configs.
        vae (`dict`, *optional*): That of the VAE, if there is one.
        has_code (`bool`): Whether it brings its code along ([`add_code`]).

    Raises:
        `ValueError`: if `folder` holds no pipeline of this package.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = self._read("model_index.json")
        class_name: Any = self.index.get("_class_name")
        self.has_code = isinstance(class_name, list) and len(class_name) == 2
        if (class_name[1] if self.has_code else class_name) != "LSEPPipeline":
            raise ValueError(
                f"`folder` has to hold a saved LSEPPipeline, but {folder} holds a {str(class_name)[:100]}."
            )
        self.transformer = self._read("transformer/config.json")
        self.scheduler = self._read("scheduler/scheduler_config.json")
        vae = self.index.get("vae")
        self.vae = self._read("vae/config.json") if isinstance(vae, list) and vae[:1] not in ([], [None]) else None
        self._check()

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"`folder` has to hold a saved LSEPPipeline, but there is no {name} in {self.folder}.")
        try:
            content = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"`folder` has to hold a saved LSEPPipeline, but {path} is no JSON: {error}.") from None
        if not isinstance(content, dict):
            raise ValueError(f"`folder` has to hold a saved LSEPPipeline, but {path} is no JSON object.")
        return content

    def _check(self):
        """The index has to name the components, and the transformer's config has to be that of one."""
        for name in ("transformer", "scheduler"):
            value = self.index.get(name)
            if not (isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)):
                raise ValueError(
                    f"`folder` has to hold a saved LSEPPipeline, but `{name}` in the model_index.json of {self.folder}"
                    f" is {describe(value)}, not a library and a class."
                )
        try:
            check_names(self.index.get("id2label"))
            with torch.device("meta"):
                model = SiTTransformer2DModel.from_config(self.transformer)
        except ValueError as error:
            raise ValueError(f"`folder` has to hold a saved LSEPPipeline, but in {self.folder} {error}") from None
        self.transformer = {**model.config, **self.transformer}  # what its file leaves to the defaults

    def component_files(self, extra: Sequence[str] = ()) -> list[str]:
        """
        The files that make the pipeline beside its index, as paths in its folder: for others, on the Hub.

        Args:
            extra (`Sequence[str]`): Folders of models beside the components.

        Raises:
            `ValueError`: if a component or its weights are missing or pickles, or if one leads out of the folder.
        """
        components = [
            name
            for name, value in self.index.items()
            if name != "_class_name" and isinstance(value, list) and len(value) == 2 and value[0] is not None
        ]
        files = []
        for component in (*components, *extra):
            self.check_inside(component)
            folder = self.folder / component
            if not folder.is_dir():
                raise ValueError(
                    f"`folder` has to hold all components of the pipeline, but there is no {component} in"
                    f" {self.folder}."
                )
            paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
            pickles = [path for path in paths if path.suffix in PICKLE_SUFFIXES]
            if pickles:
                raise ValueError(
                    f"`folder` has to hold weights as safetensors, but {pickles[0]} is a pickle. Save the pipeline"
                    " with `safe_serialization=True`."
                )
            has_weights = any(path.suffix == ".safetensors" for path in paths)
            if (folder / "config.json").is_file() and not has_weights:
                raise ValueError(f"`folder` has to hold the weights of {component}, but there are none in {folder}.")
            files += [f"{component}/{path.name}" for path in paths if path.suffix in COMPONENT_SUFFIXES]
        self.check_inside(*files)
        return files

    def check_inside(self, *names: str):
        """Refuses what a card, an index or a link names elsewhere: it could be anything on this machine."""
        for name in names:
            found = (self.folder / name).resolve()
            if not found.is_relative_to(self.folder.resolve()):
                raise ValueError(
                    f"`folder` has to hold all files to upload, but {name!r} in {self.folder} leads to {found}. If"
                    " that is meant to go to the Hub, put a copy in its place."
                )

    def weights(self, component: str = "transformer") -> list[Path]:
        """The files of a component's weights, of one variant if there are several."""
        files = sorted((self.folder / component).glob("*.safetensors"))
        plain = [file for file in files if self._variant(file) is None]
        return plain or [file for file in files if self._variant(file) == self._variant(files[0])]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of the weights that make the images, by component, and variant if it has to be asked for."""
        components = ("transformer",) if self.vae is None else ("transformer", "vae")
        files = {component: self.weights(component) for component in components}
        variants = {component: self._variant(paths[0]) for component, paths in files.items() if paths}
        return {
            component if variant is None else f"{component}.{variant}": hash_saved_weights(files[component])
            for component, variant in variants.items()
        }

    def find_differences(self, weights: Mapping[str, str]) -> list[str]:
        """The components whose weights have another hash than here, in whichever dtype they were loaded."""
        half = ((torch.bfloat16,), (torch.float16,))
        casts = ((), (torch.float32,), *half, *((*dtypes, torch.float32) for dtypes in half))  # a VAE may be cast back
        return [
            component
            for component, digest in weights.items()
            if digest is not None
            and all(hash_saved_weights(self.weights(component), *dtypes) != digest for dtypes in casts)
        ]

    def read_evaluation(self) -> dict[str, Any] | None:
        """
        `eval_results.json`, if there is one and it is of these weights; else it says why not: `{"metrics": {name:
        number}}`, the hashes of the weights that they are of, `{"weights": {component: hash}}`, and beside it whatever
        describes how they were measured, such as `"dataset"`.

        Raises:
            `ValueError`: if it is something else.
        """
        path = self.folder / EVAL_RESULTS_NAME
        if not path.is_file():
            return None
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            results["metrics"] = {name: float(value) for name, value in results["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has to be a JSON object with numbers under `metrics`: {error!r}") from error
        if results.get("weights") == self.hashes:
            return results
        problem = (
            "is of other weights than those" if "weights" in results else "does not say that it is of the weights"
        )
        logger.warning(
            f"{EVAL_RESULTS_NAME} {problem} in {self.folder}: the model card leaves it out. `diffusers-lsep evaluate"
            " --update_card` measures anew."
        )
        return None

    @staticmethod
    def _variant(file: Path) -> str | None:
        variant = re.fullmatch(r"[^.]+\.(.+?)(-\d{5}-of-\d{5})?\.safetensors", file.name)
        return variant[1] if variant else None

    @property
    def variant(self) -> str | None:
        """The variant that has to be asked for when loading, where there are no weights without one."""
        return self._variant(self.weights()[0]) if self.weights() else None

    @property
    def num_parameters(self) -> int:
        total = 0
        for path in self.weights():
            with safe_open(path, framework="np") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118, no dict
        return total

    @property
    def architecture(self) -> str:
        """The name of the preset if it is one, otherwise its numbers."""
        config = self.transformer
        for name, preset in SIT_PRESETS.items():
            if config.get("mlp_ratio") == 4.0 and all(config.get(key) == value for key, value in preset.items()):
                return name
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return f"SiT with {config['num_layers']} blocks of width {width}, patch size {config['patch_size']}"

    @property
    def is_latent_without_vae(self) -> bool:
        return self.vae is None and self.transformer["in_channels"] not in (1, 3)

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels; of the latents, if there is no VAE to decode them."""
        factor = get_scale_factor(self._autoencoder) if self.vae is not None else 1
        return self.transformer["sample_size"] * factor

    @cached_property
    def _autoencoder(self) -> Any:
        """The VAE without its weights."""
        with torch.device("meta"):
            return getattr(diffusers, (self.vae or {})["_class_name"]).from_config(self.vae)

    @property
    def autoencoder(self) -> str | None:
        """Which VAE it is and how its latents are normalised, in Markdown."""
        if self.vae is None:
            return None
        vae = self._autoencoder
        return (
            f"`{type(vae).__name__}`, {get_latent_channels(vae)} channels, {get_scale_factor(vae)} times smaller than"
            f" the image; its latents `x` are normalised as {describe_normalization(vae)}"
        )

    @property
    def is_unconditional(self) -> bool:
        """Whether it was trained without labels."""
        return self.index.get("id2label") == dict(zip("0", UNLABELED))

    @property
    def has_probe(self) -> bool:
        return (self.folder / "probe" / "config.json").is_file()

    @property
    def example_labels(self) -> list[int] | list[str]:
        """Two classes, by name where a name belongs to one class only."""
        ids = sorted({0, self.transformer["num_classes"] // 2})
        id2label = self.index.get("id2label")
        if not id2label:
            return ids
        names = {int(class_id): [name.strip() for name in label.split(",")] for class_id, label in id2label.items()}
        count = Counter(name for of_class in names.values() for name in set(of_class))
        return [next((name for name in names.get(i, []) if count[name] == 1), i) for i in ids]

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """The scheduler's own settings, without what its file holds for others that it may be swapped for."""
        scheduler_class = getattr(diffusers, self.index["scheduler"][1], None)
        own = inspect.signature(scheduler_class).parameters if scheduler_class is not None else self.scheduler
        return {key: value for key, value in self.scheduler.items() if key in own}
