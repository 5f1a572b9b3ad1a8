# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of a pipeline for measuring it: each is decided by the seed, its index, and the batch that it is in.

Which images make a batch is fixed by their indices, so neither processes nor interruptions change an image.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from .autoencoders import autoencoder_in_float32
from .command_line import number
from .files import hash_weights
from .guidance import check_guidance_transformer
from .pipeline_lsep import LSEPPipeline
from .scheduling_flow_match_heun_ode import FlowMatchHeunODEScheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_flow_match_sde_multistep import FlowMatchSDEMultistepScheduler
from .transformer_sit import SiTTransformer2DModel


SAMPLERS = ("sde", "sde2", "ode", "heun", "dpmpp", "unipc")
LABEL_SAMPLINGS = ("random", "balanced", "none")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_pipeline_arguments(parser: argparse.ArgumentParser):
    """Adds the flags of scripts that draw images: which pipeline, and how it samples."""
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or Hub id of a saved LSEP pipeline."
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the pipeline on the Hub.")
    parser.add_argument("--variant", help="Variant of the weight files, such as fp16.")
    add_dtype_argument(parser)
    parser.add_argument(
        "--scheduler",
        choices=SAMPLERS,
        help="Sampler in place of the one that the pipeline was saved with: sde (Euler-Maruyama, the papers'), sde2"
        " (second order, fewer steps), ode (Euler), heun (second order), dpmpp or unipc (of diffusers).",
    )
    parser.add_argument("--num_inference_steps", type=number(int, 1), default=250, help="Steps from noise to image.")


def add_dtype_argument(parser: argparse._ActionsContainer):
    """Adds the flag for the dtype of the transformer."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="Precision in which the transformer computes; the VAE always does in float32.",
    )


def add_precision_arguments(parser: argparse._ActionsContainer):
    """Adds the flags of commands that measure a model: its dtype, and TF32."""
    add_dtype_argument(parser)
    parser.add_argument(
        "--allow_tf32",
        action="store_true",
        default=None,
        help="Round the inputs of the float32 products of model and VAE on NVIDIA GPUs: faster. PyTorch alone rounds"
        " those of convolutions. Networks that make features of images never do.",
    )


class _IntervalAction(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        low, high = values
        if low > high:
            raise argparse.ArgumentError(self, f"has to be LOW HIGH with 0 <= LOW <= HIGH <= 1, but is {low} {high}")
        setattr(namespace, self.dest, values)


def add_guidance_arguments(parser: argparse.ArgumentParser):
    """Adds the flags of the guidance."""
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="Scale of classifier-free guidance; 1 is without."
    )
    parser.add_argument(
        "--guidance_interval",
        action=_IntervalAction,
        type=number(float, 0, 1),
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.0, 1.0],
        help="Times t at which guidance acts: 0 is data, 1 is noise.",
    )


def add_autoguidance_argument(parser: argparse.ArgumentParser):
    """Adds the flag for the weaker model of autoguidance."""
    parser.add_argument(
        "--guidance_transformer",
        metavar="ID_OR_DIR",
        help="A pipeline with a weaker model of the same data, for autoguidance: an earlier checkpoint"
        " (RUN/checkpoint-N/pipeline) or a smaller model. It takes the place of one that may have been"
        " saved with the pipeline.",
    )


def load_guidance_transformer(pipe: LSEPPipeline, pretrained_model_name_or_path: str | os.PathLike):
    """
    Gives a pipeline the transformer of another one as its `guidance_transformer`, on its device and in its dtype.

    Raises:
        `ValueError`: if it cannot be loaded, or is of another path, size, number of classes or prediction.
    """
    name, dtype = str(pretrained_model_name_or_path), pipe.transformer.dtype
    try:
        path_type = LSEPPipeline.load_config(name).get("path_type", "linear")
        weaker = SiTTransformer2DModel.from_pretrained(name, subfolder="transformer", dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"`guidance_transformer` {name!r} cannot be loaded: {error}") from error
    if path_type != pipe.config.path_type:
        raise ValueError(
            f"`guidance_transformer` has to be of the pipeline's path, {pipe.config.path_type!r}, but {name!r} is of"
            f" {path_type!r}."
        )
    check_guidance_transformer(weaker, pipe.transformer)
    pipe.register_modules(guidance_transformer=weaker.to(pipe.device))


def set_scheduler(pipe: LSEPPipeline, name: str | None) -> None:
    """Gives the pipeline the sampler of that name, one of `SAMPLERS`; None keeps the one that it was saved with."""
    config = {"path_type": pipe.config.path_type, "num_train_timesteps": pipe.scheduler.config.num_train_timesteps}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if name in ("sde", "sde2"):
        scheduler_class = FlowMatchSDEScheduler if name == "sde" else FlowMatchSDEMultistepScheduler
        # Of the same SDE as the saved one
        saved = pipe.scheduler.config if pipe.scheduler.config.get("diffusion_form", "none") != "none" else {}
        pipe.scheduler = scheduler_class.from_config(saved, **config)
    elif name == "ode":
        pipe.scheduler = FlowMatchSDEScheduler(**config, diffusion_form="none")
    elif name == "heun":
        pipe.scheduler = FlowMatchHeunODEScheduler(**config)
    elif name == "dpmpp":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    elif name == "unipc":
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **flow)


def describe_scheduler(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Class and settings of a scheduler, without those that it only keeps for the one it may be swapped for."""
    own = inspect.signature(scheduler.__init__).parameters
    config = {name: value for name, value in scheduler.config.items() if name in own}
    return {"sampler": type(scheduler).__name__, "sampler_config": config}


