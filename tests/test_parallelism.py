# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
The plans by which diffusers splits the model among several devices, with two processes on a CPU and gloo. diffusers'
own tests of them ask for two GPUs.
"""

import os
import subprocess

import pytest
import torch
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from tiny_models import make_batch, make_pipeline, make_transformer

from diffusers_lsep import FlowMatchSDEScheduler


LAUNCHED = """
import sys
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from tiny_models import make_batch, make_pipeline, make_transformer

from diffusers_lsep import FlowMatchSDEScheduler

kind, path = sys.argv[1:]
dist.init_process_group("gloo")
assert dist.get_world_size() == 2

# What diffusers asks of accelerators, of which there are none here; torch does not mind.
torch.accelerator.device_count = lambda: 2
tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
config = {
    "ulysses": lambda: ContextParallelConfig(ulysses_degree=2),
    "tensor": lambda: TensorParallelConfig(tp_degree=2),
}[kind]()
pipe = make_pipeline(FlowMatchSDEScheduler(diffusion_form="none"), num_layers=3, qk_norm=True, flow_map_depth=1)
model, batch = pipe.transformer, make_batch()
model.enable_parallelism(config=config)

# Really split: a block sees half of the tokens, or holds half of the weights.
seen = []
model.transformer_blocks[1].ff.register_forward_hook(lambda ff, args, output: seen.append(args[0].shape[1]))
with torch.no_grad():
    output = model(batch["latents"], batch["timesteps"], batch["class_labels"], r_timestep=0.1).sample
weight = model.transformer_blocks[1].ff.net[2].weight
if kind == "tensor":
    assert seen == [16] and weight.to_local().shape == (32, 64), (seen, weight.to_local().shape)
else:
    assert seen == [8] and weight.shape == (32, 128), (seen, weight.shape)

pipe.set_progress_bar_config(disable=True)
call = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.6), "output_type": "latent"}
images = pipe([1, 2], generator=torch.Generator().manual_seed(0), **call).images
if dist.get_rank() == 0:
    torch.save({"output": output, "images": images}, path)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ulysses", "tensor"])  # attention in a ring takes a kernel for GPUs
def test_two_processes_give_what_one_gives(kind, tmp_path, warm_python):
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    search = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [*command, str(program), kind, str(tmp_path / "output.pt")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    parallel = torch.load(tmp_path / "output.pt", weights_only=True)

    scheduler, batch = FlowMatchSDEScheduler(diffusion_form="none"), make_batch()
    pipe = make_pipeline(scheduler, num_layers=3, qk_norm=True, flow_map_depth=1)
    with torch.no_grad():
        output = pipe.transformer(batch["latents"], batch["timesteps"], batch["class_labels"], r_timestep=0.1).sample
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.6), "output_type": "latent"}
    images = pipe([1, 2], generator=torch.Generator().manual_seed(0), **call).images
    torch.testing.assert_close(parallel["output"], output, rtol=0, atol=1e-5)
    torch.testing.assert_close(parallel["images"], images, rtol=0, atol=1e-5)


def test_every_planned_module_exists():
    """Plans name modules in strings, of blocks of both kinds."""
    for qk_norm in (False, True):
        model = make_transformer(qk_norm=qk_norm)
        names = {name for name, _ in model.named_modules()}
        for name in (*model._cp_plan, *model._tp_plan):
            assert {name.replace("*", str(i)) for i in range(2)} <= names


def test_probing_with_context_parallelism_is_refused():
    """A process would see a part of the tokens only."""
    model, batch = make_transformer(), make_batch()
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match="`apply_blocks`.* all tokens, but with context parallelism"):
        model.hidden_states_at(batch["latents"], 0.5, batch["class_labels"], 1)
