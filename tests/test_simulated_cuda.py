# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
What runs on a GPU neither mixes devices nor waits for values that nobody needs. Shown without a GPU, where tensors of
the device have shapes and no values (`benchmarks/simulated_cuda.py`); that faults are found is shown first.
"""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import send_to_device
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.utils import is_torch_version
from simulated_cuda import Copies, simulated_cuda
from tiny_models import make_batch, make_dinov2, make_pipeline, make_transformer, make_vae
from tiny_run import TINY_MODEL, TINY_RUN
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffusers_lsep import (
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LinearProbe,
    LSEPObjective,
    LSEPPipeline,
)
from diffusers_lsep.autoencoders import encode_moments, get_normalization
from diffusers_lsep.data.encoding import encode_batch
from diffusers_lsep.data.moments import sample_posterior
from diffusers_lsep.evaluation.dinov2 import DINOv2Features
from diffusers_lsep.evaluation.inception import InceptionFeatures
from diffusers_lsep.training.arguments import parse_args
from diffusers_lsep.training.log import StepMetrics
from diffusers_lsep.training.processes import start_accelerator
from diffusers_lsep.training.setup import prepare
from diffusers_lsep.training.trainer import Trainer


pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or is_torch_version("<", "2.15.0"),
    reason="needs PyTorch 2.15, built with CUDA: others ask the driver elsewhere",
)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TO_DEVICE = "aten._to_copy.default"


@pytest.fixture(autouse=True)
def accelerate_anew():
    """accelerate remembers the device."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    threads, flags = torch.get_num_threads(), (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    forget()
    yield
    forget()
    torch.set_num_threads(threads)
    for flag, value in zip(flags, before):
        flag.allow_tf32 = value


@pytest.fixture
def two_processes(monkeypatch):
    """This process is the first of two, whose communication does nothing; gives what stands for DDP's reducer."""
    ranks = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    reducer = mock.MagicMock()
    monkeypatch.setattr("torch.distributed.Reducer", reducer)
    monkeypatch.setattr("torch.distributed.Logger", mock.MagicMock())
    monkeypatch.setattr("torch.nn.parallel.distributed._verify_param_shape_across_processes", lambda *args: None)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield reducer
    torch.distributed.destroy_process_group()


def count_copies(function, readable=False) -> Copies:
    with simulated_cuda(readable), Copies() as copies:
        function()
    return copies


class TestFaults:
    """What this would not find proves nothing."""

    @pytest.fixture
    def objective(self):
        return LSEPObjective(make_transformer(), LinearProbe(32, 10), probe_depth=1)

    def run(self, objective, change=lambda batch: None):
        with simulated_cuda():
            objective.to("cuda")
            batch = send_to_device(make_batch(), "cuda")
            change(batch)
            with Copies() as copies:
                objective(**batch).loss.backward()
            gradients = {parameter.grad.device.type for parameter in objective.parameters()}
            assert gradients == {"cuda"}
        return copies

    def test_none(self, objective):
        copies = self.run(objective)
        assert copies.all == []

    def test_reading_a_value(self, objective):
        objective.register_forward_hook(lambda module, inputs, output: output.loss.item())
        with pytest.raises(RuntimeError, match="_local_scalar_dense|item"):
            self.run(objective)

    def test_reading_a_value_that_is_allowed_is_counted(self):
        copies = count_copies(lambda: torch.ones(3, device="cuda").sum().item(), readable=True)
        assert copies.blocking == ["aten._local_scalar_dense.default"]

    def test_a_number_of_rows_that_depends_on_values(self, objective):
        objective.register_forward_hook(lambda module, inputs, output: output.denoising_losses.nonzero())
        with pytest.raises(Exception, match="nonzero"):
            self.run(objective)

    def test_a_tensor_on_the_host(self, objective):
        table = torch.zeros(16, 32)
        objective.transformer.pos_embed.register_forward_hook(lambda module, inputs, output: output + table)
        with pytest.raises(RuntimeError, match="same device"):
            self.run(objective)

    def test_a_forgotten_batch(self, objective):
        def forget(batch):
            batch["noise"] = batch["noise"].new_zeros(batch["noise"].shape, device="cpu")

        with pytest.raises(RuntimeError, match="same device"):
            self.run(objective, forget)

    def test_a_new_tensor_in_every_step(self, objective):
        def make(module, inputs):
            torch.tensor([0.5, 1.0], device="cuda")

        objective.register_forward_pre_hook(make)
        copies = self.run(objective)
        assert copies.all == copies.blocking == [TO_DEVICE]

    def test_an_index_on_the_host(self):
        copies = count_copies(lambda: torch.zeros(4, 2, device="cuda")[torch.tensor([0, 2])])
        assert len(copies.all) == len(copies.blocking) == 1

    def test_a_copy_that_need_not_wait(self):
        copies = count_copies(lambda: torch.ones(3).to("cuda", non_blocking=True))
        assert copies.all == [TO_DEVICE] and copies.blocking == []