def open_pipeline(
    name_or_path: str | os.PathLike, argument: str, dtype: torch.dtype = torch.float32, **arguments
) -> LSEPPipeline:
    """
    A pipeline with its VAE in float32.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub id.
        argument (`str`): What messages call it.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the transformer.
        arguments: For `LSEPPipeline.from_pretrained`.

    Raises:
        `ValueError`: if it cannot be loaded, or is another pipeline.
    """
    try:
        class_name = LSEPPipeline.load_config(name_or_path, **arguments).get("_class_name")
        if class_name == "LSEPPipeline":
            return LSEPPipeline.from_pretrained(
                name_or_path, dtype={"default": dtype, "vae": torch.float32}, **arguments
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {str(name_or_path)!r} cannot be loaded: {error}") from error
    raise ValueError(f"`{argument}` has to be an LSEPPipeline, but is a {class_name}.")


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    scheduler: str | None = None,
    **arguments,
) -> LSEPPipeline:
    """
    Loads a pipeline to draw images for measuring.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Folder or Hub id.
        device (`str` or `torch.device`):
            Where it computes.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            Of the transformer. The VAE is in float32 from the start: weights that were rounded once stay so.
        scheduler (`str`, *optional*):
            Of [`set_scheduler`].
        arguments:
            For `LSEPPipeline.from_pretrained`, such as `revision`.

    Raises:
        `ValueError`: if it cannot be loaded, or if it draws latents but no images, for want of a VAE.
    """
    pipe = open_pipeline(pretrained_model_name_or_path, "pretrained_model_name_or_path", dtype, **arguments)
    pipe.check_decodable()
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, scheduler)
    return pipe.to(device)


def choose_class_ids(num_images: int, num_classes: int, label_sampling: str = "random", seed: int = 0) -> np.ndarray:
    """
    The class of every image, by its index.

    Args:
        num_images (`int`): How many images.
        num_classes (`int`): How many classes.
        label_sampling (`str`, defaults to `"random"`):
            `"random"`, `"balanced"`: all equally often, in turn, or `"none"`: no class, `num_classes`, for all.
        seed (`int`, defaults to `0`): Of the random ones.

    Returns:
        `np.ndarray`: int64 `[num_images]`. Fewer images have the first of these classes.
    """
    if label_sampling == "none":
        return np.full(num_images, num_classes)
    if label_sampling == "balanced":
        return np.arange(num_images) % num_classes
    return np.random.default_rng(np.random.Philox(key=seed)).integers(num_classes, size=num_images)


