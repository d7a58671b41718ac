"""``loftq-kernels``: one command of the command line, and what becomes of failures.

What runs a command is imported when its arguments have been understood, for it imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence

from loftq_kernels.cli.flags import spelled
from loftq_kernels.cli.parser import PROGRAM, make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A foreseeable failure is one line on standard error and status 2.

    Raises SystemExit, as argparse does, for --help, --version and arguments that it does not understand.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:  # Its options are those of another parser, --help among them.
        args = argparse.Namespace(command="bench", arguments=argv[1:], parser=make_parser())
    else:
        args = make_parser().parse_args(argv)
    try:
        with _warnings_in_a_line(args.parser.spelled):
            return _run(args) or 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    # RuntimeError: what torch raises for a device, for memory and for types that it has no kernel for.
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError, ArithmeticError) as error:
        print(f"{PROGRAM}: {spelled(_one_line(error), args.parser.spelled)}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _warnings_in_a_line(options: Mapping[str, argparse.Action]) -> Iterator[None]:
    """Show a UserWarning without the place in the source that it comes from; other warnings as Python does."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message, category, *place, **options_of_it) -> None:
            if category is not UserWarning:
                return others(message, category, *place, **options_of_it)
            print(f"{PROGRAM}: warning: {spelled(_one_line(message), options)}", file=sys.stderr)

        warnings.showwarning = show
        yield


def _run(args: argparse.Namespace) -> int | None:
    if args.command == "bench":
        from loftq_kernels.cli.bench import bench

        return bench(args.arguments)
    from loftq_kernels.cli import commands

    return commands.COMMANDS[args.command](args)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
