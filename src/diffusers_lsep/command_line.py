# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Command lines that explain themselves: every default in the help, errors in one line, the flag that was meant."""

import argparse
import difflib
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .launchers import end_with_launcher


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every flag that has one to show, and fills a description of one line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        formatter = argparse.HelpFormatter if "\n" not in text else argparse.RawDescriptionHelpFormatter
        return formatter._fill_text(self, text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if text is None or not action.option_strings or "%(default)" in text:
            return text
        if default is None or default is False or default == argparse.SUPPRESS:
            return text
        values = default if isinstance(default, list | tuple) else ["yes" if default is True else default]
        shown = " ".join(map(str, values)).replace("%", "%%")
        return f"{text.removesuffix('.')} (default: {shown}){'.' if text.endswith('.') else ''}"


class ArgumentParser(argparse.ArgumentParser):
    """
    An `argparse.ArgumentParser` without abbreviations that reads argument lists as `@file`: flags as on the command
    line, on any number of lines; `#` starts a comment. A usage error is one line, and names the flag that was probably
    meant.

    Args:
        kwargs: As for `argparse.ArgumentParser`.
    """

    def __init__(self, **kwargs):
        defaults = {"formatter_class": HelpFormatter, "fromfile_prefix_chars": "@", "allow_abbrev": False}
        super().__init__(**{**defaults, **kwargs})
        self._words: list[str] = []

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        """Knows all arguments or ends: so the parser of a sub-command, not the one above it, suggests its flags."""
        words = sys.argv[1:] if args is None else list(args)
        self._words = self._read_args_from_files(words) if self.fromfile_prefix_chars else words
        namespace, unknown = super().parse_known_args(self._words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def refuse_without(self, needed: str, args: argparse.Namespace, prefix: str | tuple[str, ...]):
        """Ends with a usage error if a flag whose name begins so (or so) is not its default: it needs another."""
        for action in self._actions:
            if action.dest.startswith(prefix) and getattr(args, action.dest) != action.default:
                self.error(f"--{action.dest} needs {needed}")

    def error(self, message: str) -> NoReturn:
        # Also where a required flag is missing: it may be there, misspelt.
        flags = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        known = {*self._option_string_actions}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known.update(*(parser._option_string_actions for parser in action.choices.values()))
        for flag in flags:
            close = difflib.get_close_matches(flag, sorted(known), n=1)
            if close and close[0] != flag:
                message += f"; is {flag} meant to be {close[0]}?"
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def check_writable(flag: str, folder: str | os.PathLike):
    """
    Refuses a folder that cannot be written, or made.

    Raises:
        `ValueError`: if it, or what would hold it, is no folder or may not be written.
    """
    parent = next(place for place in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(place))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"`{flag}` {str(folder)!r} cannot be written: {str(parent)!r} is no such folder.")


def check_output_dir(output_dir: str, overwrite: bool, is_own: Callable[[set[str]], bool], what: str) -> Path:
    """
    The folder of `--output_dir`, if it is free, or if `--overwrite_output_dir` may replace what it holds.

    Args:
        output_dir (`str`): The folder.
        overwrite (`bool`): Whether that flag is given.
        is_own (`Callable`): Whether the command has written what has these names.
        what (`str`): What that is, for the message.

    Raises:
        `ValueError`: if it is a file or a mount point, cannot be written, or holds something else.
    """
    from .files import check_replaceable  # and torch: `diffusers-lsep --help` comes without

    folder = Path(output_dir).resolve()
    check_replaceable(folder)
    check_writable("--output_dir", folder.parent)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output_dir` {folder} is a file.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not overwrite:
        raise ValueError(f"`--output_dir` {folder} is not empty. `--overwrite_output_dir` replaces it.")
    if names and not is_own(names):
        raise ValueError(f"`--overwrite_output_dir` replaces {what} only, but {folder} holds {sorted(names)}.")
    return folder


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number from `low` to `high`, both included."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"has to be {limits}, but is {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it if it is no number at all
    return parse


def with_values(args: argparse.Namespace, **values) -> argparse.Namespace:
    """The arguments of a command line with other values; the given ones are not changed."""
    return argparse.Namespace(**{**vars(args), **values})


def run_script(main: Callable[[], int | None], name: str | None = None) -> NoReturn:
    """
    Ends the process with what `main` returns. What a user can set right (a file that is not there, a missing library,
    a value that one of our own checks refuses) becomes one line on stderr and exit code 2; numbers that are not finite
    one with exit code 1. Ctrl-C ends it with 130. All else is an error of the program and keeps its traceback.

    Args:
        main (`Callable`): The script, which returns an exit code or None.
        name (`str`, *optional*): What the line begins with; the name of the script's file if not given.
    """
    end_with_launcher()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        raised_by = frame.f_globals["__name__"].partition(".")[0]
        if isinstance(error, ValueError) and raised_by not in ("__main__", __package__, "huggingface_hub"):
            raise
        print(f"{name or Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
