# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo, by gradio's client and in a browser, and the Space that is made of it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from gradio.processing_utils import encode_pil_to_bytes
from gradio_client import Client
from gradio_client.exceptions import AppError
from hub_server import HubServer
from PIL import Image
from tiny_models import make_pipeline, make_vae

import diffusers_lsep
from diffusers_lsep import FlowMatchHeunODEScheduler, FlowMatchSDEScheduler
from diffusers_lsep.cli import main
from diffusers_lsep.demo import MAX_IMAGES, SAMPLER_TITLES, Drawer, launch_demo, list_classes
from diffusers_lsep.sampling import SAMPLERS, set_scheduler


ROOT = Path(__file__).resolve().parents[1]
NAMES = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))
ARGUMENTS = {
    "class_label": 3,
    "num_images": 2,
    "seed": 5,
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "guidance_low": 0.2,
    "guidance_high": 0.9,
    "scheduler": "sde2",
}


def make_digits_pipeline(**config):
    return make_pipeline(**{"in_channels": 1, "id2label": NAMES, **config})


@contextmanager
def served(pipe, name="tiny digits", **defaults):
    """The address of a demo."""
    app, url, _ = launch_demo(pipe, name, defaults, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        yield url
    finally:
        app.get_blocks().close(verbose=False)


@pytest.fixture(scope="module")
def pipe():
    return make_digits_pipeline()


@pytest.fixture(scope="module")
def client(pipe):
    with served(pipe) as url:
        yield Client(url, verbose=False)


def draw(client, **arguments):
    """What the page shows: for every moment the images, the strip and the status."""
    job = client.submit(**{**ARGUMENTS, **arguments}, api_name="/generate")
    job.result()
    moments = []
    for images, strip, status in job.outputs():
        pictures = [Image.open(image["image"]) for image in images or []]
        moments.append((pictures, Image.open(strip) if strip else None, status))
    return moments


def arrays(images):
    return np.stack([np.asarray(image.convert("L")) for image in images])


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["as saved", *SAMPLERS])
def test_images_are_those_of_the_pipeline(client, scheduler):
    """With every sampler, and each image with a generator of its own; while it runs, what the model sees."""
    pipe = make_digits_pipeline()
    set_scheduler(pipe, None if scheduler == "as saved" else scheduler)
    generator = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    guidance = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.9)}
    expected = pipe([3, 3], num_inference_steps=10, generator=generator, **guidance).images

    moments = draw(client, scheduler=scheduler, class_label="three")
    np.testing.assert_array_equal(arrays(moments[-1][0]), arrays(expected))
    assert moments[-1][2] == "10 steps, seeds 5 to 6."
    settings = json.loads(moments[-1][0][1].info["parameters"])
    assert settings["class_label"] == "three" and settings["seed"] == 5 and settings["image"] == 1

    while_running = moments[1:-1]
    steps = [int(re.fullmatch(r"Step (\d+) of 10, t = \d\.\d\d\.", status)[1]) for _, _, status in while_running]
    assert steps[0] == 1 and steps[-1] == 10 and len(steps) == 8 and sorted(set(steps)) == steps
    assert len({strip.size for _, strip, _ in while_running}) == 1, "it grows from left to right in its place"
    darkness = [(arrays([strip]) < 250).sum() for _, strip, _ in while_running]
    assert all(more > less for less, more in zip(darkness, darkness[1:]))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), FlowMatchHeunODEScheduler()])
def test_a_preview_is_the_data_that_the_model_sees(scheduler, scale):
    """The last step of Euler and of Heun ends there, with guidance and without."""
    drawer = Drawer(make_pipeline(scheduler, vae=make_vae()))
    arguments = {**ARGUMENTS, "guidance_low": 0.0, "guidance_high": 1.0, "guidance_scale": scale}
    *_, last, end = drawer.draw(**{**arguments, "scheduler": "as saved", "num_inference_steps": 3})
    np.testing.assert_array_equal(arrays(last[0]), arrays(end[0]))
    assert end[0][0].size == (16, 16), "decoded"