def make_trainer(*flags: str) -> Trainer:
    """Of `examples/train_lsep.py` on the digits, with a tiny model, inside of `simulated_cuda`."""
    flags = [*TINY_MODEL, *TINY_RUN, "--output_dir", "unused", "--overwrite_output_dir", *flags]
    accelerator, args = start_accelerator(parse_args(flags, "", EXAMPLES))
    assert accelerator.device.type == "cuda"
    setup = prepare(args, accelerator.num_processes)
    trainer = Trainer(setup, accelerator, {}, load=False)
    trainer.prepare_training(None)
    trainer.metrics = StepMetrics(accelerator, args.gradient_accumulation_steps)
    return trainer


class TestTrainingStep:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "flags",
        [
            "--mixed_precision bf16",
            "--mixed_precision no --allow_tf32",
            "--mixed_precision fp16 --gradient_accumulation_steps 2 --path_type cosine",
            "--mixed_precision fp16 --gradient_checkpointing --qk_norm",
            "--mixed_precision bf16 --probe_fraction 0.5 --coupled_dropout --timestep_sampling logit_normal",
            "--mixed_precision bf16 --no_lsep --no-use_ema --lr_scheduler cosine --lr_warmup_steps 2",
            "--mixed_precision bf16 --regularizers dispersive layersync internal-guidance",
            "--mixed_precision bf16 --probe_decay_start_epoch 0 --regularizers sra",
        ],
    )
    def test_has_no_copies(self, tmp_path, monkeypatch, flags):
        """Autocast, scaler, clipping, AdamW, average and metrics are accelerate's and the trainer's own."""
        monkeypatch.chdir(tmp_path)
        with simulated_cuda():
            trainer = make_trainer(*flags.split())
            batches = iter(trainer.loader)
            trainer.take_step(batches)  # AdamW makes its state
            batches = iter([next(batches) for _ in range(trainer.args.gradient_accumulation_steps)])
            with Copies() as copies:
                trainer.take_step(batches)
            assert trainer.step == 2
            parameters = [parameter for parameter in trainer.objective.parameters() if parameter.requires_grad]
            assert {parameter.device.type for parameter in parameters} == {"cuda"}
        assert copies.all == []

    @pytest.mark.slow
    def test_one_of_two_processes_has_no_copies(self, tmp_path, monkeypatch, two_processes):
        """In DistributedDataParallel. What it does in C++, summing the gradients, is left out."""
        monkeypatch.chdir(tmp_path)
        with simulated_cuda():
            trainer = make_trainer("--mixed_precision", "bf16")
            assert isinstance(trainer.model, nn.parallel.DistributedDataParallel)
            assert trainer.setup.samples_per_step == 2 * trainer.args.train_batch_size
            assert not trainer.model.will_sync_module_buffers(), "they are constants"
            batches = iter(trainer.loader)
            trainer.take_step(batches)
            batches = iter([next(batches)])
            with Copies() as copies:
                trainer.take_step(batches)
        assert copies.all == [] and two_processes.call_count == 1

    @pytest.mark.slow
    def test_a_batch_is_brought_without_waiting(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with simulated_cuda():
            batches = iter(make_trainer().loader)
            next(batches)
            with Copies() as copies:
                batch = next(batches)
        assert len(copies.all) == sum(isinstance(value, torch.Tensor) for value in batch.values())
        assert copies.blocking == []

    @pytest.mark.slow
    def test_an_interval_is_read_once(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with simulated_cuda(readable=True):
            trainer = make_trainer("--mixed_precision", "bf16")
            batches = iter(trainer.loader)
            for _ in range(3):
                trainer.take_step(batches)
            with Copies() as copies:
                metrics, losses, grad_norms = trainer.metrics.collect()
        assert len(copies.all) == 1
        assert (len(losses), len(grad_norms)) == (3, 3) and metrics["data_wait"] >= 0


STEPS = 4
SDE_STEPS = STEPS - 1  # the last one has no noise
OURS = {
    "sde": (FlowMatchSDEScheduler(), SDE_STEPS),
    "sde-tweedie": (FlowMatchSDEScheduler(last_step="tweedie", diffusion_form="sbdm"), SDE_STEPS),
    "ode": (FlowMatchSDEScheduler(diffusion_form="none"), 0),
    "sde2": (FlowMatchSDEMultistepScheduler(), SDE_STEPS),
    "sde-cosine": (FlowMatchSDEScheduler(path_type="cosine"), SDE_STEPS),
    "heun": (FlowMatchHeunODEScheduler(), 0),
}
GUIDANCE = {"plain": {}, "interval": {"guidance_scale": 2.0, "guidance_interval": (0, 0.5)}}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def sample(pipe: LSEPPipeline, readable=False, **arguments) -> Copies:
    """The copies of a call; the model has been brought to the device before."""
    pipe.set_progress_bar_config(disable=True)
    with simulated_cuda(readable):
        pipe.to("cuda")
        with Copies() as copies:
            latents = pipe([1, 2], num_inference_steps=STEPS, output_type="latent", **arguments).images
        assert latents.device.type == "cuda"
    return copies


class TestSampling:
    # The classes, those that guidance leads away from, and the timesteps: none within the loop.
    BEFORE = 3

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            pytest.param("sde", {"guidance_scale": 2.0}, id="sde"),
            *(
                pytest.param(name, options, marks=pytest.mark.slow, id=f"{name}-{label}")
                for name in OURS
                for label, options in GUIDANCE.items()
            ),
        ],
    )
    def test_no_step_copies(self, name, options):
        scheduler, noisy_steps = OURS[name]
        copies = sample(make_pipeline(type(scheduler).from_config(scheduler.config)), **options)
        assert len(copies.all) == self.BEFORE
        # The host's generators draw on the host: what they drew is brought, at the start and for each step.
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        copies = sample(make_pipeline(type(scheduler).from_config(scheduler.config)), generator=generators, **options)
        assert len(copies.all) <= self.BEFORE + 1 + noisy_steps
        assert len(copies.all) >= self.BEFORE + 1

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_with_internal_guidance(self, dtype):
        pipe = make_pipeline(internal_guidance_depth=1)
        pipe.transformer.to(dtype)
        assert len(sample(pipe, internal_guidance_scale=1.5).all) == self.BEFORE

    @pytest.mark.slow
    def test_autoguidance(self):
        pipe = make_pipeline()
        pipe.register_modules(guidance_transformer=make_transformer(num_layers=1))
        assert len(sample(pipe, autoguidance_scale=2.0).all) <= self.BEFORE

    @pytest.mark.slow
    def test_guider(self):
        copies = sample(make_pipeline(), guider=AdaptiveProjectedGuidance(guidance_scale=2.0))
        assert len(copies.all) == self.BEFORE

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "scheduler",
        [
            FlowMatchEulerDiscreteScheduler(),
            FlowMatchHeunDiscreteScheduler(),
            DPMSolverMultistepScheduler(**FLOW),
            UniPCMultistepScheduler(**FLOW),
        ],
        ids=lambda scheduler: type(scheduler).__name__,
    )
    def test_schedulers_of_diffusers_work(self, scheduler):
        """Some of theirs read values, which is theirs to say; they mix no devices with ours."""
        assert len(sample(make_pipeline(scheduler), readable=True).all) >= self.BEFORE

    @pytest.mark.slow
    def test_a_cache_reads_one_value_a_step(self):
        """FirstBlockCache compares on the device and decides on the host: diffusers' design."""
        pipe = make_pipeline(num_layers=3)
        pipe.set_progress_bar_config(disable=True)
        with simulated_cuda(readable=True):
            pipe.to("cuda")
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
            with Copies() as copies:
                pipe([1, 2], num_inference_steps=STEPS, output_type="latent")
        reads = copies.all.count("aten._local_scalar_dense.default")
        assert 1 <= reads <= STEPS and len(copies.all) == self.BEFORE + reads

    @pytest.mark.slow
    def test_decoding_brings_the_images_once(self):
        pipe = make_pipeline(vae=make_vae())
        pipe.set_progress_bar_config(disable=True)
        with simulated_cuda(readable=True):
            pipe.to("cuda")
            with Copies() as copies:
                images = pipe([1, 2], num_inference_steps=2, output_type="np").images
        assert images.shape == (2, 16, 16, 3) and len(copies.all) == self.BEFORE + 1


