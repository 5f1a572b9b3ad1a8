# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From the flags of `examples/train_lsep.py` to data and model, with every check that can be made before training."""

import argparse
import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..autoencoders import (
    Autoencoder,
    get_image_channels,
    get_latent_channels,
    get_normalization,
    get_scale_factor,
    load_autoencoder,
)
from ..command_line import with_values
from ..data.fingerprint import Fingerprint, join
from ..data.images import ImageSource, load_image_dataset, open_images
from ..data.moments import MomentsDataset, OriginalMomentsDataset, open_moments_folder
from ..data.sources import SampleSource, SourceSubset, cut_off, hash_labels, parse_split
from ..data.streamed import open_stream
from ..files import hash_weights
from ..labels import UNLABELED
from ..objective import LinearProbe, LSEPObjective
from ..presets import SIT_PRESETS
from ..regularizers import REPAEncoder
from ..regularizers.teachers import Teacher
from ..transformer_sit import SiTTransformer2DModel
from .arguments import PAPER_SETTINGS
from .fine_tuning import PretrainedPipeline, Start, add_lora, read_pretrained
from .flow_map import check_flow_map_teacher, choose_flow_map_flags, open_flow_map_teacher
from .regularizer_flags import build_regularizers, choose_regularizer_flags, open_teacher


# With so many, profiles of other lengths (0.03 to 0.2 from 0.05 and 0.1) are met to 0.5 %.
DEFAULT_SNAPSHOTS = 50


@dataclass
class TrainingData:
    """What is trained on, and what is held out."""

    source: SampleSource
    held_out: SampleSource | None
    names: list[str]  # of the classes
    treatment: str | None = None  # what is done to the images, for the user
    # The pixels of the same rows, where an encoder needs them beside moments:
    images: SampleSource | None = None
    held_out_images: SampleSource | None = None


@dataclass
class Setup:
    """What the flags come to."""

    args: argparse.Namespace  # the flags; those that were not given have the values that they come to
    data: TrainingData
    config: dict[str, Any]  # of the transformer
    start: Start | None  # from a saved pipeline
    vae: Autoencoder | None
    encoder: REPAEncoder | None
    teacher: Teacher | None  # a frozen one
    samples_per_step: int
    facts: dict[str, Any]  # what a continued run has to have in common with its checkpoint, beside flags

    @property
    def steps_per_epoch(self) -> float:
        return len(self.data.source.labels) / self.samples_per_step


