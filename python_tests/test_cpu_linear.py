"""The CPU kernels of `qlora_linear` and `qlora_linear_grad_input`, every instruction set of this machine.

Judged by float64 and the rounding errors that the operations may have: see `Layer.exact`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import FORMATS, adapter, gaussian
from properties import given, settings, st
from torch import Tensor

import loftq_kernels as lk
from loftq_kernels.formats import get_format
from loftq_kernels.ops import budget, extension, reference
from loftq_kernels.storage import packing

pytestmark = pytest.mark.skipif(extension.library is None, reason="the extension is not built")

OPS = torch.ops.loftq_kernels
ISAS = extension.library.cpu_isas() if extension.library is not None else ()
CODEBOOKS = (*FORMATS, "irregular8")  # the last has 256 entries that no integer equals
GROUPS = (32, 64, 128, 256, -1)
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float16: 2.0**-25}  # half of a subnormal step
BUDGET = {isa: budget.of_products(isa) for isa in ISAS}  # of the error of plain torch
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])


@contextlib.contextmanager
def forced(isa: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOFTQ_CPU_ISA", isa)
        assert extension.library.cpu_isa() == isa
        yield


@pytest.fixture(params=ISAS)
def isa(request):
    with forced(request.param):
        yield request.param


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Layer:
    """The tensors of a layer, as the ops take them."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    codebook: Tensor
    columns: int
    group_size: int
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float = 0.75

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    def multiply(self, x: Tensor, transposed: bool = False, ops=OPS) -> Tensor:
        packed = (self.codes, self.scale, self.offset, self.codebook)
        lora = (self.lora_A, self.lora_B, self.scaling)
        if transposed:
            return ops.qlora_linear_grad_input(x, *packed, self.columns, self.group_size, *lora)
        return ops.qlora_linear(x, *packed, self.group_size, *lora, self.bias)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        packed = (self.codes, self.scale, self.offset, self.codebook)
        return reference.dequantize(*packed, self.columns, self.group_size, dtype)

    def magnitudes(self) -> Tensor:
        """|codebook| * |scale| + |offset|: offsets may be multiplied by x on their own."""
        offset = None if self.offset is None else self.offset.abs()
        parts = replace(self, codebook=self.codebook.abs(), scale=self.scale.abs(), offset=offset)
        return parts.dense()

    def exact(self, x: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """The product in float64, and how far from it each element may be.

        Every operation rounds by at most u of its type; n of them, in any order, by n u of the sum of magnitudes. Where
        x is bfloat16 the operands may be rounded to it: the weight once (for few rows of x its code book, to either
        side, so by 2 u); A, the hidden values and B, three in all.
        """
        u, operand = ROUNDING[x.dtype], ROUNDING[x.dtype] if x.dtype == torch.bfloat16 else 0.0
        summand = min(u, ROUNDING[torch.float32])
        smallest = SMALLEST.get(x.dtype, 1e-36)
        weight, magnitude, x = self.dense(), self.magnitudes(), x.double()
        if not transposed:
            weight, magnitude = weight.T, magnitude.T
        y, size, low_rank = x @ weight, x.abs() @ magnitude, torch.zeros(())
        terms = x.shape[-1] + 32
        if self.lora_A is not None:
            lora_A, lora_B = self.lora_A.double(), self.lora_B.double()
            first, second = (lora_B, lora_A) if transposed else (lora_A.T, lora_B.T)
            y = y + self.scaling * (x @ first) @ second
            low_rank = abs(self.scaling) * (x.abs() @ first.abs()) @ second.abs()
            terms += first.shape[1]
        if self.bias is not None and not transposed:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        of_weight = 1 if transposed or x.numel() > 8 * x.shape[-1] else 2
        before_rounding = terms * summand * (size + low_rank) + 1.01 * operand * (of_weight * size + 3 * low_rank)
        return y, before_rounding * (1 + u) + u * y.abs() + smallest


def bits_of(codebook: str) -> int:
    return 8 if codebook == "irregular8" else get_format(codebook).bits


def table_of(codebook: str) -> Tensor:
    if codebook == "irregular8":
        return gaussian(256, seed=8).sort().values
    return get_format(codebook).codebook()


def random_layer(
    codebook: str = "nf4",
    rows: int = 7,
    columns: int = 130,
    group_size: int = 64,
    *,
    rank: int | None = None,
    bias: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    adapter_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype = torch.float32,
) -> Layer:
    """Every byte of the codes is random, those of columns that do not exist as well."""
    seed = torch.Generator().manual_seed(rows + columns)
    size = (rows, packing.row_bytes(columns, bits_of(codebook)))
    codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=seed)
    groups = (rows, packing.num_groups(columns, group_size))
    table = table_of(codebook)
    scale = ((0.5 + torch.rand(groups, generator=seed)) / table.abs().max()).to(scale_dtype)
    affine = codebook == "irregular8" or get_format(codebook).affine
    offset = torch.randn(groups, generator=seed).to(scale_dtype) if affine else None
    layer = Layer(codes, scale, offset, table, columns, group_size)
    if rank is not None:
        layer.lora_A, layer.lora_B = adapter(rows, columns, rank, dtype=adapter_dtype)
    if bias:
        layer.bias = gaussian(rows, seed=5, dtype=bias_dtype)
    return layer