class TestEvaluation:
    IMAGES = np.zeros((2, 16, 16, 3), np.uint8)

    @pytest.mark.slow
    def test_inception(self, inception_weights):
        extractor = InceptionFeatures(inception_weights)
        with simulated_cuda(readable=True):
            extractor.network.to("cuda")
            extractor.device = torch.device("cuda")
            with Copies() as copies:
                features = extractor(self.IMAGES)
        assert {name: value.shape[1] for name, value in features.items()} == extractor.widths
        assert len(copies.all) == 1 + len(features)  # the images, and what is made of them

    @pytest.mark.slow
    def test_dinov2(self, tmp_path):
        make_dinov2().save_pretrained(tmp_path)
        extractor = DINOv2Features(str(tmp_path))
        with simulated_cuda(readable=True):
            extractor.model.to("cuda")
            extractor.device = torch.device("cuda")
            with Copies() as copies:
                features = extractor(self.IMAGES)
        assert features["class_token"].shape == (2, 16)
        assert len(copies.all) == 1 + 2 + 1  # mean and deviation are brought for every batch

    @pytest.mark.slow
    def test_encoding(self):
        vae = make_vae(scaling_factor=0.5)
        with simulated_cuda():
            vae.to("cuda")
            normalization = get_normalization(vae, torch.device("cuda"))
            images, noise = torch.zeros(2, 3, 16, 16, device="cuda"), torch.zeros(2, 4, 8, 8, device="cuda")
            with Copies() as copies:
                latents = sample_posterior(encode_moments(vae, images), noise, **normalization)
        assert latents.shape == noise.shape and latents.device.type == "cuda" and copies.all == []

    @pytest.mark.slow
    def test_a_batch_to_encode_is_brought_without_waiting(self):
        vae = make_vae()
        batch = {"pixels": torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "good": [0, 1]}
        images = SimpleNamespace(names=["a", "b"], labels=[0, 1])
        settings = {"dtype": np.dtype(np.float32), "flip": True, "images": False}
        with simulated_cuda(readable=True):
            vae.to("cuda")
            with Copies() as copies:
                columns = encode_batch(vae, batch, range(2), images, settings)
        assert not any(map(any, columns["moments"] + columns["moments_flipped"]))  # zeros, not whatever memory held
        assert [len(columns[name]) for name in ("id", "moments", "moments_flipped")] == [2, 2, 2]
        assert len(copies.all) == 1 + 2 and len(copies.blocking) == 2  # the moments of both are read, to be written