def test_no_two_pictures_are_equal_files():
    """Gradio names them by their contents and writes in place, maybe while the browser reads: that broke pictures."""
    drawer = Drawer(make_digits_pipeline())
    files = []
    for _ in range(2):
        for images, strip, _ in drawer.draw(**{**ARGUMENTS, "scheduler": "ode", "num_inference_steps": 2}):
            for image in [*images, strip] if images else []:
                files.append(encode_pil_to_bytes(image))
    assert len(files) == len(set(files)) == 2 * 3 * 3


def test_large_images_are_thumbnails_in_the_strip():
    drawer = Drawer(make_digits_pipeline(sample_size=192, patch_size=32))
    *_, (images, strip, _) = drawer.draw(**{**ARGUMENTS, "num_inference_steps": 2, "num_images": 1})
    assert images[0].size == (192, 192) and 2 * 128 < strip.width < 2 * 140


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_label": "tree"}, "there is no class 'tree'. Close names are ['three']"),
        ({"class_label": 12}, "`class_labels` has to lie in 0..9, but holds 12"),
        ({"class_label": ""}, "Choose a class"),
        ({"seed": None}, "The seed has to be an integer from 0"),
        ({"guidance_low": 0.9, "guidance_high": 0.1}, "0 <= low <= high <= 1, but is (0.9, 0.1)"),
        ({"num_images": MAX_IMAGES + 1}, "Value 9 is greater than maximum value 8"),
        ({"scheduler": "ddpm"}, "Value: ddpm is not in the list of choices"),
    ],
)
def test_errors_say_what_is_wrong(client, arguments, message):
    with pytest.raises(AppError, match=re.escape(message)):
        draw(client, **arguments)
    assert len(draw(client, num_inference_steps=1)[-1][0]) == 2, "and the next visitor gets images"


def test_a_scheduler_that_is_wrong_for_the_path_is_refused_and_forgotten():
    import gradio as gr

    pipe = make_digits_pipeline(path_type="cosine", scheduler=FlowMatchSDEScheduler(path_type="cosine"))
    saved, drawer = pipe.scheduler, Drawer(pipe)
    with pytest.raises(gr.Error, match="trained on the path 'cosine'"):
        list(drawer.draw(**{**ARGUMENTS, "scheduler": "unipc"}))
    assert pipe.scheduler is saved
    list(drawer.draw(**{**ARGUMENTS, "scheduler": "heun"}))
    assert pipe.scheduler is saved and not pipe.transformer._forward_hooks


def test_memory_that_does_not_suffice_is_said(monkeypatch):
    import gradio as gr

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    drawer = Drawer(make_digits_pipeline())
    monkeypatch.setattr(drawer.pipe.transformer, "forward", forward)
    with pytest.raises(gr.Error, match="Memory does not suffice for 2 images at a time: ask for fewer"):
        list(drawer.draw(**ARGUMENTS))


def test_who_leaves_stops_the_pipeline():
    drawer = Drawer(make_digits_pipeline())
    evaluations = []
    drawer.pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append(time.sleep(0.01)))
    moments = drawer.draw(**{**ARGUMENTS, "num_inference_steps": 250})
    next(moments), next(moments)
    moments.close()
    with drawer.lock:  # which it holds until it has ended
        assert 1 <= len(evaluations) < 100
    assert len([*drawer.draw(**ARGUMENTS)][-1][0]) == 2


def test_classes_are_listed_by_all_their_names():
    labels = {0: "tench, Tinca tinca", 1: "crane", 2: "crane"}
    pipe = make_digits_pipeline(id2label=labels, num_classes=4)
    assert list_classes(pipe) == [("tench, Tinca tinca", 0), ("crane (1)", 1), ("crane (2)", 2), ("class 3", 3)]


def test_every_sampler_has_a_title():
    assert SAMPLER_TITLES.keys() == set(SAMPLERS)


