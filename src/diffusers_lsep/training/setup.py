# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From the flags of `examples/train_lsep.py` to data and model, with every check that can be made before training."""

import argparse
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from ..data.images import ImageSource, load_image_dataset, open_images
from ..data.moments import MomentsDataset, OriginalMomentsDataset
from ..data.sources import SampleSource, SourceSubset, cut_off, hash_labels
from ..data.streamed import open_stream
from ..objective import LinearProbe, LSEPObjective
from ..transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from .arguments import PAPER_SETTINGS
from .fine_tuning import Start, add_lora, read_pretrained
from .repa import REPAEncoder, REPARegularizer


@dataclass
class Setup:
    """What the flags come to."""

    source: SampleSource
    held_out: SampleSource | None
    names: list[str]  # of the classes
    config: dict[str, Any]  # of the transformer
    start: Start | None  # from a saved pipeline
    vae: AutoencoderKL | None
    encoder: REPAEncoder | None
    images: SampleSource | None  # the pixels of the rows of `source`, where the encoder needs them beside moments
    held_out_images: SampleSource | None
    samples_per_step: int
    facts: dict[str, Any]  # what a resumed run has to have in common with its checkpoint, beside flags
    treatment: str | None  # what is done to the images, for the user

    @property
    def steps_per_epoch(self) -> float:
        return len(self.source.labels) / self.samples_per_step


