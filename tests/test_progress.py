# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import io
import sys

import pytest

from diffusers_lsep import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A second for every look at it."""
    now = [0.0]

    def tick():
        now[0] += 1
        return now[0]

    monkeypatch.setattr("tqdm.std.time", tick)
    return now


def draw(monkeypatch, stream, steps=300, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.tqdm._instances", set())  # below bars that other tests have left there is no line 0
    bar = progress.make_progress_bar(total=steps, desc="Training", unit="step", **options)
    for _ in range(steps):
        bar.update()
        bar.set_postfix({"loss": "0.5"}, refresh=False)
    bar.close()
    return stream.getvalue()


def test_a_line_a_minute_where_there_is_no_terminal(monkeypatch, clock):
    text = draw(monkeypatch, io.StringIO())
    lines = text.splitlines()
    assert text.endswith("\n") and "\r" not in text and "" not in lines
    assert all(line.startswith("Training: ") for line in lines)
    assert lines[0].startswith("Training:   0%") and lines[-1].startswith("Training: 100%") and "loss=0.5" in lines[-1]
    assert 3 <= len(lines) <= clock[0] / progress.SECONDS_PER_LINE + 3


def test_one_of_many_short_bars_says_nothing(monkeypatch, clock):
    assert draw(monkeypatch, io.StringIO(), steps=20, leave=False) == ""
    assert draw(monkeypatch, io.StringIO(), steps=20, disable=True) == ""


def test_bars_of_pipelines_are_for_terminals(monkeypatch):
    """Where each of their states would be kept, there are none."""
    for stream, expected in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert progress.shows_bars() == expected


def test_a_terminal_has_a_bar(monkeypatch):
    text = draw(monkeypatch, Terminal(), mininterval=0)
    assert text.count("\r") > 1 and text.count("\n") == 1
