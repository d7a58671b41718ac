"""The op `adapter_grad`: every instruction set against float64 and the error of plain torch, and what refuses it."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, adapter, gaussian
from properties import given, settings, st
from test_cpu_linear import BUDGET, ISAS, OPS, ROUNDING, forced, threads

import loftq_kernels as lk
from loftq_kernels.ops import autograd, extension, reference

pytestmark = pytest.mark.skipif(extension.library is None, reason="the extension is not built")


def problem(m: int, n: int, k: int, rank: int, dtype=torch.float32, adapter_dtype=torch.float32) -> tuple:
    x, grad_y = gaussian(m, k, seed=1, dtype=dtype), gaussian(m, n, seed=2, dtype=dtype)
    return x, grad_y, *(t.to(adapter_dtype) for t in adapter(n, k, rank)), 0.75


def exact(x, grad_y, lora_A, lora_B, scaling) -> tuple:
    x, g, lora_A, lora_B = (t.double() for t in (x, grad_y, lora_A, lora_B))
    return scaling * (g @ lora_B).T @ x, scaling * g.T @ (x @ lora_A.T)


def assert_close(args: tuple, isa: str, roundings: int = 0) -> None:
    """Within the budget times the error of plain torch, one rounding to the adapter's dtype, and some of the sums."""
    ours, plain = OPS.adapter_grad(*args, True, True), reference.adapter_grad(*args, True, True)
    sizes = exact(*(t.abs() if isinstance(t, torch.Tensor) else t for t in args))
    for mine, other, true, size in zip(ours, plain, exact(*args), sizes, strict=True):
        assert mine.is_contiguous() and mine.dtype == other.dtype and mine.shape == true.shape
        error, of_torch = (mine.double() - true).norm(), (other.double() - true).norm()
        rounding = ROUNDING[mine.dtype] * true.norm() if mine.dtype in (torch.float16, torch.bfloat16) else 0.0
        assert error <= BUDGET[isa] * of_torch + rounding + roundings * ROUNDING[torch.float32] * size.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget(isa, dtype):
    """Of as many elements that chance evens out: without an allowance."""
    with forced(isa):
        assert_close(problem(300, 270, 1100, 17, dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([0, 1, 7, 17, 129, 300, 1000]),
    n=st.integers(1, 300),
    k=st.integers(1, 600),
    rank=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
)
def test_awkward_shapes(isa, m, n, k, rank, dtype, adapter_dtype):
    with forced(isa):
        assert_close(problem(m, n, k, rank, dtype, adapter_dtype), isa, roundings=2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(0, 7, 5, 3), (3, 0, 5, 3), (3, 7, 0, 3), (3, 7, 5, 0), (1, 1, 1, 1)], ids=str)
def test_without_elements(isa, shape):
    with forced(isa):
        assert_close(problem(*shape), isa, roundings=2)


@pytest.mark.parametrize("isa", ISAS)
def test_long_sums(isa):
    """In one float32 sum over all rows the error would be many roundings."""
    with forced(isa):
        x, grad_y, *rest = problem(9000, 33, 70, 5)
        assert_close((x.abs(), grad_y.abs(), *rest), isa)
        assert_close(problem(40, 70, 9000, 5), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_does_not_depend_on_threads(isa, dtype):
    args = problem(130, 300, 600, 19, dtype)
    with forced(isa), threads(1):
        alone = OPS.adapter_grad(*args, True, True)
        parts = OPS.adapter_grad(*args, True, False)[0], OPS.adapter_grad(*args, False, True)[1]
    assert all(map(torch.equal, alone, parts))
    for count in (2, 3, 7):
        with forced(isa), threads(count):
            assert all(map(torch.equal, alone, OPS.adapter_grad(*args, True, True)))


@pytest.mark.parametrize("isa", ISAS)
def test_strides_and_mixed_types(isa):
    x, grad_y, lora_A, lora_B, scaling = problem(34, 31, 130, 3)
    with forced(isa):
        gapped = torch.full((34, 200), float("nan"))
        gapped[:, :130] = x
        ours = OPS.adapter_grad(
            gapped[:, :130], grad_y.T.contiguous().T, lora_A.T.contiguous().T, lora_B, scaling, 1, 1
        )
        assert all(map(torch.equal, ours, OPS.adapter_grad(x, grad_y, lora_A, lora_B, scaling, True, True)))
        leading = OPS.adapter_grad(x.view(2, 17, 130), grad_y.view(2, 17, 31), lora_A, lora_B, scaling, True, True)
        assert all(map(torch.equal, ours, leading))
        assert_close((x.half(), grad_y, lora_A.bfloat16(), lora_B.double(), scaling), isa, roundings=2)


def test_float64():
    args = tuple(t.double() if isinstance(t, torch.Tensor) else t for t in problem(34, 31, 130, 3))
    for mine, true in zip(OPS.adapter_grad(*args, True, True), exact(*args), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-13, atol=1e-12)


def test_what_is_not_needed_is_empty():
    args = problem(5, 7, 130, 3)
    assert [tuple(t.shape) for t in OPS.adapter_grad(*args, False, False)] == [(0,), (0,)]


@pytest.mark.parametrize("change", [0, 1, 2, 3])
def test_shapes_that_do_not_fit(change):
    args = list(problem(5, 7, 130, 3))
    args[change] = args[change][:, 1:]
    with pytest.raises(ValueError, match="shape"):
        OPS.adapter_grad(*args, True, True)


def test_no_derivative_is_lost():
    args = problem(5, 7, 130, 3)
    with pytest.raises(RuntimeError, match="adapter_grad has no derivative, but lora_A"):
        OPS.adapter_grad(*args[:2], args[2].requires_grad_(), *args[3:], True, True)


def test_the_backward_calls_it_unless_differentiated(monkeypatch):
    """With create_graph, and under torch.func, the gradients must have derivatives of their own."""
    packed, (lora_A, lora_B) = lk.quantize(gaussian(7, 130)), adapter(7, 130, 3)
    x = gaussian(5, 130)
    leaves = lora_A.requires_grad_(), lora_B.requires_grad_()

    def loss(lora_A, lora_B):
        return lk.qlora_linear(x, packed, lora_A, lora_B).square().sum()

    called = []
    plain = autograd._adapter_gradients
    monkeypatch.setattr(autograd, "_adapter_gradients", lambda *args: called.append(1) or plain(*args))
    alone = torch.autograd.grad(loss(*leaves), leaves)
    assert not called
    graph = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    by_func = torch.func.grad(loss, argnums=(0, 1))(*leaves)
    assert len(called) == 2 and all(t.requires_grad for t in graph)
    torch.testing.assert_close(alone, graph)
    torch.testing.assert_close(alone, by_func)