def make_generator(seed: int, index: int) -> torch.Generator:
    """
    The generator of one image. On the CPU, so that the noise is the same on every device; torch's generator for the
    CPU looks at 32 bits of its seed, and neighbours in these differ for all images of a run.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    return torch.Generator().manual_seed((first + index) % 2**32)


def draw_batch(
    pipe: LSEPPipeline, class_ids: np.ndarray, batch: int, batch_size: int = 32, seed: int = 0, **arguments
) -> np.ndarray:
    """
    Draws one batch of a run: images `batch * batch_size` and the following ones. They are decoded in float32, as the
    papers do it, whatever the dtype of the VAE.

    Args:
        pipe ([`LSEPPipeline`]): Draws them.
        class_ids (`np.ndarray`): The class of every image of the run.
        batch (`int`): Which batch.
        batch_size (`int`, defaults to `32`): Images in every batch; another one may change last bits.
        seed (`int`, defaults to `0`): Of the run.
        arguments: For the call of the pipeline, such as `num_inference_steps`.

    Returns:
        `np.ndarray`: uint8 `[batch_size, H, W, C]`, fewer in the last batch.

    Raises:
        `ValueError`: if the latents or the images come to values that are no finite numbers.
    """
    indices = np.arange(batch * batch_size, (batch + 1) * batch_size)
    finite: list[torch.Tensor] = []  # after each step, left on the device until the end

    def note(pipe: LSEPPipeline, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> dict:
        finite.append(values["latents"].isfinite().all())
        return {}

    with autoencoder_in_float32(pipe.vae):
        images = pipe(
            class_ids[np.minimum(indices, len(class_ids) - 1)],  # the last batch is padded: all are of one size
            generator=[make_generator(seed, int(index)) for index in indices],
            output_type="pt",
            callback_on_step_end=note,
            **arguments,
        ).images
    bad_steps = (~torch.stack(finite)).nonzero()
    if len(bad_steps) or not images.isfinite().all():
        dtype = str(pipe.transformer.dtype).removeprefix("torch.")
        where = f"after step {int(bad_steps[0]) + 1} of {len(finite)}" if len(bad_steps) else "in the decoded images"
        advice = (
            "Try `dtype` (`--dtype`) 'bfloat16' or 'float32'" if dtype == "float16" else "Its weights may be damaged"
        )
        raise ValueError(f"`transformer` in {dtype} has come to values that are no finite numbers {where}. {advice}.")
    # As the papers' protocol does it: floor, where diffusers' own PIL images are rounded.
    images = (255 * images).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return images[: len(class_ids) - batch * batch_size]


def describe_models(pipe: LSEPPipeline, autoguidance: bool = False) -> dict[str, Any]:
    """
    What decides a pipeline's images, beside the sampler: its path, and its models' configs and hashed weights; of the
    weaker model with `autoguidance`.
    """
    models = {"transformer": pipe.transformer}
    if autoguidance:
        models["guidance_transformer"] = pipe.guidance_transformer
    if pipe.vae is not None:
        models["vae"] = pipe.vae
    return {
        "path_type": pipe.config.path_type,
        "configs": {name: {k: v for k, v in model.config.items() if k[0] != "_"} for name, model in models.items()},
        "weights": {name: hash_weights(model) for name, model in models.items()},
    }


@contextmanager
def float32_products(allow_tf32: bool | None) -> Iterator[None]:
    """
    Says for a while whether NVIDIA GPUs may round the inputs of float32 products and convolutions to TF32 (ten bits of
    mantissa): faster. None leaves it as it is set: by default PyTorch rounds those of convolutions.
    """
    if allow_tf32 is None:
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


class DrawnSamples:
    """
    The images that `examples/sample.py --num_images N` writes, drawn while they are read: none are stored.

    Args:
        pipe ([`LSEPPipeline`]):
            Draws them.
        name (`str`):
            What the set is called in results.
        num_images (`int`):
            How many images.
        num_inference_steps (`int`, defaults to `250`):
            Steps of the scheduler.
        guidance_scale (`float`, defaults to `1.0`):
            Scale of the guidance; off if not above 1.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Times at which it acts.
        label_sampling (`str`, defaults to `"random"`):
            Of [`choose_class_ids`].
        seed (`int`, defaults to `0`):
            Of classes and noise.
        batch_size (`int`, defaults to `32`):
            Images in one batch of the pipeline.
        allow_tf32 (`bool`, *optional*):
            Of [`float32_products`].
        autoguidance_scale (`float`, defaults to `1.0`):
            Scale of autoguidance; off if not above 1.

    Attributes:
        name, count, size, statistics, content_hash, settings, notes: as those of [`NpzImages`]; the hash is that of
            the weights and settings that decide the images.

    Raises:
        `ValueError`: if the pipeline draws latents but no images, for want of a VAE.
    """

    def __init__(
        self,
        pipe: LSEPPipeline,
        name: str,
        num_images: int,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        label_sampling: str = "random",
        seed: int = 0,
        batch_size: int = 32,
        allow_tf32: bool | None = None,
        autoguidance_scale: float = 1.0,
    ):
        from . import __version__

        pipe.check_decodable()
        config = pipe.transformer.config
        self.name, self.count = name, num_images
        self.statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.size = (config.sample_size * pipe.vae_scale_factor,) * 2
        self.notes = []
        if pipe.vae is None and config.in_channels == 1:
            self.notes.append("`samples`: grey images, repeated to three channels")
        if label_sampling == "balanced":
            self.notes.append(
                "`samples`: every class is drawn equally often; the papers draw classes at random, which gives a"
                " higher FID"
            )
        if label_sampling == "none":
            self.notes.append("`samples`: drawn without classes, unlike those of the papers")
        self.settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": list(guidance_interval),
            "label_sampling": label_sampling,
            "seed": seed,
            "batch_size": batch_size,
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "allow_tf32": allow_tf32,
            **describe_scheduler(pipe.scheduler),
            "diffusers_lsep_version": __version__,
        }
        if autoguidance_scale > 1:
            self.settings["autoguidance_scale"] = autoguidance_scale
        self._pipe = pipe
        self._class_ids = choose_class_ids(num_images, config.num_classes, label_sampling, seed)
        decides = {**self.settings, "num_images": num_images, **describe_models(pipe, autoguidance_scale > 1)}
        self.content_hash = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images `start` to `stop` as uint8 `[B, H, W, 3]`."""
        drawn = self.settings["batch_size"]
        names = ("num_inference_steps", "guidance_scale", "guidance_interval")
        arguments = {name: self.settings[name] for name in (*names, "autoguidance_scale") if name in self.settings}
        rest = np.empty((0, *self.size, 3), np.uint8)
        for batch in range(start // drawn, math.ceil(stop / drawn)):
            with float32_products(self.settings["allow_tf32"]):
                images = draw_batch(self._pipe, self._class_ids, batch, drawn, self.settings["seed"], **arguments)
            images = images[max(0, start - batch * drawn) : stop - batch * drawn]
            rest = np.concatenate([rest, np.broadcast_to(images, (*images.shape[:3], 3))])
            while len(rest) >= batch_size:
                yield rest[:batch_size]
                rest = rest[batch_size:]
        if len(rest):
            yield rest
