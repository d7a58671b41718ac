"""``make gpu``: build, tests and benchmarks on one GPU within nine minutes, where device time is short.

Every step is a process of its own with a time limit, so that none can keep the later ones from running, whatever it
does to the device. Results are on disk as they come; a summary of one page is written after every step, and printed
last. The exit status is 0 if everything that must run has run and passed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOTAL_SECONDS = 540
OUTPUT = Path("bench-results")
OK, NOT_RUN = "ok", "not run: the time was up"
FEWEST_SECONDS = 5  # a command is not started again with less


@dataclass(frozen=True)
class Step:
    """`command(seconds)` is what runs, for at most `most` seconds and never in the last `reserve` seconds of all."""

    name: str
    command: Callable[[int], Sequence[str]]
    most: float
    least: float  # not started with less
    reserve: float = 0
    required: bool = True
    unfinished: Callable[[], Any] = lambda: None  # while what this returns changes, an ended command is run again
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    step: Step
    status: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == OK or not self.step.required


def steps(output: Path, python: str = sys.executable) -> list[Step]:
    """The plan, in order of importance."""
    report = output / "gpu_tests.json"

    def tests(seconds: int) -> list[str]:
        session = [f"--gpu-report={report}", f"--gpu-seconds={seconds - 30}"]  # 30 to start and for the last case
        return [python, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", *session, "python_tests"]

    def benchmark(*options: str) -> list[str]:
        return [python, "-m", "bench", *options, "--output", str(output)]

    return [
        Step("build", lambda _: ["make", "--no-print-directory", "gpu-build", f"PYTHON={python}"], 240, 5, reserve=180),
        Step(
            "tests",
            tests,
            most=240,
            least=60,
            reserve=130,
            unfinished=lambda: unfinished_cases(report),
            environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        ),
        Step("bench gpu", lambda seconds: benchmark("gpu", f"--seconds={seconds - 25}"), 420, 40, reserve=5),
        Step("bench small_matrix", lambda _: benchmark("small_matrix", "--quick"), 90, 30, reserve=5, required=False),
    ]


def unfinished_cases(report: Path) -> int | None:
    """How many cases a run of the tests that broke off has behind it; None where the run ended in order."""
    found = read(report)
    return None if found is None or found["summary"]["finished"] else len(found["cases"]) + bool(found["running"])


def execute(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> str:
    """OK, or why not. The output goes where this process's goes; what the command started ends with it."""
    print("==>", " ".join(command), flush=True)
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    try:
        code = process.wait(seconds)
        return OK if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        return f"ended at its limit of {seconds:.0f} s"
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of it
        return
    process.wait()


