# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Original LSEP, REPA and SiT checkpoints (`.pt`) as models of diffusers."""

import argparse
import inspect
import json
import math
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from .objective import LinearProbe
from .presets import SIT_PRESETS
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .torch_files import load_checkpoint
from .transformer_sit import SiTTransformer2DModel


SOURCES = ("lsep", "repa", "sit")

WEIGHTS = ("ema", "model")

DTYPES = ("float32", "float16", "bfloat16")

# What the projects call the paths (GVP is the cosine path). SiT's VP path is neither of ours.
_PATH_TYPES = {
    "lsep": {"linear": "linear", "cosine": "cosine"},
    "repa": {"linear": "linear", "cosine": "cosine"},
    "sit": {"Linear": "linear", "GVP": "cosine"},
}

_VELOCITY = {"lsep": "v", "repa": "v", "sit": "velocity"}

# Original module -> ours, outside of the blocks, inside of `blocks.i`, and of the probe.
_MODULES = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["time_embedding.linear_1"],
    "t_embedder.mlp.2": ["time_embedding.linear_2"],
    "y_embedder.embedding_table": ["class_embedding"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}

_BLOCK_MODULES = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "attn.q_norm": ["attn.norm_q"],
    "attn.k_norm": ["attn.norm_k"],
    "attn.proj": ["attn.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}

_PROBE_MODULES = {"classifier.0": ["norm"], "classifier.1": ["linear"]}


@dataclass
class ConvertedCheckpoint:
    """
    What [`convert_original_checkpoint`] makes of a file.

    Args:
        transformer ([`SiTTransformer2DModel`]): The network, in the dtype of the file and in eval mode.
        probe ([`LinearProbe`], *optional*):
            LSEP's linear probe, with the `depth` that the training arguments of the file say, if it has them; `None`
            where the file has none.
        scheduler ([`FlowMatchSDEScheduler`]): The paper's sampler, on the path that the network was trained on.
        source (`str`): `"lsep"`, `"repa"` or `"sit"`.
    """

    transformer: SiTTransformer2DModel
    probe: LinearProbe | None
    scheduler: FlowMatchSDEScheduler
    source: str


def convert_original_checkpoint(
    checkpoint_path: str | PathLike | dict[str, Any],
    weights: str = "ema",
    source: str | None = None,
    **config_overrides,
) -> ConvertedCheckpoint:
    r"""
    Reads a checkpoint of the original LSEP, REPA or SiT code. No code from the file is run.

    SiT has time reversed (`t = 0` is noise), the opposite velocity and, at 256 px, twice the output channels. All of
    this is absorbed into the weights: `cos(f (1 - t))` and `sin(f (1 - t))` are a rotation of `cos(f t)` and
    `sin(f t)`, which goes into the first layer of the timestep embedding; the output layer is negated and loses the
    unused half of its channels.

    Args:
        checkpoint_path (`str`, `os.PathLike` or `dict`):
            The `.pt` file: a training checkpoint (`{"model", "ema", "opt", "args", ...}`) or a bare state dict. Or a
            `.safetensors` file, or what such a file holds.
        weights (`str`, defaults to `"ema"`):
            Which weights of a training checkpoint to take, `"ema"` or `"model"`. A bare state dict has one set only,
            which counts as `"ema"`.
        source (`str`, *optional*):
            The project that the file comes from, `"lsep"`, `"repa"` or `"sit"`. Needed where the content of the file
            does not decide it.
        config_overrides:
            Arguments of [`SiTTransformer2DModel`] that the file does not tell: `num_attention_heads` (or
            `attention_head_dim`) of a model that is none of `SIT_PRESETS`, and `sample_size` to build the model for
            another resolution. Also `path_type`, `"linear"` or `"cosine"`, for a file without training arguments
            (`"linear"` if not given).

    Returns:
        [`ConvertedCheckpoint`]: with `transformer`, `probe`, `scheduler` and `source`.

    Raises:
        `ValueError`: if an argument is none of the above; if the file is damaged, would run code, or does not hold
        exactly the weights of such a model; if `source` or the number of heads is needed and not given.
    """
    # 1. Check inputs
    checkpoint: Any = checkpoint_path
    path = None if isinstance(checkpoint_path, dict) else Path(checkpoint_path)
    if path is not None and not path.is_file():
        raise ValueError(f"`checkpoint_path` has to be a file, but there is none at {path}.")
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` has to be one of {list(WEIGHTS)}, but is {weights!r}.")
    if source is not None and source not in SOURCES:
        raise ValueError(f"`source` has to be one of {list(SOURCES)}, but is {source!r}.")
    path_type = config_overrides.pop("path_type", None)
    if path_type not in (None, "linear", "cosine"):
        raise ValueError(f"`path_type` has to be 'linear' or 'cosine', but is {path_type!r}.")
    known = list(inspect.signature(SiTTransformer2DModel).parameters)
    for name, value in config_overrides.items():
        if name not in known:
            raise ValueError(f"`{name}` is not known; `config_overrides` takes {[*known, 'path_type']}.")
        if name in ("num_attention_heads", "attention_head_dim") and (type(value) is not int or value < 1):
            raise ValueError(f"`{name}` has to be an integer of at least 1, but is {value!r}.")

    try:
        # 2. Read the file and find out what it is.
        if path is not None:
            checkpoint = load_checkpoint(path)
        state_dict, args = _select_weights(checkpoint, weights)
        source = _find_source(state_dict, args, source)
        path_type = _find_path_type(args, source, path_type)
        state_dict = _rename_decoder_blocks(state_dict, args)
        config = _find_config(state_dict, args, config_overrides)

        # 3. Build the models without memory; they receive the tensors of the file below.
        with torch.device("meta"):
            transformer = SiTTransformer2DModel(**config)
            probe = None
            if source == "lsep" and any(name.startswith("classifier.") for name in state_dict):
                depth = _find_depth(args, transformer.config.num_layers)
                probe = LinearProbe(transformer.inner_dim, transformer.config.num_classes, depth=depth)

        # 4. The file has to hold exactly their weights.
        targets = _find_targets(transformer, probe)
        doubled = source == "sit" and _has_doubled_output(state_dict)
        _check_tensors(state_dict, targets, source, doubled)
    except ValueError as error:
        raise ValueError(f"`checkpoint_path`{f' {path}' if path else ''}: {error}") from None

    # 5. Convert. Copies, because a mapped file that somebody writes to would change the model.
    weights_of: dict[torch.nn.Module | None, dict[str, torch.Tensor]] = {transformer: {}, probe: {}}
    for name, (model, parameters) in targets.items():
        tensors = _convert_tensor(name, state_dict[name].detach(), source, doubled, transformer.config.patch_size)
        for parameter, tensor in zip(parameters, tensors):
            weights_of[model][parameter] = tensor.clone(memory_format=torch.contiguous_format)
    transformer.load_state_dict(weights_of[transformer], assign=True)
    transformer.pos_embed.pos_embed = _position_table(
        transformer.inner_dim, transformer.config.sample_size // transformer.config.patch_size
    )
    if probe is not None:
        probe.load_state_dict(weights_of[probe], assign=True)
        probe.eval()
    return ConvertedCheckpoint(transformer.eval(), probe, FlowMatchSDEScheduler(path_type=path_type), source)


def imagenet_id2label() -> dict[int, str]:
    """
    The 1,000 classes of ImageNet, which the original models of 1,000 classes have: the names that WordNet gives the
    class and, last, its synset id, separated by commas (`0: "tench, Tinca tinca, n01440764"`). The source and licence
    of the names stand in `imagenet_labels.json`.
    """
    text = Path(__file__).with_name("imagenet_labels.json").read_text(encoding="utf-8")
    return {int(class_id): label for class_id, label in json.loads(text)["id2label"].items()}


def _select_weights(checkpoint: Any, weights: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the state dict and the training arguments (empty for a bare state dict)."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"the file has to hold a dict, but holds a {type(checkpoint).__name__}.")
    if any(name in checkpoint for name in WEIGHTS):
        if weights not in checkpoint:
            raise ValueError(f"the file has no weights {weights!r}, only {[n for n in WEIGHTS if n in checkpoint]}.")
        state_dict, args = checkpoint[weights], checkpoint.get("args")
    else:
        if weights != "ema":
            raise ValueError(
                f"the file is a bare state dict with one set of weights, so `weights` cannot be {weights!r}."
            )
        state_dict, args = checkpoint, None
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"the file holds no state dict (names and tensors) as its weights {weights!r}.")
    empty = [name for name, tensor in state_dict.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"the file holds no values of {empty}, which were saved from the device 'meta'.")
    sparse = [name for name, tensor in state_dict.items() if tensor.layout != torch.strided]
    if sparse:
        raise ValueError(f"the file has to hold dense tensors, but {sparse} are sparse.")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return dict(state_dict), args if isinstance(args, dict) else {}


def _find_depth(args: dict[str, Any], num_layers: int) -> int | None:
    """After how many blocks the probe reads, if the training arguments say a depth that the model has."""
    depth = args.get("encoder_depth")
    return depth if type(depth) is int and 1 <= depth <= num_layers else None


def _has_doubled_output(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the output layer has twice the channels of the input, SiT's `learn_sigma`."""
    patches, output = state_dict.get("x_embedder.proj.weight"), state_dict.get("final_layer.linear.weight")
    if patches is None or output is None or output.ndim != 2:
        return False
    return output.shape[0] == 2 * patches.shape[1:].numel()


def _find_source(state_dict: dict[str, torch.Tensor], args: dict[str, Any], source: str | None) -> str:
    evidence = {}
    if any(name.startswith("classifier.") for name in state_dict):
        evidence["lsep"] = "it has `classifier.*`"
    if any(name.startswith("projectors.") for name in state_dict):
        evidence["repa"] = "it has `projectors.*`"
    if _has_doubled_output(state_dict):
        evidence["sit"] = "its output has twice the channels of its input"
    elif "image_size" in args and args.get("path_type") in ("Linear", "GVP", "VP"):
        evidence["sit"] = f"its training arguments have `image_size` and `path_type={args['path_type']!r}`"

    described = " and ".join(f"{reason} ({name})" for name, reason in evidence.items())
    if len(evidence) > 1:
        raise ValueError(f"the file looks like more than one project: {described}.")
    if not evidence and source is None:
        if "x_embedder.proj.weight" not in state_dict:
            raise ValueError(
                "the file has to hold the weights of a SiT, but there is no `x_embedder.proj.weight` among"
                f" {', '.join(f'`{name}`' for name in sorted(state_dict)[:3])} and so on."
            )
        raise ValueError(
            "the content of the file does not tell which project it is from. `source` (`--source`) has to be given,"
            f" one of {list(SOURCES)}. SiT's networks run with time reversed, so a guess could be badly wrong."
        )
    if evidence and source is not None and source not in evidence:
        raise ValueError(f"`source` is {source!r}, but the file is not: {described}.")
    return source or next(iter(evidence))


def _find_path_type(args: dict[str, Any], source: str, path_type: str | None) -> str:
    prediction = args.get("prediction", _VELOCITY[source])
    if prediction != _VELOCITY[source]:
        raise ValueError(
            f"the network predicts {prediction!r}; only those that predict the velocity can be converted."
        )
    if "path_type" not in args:
        return path_type or "linear"
    of_file = _PATH_TYPES[source].get(str(args["path_type"]))
    if of_file is None:
        raise ValueError(
            f"the network was trained on the path {args['path_type']!r}; those of {source!r} that can be converted are"
            f" {list(_PATH_TYPES[source])}."
        )
    if path_type not in (None, of_file):
        raise ValueError(f"`path_type` is {path_type!r}, but the network was trained on the path {of_file!r}.")
    return of_file


def _rename_decoder_blocks(state_dict: dict[str, torch.Tensor], args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Older REPA files count the blocks after the first `encoder_depth` ones anew, as `decoder_blocks.j`."""
    if not any(name.startswith("decoder_blocks.") for name in state_dict):
        return state_dict
    encoder_depth = args.get("encoder_depth")
    if not isinstance(encoder_depth, int):
        encoder_depth = len(_block_indices(state_dict))
    renamed = {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name)
        new_name = f"blocks.{int(match[1]) + encoder_depth}.{match[2]}" if match else name
        if new_name in renamed or (match and new_name in state_dict):
            raise ValueError(f"{name} is {new_name} (after {encoder_depth} blocks), which the file has as well.")
        renamed[new_name] = tensor
    return renamed


def _block_indices(state_dict: dict[str, torch.Tensor]) -> set[int]:
    return {int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, state_dict) if match}


def _find_config(
    state_dict: dict[str, torch.Tensor], args: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Derives the arguments of the model from the shapes of the weights, completed by the training arguments."""
    dimensions = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
    }
    missing = [name for name in dimensions if name not in state_dict]
    if missing:
        raise ValueError(f"the file has no weights of a SiT: {', '.join(missing)} missing.")
    for name, number in dimensions.items():
        if state_dict[name].ndim != number or 0 in state_dict[name].shape:
            raise ValueError(f"{name} has the shape {list(state_dict[name].shape)}, not {number} dimensions.")

    width, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    num_classes = state_dict["y_embedder.embedding_table.weight"].shape[0] - 1
    if isinstance(args.get("num_classes"), int) and args["num_classes"] != num_classes:
        raise ValueError(
            f"the training arguments have `num_classes={args['num_classes']}`, but the label table has"
            f" {num_classes + 1} rows, not one more for the null class."
        )
    preset = SIT_PRESETS.get(str(args.get("model")), {})
    if preset and _width(preset) != width:
        preset = {}
    hidden = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) != hidden:
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)

    config = {
        "sample_size": _check_position_table(state_dict["pos_embed"], width) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": preset.get("num_layers", len(_block_indices(state_dict))),
        "mlp_ratio": mlp_ratio,
        "num_classes": num_classes,
        "qk_norm": args.get("qk_norm") is True or any(".attn.q_norm." in name for name in state_dict),
        **overrides,
    }
    return {**config, **_find_heads(state_dict, args, preset, width, overrides)}


def _width(preset: dict[str, int]) -> int:
    return preset["num_attention_heads"] * preset["attention_head_dim"]


def _find_heads(
    state_dict: dict[str, torch.Tensor],
    args: dict[str, Any],
    preset: dict[str, int],
    width: int,
    overrides: dict[str, Any],
) -> dict[str, int]:
    """No weight but those of `qk_norm` has a shape that depends on the number of heads."""
    heads: Any = overrides.get("num_attention_heads")
    head_dim: Any = overrides.get("attention_head_dim")
    if heads is None and head_dim is None:
        query_norm = state_dict.get("blocks.0.attn.q_norm.weight")
        if query_norm is not None and query_norm.numel() > 0:
            head_dim = query_norm.numel()
        elif preset or "model" not in args:
            presets = preset or next((p for p in SIT_PRESETS.values() if _width(p) == width), {})
            heads = presets.get("num_attention_heads")
        if heads is None and head_dim is None:
            raise ValueError(
                f"the number of attention heads cannot be known from the file (width {width}, model"
                f" {args.get('model')!r}). `num_attention_heads` (`--num_attention_heads`) has to be given."
            )
    heads = heads or width // head_dim
    head_dim = head_dim or width // heads
    if heads * head_dim != width:
        raise ValueError(
            f"`num_attention_heads` {heads} times `attention_head_dim` {head_dim} has to be the width of the model,"
            f" {width}."
        )
    return {"num_attention_heads": heads, "attention_head_dim": head_dim}


def _position_table(width: int, grid_size: int) -> torch.Tensor:
    return get_2d_sincos_pos_embed(width, grid_size, base_size=grid_size, output_type="pt").float().unsqueeze(0)


def _check_position_table(table: torch.Tensor, width: int) -> int:
    """Checks that the file's table `[1, N, D]` is the one the model builds for itself; returns the grid's side."""
    grid_size = math.isqrt(table.shape[1])
    if tuple(table.shape) != (1, grid_size**2, width) or width % 4:
        raise ValueError(f"pos_embed has the shape {list(table.shape)}, which is no square grid of width {width}.")
    if not _fits_storage(table):  # or else the comparison could take any amount of memory
        raise ValueError("pos_embed claims more elements than its storage holds.")
    # A table in bfloat16 is off by 2^-9, one in float16 by less.
    tolerance = 1e-4 if table.dtype == torch.float32 else 1e-2
    if not torch.allclose(table.float(), _position_table(width, grid_size), rtol=0, atol=tolerance):
        raise ValueError("pos_embed is not the fixed sine and cosine table of SiT, which is the only one supported.")
    return grid_size


def _fits_storage(tensor: torch.Tensor) -> bool:
    """False for a tensor of one number that its strides blow up."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _find_targets(
    transformer: SiTTransformer2DModel, probe: LinearProbe | None
) -> dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """The original name of every weight -> the model that it goes to and its parameters there, three for fused qkv."""
    modules = {original: (transformer, ours) for original, ours in _MODULES.items()}
    for i in range(len(transformer.transformer_blocks)):
        for original, ours in _BLOCK_MODULES.items():
            modules[f"blocks.{i}.{original}"] = (transformer, [f"transformer_blocks.{i}.{name}" for name in ours])
    if probe is not None:
        modules.update({original: (probe, ours) for original, ours in _PROBE_MODULES.items()})

    parameters: dict[torch.nn.Module, dict[str, torch.Tensor]]
    parameters = {model: dict(model.named_parameters()) for model in (transformer, probe) if model is not None}
    targets: dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor]]] = {}
    for original, (model, ours) in modules.items():
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in ours]
            if names[0] in parameters[model]:
                targets[f"{original}.{kind}"] = (model, {name: parameters[model][name] for name in names})
    return targets


def _check_tensors(
    state_dict: dict[str, torch.Tensor],
    targets: dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor]]],
    source: str,
    doubled: bool,
):
    """Raises a `ValueError` that lists every weight which is missing, unknown, or not what the model needs."""
    problems = {"missing": [name for name in targets if name not in state_dict]}
    problems["unknown"] = [
        name
        for name in state_dict
        if name not in targets and name != "pos_embed" and not (source == "repa" and name.startswith("projectors."))
    ]

    # One dtype for all of them, that of the first.
    dtype = str(state_dict["x_embedder.proj.weight"].dtype).removeprefix("torch.")
    allowed = [dtype] if dtype in DTYPES else list(DTYPES)
    shapes, dtypes, sizes, values = [], [], [], []
    for name, (_, parameters) in targets.items():
        if name not in state_dict:
            continue
        tensor, shape = state_dict[name], list(next(iter(parameters.values())).shape)
        shape[0] *= len(parameters) * (2 if doubled and name.startswith("final_layer.linear.") else 1)
        if tensor.layout != torch.strided or str(tensor.dtype).removeprefix("torch.") not in allowed:
            dtypes.append(f"{name} ({tensor.dtype}, {tensor.layout}, not {' or '.join(allowed)})")
        elif list(tensor.shape) != shape:
            shapes.append(f"{name} ({list(tensor.shape)}, not {shape})")
        elif not _fits_storage(tensor):
            sizes.append(name)
        elif not torch.isfinite(tensor).all():
            values.append(name)
    problems |= {"of the wrong dtype": dtypes, "of the wrong shape": shapes}
    problems |= {"larger than their storage": sizes, "with values that are NaN or infinite": values}
    if any(problems.values()):
        listed = "".join(f"\n  {what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the file does not hold the weights of the network that it should ({source}):{listed}")


def _convert_tensor(
    name: str, tensor: torch.Tensor, source: str, doubled: bool, patch_size: int
) -> tuple[torch.Tensor, ...]:
    if ".attn.qkv." in name:
        return tensor.chunk(3)
    if name.startswith("final_layer.adaLN_modulation.1."):
        shift, scale = tensor.chunk(2)
        return (torch.cat([scale, shift]),)
    if source == "sit" and name == "t_embedder.mlp.0.weight":
        return (_reverse_time(tensor),)
    if source == "sit" and name.startswith("final_layer.linear."):
        if doubled:  # Rows run over (position in the patch, channel): the first half of the channels at each position.
            tensor = tensor.unflatten(0, (patch_size**2, 2, -1))[:, 0].flatten(0, 1)
        return (-tensor,)
    return (tensor,)


def _reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """
    Turns the weight `[D, 256]` that is applied to `[cos(f s), sin(f s)]` into the one for `[cos(f t), sin(f t)]`, with
    `s = 1 - t`: `cos(f s) = cos(f) cos(f t) + sin(f) sin(f t)`, `sin(f s) = sin(f) cos(f t) - cos(f) sin(f t)`.
    """
    half = weight.shape[1] // 2
    # The frequencies as the network has them, in float32; the rotation in float64.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    cos, sin = torch.cos(frequencies), torch.sin(frequencies)
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).to(weight.dtype)
