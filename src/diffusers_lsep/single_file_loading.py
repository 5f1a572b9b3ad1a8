# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What `from_single_file` does: find out what a file is, check it, and let diffusers load its weights."""

import inspect
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.modeling_utils import load_state_dict
from huggingface_hub import constants, hf_hub_download

from .argument_checks import describe
from .conversion import convert_original_checkpoint, imagenet_id2label
from .pipeline_lsep import LSEPPipeline
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .transformer_sit import SiTTransformer2DModel


MODEL_ARGUMENTS = tuple(inspect.signature(SiTTransformer2DModel).parameters)
HUB_OPTIONS = ("token", "revision", "cache_dir", "force_download", "local_files_only")
LOADING_OPTIONS = ("dtype", "torch_dtype", "device", "device_map", "quantization_config", "low_cpu_mem_usage")
CONFIG_OPTIONS = ("config", "subfolder", "config_revision")

ARGUMENT = "pretrained_model_link_or_path_or_dict"


def load_model(
    model_class: type[SiTTransformer2DModel], given: Any, source: str | None, weights: str, **kwargs
) -> tuple[SiTTransformer2DModel, str | None, bool]:
    """
    `SiTTransformer2DModel.from_single_file`.

    Returns:
        The model, the path that it was trained on if that is known, and whether it is of an original project.
    """
    # 1. Arguments
    known = (*CONFIG_OPTIONS, *LOADING_OPTIONS, *HUB_OPTIONS, "disable_mmap", *MODEL_ARGUMENTS, "path_type")
    for name in kwargs:
        if name not in known:
            raise ValueError(f"`{name}` is not known; `from_single_file` takes {['source', 'weights', *known]}.")
    options, hub_options, config_options = (
        {name: kwargs.pop(name) for name in names if name in kwargs}
        for names in (LOADING_OPTIONS, HUB_OPTIONS, CONFIG_OPTIONS)
    )

    # 2. The file
    content: Any
    content, beside = (given, None) if isinstance(given, dict) else _find_file(given, hub_options)
    disable_mmap = kwargs.pop("disable_mmap", False)
    if isinstance(content, Path) and content.suffix in (".safetensors", ".gguf"):
        try:
            content = load_state_dict(content, disable_mmap)
        except (OSError, ValueError) as error:
            raise ValueError(f"`{ARGUMENT}` {content} is damaged: {error}") from error

    # 3. Its weights in diffusers' layout, and the config
    is_original = not (isinstance(content, dict) and any(str(k).startswith("transformer_blocks.") for k in content))
    config = (
        _read_config(model_class, hub_options, **config_options) if config_options.get("config") is not None else None
    )
    if is_original:
        if config is not None:
            shapeless = ("num_attention_heads", "attention_head_dim", "sample_size")
            kwargs = {**{name: config[name] for name in shapeless if name in config}, **kwargs}
        try:
            converted = convert_original_checkpoint(content, weights, source, **kwargs)
        except ValueError as error:
            raise ValueError(str(error).replace("`checkpoint_path`", f"`{ARGUMENT}`")) from None
        model, path_type = converted.transformer, converted.scheduler.config.path_type
        state_dict = model.state_dict()
        for name, value in (config or {}).items():
            if name not in kwargs and model.config[name] != value:
                raise ValueError(
                    f"`config` has `{name}={value}`, but the file is of a model with {model.config[name]}."
                )
    else:
        if source is not None or weights != "ema":
            raise ValueError(
                f"`source` and `weights` are for files of the original projects, but `{ARGUMENT}` is in the layout of"
                " diffusers."
            )
        path_type, state_dict = kwargs.pop("path_type", None), content
        if config is None and beside is not None:
            config = _read_config(model_class, hub_options, **beside)
            path_type = path_type or _read_path_type(hub_options, **beside)
        if config is None:
            raise ValueError(
                "`config` has to be the folder or Hub id of such a model: weights in the layout of diffusers do not"
                " say their config."
            )
        with torch.device("meta"):
            model = model_class(**{**config, **kwargs})
        _check_weights(state_dict, model, options.get("quantization_config"))

    # 4. The rest is diffusers' own
    with TemporaryDirectory() as folder:
        model.save_config(folder)
        load: Any = FromOriginalModelMixin.from_single_file
        loaded = load.__func__(model_class, dict(state_dict), config=folder, **options)
    if options.get("device") is not None:
        loaded.pos_embed.to(options["device"])  # it leaves buffers where they are
    return loaded, path_type, is_original


