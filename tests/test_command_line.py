# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What all command lines have in common: help, usage errors, and errors of the user."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_lsep.cli import COMMANDS
from diffusers_lsep.cli import main as cli_main
from diffusers_lsep.command_line import ArgumentParser, number, run_script
from diffusers_lsep.training.arguments import build_parser


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def parser():
    parser = ArgumentParser(prog="draw", description="Draws.")
    parser.add_argument("--num_images", type=number(int, 1), default=4, help="How many images.")
    parser.add_argument("--scale", type=number(float, 0, 1), default=0, help="scale, of 100 %%")
    parser.add_argument("--times", type=float, nargs="+", default=[0.0, 0.5], help="When.")
    parser.add_argument("--output_dir", required=True, help="Where to.")
    parser.add_argument("--quick", action="store_true", help="Faster.")
    parser.add_argument("--average", action=argparse.BooleanOptionalAction, default=True, help="Averages.")
    return parser


def usage_error(parser, capsys, *words):
    """The one line with which a parser refuses."""
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_help_shows_each_default_once(parser):
    text = re.sub(r"\s+", " ", parser.format_help())
    for shown in (
        "How many images (default: 4).",
        "scale, of 100 % (default: 0)",
        "When (default: 0.0 0.5).",
        "Averages (default: yes).",
    ):
        assert text.count(shown) == 1, text
    assert "Where to. --" in text and "Faster. --" in text, "there is none to show"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "a", "--num_image", "3"], "is --num_image meant to be --num_images?"),
        (["--output_dir", "a", "--num-images=3"], "is --num-images meant to be --num_images?"),
        (["--outptu_dir", "a"], "required: --output_dir; is --outptu_dir meant to be --output_dir?"),
        (["--output_dir", "a", "--num_images", "0"], "argument --num_images: has to be at least 1, but is 0"),
        (["--output_dir", "a", "--num_images", "x"], "argument --num_images: invalid int value: 'x'"),
        (["--output_dir", "a", "--scale", "nan"], "argument --scale: has to be in 0..1, but is nan"),
    ],
)
def test_a_usage_error_is_one_line_that_names_the_flag_that_was_meant(parser, capsys, words, message):
    line = usage_error(parser, capsys, *words)
    assert line.startswith("draw: error: ") and message in line
    assert line.count("meant") == message.count("meant")


def test_what_is_like_no_flag_has_no_suggestion(parser, capsys):
    line = usage_error(parser, capsys, "--output_dir", "a", "--xyz")
    assert line == "draw: error: unrecognized arguments: --xyz (--help lists all flags)"


def test_flags_are_not_abbreviated(parser, capsys):
    assert "unrecognized arguments: --quic" in usage_error(parser, capsys, "--output_dir", "a", "--quic")


def test_a_command_suggests_its_own_flags(capsys):
    parser = ArgumentParser(prog="tool")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("one").add_argument("--first")
    commands.add_parser("two").add_argument("--second")
    line = usage_error(parser, capsys, "two", "--secnod", "3")
    assert line.startswith("tool two: error: ") and "is --secnod meant to be --second?" in line
    assert "meant" not in usage_error(parser, capsys, "two", "--first", "3")

    # What is found wrong after parsing is no flag that is misspelt.
    commands.choices["two"].add_argument("--halp")
    parser.parse_args(["two", "--halp", "3"])
    with pytest.raises(SystemExit):
        parser.error("--halp has to be below 3")
    assert "meant" not in capsys.readouterr().err


def test_arguments_from_a_file(parser, tmp_path, capsys):
    (tmp_path / "arguments").write_text("# what\n--num_images 3  # few\n\n--output_dir 'a folder'\n--times 1 2\n")
    args = parser.parse_args([f"@{tmp_path / 'arguments'}", "--num_images", "5"])
    assert (args.num_images, args.output_dir, args.times) == (5, "a folder", [1, 2])
    (tmp_path / "arguments").write_text("--num_imges 3 --output_dir a")
    assert "is --num_imges meant to be --num_images?" in usage_error(parser, capsys, f"@{tmp_path / 'arguments'}")
    assert "absent" in usage_error(parser, capsys, f"@{tmp_path / 'absent'}")