class Hour:
    """Runs steps one after another; `end` is when the last one must have ended."""

    def __init__(
        self,
        seconds: float,
        execute: Callable[[Sequence[str], float, Mapping[str, str]], str] = execute,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.execute, self.clock = execute, clock
        self.end = clock() + seconds

    def left(self, step: Step, started: float) -> float:
        """Seconds that a step which started then may still take."""
        now = self.clock()
        return min(started + step.most, self.end - step.reserve) - now

    def run(self, step: Step) -> Done:
        started = self.clock()
        if self.left(step, started) < step.least:
            return Done(step, NOT_RUN, 0.0)
        statuses = [self._once(step, started)]
        before = None
        while (now := step.unfinished()) != before and self.left(step, started) >= max(FEWEST_SECONDS, step.least):
            statuses.append(self._once(step, started))
            before = now
        failures = [status for status in statuses if status != OK]
        return Done(step, failures[0] if failures else OK, self.clock() - started)

    def _once(self, step: Step, started: float) -> str:
        seconds = self.left(step, started)
        return self.execute(step.command(int(seconds)), seconds, step.environment)


# ---- the summary


def read(path: Path) -> dict[str, Any] | None:
    """A result file of a step; None where there is none to read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def summary(done: Sequence[Done], output: Path) -> str:
    """One page of Markdown: the machine, the steps, the tests, the benchmarks."""
    tests, bench = read(output / "gpu_tests.json"), read(output / "gpu.json")
    parts = [_about(tests or bench), _steps(done)]
    if tests is not None:
        parts.append(_tests(tests))
    if bench is not None:
        parts.append(_bench(bench))
    return "\n\n".join(["# GPU run", *parts]) + "\n"


def _about(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "No step left a result file."
    about = found["machine"]
    versions = ", ".join(f"{name} {about.get(name)}" for name in ("torch", "triton", "python", "loftq_kernels"))
    return f"{', '.join(about['cuda_devices']) or 'no CUDA device'}; {versions}; {about['date']}"


def _steps(done: Sequence[Done]) -> str:
    rows = [f"| {one.step.name} | {one.status} | {one.seconds:.0f} |" for one in done]
    return "\n".join(["| step | status | seconds |", "| --- | --- | --- |", *rows])


def _tests(found: Mapping[str, Any]) -> str:
    counts = {key: value for key, value in found["summary"].items() if value}
    failed = [(name, case) for name, case in found["cases"].items() if case["outcome"] == "failed"]
    lines = [f"- {name}: {case.get('message', '')}"[:200] for name, case in failed]
    return "\n".join(["Tests: " + ", ".join(f"{key}: {value}" for key, value in counts.items()), *_first(lines, 12)])


def _bench(found: Mapping[str, Any]) -> str:
    lines = ["| nf4 against bf16 | bf16, us | nf4, us | ratio |", "| --- | --- | --- | --- |"]
    for row in found["microseconds"]:
        if row["M"] == 1 and row["part"] == "decode" and {"bf16 linear", "nf4"} <= row.keys():
            dense, ours = row["bf16 linear"], row["nf4"]
            lines.append(f"| {row['N x K']}, M=1 | {dense:.1f} | {ours:.1f} | {dense / ours:.2f} |")
    targets = found.get("targets", [])
    missed = [t for t in targets if not t["met"]]
    lines += ["", f"Targets: {len(targets) - len(missed)} of {len(targets)} met."]
    lines += _first([f"- missed: {t['target']}, {t['at']}: {t['value']:.2f} < {t['aim >=']:.2f}" for t in missed], 12)
    lacking = [f"- not measured: {what}: {why}"[:160] for what, why in found["not measured"].items()]
    return "\n".join([*lines, *_first(lacking, 10)])


def _first(lines: Sequence[str], count: int) -> list[str]:
    more = len(lines) - count
    return [*lines[:count], f"- and {more} more"] if more > 0 else list(lines)


# ---- the command


def run(plan: Sequence[Step], output: Path, hour: Hour) -> int:
    """Exit status: 0 if every required step has passed."""
    output.mkdir(parents=True, exist_ok=True)
    for stale in ("gpu_tests.json", "gpu.json", "gpu.png", "small_matrix_quick.json", "gpu_hour.md"):
        (output / stale).unlink(missing_ok=True)
    done: list[Done] = []
    for step in plan:
        done.append(hour.run(step))
        (output / "gpu_hour.md").write_text(summary(done, output), encoding="utf-8")
    print(summary(done, output))
    return 0 if all(one.passed for one in done) else 1


def show(plan: Sequence[Step], seconds: float) -> None:
    """The plan, were each step to take all that it may."""
    print(f"{seconds:.0f} s in all")
    spent = 0.0
    for step in plan:
        limit = min(step.most, seconds - step.reserve - spent)
        print(f"{step.name}: at most {max(limit, 0):.0f} s here, {step.most:.0f} s if steps before it are quicker")
        print("    " + " ".join(step.command(int(max(limit, step.least)))))
        spent += max(limit, 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_hour", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the result files, at most five")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time for everything")
    parser.add_argument("--dry-run", action="store_true", help="show the plan")
    args = parser.parse_args(argv)
    plan = steps(args.output)
    if args.dry_run:
        show(plan, args.seconds)
        return 0
    return run(plan, args.output, Hour(args.seconds))


if __name__ == "__main__":
    sys.exit(main())