def prepare(args: argparse.Namespace, num_processes: int) -> Setup:
    """
    Loads data and models, and finds the values of flags that depend on them.

    Args:
        args (`argparse.Namespace`): The flags. They are not changed: [`Setup`] has others.
        num_processes (`int`): How many processes train.

    Raises:
        `ValueError`: if something is missing, or does not fit the rest.
    """
    latents, pretrained = None, None
    if args.latents_dir is not None:
        latents = open_moments_folder(args.latents_dir, not args.unconditional, "--latents_dir")
    if args.pretrained_model_name_or_path is not None:
        pretrained = read_pretrained(args.pretrained_model_name_or_path)
    vae, vae_name_or_path = open_vae(args, latents, pretrained)
    args = with_values(args, pretrained_vae_model_name_or_path=vae_name_or_path)
    config, resolution, image_channels = choose_architecture(args, latents, pretrained, vae)
    data = open_data(args, config, latents, resolution, image_channels)
    method = choose_method(args, config)
    config = {**config, "num_classes": len(data.names)}
    if "internal-guidance" in args.regularizers:
        depth = args.internal_guidance_depth or config.get("internal_guidance_depth")
        depth = depth or method["internal_guidance_depth"]
        config["internal_guidance_depth"] = method["internal_guidance_depth"] = depth
    elif config.get("internal_guidance_depth") is not None:
        raise ValueError(
            "`--regularizers` has to name internal-guidance for a model with `internal_guidance_depth="
            f"{config['internal_guidance_depth']}`, but is {args.regularizers}."
        )
    method |= choose_flow_map_flags(args, config) | choose_validation_flags(args)
    config["flow_map_depth"] = method.get("flow_map_depth")
    start = None
    if pretrained is not None:
        check_fit(args, config, pretrained.config, pretrained.path_type)
        new_classes = args.new_classes or len(data.names) != pretrained.config["num_classes"]
        new_classes |= args.unconditional and pretrained.names != dict(enumerate(data.names))
        start = Start(pretrained, config, data.names, new_classes)
        if method.get("flow_map_velocity") == "teacher":
            check_flow_map_teacher(start)
    encoder = None
    if args.repa_encoder is not None:
        encoder = REPAEncoder(args.repa_encoder, config["sample_size"] // config["patch_size"])
    teacher = open_teacher(with_values(args, **method), config) or open_flow_map_teacher(with_values(args, **method))

    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    args = with_values(
        args,
        resolution=resolution,
        image_channels=image_channels,
        num_classes=len(data.names),
        **method,
        **choose_length(args, len(data.source.labels), samples_per_step),
    )
    facts = {
        "transformer": config,
        "samples_per_step": samples_per_step,
        "training_images": len(data.source.labels),
        "training_labels": None if args.streaming else hash_labels(data.source.labels),
        "class_names": zlib.crc32("\n".join(data.names).encode()),
        "vae": zlib.crc32(next(vae.encoder.parameters()).numpy().tobytes()) if vae is not None else None,
        "vae_normalization": zlib.crc32(json.dumps(get_normalization(vae)).encode()) if vae is not None else None,
        "repa_encoder_weights": hash_weights(encoder.model) if encoder is not None else None,
        "teacher_weights": hash_weights(teacher.transformer) if teacher is not None else None,
    }
    return Setup(args, data, config, start, vae, encoder, teacher, samples_per_step, facts)


def take_fingerprint(data: TrainingData, accelerator: Accelerator) -> tuple[Fingerprint | None, int]:
    """
    The fingerprint of the data, in the main process, which alone reads them for it; and its value in all.

    Args:
        data ([`TrainingData`]): The data.
        accelerator (`Accelerator`): This process among the others.
    """
    fingerprint = None
    if accelerator.is_main_process:
        sources = [source for source in (data.source, data.images) if source is not None]
        fingerprint = join(*(source.fingerprint() for source in sources))
    [value] = broadcast_object_list([fingerprint.value if fingerprint is not None else None])
    return fingerprint, value


def open_vae(
    args: argparse.Namespace,
    latents: MomentsDataset | OriginalMomentsDataset | None,
    pretrained: PretrainedPipeline | None,
) -> tuple[Autoencoder | None, str | None]:
    """Loads the VAE that is asked for, or else that of the pipeline to start from or of the latents; and its name."""
    name_or_path = args.pretrained_vae_model_name_or_path
    options: dict[str, Any] = {}
    if name_or_path is None and pretrained is not None and pretrained.has_vae:
        name_or_path, options = pretrained.name_or_path, {"subfolder": "vae"}
    elif name_or_path is None and isinstance(latents, MomentsDataset):
        name_or_path = latents.metadata["vae"]
        options = {key: latents.metadata.get(f"vae_{key}") for key in ("subfolder", "revision")}
    if name_or_path is None and latents is not None:
        raise ValueError("`--latents_dir` of this kind needs `--pretrained_vae_model_name_or_path` to make images.")
    if name_or_path is None:
        return None, None
    flag = "--pretrained_vae_model_name_or_path"
    vae = load_autoencoder(name_or_path, flag, **options)
    if isinstance(latents, MomentsDataset):
        latents.check_vae(vae, f"`{flag}` {name_or_path!r}")
    return vae, name_or_path


def choose_architecture(
    args: argparse.Namespace,
    latents: MomentsDataset | OriginalMomentsDataset | None,
    pretrained: PretrainedPipeline | None,
    vae: Autoencoder | None,
) -> tuple[dict[str, Any], int, int]:
    """The config of the transformer, without its classes; the side of the images in pixels, and their channels."""
    # 1. What flags and other models say: later ones win
    config: dict[str, Any] = dict(SIT_PRESETS[args.preset or "SiT-XL/2"])
    if args.model_config_name_or_path is not None:
        config |= read_model_config(args.model_config_name_or_path)
    if pretrained is not None:
        # Data and flags decide about these two.
        config |= {k: v for k, v in pretrained.config.items() if k not in ("sample_size", "num_classes")}
        if latents is None and args.resolution is None:
            config["sample_size"] = pretrained.config["sample_size"]
    if args.preset is not None and any(config[k] != value for k, value in SIT_PRESETS[args.preset].items()):
        flag = "model_config" if pretrained is None else "pretrained_model"
        raise ValueError(f"`--preset` {args.preset!r} is another model than that of `--{flag}_name_or_path`.")
    config |= {k: getattr(args, k) for k in SIT_PRESETS["SiT-XL/2"] if getattr(args, k) is not None}
    config["qk_norm"] = args.qk_norm or config.get("qk_norm", False)

    # 2. Size
    vae_factor = get_scale_factor(vae) if vae is not None else 1
    resolution = args.resolution
    if latents is not None:
        config["sample_size"] = given(config, "sample_size", latents.moments_shape[-1], "`--latents_dir`")
        resolution = given(vars(args), "resolution", config["sample_size"] * vae_factor, "`--latents_dir`")
    resolution = resolution or config.get("sample_size", 256 // vae_factor) * vae_factor
    step = vae_factor * config["patch_size"]
    if resolution % step:
        raise ValueError(
            f"`--resolution` has to be divisible by {step} (the VAE's factor {vae_factor} times the patch size"
            f" {config['patch_size']}), but is {resolution}."
        )
    config["sample_size"] = given(config, "sample_size", resolution // vae_factor, "`--resolution`")

    # 3. Channels
    if vae is not None:
        config["in_channels"] = given(config, "in_channels", get_latent_channels(vae), "the VAE")
        if latents is not None and latents.moments_shape[0] != 2 * config["in_channels"]:
            raise ValueError(
                f"`--latents_dir` has {latents.moments_shape[0] // 2} latent channels, but"
                f" `--pretrained_vae_model_name_or_path` has {config['in_channels']}."
            )
        return config, resolution, given(vars(args), "image_channels", get_image_channels(vae), "the VAE")
    if config.get("in_channels", 3) not in (1, 3):
        raise ValueError(
            f"`--pretrained_vae_model_name_or_path` is needed: the model has {config['in_channels']} channels, which"
            " are latents and neither grey nor RGB."
        )
    image_channels = args.image_channels or config.get("in_channels", 3)
    config["in_channels"] = given(config, "in_channels", image_channels, "`--image_channels`")
    return config, resolution, image_channels


def read_model_config(name_or_path: str) -> dict[str, Any]:
    """The arguments of a saved transformer."""
    try:
        config = SiTTransformer2DModel.load_config(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--model_config_name_or_path` {name_or_path!r} cannot be loaded: {error}") from error
    config.pop("auto_map", None)  # of a repository with code
    return {name: value for name, value in config.items() if not name.startswith("_") and value is not None}


def given(values: dict[str, Any], name: str, needed: int, by: str) -> int:
    """The value that is needed, unless another one was asked for."""
    if values.get(name) not in (None, needed):
        raise ValueError(f"`{name}` is {values[name]}, but {by} needs {needed}.")
    return needed


def open_data(
    args: argparse.Namespace,
    config: dict[str, Any],
    latents: MomentsDataset | OriginalMomentsDataset | None,
    resolution: int,
    image_channels: int,
) -> TrainingData:
    """Opens what is trained on and what is held out; the size and the channels are those of the images."""
    fraction, split = parse_split(args.validation_split)
    if args.num_classes is not None:
        given(config, "num_classes", args.num_classes, "`--num_classes`")
    num_classes = args.num_classes or config.get("num_classes")

    size, columns = (resolution, image_channels), (args.image_column, args.label_column)
    if args.unconditional:
        columns, num_classes = (args.image_column, None), None
    location = {
        "dataset_name": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "train_data_dir": args.train_data_dir,
        "cache_dir": args.cache_dir,
        "argument": "--train_data_dir" if args.dataset_name is None else "--dataset_name",
        "labelled": not args.unconditional,
    }
    if latents is not None:
        if split is not None:
            raise ValueError(f"`--validation_split` of latents has to be a fraction such as 0.05, but is {split!r}.")
        data = open_moments(args, latents, resolution, num_classes)
    elif args.streaming:
        splits = load_image_dataset(**location, streaming=True)
        stream = open_stream(splits, args.seed, args.num_train_images, *size, *columns, num_classes)
        data = TrainingData(stream, None, stream.names)
    else:
        source, held_out, names = open_images(load_image_dataset(**location), *size, *columns, num_classes, split)
        data = TrainingData(source, held_out, names, check_images(args, source))
    if fraction is not None:
        whole, images = data.source, data.images
        data.source, data.held_out = cut_off(whole, fraction, args.seed)
        if images is not None:
            data.images = SourceSubset(images, data.source.source_rows)
            data.held_out_images = SourceSubset(images, data.held_out.source_rows)
    return data


def open_moments(
    args: argparse.Namespace,
    latents: MomentsDataset | OriginalMomentsDataset,
    resolution: int,
    num_classes: int | None,
) -> TrainingData:
    """Images that a VAE has encoded, as what is trained on; with their pixels, if REPA's encoder needs them."""
    if args.random_flip and not latents.has_flips:
        raise ValueError("`--random_flip` needs latents with mirror images, but `--latents_dir` has none.")
    names = [latents.id2label[index] for index in range(len(latents.id2label))]
    if args.unconditional:
        names, latents.labels = list(UNLABELED), np.full_like(latents.labels, len(UNLABELED))
    elif names == list(UNLABELED):
        raise ValueError(
            f"`--latents_dir` has to have labels without `--unconditional`, but {args.latents_dir} was encoded with"
            " that flag."
        )
    if num_classes is not None and not len(names) <= num_classes:
        raise ValueError(f"`--num_classes` has to be at least {len(names)} for `--latents_dir`, is {num_classes}.")
    data = TrainingData(latents, None, names + [str(index) for index in range(len(names), num_classes or 0)])
    if args.repa_encoder is not None:
        try:
            data.images = latents.open_images(resolution)
        except ValueError as error:
            raise ValueError(f"`--repa_encoder` needs pixels beside the latents, but {error}") from error
    return data


def check_images(args: argparse.Namespace, source: ImageSource) -> str:
    """What is done to the images. That colours are lost because a model is grey has to be asked for."""
    model = args.pretrained_model_name_or_path or args.model_config_name_or_path
    model_flag = (
        "--pretrained_model_name_or_path" if args.pretrained_model_name_or_path else "--model_config_name_or_path"
    )
    size_by = model_flag if args.resolution is None and model else "--resolution"
    channels_by = "--image_channels" if args.image_channels else "the VAE"
    if args.image_channels is None and args.pretrained_vae_model_name_or_path is None:
        channels_by = model_flag
    side, grey = source.resolution, source.num_channels == 1
    sizes, has_colours = source.look()
    if has_colours and grey and channels_by != "--image_channels":
        raise ValueError(
            f"`--image_channels` has to be 1 to train on grey copies of these images, which have colours:"
            f" {channels_by} is for grey images of {side} x {side} pixels. For colours take another model."
        )
    if not sizes:  # none that can be read, which is found where it is used
        return "none of those looked at can be read"
    ends = [f"{width} x {height}" for width, height in (min(sizes, key=math.prod), max(sizes, key=math.prod))]
    found = ends[0] if ends[0] == ends[1] else " to ".join(ends)
    shorter = [min(size) for size in sizes]
    scaled = "scaled down to " if min(shorter) > side else "scaled up to " if max(shorter) < side else "scaled to "
    scaled = "" if set(shorter) == {side} else scaled
    return (
        f"{found} pixels in {'colour' if has_colours else 'grey'} ({len(sizes)} images looked at); used is the central"
        f" square, {scaled}{side} x {side}, in {'grey' if grey else 'colour'}"
        f"{f', as `{size_by}` says' if size_by != '--resolution' else ''}"
    )


def choose_method(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The flags of the method; what is not given is the paper's for this size of model."""
    shape = {name: config[name] for name in SIT_PRESETS["SiT-XL/2"]}
    preset = next((name for name, values in SIT_PRESETS.items() if values == shape), None)
    paper = PAPER_SETTINGS.get((preset or "").partition("/")[0], {**PAPER_SETTINGS["SiT-XL"], "probe_depth": None})
    method = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in paper.items()}
    third = max(1, config["num_layers"] // 3)
    method["preset"] = preset
    method["probe_depth"] = method["probe_depth"] or third
    method["repa_depth"] = args.repa_depth or paper["probe_depth"] or third  # REPA has the same
    method |= choose_regularizer_flags(args, config["num_layers"], paper["probe_depth"] or third)
    grid_size = config["sample_size"] // config["patch_size"]
    method["crop_size_min"] = args.crop_size_min or max(1, grid_size * 3 // 4)
    if method["crop_size_min"] > grid_size:
        raise ValueError(
            f"`--crop_size_min` has to lie in 1..{grid_size}, the side of the grid of tokens, but is"
            f" {args.crop_size_min}."
        )
    return method


def choose_validation_flags(args: argparse.Namespace) -> dict[str, Any]:
    """How samples are drawn at a validation: of a flow map in few steps, as its guidance is built in."""
    scale, steps = args.validation_guidance_scale, args.validation_inference_steps
    return {
        "validation_guidance_scale": (1.0 if args.flow_map else 1.5) if scale is None else scale,
        "validation_inference_steps": (4 if args.flow_map else 250) if steps is None else steps,
    }


def choose_length(args: argparse.Namespace, num_images: int, samples_per_step: int) -> dict[str, Any]:
    """The flags that follow from the length of the run, and the length in steps."""
    steps = args.max_train_steps or math.ceil(args.num_train_epochs * num_images / samples_per_step)
    decay, warmup = args.ema_decay, bool(args.ema_warmup)
    if decay is None:
        decay, warmup = default_average(steps)
    every = args.post_hoc_ema_steps
    if every is None and args.post_hoc_ema_sigmas is not None:
        every = max(1, steps // DEFAULT_SNAPSHOTS)
    return {"max_train_steps": steps, "ema_decay": decay, "ema_warmup": warmup, "post_hoc_ema_steps": every}


def default_average(max_train_steps: int) -> tuple[float, bool]:
    """
    Decay and warm-up of the average for a run of this length. With diffusers' warm-up, a decay of (1 + s) / (10 + s)
    after s steps, the average looks back over a ninth of the steps so far, whatever the length: it forgets the start,
    and a run can be made longer. The decay is what the warm-up comes to at the end, at most the paper's.
    """
    return min(0.9999, (1 + max_train_steps) / (10 + max_train_steps)), True


def follows_length(settings: dict[str, Any]) -> bool:
    """Whether the average of a run is that of its length."""
    steps = settings.get("max_train_steps")
    return steps is not None and (settings.get("ema_decay"), settings.get("ema_warmup")) == default_average(steps)


def check_fit(args: argparse.Namespace, config: dict[str, Any], pretrained: dict[str, Any], path_type: str):
    """Whether the weights of another transformer fit the one that the flags and the data ask for."""
    for name, value in pretrained.items():
        if name == "flow_map_depth" and value is None:  # any model may become a flow map
            continue
        if name not in ("sample_size", "num_classes") and config.get(name) != value:
            raise ValueError(
                f"`--pretrained_model_name_or_path` is a model with `{name}={value}`, but flags or data ask for"
                f" {config.get(name)}."
            )
    if args.path_type != path_type:
        raise ValueError(
            f"`--path_type` has to be {path_type!r}, the path of `--pretrained_model_name_or_path`, but is"
            f" {args.path_type!r}."
        )


def build_objective(setup: Setup, load: bool) -> LSEPObjective:
    """
    Makes transformer, probe and regularizers, ready to be trained.

    Args:
        setup ([`Setup`]): What they come to.
        load (`bool`): Whether to load the weights that the run starts from, if there are any.
    """
    args = setup.args
    if setup.start is not None and load:
        transformer, probe = setup.start.load()
    else:
        transformer, probe = SiTTransformer2DModel(**setup.config), None
    if args.no_lsep:
        probe = None
    elif probe is None:
        probe = LinearProbe(transformer.inner_dim, transformer.config.num_classes)
    if probe is not None:
        probe.register_to_config(depth=args.probe_depth)
    if args.lora_rank is not None:
        add_lora(transformer, args.lora_rank)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    grid_size = transformer.config.sample_size // transformer.config.patch_size
    return LSEPObjective(
        transformer,
        probe,
        path_type=args.path_type,
        probe_depth=args.probe_depth,
        probe_dropout_prob=args.probe_dropout_prob,
        class_dropout_prob=args.class_dropout_prob,
        crop_size=(args.crop_size_min, grid_size),
        probe_weight_start=args.probe_weight_start,
        probe_weight_end=args.probe_weight_end,
        num_probe_weights=args.num_probe_weights,
        timestep_sampling=args.timestep_sampling,
        probe_fraction=args.probe_fraction,
        regularizers=build_regularizers(args, transformer, setup.encoder),
    ).train()
