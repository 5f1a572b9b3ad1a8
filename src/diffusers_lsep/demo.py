# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A page on which a pipeline draws: classes, guidance, sampler and cache, and the images as they come out of noise."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from .figures import make_labeled_grid
from .labels import find_names
from .pipeline_lsep import LSEPPipeline
from .sampling import SAMPLERS, set_scheduler


try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"The demo needs gradio: pip install 'diffusers_lsep[demo]' ({error}).") from error


SAVED_SCHEDULER = "as saved"
SAMPLER_TITLES = {
    "sde": "Euler-Maruyama, SDE: the papers', 250 steps",
    "sde2": "second order, SDE: 50 steps or more",
    "ode": "Euler, ODE",
    "heun": "Heun, ODE: second order, two evaluations a step",
    "dpmpp": "DPM++ 2M",
    "unipc": "UniPC",
}
NO_CACHE, FIRST_BLOCK_CACHE, TAYLORSEER_CACHE = "none", "FirstBlockCache", "TaylorSeerCache"

MAX_SEED = 2**32 - 1
MAX_IMAGES = 8
MAX_STEPS = 250
MAX_GUIDANCE = 10
STRIP_COLUMNS = 8
STRIP_SIDE = 128  # of a picture in the strip; smaller ones are enlarged to half of it
PIXEL_ART_SIDE = 128  # images below are enlarged without smoothing

# Fonts that every system has: the page asks no other server for anything.
THEME = gr.themes.Soft(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.pixel-art img, #strip img { image-rendering: pixelated; }
#images .grid-wrap { height: auto; min-height: 8rem; max-height: none; overflow: hidden; }
#strip img { width: 100%; }
#strip .icon-button-wrapper { display: none; }
"""


class Previews:
    """
    A `callback_on_step_end` that shows the data which the model sees in its state while a pipeline runs, at steps that
    are evenly spaced.

    Args:
        num_inference_steps (`int`): In how many steps it draws.
        show (`Callable`): Gets `(step, t, images)`: the number of the step, the time of that state, and PIL images.
        stopped (`threading.Event`): If set, the pipeline is interrupted after the step.

    Attributes:
        tensor_inputs (`list[str]`): For the call, its `callback_on_step_end_tensor_inputs`.
    """

    tensor_inputs = ["pred_original_sample"]

    def __init__(
        self,
        num_inference_steps: int,
        show: Callable[[int, float, list[Image.Image]], None],
        stopped: threading.Event,
    ):
        self.show, self.stopped = show, stopped
        columns = min(STRIP_COLUMNS, num_inference_steps)
        self.shown = set(np.linspace(1, num_inference_steps, columns).round().astype(int).tolist())
        self.steps_done = 0

    def __call__(self, pipe: LSEPPipeline, i: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.stopped.is_set():
            pipe._interrupt = True
        # Heun's method passes here twice in a step, first with a point that it does not keep.
        elif getattr(pipe.scheduler, "state_in_first_order", True):
            self.steps_done += 1
            if self.steps_done in self.shown:
                images = pipe.image_processor.postprocess(pipe.decode_latents(tensors["pred_original_sample"]))
                self.show(self.steps_done, pipe.scheduler.sigmas[i].item(), images)
        return {}


def draw_strip(pictures: list[Image.Image], times: list[float], num_columns: int) -> Image.Image:
    """An image at the times so far, from left to right; columns that are to come are blank."""
    thumbnails = [picture.copy() for picture in pictures]
    for thumbnail in thumbnails:
        thumbnail.thumbnail((STRIP_SIDE, STRIP_SIDE))
    first, num_blank = thumbnails[0], num_columns - len(pictures)
    thumbnails += [Image.new(first.mode, first.size, "white")] * num_blank
    return make_labeled_grid(thumbnails, num_columns, [f"t = {t:.2f}" for t in times] + [""] * num_blank)


def start_cache(transformer: Any, cache: str, threshold: float, interval: int):
    """Turns on one of diffusers' caches by its name here; off is whoever has no such mixin."""
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    if cache == FIRST_BLOCK_CACHE:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    elif cache == TAYLORSEER_CACHE:
        transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=interval))


