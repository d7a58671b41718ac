"""The picture of ``loftq-kernels demo``, from the demo.json that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_kernels.cli import demo


def plot(results: Mapping[str, Any], path: Path) -> None:
    demo.plot([demo.Row(**row) for row in results["rows"]], path, results["machine"], results["sentences"])
