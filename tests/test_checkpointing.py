# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: whole or absent, and found again."""

import errno
import json
import threading

import pytest
import torch
from accelerate import PartialState
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusers_lsep import FlowMatchSDEScheduler, LinearProbe, LSEPObjective, LSEPPipeline, SiTTransformer2DModel
from diffusers_lsep.files import whole_folder
from diffusers_lsep.training.average import WeightAverage
from diffusers_lsep.training.checkpoint_writer import CheckpointWriter
from diffusers_lsep.training.checkpoints import (
    checkpoint_tensors,
    choose_checkpoint,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)


class Run:
    """A training run in miniature."""

    def __init__(self, seed: int = 0, with_probe: bool = True):
        torch.manual_seed(seed)
        transformer = SiTTransformer2DModel(4, 2, 1, None, 2, 2, 4, num_classes=3)
        probe = LinearProbe(8, 3) if with_probe else None
        self.objective = LSEPObjective(transformer, probe, probe_depth=1)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-2)
        self.ema = WeightAverage(self.objective.parameters())

    def step(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        latents, labels = torch.randn(4, 1, 4, 4, generator=generator), torch.tensor([0, 1, 2, 0])
        self.objective(latents, labels, generator=generator).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.objective.parameters())

    def save(self, folder, state=None):
        state = json.dumps(state or {"step": 1}, indent=2) + "\n"
        save_checkpoint(folder, self.tensors(), state, self.save_pipeline)

    def tensors(self):
        return checkpoint_tensors(self.objective, self.optimizer, self.ema)

    def save_pipeline(self, folder, weights):
        objective = Run(with_probe=self.objective.probe is not None).objective
        objective.load_state_dict(weights)
        LSEPPipeline(objective.transformer, FlowMatchSDEScheduler()).save_pretrained(folder)
        if objective.probe is not None:
            objective.probe.save_pretrained(folder / "probe")

    def weights(self):
        return [*self.objective.parameters(), *self.ema.shadow_params]


