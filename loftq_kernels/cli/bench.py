"""``loftq-kernels bench``: the benchmarks are no part of the package, and run as a process in the source tree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def bench(arguments: Sequence[str]) -> int:
    """Run ``python -m bench``; without arguments, let it say what there is. Returns its exit status."""
    places = (Path.cwd(), Path(__file__).resolve().parents[2])
    tree = next((place for place in places if (place / "bench" / "__main__.py").is_file()), None)
    if tree is None:
        raise ImportError("the benchmarks are part of the source tree: run this from its top folder")
    return subprocess.run([sys.executable, "-m", "bench", *(arguments or ["--help"])], cwd=tree, check=False).returncode