def prepare(args: argparse.Namespace, num_processes: int) -> Setup:
    """Loads data and model, and fills in the flags that depend on them."""
    # 1. VAE
    latents = open_latents(args.latents_dir) if args.latents_dir is not None else None
    pretrained = None
    if args.pretrained_model_name_or_path is not None:
        pretrained = read_pretrained(args.pretrained_model_name_or_path)
    vae, vae_options = None, {}
    if pretrained is not None and pretrained.has_vae and args.pretrained_vae_model_name_or_path is None:
        args.pretrained_vae_model_name_or_path = pretrained.name_or_path
        vae_options = {"subfolder": "vae"}
    elif latents is not None and args.pretrained_vae_model_name_or_path is None and hasattr(latents, "metadata"):
        args.pretrained_vae_model_name_or_path = latents.metadata["vae"]
        vae_options = {key: latents.metadata.get(f"vae_{key}") for key in ("subfolder", "revision")}
    if args.pretrained_vae_model_name_or_path is not None:
        try:
            vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **vae_options)
        except OSError as error:
            path = args.pretrained_vae_model_name_or_path
            raise ValueError(f"`--pretrained_vae_model_name_or_path` {path!r} cannot be loaded: {error}") from error
        vae.requires_grad_(False).eval()
        if isinstance(latents, MomentsDataset):
            latents.check_vae(vae, f"`--pretrained_vae_model_name_or_path` {args.pretrained_vae_model_name_or_path!r}")
    elif latents is not None:
        raise ValueError("`--latents_dir` of this kind needs `--pretrained_vae_model_name_or_path` to make images.")
    vae_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1

    # 2. Architecture and size
    preset = SIT_PRESETS[args.preset or "SiT-XL/2"]
    config: dict[str, Any] = dict(preset)
    if args.model_config_name_or_path is not None:
        try:
            loaded = SiTTransformer2DModel.load_config(args.model_config_name_or_path)
        except (OSError, ValueError) as error:
            path = args.model_config_name_or_path
            raise ValueError(f"`--model_config_name_or_path` {path!r} cannot be loaded: {error}") from error
        config |= {name: value for name, value in loaded.items() if not name.startswith("_") and value is not None}
    if pretrained is not None:
        # Data and flags decide about these two.
        config |= {k: v for k, v in pretrained.config.items() if k not in ("sample_size", "num_classes")}
        if latents is None and args.resolution is None:
            config["sample_size"] = pretrained.config["sample_size"]
    config |= {name: getattr(args, name) for name in preset if getattr(args, name) is not None}
    config["qk_norm"] = args.qk_norm or config.get("qk_norm", False)
    model = "--pretrained_model_name_or_path" if pretrained is not None else "--model_config_name_or_path"
    size_by = model if args.resolution is None and "sample_size" in config else "--resolution"
    channels_by = "--image_channels" if args.image_channels is not None else model if vae is None else "the VAE"
    if latents is not None:
        config["sample_size"] = given(config, "sample_size", latents.moments_shape[-1], "`--latents_dir`")
        args.resolution = given(vars(args), "resolution", config["sample_size"] * vae_factor, "`--latents_dir`")
    args.resolution = args.resolution or config.get("sample_size", 256 // vae_factor) * vae_factor
    if args.resolution % (vae_factor * config["patch_size"]):
        raise ValueError(
            f"`--resolution` has to be divisible by {vae_factor * config['patch_size']} (the VAE's factor {vae_factor}"
            f" times the patch size {config['patch_size']}), but is {args.resolution}."
        )
    config["sample_size"] = given(config, "sample_size", args.resolution // vae_factor, "`--resolution`")
    if vae is not None:
        args.image_channels = given(vars(args), "image_channels", vae.config.in_channels, "the VAE")
        config["in_channels"] = given(config, "in_channels", vae.config.latent_channels, "the VAE")
    else:
        if config.get("in_channels", 3) not in (1, 3):
            raise ValueError(
                f"`--pretrained_vae_model_name_or_path` is needed: the model has {config['in_channels']} channels,"
                " which are latents and neither grey nor RGB."
            )
        args.image_channels = args.image_channels or config.get("in_channels", 3)
        config["in_channels"] = given(config, "in_channels", args.image_channels, "`--image_channels`")

    # 3. Data
    try:
        fraction, split = float(args.validation_split), None
    except (TypeError, ValueError):
        fraction, split = None, args.validation_split
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"`--validation_split` has to be a split or a fraction between 0 and 1, but is {fraction}.")
    if args.num_classes is not None:
        given(config, "num_classes", args.num_classes, "`--num_classes`")
    num_classes = args.num_classes or config.get("num_classes")
    treatment = None
    if latents is not None:
        if split is not None:
            raise ValueError(f"`--validation_split` of latents has to be a fraction such as 0.05, but is {split!r}.")
        if args.random_flip and not latents.has_flips:
            raise ValueError("`--random_flip` needs latents with mirror images, but `--latents_dir` has none.")
        source, held_out, names = latents, None, [latents.id2label[i] for i in range(len(latents.id2label))]
        if num_classes is not None and not len(names) <= num_classes:
            raise ValueError(f"`--num_classes` has to be at least {len(names)} for `--latents_dir`, is {num_classes}.")
        names += [str(index) for index in range(len(names), num_classes or 0)]
    elif args.streaming:
        location = (args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        splits = load_image_dataset(*location, streaming=True)
        size, columns = (args.resolution, args.image_channels), (args.image_column, args.label_column)
        source = open_stream(splits, args.seed, args.num_train_images, *size, *columns, num_classes)
        held_out, names = None, source.names
    else:
        splits = load_image_dataset(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        columns = (args.image_column, args.label_column)
        source, held_out, names = open_images(
            splits, args.resolution, args.image_channels, *columns, num_classes, split
        )
        treatment = check_images(source, size_by, channels_by)
    if fraction is not None:
        source, held_out = cut_off(source, fraction, args.seed)
    config["num_classes"] = args.num_classes = len(names)
    start = None
    if pretrained is not None:
        check_fit(args, config, pretrained.config, pretrained.path_type)
        new_classes = args.new_classes or len(names) != pretrained.config["num_classes"]
        start = Start(pretrained, config, names, new_classes)

    # 4. Method: what is not given is the paper's for this size
    shape = {name: config[name] for name in SIT_PRESETS["SiT-XL/2"]}
    args.preset = next((name for name, preset in SIT_PRESETS.items() if preset == shape), None)
    paper = {**PAPER_SETTINGS["SiT-XL"], "probe_depth": None}
    paper = PAPER_SETTINGS.get(args.preset.partition("/")[0], paper) if args.preset is not None else paper
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.probe_depth = args.probe_depth or max(1, config["num_layers"] // 3)
    args.repa_depth = args.repa_depth or paper["probe_depth"] or max(1, config["num_layers"] // 3)  # REPA has the same
    grid_size = config["sample_size"] // config["patch_size"]
    args.crop_size_min = args.crop_size_min or max(1, grid_size * 3 // 4)
    if args.crop_size_min > grid_size:
        raise ValueError(
            f"`--crop_size_min` has to lie in 1..{grid_size}, the side of the grid of tokens, but is"
            f" {args.crop_size_min}."
        )

    # 5. REPA
    encoder, images, held_out_images = None, None, None
    if args.repa_encoder is not None:
        if latents is not None:
            try:
                images = latents.open_images(args.resolution)
            except ValueError as error:
                raise ValueError(f"`--repa_encoder` needs pixels beside the latents, but {error}") from error
            if fraction is not None:
                held_out_images = SourceSubset(images, held_out.source_rows)
                images = SourceSubset(images, source.source_rows)
        encoder = REPAEncoder(args.repa_encoder, grid_size)

    # 6. Length
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    epochs = args.num_train_epochs
    args.max_train_steps = args.max_train_steps or math.ceil(epochs * len(source.labels) / samples_per_step)
    if args.ema_decay is None:
        args.ema_decay, args.ema_warmup = default_average(args.max_train_steps)
    args.ema_warmup = bool(args.ema_warmup)
    facts = {
        "transformer": config,
        "samples_per_step": samples_per_step,
        "training_images": len(source.labels),
        "training_labels": None if args.streaming else hash_labels(source.labels),
        "class_names": zlib.crc32("\n".join(names).encode()),
        "vae": zlib.crc32(vae.encoder.conv_in.weight.numpy().tobytes()) if vae is not None else None,
    }
    return Setup(
        source=source,
        held_out=held_out,
        names=names,
        config=config,
        start=start,
        vae=vae,
        encoder=encoder,
        images=images,
        held_out_images=held_out_images,
        samples_per_step=samples_per_step,
        facts=facts,
        treatment=treatment,
    )


def check_images(source: ImageSource, size_by: str, channels_by: str) -> str:
    """
    What is done to the images. That colours are lost because a model is grey has to be asked for.

    Args:
        source ([`~data.images.ImageSource`]): The images.
        size_by (`str`): What decides about their size: a flag.
        channels_by (`str`): And about their channels.
    """
    side, grey = source.resolution, source.num_channels == 1
    sizes, has_colours = source.look()
    if has_colours and grey and channels_by != "--image_channels":
        raise ValueError(
            f"`--image_channels` has to be 1 to train on grey copies of these images, which have colours:"
            f" {channels_by} is for grey images of {side} x {side} pixels. For colours take another model."
        )
    if not sizes:  # none that can be read, which is found where it is used
        return "none of those looked at can be read"
    found = [f"{width} x {height}" for width, height in (min(sizes, key=math.prod), max(sizes, key=math.prod))]
    found = found[0] if found[0] == found[1] else " to ".join(found)
    shorter = [min(size) for size in sizes]
    scaled = "scaled down to " if min(shorter) > side else "scaled up to " if max(shorter) < side else "scaled to "
    scaled = "" if set(shorter) == {side} else scaled
    return (
        f"{found} pixels in {'colour' if has_colours else 'grey'} ({len(sizes)} images looked at); used is the central"
        f" square, {scaled}{side} x {side}, in {'grey' if grey else 'colour'}"
        f"{f', as `{size_by}` says' if size_by != '--resolution' else ''}"
    )


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


def build_objective(args: argparse.Namespace, setup: Setup, load: bool) -> LSEPObjective:
    """
    Makes transformer, probe and regularizers, ready to be trained.

    Args:
        args (`argparse.Namespace`): The flags, after [`prepare`].
        setup ([`Setup`]): What they come to.
        load (`bool`): Whether to load the weights that the run starts from, if there are any.
    """
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
    regularizers = {}
    if setup.encoder is not None:
        size = setup.encoder.size
        regularizers["repa"] = REPARegularizer(transformer.inner_dim, size, args.repa_depth, args.repa_weight)
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
        regularizers=regularizers,
    ).train()


def given(values: dict[str, Any], name: str, needed: int, by: str) -> int:
    """The value that is needed, unless another one was asked for."""
    if values.get(name) not in (None, needed):
        raise ValueError(f"`{name}` is {values[name]}, but {by} needs {needed}.")
    return needed


def open_latents(folder: str) -> MomentsDataset | OriginalMomentsDataset:
    if (Path(folder) / "dataset.json").is_file():
        return OriginalMomentsDataset(folder)
    return MomentsDataset(folder)
