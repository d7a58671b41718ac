"""The Triton kernels against float64: on a CUDA device, or on a CPU where TRITON_INTERPRET=1 (see test_triton.py).

Interpreted they decode by plain Triton, but for the tests that take the fixture `asm`."""

from __future__ import annotations

import functools
import itertools
import os
import random
from dataclasses import replace

import interpreter
import ptx
import pytest
import torch
from helpers import FORMATS, adapter, gaussian, op_arguments
from oracle import dequantize as exact_dequantize
from oracle import qlora_linear as exact_qlora_linear

import loftq_kernels as lk
from loftq_kernels.formats import get_format
from loftq_kernels.ops import triton_backend, triton_routes
from loftq_kernels.ops.checks import SCALE_DTYPES
from loftq_kernels.triton_kernels import device as devices

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.repair()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALF = DTYPES[:2]
PATHS = ["decode", "prefill", "chunked"]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def assert_close(ours, exact, plain, dtype):
    """No further from float64 than 1.2 times plain torch, or a few roundings of the largest value."""
    error, limit = ((t.double().cpu() - exact).abs().amax().item() for t in (ours, plain))
    largest = exact.abs().amax().item()
    assert error <= 1.2 * limit + (8 + 3 * largest) * torch.finfo(dtype).eps, (
        f"error {error:.3g}, plain torch {limit:.3g}"
    )


def fuzzed(count: int, seed: int) -> list[tuple]:
    """(M, N, K, rank, format, group, scale dtype, dtype, path): each choice as often as the others."""
    rng = random.Random(seed)
    formats, paths = itertools.cycle(FORMATS), itertools.cycle(PATHS)
    return [
        (
            rng.choice([1, 2, 5, 16, 17, 33, 70]),
            rng.choice([1, 7, 64, 65, 130]),
            rng.choice([1, 31, 64, 70, 128, 130, 200, 320]),
            rng.choice([None, 1, 3, 16, 20]),
            next(formats),
            rng.choice([32, 64, 128, 256, -1]),
            rng.choice(SCALE_DTYPES),
            rng.choice(DTYPES),
            next(paths),
        )
        for _ in range(count)
    ]


def case(device, rows, n, k, rank, format, group_size, scale_dtype, dtype):
    packed = lk.quantize(gaussian(n, k, seed=n + k), format, group_size, scale_dtype=scale_dtype).to(device)
    lora = (None, None) if rank is None else adapter(n, k, rank, device=device, dtype=dtype)
    return packed, gaussian(rows, k, seed=rows, device=device, dtype=dtype), lora, gaussian(n, seed=9, device=device)


@pytest.mark.parametrize("shape", fuzzed(45, seed=0), ids=str)
def test_qlora_linear(shape, device):
    *shape, path = shape
    packed, x, (lora_A, lora_B), bias = case(device, *shape)
    y = triton_backend.qlora_linear(x, *op_arguments(packed), packed.group_size, lora_A, lora_B, 0.5, bias, path=path)
    plain = lk.ops.functional.reference.qlora_linear(
        x, *op_arguments(packed), packed.group_size, lora_A, lora_B, 0.5, bias
    )
    assert y.dtype == x.dtype and y.shape == plain.shape
    assert_close(y, exact_qlora_linear(x, packed, lora_A, lora_B, 0.5, bias), plain, x.dtype)


@pytest.mark.parametrize("splits", [2, 3, 16])
@pytest.mark.parametrize("format, group_size", [("nf4", 64), ("int4", 32), ("nf2", -1), ("int8", 32)])
def test_prefill_in_splits(format, group_size, splits, device, monkeypatch):
    """Programs share the columns of a tile; some have none. Twice, for the counters are to be left at zero."""
    monkeypatch.setattr(triton_routes.products().configs, "splits", lambda *shape: splits)
    packed, x, lora, bias = case(device, 37, 70, 420, 3, format, group_size, torch.float16, torch.bfloat16)
    arguments = *op_arguments(packed), group_size, *lora, 0.5, bias
    plain = lk.ops.functional.reference.qlora_linear(x, *arguments)
    for _ in range(2):
        y = triton_backend.qlora_linear(x, *arguments, path="prefill")
        assert_close(y, exact_qlora_linear(x, packed, *lora, 0.5, bias), plain, x.dtype)


