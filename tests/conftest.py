# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import os
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_run import TINY_MODEL, TINY_RUN


# The libraries read these when they are imported, and the processes that tests start inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches out to the Hub by accident
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub of the tests speaks plain LFS
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow a busy machine tenfold
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
# Neither the caches nor accelerate's settings of whoever runs the tests. Removed with the interpreter.
hf_home = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ["HF_HOME"] = hf_home.name
os.environ["GRADIO_TEMP_DIR"] = os.path.join(hf_home.name, "gradio")


@pytest.fixture
def tiny_transformer():
    """Makes `SiTTransformer2DModel`s with random weights everywhere."""
    from tiny_models import make_transformer

    return make_transformer


@pytest.fixture(scope="session")
def tiny_vae_folder(tmp_path_factory):
    """A VAE with four latent channels that halves the side of images."""
    from tiny_models import make_vae

    folder = tmp_path_factory.mktemp("vae")
    make_vae(scaling_factor=0.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_example():
    """Imports a script of `examples/`, or of another folder, by its name; the same module every time."""

    @functools.cache
    def load(name, folder="examples"):
        path = Path(__file__).resolve().parents[1] / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def train(load_example, tmp_path):
    """
    Calls `main` of `examples/train_lsep.py` in this process: without data flags on the digits, by default with a tiny
    model for four steps, into `tmp_path / "run"`, and without `curves.png`, which takes a third of such a run.
    """
    from accelerate.state import AcceleratorState, GradientState

    from diffusers_lsep.training import trainer

    script = load_example("train_lsep")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    threads = torch.get_num_threads()

    def train(*arguments, tiny=(*TINY_MODEL, *TINY_RUN), output_dir=tmp_path / "run", curves=False) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with nullcontext() if curves else patch.object(trainer, "draw_curves"):
            return script.main([*tiny, "--output_dir", str(output_dir), *map(str, arguments)])

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """The path of a `python` with the libraries imported already; `accelerate` and `diffusers-lsep` are beside it."""
    from warm_python import warm_environment

    folder = tmp_path_factory.mktemp("warm") / "bin"
    with warm_environment(folder, dict(os.environ), ("accelerate", "diffusers-lsep")):
        yield folder / "python"


@pytest.fixture(scope="session")
def launch_environment():
    """What `accelerate launch` makes of a file in `examples/configs/accelerate`: its arguments and the environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    folder = Path(__file__).resolve().parents[1] / "examples" / "configs" / "accelerate"

    def read(name, *flags):
        args = launch_command_parser().parse_args(["--config_file", str(folder / name), *flags, "script.py"])
        args, _, _ = _validate_launch_command(args)
        if args.multi_gpu or args.use_fsdp:
            return args, prepare_multi_gpu_env(args)
        return args, prepare_simple_launcher_cmd_env(args)[1]

    return read


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights for Inception in torch-fidelity's layout, with activations of order one throughout."""
    import io

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = WithoutWeights("random", ["2048"], nothing).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state, path)
    return path
