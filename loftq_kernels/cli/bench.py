"""``loftq-kernels bench``: the benchmarks are no part of the package, and run as a process in the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def bench(arguments: Sequence[str]) -> int:
    """Run ``python -m bench`` in the current folder, and return its status. Without arguments it lists the subjects."""
    places = (Path.cwd(), Path(__file__).resolve().parents[2])
    tree = next((place for place in places if (place / "bench" / "__main__.py").is_file()), None)
    if tree is None:
        raise ImportError("the benchmarks are part of the source tree: run this from its top folder")
    found = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench", *(arguments or ["--help"])]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": found}, check=False).returncode
