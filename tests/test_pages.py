# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The pages of `docs/` as a site, what they say, their figures, and the notebook."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import ROOT, read_blocks
from committed_figures import check_figure

from diffusers_lsep.training.arguments import build_parser


SEARCH_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # with the scripts of this environment


@pytest.mark.slow
def test_the_site_is_made(tmp_path, monkeypatch):
    """Strictly: no link that leads nowhere, no page that the menu lacks."""
    monkeypatch.setenv("PATH", SEARCH_PATH)
    result = subprocess.run(["make", "docs", f"SITE={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for page in ROOT.glob("docs/*.md"):
        folder = tmp_path / ("" if page.stem == "index" else page.stem)
        assert (folder / "index.html").is_file(), page
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("SiTTransformer2DModel", "LSEPObjective", "FlowMatchSDEScheduler", "convert_original_checkpoint"):
        assert re.search(rf'<h3 id="[\w.]+\.{name}"', api), name
    assert "crop_size" in api and "probe_dropout_prob" in api


def strings_of_the_source() -> str:
    """All texts in the source files, a line each, `...` where something is filled in."""
    texts = []
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(" ".join(text.replace("`", "").split()) for text in texts)


def test_every_message_of_the_troubleshooting_page_is_in_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^|]+)`([^|]*)\| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert len(rows) >= 35
    source = strings_of_the_source()
    for message, note in rows:
        if "of diffusers" in note:
            continue
        parts = [re.escape(part) for part in re.split(r"\.{3,}", message)]
        assert re.search(r"[^\n]*".join(parts), source), message


def test_every_flag_of_the_original_code_has_its_answer(load_example):
    text = (ROOT / "docs" / "from_original.md").read_text(encoding="utf-8")
    training, sampling = text.split("## Sampling")
    for part, parser in ((training, build_parser("")), (sampling, load_example("sample").build_parser())):
        known = {option for action in parser._actions for option in action.option_strings}
        rows = re.findall(r"^\| (`--[^|]+) \| ([^|]+) \| ([^|]*)\|$", part, re.MULTILINE)
        assert len(rows) >= 12
        for there, here, _ in rows:
            flags = re.findall(r"(?<!convert )--\w+", here)
            assert flags or here == "none", there
            assert set(flags) <= known, (there, here)


@pytest.mark.slow
def test_figures_of_the_concepts(load_example, tmp_path):
    load_example("figures", "docs").main(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"concepts-path.png", "concepts-streams.png", "concepts-weights.png"}
    for name in names:
        check_figure(tmp_path / name)


# --- The code of the pages, block after block


def run_here(page: str, folder: Path, monkeypatch, substitutions: dict[str, str]):
    """The Python blocks of a page, in this process: most of the time of a new one is spent on imports."""
    monkeypatch.chdir(folder)
    names, used = {}, set()
    blocks = [code for language, code in read_blocks(f"docs/{page}") if language == "python"]
    assert blocks
    for code in blocks:
        for old, new in substitutions.items():
            if old in code:
                used.add(old)
                code = code.replace(old, new)
        exec(compile(code, f"docs/{page}", "exec"), names)
    assert used == substitutions.keys(), "a substitution that nothing needs"
    return names


@pytest.fixture
def folder(tmp_path):
    """With the examples, and a pipeline of the digits that has learned nothing."""
    from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline, SiTTransformer2DModel

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    heads = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}
    transformer = SiTTransformer2DModel(8, 2, 1, num_classes=10, **heads)
    LSEPPipeline(transformer, FlowMatchSDEScheduler()).save_pretrained(tmp_path / "lsep-digits")
    return tmp_path


@pytest.mark.slow
def test_own_loops(folder, monkeypatch):
    """Plain, with accelerate, and with the Trainer of transformers: each trains, and saves a pipeline that draws."""
    from accelerate.state import AcceleratorState, GradientState
    from diffusers import DiffusionPipeline

    from diffusers_lsep.files import hash_weights

    lengths = {"range(600)": "range(2)", "range(50)": "range(1)", "max_steps=600": "max_steps=2, use_cpu=True"}
    lengths["zip(images, labels)"] = "zip(images[:200], labels)"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    names = run_here("own_loop.md", folder, monkeypatch, lengths)
    assert names["images"].shape == (1437, 1, 8, 8) and names["images"].abs().max() == 1
    hashes = set()
    for name in ("own-loop", "own-loop-accelerate", "own-loop-trainer"):
        pipe = DiffusionPipeline.from_pretrained(folder / name)
        assert pipe.transformer.proj_out.weight.abs().max() > 0, "zero before the first step"
        assert pipe([3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
        hashes.add(hash_weights(pipe.transformer))
    assert len(hashes) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "substitutions"),
    [
        ("index.md", {"guidance_scale=1.5,": "num_inference_steps=2, guidance_scale=1.5,"}),
        ("probing.md", {}),
        ("schedulers.md", {"num_inference_steps=32": "num_inference_steps=2"}),
        ("memory.md", {"num_inference_steps=50": "num_inference_steps=2"}),
    ],
)
def test_pages_run(folder, monkeypatch, page, substitutions):
    names = run_here(page, folder, monkeypatch, substitutions)
    if page == "probing.md":
        assert names["tokens"].shape == (2, 16, 128)
    else:
        assert len(names["images"]) == 2


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, warm_python):
    """Its cells as a script, with few steps."""
    notebook = json.loads((ROOT / "examples" / "lsep_digits.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells) and len(cells) >= 8
    script = "import subprocess\n" + "\n".join("".join(cell["source"]) for cell in cells)
    quick = " --validation_inference_steps 1 --num_validation_images 1"
    for old, new in (("STEPS = 600", "STEPS = 2"), ("--report_to none", f"--report_to none{quick}")):
        assert old in script
        script = script.replace(old, new)
    script = script.replace("--method ridge", "--method ridge --layers 3 --timesteps 0.2 0.5")
    script = re.sub(r"^!(.+)$", r"subprocess.run(f'\1', shell=True, check=True)", script, flags=re.MULTILINE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PATH", f"{warm_python.parent}{os.pathsep}{SEARCH_PATH}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    result = subprocess.run([warm_python, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "more with LSEP" in result.stdout and {path.name for path in tmp_path.iterdir()} == {
        "examples",
        "lsep-notebook",
    }