@pytest.mark.parametrize("shape", fuzzed(30, seed=1), ids=str)
def test_grad_input(shape, device):
    *shape, path = shape
    packed, x, (lora_A, lora_B), _ = case(device, *shape)
    grad = gaussian(x.shape[0], packed.shape[0], seed=11, device=device, dtype=x.dtype)
    arguments = (grad, *op_arguments(packed), packed.shape[1], packed.group_size, lora_A, lora_B, 0.5)
    ours = triton_backend.qlora_linear_grad_input(*arguments, path="chunked" if path == "chunked" else "fused")
    exact = grad.double().cpu() @ exact_dequantize(packed)
    if lora_A is not None:
        exact = exact + 0.5 * (grad.double().cpu() @ lora_B.double().cpu()) @ lora_A.double().cpu()
    assert_close(ours, exact, lk.ops.functional.reference.qlora_linear_grad_input(*arguments), x.dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize(format, device):
    """The reference's bits, slices that `chunked` takes included."""
    for n, k, group_size, scale_dtype in [
        (5, 130, 32, torch.float16),
        (9, 700, -1, torch.float32),
        (1, 1, 64, torch.float16),
    ]:
        packed = lk.quantize(gaussian(n, k), format, group_size, scale_dtype=scale_dtype).to(device)
        for dtype in DTYPES:
            ours = triton_backend.dequantize(*op_arguments(packed), k, group_size, dtype)
            assert torch.equal(ours, packed.dequantize(dtype, backend="reference"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_decoded_weights_are_exact(format, dtype, device):
    """One-hot x: entries, as float32 where interpreted and float16 on a device, scaled in float32 and rounded once."""
    packed = lk.quantize(gaussian(5, 130), format, 32).to(device)
    eye = torch.eye(130, dtype=dtype, device=device)
    y = triton_backend.qlora_linear(eye, *op_arguments(packed), 32, None, None, 1.0, None, path="prefill").T
    eye = torch.eye(5, dtype=dtype, device=device)
    arguments = (eye, *op_arguments(packed), 130, 32, None, None, 1.0)
    transposed = triton_backend.qlora_linear_grad_input(*arguments, path="fused")
    exact, unit = packed.dequantize(torch.float64), torch.finfo(dtype).eps / 2
    for weight in (y, transposed):
        if device == "cpu" or format.startswith("int"):
            assert torch.equal(weight, packed.dequantize(dtype))
        assert ((weight.double() - exact).abs() <= (unit + 2.0**-10) * exact.abs()).all()


@pytest.fixture
def asm(device, monkeypatch, request) -> list[str]:
    """The kernels decode by inline PTX, as on a device. The texts that the interpreter comes to are added to the list.

    The backend and decode ask the `Device` record of the interpreter whether kernels may hold PTX: here it says so.
    """
    texts = []
    if device == "cpu":
        run = ptx.run
        monkeypatch.setattr(ptx, "run", lambda text, *operands: texts.append(text) or run(text, *operands))
        monkeypatch.setattr(devices, "INTERPRETER", replace(devices.INTERPRETER, ptx=True))
        monkeypatch.setattr(triton_routes, "_routes", {})  # Those known hold plans of kernels without PTX.
        devices.device_of.cache_clear()
        request.addfinalizer(devices.device_of.cache_clear)
    return texts


@functools.cache
def packed_and_exact(format: str, group_size: int, n: int, k: int) -> tuple[lk.PackedTensor, torch.Tensor]:
    packed = lk.quantize(gaussian(n, k, seed=n + k), format, group_size)
    return packed, exact_dequantize(packed)


def check_asm(asm, path, format, dtype, group_size, one_sign, shape, device):
    """||error|| of ours at most 1.2 times that of plain torch at the same dtype; path: a forward one, or "grad_input".

    Errors are compared by norms, because the largest error is that of rounding one output. There is no allowance:
    plain torch rounds its output as well, which is most of its error, and an allowance of one more rounding would hide
    a table twice as wrong as rounded weights.
    """
    rows, n, k = shape
    packed, weight = packed_and_exact(format, group_size, n, k)
    packed = packed.to(device)
    plain = packed.dequantize(dtype, backend="reference")
    x = gaussian(rows, n if path == "grad_input" else k, seed=rows)
    x = (x.abs() if one_sign else x).to(device, dtype)
    if path == "grad_input":
        arguments = x, *op_arguments(packed), k, group_size, None, None, 1.0
        ours = triton_backend.qlora_linear_grad_input(*arguments, path="fused")
    else:
        weight, plain = weight.T, plain.T
        arguments = x, *op_arguments(packed), group_size, None, None, 1.0, None
        ours = triton_backend.qlora_linear(*arguments, path=path)
    if device == "cpu" and (
        path == "decode" or packed.bits < 8
    ):  # the large tiles' 8-bit codes are Triton's to convert
        assert any("$2" in text for text in asm), "no asm decoded"
    exact = x.double().cpu() @ weight
    error, limit = ((y.double().cpu() - exact).norm().item() for y in (ours, x @ plain))
    assert error <= 1.2 * limit, f"{error / limit:.2f} times the error of plain torch"


@pytest.mark.parametrize("one_sign", [False, True], ids=["both signs", "one sign"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("format", ["nf2", "int2", "nf4", "int4", "uniform4", "int8", "int8_sym"])
@pytest.mark.parametrize("path", ["decode", "prefill", "grad_input"])
def test_asm(path, format, dtype, group_size, one_sign, device, asm):
    """Tails of a tile and of a group in either dimension. x of one sign: errors of the weights add up."""
    shape = (3 if path == "decode" else 17), 131, 200
    check_asm(asm, path, format, dtype, group_size, one_sign, shape, device)


@pytest.mark.parametrize("format, group_size", [("nf4", 64), ("int2_sym", 64), ("int2_sym", -1)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("path", ["decode", "prefill", "grad_input"])
def test_asm_of_long_sums(path, dtype, format, group_size, device, asm):
    """With x of one sign what is wrong on average grows with the sum's length, and roundings with its root."""
    shape = (17, 2000, 131) if path == "grad_input" else (3 if path == "decode" else 17, 131, 2000)
    check_asm(asm, path, format, dtype, group_size, True, shape, device)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 9, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_adapters(path, rows, dtype, device):
    """Each row as by its own adapter alone; rows without one, adapters nobody takes; one adapter for all."""
    packed = lk.quantize(gaussian(70, 130)).to(device)
    pairs = [adapter(70, 130, 3, seed=seed, device=device, dtype=dtype) for seed in (1, 3, 5)]
    lora_A, lora_B = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    x, bias = gaussian(rows, 130, seed=rows, device=device, dtype=dtype), gaussian(70, device=device)
    for ids in (torch.randint(-1, 3, (rows,)), torch.full((rows,), 2), torch.full((rows,), -1, dtype=torch.int32)):
        arguments = (x, *op_arguments(packed), 64, lora_A, lora_B, ids.to(device), 0.5, bias)
        y = triton_backend.qlora_linear_multi(*arguments, path=path)
        exact, plain = torch.empty(rows, 70, dtype=torch.float64), torch.empty_like(y)
        for m, adapter_id in enumerate(ids.tolist()):
            own = (None, None) if adapter_id < 0 else pairs[adapter_id]
            exact[m] = exact_qlora_linear(x[m], packed, *own, 0.5, bias)
            plain[m] = lk.ops.functional.reference.qlora_linear(x[m], *op_arguments(packed), 64, *own, 0.5, bias)
        assert_close(y, exact, plain, dtype)


@pytest.mark.parametrize("adapters, rank", [(1, 2), (1, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_an_id_out_of_range_shows_in_its_row_alone(adapters, rank, dtype, device):
    packed, x = lk.quantize(gaussian(7, 64)).to(device), gaussian(5, 64, device=device, dtype=dtype)
    lora_A = gaussian(adapters, rank, 64, device=device, dtype=dtype)
    lora_B = gaussian(adapters, 7, rank, device=device, dtype=dtype)
    ids = torch.tensor([0, 1, -1, -2, -(2**31)], device=device)
    plain = lk.qlora_linear(x, packed, backend="reference")
    for path in PATHS:
        y = triton_backend.qlora_linear_multi(x, *op_arguments(packed), 64, lora_A, lora_B, ids, 1.0, None, path=path)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [adapters == 0, True, False, True, True]
        torch.testing.assert_close(y[2], plain[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("path", ["decode", "chunked"])
def test_an_adapters_inf_shows_in_its_rows_alone(path, device):
    packed, x = lk.quantize(gaussian(7, 64)).to(device), gaussian(3, 64, device=device, dtype=torch.float16)
    lora_A, lora_B = gaussian(2, 3, 64, device=device), gaussian(2, 7, 3, device=device)
    lora_B[1, 5] = float("inf")
    ids = torch.tensor([0, 1, -1], device=device)
    y = triton_backend.qlora_linear_multi(x, *op_arguments(packed), 64, lora_A, lora_B, ids, 1.0, None, path=path)
    assert (~y.isfinite()).nonzero().tolist() == [[1, 5]]


def test_float64_scales_are_rounded_or_refused(device):
    """16 bits of them at a time would be other numbers; the wrapper rounds them, the ops refuse."""
    packed, x = lk.quantize(gaussian(7, 128), "int4").to(device), gaussian(3, 128, device=device)
    wide = lk.quantize(gaussian(7, 128), "int4").to(device)
    wide.scale, wide.offset = wide.scale.double(), wide.offset.double()
    with torch.no_grad():
        assert torch.equal(lk.qlora_linear(x, wide, backend="triton"), lk.qlora_linear(x, packed, backend="triton"))
    calls = [
        lambda: triton_backend.qlora_linear(x, *op_arguments(wide), 64, None, None, 1.0, None),
        lambda: triton_backend.qlora_linear_grad_input(x[:, :7], *op_arguments(wide), 128, 64, None, None, 1.0),
        lambda: triton_backend.dequantize(*op_arguments(wide), 128, 64, torch.float16),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="scale has dtype torch.float64"):
            call()


@pytest.mark.parametrize("rows", [3, 20])
def test_views_and_adapters_of_another_dtype(rows, device):
    """Transposed, expanded, sliced and misaligned x; adapters and bias in float32 and of any strides."""
    packed = lk.quantize(gaussian(7, 130), "int4").to(device)
    lora_A, lora_B = gaussian(130, 3, device=device).T, gaussian(3, 7, device=device).T
    make = lambda *shape: gaussian(*shape, seed=4, device=device, dtype=torch.float16)  # noqa: E731
    views = [make(130, rows).T, make(1, 130).expand(rows, 130), make(rows, 260)[:, ::2], make(rows, 131)[:, 1:]]
    for x in views:
        bias = gaussian(14, device=device)[::2]
        y = lk.qlora_linear(x, packed, lora_A, lora_B, bias=bias, backend="triton")
        plain = lk.qlora_linear(x, packed, lora_A, lora_B, bias=bias, backend="reference")
        assert_close(y, exact_qlora_linear(x, packed, lora_A, lora_B, 1.0, bias), plain, x.dtype)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.bfloat16, torch.float64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_takes_adapters_of_any_dtype(dtype, kinds, device):
    """One for all rows and one per row, after adapters of the same shapes in the dtype of x."""
    packed, x = lk.quantize(gaussian(40, 200)).to(device), gaussian(3, 200, device=device, dtype=dtype)
    ids = torch.tensor([0, -1, 0], device=device)
    for kind_A, kind_B in ((dtype, dtype), kinds):
        lora_A, lora_B = (
            t.to(kind) for t, kind in zip(adapter(40, 200, 5, device=device), (kind_A, kind_B), strict=True)
        )
        y = triton_backend.qlora_linear(x, *op_arguments(packed), 64, lora_A, lora_B, 0.5, None)
        exact = exact_qlora_linear(x, packed, lora_A, lora_B, 0.5)
        arguments = x, *op_arguments(packed), 64, lora_A, lora_B, 0.5, None
        plain = lk.ops.functional.reference.qlora_linear(*arguments)
        assert y.dtype == dtype
        assert_close(y, exact, plain, dtype)
        stacked = lora_A.unsqueeze(0), lora_B.unsqueeze(0)
        by_row = triton_backend.qlora_linear_multi(x, *op_arguments(packed), 64, *stacked, ids, 0.5, None)
        assert_close(by_row[::2], exact[::2], plain[::2], dtype)


def test_what_was_decided_is_looked_up_and_nothing_else_is(device, monkeypatch):
    """A second call of the same kind checks nothing; a call that differs in any way is checked, or planned anew."""
    checked = []
    check = triton_routes._check
    monkeypatch.setattr(triton_routes, "_routes", {})
    monkeypatch.setattr(triton_routes, "_check", lambda *arguments: checked.append(1) or check(*arguments))
    nf4, uniform4 = (lk.quantize(gaussian(7, 128), format).to(device) for format in ("nf4", "uniform4"))
    x = gaussian(3, 128, device=device, dtype=torch.float16)
    lora_A, lora_B = adapter(7, 128, 3, device=device, dtype=torch.float16)
    misaligned = torch.cat([nf4.scale.flatten()[:1], nf4.scale.flatten()])[1:].view_as(nf4.scale)

    def checks_of(packed, x, lora_A, lora_B, scale=None) -> int:
        del checked[:]
        codes, own_scale, offset, codebook = op_arguments(packed)
        arguments = x, codes, own_scale if scale is None else scale, offset, codebook, 64, lora_A, lora_B, 1.0, None
        y = triton_backend.qlora_linear(*arguments)
        plain = lk.ops.functional.reference.qlora_linear(*arguments)
        assert_close(y, exact_qlora_linear(x, packed, lora_A, lora_B), plain, x.dtype)
        return len(checked)

    assert checks_of(nf4, x, lora_A, lora_B) == 1
    assert checks_of(nf4, x + 1, lora_A.clone(), lora_B) == 0
    others = [
        (uniform4, x, lora_A, lora_B),
        (nf4, x[:2], lora_A, lora_B),
        (nf4, x.bfloat16(), lora_A, lora_B),
        (nf4, x, None, None),
        (nf4, x, lora_A.float(), lora_B),
        (nf4, x, lora_A, lora_B.float()),
        (nf4, x, lora_A, lora_B, misaligned),
    ]
    assert [checks_of(*other) for other in others] == [1] * len(others)
    assert [checks_of(*other) for other in others] == [0] * len(others)
    for wrong in (lora_A[:2], lora_A[:, :64], lora_A.long()):
        with pytest.raises((TypeError, ValueError), match="lora_[AB]"):
            checks_of(nf4, x, wrong, lora_B)


@pytest.mark.parametrize("path", PATHS)
def test_a_code_book_of_any_strides(path, device):
    packed, x = lk.quantize(gaussian(7, 130)).to(device), gaussian(3, 130, device=device)
    strided = torch.stack([packed.codebook, packed.codebook + 100], 1)[:, 0]
    weight = packed.codes, packed.scale, packed.offset, strided, 64
    y = triton_backend.qlora_linear(x, *weight, None, None, 1.0, None, path=path)
    torch.testing.assert_close(y, lk.qlora_linear(x, packed, backend="reference"), rtol=1e-4, atol=1e-4)


def test_nothing_to_sum_over(device):
    """K = 0 gives the bias, N = 0 in the backward zeros."""
    codes, scale = (torch.empty(7, 0, dtype=kind, device=device) for kind in (torch.uint8, torch.float16))
    codebook, bias = get_format("nf4").codebook().to(device), gaussian(7, device=device)
    for rows in (1, 40):
        x = torch.empty(rows, 0, device=device)
        y = triton_backend.qlora_linear(x, codes, scale, None, codebook, 64, None, None, 1.0, bias)
        assert torch.equal(y, bias.expand(rows, 7))
        narrow = lk.quantize(gaussian(3, 130)).to(device)
        weight = narrow.codes[:0], narrow.scale[:0], None, codebook, 130, 64
        grad = triton_backend.qlora_linear_grad_input(torch.empty(rows, 0, device=device), *weight, None, None, 1.0)
        assert grad.shape == (rows, 130) and not grad.any()


@pytest.mark.parametrize("path", PATHS)
def test_scaling_before_rounding(path, device):
    """x A^T beyond float16's range, scaled into it."""
    packed, x = lk.quantize(gaussian(7, 130)).to(device), torch.ones(3, 130, dtype=torch.float16, device=device)
    lora_A, lora_B = x.new_full((2, 130), 1000.0), x.new_full((7, 2), 2.0**-8)
    y = triton_backend.qlora_linear(x, *op_arguments(packed), 64, lora_A, lora_B, 2.0**-4, None, path=path)
    exact = exact_qlora_linear(x, packed, lora_A, lora_B, 2.0**-4)
    torch.testing.assert_close(y.double().cpu(), exact, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_leading_dimensions(leading, device):
    packed, x = lk.quantize(gaussian(7, 130)).to(device), gaussian(*leading, 130, device=device, dtype=torch.float16)
    y = lk.qlora_linear(x, packed, backend="triton")
    assert y.shape == (*leading, 7) and y.dtype == torch.float16
    grad = triton_backend.qlora_linear_grad_input(y, *op_arguments(packed), 130, 64, None, None, 1.0)
    assert grad.shape == x.shape


def test_bad_input(device):
    packed, x = lk.quantize(gaussian(7, 130)).to(device), gaussian(3, 130, device=device)
    lora_A, lora_B = adapter(7, 130, 3, device=device)
    calls = [
        (TypeError, "torch.int64", lambda: lk.qlora_linear(x.long(), packed, backend="triton")),
        (ValueError, "in_features=130", lambda: lk.qlora_linear(x[:, 1:], packed, backend="triton")),
        (ValueError, "meta", lambda: lk.qlora_linear(x.to("meta"), packed, backend="triton")),
        (ValueError, "meta", lambda: lk.qlora_linear(x, packed, lora_A.to("meta"), lora_B, backend="triton")),
        (ValueError, "together", lambda: lk.qlora_linear(x, packed, lora_A, backend="triton")),
        (ValueError, "quantize", lambda: lk.quantize(x, backend="triton")),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            call()
    y = lk.qlora_linear(x.double(), packed, lora_A, lora_B, backend="triton")  # float64: the reference serves
    torch.testing.assert_close(y.cpu(), exact_qlora_linear(x.double(), packed, lora_A, lora_B))
