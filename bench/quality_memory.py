"""Peak memory of RILQ's processes: with the teacher's states on disk, and with the teacher beside the model.

``python -m bench.quality_memory MODE FOLDER SIZES`` is one of those processes.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import loftq_kernels as lk
from loftq_kernels.recipes import small_lm
from loftq_kernels.storage import files

CACHED, TOGETHER = "teacher cached", "teacher and model"


def memory(sizes: dict[str, int]) -> dict[str, float]:
    """Peak resident bytes of processes that run RILQ, less those of one that runs it on a tiny model.

    "teacher cached" caches the states in one process and tunes in another; its figure is the larger of the two.
    """
    with tempfile.TemporaryDirectory() as folder:

        def peak(mode: str) -> int:
            command = [sys.executable, "-m", "bench.quality_memory", mode, folder, json.dumps(sizes)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{mode}: {done.stderr}")
            return int(done.stdout)

        peak("prepare")
        base = peak("nothing")
        peaks = {mode: peak(mode) - base for mode in ("cache", "tune", "both")}
    return peaks | {CACHED: max(peaks["cache"], peaks["tune"]), TOGETHER: peaks["both"]}


def measure(mode: str, folder: Path, sizes: dict[str, int]) -> int:
    """One process of `memory`; its peak resident bytes."""
    batches = list(torch.randint(small_lm.BYTES, (4, 2, 64), generator=torch.Generator().manual_seed(0)))
    cfg = lk.RilqConfig(steps=3, accumulate=1, validate_every=3)
    if mode == "prepare":
        torch.manual_seed(0)
        model = small_lm.SmallLM(**sizes)
        files.save_tensors(folder / "dense.safetensors", model.state_dict(), {})
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=8, init="qlora"), progress=False)
        lk.save_quantized(model, folder / "quantized")
    if mode == "nothing":
        model = small_lm.SmallLM(width=32, layers=1, heads=1, hidden=32)
        teacher = copy.deepcopy(model)
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=8), progress=False)
        lk.rilq_tune(model, teacher, batches, cfg, cache=folder / "tiny", progress=False)
    if mode == "cache":
        lk.cache_teacher(lambda: _dense(folder, sizes), batches, folder / "states", progress=False)
    if mode in ("tune", "both"):
        with torch.device("meta"):
            skeleton = small_lm.SmallLM(**sizes)
        model = lk.load_quantized(folder / "quantized", skeleton)
        teacher = folder / "states" if mode == "tune" else _dense(folder, sizes)
        lk.rilq_tune(model, teacher, batches, cfg, progress=False)
    # A process inherits ru_maxrss from the one that started it, so it is not used.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _dense(folder: Path, sizes: dict[str, int]) -> nn.Module:
    with torch.device("meta"):
        model = small_lm.SmallLM(**sizes)
    model.load_state_dict(files.load_tensors(folder / "dense.safetensors")[0], assign=True)
    return model.eval()


if __name__ == "__main__":
    print(measure(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))