@pytest.mark.slow
def test_caches(client, pipe):
    """FirstBlockCache with the threshold 0 leaves nothing out; others do, and none stays."""
    plain = arrays(draw(client)[-1][0])
    for cache, leaves_out in (
        ({"cache": "FirstBlockCache", "cache_threshold": 0}, False),
        ({"cache": "FirstBlockCache", "cache_threshold": 1}, True),
        ({"cache": "TaylorSeerCache", "cache_interval": 4}, True),
    ):
        assert np.array_equal(arrays(draw(client, **cache)[-1][0]), plain) != leaves_out, cache
        assert not pipe.transformer.is_cache_enabled
    np.testing.assert_array_equal(arrays(draw(client)[-1][0]), plain)


# In a browser


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, for which there is no machine but this one."""
    driver = shutil.which("chromedriver")
    binaries = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary = next((path for path in map(shutil.which, binaries) if path), None)
    if driver is None or binary is None:
        reason = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,1000"),
        *("host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(driver)
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()


@pytest.mark.slow
def test_in_a_browser(browser):
    """A class is searched by a part of its name and drawn; the strip fills; an error is shown as it is."""
    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector, text=""):
        found = [element for element in browser.find_elements("css selector", selector) if text in element.text]
        return found[0] if found else None

    def wait(condition):
        # The page replaces its elements while it is looked at.
        changing = WebDriverWait(browser, 120, 0.05, [StaleElementReferenceException])
        return changing.until(lambda _: condition())

    def soon(condition):
        changing = WebDriverWait(browser, 5, 0.05, [StaleElementReferenceException])
        try:
            return changing.until(lambda _: condition())
        except TimeoutException:
            return False

    def press(name):
        wait(lambda: find("button", name).click() or True)

    def choose(text, key=None):
        def type_it():
            box = find("input[aria-label='Class']")
            box.click()
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(text, *([key] if key else []))
            return True

        def offers():
            return [found.text for found in browser.find_elements("css selector", "[role=option]")]

        if key is not None:
            wait(type_it)
            return
        # A page that is still filling its list may drop what is typed.
        wait(lambda: type_it() and soon(lambda: offers() == ["seven"]))
        wait(lambda: find("[role=option]").click() or True)

    def pixels(selector):
        """An image of the page, as the browser has it."""
        return browser.execute_script(
            "const image = document.querySelector(arguments[0]);"
            "if (!image || !image.complete || !image.naturalWidth) return null;"
            "const canvas = document.createElement('canvas');"
            "[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];"
            "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
            "const {data} = context.getImageData(0, 0, canvas.width, canvas.height);"
            "return Array.from(data).filter((_, i) => i % 4 == 0);",
            selector,
        )

    def num_dark(values):
        return sum(value < 250 for value in values)

    pipe = make_digits_pipeline()
    steps, evaluations = threading.Semaphore(0), []  # those that it may take, so that it is watched in the middle
    pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append(steps.acquire(timeout=120)))
    with served(pipe, "tiny digits", num_inference_steps=16, scheduler="ode") as url:
        browser.get(url)
        wait(lambda: find("h1", "tiny digits"))
        wait(lambda: browser.title == "tiny digits" and find("p", "10 classes, 8 × 8 pixels"))
        choose("ev")
        press("Draw")
        steps.release(1)
        wait(lambda: find("#status", "Step 1 of 16, t = 1.00."))
        first = wait(lambda: pixels("#strip img"))
        steps.release(8)
        wait(lambda: (strip := pixels("#strip img")) and num_dark(strip) > num_dark(first))
        wait(lambda: find("#status", "of 16, t = 0."))
        steps.release(7)
        wait(lambda: find("#status", "16 steps, seeds 0 to 3."))

        wait(lambda: len(browser.find_elements("css selector", "#images img")) == 4)
        generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
        reference = make_digits_pipeline()
        set_scheduler(reference, "ode")
        expected = reference([7] * 4, 16, 1.5, generator=generator).images[0]
        wait(lambda: pixels("#images img") == np.asarray(expected).ravel().tolist())

        # What is stopped ends after its next preview, and nobody waits for the other steps.
        press("Draw")
        steps.release(1)
        wait(lambda: find("#status", "Step 1 of 16"))
        press("Stop")
        wait(lambda: steps.release() or len(evaluations) >= 16 + 3)
        choose("tree", Keys.TAB)
        message = "there is no class 'tree'. Close names are ['three']"
        # The page takes no click before it has heard that the other run ended.
        wait(lambda: steps.release() or find("body", message) or find("button", "Draw").click())
        assert all(evaluations) and 16 + 3 <= len(evaluations) < 16 + 16


# The script


@contextmanager
def started(command, folder, **environment):
    """The address of a demo in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment}
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}/"
        while True:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_script(tmp_path):
    make_digits_pipeline().save_pretrained(tmp_path / "my-digits")
    flags = ["--pretrained_model_name_or_path", "my-digits", "--num_inference_steps", "3", "--scheduler", "ode"]
    with started([sys.executable, str(ROOT / "examples" / "demo.py"), *flags], tmp_path) as url:
        client = Client(url, verbose=False)
        assert client.config["title"] == "my-digits"
        moments = client.submit(2, api_name="/generate")
        assert moments.result()[2] == "3 steps, seeds 0 to 3."