def load_pipeline(
    pipeline_class: type[LSEPPipeline],
    given: Any,
    source: str | None,
    weights: str,
    config: str | os.PathLike | None = None,
    **kwargs,
) -> LSEPPipeline:
    """`LSEPPipeline.from_single_file`."""
    for name in ("subfolder", "device", "device_map"):
        if name in kwargs:
            raise ValueError(
                f"`{name}` is for `SiTTransformer2DModel.from_single_file`, a pipeline has more than one."
            )
    components: dict[str, Any] = {n: kwargs.pop(n) for n in ("vae", "scheduler", "id2label") if n in kwargs}
    of_model: dict[str, Any] = {"config": config, "subfolder": "transformer"} if config is not None else {}
    model_class = SiTTransformer2DModel
    transformer, path_type, is_original = load_model(model_class, given, source, weights, **of_model, **kwargs)
    if config is None:
        scheduler = FlowMatchSDEScheduler(path_type=path_type or "linear")
        if is_original and transformer.config.num_classes == 1000:
            components.setdefault("id2label", imagenet_id2label())
        return pipeline_class(transformer, path_type=path_type, **{"scheduler": scheduler, **components})

    options = {name: kwargs[name] for name in ("dtype", "torch_dtype", *HUB_OPTIONS) if name in kwargs}
    options["revision"] = kwargs.get("config_revision")
    if kwargs.get("path_type") is not None:
        components["path_type"] = kwargs["path_type"]
    pipeline = pipeline_class.from_pretrained(config, transformer=transformer, **options, **components)
    if path_type not in (None, pipeline.config.path_type):
        raise ValueError(
            f"`config` is of a model on the path {pipeline.config.path_type!r}, but that of the file is {path_type!r}."
        )
    return pipeline


def _find_file(given: Any, hub_options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file, downloaded if it is on the Hub, and where its config may be: beside it."""
    if isinstance(given, (str, os.PathLike)) and os.path.isfile(given):
        return Path(given), {"config": str(Path(given).parent)}
    hosts = "|".join(re.escape(host) for host in ("https://huggingface.co", "https://hf.co", constants.ENDPOINT))
    file = r"([^/]+/[^/]+)/(?:(?:blob|resolve)/([^/]+)/)?([^?]+)"
    link = re.match(rf"(?:{hosts}|huggingface\.co|hf\.co)/{file}", str(given))
    if link is None:
        raise ValueError(
            f"`{ARGUMENT}` has to be a file, a link to one on the Hub (https://huggingface.co/<repo_id>/blob/main/"
            f"<file>) or a state dict, but is {given!r}."
        )
    revision = hub_options.get("revision") or unquote(link[2] or "main")
    path = hf_hub_download(link[1], unquote(link[3]), **{**hub_options, "revision": revision})
    folder = os.path.dirname(unquote(link[3]))
    return Path(path), {"config": link[1], "subfolder": folder or None, "config_revision": revision}


def _read_config(
    model_class: type[SiTTransformer2DModel],
    hub_options: dict[str, Any],
    config: Any,
    subfolder: str | None = None,
    config_revision: str | None = None,
) -> dict[str, Any]:
    """The model's arguments in a folder or repository: of a model, or of a pipeline's transformer."""
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(f"`config` has to be a folder or a repository on the Hub, but is {describe(config)}.")
    options = {**hub_options, "revision": config_revision}
    for folder in (subfolder,) if subfolder else (None, "transformer"):
        try:
            read = model_class.load_config(config, subfolder=folder, **options)
        except (OSError, RecursionError) as error:
            reason: Exception = error
            continue
        if not isinstance(read, dict):
            raise ValueError(f"`config` {str(config)!r} has to be a JSON object, but is {describe(read)}.")
        if read.get("_class_name") != SiTTransformer2DModel.__name__:
            raise ValueError(
                f"`config` {str(config)!r} has to be of a SiTTransformer2DModel, but is of a"
                f" {read.get('_class_name')}."
            )
        return {name: read[name] for name in MODEL_ARGUMENTS if name in read}
    raise ValueError(f"`config` {str(config)!r} has no config of a SiTTransformer2DModel: {reason}") from reason


def _read_path_type(
    hub_options: dict[str, Any], config: str, subfolder: str | None = None, config_revision: str | None = None
) -> str | None:
    """The path of the pipeline whose transformer the file is, if it lies in one: weights do not say it."""
    if subfolder is None:  # a folder on this machine
        config, subfolder = os.path.split(os.path.abspath(config))
    if subfolder != "transformer":
        return None
    try:
        index = LSEPPipeline.load_config(config, **{**hub_options, "revision": config_revision})
    except (OSError, RecursionError):
        return None
    return index.get("path_type") if isinstance(index, dict) else None


def _check_weights(state_dict: dict[str, Any], model: SiTTransformer2DModel, quantization_config: Any):
    """Raises a `ValueError` that lists every weight which is missing, unknown, or not what the model needs."""
    expected = model.state_dict()
    quantized = {name for name, value in state_dict.items() if hasattr(value, "quant_type")}  # of GGUF
    if quantized and quantization_config is None:
        raise ValueError(
            "`quantization_config` has to be a GGUFQuantizationConfig for weights that are quantized, but is None."
        )
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    common = [name for name in state_dict if name in expected]
    tensors = {name: state_dict[name] for name in common if isinstance(state_dict[name], torch.Tensor)}
    no_tensor = torch.empty(0, dtype=torch.bool)
    problems = {
        "missing": [name for name in expected if name not in state_dict],
        "unknown": [str(name) for name in state_dict if name not in expected],
        "quantized, which only linear layers can be": sorted(quantized - linear),
        "no floating point tensor": [
            name
            for name in common
            if name not in quantized and not torch.is_floating_point(tensors.get(name, no_tensor))
        ],
        "of the wrong shape": [
            f"{name} ({list(tensor.shape)}, not {list(expected[name].shape)})"
            for name, tensor in tensors.items()
            if name not in quantized and tensor.shape != expected[name].shape  # diffusers checks those
        ],
    }
    if any(problems.values()):
        listed = "".join(f"\n  {what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"`{ARGUMENT}` does not hold the weights of the model that `config` describes:{listed}")