@pytest.mark.parametrize("with_probe", [True, False])
def test_a_restored_run_continues_bit_for_bit(tmp_path, with_probe):
    run = Run(with_probe=with_probe)
    for seed in range(3):
        run.step(seed)
    run.save(tmp_path / "checkpoint-3", {"step": 3, "scaler": {"scale": 2.0**16}, "lr_scheduler": None})
    assert find_damage(tmp_path / "checkpoint-3") is None

    other = Run(seed=1, with_probe=with_probe)
    state = load_checkpoint(tmp_path / "checkpoint-3", other.objective, other.optimizer, other.ema)
    assert state == {"step": 3, "scaler": {"scale": 2.0**16}, "lr_scheduler": None}
    other.ema.optimization_step = run.ema.optimization_step
    for seed in range(3, 6):
        run.step(seed)
        other.step(seed)
    for one, two in zip(run.weights(), other.weights(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_holds_a_pipeline_and_no_pickle(tmp_path):
    run = Run()
    run.step(0)
    run.save(tmp_path / "checkpoint-1")
    assert {path.suffix for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "checkpoint-1" / "pipeline")
    average = dict(zip([name for name, _ in run.objective.named_parameters()], run.ema.shadow_params))
    for name, parameter in pipeline.transformer.named_parameters():
        assert torch.equal(parameter, average[f"transformer.{name}"])


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    run = Run()
    run.save(tmp_path / "checkpoint-0")
    path = tmp_path / "checkpoint-0" / "model.safetensors"
    weights = load_file(path)
    del weights["probe.linear.bias"]
    save_file(weights, path)
    with pytest.raises(RuntimeError, match="Missing key.*probe.linear.bias"):
        load_checkpoint(tmp_path / "checkpoint-0", run.objective, run.optimizer, run.ema)


def test_an_optimizer_that_made_no_step_yet(tmp_path):
    """Saving leaves it and the weights as they are, and so does loading."""
    run, other = Run(), Run(seed=1)
    run.save(tmp_path / "checkpoint-0")
    load_checkpoint(tmp_path / "checkpoint-0", other.objective, other.optimizer, other.ema)
    assert not run.optimizer.state and not other.optimizer.state
    for one in (run, other):
        one.step(0)
    for one, two in zip(run.objective.parameters(), other.objective.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_behind(tmp_path, error):
    Run().save(tmp_path / "checkpoint-1", {"step": 1, "attempt": 1})
    with pytest.raises(type(error)):
        with whole_folder(tmp_path / "checkpoint-1") as partial:
            (partial / "half").write_text("a")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / "half").write_text("a")
    (tmp_path / ".checkpoint-1.old").mkdir()
    Run().save(tmp_path / "checkpoint-1")
    Run().save(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None


DAMAGE = {
    "missing": (lambda path: path.unlink(), "optimizer.safetensors is missing"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "optimizer.safetensors has .* bytes in place of"),
    "changed": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "optimizer.safetensors has changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_latest_skips_damaged_checkpoints(tmp_path, kind):
    for step in (9, 10):
        Run().save(tmp_path / f"checkpoint-{step}")
    damage, message = DAMAGE[kind]
    damage(tmp_path / "checkpoint-10" / "optimizer.safetensors")

    reports = []
    assert choose_checkpoint(tmp_path, "latest", reports.append) == tmp_path / "checkpoint-9"
    assert len(reports) == 1 and "checkpoint-10, which is damaged" in reports[0]
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` 'checkpoint-10' cannot be used: {message}"):
        choose_checkpoint(tmp_path, "checkpoint-10", reports.append)
    assert choose_checkpoint(tmp_path, "checkpoint-9", reports.append) == tmp_path / "checkpoint-9"
    assert choose_checkpoint(tmp_path / "x", str(tmp_path / "checkpoint-9"), reports.append).name == "checkpoint-9"

    (tmp_path / "checkpoint-9" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        choose_checkpoint(tmp_path, "latest", reports.append)


def test_no_checkpoint(tmp_path):
    assert choose_checkpoint(tmp_path, "latest", print) is None
    with pytest.raises(ValueError, match="'checkpoint-3' cannot be used: there is no such folder"):
        choose_checkpoint(tmp_path, "checkpoint-3", print)


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    def checkpoints(total_limit, milestone_steps):
        for step in range(2, 22, 2):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-best").mkdir(exist_ok=True)  # not ours
        remove_old_checkpoints(tmp_path, total_limit, milestone_steps)
        assert (tmp_path / "checkpoint-best").is_dir()
        return [step for step, _ in list_checkpoints(tmp_path)]

    assert checkpoints(None, None) == list(range(2, 22, 2))
    assert checkpoints(3, None) == [16, 18, 20]
    assert checkpoints(2, 8) == [8, 16, 18, 20]
    assert checkpoints(1, 10) == [10, 18, 20]
    assert checkpoints(50, 10) == list(range(2, 22, 2))


class HeldUp:
    """Saves the pipelines of a run as soon as it is let."""

    def __init__(self, run):
        self.run, self.reached, self.let = run, threading.Event(), threading.Event()

    def __call__(self, folder, weights):
        self.reached.set()
        assert self.let.wait(60)
        self.run.save_pipeline(folder, weights)


@pytest.fixture
def held_up(tmp_path):
    """A run, what holds its checkpoints up, and their writer."""
    run = Run()
    run.step(0)
    held = HeldUp(run)
    yield run, held, CheckpointWriter(PartialState(cpu=True), tmp_path, held, total_limit=1)
    held.let.set()


def test_a_checkpoint_is_that_of_its_step_while_training_goes_on(tmp_path, held_up):
    run, held, writer = held_up
    run.save(tmp_path / "at-once", {"step": 1})
    state = {"step": 1}
    with writer:
        writer.save(1, run.tensors(), state)
        assert held.reached.wait(60), "the checkpoint is being written"
        run.step(1)
        state["step"] = 2
        assert list_checkpoints(tmp_path) == [] and writer.last is None, "not yet whole"
        held.let.set()
        writer.finish()
        assert writer.last == tmp_path / "checkpoint-1" and find_damage(writer.last) is None
        for path in (tmp_path / "at-once").rglob("*.*"):
            assert path.read_bytes() == (writer.last / path.relative_to(tmp_path / "at-once")).read_bytes(), path
        writer.save(2, run.tensors(), state)  # into the same memory
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2], "the block ends with it, and the limit is kept"
    other = Run(seed=1)
    assert load_checkpoint(tmp_path / "checkpoint-2", other.objective, other.optimizer, other.ema) == {"step": 2}
    for one, two in zip(run.weights(), other.weights(), strict=True):
        assert torch.equal(one, two)


def test_one_checkpoint_is_written_at_a_time(tmp_path, held_up):
    run, held, writer = held_up
    with writer:
        writer.save(1, run.tensors(), {})
        second = threading.Thread(target=writer.save, args=(2, run.tensors(), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it waits for the first"
        held.let.set()
        second.join()
        assert writer.last == tmp_path / "checkpoint-1"
    assert writer.last == tmp_path / "checkpoint-2"


def test_what_goes_wrong_in_the_background_is_raised_once(tmp_path, held_up):
    run, held, writer = held_up
    held.let.set()
    writer.save(1, run.tensors(), {})
    writer.finish()
    held.run = None  # which has no pipelines
    message = "checkpoint-2 could not be written .*NoneType.*; the last good checkpoint is .*checkpoint-1"
    with pytest.raises(OSError, match=message), writer:
        writer.save(2, run.tensors(), {})
    writer.finish()
    held.run = run
    with pytest.raises(RuntimeError, match="of the data"), writer:
        writer.save(3, run.tensors(), {})
        raise RuntimeError("of the data")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3], "what was begun is there when the run has ended"


def test_a_second_interruption_waits_for_no_checkpoint(tmp_path, held_up):
    run, held, writer = held_up
    with pytest.raises(KeyboardInterrupt), writer:
        writer.save(1, run.tensors(), {})
        raise KeyboardInterrupt
    assert not held.let.is_set() and list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_that_of_diffusers_to_the_bit(warmup):
    options = {"decay": 0.99, "min_decay": 0.0 if warmup else 0.99, "foreach": True}
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (1, 7, 1000)]
    ours, theirs = WeightAverage(parameters, **options), EMAModel(parameters, **options)
    for _ in range(30):  # the decay of the warm-up is below 0.5 up to step 8
        for parameter in parameters:
            parameter.data += 0.1 * torch.randn_like(parameter)
        ours.step(parameters)
        theirs.step(parameters)
        assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.optimization_step == theirs.optimization_step and ours.cur_decay_value == theirs.cur_decay_value


def test_the_average_takes_the_place_of_the_weights_for_a_while():
    parameters = [torch.nn.Parameter(torch.randn(3))]
    average = WeightAverage(parameters, decay=0.9, min_decay=0.9)
    parameters[0].data += 1
    weights, averaged = parameters[0].detach().clone(), average.shadow_params[0].clone()
    places = parameters[0].data_ptr(), average.shadow_params[0].data_ptr()
    with pytest.raises(RuntimeError, match="of the block"), average.in_place_of(parameters):
        assert torch.equal(parameters[0], averaged) and torch.equal(average.shadow_params[0], weights)
        raise RuntimeError("of the block")
    assert torch.equal(parameters[0], weights) and torch.equal(average.shadow_params[0], averaged)
    assert (parameters[0].data_ptr(), average.shadow_params[0].data_ptr()) == places
