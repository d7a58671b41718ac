"""A Llama of 1.2 billion weights on the CPU: tokens per second of decoding and of a prompt, memory and load time.

Random weights in the shape of Llama-3.2-1B. Every contender has a process of its own, which loads its own folder of the
same weights; all stay until the end, in memory and not in mapped files, and their turns come in random order. "+ head"
has a quantized output head, and "+ attention" our attention of decode steps, where all else that transformers runs has
its "sdpa".
"""

from __future__ import annotations

import gc
import itertools
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import harness, models
from bench.harness import Timing
from bench.models import DENSE, Contender
from bench.subject import Subject

SUBJECT = Subject(
    takes="14 min, 18 GB of memory and 15 GB of disk",
    quick="3 min",
    needs=("transformers",),
    uses=("bitsandbytes", "accelerate", "llama_cpp"),
    options=("formats", "peers"),
    asked=True,
)
BATCHES, CONTEXT, PROMPT = (1, 4, 16), 128, 512
STEPS = {1: 16, 4: 8, 16: 4}  # tokens of each sequence in a turn
ROUNDS = {False: 7, True: 2}
PROMPTS = {False: 3, True: 1}  # rounds that have one: it takes as long as all the rest
HEAD, ATTENTION = " + head", " + attention"
GIB = 2**30


def run(output: Path, *, quick: bool, formats: Sequence[str] | None = None, peers: Sequence[str] | None = None) -> None:
    chosen = models.contenders(formats, peers)
    missing: dict[str, str] = {}
    results: dict[str, Any] = {
        "model": models.SIZES[quick] | {"context": CONTEXT, "prompt": PROMPT},
        "heads": "quantized: " + ", ".join(one.name for one in chosen if one.quantized_head) + "; others bfloat16",
        "adapters": f"rank {models.RANK}, bfloat16",
        "not measured": missing,
    }
    with tempfile.TemporaryDirectory(prefix="bench-generate-", ignore_cleanup_errors=True) as folder:
        workers = started(chosen, Path(folder), quick, missing)
        try:
            results["memory"] = [loaded(name, worker) for name, worker in workers.items()]
            results["milliseconds"] = measured(workers, quick)
        finally:
            for worker in workers.values():
                worker.close()
    results["tokens per second"] = [speeds(row) for row in results["milliseconds"]]
    results["targets"] = targets(results["milliseconds"])
    table = by_contender(results)
    harness.print_table(table)
    harness.print_table(results["targets"], missing)
    harness.write_json(harness.result_file(output, "generate", quick=quick), results)


def started(chosen: Sequence[Contender], folder: Path, quick: bool, missing: dict[str, str]) -> dict[str, Any]:
    """The processes by name, each with its model loaded; `missing` gets the contenders that are not there."""
    dense = folder / "dense"
    models.dense_model(models.SIZES[quick]).save_pretrained(dense)
    workers: dict[str, Any] = {}
    for i, one in harness.progress(list(enumerate(chosen)), lambda numbered: f"prepare and load {numbered[1].name}"):
        own = folder / str(i)
        try:
            if (why := one.missing()) is None:
                one.prepare(dense, own)
                gc.collect()
                workers[one.name] = one.start(own, torch.get_num_threads(), folder / f"{i}.log")
                continue
        except Exception as error:  # Whatever a peer does or refuses, the others are measured.
            why = f"{type(error).__name__}: {error}"[:300]
        missing[one.name] = why
    return workers


def loaded(name: str, worker: Any) -> dict[str, Any]:
    """What loading took, until the logits of a first token are there. Its files have just been written."""
    return {
        "contender": name,
        "load, s": worker.ask("seconds"),
        "peak while loading, GiB": worker.ask("loading peak") / GIB,
    }


def measured(workers: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    """Milliseconds: per step of decoding, by sequences at once, and of a prompt."""
    seconds: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rounds = range(ROUNDS[quick] + 1)
    shuffle = random.Random(0).shuffle
    for turn in harness.progress(rounds, lambda turn: f"round {turn} of {ROUNDS[quick]}" if turn else "warm up"):
        parts = [("decode", batch) for batch in BATCHES] + [("prompt", PROMPT)] * (turn <= PROMPTS[quick])
        turns = [(name, part) for name in workers for part in parts]
        shuffle(turns)
        for name, (what, size) in turns:
            seconds[what, size][name].append(ask(workers[name], what, size))
    return [
        harness.timed_row(
            {"what": what, "size": size}, {name: Timing.of(values[1:]) for name, values in times.items()}, 1e3
        )
        for (what, size), times in sorted(seconds.items())
    ]


def ask(worker: Any, what: str, size: int) -> float:
    if what == "prompt":
        return worker.ask("prompt", tokens=size)
    return worker.ask("decode", batch=size, context=CONTEXT, steps=STEPS[size])


# ---- what the times mean


def contenders_of(row: dict[str, Any]) -> list[str]:
    return list(row["spread"])


def speeds(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second: a step makes one for each sequence, a prompt has as many as its size."""
    return {"what": row["what"], "size": row["size"]} | {
        name: 1e3 * row["size"] / row[name] for name in contenders_of(row)
    }


def by_contender(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For people: a line for each contender, in tokens per second and GiB."""
    return [
        {"tokens/s": row["contender"]}
        | {f"{part['what']} {part['size']}": part[row["contender"]] for part in results["tokens per second"]}
        | {name: value for name, value in row.items() if name != "contender"}
        for row in results["memory"]
    ]


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each ratio of speeds beside what it should be, where both contenders were measured.

    With a dense head, as bitsandbytes has; with a quantized one, as llama.cpp has; and with our attention, where the
    others that transformers runs have PyTorch's.
    """
    at = {row["size"]: row for row in rows if row["what"] == "decode"}
    head = f"nf4{HEAD}"
    whole = f"{head}{ATTENTION}"
    adapted = itertools.product(BATCHES, models.FORMATS, ("", HEAD))
    wanted = [
        (1, "nf4", DENSE, 2.5),
        (1, head, DENSE, 2.5),
        (1, "nf4", "bitsandbytes nf4", 1.3),
        (1, head, "bitsandbytes nf4", 1.3),
        *((1, one, "llama.cpp Q4_0", 1 / 1.2) for one in (head, whole)),
        *((16, one, "llama.cpp Q4_0", 1.0) for one in (head, whole)),
        *((batch, f"{name} r={models.RANK}{end}", name + end, 1 / 1.05) for batch, name, end in adapted),
    ]
    found = []
    for batch, ours, other, least in wanted:
        row = at.get(batch, {})
        if ours in row and other in row:
            value = row[other] / row[ours]
            what = f"{ours} against {other}, batch {batch}"
            found.append({"target": what, "value": value, "wanted": least, "met": value >= least})
    return found
