"""Which processor this is: its name, its model (a name alone may leave that open: "AMD EPYC"), what it can do."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

_FEATURES = re.compile(r"avx|amx|fma$|f16c|asimd|sve|sme(?!p)|bf16|i8mm|neon")
_SELDOM = ("vendor_id", "stepping", "implementer", "variant", "revision")  # Parts of a model that few ask for.


def processor() -> dict[str, str]:
    """Name, model and instruction sets, from /proc/cpuinfo or sysctl."""
    try:
        return parsed(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return _from_sysctl()


def parsed(cpuinfo: str) -> dict[str, str]:
    """The first processor of /proc/cpuinfo, of x86 or of ARM."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    x86 = ("vendor_id", "cpu family", "model", "stepping")
    arm = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    model = ", ".join(f"{key.removeprefix('CPU ')} {fields[key]}" for key in x86 + arm if key in fields)
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name") or fields.get("Model") or platform.machine(),
        "processor_model": model or platform.machine(),
        "processor_isa": " ".join(sorted(flag for flag in flags if _FEATURES.search(flag))) or platform.machine(),
    }


def _from_sysctl() -> dict[str, str]:
    keys = {
        "processor": "machdep.cpu.brand_string",
        "processor_model": "hw.model",
        "processor_isa": "machdep.cpu.features",
    }
    return {name: output_of(["sysctl", "-n", key]) or platform.machine() for name, key in keys.items()}


def named() -> str:
    """The name with its family and model, as captions have it."""
    return in_words(processor())


def in_words(found: Mapping[str, str]) -> str:
    """The name and, in brackets, what tells models of that name apart; of older descriptions the name alone."""
    parts = [part for part in found.get("processor_model", "").split(", ") if not part.startswith(_SELDOM)]
    model = ", ".join(part.removeprefix("cpu ") for part in parts)
    return f"{found['processor']} ({model})" if model and model != found["processor"] else found["processor"]


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
