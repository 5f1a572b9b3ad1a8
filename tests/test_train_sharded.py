# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training with FSDP2, on CPU: accelerate leaves FSDP out there, though torch has it, so the processes of these tests say
that they are to be sharded where accelerate would have said so on GPUs.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_models import make_dinov2

from diffusers_lsep.training import processes
from diffusers_lsep.training.arguments import parse_args
from diffusers_lsep.training.checkpoints import find_damage
from diffusers_lsep.training.log import read_metrics


DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"

LAUNCHED = """
import importlib.util, sys, torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from diffusers_lsep.training import processes
from diffusers_lsep.training.trainer import Trainer

spec = importlib.util.spec_from_file_location("train_lsep", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

class ShardingAccelerator(Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        assert self.num_processes == 2
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the environment
        self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision if self.mixed_precision != "no" else "fp32")
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def prepare_training(trainer, checkpoint, prepare=Trainer.prepare_training):
    prepare(trainer, checkpoint)
    # in autocast like any other run
    policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
    assert policy.output_dtype is None and (policy.param_dtype is None or not policy.cast_forward_inputs)
    layer = trainer.objective.transformer.transformer_blocks[0].attn.to_q
    if trainer.accelerator.is_main_process:
        layer.register_forward_pre_hook(lambda layer, inputs: print("gathered in", layer.weight.dtype))
    assert isinstance(trainer.objective.transformer.transformer_blocks[0], FSDPModule)
    # really sharded: this process holds about a half
    whole = sum(p.numel() for p in trainer.objective.parameters())
    here = sum(p.to_local().numel() for p in trainer.objective.parameters())
    assert 0.4 * whole < here < 0.6 * whole, (whole, here)
    if trainer.ema is not None:
        assert sum(p.to_local().numel() for p in trainer.ema.shadow_params) <= here

processes.Accelerator = ShardingAccelerator
Trainer.prepare_training = prepare_training
sys.exit(script.main(sys.argv[2:]))
"""

FLAGS = [
    *("--patch_size", "2", "--num_layers", "3", "--num_attention_heads", "2", "--attention_head_dim", "8"),
    *("--probe_depth", "1", "--crop_size_min", "2", "--learning_rate", "1e-2", "--ema_decay", "0.9"),
    *("--max_train_steps", "4", "--checkpointing_steps", "2", "--logging_steps", "1", "--validation_steps", "4"),
    *("--validation_split", "0.2", "--validation_inference_steps", "2", "--num_validation_images", "1"),
    *("--num_cpu_threads", "1", "--report_to", "none", "--max_skipped_steps", "1"),
]


@pytest.fixture
def train_sharded(tmp_path, launch_environment, warm_python):
    """Runs the script in two processes, each of which has a part of the weights."""
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    settings = launch_environment("fsdp2.yaml")[1]
    environment = {key: value for key, value in settings.items() if key.startswith("FSDP_")}
    environment |= {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def run(output_dir, *flags, common=FLAGS):
        command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, program, SCRIPT]
        command += [*common, "--train_batch_size", 4, "--output_dir", output_dir, *flags]
        result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        return {line for line in result.stdout.splitlines() if line.startswith("gathered in")}

    return run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    make_dinov2(mlp_ratio=1).save_pretrained(folder)
    return folder


# There the CPU's streams lack methods that FSDP2 calls, and its all-gather changes tensors that autograd keeps.
shards = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 needs a GPU")