def test_script_refuses_what_the_page_does_not_offer(load_example, capsys):
    script = load_example("demo")
    flags = ["--pretrained_model_name_or_path", "x"]
    for wrong, message in (
        (["--num_inference_steps", "251"], "--num_inference_steps has to be in 1..250, but is 251"),
        (["--guidance_scale", "0.5"], "--guidance_scale has to be in 1..10, but is 0.5"),
    ):
        with pytest.raises(SystemExit) as end:
            script.parse_args([*flags, *wrong])
        assert end.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` 'no/model' cannot be loaded"):
        script.main(["--pretrained_model_name_or_path", "no/model"])


# The Space


def make_space(model, folder, *flags):
    main(["space", "--pretrained_model_name_or_path", str(model), "--output_dir", str(folder), *flags])


def test_a_space_has_versions_and_the_id_of_the_model(tmp_path, capsys):
    import gradio

    make_space("your-name/lsep-digits", tmp_path / "space")
    names = {path.name for path in (tmp_path / "space").iterdir()}
    assert names == {"README.md", "app.py", "requirements.txt", "diffusers_lsep"}
    assert "python " in capsys.readouterr().out

    _, header, text = (tmp_path / "space" / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["sdk"] == "gradio" and header["sdk_version"] == gradio.__version__
    assert header["app_file"] == "app.py" and header["models"] == ["your-name/lsep-digits"]
    assert header["title"] == "lsep digits" and header["python_version"] == f"3.{sys.version_info.minor}"
    assert "your-name/lsep-digits" in text
    assert "MODEL = 'your-name/lsep-digits'" in (tmp_path / "space" / "app.py").read_text()

    lines = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    requirements = dict(line.split("==") for line in lines)
    assert requirements["torch"] == torch.__version__.partition("+")[0]
    assert requirements["gradio"] == gradio.__version__ and "diffusers" in requirements
    assert not {"pytest", "matplotlib", "diffusers_lsep"} & requirements.keys()
    assert not (tmp_path / "space" / "diffusers_lsep" / "examples").exists(), "where one works in a clone"
    assert not list(tmp_path.rglob("__pycache__")) and str(Path.home()) not in "".join(lines)


def test_a_space_of_a_folder_says_what_draws(tmp_path):
    make_digits_pipeline().save_pretrained(tmp_path / "tiny-digits", variant="fp16")
    make_space(tmp_path / "tiny-digits", tmp_path / "space")
    text, app = ((tmp_path / "space" / name).read_text() for name in ("README.md", "app.py"))
    assert "`tiny-digits` draws images of a class" in text and "LSEP (" not in text
    assert "tiny-digits draws" in app and "variant='fp16')" in app


def test_a_space_is_not_written_over_other_things(tmp_path):
    folder = tmp_path / "space"
    make_space("me/model", folder)
    with pytest.raises(ValueError, match="`--output_dir` .* is not empty. `--overwrite_output_dir` replaces it"):
        make_space("me/other", folder)
    make_space("me/other", folder, "--overwrite_output_dir", "--title", "My model's page")
    assert "me/other" in (folder / "app.py").read_text() and "My model's page" in (folder / "README.md").read_text()
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match="`--overwrite_output_dir` replaces a Space only, but .*'mine.txt'"):
        make_space("me/model", folder, "--overwrite_output_dir")
    assert (folder / "mine.txt").exists()
    inside = Path(diffusers_lsep.__file__).parent / "space"
    with pytest.raises(ValueError, match="`output_dir` has to lie outside of the package"):
        make_space("me/model", inside)
    assert not inside.exists()


@pytest.mark.parametrize("model", ["lsep-digits", "a/b/c", "your name/model", "me/model--x"])
def test_a_space_needs_a_model(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)  # the README's first command leaves a model of this name in the repository
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path`|Cannot have|repo name"):
        make_space(model, tmp_path / "space")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`folder` has to hold a saved LSEPPipeline"):
        make_space(tmp_path / "empty", tmp_path / "space")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_a_space_of_a_folder_stands_alone(tmp_path):
    """It runs with the package and the model that are in it, wherever it is."""
    make_digits_pipeline().save_pretrained(tmp_path / "my-digits")
    (tmp_path / "my-digits" / "checkpoint-1").mkdir()
    make_space(tmp_path / "my-digits", tmp_path / "space")
    shutil.rmtree(tmp_path / "my-digits")
    (tmp_path / "space").rename(tmp_path / "elsewhere")
    names = {path.name for path in (tmp_path / "elsewhere" / "model").iterdir()}
    assert names == {"model_index.json", "transformer", "scheduler"}
    module = tmp_path / "elsewhere" / "diffusers_lsep" / "demo.py"
    module.write_text(module.read_text().replace("Images by flow matching", "The images of this Space"))
    with started([sys.executable, "app.py"], tmp_path / "elsewhere", PYTHONPATH="") as url:
        client = Client(url, verbose=False)
        assert client.config["title"] == "my digits" and "The images of this Space" in str(client.config)
        assert client.predict("seven", 1, 0, 2, api_name="/generate")[2] == "2 steps, seed 0."