def parsers_of(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers_of(command)


def parser_of_command(name):
    parser = ArgumentParser(prog=name)
    importlib.import_module(f"diffusers_lsep.{COMMANDS[name][0]}").add_arguments(parser)
    return parser


@pytest.mark.parametrize("name", ["train_lsep", "sample", "figures", "encode_latents", *COMMANDS])
def test_every_flag_is_explained_and_no_default_is_said_twice(load_example, name):
    if name == "train_lsep":
        whole = build_parser("")
    else:
        whole = parser_of_command(name) if name in COMMANDS else load_example(name).build_parser()
    for parser in parsers_of(whole):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help and len(action.help.split()) > 1, f"{name}: {action.option_strings or action.dest}"
            # What depends on other flags is said in words; argparse itself says it of flags that come in two.
            if action.default is not None and not isinstance(action, argparse.BooleanOptionalAction):
                assert "default:" not in action.help, f"{name}: {action.option_strings}"
        assert isinstance(parser, ArgumentParser)


def ends_with(capsys, error, name="draw.py"):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main, name)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError, ConnectionError])
def test_errors_of_the_user_are_one_line(capsys, monkeypatch, kind):
    # This module stands for the script that runs.
    monkeypatch.setitem(globals(), "__name__", "__main__")
    assert ends_with(capsys, kind("`a` has to be 1,\n but is 2.")) == (
        2,
        "draw.py: error: `a` has to be 1, but is 2.\n",
    )


def test_numbers_that_are_not_finite_and_ctrl_c(capsys):
    assert ends_with(capsys, FloatingPointError("the loss is nan")) == (1, "draw.py: error: the loss is nan\n")
    assert ends_with(capsys, KeyboardInterrupt()) == (130, "")


def test_errors_of_the_program_keep_their_traceback():
    for main in (lambda: {}["a"], lambda: int("no number"), lambda: [].remove(1)):
        with pytest.raises((KeyError, ValueError)):
            run_script(main)


@pytest.mark.parametrize(("returned", "code"), [(None, None), (0, 0), (3, 3)])
def test_what_main_returns_is_the_exit_code(returned, code):
    with pytest.raises(SystemExit) as end:
        run_script(lambda: returned)
    assert end.value.code == code


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_lsep", "sample", "figures", "encode_latents"])
def test_a_script_ends_with_one_line_where_main_raises(load_example, name, tmp_path, warm_python):
    arguments = {
        "train_lsep": ["--train_data_dir", f"{tmp_path}/absent", "--report_to", "none"],
        "sample": ["--pretrained_model_name_or_path", f"{tmp_path}/absent", "--num_images", "1"],
        "figures": ["denoising-strip", "--pretrained_model_name_or_path", f"{tmp_path}/absent", "--class_labels", "1"],
        "encode_latents": ["--train_data_dir", f"{tmp_path}/absent"],
    }[name] + ["--output_dir", f"{tmp_path}/out"]
    with pytest.raises(ValueError, match="absent"):
        load_example(name).main(arguments)
    command = [warm_python, EXAMPLES / f"{name}.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"{name}.py: error: `") and "absent" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [[str(EXAMPLES / "train_lsep.py")], ["-m", "diffusers_lsep.cli", "train"]],
    ids=["script", "command"],
)
def test_training_says_something_before_torch_is_loaded(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('too early')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert (
        result.stdout.splitlines() == ["Loading PyTorch, diffusers and the data ..."] and "too early" in result.stderr
    )


def test_a_command_raises_from_python(tmp_path):
    with pytest.raises(ValueError, match="`checkpoint_path` has to be a file"):
        cli_main(["convert", "--checkpoint", f"{tmp_path}/absent", "--output_dir", f"{tmp_path}/out"])
