"""A process that holds one model of ``bench generate``: it loads it, runs what it is asked, and says what that took.

Only the standard library is imported here, as a peer's interpreter may have nothing else of what we need. A request is
a line of JSON, {"call": name of a method, ...its arguments}; the answer is one, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[1]
_LINES = 6  # of a failed process's standard error, in the message


class Model(Protocol):
    """What a worker runs. Both methods return the seconds of one call, whose inputs are ready before it starts."""

    def leave_files(self) -> None:
        """Copy what is read from mapped files into memory: of the many models here the system drops what is idle."""

    def prompt(self, tokens: int) -> float:
        """Process one prompt; the logits of its last token are there at the end."""

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds per step, in which each of ``batch`` sequences that have ``context`` tokens gets one more."""


class Loaded:
    """A model with what loading it took. In a process of its own, or here in tests."""

    def __init__(self, load: Callable[[], Model]):
        started = time.perf_counter()
        self._model = load()
        self._model.prompt(1)  # Mapped files are read, and some peers pack, at the first call.
        self.seconds, self.peak = time.perf_counter() - started, peak_memory()
        self._model.leave_files()

    def ask(self, call: str, **arguments: int) -> float:
        if call in ("prompt", "decode"):
            return getattr(self._model, call)(**arguments)
        return {"seconds": self.seconds, "loading peak": self.peak}[call]

    def close(self) -> None:
        del self._model


def peak_memory() -> float:
    """The most bytes that this process has had in memory, pages of mapped files included."""
    # A process inherits ru_maxrss from the one that started it, so it is not used.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])


def serve(load: Callable[[], Model]) -> None:
    """Load a model and answer requests until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model = Loaded(load)
    print("null", file=answers, flush=True)  # It is ready.
    for line in sys.stdin:
        print(json.dumps(model.ask(**json.loads(line))), file=answers, flush=True)


class Process:
    """`Loaded` in a process of its own, ``python -m MODULE ARGUMENTS``. Raises RuntimeError where that fails."""

    def __init__(self, python: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path):
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self._answer()
        except RuntimeError:
            self.close()
            raise

    def ask(self, call: str, **arguments: int) -> float:
        self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        if line := self._process.stdout.readline():
            return json.loads(line)
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LINES:]
        raise RuntimeError(f"its process ended with {self._process.wait()}: {' / '.join(said)}")

    def close(self) -> None:
        """End the process: by the end of its input, or, where it does not heed that, at once."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