def offset_in_storage(tensor: Tensor) -> Tensor:
    """A copy that starts one element into its storage: aligned to its elements, not to vectors."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = storage[1:].view(tensor.shape)
    return copy.copy_(tensor)


VIEWS = {
    "contiguous": lambda m, k, dtype: gaussian(m, k, dtype=dtype),
    "transposed": lambda m, k, dtype: gaussian(k, m, dtype=dtype).T,
    "strided_rows": lambda m, k, dtype: gaussian(m, k + 3, dtype=dtype)[:, 1 : k + 1],
    "strided_columns": lambda m, k, dtype: gaussian(m, 2 * k, dtype=dtype)[:, ::2],
    "expanded": lambda m, k, dtype: gaussian(1, k, dtype=dtype).expand(m, k),
    "one_value": lambda m, k, dtype: gaussian(1, 1, dtype=dtype).expand(m, k),
    "three_dimensions": lambda m, k, dtype: gaussian(2, m, k, dtype=dtype),
    "three_transposed": lambda m, k, dtype: gaussian(m, 3, k, dtype=dtype).transpose(0, 1),
    "a_vector": lambda m, k, dtype: gaussian(k, dtype=dtype),
    "offset": lambda m, k, dtype: offset_in_storage(gaussian(m, k, dtype=dtype)),
}


def assert_exact(layer: Layer, x: Tensor, transposed: bool = False) -> Tensor:
    y = layer.multiply(x, transposed)
    expected, tolerance = layer.exact(x, transposed)
    assert y.dtype == x.dtype and y.shape == expected.shape and y.is_contiguous()
    excess = (y.double() - expected).abs() - tolerance
    assert (excess <= 0).all(), f"{(excess > 0).sum()} of {y.numel()} elements, by up to {excess.max():.3g}"
    assert torch.equal(layer.multiply(x, transposed), y), "another result the second time"
    return y


def relative_error(y: Tensor, layer: Layer, x: Tensor, transposed: bool) -> float:
    exact, _ = layer.exact(x, transposed)
    return ((y.double() - exact).norm() / exact.norm()).item()


class TestErrorBudget:
    @pytest.mark.parametrize("isa", ISAS)
    @TRANSPOSED
    @settings(max_examples=40)
    @given(
        m=st.one_of(st.integers(0, 130), st.sampled_from([0, 1, 2, 8, 9, 16, 17, 64])),
        rows=st.integers(1, 200),
        columns=st.integers(1, 400),
        rank=st.one_of(st.none(), st.integers(1, 80)),
        bias=st.booleans(),
        codebook=st.sampled_from(CODEBOOKS),
        group_size=st.sampled_from(GROUPS),
        x_dtype=st.sampled_from((*DTYPES, torch.float64)),
        other_dtypes=st.tuples(*3 * [st.sampled_from((*DTYPES, torch.float64))]),
        scale_dtype=st.sampled_from(SCALE_DTYPES),
        view=st.sampled_from(list(VIEWS)),
        offset=st.booleans(),
    )
    def test_fuzzed(
        self,
        isa,
        transposed,
        m,
        rows,
        columns,
        rank,
        bias,
        codebook,
        group_size,
        x_dtype,
        other_dtypes,
        scale_dtype,
        view,
        offset,
    ):
        layer = random_layer(
            codebook,
            rows,
            columns,
            group_size,
            rank=rank,
            bias=bias,
            scale_dtype=scale_dtype,
            adapter_dtype=other_dtypes[0],
            bias_dtype=other_dtypes[1],
        )
        if rank is not None:
            layer.lora_B = layer.lora_B.to(other_dtypes[2])
        if offset:
            moved = {name: t for name, t in vars(layer).items() if isinstance(t, Tensor)}
            layer = replace(layer, **{name: offset_in_storage(t) for name, t in moved.items()})
        x = VIEWS[view](m, rows if transposed else columns, x_dtype)
        with forced(isa):
            y = assert_exact(layer, x, transposed)
        if x_dtype != torch.float64:  # which is judged by itself
            plain = layer.multiply(x, transposed, reference)
            exact, tolerance = layer.exact(x, transposed)
            floor = tolerance.norm() / 30  # of few elements, where one unlucky rounding decides
            assert (y.double() - exact).norm() <= BUDGET[isa] * (plain.double() - exact).norm() + floor

    @TRANSPOSED
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("codebook", ["nf4", "int4", "nf2", "int2", "int8", "irregular8"])
    def test_no_worse_than_plain_torch(self, isa, codebook, dtype, transposed):
        for rank in (None, 16):
            layer = random_layer(codebook, 192, 200, rank=rank, bias=True)
            for m in (1, 2, 3, 8, 9, 64):
                x = gaussian(m, layer.rows if transposed else layer.columns, seed=m, dtype=dtype)
                ours, plain = (
                    relative_error(layer.multiply(x, transposed, ops), layer, x, transposed) for ops in (OPS, reference)
                )
                assert ours <= BUDGET[isa] * plain, f"m={m} rank={rank}: error {ours:.3g}, plain torch {plain:.3g}"

    @pytest.mark.parametrize("kind", ["ones", "positive", "ReLU", "around 1", "around 0"])
    @pytest.mark.parametrize("codebook", ["nf4", "nf2", "int4", "int2", "uniform4"])
    def test_x_of_one_sign(self, isa, codebook, kind):
        """Errors of the weight that are the same for every weight of a code add up where x does not change its sign."""
        weights = {"normal": gaussian(256, 2048), "heavy tails": gaussian(256, 2048) ** 3}
        for weight in weights.values():
            packed = lk.quantize(weight, codebook)
            layer = Layer(*(getattr(packed, n) for n in ("codes", "scale", "offset", "codebook")), 2048, 64)
            for m in (1, 2, 4, 8, 9):
                x = gaussian(m, 2048, seed=m)
                x = {
                    "ones": torch.ones_like(x),
                    "positive": x.abs(),
                    "ReLU": x.relu(),
                    "around 1": 1 + 0.3 * x,
                    "around 0": x,
                }[kind].bfloat16()
                ours, plain = (relative_error(layer.multiply(x, ops=ops), layer, x, False) for ops in (OPS, reference))
                assert ours <= 1.2 * plain, f"m={m}: error {ours:.3g}, plain torch {plain:.3g}"

    @pytest.mark.parametrize("codebook", ["nf4", "int8"])
    def test_wide_rows(self, isa, codebook):
        """Rounding errors of long sums: they must not all enter one accumulator."""
        layer = random_layer(codebook, 16, 14336, rank=16)
        for m in (1, 2, 8, 9):
            x = gaussian(m, 14336, seed=m)
            ours, plain = (relative_error(layer.multiply(x, ops=ops), layer, x, False) for ops in (OPS, reference))
            assert ours <= BUDGET[isa] * plain, f"m={m}: error {ours:.3g}, plain torch {plain:.3g}"


class TestShapes:
    @TRANSPOSED
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_views(self, isa, view, dtype, transposed):
        layer = random_layer("int4", 35, 130, 32, rank=3, bias=True)
        for m in (1, 5, 20):
            assert_exact(layer, VIEWS[view](m, layer.rows if transposed else layer.columns, dtype), transposed)

    @TRANSPOSED
    @pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
    def test_nothing_to_compute(self, isa, dtype, transposed):
        """No rows of x, no terms in a sum (the bias is left), or no results; with and without an adapter."""
        for rows, columns in [(0, 130), (7, 0), (0, 0), (7, 130)]:
            for rank in (None, 3):
                layer = random_layer("int4", rows, columns, rank=rank, bias=True)
                for leading in [(0,), (5,), (20,), (2, 0, 3), ()]:
                    x = gaussian(*leading, rows if transposed else columns, dtype=dtype)
                    assert_exact(layer, x, transposed)

    def test_rank_zero_is_no_adapter(self, isa):
        layer, x = random_layer(rank=3, bias=True), gaussian(5, 130)
        empty = replace(layer, lora_A=layer.lora_A[:0], lora_B=layer.lora_B[:, :0])
        assert torch.equal(empty.multiply(x), replace(layer, lora_A=None, lora_B=None).multiply(x))

    @TRANSPOSED
    def test_strided_adapter_and_bias(self, isa, transposed):
        layer = random_layer(rank=5, bias=True)
        x = gaussian(5, layer.rows if transposed else layer.columns)
        views = {
            "lora_A": gaussian(130, 5).T,
            "lora_B": gaussian(7, 9)[:, 2:7],
            "bias": gaussian(14)[::2],
            "codebook": layer.codebook.repeat_interleave(2)[::2],
            "codes": layer.codes.T.contiguous().T,
            "scale": layer.scale.T.contiguous().T,
        }
        assert_exact(replace(layer, **views), x, transposed)


class TestDecode:
    """One-hot x: the result is a column of the decoded weight; of the transposed product a row."""

    @staticmethod
    def decoded(layer: Layer, m: int, dtype: torch.dtype, transposed: bool) -> Tensor:
        unit = torch.eye(layer.rows if transposed else layer.columns, dtype=dtype)
        y = torch.cat([layer.multiply(part, transposed) for part in unit.split(m)])
        return y if transposed else y.T

    @TRANSPOSED
    @pytest.mark.parametrize("codebook", CODEBOOKS)
    def test_bit_exact(self, isa, codebook, transposed):
        for group_size in (32, 64, -1):
            layer = random_layer(codebook, 9, 200, group_size)
            for dtype in (torch.float32, torch.float16):
                for m in (1, 2, 3, 8, 9, 17):
                    assert torch.equal(self.decoded(layer, m, dtype, transposed), layer.dense(dtype)), (dtype, m)

    def test_every_code_value(self, isa):
        """All 256 bytes in every byte of a tile."""
        for codebook in CODEBOOKS:
            layer = random_layer(codebook, 256, 64)
            layer.codes = (torch.arange(256)[:, None] + torch.arange(layer.codes.shape[1]) * 37).to(torch.uint8)
            for m in (1, 8, 64):
                assert torch.equal(self.decoded(layer, m, torch.float32, False), layer.dense(torch.float32))

    @TRANSPOSED
    @pytest.mark.parametrize("codebook", CODEBOOKS)
    def test_bfloat16_within_one_rounding(self, isa, codebook, transposed):
        """Exactly the weight in bfloat16, but for few rows x the code book may be rounded instead of it, to either
        side."""
        for group_size in (32, 64, -1):
            layer = random_layer(codebook, 9, 200, group_size)
            for m in (1, 2, 4, 8, 10, 40):  # divisors of 200: no two rows are left over
                y = self.decoded(layer, m, torch.bfloat16, transposed)
                if m > 8 or transposed or group_size == 32 or "8" in codebook:
                    assert torch.equal(y, layer.dense(torch.bfloat16)), m
                error, u = (y.double() - layer.dense()).abs(), ROUNDING[torch.bfloat16]
                assert (error <= 2.02 * u * (layer.magnitudes() + layer.dense().abs())).all(), m


class TestNonFinite:
    @TRANSPOSED
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_stays_in_its_row(self, isa, dtype, transposed):
        for codebook in ("nf4", "int8", "nf2"):
            layer = random_layer(codebook, 70, 70, 32, rank=3, bias=True)
            for m in (1, 2, 3, 8, 9, 40):
                x = gaussian(m, 70, dtype=dtype)
                clean = layer.multiply(x, transposed)
                for bad in (torch.nan, torch.inf, -torch.inf):
                    spoilt = x.clone()
                    spoilt[m // 2, 69] = bad
                    y = layer.multiply(spoilt, transposed)
                    assert not y[m // 2].isfinite().any()
                    others = torch.arange(m) != m // 2
                    assert torch.equal(y[others], clean[others])

    @TRANSPOSED
    def test_overflow_is_infinite(self, isa, transposed):
        layer = random_layer("int8", 70, 70)
        for m in (1, 9):
            y = layer.multiply(torch.full((m, 70), 6e4, dtype=torch.float16), transposed)
            exact = layer.exact(torch.full((m, 70), 6e4, dtype=torch.float16), transposed)[0]
            beyond = exact.abs() > 65600
            assert beyond.any() and torch.equal(y[beyond].double(), exact[beyond].sign() * torch.inf)


class TestGradients:
    @pytest.mark.parametrize("leading", [(), (1,), (9,), (2, 5)], ids=str)
    def test_as_of_plain_torch(self, isa, leading):
        layer = random_layer("int4", 40, 130, rank=4, bias=True)
        leaves = (gaussian(*leading, 130, seed=3), layer.lora_A, layer.lora_B, layer.bias)
        results = []
        for ops in (OPS, reference):
            x, lora_A, lora_B, bias = (leaf.clone().requires_grad_() for leaf in leaves)
            y = replace(layer, lora_A=lora_A, lora_B=lora_B, bias=bias).multiply(x, ops=ops)
            results.append(torch.autograd.grad(y, (x, lora_A, lora_B, bias), gaussian(*y.shape, seed=9)))
        for mine, plain in zip(*results, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-4)

    def test_second_derivative(self, isa):
        """The derivative of the transposed product is the product."""
        layer = random_layer("nf4", 40, 130, rank=4)
        grad_y = gaussian(5, 40).requires_grad_()
        direction = gaussian(5, 130, seed=2)
        (second,) = torch.autograd.grad(layer.multiply(grad_y, transposed=True), grad_y, direction)
        assert torch.equal(second, layer.multiply(direction))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, isa, dtype):
        packed, x, bias = lk.quantize(gaussian(40, 130)), gaussian(5, 130), gaussian(40)
        lora = adapter(40, 130, 3)
        with torch.autocast("cpu", dtype=dtype):
            y = lk.qlora_linear(x, packed, *lora, bias=bias)
        assert y.dtype == dtype and torch.equal(y, lk.qlora_linear(x.to(dtype), packed, *lora, bias=bias))

    @TRANSPOSED
    @pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.int32, torch.complex64], ids=str)
    def test_other_x_is_refused(self, dtype, transposed):
        """A kernel that wrote float32 into a result of this dtype would write beyond its end."""
        layer = random_layer(rank=3)
        x = torch.ones(5, layer.rows if transposed else layer.columns).to(dtype)
        with pytest.raises((TypeError, ValueError), match="x (must be floating point|has dtype)"):
            layer.multiply(x, transposed)

    @TRANSPOSED
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_operands_that_do_not_fit_are_refused(self, dtype, transposed):
        layer = random_layer(rank=3)
        x = gaussian(5, layer.rows if transposed else layer.columns, dtype=dtype)
        for lora_A, lora_B in [
            (layer.lora_A[0], layer.lora_B),
            (layer.lora_A[:, 1:], layer.lora_B),
            (layer.lora_A, layer.lora_B[1:]),
            (layer.lora_A, layer.lora_B[:1]),
            (layer.lora_A[:2], layer.lora_B),
            (layer.lora_A[:0], layer.lora_B),
            (layer.lora_A, None),
            (None, layer.lora_B),
            (layer.lora_A.int(), layer.lora_B),
            (layer.lora_A, layer.lora_B.to("meta")),
        ]:
            with pytest.raises((TypeError, ValueError), match="lora_"):
                replace(layer, lora_A=lora_A, lora_B=lora_B).multiply(x, transposed)
        for bias in (torch.ones(1), torch.ones(5, 7), torch.ones(7).int(), torch.ones(7, device="meta")):
            if not transposed:
                with pytest.raises((TypeError, ValueError), match="bias"):
                    replace(layer, bias=bias).multiply(x)


class TestThreads:
    @TRANSPOSED
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_number_does_not_change_results(self, isa, dtype, transposed):
        layer = random_layer("int4", 97, 1000, rank=5, bias=True)
        for m in (1, 3, 8, 9, 40):
            x = gaussian(m, layer.rows if transposed else layer.columns, dtype=dtype)
            results = []
            for count in (1, 2, 3, 8):
                with threads(count):
                    results.append(layer.multiply(x, transposed))
            assert all(torch.equal(result, results[0]) for result in results[1:]), m

    @TRANSPOSED
    def test_more_threads_than_rows(self, isa, transposed):
        """The columns of a row are divided: another order of the sum, the same one every time."""
        with threads(8):
            for rows in (1, 2, 3, 4, 5, 9):
                layer = random_layer("int2", rows, 20000, rank=3, bias=True)
                for m in (1, 8, 9):
                    assert_exact(layer, gaussian(m, rows if transposed else 20000), transposed)

    def test_called_from_eight_python_threads(self, isa):
        """Different layers and the same one, both products at once: the results are the serial ones."""
        layers = [random_layer(CODEBOOKS[i], 33 + i, 700 + i, rank=i or None, bias=True) for i in range(7)]
        jobs = []
        for i, layer in enumerate([*layers, layers[0]]):
            dtype = DTYPES[i % 3]
            for m in (1, 8, 20):
                jobs.append((layer, gaussian(m, layer.columns, seed=i, dtype=dtype), False))
                jobs.append((layer, gaussian(m, layer.rows, seed=i, dtype=dtype), True))
        together = threading.Barrier(8)

        def work(first: int) -> list[Tensor]:
            torch.set_num_threads(2)  # a setting of each thread
            together.wait()
            return [layer.multiply(x, transposed) for layer, x, transposed in jobs[first:] + jobs[:first]]

        with threads(2):
            serial = [layer.multiply(x, transposed) for layer, x, transposed in jobs]
            with ThreadPoolExecutor(8) as pool:
                for first, results in zip(range(0, 48, 6), pool.map(work, range(0, 48, 6)), strict=True):
                    for expected, result in zip(serial[first:] + serial[:first], results, strict=True):
                        assert torch.equal(expected, result)


class TestGil:
    """Another Python thread runs while a kernel does."""

    @pytest.fixture
    def turns(self):
        """Counts the turns of a thread that gets the interpreter only when somebody lets go of it."""
        counted, stop = [0], threading.Event()

        def count():
            while not stop.is_set():
                counted[0] += 1
                time.sleep(0)

        before = sys.getswitchinterval()
        other = threading.Thread(target=count)
        other.start()
        sys.setswitchinterval(1000.0)
        yield lambda: counted[0]
        stop.set()
        sys.setswitchinterval(before)
        other.join()

    @TRANSPOSED
    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_is_released(self, turns, transposed, needs_grad):
        layer = random_layer("int8", 512, 4096)
        x = gaussian(64, layer.rows if transposed else layer.columns).requires_grad_(needs_grad)
        with forced("scalar"), threads(1):
            assert self.most_turns(turns, lambda: layer.multiply(x, transposed)) > 30

    def test_is_not_released_by_python(self, turns):
        """The control: while Python code runs, the other thread gets no turns."""
        assert self.most_turns(turns, lambda: sum(range(1_000_000))) <= 30

    @staticmethod
    def most_turns(turns, work) -> int:
        """The most turns of the other thread while `work` runs, of several attempts, as no core may be free for it."""
        taken = 0
        for _ in range(20):
            before = turns()
            work()
            taken = max(taken, turns() - before)
            if taken > 30:
                break
        return taken
