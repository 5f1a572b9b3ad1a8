# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import inspect
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import CommitInfo

from .interpolants import get_interpolant
from .labels import find_class_ids, find_names, unique_names
from .transformer_sit import SiTTransformer2DModel


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# The slack with which `t` counts as inside `guidance_interval`: schedulers keep their grids in float32.
INTERVAL_TOLERANCE = 1e-6

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


class LSEPPipeline(DiffusionPipeline):
    r"""
    Class-conditional image generation with a [`SiTTransformer2DModel`], in the latent space of a VAE or on pixels.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        transformer ([`SiTTransformer2DModel`]): Predicts the velocity of the flow.
        scheduler (a flow-matching scheduler, of diffusers or of this package, such as [`FlowMatchSDEScheduler`]):
            Integrates the flow.
        vae ([`AutoencoderKL`], *optional*): Decodes latents. Without it the model works on pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*):
            Names of the classes; several names of one class are separated by commas, as in `facebook/DiT-XL-2-256`.
        path_type (`str`, *optional*):
            The path that the transformer was trained on, `"linear"` or `"cosine"`. Saved with the pipeline, so that a
            scheduler which is wrong for it is noticed. The scheduler's own if not given, and `"linear"` if it has
            none.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        path_type: str | None = None,
    ):
        super().__init__()
        if path_type is None:
            path_type = scheduler.config.get("path_type", "linear")
        get_interpolant(path_type)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

        # JSON has only strings as keys.
        id2label = {int(class_id): label for class_id, label in id2label.items()} if id2label is not None else None
        self.register_to_config(id2label=id2label, path_type=path_type)

        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def labels(self) -> dict[str, int]:
        """The names of the classes, in alphabetical order, with their ids; without names that several classes have."""
        return unique_names(find_names(self.config.id2label))

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current step is guided."""
        return self._guidance_active

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

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
                For uploading: `repo_id` (the name of the folder if not given), and the arguments of [`push_to_hub`].
        """
        super().save_pretrained(
            save_directory, safe_serialization, variant, max_shard_size, use_flashpack=use_flashpack
        )
        if push_to_hub:
            from .hub.push import push_folder

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
        revision: str | None = None,
        license: str | None = None,
        with_code: bool = False,
    ) -> CommitInfo:
        """
        Uploads the pipeline to the Hub, as safetensors and with a model card.

        Args:
            repo_id (`str`): The repository, `"namespace/name"`; created if it does not exist.
            commit_message (`str`, *optional*): Title of the commit.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): Access token; the one of `hf auth login` if not given.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request in place of a commit.
            safe_serialization (`bool`, defaults to `True`): Pickles are not uploaded, so nothing else is allowed.
            variant (`str`, *optional*): The variant to save the weights as, such as `"fp16"`.
            revision (`str`, *optional*): The branch to push to, made if it does not exist.
            license (`str`, *optional*):
                Licence of the weights, as the Hub spells it. The model card claims none if not given.
            with_code (`bool`, defaults to `False`):
                Whether to add the code, with which diffusers loads the pipeline with `trust_remote_code=True` where
                diffusers_lsep is not installed.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit.

        Raises:
            `ValueError`: if `safe_serialization` is False.
            `ConnectionError`: if the connection breaks. Calling it again completes the upload.
        """
        from .hub.push import push_pipeline

        if not safe_serialization:
            raise ValueError("`safe_serialization` has to be True for uploading, but is False.")
        return push_pipeline(
            self, repo_id, license, variant, with_code, token, private, revision, commit_message, create_pr
        )

    def get_label_ids(self, label: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """
        Maps classes, by name or by id, to their ids. What could be both a name and an id is the name: `"1"` is the
        class of that name, or where there is none the class with the id 1. An integer is an id.

        Args:
            label (`int`, `str` or a list of these): Classes.

        Returns:
            `list[int]`: Class ids.

        Raises:
            `ValueError`: if there is no such class, or if several classes have the name.
        """
        if isinstance(label, torch.Tensor):
            label = label.tolist()
        labels = label if isinstance(label, (list, tuple, range, np.ndarray)) else [label]
        return find_class_ids(labels, self.config.id2label, self.transformer.config.num_classes)

    def check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        sigmas: list[float] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        if batch_size == 0:
            raise ValueError("`class_labels` has to hold at least one class, but is empty.")
        if sigmas is None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` has to be a finite number, but is {guidance_scale}.")
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` has to be (low, high) with 0 <= low <= high <= 1, but is {guidance_interval}."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has to be one generator or a list of one for each of the {batch_size} images, but is a"
                f" list of {len(generator)}."
            )
        shape = self._latents_shape(batch_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has to be of shape {list(shape)}, but is of shape {list(latents.shape)}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be one of {list(OUTPUT_TYPES)}, but is {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be a part of {self._callback_tensor_inputs}, but has"
                f" {unknown}."
            )
        self._check_scheduler(sigmas)
        if output_type != "latent":
            self.check_decodable()

    @property
    def _scheduler_has_path(self) -> bool:
        # Of all schedulers only those of this package. Not told by their classes, of which there are several where a
        # repository brings its own code (see `hub.add_code`).
        return hasattr(self.scheduler, "path")

    @property
    def _scheduler_uses_flow_sigmas(self) -> bool:
        # The config alone does not tell: it also holds settings of the scheduler that this one was made from.
        takes_them = "use_flow_sigmas" in inspect.signature(self.scheduler.__init__).parameters
        return takes_them and bool(self.scheduler.config.use_flow_sigmas)

    def _check_scheduler(self, sigmas: list[float] | None):
        scheduler, path_type = self.scheduler, self.config.path_type
        name = type(scheduler).__name__
        if sigmas is not None and "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`sigmas` cannot be used with {name}, which does not take any.")

        if self._scheduler_has_path:
            if scheduler.config.path_type != path_type:
                raise ValueError(
                    f"`scheduler` has `path_type={scheduler.config.path_type!r}`, but the transformer was trained on"
                    f" the path {path_type!r}."
                )
            return

        is_flow_match = isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler))
        if not is_flow_match and not self._scheduler_uses_flow_sigmas:
            if "use_flow_sigmas" in inspect.signature(scheduler.__init__).parameters:
                hint = f"{name}.from_config(pipe.scheduler.config, use_flow_sigmas=True"
                hint += ", prediction_type='flow_prediction')"
            else:
                hint = f"FlowMatchSDEScheduler.from_config(pipe.scheduler.config, path_type={path_type!r})"
            raise ValueError(
                f"`scheduler` has to be a flow-matching scheduler, but {name} has no `use_flow_sigmas=True`. Try"
                f" `{hint}`."
            )
        if not is_flow_match and scheduler.config.get("prediction_type") != "flow_prediction":
            raise ValueError(
                f"`scheduler` has to take a velocity, `prediction_type='flow_prediction'`, but {name} has"
                f" `prediction_type={scheduler.config.get('prediction_type')!r}`."
            )
        # These two follow dx = v dt and nothing else; all others use the linear path's alpha and sigma.
        if path_type != "linear" and (not is_flow_match or scheduler.config.get("stochastic_sampling", False)):
            raise ValueError(
                f"`scheduler` {name} is for the linear path, but the transformer was trained on the path"
                f" {path_type!r}. Use FlowMatchSDEScheduler, FlowMatchSDEMultistepScheduler,"
                " FlowMatchHeunODEScheduler, FlowMatchEulerDiscreteScheduler (without `stochastic_sampling`) or"
                " FlowMatchHeunDiscreteScheduler."
            )

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

    def _set_timesteps(self, num_inference_steps: int, device: torch.device, sigmas: list[float] | None):
        scheduler = self.scheduler
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is None and takes_sigmas and not self._scheduler_has_path and not self._scheduler_uses_flow_sigmas:
            # By itself FlowMatchEuler ends at 1 / num_train_timesteps and jumps to 0 from there.
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        if sigmas is not None:
            # Some schedulers calculate with them as they are, which takes an array.
            scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float64), device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)

    def check_decodable(self):
        """Raises a `ValueError` if there are only latents to be had, for want of a VAE."""
        channels = self.transformer.config.in_channels
        if self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"`vae` is needed for images, but is None: the {channels} channels of the transformer are latents, not"
                " grey or RGB. Load the pipeline with its VAE, `vae=AutoencoderKL.from_pretrained(...)`, or use"
                ' `output_type="latent"`.'
            )

    @contextmanager
    def vae_in_float32(self) -> Iterator[None]:
        """
        Has a VAE in half precision compute in float32 for a while. It keeps its dtype where something else casts or
        moves the weights while they are used: layerwise casting, quantization, offload of groups.
        """
        vae, dtype = self.vae, self.vae.dtype if self.vae is not None else torch.float32
        if (
            dtype.itemsize >= 4
            or any(parameter.dtype != dtype for parameter in vae.parameters())
            or self._maybe_raise_error_if_group_offload_active(module=vae)
        ):
            yield
            return
        vae.float()
        try:
            yield
        finally:
            torch.nn.Module.to(vae, dtype)  # that of diffusers would log a warning, every time

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents `[B, C, S, S]` into images in [-1, 1], `[B, 3, H, W]`; without a VAE they are the images.

        Both are float32, and never under autocast. A VAE in half precision decodes in float32 if its config has
        `force_upcast`, as AutoencoderKL's has by default: in bfloat16 images come out off by 0.1 grey levels, which
        the FID notices.
        """
        latents = latents.float()
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.get("shift_factor") is not None:
            latents = latents + config.shift_factor
        upcast = self.vae_in_float32() if config.get("force_upcast") else nullcontext()
        with torch.autocast(latents.device.type, enabled=False), upcast:
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def predict_velocity(
        self,
        latents: torch.Tensor,
        t: float,
        class_ids: torch.Tensor,
        guidance_scale: float = 1.0,
        internal_guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """The velocity at the time `t`, float32 `[B, C, S, S]`, of the guidance if its scale is above 1."""
        sample = latents.to(self.transformer.dtype)
        if guidance_scale > 1:
            sample = torch.cat([sample, sample])
            class_ids = torch.cat([class_ids, torch.full_like(class_ids, self.transformer.config.num_classes)])
        time = torch.full((len(sample),), t, dtype=torch.float32, device=latents.device)
        outputs = self.transformer(sample, timestep=time, class_labels=class_ids, return_dict=False)
        velocity = outputs[0].float()
        if internal_guidance_scale > 1:
            velocity = velocity + (internal_guidance_scale - 1) * (velocity - outputs[1].float())
        if guidance_scale > 1:
            velocity, null_velocity = velocity.chunk(2)
            velocity = null_velocity + guidance_scale * (velocity - null_velocity)
        return velocity

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, as in all pipelines of diffusers
        internal_guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        r"""
        Generates one image for each class label.

        Args:
            class_labels (`int`, `str` or a list of these):
                Class ids in `0..num_classes - 1`, or names of classes (see `labels` and `get_label_ids`).
            num_inference_steps (`int`, defaults to `250`): Number of steps of the scheduler.
            guidance_scale (`float`, defaults to `1.0`):
                Scale `s` of classifier-free guidance (arXiv 2207.12598), `v_null + s (v_class - v_null)`. Off if not
                above 1.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                The times `t`, both ends included, at which guidance acts (arXiv 2404.07724). Outside, the model is
                evaluated once per step and not twice.
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
                returns under `"latents"` replaces the latents.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors that `callback_kwargs` holds.
            internal_guidance_scale (`float`, defaults to `1.0`):
                Scale `s` of Internal Guidance (arXiv 2512.24176), `v + (s - 1) (v - v_k)`, where `v_k` is predicted
                after `internal_guidance_depth` blocks of the transformer: no second evaluation. Off if not above 1.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: if an argument is none of the above, before any work.
        """
        # 1. Check inputs
        label_ids = self.get_label_ids(class_labels)
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
        )
        if internal_guidance_scale > 1 and self.transformer.config.get("internal_guidance_depth") is None:
            raise ValueError(
                "`internal_guidance_scale` has to be 1 with a transformer without `internal_guidance_depth`, but is"
                f" {internal_guidance_scale}."
            )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        # 2. Timesteps. Times are compared on the host: no synchronisation in the loop.
        self._set_timesteps(num_inference_steps, device, sigmas)
        self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        times = self.scheduler.sigmas[: len(timesteps)].tolist()
        self._num_timesteps = len(timesteps)

        # 3. Latents and classes
        latents = self.prepare_latents(batch_size, device, generator, latents)
        class_ids = torch.tensor(label_ids, device=device)

        # 4. Denoising loop
        low, high = guidance_interval
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if accepts_generator else {}
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                # The second evaluation of a step is guided if the first one was.
                if getattr(self.scheduler, "state_in_first_order", True):
                    in_interval = low - INTERVAL_TOLERANCE <= times[i] <= high + INTERVAL_TOLERANCE
                    self._guidance_active = guidance_scale > 1 and in_interval

                scale = guidance_scale if self.do_classifier_free_guidance else 1.0
                velocity = self.predict_velocity(latents, times[i], class_ids, scale, internal_guidance_scale)
                latents = self.scheduler.step(velocity, timestep, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_kwargs = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    callback_outputs = callback_on_step_end(self, i, timestep, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)

                progress_bar.update()

        # 5. Decode
        image = latents
        if output_type != "latent":
            image = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

        self.maybe_free_model_hooks()

        return ImagePipelineOutput(images=image) if return_dict else (image,)
