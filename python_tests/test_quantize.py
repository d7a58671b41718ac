"""`quantize`: codes and scales against the written rules, bitsandbytes and LoftQ's own formulas."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest
import torch
from helpers import BACKENDS, DEVICES, FORMATS, gaussian, minilm_weights, same_packed
from properties import given, hnp, st

import loftq_kernels as lk
from loftq_kernels.formats import get_format

SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# (N, K, group): one column, a group wider than the row, partial last groups, several tiles, the whole row.
CASES = [(1, 1, 32), (3, 31, 64), (5, 130, 32), (2, 300, 128), (2, 300, 256), (6, 100, -1)]
QUANTILE_STEP = 1 / 16


@functools.cache
def awkward(rows: int, columns: int) -> torch.Tensor:
    """Gaussian rows among rows of zeros, constants, negative values only, exact ties, and one of a larger magnitude."""
    weight = gaussian(rows, columns, seed=rows + columns)
    special = [
        torch.zeros(columns),
        torch.full((columns,), 0.3),
        -weight[0].abs() - 1,  # mean + 2.5 std may be negative: the guard of the uniform formats
        (torch.arange(columns) % 33 - 16) * QUANTILE_STEP,  # midpoints of the integer formats
    ]
    for row, values in zip(range(1, rows), special, strict=False):
        weight[row] = values
    weight[-1] *= 100
    return weight


@functools.cache
def expected(format: str, rows: int, columns: int, group_size: int, scale_dtype: torch.dtype, search: bool):
    return oracle.quantize(awkward(rows, columns), format, group_size, scale_dtype, search)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_bit_exact(format, scale_dtype, search, backend):
    for rows, columns, group_size in CASES:
        packed = lk.quantize(
            awkward(rows, columns), format, group_size, scale_dtype=scale_dtype, scale_search=search, backend=backend
        )
        codes, scale, offset = expected(format, rows, columns, group_size, scale_dtype, search)
        case = f"{rows}x{columns}, group {group_size}"
        assert packed.scale.dtype == scale_dtype
        np.testing.assert_array_equal(packed.scale.float().numpy(), scale, err_msg=case)
        if packed.format.affine:
            np.testing.assert_array_equal(packed.offset.float().numpy(), offset, err_msg=case)
        else:
            assert packed.offset is None
        np.testing.assert_array_equal(oracle.decode_codes(packed.codes, columns, packed.bits), codes, err_msg=case)


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize("format", FORMATS)
def test_backends_agree_on_many_groups(format, search):
    """Wide rows with repeated values, where factors and midpoints tie and the order of a sum decides."""
    weight = (gaussian(64, 1000, seed=4) * 8).round() / 8
    weight[32:] = gaussian(32, 1000, seed=5)
    for group_size in (32, 256, -1):
        reference = lk.quantize(weight, format, group_size, scale_search=search, backend="reference")
        for backend in BACKENDS:
            packed = lk.quantize(weight, format, group_size, scale_search=search, backend=backend)
            assert same_packed(packed, reference), (backend, group_size)


finite = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


@given(
    weight=hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 70)), elements=finite),
    format=st.sampled_from(FORMATS),
    group_size=st.sampled_from([32, 64, -1]),
    search=st.booleans(),
)
def test_bit_exact_fuzzed(weight, format, group_size, search):
    """Any finite values, down to scales that are subnormal; straight at the ops, which take any."""
    fmt, dense = get_format(format), torch.from_numpy(weight)
    codes, scale, offset = oracle.quantize(dense, format, group_size, torch.float32, search)
    for kernels in (torch.ops.loftq_kernels, lk.ops.functional.reference):
        stored = kernels.quantize(dense, fmt.codebook(), group_size, fmt.scale_rule, torch.float32, search)
        np.testing.assert_array_equal(stored[1].numpy(), scale)
        if fmt.affine:
            np.testing.assert_array_equal(stored[2].numpy(), offset)
        np.testing.assert_array_equal(oracle.decode_codes(stored[0], weight.shape[1], fmt.bits), codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_padding_is_code_zero(format, backend):
    packed = lk.quantize(gaussian(3, 70), format, backend=backend)
    padded = oracle.decode_codes(packed.codes, 128, packed.bits)
    assert not padded[:, 70:].any()


@pytest.mark.parametrize("format", FORMATS)
def test_no_entry_is_nearer(format):
    """By brute force over the code book in float64, on real weights."""
    weight = minilm_weights()["encoder.layer.0.attention.self.query"][:64]
    packed = lk.quantize(weight, format, 64)
    chosen = (weight.double() - packed.dequantize(torch.float64)).abs()
    scale = packed.scale.double().repeat_interleave(64, 1)
    offset = 0.0 if packed.offset is None else packed.offset.double().repeat_interleave(64, 1)
    nearest = torch.full_like(chosen, torch.inf)
    for level in packed.codebook.double():
        nearest = torch.minimum(nearest, (weight.double() - (level * scale + offset)).abs())
    assert (chosen <= nearest + 1e-6 * scale).all()


class TestOtherPeoplesSoftware:
    def check_bitsandbytes(self, weight, backend):
        bnb = pytest.importorskip("bitsandbytes.functional")
        rows, columns = weight.shape
        packed = lk.quantize(weight, "nf4", 64, scale_dtype=torch.float32, backend=backend)
        theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
        theirs = theirs.flatten()
        their_codes = torch.stack([theirs >> 4, theirs & 15], 1).view(rows, columns)  # the even element is high
        assert np.array_equal(oracle.decode_codes(packed.codes, columns, 4), their_codes.numpy())
        assert torch.equal(packed.scale.flatten(), state.absmax)
        assert torch.equal(packed.dequantize(backend=backend), bnb.dequantize_4bit(theirs.view(-1, 1), state))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_nf4_is_bitsandbytes_on_gaussian(self, backend):
        self.check_bitsandbytes(gaussian(33, 448, seed=5), backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ["encoder.layer.0.attention.self.key", "encoder.layer.5.output.dense"])
    def test_nf4_is_bitsandbytes_on_minilm(self, name, backend):
        self.check_bitsandbytes(minilm_weights()[name], backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("format", ["nf2", "nf4", "uniform2", "uniform4"])
    def test_values_are_those_of_loftq(self, format, backend):
        """argmin |w / s - level| over LoftQ's tables with its scales: absmax, or mean + 2.5 std for "uniform"."""

        def absmax(blocks):
            return blocks.abs().amax(-1, keepdim=True)

        def mean_std(blocks):
            return blocks.mean(-1, keepdim=True) + 2.5 * blocks.std(-1, keepdim=True)

        weight = minilm_weights()["encoder.layer.3.intermediate.dense"]
        table = torch.from_numpy(oracle.codebook(format))
        uniform = format.startswith("uniform")
        theirs = oracle.loftq_nearest(weight, table, mean_std if uniform else absmax)
        ours = lk.quantize(weight, format, 64, scale_dtype=torch.float32, backend=backend).dequantize()
        different = (ours - theirs).abs() > 1e-6 * theirs.abs()
        # They divide where we multiply by the reciprocal: a weight within rounding of a midpoint may go either way.
        assert different.sum() <= 1e-4 * weight.numel()
        torch.testing.assert_close((weight - ours).abs(), (weight - theirs).abs(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_search_never_hurts_a_group(format, group_size, scale_dtype):
    weight = gaussian(4, 520, seed=2)
    weight[1] = weight[1] ** 3  # heavy tails
    errors = []
    for search in (False, True):
        packed = lk.quantize(weight, format, group_size, scale_dtype=scale_dtype, scale_search=search)
        squared = (weight.double() - packed.dequantize(torch.float64)).square()
        errors.append([squared[:, a:b].sum(1) for a, b in oracle.group_bounds(520, group_size)])
    plain, searched = (torch.stack(group_errors) for group_errors in errors)
    assert (searched <= plain * (1 + 1e-6)).all()
    if packed.bits == 2:
        assert searched.sum() < 0.9 * plain.sum()


def test_published_error_of_two_bits():
    """Relative error of NF2, groups of 64, on a Gaussian matrix: 0.563, and 0.378 with the search."""
    weight = gaussian(512, 512)
    for search, published in ((False, 0.563), (True, 0.378)):
        dense = lk.quantize(weight, "nf2", 64, scale_search=search).dequantize()
        assert ((weight - dense).norm() / weight.norm()).item() == pytest.approx(published, abs=0.005)


def test_more_bits_are_better():
    weight = gaussian(64, 256)
    error = {name: (weight - lk.quantize(weight, name).dequantize()).norm().item() for name in FORMATS}
    assert error["int8"] < error["int4"] < error["int2"] and error["nf4"] < error["nf2"]
    assert error["uniform4"] < error["uniform2"] and error["int8_sym"] < error["int4_sym"] < error["int2_sym"]
    assert error["nf4"] < error["int4_sym"]  # what NormalFloat is for


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weight_dtypes(dtype, backend):
    weight = gaussian(5, 130).to(dtype)
    for format in ("nf4", "int4", "uniform2"):
        ours, plain = (lk.quantize(w, format, backend=backend) for w in (weight, weight.float()))
        assert same_packed(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    weight = gaussian(130, 7).T
    views = (weight, torch.cat([weight, weight], 1)[:, :130], weight.repeat_interleave(2, 1)[:, ::2])
    for view in views:
        assert not view.is_contiguous()
        assert same_packed(lk.quantize(view, backend=backend), lk.quantize(weight.contiguous(), backend=backend))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
def test_device_gives_the_same_bits(format, device):
    weight = gaussian(6, 200)
    packed = lk.quantize(weight.to(device), format)
    assert packed.device.type == device
    assert same_packed(packed, lk.quantize(weight, format, backend="reference"))


def test_threads_change_nothing():
    weight, threads = gaussian(300, 520), torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(lk.quantize(weight, "int4", scale_search=True))
    torch.set_num_threads(threads)
    assert same_packed(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_empty_and_constant(format, backend):
    for shape in ((0, 64), (5, 0), (0, 0)):
        packed = lk.quantize(torch.empty(shape), format, backend=backend)
        assert packed.dequantize(backend=backend).shape == shape
    assert not lk.quantize(torch.zeros(3, 70), format, backend=backend).dequantize().any()
    if get_format(format).affine:  # an offset holds a constant group
        constant = torch.full((3, 70), 0.3)
        packed = lk.quantize(constant, format, scale_dtype=torch.float32, backend=backend)
        assert torch.equal(packed.dequantize(), constant)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["nf4", "int4", "uniform4"])
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_extreme_magnitudes(magnitude, format, backend):
    weight = gaussian(4, 128)
    scaled = lk.quantize(weight * magnitude, format, scale_dtype=torch.float32, backend=backend)
    plain = lk.quantize(weight, format, scale_dtype=torch.float32, backend=backend)
    torch.testing.assert_close(scaled.dequantize() / magnitude, plain.dequantize(), rtol=1e-5, atol=1e-6)


def test_quantize_does_not_touch_the_weight():
    weight = gaussian(4, 128).requires_grad_()
    before = weight.detach().clone()
    packed = lk.quantize(weight, "int4")
    assert torch.equal(weight, before) and not packed.scale.requires_grad


class TestBadInput:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("format", ["nf4", "int4", "uniform2"])
    @pytest.mark.parametrize("search", [False, True])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, bad, search, format, backend):
        weight = gaussian(5, 130)
        weight[3, 129] = bad
        with pytest.raises(ValueError, match=f"weight holds {bad} in row 3, column 129"):
            lk.quantize(weight, format, scale_search=search, backend=backend)

    @pytest.mark.parametrize("format", ["nf4", "int4", "uniform4"])
    def test_scale_too_large(self, format):
        weight = gaussian(3, 64)
        weight[2, 5] = 3e7
        with pytest.raises(ValueError, match=r"row 2, group 0: .*3e\+07.*float16.*scale_dtype=torch.float32"):
            lk.quantize(weight, format)
        lk.quantize(weight, format, scale_dtype=torch.float32)

    def test_scale_too_small(self):
        """Scales that would round to zero lose the weights just as those that overflow."""
        weight = gaussian(3, 64) * 1e-9
        with pytest.raises(ValueError, match="row 0, group 0: .*float16.*scale_dtype=torch.float32"):
            lk.quantize(weight, "nf4")
        assert lk.quantize(weight, "nf4", scale_dtype=torch.bfloat16).dequantize().any()

    @pytest.mark.parametrize("name", ["nf5", "fp4"])
    def test_unknown_format(self, name):
        with pytest.raises(ValueError, match=f"unknown format '{name}'"):
            lk.quantize(gaussian(2, 64), name)

    @pytest.mark.parametrize("group_size", [48, 0, 1024])
    def test_group_size(self, group_size):
        with pytest.raises(ValueError, match=f"group_size={group_size}"):
            lk.quantize(gaussian(2, 64), "nf4", group_size)

    @pytest.mark.parametrize("scale_dtype", [torch.float64, torch.int8])
    def test_scale_dtype(self, scale_dtype):
        with pytest.raises(ValueError, match=f"scale_dtype={scale_dtype}"):
            lk.quantize(gaussian(2, 64), scale_dtype=scale_dtype)

    def test_meta(self):
        with pytest.raises(ValueError, match=r"weight \(3, 64\) is on the meta device"):
            lk.quantize(torch.empty(3, 64, device="meta"))

    def test_not_a_matrix_of_floats(self):
        with pytest.raises(TypeError, match="torch.int32"):
            lk.quantize(torch.ones(3, 64, dtype=torch.int32))
        with pytest.raises(TypeError, match="list"):
            lk.quantize([[1.0]])
        for shape in ((64,), (2, 3, 64)):
            with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
                lk.quantize(torch.ones(shape))

    def test_backend(self):
        with pytest.raises(ValueError, match="backend='cuda9'"):
            lk.quantize(gaussian(2, 64), backend="cuda9")
