"""Several adapters in one call: each row takes its own."""

from __future__ import annotations

import pytest
import torch
from helpers import BACKENDS, adapter, gaussian

import loftq_kernels as lk
from loftq_kernels.ops import reference


@pytest.fixture
def packed():
    return lk.quantize(gaussian(7, 130))


def stacked(count: int = 3, dtype=torch.float32):
    pairs = [adapter(7, 130, 3, seed=2 * i + 1, dtype=dtype) for i in range(count)]
    return [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 4)], ids=str)
def test_each_row_has_its_own(packed, leading, dtype, backend):
    lora_A, lora_B = stacked()
    lora_A[1, 2], lora_B[1, :, 2] = 0, 0  # of rank 2, padded
    x, bias = gaussian(*leading, 130, dtype=dtype), gaussian(7, seed=5)
    ids = torch.randint(-1, 3, leading)
    y = lk.qlora_linear(x, packed, lora_A, lora_B, scaling=0.5, bias=bias, adapter_ids=ids, backend=backend)
    assert y.shape == (*leading, 7) and y.dtype == dtype
    flat = zip(x.view(-1, 130), ids.view(-1).tolist(), y.view(-1, 7), strict=True)
    for row, adapter_id, mine in flat:
        own = (None, None) if adapter_id < 0 else (lora_A[adapter_id], lora_B[adapter_id])
        alone = lk.qlora_linear(row, packed, *own, scaling=0.5, bias=bias, backend=backend)
        torch.testing.assert_close(mine, alone, rtol=4 * torch.finfo(dtype).eps, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(packed, compiler):
    lora_A, lora_B = stacked()
    x, ids = gaussian(4, 130), torch.tensor([2, -1, 0, 2])

    def call(x):
        return lk.qlora_linear(x * 2, packed, lora_A, lora_B, adapter_ids=ids).relu()

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend=compiler)(x), call(x))


def test_no_gradients(packed):
    lora_A, lora_B = stacked()
    x, ids = gaussian(1, 130), torch.tensor([0])
    with pytest.raises(RuntimeError, match="lora_B would need a gradient"):
        lk.qlora_linear(x, packed, lora_A, lora_B.requires_grad_(), adapter_ids=ids)
    with torch.no_grad():
        lk.qlora_linear(x, packed, lora_A, lora_B, adapter_ids=ids)


def test_ids_nobody_has_checked(packed):
    """The op checks ids in host memory. Where it cannot, on a GPU, float64 x is served by the reference."""
    (lora_A, lora_B), x = stacked(), gaussian(5, 130)
    stored = packed.codes, packed.scale, packed.offset, packed.codebook, packed.group_size
    ids = torch.tensor([2, 3, -1, -2, 0])
    for count, rank in ((3, 3), (3, 0), (0, 3)):
        adapters = lora_A[:count, :rank], lora_B[:count, :, :rank]
        y = reference.qlora_linear_multi(x, *stored, *adapters, ids, 1.0, None)
        assert y.isnan().all(1).tolist() == [count == 0, True, False, True, count == 0]
        assert torch.equal(y[2], lk.qlora_linear(x, packed, backend="reference")[2])


def test_bad_input(packed):
    (lora_A, lora_B), x, ids = stacked(), gaussian(2, 130), torch.tensor([0, -1])

    def call(x=x, lora_A=lora_A, lora_B=lora_B, adapter_ids=ids):
        return lk.qlora_linear(x, packed, lora_A, lora_B, adapter_ids=adapter_ids)

    for kind, message, changed in [
        (ValueError, r"holds 3; 3 adapters have ids 0\.\.2", {"adapter_ids": torch.tensor([0, 3])}),
        (ValueError, "holds -2", {"adapter_ids": torch.tensor([0, -2])}),
        (ValueError, r"adapter_ids has shape \(3,\), expected \(2,\)", {"adapter_ids": torch.tensor([0, 1, 2])}),
        (TypeError, "torch.float32", {"adapter_ids": torch.zeros(2)}),
        (TypeError, "list", {"adapter_ids": [0, 1]}),
        (ValueError, "adapter_ids is on meta", {"adapter_ids": ids.to("meta")}),
        (ValueError, "needs lora_A", {"lora_A": None}),
        (ValueError, r"lora_A has shape \(3, 130\)", {"lora_A": lora_A[0]}),
        (ValueError, r"lora_B has shape \(2, 7, 3\), expected \(3, 7, 3\)", {"lora_B": lora_B[1:]}),
        (TypeError, "lora_A.*int64", {"lora_A": lora_A.long()}),
        (ValueError, "in_features=130", {"x": x[:, 1:]}),
    ]:
        with pytest.raises(kind, match=message):
            call(**changed)
