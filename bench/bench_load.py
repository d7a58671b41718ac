"""Quantizing a dense transformers folder while it loads: peak memory, and whether it equals quantize_model.

A Llama of Llama-3.2-1B's shape with random weights in bfloat16, in shards, is loaded by
``from_pretrained(quantization_config=LoftqConfig("nf4", rank=16))`` in a process of its own, and by from_pretrained and
quantize_model in another. Memory is what a process has for itself (anonymous pages): pages of mapped files, which the
system takes back when it wants them, are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import harness
from bench.subject import Subject

SUBJECT = Subject(takes="8 min", quick="30 s", needs=("transformers",), asked=True)
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
QUICK = {"num_hidden_layers": 2, "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 8}
WAYS = ("from_pretrained(quantization_config=)", "from_pretrained, quantize_model")
_EVERY = 0.005  # seconds between two readings of the memory


def run(output: Path, *, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dense = _write_dense(Path(folder), SHAPE | QUICK if quick else SHAPE)
        found = {}
        for way in harness.progress(WAYS, lambda way: f"load, {way}"):
            command = [sys.executable, "-m", "bench.bench_load", folder, way]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    rows = [_row(way, own, dense) for way, own in found.items()]
    harness.print_table(rows)
    equal = len({own["sha256"] for own in found.values()}) == 1
    print(f"bit for bit equal: {equal}")
    results = {"spread": harness.NO_TIMES, "dense bytes": dense, "equal": equal, "rows": rows}
    harness.write_json(harness.result_file(output, "load", quick=quick), results)


def _row(way: str, found: dict, dense: int) -> dict:
    mib = 2**20
    return {
        "way": way,
        "finished MiB": found["finished"] / mib,
        "peak MiB": found["peak"] / mib,
        "peak over finished, share of the dense model": (found["peak"] - found["finished"]) / dense,
    }


def _write_dense(folder: Path, shape: dict) -> int:
    """A dense checkpoint of random weights in shards; its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="400MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def _load(folder: str, way: str) -> dict:
    """Load in this process: bytes at the end and at the peak, over those before, and a hash of the tensors."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401

    import loftq_kernels as lk
    from loftq_kernels.checkpoints.hosted import digest

    before = _anonymous()
    with _watched() as most:
        if way == WAYS[0]:
            asked = lk.LoftqConfig(format="nf4", rank=16)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
            lk.quantize_model(model, lk.QuantConfig("nf4", rank=16), progress=False)
    finished = _anonymous() - before
    return {
        "finished": finished,
        "peak": most[0] - before,
        "sha256": digest(model.state_dict()),
    }


def _anonymous() -> int:
    """Bytes of memory that belong to this process alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the benchmark reads RssAnon in /proc/self/status, which Linux has")


@contextmanager
def _watched() -> Iterator[list[int]]:
    """The most that `_anonymous` has been, read by another thread."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            most[0] = max(most[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(_load(*sys.argv[1:])))
