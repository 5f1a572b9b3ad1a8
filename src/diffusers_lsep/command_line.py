# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Command lines that explain themselves: every default in the help, and a suggestion for a flag that is misspelt."""

import argparse
import difflib
import math
import re
import shlex
from typing import Any, NoReturn


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every flag that has one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        hidden = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if text is None or hidden or not action.option_strings or "%(default)" in text:
            return text
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {' '.join(map(str, action.default))})"
        return f"{text} (default: {'yes' if action.default is True else '%(default)s'})"


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

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (.+)", message)
        for word in unknown[1].split() if unknown else ():
            close = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            if word.startswith("-") and close:
                message += f"; did you mean {close[0]}?"
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


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
