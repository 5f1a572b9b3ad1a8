# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from .argument_checks import check_choice, check_count, check_generator, check_tensor, check_type, describe
from .auto_map import AutoMapMixin
from .autoencoders import Autoencoder, check_autoencoder, decode_latents, get_scale_factor
from .flow_schedulers import check_scheduler, get_r_times, set_timesteps, takes
from .guidance import GuidanceMixin, check_guidance_transformer, is_in_interval
from .interpolants import get_interpolant
from .labels import check_names, find_call_ids, find_class_ids, find_names, unique_names
from .lora_pipeline import LSEPLoraLoaderMixin
from .saving import LSEPSavingMixin, show_components
from .single_file import LSEPSingleFileMixin
from .transformer_checks import check_channels
from .transformer_sit import SiTTransformer2DModel


if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> import diffusers_lsep
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("lsep/sit-xl-256", dtype=torch.bfloat16).to("cuda")
        >>> generator = torch.Generator("cuda").manual_seed(0)
        >>> images = pipe(["golden retriever", 88], guidance_scale=1.8, guidance_interval=(0.0, 0.7)).images
        ```
"""


@show_components
class LSEPPipeline(
    AutoMapMixin, LSEPSavingMixin, DiffusionPipeline, GuidanceMixin, LSEPLoraLoaderMixin, LSEPSingleFileMixin
):
    r"""
    Class-conditional image generation with a [`SiTTransformer2DModel`], in the latent space of a VAE or on pixels.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        transformer ([`SiTTransformer2DModel`]): Predicts the velocity of the flow.
        scheduler (a flow-matching scheduler, of diffusers or of this package, such as [`FlowMatchSDEScheduler`]):
            Integrates the flow.
        vae (an autoencoder of diffusers, such as [`AutoencoderKL`], *optional*):
            Decodes latents. Without it the model works on pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*):
            Names of the classes; several names of one class are separated by commas, as in `facebook/DiT-XL-2-256`.
        path_type (`str`, *optional*):
            The path that the transformer was trained on, `"linear"` or `"cosine"`. Saved with the pipeline, so that a
            scheduler which is wrong for it is noticed. The scheduler's own if not given, and `"linear"` if it has
            none.
        guidance_transformer ([`SiTTransformer2DModel`], *optional*):
            A weaker model of the same task, path included, for autoguidance (arXiv 2406.02507): an earlier average or
            a smaller model.
    """

    # `guidance_transformer` is called in every step: in the chain, each would push the other off the device.
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "guidance_transformer"]
    _callback_tensor_inputs = [
        "latents",
        "class_labels",
        "negative_class_labels",
        "pred_original_sample",
        "prompt_embeds",
    ]

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: Autoencoder | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        path_type: str | None = None,
        guidance_transformer: SiTTransformer2DModel | None = None,
    ):
        super().__init__()
        # Any of them may be None, as everywhere in diffusers, and be put there later.
        check_type("transformer", transformer, nn.Module, "a SiTTransformer2DModel")
        check_type("scheduler", scheduler, SchedulerMixin, "a flow-matching scheduler")
        if path_type is None:
            path_type = scheduler.config.get("path_type", "linear") if scheduler is not None else "linear"
        get_interpolant(path_type)
        if vae is not None:
            # A model of somebody else may have no config.
            check_autoencoder(vae, "vae", getattr(getattr(transformer, "config", None), "in_channels", None))
        check_guidance_transformer(guidance_transformer, transformer)
        models = {"transformer": transformer, "guidance_transformer": guidance_transformer, "vae": vae}
        self.register_modules(scheduler=scheduler, **models)

        self.register_to_config(id2label=check_names(id2label), path_type=path_type)

        self.vae_scale_factor = get_scale_factor(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def labels(self) -> dict[str, int]:
        """The names of the classes, in alphabetical order, with their ids; without names that several classes have."""
        return unique_names(find_names(self.config.id2label))

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the current step, which some caches ask for."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(
        self, label: int | str | list[int | str] | torch.Tensor, argument: str = "class_labels"
    ) -> list[int]:
        """
        Maps classes, by name or by id, to their ids. What could be both a name and an id is the name: `"1"` is the
        class of that name, or where there is none the class with the id 1. An integer is an id, or `num_classes` for
        no class.

        Args:
            label (`int`, `str` or a list of these): Classes.
            argument (`str`, defaults to `"class_labels"`): What messages call `label`.

        Returns:
            `list[int]`: Class ids, in `0..num_classes`.

        Raises:
            `ValueError`: if there is no such class, or if several classes have the name.
        """
        if isinstance(label, (torch.Tensor, np.ndarray)):
            try:
                label = label.tolist()
            except (NotImplementedError, RuntimeError):  # of a tensor without numbers
                raise ValueError(f"`{argument}` has to hold class ids, but is {describe(label)}.") from None
        labels = label if isinstance(label, (list, tuple, range)) else [label]
        return find_class_ids(
            labels, self.config.id2label, self.transformer.config.num_classes, argument, with_null=True
        )

    def check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guider: "BaseGuidance | None" = None,
        internal_guidance_scale: float = 1.0,
        callback_on_step_end: Callable | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        autoguidance_scale: float = 1.0,
    ):
        if sigmas is None:
            check_count("num_inference_steps", num_inference_steps)
        check_type("attention_kwargs", attention_kwargs, dict, "a dictionary")
        check_type("callback_on_step_end", callback_on_step_end, Callable, "a function")
        check_generator("generator", generator, batch_size)
        if latents is not None:
            check_tensor("latents", latents, self._latents_shape(batch_size))
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_type("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs, (list, tuple), "a list")
        names = callback_on_step_end_tensor_inputs or []
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be a part of {self._callback_tensor_inputs}, but has"
                f" {unknown}."
            )
        scales = (guidance_scale, internal_guidance_scale, autoguidance_scale)
        self.check_guidance(*scales, guidance_interval, guider)
        check_channels(self.transformer.config)
        check_scheduler(self.scheduler, self.config.path_type, sigmas, self.transformer.config.get("flow_map_depth"))
        if output_type != "latent":
            self.check_decodable()

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return batch_size, config.in_channels, config.sample_size, config.sample_size

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The initial noise `[B, C, S, S]`, in float32 whatever the dtype of the model."""
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        return randn_tensor(self._latents_shape(batch_size), generator=generator, device=device, dtype=torch.float32)

    def _set_timesteps(
        self, num_inference_steps: int, device: torch.device, sigmas: list[float] | None
    ) -> tuple[torch.Tensor, list[float]]:
        config = self.transformer.config
        num_tokens = (config.sample_size // config.get("patch_size", 1)) ** 2
        grid = set_timesteps(self.scheduler, num_inference_steps, device, sigmas, self.config.path_type, num_tokens)
        self._num_timesteps = len(grid[0])
        return grid

    def check_decodable(self):
        """Raises a `ValueError` if there are only latents to be had, for want of a VAE that fits."""
        channels = self.transformer.config.in_channels
        if self.vae is not None:
            check_autoencoder(self.vae, "vae", channels)
        if self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"`vae` is needed for images, but is None: the {channels} channels of the transformer are latents, not"
                " grey or RGB. Load the pipeline with its VAE, `vae=AutoencoderKL.from_pretrained(...)`, or use"
                ' `output_type="latent"`.'
            )

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents `[B, C, S, S]` into images in [-1, 1], `[B, 3, H, W]`; without a VAE they are the images. Both
        are float32 ([`~autoencoders.decode_latents`]).
        """
        return latents.float() if self.vae is None else decode_latents(self.vae, latents)

    def _call_back(
        self,
        callback: Callable,
        names: list[str],
        i: int,
        timestep: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        evaluated: tuple[torch.Tensor, torch.Tensor, float],
        is_flow_map: bool,
    ):
        # `prompt_embeds` is what diffusers' SDCFGCutoffCallback asks for: it sees the classes, and changes nothing.
        shown = {**tensors, "prompt_embeds": tensors["class_labels"]}
        if "pred_original_sample" in (names or []):
            velocity, state, t = evaluated
            path = get_interpolant(self.config.path_type)
            shown["pred_original_sample"] = (
                state - t * velocity if is_flow_map else path.predict_original_sample(velocity, state, t)
            )
        outputs = callback(self, i, timestep, {name: shown[name] for name in names or []})
        outputs = {} if outputs is None else outputs
        check_type("callback_on_step_end", outputs, Mapping, "a function that returns a dict or None")
        for name, tensor in tensors.items():
            if name in outputs:
                kind = "floating-point numbers" if tensor.is_floating_point() else "integers"
                check_tensor(name, outputs[name], tuple(tensor.shape), kind)
                tensors[name] = outputs[name].to(tensor.device, tensor.dtype)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, as in all pipelines of diffusers
        negative_class_labels: int | str | list[int | str] | None = None,
        num_images_per_label: int = 1,
        guider: "BaseGuidance | None" = None,
        attention_kwargs: dict[str, Any] | None = None,
        internal_guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        r"""
        Generates images of classes.

        Args:
            class_labels (`int`, `str` or a list of these, *optional*):
                Class ids in `0..num_classes - 1`, or names of classes (see `labels` and `get_label_ids`). None, or the
                id `num_classes`, draws from all classes at once, unconditionally.
            num_inference_steps (`int`, defaults to `250`): Number of steps of the scheduler.
            guidance_scale (`float`, defaults to `1.0`):
                Scale `s` of classifier-free guidance (arXiv 2207.12598), `v_null + s (v_class - v_null)`. Off if not
                above 1, or with a `guider`.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                The times `t`, both ends included, at which guidance or the `guider` acts (arXiv 2404.07724). Outside,
                the model is evaluated once per step.
            generator (`torch.Generator` or a list of them, *optional*):
                Makes generation deterministic. With a list of one generator per image, an image depends on its own
                generator only, not on the rest of the batch.
            latents (`torch.Tensor` of shape `[B, C, S, S]`, *optional*): Initial noise, in place of a draw.
            sigmas (`list[float]`, *optional*):
                The grid of times, for schedulers that take one, in place of `num_inference_steps`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called at the end of each step as `callback_on_step_end(pipe, i, timestep, callback_kwargs)`. What it
                returns under `"latents"`, `"class_labels"` or `"negative_class_labels"` replaces these. What it sets
                in `pipe._guidance_scale`, `_guidance_interval`, `_guider`, `_attention_kwargs` or `_interrupt` holds
                from the next step on. Heun's methods do not take latents between the two evaluations of a step.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors that `callback_kwargs` holds: `"latents"`, the ids `"class_labels"` and
                `"negative_class_labels"`, `[B]`, and `"pred_original_sample"`, the data `x_0` that the model, guided
                as it is, saw in the latents of before the step (a flow map with its scheduler: where its step leads
                if it is made longer, up to `t = 0`). A callback of diffusers brings its own list.
            negative_class_labels (`int`, `str` or a list of these, *optional*):
                Classes that guidance leads away from, one for all or one for each of `class_labels`; no class if not
                given.
            num_images_per_label (`int`, defaults to `1`):
                Images of each of `class_labels`, next to each other. A list of generators has one for each image.
            guider (`BaseGuidance`, *optional*):
                A guider of diffusers, such as [`AdaptiveProjectedGuidance`], in place of `guidance_scale`.
            attention_kwargs (`dict`, *optional*): For the transformer; `scale` scales its LoRA layers.
            internal_guidance_scale (`float`, defaults to `1.0`):
                Scale `s` of Internal Guidance (arXiv 2512.24176), `v + (s - 1) (v - v_k)`, where `v_k` is predicted
                after `internal_guidance_depth` blocks of the transformer: no second evaluation, at all times. Off if
                not above 1.
            autoguidance_scale (`float`, defaults to `1.0`):
                Scale `w` of autoguidance (arXiv 2406.02507), `v_weak + w (v_class - v_weak)`, where the pipeline's
                `guidance_transformer` predicts `v_weak` for the same class, in `guidance_interval`. Beside
                `guidance_scale` both directions are added. Off if not above 1.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: if an argument is none of the above, before any work.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        num_classes = self.transformer.config.num_classes
        label_ids, negative_ids = find_call_ids(
            self.get_label_ids, class_labels, negative_class_labels, num_images_per_label, num_classes
        )
        batch_size = len(label_ids)
        self.check_inputs(
            batch_size,
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            generator,
            latents,
            sigmas,
            output_type,
            callback_on_step_end_tensor_inputs,
            guider,
            internal_guidance_scale,
            callback_on_step_end,
            attention_kwargs,
            autoguidance_scale,
        )
        self._guidance_scale = float(guidance_scale)
        low, high = guidance_interval
        self._guidance_interval = float(low), float(high)
        self._internal_guidance_scale = float(internal_guidance_scale)
        self._autoguidance_scale = float(autoguidance_scale)
        self._guider, self._attention_kwargs = guider, attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Timesteps. Times are compared on the host: no synchronisation in the loop.
        timesteps, times = self._set_timesteps(num_inference_steps, device, sigmas)
        is_flow_map = self.transformer.config.get("flow_map_depth") is not None
        r_times = get_r_times(self.scheduler) if is_flow_map else None

        # 3. Latents and classes
        tensors = {
            "latents": self.prepare_latents(batch_size, device, generator, latents),
            "class_labels": torch.tensor(label_ids, device=device),
            "negative_class_labels": torch.tensor(negative_ids, device=device),
        }

        # 4. Denoising loop
        options = {"generator": generator} if takes(self.scheduler.step, "generator") else {}
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                # The second evaluation of a step is guided as the first one was.
                if getattr(self.scheduler, "state_in_first_order", True):
                    in_interval = is_in_interval(times[i], self.guidance_interval)
                    scale = self.guidance_scale if in_interval else 1.0

                step = {"step_index": i, "num_inference_steps": len(timesteps), "timestep": timestep}
                state, r = tensors["latents"], r_times[i] if r_times is not None else None
                velocity = self._predict_step(tensors, times[i], scale, in_interval, step, r)
                tensors["latents"] = self.scheduler.step(velocity, timestep, state, **options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    names, evaluated = callback_on_step_end_tensor_inputs, (velocity, state, times[i])
                    self._call_back(callback_on_step_end, names, i, timestep, tensors, evaluated, r is not None)

                progress_bar.update()
        self._current_timestep = None

        # 5. Decode
        image = tensors["latents"]
        if output_type != "latent":
            image = self.image_processor.postprocess(self.decode_latents(image), output_type=output_type)

        self.maybe_free_model_hooks()

        return ImagePipelineOutput(images=image) if return_dict else (image,)
