# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: those for GPUs run to their end without one, and their counts are right."""

import json
import math
import sys
from pathlib import Path

import pytest
import regularizers
import torch
import torch.nn as nn
from code_blocks import ROOT
from committed_figures import check_figure
from diffusers.utils import is_torch_version
from roofline import DEVICES, Shape, compiled_kernels, count_flops, eager_kernels, formula_flops, schedule
from tiny_models import make_pipeline

from diffusers_lsep.training.memory import trace_block, without_values


# What asks the compiler's scheduler, or does without the driver, knows this version of PyTorch.
on_this_version = pytest.mark.skipif(
    torch.version.cuda is None or is_torch_version("<", "2.15.0"), reason="needs PyTorch 2.15, built with CUDA"
)
STUDY = ROOT / "benchmarks" / "regularizers"
TINY = {"patch_size": 2, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.mark.parametrize("batch_size", [4, 11])
def test_counted_operations_equal_the_formula(batch_size):
    shape = Shape(TINY, sample_size=8, batch_size=batch_size, probe_depth=2, classes=10)
    assert count_flops(shape) == formula_flops(shape)


@pytest.mark.slow
@on_this_version
def test_kernels_that_the_compiler_fuses():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = nn.Linear(64, 32)

        def forward(self, tokens, condition):
            return self.product(torch.tanh(2 * tokens + condition[:, None]))

    with without_values("cpu"):
        forward, backward = trace_block(Layer(), torch.zeros(4, 128, 64), torch.zeros(4, 64))
    fused, product = schedule(forward)
    tokens, condition, weight, output = 4 * 128 * 64, 4 * 64, 32 * 64 + 32, 4 * 128 * 32
    assert (fused.kind, fused.flops, fused.bytes) == ("other", 0, 4 * (tokens + condition + tokens))
    assert (product.kind, product.flops) == ("product", 2 * output * 64)
    assert product.bytes == 4 * (tokens + weight + output)
    assert [kernel.flops for kernel in schedule(backward) if kernel.kind == "product"] == [product.flops] * 2


@pytest.mark.slow
@on_this_version
def test_kernels_of_a_step():
    shape = Shape(TINY, sample_size=8, batch_size=6, probe_depth=2, classes=10)
    kernels = {"eager": eager_kernels(shape)["model"], "compiled": compiled_kernels(shape)}
    kernels["concatenated"] = compiled_kernels(shape, concatenates=True)
    # Whoever starts them, the products are the same; those outside of the blocks are not compiled here.
    of = {name: sum(kernel.flops for kernel in found) for name, found in kernels.items()}
    assert of["eager"] == formula_flops(shape)
    assert of["compiled"] == of["concatenated"] < of["eager"]
    products = {name: sum(kernel.kind == "product" for kernel in found) for name, found in kernels.items()}
    assert (products["compiled"], products["concatenated"]) == (3 * 21, 3 * 15)
    assert sum(kernel.bytes for kernel in kernels["compiled"]) < sum(kernel.bytes for kernel in kernels["eager"])
    assert len(kernels["concatenated"]) < len(kernels["compiled"]) < len(kernels["eager"])


@pytest.mark.slow
@on_this_version
def test_roofline(load_example, tmp_path, capsys):
    script = load_example("roofline", "benchmarks")
    script.main(["--preset", "SiT-S/8", "--batch_sizes", "4", "--output", str(tmp_path / "roofline.json")])
    results = json.loads((tmp_path / "roofline.json").read_text())
    (shape,) = results["shapes"]
    assert shape["gflop_per_image"] == pytest.approx(
        formula_flops(Shape(script.SIT_PRESETS["SiT-S/8"], 32, 4, 4)) / 4e9
    )
    eager, *others = shape["ways"]
    assert len(others) == 3 and all(eager[name] < row[name] < 1 for row in others for name in DEVICES)
    table = (tmp_path / "roofline.md").read_text()
    assert table in capsys.readouterr().out and all(row["way"] in table for row in shape["ways"])


@pytest.mark.slow
@on_this_version
def test_throughput_runs_to_its_end(load_example, tmp_path):
    script = load_example("throughput", "benchmarks")
    sizes = ("--preset", "SiT-S/8", "--batch_sizes", "4", "--sampling_batch_size", "2", "--sampling_steps", "3")
    output = ("--run_steps", "2", "--output", str(tmp_path / "throughput.json"))
    ways = ["original", "regional-cudnn-qkv"]
    script.main(["--simulate", *sizes, *output, "--ways", *ways])
    results = json.loads((tmp_path / "throughput.json").read_text())
    assert results["device"] == "simulated: NVIDIA H100 80GB HBM3" and results["peak_tflops"] == 989
    assert [row["way"] for row in results["training"]] == ways
    assert not any("error" in row for part in ("training", "sampling", "run") for row in results[part])
    assert results["run"][0]["images_per_second"] > 0
    native = [row for row in results["attention"] if row["backend"].startswith("native")]
    assert {row["backend"] for row in native} == {"native", "native, cuDNN first"}
    assert not any("error" in row for row in native)
    assert json.loads((tmp_path / "throughput.trace.json").read_text())["traceEvents"]


def test_rows_are_written_one_by_one_and_errors_are_rows(load_example, tmp_path):
    script = load_example("throughput", "benchmarks")
    report = script.Report(tmp_path / "results.json", {"device": "none"})

    def fail(message):
        raise RuntimeError(message)

    report.measure("training", {"way": "a"}, lambda: {"images_per_second": 5.0})
    assert json.loads((tmp_path / "results.json").read_text())["training"] == [{"way": "a", "images_per_second": 5.0}]
    for message in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        report.measure("training", {"way": "b"}, lambda message=message: fail(message))
    report.measure("training", {"way": "c"}, lambda: fail("something else"))
    errors = [row.get("error") for row in json.loads((tmp_path / "results.json").read_text())["training"]]
    assert errors == [None, "out of memory", "out of memory", "RuntimeError: something else"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L40S", 362)],
)
def test_peaks_by_name(load_example, name, peak):
    assert load_example("throughput", "benchmarks").find_peak(name) == peak
    assert load_example("throughput", "benchmarks").find_peak("a toaster") is None


def test_every_benchmark_is_run_by_all_or_by_itself(load_example, capsys, monkeypatch):
    script = load_example("run", "benchmarks")
    folder = Path(script.__file__).parent
    scripts = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    modules = {*script.PAIRED, "original_repo", *script.SCRIPTS, *script.ALONE}
    assert scripts - {"run"} <= modules and all((folder / f"{name}.py").is_file() for name in modules)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in readme for name in script.ALONE)
    monkeypatch.setattr(sys, "argv", ["run.py", "precision"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "python benchmarks/precision.py is run by itself" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compared_schedulers_work(load_example):
    script = load_example("solver_order", folder="benchmarks")
    pipes = {of_map: make_pipeline(num_layers=2, flow_map_depth=1 if of_map else None) for of_map in (False, True)}
    for name in script.SCHEDULERS:
        states = script.draw(pipes[name in script.OF_FLOW_MAPS], name, 4, [0, 1], 0)
        assert len(states) > 1 and all(state.isfinite().all() for state in states), name


@pytest.mark.slow
def test_precision_of_one_seed(load_example, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    make_pipeline(num_layers=1, patch_size=4, in_channels=1).save_pretrained(tmp_path / "model")
    script = load_example("precision", "benchmarks")
    sizes = ("--num_images", "20", "--steps", "2", "--seeds", "1")
    script.main(["--pretrained_model_name_or_path", str(tmp_path / "model"), *sizes])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["dtype"] for row in rows] == list(script.DTYPES)
    assert rows[0]["mean change of a pixel"] == rows[0]["largest"] == 0 < rows[-1]["mean change of a pixel"]
    assert all(len(row["distances"]) == 1 and "between seeds, root mean square" not in row for row in rows)


@pytest.fixture
def found():
    """What was found of the runs of all studies but that of the lengths of averages, setting by setting."""
    settings = {study: list(regularizers.METHODS) for study in ("methods", "labels")}
    settings["choice"] = list(regularizers.CHOICES)
    results = [json.loads(path.read_text()) for path in STUDY.glob("*-seed-*.json")]
    results = [result for result in results if "curve" in result]
    return sorted(results, key=lambda result: (settings[result["study"]].index(result["method"]), result["seed"]))


@pytest.fixture
def compared(found):
    return [result for result in found if result["study"] == "methods"]


def test_the_tables_of_the_comparison_are_those_of_its_results(compared):
    page = (ROOT / "docs" / "methods.md").read_text()
    costs = json.loads((STUDY / "costs.json").read_text())
    pair = [result for result in compared if result["steps"] == regularizers.STEPS]
    for table in (
        regularizers.make_table(compared, regularizers.COLUMNS),
        regularizers.make_table(compared, regularizers.MORE_COLUMNS),
        regularizers.make_pair_table(pair, costs["LSEP"]["ratio"]),
        regularizers.make_cost_table(costs),
    ):
        assert table in page, table


def test_the_tables_of_the_other_studies_are_those_of_their_results(found):
    choice, *labels = (
        [result for result in found if result["study"] == study and result["data"] == data]
        for study, data in (("choice", "labels"), ("labels", regularizers.WRONG), ("labels", regularizers.COARSE))
    )
    columns = regularizers.COLUMNS[1:]
    lengths = [json.loads(path.read_text()) for path in sorted(STUDY.glob("*-lengths.json"), reverse=True)]
    assert regularizers.make_table(choice, columns, "LSEP") in (ROOT / "benchmarks" / "README.md").read_text()
    page = (ROOT / "docs" / "methods.md").read_text()
    for table in (*(regularizers.make_table(of, columns) for of in labels), regularizers.make_length_table(lengths)):
        assert table in page, table


def test_the_figure_of_the_comparison_is_that_of_its_results(compared, tmp_path):
    costs = json.loads((STUDY / "costs.json").read_text())
    regularizers.draw_curves(compared, costs, tmp_path / "methods-curves.png")
    check_figure(tmp_path / "methods-curves.png")


def test_intervals_of_paired_differences():
    """Of the differences 1, 2 and 6 of the common seeds: Student's quantile has a closed form for three."""
    ours, plain = {0: 11.0, 1: 22.0, 2: 36.0, 7: 99.0}, {0: 10.0, 1: 20.0, 2: 30.0, 8: 50.0}
    mean, half, count = regularizers.paired_differences(ours, plain)
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    assert (mean, count) == (3.0, 3) and half == pytest.approx(quantile * math.sqrt(7 / 3), rel=1e-3)
    assert regularizers.format_difference("distance", ours, plain) == "+3.0 ± 6.6"
    assert regularizers.format_difference("recall", {0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6}) == "**+10 ± 0**"
    assert regularizers.format_difference("distance", {0: 1.0}, plain) == ""


def test_a_table_without_plain_sit(compared):
    table = regularizers.make_table([r for r in compared if r["method"] == "sra"], [("distance", 1500)])
    assert table.splitlines()[0] == "|  | seeds | distance at 1,500 |" and "| SRA | 3 |" in table


def test_values_between_judged_steps():
    """A distance that falls by a factor in equal steps, and a share that grows by as much, are met exactly."""
    points = [
        {"step": step, "frechet_distance": 100 * 0.5 ** (step / 1000), "as_asked_for": step / 1e4}
        for step in (1000, 1500, 3000)
    ]
    results = [{"method": "SiT", "seed": 4, "curve": points}]
    between = regularizers.values_between(results, "SiT", "distance", 2000)
    assert between == {4: pytest.approx(25)}
    assert regularizers.values_between(results, "SiT", "drawn as asked for", 2000) == {4: pytest.approx(0.2)}
    assert regularizers.values_between(results, "SiT", "distance", 3001) == {}