def test_a_space_takes_nothing_from_elsewhere(tmp_path):
    folder, secret = tmp_path / "my-digits", tmp_path / "secret.json"
    make_digits_pipeline().save_pretrained(folder)
    secret.write_text("private")
    (folder / "scheduler" / "more.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"has to hold all files to upload, but 'scheduler/more.json' .* leads to "):
        make_space(folder, tmp_path / "space")
    (folder / "scheduler" / "more.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, str(tmp_path): ["diffusers_lsep", "X"]}))
    with pytest.raises(ValueError, match="has to hold all files to upload, but .* leads to "):
        make_space(folder, tmp_path / "space")
    assert not (tmp_path / "space").exists()


@pytest.mark.slow
def test_a_space_is_pushed(tmp_path):
    make_digits_pipeline().save_pretrained(tmp_path / "my-digits")
    command = [sys.executable, "-m", "diffusers_lsep.cli", "space", "--output_dir", "space", "--push_to_hub"]
    command += ["me/demo", "--pretrained_model_name_or_path", "my-digits"]
    with HubServer(tmp_path / "hub", {"secret": "me"}) as server:
        environment = server.environment(tmp_path / "home", HF_TOKEN="secret")
        for flags in ([], ["--overwrite_output_dir", "--title", "Another"]):
            done = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert f"Pushed: {server.url}/me/demo" in done.stdout
        assert server.load("me/demo")["space_sdk"] == "gradio"
        pushed = server.files("me/demo")
    here = {
        path.relative_to(tmp_path / "space").as_posix(): path.read_bytes()
        for path in (tmp_path / "space").rglob("*")
        if path.is_file()
    }
    assert {name: content for name, content in pushed.items() if name != ".gitattributes"} == here
    assert b"title: Another" in pushed["README.md"]