class Drawer:
    """
    Draws with a pipeline, for one visitor after the other, and shows how the images come out of noise.

    Args:
        pipe ([`LSEPPipeline`]): The pipeline. Its scheduler is another one while it draws with that.
    """

    def __init__(self, pipe: LSEPPipeline):
        self.pipe = pipe
        self.saved_scheduler = pipe.scheduler
        self.lock = threading.Lock()

    def draw(
        self,
        class_label: int | str | None,
        num_images: int,
        seed: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_low: float,
        guidance_high: float,
        scheduler: str,
        cache: str = NO_CACHE,
        cache_threshold: float = 0.05,
        cache_interval: int = 5,
    ) -> Iterator[tuple[list[Image.Image], Image.Image | None, str]]:
        """
        Draws images of a class, as the page asks for them. Image `i` has a generator of its own, with the seed
        `seed + i`: `pipe([class_label], generator=[torch.Generator().manual_seed(seed)])` gives the first one.

        Yields:
            `tuple[list[PIL.Image.Image], PIL.Image.Image, str]`: the images as the model sees them at that moment, the
            strip of the first one up to then, and what is going on; at last the images themselves.

        Raises:
            `gradio.Error`: with what is wrong, if the pipeline refuses the arguments or memory does not suffice.
        """
        if class_label is None or class_label == "":
            raise gr.Error("Choose a class: type a part of its name.", print_exception=False)
        if seed is None:
            raise gr.Error(f"The seed has to be an integer from 0 to {MAX_SEED}.", print_exception=False)
        call = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": (guidance_low, guidance_high),
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(num_images)],
        }
        events: SimpleQueue[Any] = SimpleQueue()
        stopped = threading.Event()
        previews = Previews(num_inference_steps, lambda *seen: events.put(seen), stopped)

        def work():
            try:
                with self.lock:
                    if not stopped.is_set():
                        cache_settings = cache, cache_threshold, cache_interval
                        events.put(self._run([class_label] * num_images, scheduler, cache_settings, previews, call))
            except Exception as error:
                events.put(error)

        threading.Thread(target=work, daemon=True).start()
        settings = {name: value for name, value in call.items() if name != "generator"}
        settings |= {"class_label": class_label, "seed": seed, "scheduler": scheduler, "run": uuid4().hex}

        def show(images: list[Image.Image], strip: Image.Image, status: str):
            # A PNG says what it is. So no two are equal: gradio names files by their contents, and would write one
            # anew while its like is on the way to the browser.
            for i, image in enumerate([*images, strip]):
                image.info["parameters"] = json.dumps({**settings, "image": i, "status": status})
            return images, strip, status

        pictures: list[Image.Image] = []  # the first image, and when
        times: list[float] = []
        try:
            yield [], None, "Waiting for the first step."
            while isinstance(event := events.get(), tuple):
                step, t, images = event
                pictures.append(images[0])
                times.append(t)
                strip = draw_strip(pictures, times, len(previews.shown))
                yield show(images, strip, f"Step {step} of {num_inference_steps}, t = {t:.2f}.")
        finally:
            stopped.set()
        if isinstance(event, torch.OutOfMemoryError):
            raise gr.Error(f"Memory does not suffice for {num_images} images at a time: ask for fewer.") from event
        if isinstance(event, ValueError):
            raise gr.Error(str(event), print_exception=False) from event
        if isinstance(event, Exception):
            raise event
        seeds = f"seed {seed}" if num_images == 1 else f"seeds {seed} to {seed + num_images - 1}"
        yield show(event, strip, f"{num_inference_steps} steps, {seeds}.")

    def _run(
        self,
        class_labels: list[int | str],
        scheduler: str,
        cache_settings: tuple[str, float, int],
        previews: Previews,
        call: dict[str, Any],
    ) -> list[Image.Image]:
        pipe = self.pipe
        try:
            set_scheduler(pipe, None if scheduler == SAVED_SCHEDULER else scheduler)
            start_cache(pipe.transformer, *cache_settings)
            return pipe(
                class_labels,
                **call,
                callback_on_step_end=previews,
                callback_on_step_end_tensor_inputs=previews.tensor_inputs,
            ).images
        finally:
            pipe.scheduler = self.saved_scheduler
            if getattr(pipe.transformer, "is_cache_enabled", False):
                pipe.transformer.disable_cache()


def describe_pipeline(pipe: LSEPPipeline) -> str:
    """What the page says about the model: a line of Markdown."""
    config, side = pipe.transformer.config, pipe.transformer.config.sample_size * pipe.vae_scale_factor
    classes = f"{config.num_classes:,} classes" if config.num_classes > 1 else "one class"
    return (
        f"Images by flow matching: {classes}, {side} × {side} pixels,"
        f" {pipe.transformer.num_parameters() / 1e6:,.1f} M parameters."
        " Drawn with diffusers_lsep ([LSEP](https://arxiv.org/abs/2509.21565))."
    )


def list_classes(pipe: LSEPPipeline) -> list[tuple[str, int]]:
    """The classes to choose from, what they are called and their ids; those of one name with the id in it."""
    id2label, num_classes = pipe.config.id2label or {}, pipe.transformer.config.num_classes
    ids_of_name = find_names(id2label)
    choices = []
    for class_id in range(num_classes):
        name = id2label.get(class_id, f"class {class_id}")
        choices.append((f"{name} ({class_id})" if len(ids_of_name.get(name, [])) > 1 else name, class_id))
    return choices


