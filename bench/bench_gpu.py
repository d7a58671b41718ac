"""`qlora_linear` on one GPU against every peer that can be imported, side by side in one run.

Each contender is a CUDA graph of calls that rotate over more weights than L2 holds, replayed in turns with the others.
A figure is the median time of a replay divided by the number of its calls. The results name peers that are not
installed, or refuse.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import loftq_kernels as lk
from bench import harness, ours, peers
from bench.gpu_targets import targets
from bench.peers import DTYPE, GROUP, Peer, Product, Shape
from bench.subject import Subject
from loftq_kernels.ops import triton_backend

SUBJECT = Subject(
    takes="9 min of a GPU",
    quick="1 min of a GPU",
    needs=("triton",),
    uses=("bitsandbytes", "gemlite"),
    gpu=True,
    options=("shapes", "rows", "formats", "peers", "seconds"),
)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))  # N x K
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_ROWS = (128, 256, 512, 1024, 2048, 4096)
ROTATED_BYTES = 320 << 20  # A graph rotates over so many bytes of weights: an H200 has 50 MB of L2.
SECONDS = 540  # After this time the rest is skipped, and named.
QUEUE_CYCLES = 400_000  # Device cycles, about 0.2 ms: longer than the host takes to launch a graph.


class Stage(NamedTuple):
    """Rows of one table: every contender at every M, for one shape of the weight."""

    part: str
    shape: Shape
    all_rows: tuple[int, ...]
    contenders: list[Peer]


def stages(
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    rows: Sequence[int] | None = None,
    formats: list[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[Stage]:
    """In order of importance. A later stage may measure a row again with more contenders, and replaces it."""
    narrowed = any(option is not None for option in (shapes, rows, formats, names))
    shapes = shapes or (((1024, 1024),) if quick else SHAPES)
    few = tuple(m for m in rows if m <= max(DECODE_ROWS)) if rows else DECODE_ROWS
    many = tuple(m for m in rows if m > max(DECODE_ROWS)) if rows else PREFILL_ROWS[:2] if quick else PREFILL_ROWS
    decode, prefill = decode_contenders(formats, names), prefill_contenders(formats, names)
    if narrowed:
        plan = [Stage("decode", shape, few, decode) for shape in shapes]
        plan += [Stage("prefill", shape, many, prefill) for shape in shapes]
        return [stage for stage in plan if stage.all_rows]
    headline = [*peers.select("cuda", ["bf16 linear"]), ours.product("nf4")]
    plan = [Stage("decode", shape, (1,), headline) for shape in shapes]
    plan.append(Stage("prefill", shapes[0], many[-2:-1], headline))
    plan += [Stage("decode", shape, few, decode) for shape in shapes]
    for shape in shapes[:2]:
        plan.append(Stage("prefill", shape, many, prefill))
        plan.append(Stage("backward", shape, many[-5:], list(BACKWARD_CONTENDERS)))
    return plan


def run(
    output: Path,
    *,
    quick: bool,
    seconds: float | None = None,
    shapes: Sequence[Shape] | None = None,
    rows: Sequence[int] | None = None,
    formats: list[str] | None = None,
    peers: Sequence[str] | None = None,
) -> None:
    """Stage by stage until the time is up; with an option, only the products that it leaves."""
    limit = seconds if seconds is not None else 60 if quick else SECONDS
    record = Record(harness.result_file(output, "gpu", quick=quick), limit)
    record.results |= {"device": device(), "microseconds": [], "not measured": record.missing}
    with torch.inference_mode():
        plan = stages(quick, shapes, rows, formats, peers)
        for stage in harness.progress(plan, lambda one: f"{one.part} {one.shape[0]}x{one.shape[1]}"):
            measure(record, stage)
        record.add("Python overhead, microseconds per call", overhead)
    record.add("device after", device)
    record.add("first call, seconds", first_calls)
    record.add("targets", lambda: targets(record.results["microseconds"]))
    harness.print_table(record.results.get("targets", []), record.missing)


class Record:
    """Results, on disk after every step: a run that is cut, or a device that fails, leaves the figures it had."""

    def __init__(self, path: Path, seconds: float):
        self.path = path
        self.end = time.monotonic() + seconds
        self.results: dict[str, Any] = {}
        self.missing: dict[str, str] = {}

    def attempt(self, what: str, step: Callable[[], Any]) -> Any:
        """What step returns; None where it fails or the time is up, and `missing` then says why."""
        if time.monotonic() < self.end:
            return self._guarded(what, step)
        self.missing[what] = "the time was up"
        return None

    def _guarded(self, what: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # Whatever a peer does or refuses, the others are measured.
            self.missing[what] = f"{type(error).__name__}: {error}"[:300]
            return None

    def add(self, what: str, step: Callable[[], Any]) -> None:
        """Record a part that takes seconds only: it runs even when the time is up."""
        found = self._guarded(what, step)
        if found is not None:
            self.results[what] = found
        self.save()

    def save(self) -> None:
        harness.write_json(self.path, self.results)


def device() -> dict[str, Any]:
    """Name, clocks and versions, which a reader of the figures needs."""
    properties = torch.cuda.get_device_properties(0)
    described: dict[str, Any] = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "L2, MB": properties.L2_cache_size / 2**20,
        "CUDA": torch.version.cuda,
    }
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        values = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return described | {"clocks": f"unknown: {error}"}
    return described | dict(zip(fields.split(","), (value.strip() for value in values.split(",")), strict=False))


# ---- contenders: besides the peers, our products by every path


def ours_by_path(path: str) -> Peer:
    """The forward product of nf4 by one path of the Triton backend."""

    def compute(layer: tuple, x: Tensor) -> Tensor:
        p = layer[0]
        stored = p.codes, p.scale, p.offset, p.codebook, GROUP
        return triton_backend.qlora_linear(x, *stored, None, None, 1.0, None, path=path)

    return replace(ours.product("nf4", compute=compute), name=f"nf4, {'fused' if path == 'prefill' else path}")


def several_adapters(adapters: int = 16, rank: int = 16) -> Peer:
    """Each row has an adapter of its own, of as many as there are rows for."""
    ids = {m: (torch.arange(m) % adapters).sort().values for m in range(max(DECODE_ROWS) + 1)}
    on_device: dict[int, Tensor] = {}

    def prepare(shape: Shape, device: str) -> tuple[lk.PackedTensor, Tensor, Tensor]:
        lora_A = torch.randn(adapters, rank, shape[1], device=device, dtype=DTYPE)
        lora_B = torch.randn(adapters, shape[0], rank, device=device, dtype=DTYPE)
        return ours.random_packed("nf4", shape, device), lora_A, lora_B

    def compute(layer: tuple, x: Tensor) -> Tensor:
        m = x.shape[0]
        if m not in on_device:  # Not while a graph is captured: every call has run before.
            on_device[m] = ids[m].to(x.device)
        return lk.qlora_linear(x, *layer, adapter_ids=on_device[m])

    return Peer(f"nf4, {adapters} adapters r={rank}", ("cuda",), 0.53, prepare, compute)


def grad_input(path: str | None = None) -> Peer:
    """grad_x [M, K] = grad_y [M, N] @ W: the shape is that of the transposed weight, whose columns grad_y has."""
    op = triton_backend.qlora_linear_grad_input

    def prepare(shape: Shape, device: str) -> lk.PackedTensor:
        return ours.random_packed("nf4", shape[::-1], device)

    def compute(p: lk.PackedTensor, grad: Tensor) -> Tensor:
        return op(grad, p.codes, p.scale, p.offset, p.codebook, p.shape[1], GROUP, None, None, 1.0, path=path)

    return Peer("nf4" if path is None else f"nf4, {path}", ("cuda",), 0.53, prepare, compute)


def decode_contenders(formats: list[str] | None = None, names: Sequence[str] | None = None) -> list[Peer]:
    own = [ours.product(*variant) for variant in ours.variants(formats)]
    return [*own, *([] if formats else [several_adapters()]), *peers.select("cuda", names)]


def prefill_contenders(formats: list[str] | None = None, names: Sequence[str] | None = None) -> list[Peer]:
    variants = (("nf4", None), ("nf4", 16), ("nf2", None)) if formats is None else ours.variants(formats)
    paths = () if formats else (ours_by_path("prefill"), ours_by_path("chunked"))
    dense = peers.select("cuda", ["bf16 linear"] if names is None else names)
    return [*dense, *(ours.product(*variant) for variant in variants), *paths]


BACKWARD_CONTENDERS = (
    Peer(
        "bf16 matmul",
        ("cuda",),
        2,
        lambda shape, device: torch.randn(shape[::-1], device=device, dtype=DTYPE),
        lambda weight, grad: grad @ weight,
    ),
    grad_input(),
    grad_input("fused"),
    grad_input("chunked"),
)


# ---- measurements


def captured(calls: list[Product], x: Tensor) -> torch.cuda.CUDAGraph:
    """A graph with one call of each, captured after calls that compile and choose algorithms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # It may still be making x, and at first the weights.
    with torch.cuda.stream(stream):  # It includes the capture: a failed one leaves its stream current.
        for call in calls:  # The first call of each weight reads its code book.
            call(x)
        calls[0](x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call(x)
    return graph


def measure(record: Record, stage: Stage) -> None:
    """One row of microseconds per call for each M."""
    part, shape, all_rows, contenders = stage
    place = f"{part} {shape[0]}x{shape[1]}"
    built = {
        one.name: record.attempt(f"{one.name}, {place}", partial(prepared, one, shape, all_rows[0]))
        for one in contenders
    }
    variants = {name: calls for name, calls in built.items() if calls is not None}
    for m in all_rows:
        where = f"{place} M={m}"
        times = record.attempt(where, partial(measure_row, record, where, m, shape[1], variants))
        if times:
            row = harness.timed_row({"part": part, "N x K": f"{shape[0]}x{shape[1]}", "M": m}, times, per_second=1e6)
            record.results["microseconds"] = with_row(record.results["microseconds"], row)
            harness.print_table([row])
        record.save()


def prepared(contender: Peer, shape: Shape, m: int) -> list[Product]:
    if (why := contender.missing()) is not None:
        raise LookupError(why)
    return peers.products(contender, shape, ROTATED_BYTES, "cuda", torch.zeros(m, shape[1], dtype=DTYPE, device="cuda"))


def with_row(rows: list[dict], row: dict) -> list[dict]:
    """Rows plus one more, without an earlier row of the same shapes whose contenders it all has."""
    place = ("part", "N x K", "M")
    kept = [old for old in rows if any(old[key] != row[key] for key in place) or not old.keys() <= row.keys()]
    return [*kept, row]


def measure_row(record: Record, where: str, m: int, columns: int, variants: dict[str, list[Product]]) -> dict:
    x = torch.randn(m, columns, device="cuda", dtype=DTYPE)
    graphs = {}
    for name, calls in variants.items():
        graph = record.attempt(f"{name}, {where}", partial(captured, calls, x))
        if graph is not None:
            graphs[name] = graph, len(calls)
    return replayed(graphs)


def replayed(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int = 15) -> dict[str, harness.Timing]:
    """Seconds per call of each graph; the graphs take turns.

    The device is kept busy until the graph is in its queue, so that no time passes between start and first kernel.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(repeats + 2):
        for name, (graph, calls) in graphs.items():
            torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 2:
                times[name].append(1e-3 * start.elapsed_time(end) / calls)
    return {name: harness.Timing.of(values) for name, values in times.items()}


def overhead() -> dict[str, Any]:
    """Host time to enqueue a call without a graph, at a size whose kernels take hardly any time."""
    layer = lk.QuantLoRALinear(256, 256, bias=False, rank=16, device="cuda", dtype=DTYPE)
    weight = torch.randn(256, 256, device="cuda", dtype=DTYPE)
    x = torch.randn(1, 256, device="cuda", dtype=DTYPE)
    result = {}
    for name, call in (("QuantLoRALinear r=16", layer), ("F.linear", lambda x: linear(x, weight))):
        seconds = []
        for _ in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(100):
                call(x)
            seconds.append((time.perf_counter() - started) / 100)
        result[name] = harness.Timing.of(seconds)
    return harness.timed_row({}, result, per_second=1e6)


def first_calls() -> dict[str, float]:
    """Seconds of the first call of a shape class: a format that no other part uses is compiled anew."""
    from triton import knobs

    result = {}
    with tempfile.TemporaryDirectory() as empty, knobs.cache.scope():
        knobs.cache.dir = empty  # Kernels that an earlier run compiled do not count.
        for name, m in (("uniform4, M=1", 1), ("uniform4, M=256", 256)):
            packed = ours.random_packed("uniform4", (512, 512), "cuda")
            x = torch.randn(m, 512, device="cuda", dtype=DTYPE)
            torch.cuda.synchronize()
            started = time.perf_counter()
            lk.qlora_linear(x, packed)
            torch.cuda.synchronize()
            result[name] = time.perf_counter() - started
    return result
