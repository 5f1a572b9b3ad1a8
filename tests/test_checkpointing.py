# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: whole or absent, and found again."""

import errno

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusers_lsep import FlowMatchSDEScheduler, LinearProbe, LSEPObjective, LSEPPipeline, SiTTransformer2DModel
from diffusers_lsep.files import whole_folder
from diffusers_lsep.training.checkpoints import (
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
        self.ema = EMAModel(self.objective.parameters())

    def step(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        latents, labels = torch.randn(4, 1, 4, 4, generator=generator), torch.tensor([0, 1, 2, 0])
        self.objective(latents, labels, generator=generator).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.objective.parameters())

    def save(self, folder, state=None):
        def save_pipeline(target):
            parameters = list(self.objective.parameters())
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
            LSEPPipeline(self.objective.transformer, FlowMatchSDEScheduler()).save_pretrained(target)
            if self.objective.probe is not None:
                self.objective.probe.save_pretrained(target / "probe")
            self.ema.restore(parameters)

        save_checkpoint(folder, self.objective, self.optimizer, state or {"step": 1}, save_pipeline)

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
