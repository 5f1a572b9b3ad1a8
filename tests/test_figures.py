# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from committed_figures import IMAGES, check_figure
from PIL import Image

from diffusers_lsep.figures import (
    COLOURS,
    make_labeled_grid,
    plot_cache_sweep,
    plot_denoising_strip,
    plot_guidance_sweep,
    require_matplotlib,
)


def test_small_images_are_enlarged_without_smoothing():
    image = Image.fromarray(np.array([[0, 200], [100, 50]], dtype=np.uint8))
    grid = np.asarray(make_labeled_grid([image] * 3, columns=2, min_size=64))
    assert grid.ndim == 2 and set(np.unique(grid)) == {0, 50, 100, 200, 255}
    gap = (grid.shape[1] - 128) // 3
    np.testing.assert_array_equal(grid[gap : gap + 32, gap : gap + 32], np.zeros((32, 32)))
    assert (grid[-gap - 64 : -gap, -gap - 64 : -gap] == 255).all(), "the place of the fourth image is empty"


def test_captions_stand_under_their_images():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    grid = np.asarray(make_labeled_grid([image, image], columns=2, labels=["", "W" * 50]))
    middle = grid.shape[1] // 2
    assert (grid[:, :middle] == 255).all() and (grid[68:, middle:] < 128).any()
    assert (grid[:66] == 255).all(), "captions keep out of the images"


def test_names_of_any_kind_are_drawn_in_one_line(tmp_path):
    names = ["a\nb", "$x^", "\ud800<b>"]
    images = [Image.new("L", (28, 28))] * 3
    grids = [make_labeled_grid(images, 3, captions) for captions in (names, ["a b", "$x^", "?<b>"])]
    assert np.array_equal(*map(np.asarray, grids))
    states = np.zeros((2, 3, 4, 4, 1), np.float32)
    plot_denoising_strip(tmp_path / "strip.png", states, states, [1.0, 0.0], names)
    assert Image.open(tmp_path / "strip.png").width > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "`images` has to hold at least one image"),
        ({"columns": 0}, "`columns` has to be at least 1, but is 0"),
        ({"labels": ["a", "b"]}, "`labels` has to hold 1 captions, one for each image, but holds 2"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_labeled_grid(**{"images": [Image.new("L", (8, 8))], "columns": 1, **arguments})


def test_a_strip_has_states_above_predictions(tmp_path):
    # A grey level of its own for each image: 2 times, 3 images
    states = np.arange(1, 7).reshape(2, 3, 1, 1, 1) / 20 * np.ones((2, 3, 4, 4, 1))
    predictions = states + 0.5
    plot_denoising_strip(tmp_path / "strip.png", states, predictions, [1.0, 0.0], ["a", "b", "c"], "title")
    assert [path.name for path in tmp_path.iterdir()] == ["strip.png"]
    pixels = np.asarray(Image.open(tmp_path / "strip.png").convert("L")).astype(int)
    places = {}
    for value in np.concatenate([states[:, :, 0, 0, 0].ravel(), predictions[:, :, 0, 0, 0].ravel()]):
        rows, columns = np.nonzero(np.abs(pixels - int(255 * value)) <= 1)
        assert len(rows) > 80 * 80, "images are not drawn over each other"
        places[round(value, 2)] = (np.median(rows), np.median(columns))
    for row in range(3):
        for column in range(2):
            value = round((1 + 3 * column + row) / 20, 2)
            state, prediction = places[value], places[round(value + 0.5, 2)]
            assert state[0] < prediction[0] and abs(state[1] - prediction[1]) < 3
            if column:
                assert places[round(value - 0.15, 2)][1] < state[1], "time runs to the right"
            if row:
                assert places[round(value + 0.45, 2)][0] < state[0], "an image stands below the one before"


def test_a_sweep_has_a_line_for_each_interval(tmp_path):
    results = [
        {
            "guidance_scale": scale,
            "guidance_interval": [0, high],
            "frechet_distance": 1 + i,
            "precision": 0.5 + i / 10,
            "recall": 0.5,
        }
        for high in (1, 0.7, 0.5)
        for i, scale in enumerate((1, 2, 3))
    ]
    counts = []
    for part in (results[:3], results):
        plot_guidance_sweep(tmp_path / "sweep.png", part, "title")
        pixels = np.asarray(Image.open(tmp_path / "sweep.png").convert("RGB"))
        colours = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[:3]]
        counts.append([int((pixels == colour).all(axis=2).sum() > 20) for colour in colours])
    # Legends show all of them, where the lines themselves lie upon each other.
    assert counts == [[1, 0, 0], [1, 1, 1]]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_missing_matplotlib_is_named_with_its_cure(monkeypatch):
    require_matplotlib("a figure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"a figure needs matplotlib: pip install 'diffusers_lsep\[eval\]'"):
        require_matplotlib("a figure")


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shown():
    """What the figures of `benchmarks/digits_ablation.py` are drawn from."""
    return json.loads((ROOT / "docs" / "images" / "digits.json").read_text(encoding="utf-8"))


def test_the_figure_of_the_digits_shows_what_the_table_says(shown):
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \**([^|]+?)\** \|" + r" ([\d.]+) ± ([\d.]+) \|" * 3 + "$", text, re.MULTILINE)
    table = {name: [float(number) for number in numbers] for name, *numbers in rows}
    variants = {name: values for group in shown["sweeps"].values() for name, values in group.items()}
    compared = [name for name in variants if name in table]
    assert len(compared) >= 14
    for name in compared:
        assert [number for pair in variants[name].values() for number in pair] == table[name], name


@pytest.mark.slow
def test_the_figures_of_the_digits_are_drawn_again_without_the_runs(shown, load_example, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = load_example("digits_ablation", "benchmarks")
    assert set(shown["heatmaps"]) == {script.PLAIN, script.LSEP} and set(shown["sweeps"]) == script.SWEEPS
    script.draw_figures(shown, tmp_path)
    for name in ("probe-heatmaps.png", "digits-sweeps.png"):
        check_figure(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plot", "name", "settings"),
    [
        (plot_guidance_sweep, "guidance-sweep", "500 images in 32 steps"),
        (plot_cache_sweep, "cache-sweep", "100 images in 25 steps, guidance 1.5"),
    ],
    ids=["guidance", "caches"],
)
def test_the_figures_of_the_sweeps_show_the_numbers_beside_them(plot, name, settings, tmp_path):
    results = json.loads((IMAGES / f"{name}.json").read_text(encoding="utf-8"))["results"]
    plot(tmp_path / f"{name}.png", results, f"lsep-digits: {settings}, features: pixels")
    check_figure(tmp_path / f"{name}.png")
