"""`qlora_linear` on one GPU against every peer that can be imported, side by side in one run.

Each contender is a CUDA graph of calls that rotate over more weights than L2 holds, replayed in turns with the others.
A figure is the median time of a replay divided by the number of its calls. The results name peers that are not
installed, or refuse.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import loftq_kernels as lk
from bench import harness
from loftq_kernels.ops import triton_backend

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))  # N x K
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_ROWS = (128, 256, 512, 1024, 2048, 4096)
ROTATED_BYTES = 320 << 20  # A graph rotates over so many bytes of weights: an H200 has 50 MB of L2.
GROUP = 64
SECONDS = 540  # After this time the rest is skipped, and named.
DTYPE = torch.bfloat16

Call = Callable[[Tensor], Tensor]
Build = Callable[[tuple[int, int]], list[Call]]  # From the shape of the weight.
QUEUE_CYCLES = 400_000  # Device cycles, about 0.2 ms: longer than the host takes to launch a graph.


class Stage(NamedTuple):
    """Rows of one table: every contender at every M, for one shape of the weight."""

    part: str
    shape: tuple[int, int]
    all_rows: tuple[int, ...]
    contenders: dict[str, Build]


def stages(quick: bool) -> list[Stage]:
    """In order of importance. A later stage may measure a row again with more contenders, and replaces it."""
    shapes = ((1024, 1024),) if quick else SHAPES
    prefill = PREFILL_ROWS[:2] if quick else PREFILL_ROWS
    headline = {name: CONTENDERS[name] for name in ("bf16 linear", "nf4")}
    plan = [Stage("decode", shape, (1,), headline) for shape in shapes]
    plan.append(Stage("prefill", shapes[0], prefill[-2:-1], headline))
    plan += [Stage("decode", shape, DECODE_ROWS, CONTENDERS) for shape in shapes]
    for shape in shapes[:2]:
        plan.append(Stage("prefill", shape, prefill, PREFILL_CONTENDERS))
        plan.append(Stage("backward", shape, prefill[-5:], BACKWARD_CONTENDERS))
    return plan


def run(output: Path, *, quick: bool, seconds: float | None = None) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench gpu: torch sees no CUDA device")
    limit = seconds if seconds is not None else 60 if quick else SECONDS
    record = Record(output / f"{'gpu_quick' if quick else 'gpu'}.json", limit)
    record.results |= {"device": device(), "microseconds": [], "not measured": record.missing}
    with torch.inference_mode():
        for stage in stages(quick):
            measure(record, stage)
        record.add("Python overhead, microseconds per call", overhead)
    record.add("device after", device)
    record.add("first call, seconds", first_calls)
    record.add("targets", lambda: targets(record.results["microseconds"]))
    harness.print_table(record.results.get("targets", []))
    if not quick:
        try:
            plot(record.results, output / "gpu.png")
        except ImportError:
            print("no plot: matplotlib is not installed")


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
    import triton

    described["triton"] = triton.__version__
    for peer in ("bitsandbytes", "gemlite", "torchao"):
        with contextlib.suppress(PackageNotFoundError):
            described[peer] = version(peer)
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        values = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return described | {"clocks": f"unknown: {error}"}
    return described | dict(zip(fields.split(","), (value.strip() for value in values.split(",")), strict=False))


# ---- contenders: for each weight of the rotation a function of x


def copies(nbytes: int) -> range:
    return harness.copies(nbytes, ROTATED_BYTES)


def random_packed(name: str, shape: tuple[int, int]) -> lk.PackedTensor:
    """Random codes and scales of the right sizes: how fast a product is does not depend on their values."""
    rows, columns = shape
    small = lk.quantize(torch.randn(1, columns), name, GROUP)
    codes = torch.randint(0, 256, (rows, small.codes.shape[1]), dtype=torch.uint8, device="cuda")
    scale, offset = (
        None if group is None else (torch.rand(rows, group.shape[1], device="cuda") * 0.02).to(group.dtype)
        for group in (small.scale, small.offset)
    )
    codebook = small.codebook.cuda()
    return lk.PackedTensor(codes, scale, offset, codebook, in_features=columns, group_size=GROUP, format=small.format)


def ours(name: str, shape: tuple[int, int], rank: int | None = None, path: str | None = None) -> list[Call]:
    rows, columns = shape

    def adapter(*size: int) -> Tensor | None:
        return None if rank is None else torch.randn(size, device="cuda", dtype=DTYPE)

    first = random_packed(name, shape)
    calls = []
    for packed in [first] + [random_packed(name, shape) for _ in copies(first.nbytes)][1:]:
        lora = adapter(rank, columns), adapter(rows, rank)
        stored = packed.codes, packed.scale, packed.offset, packed.codebook, GROUP
        if path is None:
            calls.append(lambda x, packed=packed, lora=lora: lk.qlora_linear(x, packed, *lora))
        else:
            calls.append(lambda x, s=stored, lora=lora: triton_backend.qlora_linear(x, *s, *lora, 1.0, None, path=path))
    return calls


def several_adapters(shape: tuple[int, int], adapters: int = 16, rank: int = 16) -> list[Call]:
    def layer() -> tuple[lk.PackedTensor, Tensor, Tensor]:
        lora_A = torch.randn(adapters, rank, shape[1], device="cuda", dtype=DTYPE)
        return random_packed("nf4", shape), lora_A, torch.randn(adapters, shape[0], rank, device="cuda", dtype=DTYPE)

    layers = [layer() for _ in copies(shape[0] * shape[1] // 2)]
    ids = {m: (torch.arange(m, device="cuda") % adapters).sort().values for m in DECODE_ROWS}  # As many as m allows.

    return [lambda x, own=own: lk.qlora_linear(x, *own, adapter_ids=ids[x.shape[0]]) for own in layers]


def dense(shape: tuple[int, int]) -> list[Call]:
    weights = [torch.randn(shape, device="cuda", dtype=DTYPE) for _ in copies(2 * shape[0] * shape[1])]
    return [lambda x, weight=weight: linear(x, weight) for weight in weights]


def bitsandbytes_nf4(shape: tuple[int, int]) -> list[Call]:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    calls = []
    for _ in copies(shape[0] * shape[1] // 2):
        weight = torch.randn(shape, device="cuda", dtype=DTYPE)
        codes, state = quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
        calls.append(lambda x, c=codes, s=state: bitsandbytes.matmul_4bit(x, c.t(), quant_state=s))
    return calls


def torch_int4(shape: tuple[int, int]) -> list[Call]:
    """ATen's tinygemm int4, which torchao's weight-only int4 calls on Hopper and before."""
    calls = []
    for _ in copies(shape[0] * shape[1] // 2):
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scale_and_zero = torch.rand(shape[1] // GROUP, shape[0], 2, device="cuda").to(DTYPE)
        calls.append(lambda x, p=packed, s=scale_and_zero: torch.ops.aten._weight_int4pack_mm(x, p, GROUP, s))
    return calls


def gemlite_int4(shape: tuple[int, int]) -> list[Call]:
    import gemlite

    calls = []
    for _ in copies(shape[0] * shape[1] // 2):
        layer = gemlite.GemLiteLinear(4, GROUP, shape[1], shape[0], gemlite.DType.BF16, gemlite.DType.BF16)
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda")
        groups = shape[0] * shape[1] // GROUP
        layer.pack(codes, torch.rand(groups, 1, device="cuda", dtype=DTYPE), 8.0, None)
        calls.append(layer.forward)
    return calls


def fused_or_chunked(shape: tuple[int, int], path: str | None = None) -> list[Call]:
    """grad_x [M, K] = grad_y [M, N] @ W: shape is that of the transposed weight, whose columns grad_y has."""
    stored = shape[1], shape[0]
    weights = [random_packed("nf4", stored) for _ in copies(shape[0] * shape[1] // 2)]
    op = triton_backend.qlora_linear_grad_input
    return [
        lambda g, p=p: op(g, p.codes, p.scale, p.offset, p.codebook, p.shape[1], GROUP, None, None, 1.0, path=path)
        for p in weights
    ]


def dense_backward(shape: tuple[int, int]) -> list[Call]:
    weights = [torch.randn(shape[::-1], device="cuda", dtype=DTYPE) for _ in copies(2 * shape[0] * shape[1])]
    return [lambda g, w=w: g @ w for w in weights]


CONTENDERS: dict[str, Build] = {
    "bf16 linear": dense,
    "nf4": partial(ours, "nf4"),
    "nf4 r=16": partial(ours, "nf4", rank=16),
    "nf4 r=64": partial(ours, "nf4", rank=64),
    "nf4, 16 adapters r=16": several_adapters,
    "nf2": partial(ours, "nf2"),
    "int4": partial(ours, "int4"),
    "bitsandbytes nf4": bitsandbytes_nf4,
    "aten int4": torch_int4,
    "gemlite int4": gemlite_int4,
}
PREFILL_CONTENDERS: dict[str, Build] = {
    "bf16 linear": dense,
    "nf4": partial(ours, "nf4"),
    "nf4, fused": partial(ours, "nf4", path="prefill"),
    "nf4, chunked": partial(ours, "nf4", path="chunked"),
    "nf4 r=16": partial(ours, "nf4", rank=16),
    "nf2": partial(ours, "nf2"),
}
BACKWARD_CONTENDERS: dict[str, Build] = {
    "bf16 matmul": dense_backward,
    "nf4": fused_or_chunked,
    "nf4, fused": partial(fused_or_chunked, path="fused"),
    "nf4, chunked": partial(fused_or_chunked, path="chunked"),
}


# ---- measurements


def captured(calls: list[Call], x: Tensor) -> torch.cuda.CUDAGraph:
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
    built = {name: record.attempt(f"{name}, {place}", partial(build, shape)) for name, build in contenders.items()}
    variants = {name: calls for name, calls in built.items() if calls is not None}
    for m in all_rows:
        where = f"{place} M={m}"
        times = record.attempt(where, partial(measure_row, record, where, m, shape[1], variants))
        if times:
            row = {"part": part, "N x K": f"{shape[0]}x{shape[1]}", "M": m} | times
            record.results["microseconds"] = with_row(record.results["microseconds"], row)
            harness.print_table([row])
        record.save()


def with_row(rows: list[dict], row: dict) -> list[dict]:
    """Rows plus one more, without an earlier row of the same shapes whose contenders it all has."""
    place = ("part", "N x K", "M")
    kept = [old for old in rows if any(old[key] != row[key] for key in place) or not old.keys() <= row.keys()]
    return [*kept, row]


def measure_row(record: Record, where: str, m: int, columns: int, variants: dict[str, list[Call]]) -> dict[str, float]:
    x = torch.randn(m, columns, device="cuda", dtype=DTYPE)
    graphs = {}
    for name, calls in variants.items():
        graph = record.attempt(f"{name}, {where}", partial(captured, calls, x))
        if graph is not None:
            graphs[name] = graph, len(calls)
    return replayed(graphs)


def replayed(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int = 15) -> dict[str, float]:
    """Median microseconds per call of each graph; the graphs take turns.

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
                times[name].append(1e3 * start.elapsed_time(end) / calls)
    return {name: median(values) for name, values in times.items()}


