"""``loftq-kernels check``: every kernel path of this machine against the reference, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import loftq_kernels as lk
from loftq_kernels.cli.check_paths import paths_of_machine
from loftq_kernels.cli.check_rows import KernelPath, Row, attempt

_HEADER = f"{'device':<16} {'path':<24} {'cases':>5} {'error/budget':>12} {'seconds':>7}  result"


def run_checks(paths: Iterable[KernelPath] | None = None, *, formats: Sequence[str] | None = None) -> int:
    """Try the paths of this machine, or only these, for all formats or these; print a row of each as it comes.

    Returns the exit status: 1 if a path fails, otherwise 0. What is not on this machine is no failure.
    """
    if paths is None:
        paths = paths_of_machine(formats or lk.format_names())
    print(_HEADER)
    rows = []
    for path in paths:
        rows.append(attempt(path))
        print(format_row(rows[-1]), flush=True)
    print(summary(rows))
    return 1 if any(row.outcome == "FAIL" for row in rows) else 0


def format_row(row: Row) -> str:
    """One line; a second one below a failure says which case and why."""
    missing = row.outcome == "not here"
    worst = "-" if row.worst is None else f"{row.worst:.2f}"
    line = f"{row.device:<16} {row.path:<24} {'-' if missing else row.cases:>5} {worst:>12} {row.seconds:>7.1f}  "
    if missing:
        return f"{line}not here: {row.said}"
    return line + row.outcome + (f"\n    {row.said}" if row.outcome == "FAIL" else "")


def summary(rows: Sequence[Row]) -> str:
    count = Counter(row.outcome for row in rows)
    seconds = sum(row.seconds for row in rows)
    return f"{count['pass']} passed, {count['FAIL']} failed, {count['not here']} not here; {seconds:.0f} seconds"
