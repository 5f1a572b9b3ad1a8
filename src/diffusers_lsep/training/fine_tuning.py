# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a saved pipeline: with other classes, at another size, through LoRA."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from ..lora_pipeline import replace_classes
from ..objective import LinearProbe
from ..pipeline_lsep import LSEPPipeline
from ..transformer_sit import SiTTransformer2DModel


# The layers of a block that LoRA adapts; the modulation and the embeddings stay as they are, but for the label table.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]

LORA_FOLDER = "lora"  # beside the pipeline


@dataclass
class PretrainedPipeline:
    """What a saved pipeline says about itself, without its weights."""

    name_or_path: str
    config: dict[str, Any]  # of the transformer
    path_type: str
    names: dict[int, str] | None  # of the classes that have one
    has_vae: bool
    has_probe: bool


def read_pretrained(name_or_path: str) -> PretrainedPipeline:
    """
    Reads the configs of a saved pipeline.

    Args:
        name_or_path (`str`): Folder or Hub id of an [`LSEPPipeline`].

    Raises:
        `ValueError`: if there is none.
    """
    try:
        index = LSEPPipeline.load_config(name_or_path)
        class_name = index.get("_class_name")  # with its module, where the repository brings its code
        if (class_name[-1] if isinstance(class_name, list) else class_name) != "LSEPPipeline":
            raise ValueError(f"it is no LSEPPipeline, but a {class_name}")
        config = SiTTransformer2DModel.load_config(name_or_path, subfolder="transformer")
        config.pop("auto_map", None)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--pretrained_model_name_or_path` {name_or_path!r} cannot be loaded: {error}") from error
    try:
        LinearProbe.load_config(name_or_path, subfolder="probe")
        has_probe = True
    except OSError:
        has_probe = False
    id2label = index.get("id2label")
    return PretrainedPipeline(
        name_or_path=name_or_path,
        config={name: value for name, value in config.items() if not name.startswith("_")},
        path_type=index.get("path_type", "linear"),
        names={int(key): name for key, name in id2label.items()} if id2label else None,
        has_vae=index.get("vae", [None])[0] is not None,
        has_probe=has_probe,
    )


@dataclass
class Start:
    """From which weights a run starts, and what of them it keeps."""

    pretrained: PretrainedPipeline
    config: dict[str, Any]  # of the transformer in training
    names: list[str]  # of its classes
    new_classes: bool
    label_table: torch.Tensor | None = None  # once it is loaded, as it was before training

    def describe(self) -> str:
        """What is kept and what starts anew, for the user."""
        pretrained, config = self.pretrained, self.config
        lines = []
        if self.new_classes:
            lines.append(
                "all weights are kept but the label table and the probe, which start anew:"
                f" {config['num_classes']} classes in place of {pretrained.config['num_classes']}, each from the"
                " embedding of the null class"
            )
        else:
            lines.append("all weights are kept, the label table included")
            lines.append("the probe too" if pretrained.has_probe else "there is no probe with them: it starts anew")
            there, here = pretrained.names or {}, dict(enumerate(self.names))
            row = next((row for row in sorted(there) if there[row] != here.get(row, there[row])), None)
            if row is not None:
                lines.append(
                    f"class {row} is {there[row]!r} there and {here[row]!r} here: if these are not the same classes in"
                    " the same order, give `--new_classes`"
                )
        depth = self.config["flow_map_depth"]
        if depth is not None and pretrained.config.get("flow_map_depth") is None:
            lines.append(f"from block {depth + 1} on it sees the time to go to, which makes a flow map of it")
        before, now = (c["sample_size"] // c["patch_size"] for c in (pretrained.config, config))
        if before != now:
            lines.append(f"the position table is made anew for {now} x {now} tokens in place of {before} x {before}")
        return f"Starting from {pretrained.name_or_path}: {'; '.join(lines)}."

    def load(self) -> tuple[SiTTransformer2DModel, LinearProbe | None]:
        """
        Loads the transformer, and the probe if it is kept.

        Raises:
            `ValueError`: if weights are missing or damaged.
        """
        name_or_path, size = self.pretrained.name_or_path, self.config["sample_size"]
        try:
            transformer = SiTTransformer2DModel.from_pretrained(
                name_or_path,
                subfolder="transformer",
                sample_size=size,
                flow_map_depth=self.config["flow_map_depth"],
                use_safetensors=True,
            ).float()
            probe = None
            if self.pretrained.has_probe and not self.new_classes:
                probe = LinearProbe.from_pretrained(name_or_path, subfolder="probe", use_safetensors=True).float()
        except Exception as error:  # A damaged file shows in many ways.
            raise ValueError(
                f"`--pretrained_model_name_or_path` {name_or_path!r} cannot be loaded: {error}"
            ) from error
        if self.new_classes:
            replace_classes(transformer, self.config["num_classes"])
        self.label_table = transformer.class_embedding.weight.detach().clone()
        if probe is not None:
            probe = _without_origin(probe, hidden_size=transformer.inner_dim, num_classes=self.config["num_classes"])
        return _without_origin(transformer, **self.config), probe


def _without_origin(model: Any, **config: Any) -> Any:
    """The same model as if it were new: a loaded one writes into its config where it was."""
    with init_empty_weights():
        new = type(model)(**config)
    new.load_state_dict(model.state_dict(), assign=True)
    return new


@torch.no_grad()
def fill_classes(transformer: SiTTransformer2DModel):
    """Without labels the null class alone is trained, and is what the model's one class stands for."""
    transformer.class_embedding.weight[:-1] = transformer.class_embedding.weight[-1]


def add_lora(transformer: SiTTransformer2DModel, rank: int):
    """
    Freezes a transformer but for its label table, and adds trainable LoRA layers (arXiv 2106.09685) of this rank to
    all projections of attention and MLP. They start as zero.

    Raises:
        `ImportError`: if there is no peft.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    transformer.class_embedding.requires_grad_(True)


def merge_lora(transformer: SiTTransformer2DModel) -> SiTTransformer2DModel:
    """A copy of a transformer with its LoRA layers added to the weights; itself if it has none."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return transformer
    with torch.no_grad():
        merged = copy.deepcopy(transformer)
        merged.fuse_lora()
        merged.unload_lora()
    return merged


def save_lora(folder: Path, transformer: SiTTransformer2DModel, start: Start):
    """
    Writes the LoRA layers of a trained transformer for `LSEPPipeline.load_lora_weights`, with all that makes its
    images: the label table, trained whole, as a layer of full rank, and the names of the classes.

    Args:
        folder (`Path`): Where to write `pytorch_lora_weights.safetensors`.
        transformer ([`SiTTransformer2DModel`]): The model that [`add_lora`] has changed.
        start ([`Start`]): From which weights the run started.
    """
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(transformer)
    metadata = transformer.peft_config["default"].to_dict()
    before = start.label_table
    if before is None:  # a run that was continued
        before = start.load()[0].class_embedding.weight.detach()
    change = transformer.class_embedding.weight.detach().float().cpu() - before
    rank = min(change.shape)
    # change.T is B A, of which one is the identity
    rows, width = change.shape
    factors = (torch.eye(rows), change.T) if rows <= width else (change.T, torch.eye(width))
    for name, factor in zip(("A", "B"), factors):
        layers[f"class_embedding.lora_embedding_{name}"] = factor.contiguous()
    metadata["target_modules"] = [*metadata["target_modules"], "class_embedding"]
    for name in ("rank_pattern", "alpha_pattern"):
        metadata[name] = {**metadata[name], "class_embedding": rank}
    LSEPPipeline.save_lora_weights(
        folder,
        layers,
        transformer_lora_adapter_metadata=metadata,
        classes={
            "num_classes": start.config["num_classes"],
            "id2label": dict(enumerate(start.names)),
            "new_classes": start.new_classes,
            "sample_size": start.config["sample_size"],
        },
    )