def overhead() -> dict[str, float]:
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
        result[name] = 1e6 * median(seconds)
    return result


def first_calls() -> dict[str, float]:
    """Seconds of the first call of a shape class: a format that no other part uses is compiled anew."""
    from triton import knobs

    result = {}
    with tempfile.TemporaryDirectory() as empty, knobs.cache.scope():
        knobs.cache.dir = empty  # Kernels that an earlier run compiled do not count.
        for name, m in (("uniform4, M=1", 1), ("uniform4, M=256", 256)):
            packed = random_packed("uniform4", (512, 512))
            x = torch.randn(m, 512, device="cuda", dtype=DTYPE)
            torch.cuda.synchronize()
            started = time.perf_counter()
            lk.qlora_linear(x, packed)
            torch.cuda.synchronize()
            result[name] = time.perf_counter() - started
    return result


# ---- targets


def targets(rows: list[dict]) -> list[dict]:
    """The aims of the kernels, as ratios of this run."""
    found: list[dict] = []

    def aim(what: str, row: dict, over: str, under: str, least: float) -> None:
        if over in row and under in row:
            value = row[over] / row[under]
            where = f"{row['part']} {row['N x K']} M={row['M']}"
            found.append({"target": what, "at": where, "value": value, "aim >=": least, "met": value >= least})

    speedups = {"8192x28672": 3.3, "14336x4096": 2.8, "4096x14336": 2.8, "4096x4096": 2.0}
    by_place = {(row["part"], row["N x K"], row["M"]): row for row in rows}
    for row in rows:
        m, size = row["M"], row["N x K"]
        if row["part"] == "decode":
            if m == 1:
                aim("nf4 against bf16", row, "bf16 linear", "nf4", speedups.get(size, 2.0))
                aim("nf4 against bitsandbytes", row, "bitsandbytes nf4", "nf4", 1.8)
                aim("nf4 against it with r=16", row, "nf4", "nf4 r=16", 1 / 1.05)
                aim("nf4 against it with r=64", row, "nf4", "nf4 r=64", 1 / 1.15)
                if size == "8192x28672":
                    aim("nf2 against bf16", row, "bf16 linear", "nf2", 5.0)
            if 8 <= m <= 64 and size == "4096x4096":
                aim("nf4 against bitsandbytes", row, "bitsandbytes nf4", "nf4", 3.0)
            if m == 16 and "nf4" in by_place.get(("decode", size, 1), {}):
                flat = {**row, "M=1": by_place["decode", size, 1]["nf4"]}
                aim("nf4: M=1 against M=16", flat, "M=1", "nf4", 1 / 1.15)
        elif row["part"] == "prefill" and m >= 256:
            aim("nf4 against bf16", row, "bf16 linear", "nf4", 0.8 if m == 256 else 0.9)
        elif row["part"] == "backward" and m == 2048:
            aim("nf4 grad_x against bf16", row, "bf16 matmul", "nf4", 0.85)
    return found


def plot(results: dict, path: Path) -> None:
    """Plot the times of every contender over M, one panel per part and shape, device and versions in the title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["microseconds"]
    panels = list(dict.fromkeys((row["part"], row["N x K"]) for row in rows))
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(16, 9), layout="constrained", squeeze=False)
    for axis, (part, size) in zip(axes.flat, panels, strict=False):
        own = [row for row in rows if (row["part"], row["N x K"]) == (part, size)]
        for name in dict.fromkeys(key for row in own for key in row if key not in ("part", "N x K", "M")):
            points = [(row["M"], row[name]) for row in own if name in row]
            style = "-" if name.startswith(("nf", "int4")) else "--"
            axis.plot(*zip(*points, strict=True), style, marker=".", label=name)
        axis.set(xscale="log", yscale="log", title=f"{part} {size}", xlabel="rows of x (M)", ylabel="microseconds")
        axis.legend(fontsize="x-small")
    about = results["device"]
    figure.suptitle(f"{about['name']}, SM clock {about.get('clocks.sm', '?')}, torch {torch.__version__}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