def make_demo(
    pipe: LSEPPipeline,
    name: str,
    scheduler: str | None = "sde2",
    num_inference_steps: int = 50,
    guidance_scale: float = 1.5,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> gr.Blocks:
    """
    Builds the page.

    Args:
        pipe ([`LSEPPipeline`]):
            Draws the images.
        name (`str`):
            What the page calls the model.
        scheduler (`str`, *optional*, defaults to `"sde2"`):
            What the page starts with: a name of `sampling.SAMPLERS`, or None for the one that the pipeline was saved
            with.
        num_inference_steps (`int`, defaults to `50`):
            Likewise, in `1..250`.
        guidance_scale (`float`, defaults to `1.5`):
            Likewise, in `1..10`.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Likewise.

    Returns:
        `gradio.Blocks`: the page, for [`launch_demo`]. Its API has one function, `/generate`.
    """
    drawer, classes = Drawer(pipe), list_classes(pipe)
    schedulers = [(SAVED_SCHEDULER, SAVED_SCHEDULER), *((SAMPLER_TITLES[sampler], sampler) for sampler in SAMPLERS)]
    is_pixel_art = pipe.transformer.config.sample_size * pipe.vae_scale_factor < PIXEL_ART_SIDE
    low, high = guidance_interval

    # analytics_enabled: gradio's calls home, which a visitor has not asked for
    with gr.Blocks(title=name, analytics_enabled=False) as demo:
        gr.Markdown(f"# {name}\n{describe_pipeline(pipe)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                class_label = gr.Dropdown(
                    classes, value=0, label="Class", info="Type a part of its name.", allow_custom_value=True
                )
                num_images = gr.Slider(1, MAX_IMAGES, value=4, step=1, precision=0, label="Images")
                with gr.Row(equal_height=True):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=2)
                    dice = gr.Button("New seed", min_width=80)
                guidance = gr.Slider(1, MAX_GUIDANCE, value=guidance_scale, step=0.1, label="Guidance (1 is without)")
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
                with gr.Accordion("Sampler"):
                    method = gr.Dropdown(schedulers, value=scheduler or SAVED_SCHEDULER, label="Scheduler")
                    steps = gr.Slider(1, MAX_STEPS, value=num_inference_steps, step=1, precision=0, label="Steps")
                    interval_low = gr.Slider(0, 1, value=low, step=0.01, label="Guidance from t (0 is the image)")
                    interval_high = gr.Slider(0, 1, value=high, step=0.01, label="Guidance up to t (1 is noise)")
                inputs: list[Any] = [class_label, num_images, seed]
                inputs += [steps, guidance, interval_low, interval_high, method]
                if hasattr(pipe.transformer, "enable_cache"):
                    inputs += add_cache_controls()
            with gr.Column(scale=3, min_width=320):
                status = gr.Markdown("Choose a class and press *Draw*.", elem_id="status")
                gallery = gr.Gallery(
                    label="Images",
                    show_label=False,
                    columns=4,
                    object_fit="contain",
                    format="png",
                    elem_id="images",
                    elem_classes=["pixel-art"] if is_pixel_art else [],
                )
                gr.Markdown("The first image on its way out of noise: what the model expects to see")
                strip = gr.Image(label="Strip", show_label=False, format="png", elem_id="strip")
        run = draw.click(drawer.draw, inputs, [gallery, strip, status], api_name="generate", show_progress_on=status)
        stop.click(None, cancels=[run], api_visibility="private")
        dice.click(lambda: random.randint(0, MAX_SEED), None, seed, api_visibility="private")
    return demo.queue(max_size=20)


def add_cache_controls() -> list[gr.components.Component]:
    """The cache, and the setting of each, of which only the chosen one's is to be seen."""
    with gr.Accordion("Cache", open=False):
        cache = gr.Dropdown(
            [NO_CACHE, FIRST_BLOCK_CACHE, TAYLORSEER_CACHE],
            value=NO_CACHE,
            label="Cache",
            info="Of diffusers: leaves out blocks whose outputs hardly change from step to step.",
        )
        threshold = gr.Slider(
            0, 1, value=0.05, step=0.01, label="Threshold", info="Larger is faster and less exact.", visible=False
        )
        interval = gr.Slider(
            2, 10, value=5, step=1, precision=0, label="Steps between full evaluations", visible=False
        )
    cache.change(
        lambda chosen: (gr.update(visible=chosen == FIRST_BLOCK_CACHE), gr.update(visible=chosen == TAYLORSEER_CACHE)),
        cache,
        [threshold, interval],
        api_visibility="private",
    )
    return [cache, threshold, interval]


def launch_demo(pipe: LSEPPipeline, name: str, defaults: dict[str, Any] | None = None, **options):
    """
    Builds the page and serves it until the process ends.

    Args:
        pipe ([`LSEPPipeline`]):
            Draws the images.
        name (`str`):
            What the page calls the model.
        defaults (`dict`, *optional*):
            What the page starts with, see [`make_demo`].
        options:
            For `gradio.Blocks.launch`, such as `share`. The address is also that of the environment variables
            `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.

    Returns:
        What `gradio.Blocks.launch` does: the app, its address, and that of the public link.
    """
    demo = make_demo(pipe, name, **(defaults or {}))
    return demo.launch(**{"theme": THEME, "css": CSS, "ssr_mode": False, "show_error": True, **options})
