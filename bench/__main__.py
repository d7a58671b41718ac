"""``python -m bench SUBJECT ...``: measure, into a folder of JSON files and pictures; without a subject, list them.

``all`` stands for every subject that this machine can run, except those that run only when named. ``plot SUBJECT ...``
draws the pictures again from the JSON files, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import subject
from bench.subject import Subject

OUTPUT = Path("bench-results")
RESULTS = subject.FOLDER / "results"  # What is committed: the figures of the documentation come from it,
PICTURES = subject.FOLDER.parent / "docs"  # and its pictures are drawn from it.


def main(argv: Sequence[str] | None = None) -> int:
    found = subject.subjects()
    parser = _parser(found)
    args = parser.parse_args(argv)
    if not args.subjects:
        parser.print_help()
        return 0
    output, pictures = (RESULTS, PICTURES) if args.publish else (args.output or OUTPUT,) * 2
    try:
        if args.subjects[0] == "plot":
            return _plot(args.subjects[1:] or subject.pictures(), output, pictures)
        chosen = _chosen(args.subjects, found)
        options = _options(args, chosen)
        if args.publish and (args.quick or any(options.values())):
            raise ValueError("--publish takes full runs of the standard cases: leave out --quick and what narrows them")
    except ValueError as error:
        parser.error(str(error))
    return _measure(chosen, args.quick, options, output, pictures)


def _parser(found: dict[str, Subject]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"subjects (times: two cores of an AMD EPYC, Zen 4):\n\n{subject.listing(found.values())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("subjects", nargs="*", metavar="SUBJECT", help="of those below; or all; or plot, then subjects")
    add("--quick", action="store_true", help="smaller shapes and fewer repetitions, to try it out (files *_quick.json)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help=f"folder for JSON files and pictures (default {OUTPUT})")
    where.add_argument("--publish", action="store_true", help="write the committed bench/results/*.json and docs/*.png")
    add("--shape", type=_shape, action="append", dest="shapes", metavar="NxK", help="of a weight, e.g. 4096x14336")
    add("--rows", type=_rows, metavar="M,M,...", help="rows of x, e.g. 1,8,128")
    add("--format", action="append", dest="formats", metavar="FORMAT", help="of our weights, e.g. nf4")
    add("--peer", action="append", dest="peers", metavar="NAME", help='e.g. "bf16 linear"; a wrong name lists them all')
    add("--seconds", type=float, help="time after which what is left is named and not measured")
    return parser


def _shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write out_features x in_features, e.g. 4096x14336")
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _rows(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} are no rows: write positive numbers with commas, e.g. 1,8,128")
    return tuple(map(int, text.split(",")))


def _chosen(names: Sequence[str], found: dict[str, Subject]) -> list[Subject]:
    """The subjects to run. What cannot run here is refused if it was named, and skipped with a note otherwise."""
    unknown = sorted(set(names) - set(found) - {"all"})
    if unknown:
        raise ValueError(f"unknown subject {', '.join(unknown)}; known: {', '.join(found)}, all, plot")
    chosen = dict.fromkeys(names)
    if "all" in chosen:
        chosen = {name: None for name in found if not found[name].asked} | {n: None for n in names if n != "all"}
    able = []
    for one in map(found.__getitem__, chosen):
        if (why := one.lacking()) is None:
            able.append(one)
        elif one.name in names:
            raise ValueError(why)
        else:
            print(f"skipped: {why}", file=sys.stderr)
    return able


def _options(args: argparse.Namespace, chosen: Sequence[Subject]) -> dict[str, Any]:
    """The options that were given, each of which every chosen subject must take."""
    given = {name: getattr(args, name) for name in subject.OPTIONS if getattr(args, name) is not None}
    for name in given:
        if lacking := [one.name for one in chosen if name not in one.options]:
            raise ValueError(f"{lacking[0]} takes no {subject.OPTIONS[name]}")
    return given


def _measure(chosen: Sequence[Subject], quick: bool, options: dict[str, Any], output: Path, pictures: Path) -> int:
    output.mkdir(parents=True, exist_ok=True)
    for one in chosen:
        print(f"==> {one.name}, about {one.quick if quick else one.takes}", file=sys.stderr, flush=True)
        try:
            importlib.import_module(f"bench.bench_{one.name}").run(output, quick=quick, **options)
        except ValueError as error:
            print(f"python -m bench {one.name}: {error}", file=sys.stderr)
            return 2
        name = f"{one.name}_quick" if quick else one.name
        if one.name in subject.pictures():
            _draw(one.name, output / f"{name}.json", pictures / f"{name}.png")
    print(f"results in {output}")
    return 0


def _plot(names: Sequence[str], output: Path, pictures: Path) -> int:
    """Draw each subject's picture from its JSON file."""
    if unknown := sorted(set(names) - set(subject.pictures())):
        raise ValueError(f"no picture is known of {', '.join(unknown)}; known: {', '.join(subject.pictures())}")
    there = [name for name in names if (output / f"{name}.json").exists()]
    if absent := [name for name in names if name not in there]:
        print(
            f"{output} has no results of {', '.join(absent)}; run python -m bench {' '.join(absent)}", file=sys.stderr
        )
    drawn = [_draw(name, output / f"{name}.json", pictures / f"{name}.png") for name in there]
    return 0 if drawn and all(drawn) else 1


def _draw(name: str, source: Path, target: Path) -> bool:
    if not subject.installed("matplotlib"):
        print(f"no {target}: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return False
    results = json.loads(source.read_text(encoding="utf-8"))
    try:
        importlib.import_module(f"bench.plot_{name}").plot(results, target)
    except ValueError as error:
        print(f"no {target}: {error}", file=sys.stderr)
        return False
    print(f"picture: {target}")
    return True


if __name__ == "__main__":
    sys.exit(main())
