"""How every parser of the command line speaks: errors in one line, defaults in the help, names of the Python API."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

PROGRAM = "loftq-kernels"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default of each option to its help. Where that is None, the help has to say what it stands for."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: {'no' if action.default is False else '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which knows by what names the Python API calls its options.

    ``spelled`` maps those names to options, for messages (`flags.spelled`).
    """

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Help, **options)
        self.spelled: dict[str, argparse.Action] = {}

    def option(self, *flags: str, group: Any = None, python: tuple[str, ...] = (), **options: Any) -> None:
        action = (group or self).add_argument(*flags, **options)
        self.spelled |= dict.fromkeys((action.dest, *python), action)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message}; see {self.prog} --help\n")