@shards
@pytest.mark.slow
def test_weights_gathered_in_bfloat16(train_sharded, tmp_path):
    """What is learned is what autocast learns from weights in float32, but for the rounding of embeddings."""
    steps, gathered = [], []
    for dtype in ("fp32", "bf16"):
        flags = ("--mixed_precision", "bf16", "--fsdp_param_dtype", dtype, "--validation_steps", 100)
        gathered.append(train_sharded(tmp_path / dtype, *flags))
        steps.append([line for line in read_metrics(tmp_path / dtype / "metrics.jsonl") if "loss" in line])
    assert gathered == [{"gathered in torch.float32"}, {"gathered in torch.bfloat16"}]
    for one, other in zip(*steps, strict=True):
        for name in ("loss", "probe_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-2), name
    weights = [load_file(tmp_path / dtype / "checkpoint-2/model.safetensors") for dtype in ("fp32", "bf16")]
    for name, weight in weights[1].items():
        assert weight.dtype == weights[0][name].dtype == torch.float32, name


@shards
@pytest.mark.slow
def test_sharded_training_equals_ordinary_training(train, train_sharded, tmp_path, encoder):
    """The same losses, checkpoints and pipeline as one process gives, in files that either can go on with."""
    repa = ("--repa_encoder", encoder, "--repa_depth", 2, "--regularizers", "sra", "internal-guidance")
    repa += ("--sra_depth", 1, "--sra_teacher_depth", 2, "--internal_guidance_depth", 1)
    repa += ("--post_hoc_ema_sigmas", 0.05, 0.2, "--post_hoc_ema_steps", 2)
    train(*repa, tiny=[*FLAGS, "--train_batch_size", "8"], output_dir=tmp_path / "whole", curves=True)
    train_sharded(tmp_path / "sharded", *repa, "--max_train_steps", 2)
    train_sharded(tmp_path / "sharded", *repa, "--resume_from_checkpoint", "latest")

    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    lines = [read_metrics(run / "metrics.jsonl") for run in (whole, sharded)]
    validations = [[line for line in run if "validation_denoising_loss" in line][-1] for run in lines]
    steps = [[line for line in run if "loss" in line] for run in lines]
    assert len(steps[0]) == 4
    for one, other in zip([*steps[0], validations[0]], [*steps[1], validations[1]], strict=True):
        names = {"loss", "probe_loss", "repa_loss", "sra_loss", "internal_guidance_loss", "grad_norm"}
        names = {*names, *(f"validation_{name}" for name in ("probe_loss", "sra_loss"))} & one.keys()
        assert names
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    files = [f"checkpoint-2/{name}.safetensors" for name in ("model", "optimizer", "average", "post_hoc_ema")]
    for file in (*files, "ema_snapshots/step-2.safetensors", "ema_snapshots/step-4.safetensors"):
        one, other = (load_file(run / file) for run in (whole, sharded))
        assert one.keys() == other.keys() and len(one) >= 6
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)
    for folder in ("checkpoint-2/pipeline", "checkpoint-4/pipeline", "."):
        pipelines = [DiffusionPipeline.from_pretrained(run / folder) for run in (whole, sharded)]
        one, other = (pipeline.transformer.state_dict() for pipeline in pipelines)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3, msg=name)
    assert find_damage(sharded / "checkpoint-4") is None
    assert {path.name for path in sharded.iterdir()} == {path.name for path in whole.iterdir()}
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (whole, sharded)]
    assert files[1] - files[0] <= {"samples/step-2.png"}  # of the first part's end

    resume = ("--resume_from_checkpoint", "latest", "--max_train_steps", 5)
    train(*repa, *resume, tiny=[*FLAGS, "--train_batch_size", "8"], output_dir=sharded)
    assert json.loads((sharded / "checkpoint-5" / "training_state.json").read_text())["step"] == 5


@shards
@pytest.mark.slow
@pytest.mark.parametrize("velocity, derivative", [("teacher", "jvp"), ("data", "difference")])
def test_a_sharded_flow_map_equals_an_ordinary_one(train, train_sharded, tmp_path, velocity, derivative):
    train(tiny=[*FLAGS, "--train_batch_size", "8"], output_dir=tmp_path / "flow")
    common = [*FLAGS[FLAGS.index("--learning_rate") :], "--flow_map", "--no_lsep", "--train_data_dir", DIGITS]
    common += ["--pretrained_model_name_or_path", tmp_path / "flow", "--flow_map_guidance_scale", 1.5]
    common += ["--flow_map_velocity", velocity, "--flow_map_derivative", derivative]
    train(tiny=list(map(str, [*common, "--train_batch_size", 8])), output_dir=tmp_path / "whole")
    train_sharded(tmp_path / "sharded", "--max_train_steps", 2, common=common)
    train_sharded(tmp_path / "sharded", "--resume_from_checkpoint", "latest", common=common)
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "sharded")]
    steps = [[line for line in run if "loss" in line] for run in lines]
    assert len(steps[0]) == 4
    for one, other in zip(*steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
    for file in ("checkpoint-2/optimizer", "checkpoint-4/model", "transformer/diffusion_pytorch_model"):
        one, other = (load_file(tmp_path / run / f"{file}.safetensors") for run in ("whole", "sharded"))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3, msg=name)


def test_what_cannot_be_sharded_so_is_refused(monkeypatch):
    """FSDP1, and accelerate's own activation checkpointing."""
    args = parse_args(["--report_to", "none"], "", SCRIPT.parent)

    def refused(plugin, message):
        class FakeAccelerator:
            distributed_type = DistributedType.FSDP
            is_fsdp2 = plugin.fsdp_version == 2
            state = SimpleNamespace(fsdp_plugin=plugin)

        monkeypatch.setattr(processes, "Accelerator", lambda **options: FakeAccelerator())
        with pytest.raises(ValueError, match=message):
            processes.start_accelerator(args)

    refused(SimpleNamespace(fsdp_version=1), "one device, data-parallel or with FSDP2, not with .*FSDP")
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=True)
    refused(plugin, "give `--gradient_checkpointing` in place of `fsdp_activation_checkpointing`")


def test_only_fsdp2_gathers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = parse_args(["--report_to", "none", "--fsdp_param_dtype", "bf16"], "", SCRIPT.parent)
    with pytest.raises(ValueError, match="`--fsdp_param_dtype` bf16 needs FSDP2 .* but there is .*NO with no"):
        processes.start_accelerator(args)
