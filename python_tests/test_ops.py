"""The ops: fakes, opcheck, bit-exact decode and an error budget against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import BACKENDS, DEVICES, DTYPES, FORMATS, SHAPES, adapter, gaussian, op_arguments, same_packed
from oracle import qlora_linear as exact_qlora_linear
from torch._subclasses import FakeTensorMode

import loftq_kernels as lk
from loftq_kernels.formats import get_format
from loftq_kernels.ops import extension, functional, schemas

OPS = torch.ops.loftq_kernels
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def samples(name: str, device: str = "cpu") -> list[tuple]:
    """Arguments for one op, awkward shapes and absent optional tensors included."""

    def packed(format: str, rows: int, columns: int, group_size: int = 64) -> lk.PackedTensor:
        return lk.quantize(gaussian(rows, columns, device=device), format, group_size)

    def quantize_options(format: str) -> tuple:
        fmt = get_format(format)
        return fmt.codebook(device), 32, fmt.scale_rule, torch.float16, format == "nf4"

    if name == "quantize":
        return [(gaussian(5, 130, device=device), *quantize_options(format)) for format in ("nf4", "int2", "uniform4")]
    if name == "quantize_residual_":
        return [
            (gaussian(5, 130, device=device), gaussian(5, 130, seed=1, device=device) / 4, *quantize_options(format))
            for format in ("nf4", "int2")
        ]
    if name == "dequantize":
        cases = [(packed("nf4", 5, 130), torch.float32), (packed("int2", 3, 70, -1), torch.bfloat16)]
        return [(*op_arguments(p), p.shape[1], p.group_size, dtype) for p, dtype in cases]
    if name in ("pack_codes", "unpack_codes"):
        sizes = [(2, 5, 130), (4, 3, 64), (8, 1, 1)]
        codes = [(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device), bits) for bits, n, k in sizes]
        return codes if name == "pack_codes" else [(OPS.pack_codes(c, bits), bits, c.shape[1]) for c, bits in codes]
    if name == "jacobi_svd":
        return [(gaussian(*shape, device=device),) for shape in [(3, 9, 5), (1, 4, 4), (2, 1, 1)]]
    if name in ("jacobi_eigh", "cholesky_inverse_factor"):
        roots = [gaussian(*shape, device=device) for shape in [(3, 9, 5), (1, 4, 4), (2, 1, 1)]]
        return [(root.mT @ root,) for root in roots]
    if name == "adapter_grad":
        sizes = [((5,), True, True), ((2, 3), False, True), ((0,), True, True), ((), True, False)]
        leaves = [
            (gaussian(*m, 130, device=device), gaussian(*m, 7, seed=1, device=device), *need) for m, *need in sizes
        ]
        return [(x, g, *adapter(7, 130, 3, device=device), 0.5, *need) for x, g, *need in leaves]
    if name == "qlora_linear_multi":
        p, x = packed("nf4", 7, 130), gaussian(4, 130, seed=3, device=device)
        lora = [
            torch.stack(pair) for pair in zip(*(adapter(7, 130, 3, seed=s, device=device) for s in (1, 5)), strict=True)
        ]
        ids = torch.tensor([1, -1, 0, 1], device=device)
        return [(x, *op_arguments(p), 64, *lora, ids, 0.5, None)]
    cases = []
    for format, rows, columns, group_size, rank, leading in [
        ("nf4", 7, 130, 64, 3, (5,)),
        ("int4", 5, 96, 32, 1, (2, 3)),
        ("nf2", 5, 64, -1, None, ()),
    ]:
        p = packed(format, rows, columns, group_size)
        lora = (None, None) if rank is None else adapter(rows, columns, rank, device=device)
        if name == "qlora_linear":
            bias = None if format == "int4" else gaussian(rows, seed=4, device=device)
            leaves = (gaussian(*leading, columns, seed=3, device=device), *lora, bias)
            x, lora_A, lora_B, bias = (t if t is None else t.requires_grad_() for t in leaves)
            cases.append((x, *op_arguments(p), group_size, lora_A, lora_B, 0.5, bias))
        else:
            leaves = (gaussian(*leading, rows, seed=3, device=device), *lora)
            grad, lora_A, lora_B = (t if t is None else t.requires_grad_() for t in leaves)
            cases.append((grad, *op_arguments(p), columns, group_size, lora_A, lora_B, 0.5))
    return cases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", schemas.names())
def test_opcheck(name, device):
    for args in samples(name, device):
        torch.library.opcheck(getattr(OPS, name), args, test_utils=TESTS)


@pytest.mark.parametrize("name", schemas.names())
def test_fake_is_like_the_real_one(name):
    for args in samples(name):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake_args = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in args]
            fakes = getattr(OPS, name)(*fake_args)
        with torch.no_grad():
            reals = getattr(OPS, name)(*args)
        fakes, reals = ((out,) if isinstance(out, torch.Tensor) else out for out in (fakes, reals))
        for fake, real in zip(fakes, reals, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            strides = zip(real.shape, fake.stride(), real.stride(), strict=True)
            assert all(mine == other for size, mine, other in strides if size > 1)


def test_names_lists_every_op():
    defined = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "loftq" in name}
    # These are defined where they are compiled.
    driver = {"loftq_number", "loftq_begin", "loftq_step", "loftq_results", "loftq_end"}
    assert defined - driver == set(schemas.names())
    assert extension.library is None or driver <= defined


class TestQuantizeResidual:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_is_quantize_and_subtract(self, format, dtype):
        weight, low_rank = gaussian(5, 130).to(dtype), gaussian(5, 130, seed=1) / 4
        fmt = get_format(format)
        options = (fmt.codebook(), 32, fmt.scale_rule, torch.float16, False)
        for kernels in (OPS, lk.ops.functional.reference):
            residual = low_rank.clone()
            codes, scale, offset, norm2 = kernels.quantize_residual_(weight, residual, *options)
            expected = lk.quantize(weight.float() - low_rank, format, 32)
            stored = lk.PackedTensor(
                codes, scale, offset if fmt.affine else None, fmt.codebook(), in_features=130, group_size=32, format=fmt
            )
            assert same_packed(stored, expected)
            assert torch.equal(residual, weight.float() - expected.dequantize())
            assert norm2.dtype == torch.float64
            assert norm2.item() == pytest.approx(residual.double().square().sum().item(), rel=1e-12)


class TestDecode:
    """One-hot activations without an adapter: the output is the decoded weight, bit for bit."""

    @pytest.mark.parametrize("backend", [None, *BACKENDS])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", FORMATS)
    def test_bit_exact(self, format, dtype, backend):
        for rows, columns in SHAPES:
            for group_size in (32, 128, -1):
                packed = lk.quantize(gaussian(rows, columns), format, group_size)
                y = lk.qlora_linear(torch.eye(columns, dtype=dtype), packed, backend=backend)
                assert torch.equal(y.T, packed.dequantize(dtype))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", FORMATS)
    def test_bit_exact_on_cuda(self, format, dtype):
        """Tensor cores are given weights rounded to the dtype of x; integers on the way there are exact, other code
        books in float16."""
        packed = lk.quantize(gaussian(7, 130), format).to("cuda")
        y = lk.qlora_linear(torch.eye(130, dtype=dtype, device="cuda"), packed).T
        if format.startswith("int"):
            assert torch.equal(y, packed.dequantize(dtype))
        exact = packed.dequantize(torch.float64)
        assert ((y.double() - exact).abs() <= (torch.finfo(dtype).eps / 2 + 2.0**-10) * exact.abs()).all()


def budget_case(packed, x, lora_A, lora_B, bias, scaling=0.5, backend=None):
    """The largest error of the op and of plain torch in the same dtype, both against float64; the largest output."""
    ours = lk.qlora_linear(x, packed, lora_A, lora_B, scaling=scaling, bias=bias, backend=backend)
    assert ours.dtype == x.dtype and ours.shape == (*x.shape[:-1], packed.shape[0])
    exact = exact_qlora_linear(x, packed, lora_A, lora_B, scaling, bias)
    weight = packed.dequantize(x.dtype)
    plain = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if lora_A is not None:
        plain = plain + scaling * (x @ lora_A.to(x.dtype).T) @ lora_B.to(x.dtype).T
    if ours.numel() == 0:
        return 0.0, 0.0, 0.0
    return *((y.double().cpu() - exact).abs().amax().item() for y in (ours, plain)), exact.abs().amax().item()


def assert_within_budget(case, dtype):
    """With an allowance of one rounding: the largest of a few dozen errors depends on the order of the sums."""
    ours, plain, largest = case
    assert ours <= 1.2 * plain + (8 + largest) * torch.finfo(dtype).eps, f"error {ours:.3g}, plain torch {plain:.3g}"


class TestErrorBudget:
    """err(op, float64) <= 1.2 err(torch at the same dtype, float64) + eps."""

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", FORMATS)
    def test_formats(self, format, dtype, device):
        for rows, columns, rank in [(7, 130, 3), (96, 256, 16), (33, 31, 31)]:  # the last rank is min(N, K) = 31
            packed = lk.quantize(gaussian(rows, columns, seed=rows), format, 64).to(device)
            lora_A, lora_B = adapter(rows, columns, rank, device=device)
            x = gaussian(5, columns, seed=2, device=device, dtype=dtype)
            bias = gaussian(rows, seed=5, device=device)
            assert_within_budget(budget_case(packed, x, lora_A, lora_B, bias), dtype)
            assert_within_budget(budget_case(packed, x, None, None, None), dtype)

    @pytest.mark.parametrize("backend", [None, *BACKENDS])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("leading", [(), (0,), (1,), (5,), (123,), (2, 3), (2, 0, 3), (1, 2, 1, 3)], ids=str)
    def test_leading_dimensions(self, leading, dtype, backend):
        packed = lk.quantize(gaussian(7, 130), "nf4")
        lora_A, lora_B = adapter(7, 130, 1)
        x = gaussian(*leading, 130, seed=2, dtype=dtype)
        assert_within_budget(budget_case(packed, x, lora_A, lora_B, gaussian(7, seed=5), backend=backend), dtype)

    @pytest.mark.parametrize("backend", [None, *BACKENDS])
    def test_strides(self, backend):
        """Transposed, expanded and sliced activations and adapters."""
        packed = lk.quantize(gaussian(7, 130), "int4")
        lora_A, lora_B = gaussian(130, 3).T, gaussian(3, 7).T
        views = [
            gaussian(130, 5).T,
            gaussian(1, 130).expand(4, 130),
            gaussian(5, 260)[:, ::2],
            gaussian(130, 4, 3).mT.T,
        ]
        for x in views[:3] + [views[3].permute(0, 2, 1).permute(1, 0, 2)[..., :1].expand(-1, -1, 130)]:
            assert not x.is_contiguous()
            bias = gaussian(14, seed=5)[::2]
            assert_within_budget(budget_case(packed, x, lora_A, lora_B, bias, backend=backend), x.dtype)

    def test_scaling_and_order_of_the_adapter(self):
        """A scaling of zero leaves the adapter out; doubling it doubles the adapter's part."""
        packed, x = lk.quantize(gaussian(7, 130)), gaussian(5, 130, dtype=torch.float64)
        lora = adapter(7, 130, 3, dtype=torch.float64)
        base, once, twice = (lk.qlora_linear(x, packed, *lora, scaling=s) for s in (0, 1, 2))
        assert torch.equal(base, lk.qlora_linear(x, packed))
        torch.testing.assert_close(twice - base, 2 * (once - base))
        torch.testing.assert_close(once, exact_qlora_linear(x, packed, *lora))

    def test_float64_is_exact(self):
        packed, x = lk.quantize(gaussian(9, 300), "int2"), gaussian(4, 300, dtype=torch.float64)
        torch.testing.assert_close(lk.qlora_linear(x, packed), exact_qlora_linear(x, packed), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """As nn.Linear: float32 in, autocast's dtype out; float64 is left alone; nothing changes outside."""
    packed, lora = lk.quantize(gaussian(7, 130)), adapter(7, 130, 3)
    x, bias = gaussian(5, 130), gaussian(7)
    with torch.autocast("cpu", dtype=dtype):
        y = lk.qlora_linear(x, packed, *lora, bias=bias)
        y64 = lk.qlora_linear(x.double(), packed, *lora, bias=bias)
        linear = torch.nn.functional.linear(x, packed.dequantize(), bias)
    assert y.dtype == linear.dtype == dtype and y64.dtype == torch.float64
    assert torch.equal(y, lk.qlora_linear(x.to(dtype), packed, *lora, bias=bias))
    assert lk.qlora_linear(x, packed).dtype == torch.float32


def test_meta_tensors_give_shapes():
    packed = lk.quantize(gaussian(7, 130)).to("meta")
    y = lk.qlora_linear(torch.zeros(2, 3, 130, device="meta"), packed, bias=torch.zeros(7, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 7)
    assert packed.dequantize(torch.float16).shape == (7, 130)


@pytest.mark.parametrize("name", ["qlora_linear", "qlora_linear_grad_input"])
def test_operands_are_not_changed(name):
    for args in samples(name):
        before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        getattr(OPS, name)(*args)
        for now, old in zip(args, before, strict=True):
            assert not isinstance(now, torch.Tensor) or torch.equal(now, old)


class TestBadInput:
    @pytest.fixture
    def packed(self):
        return lk.quantize(gaussian(7, 130))

    @pytest.mark.parametrize("shape", [(5, 129), (130, 5), (131,), ()])
    def test_width_of_x(self, packed, shape):
        with pytest.raises(ValueError) as error:
            lk.qlora_linear(torch.zeros(shape), packed)
        assert str(shape) in str(error.value) and "in_features=130" in str(error.value)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
    def test_integer_x(self, packed, dtype):
        with pytest.raises(TypeError, match=str(dtype)):
            lk.qlora_linear(torch.ones(5, 130, dtype=dtype), packed)

    def test_x_is_no_tensor(self, packed):
        with pytest.raises(TypeError, match="list"):
            lk.qlora_linear([[0.0] * 130], packed)

    def test_adapter(self, packed):
        x, (lora_A, lora_B) = gaussian(5, 130), adapter(7, 130, 3)
        with pytest.raises(ValueError, match="together"):
            lk.qlora_linear(x, packed, lora_A)
        with pytest.raises(ValueError, match=r"lora_A has shape \(3, 129\)"):
            lk.qlora_linear(x, packed, lora_A[:, 1:], lora_B)
        with pytest.raises(ValueError, match=r"lora_B has shape \(7, 2\), expected \(7, 3\)"):
            lk.qlora_linear(x, packed, lora_A, lora_B[:, 1:])
        with pytest.raises(TypeError, match="lora_A.*torch.int64"):
            lk.qlora_linear(x, packed, lora_A.long(), lora_B)

    def test_bias(self, packed):
        with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(7,\)"):
            lk.qlora_linear(gaussian(5, 130), packed, bias=torch.zeros(6))

    def test_device(self, packed):
        with pytest.raises(ValueError, match="meta.*cpu"):
            lk.qlora_linear(torch.zeros(5, 130, device="meta"), packed)

    def test_backend(self, packed):
        with pytest.raises(ValueError, match="backend='tpu'"):
            lk.qlora_linear(gaussian(5, 130), packed, backend="tpu")

    def test_cpu_backend_needs_cpu_tensors(self, packed):
        if "cpu" in BACKENDS:
            with pytest.raises(ValueError, match="meta"):
                lk.qlora_linear(torch.zeros(5, 130, device="meta"), packed.to("meta"), backend="cpu")
        else:
            with pytest.raises(RuntimeError, match="build"):
                lk.qlora_linear(gaussian(5, 130), packed, backend="cpu")

    def test_stored_tensors_that_do_not_agree(self, packed):
        """The raw ops are reachable by anyone with torch.ops: a wrong size is an error there, never a wild read."""
        codes, scale, offset, codebook = op_arguments(packed)
        bad = [
            (codes[:, :-1], scale, offset, codebook),
            (codes, scale[:, :-1], offset, codebook),
            (codes, scale[:-1], offset, codebook),
            (codes, scale, scale[:, :1], codebook),
            (codes, scale, offset, codebook[:-1]),
            (codes.to(torch.int32), scale, offset, codebook),
        ]
        for arguments in bad:
            with pytest.raises((ValueError, RuntimeError)):
                lk.ops.dequantize_tensors(*arguments, 130, 64, torch.float32)
            if extension.library is not None:
                with pytest.raises((ValueError, RuntimeError)):
                    OPS.dequantize(*arguments, 130, 64, torch.float32)


@pytest.mark.skipif(extension.library is None, reason="compares the extension with the reference; it is not built")
def test_extension_serves_cpu_tensors():
    """The dispatcher's CPU kernels are the compiled ones, for the ops that have one."""
    compiled = {"quantize", "quantize_residual_", "dequantize", "pack_codes", "unpack_codes"}
    compiled |= {"qlora_linear", "qlora_linear_grad_input", "adapter_grad"}
    for name in compiled:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"loftq_kernels::{name}", "CPU"), name


@pytest.mark.skipif(extension.library is None, reason="the reference takes any: the extension is not built")
def test_float64_scales_are_refused():
    """The wrappers round float64 scales, and the kernels, which sum narrower ones, refuse them."""
    packed, x = lk.quantize(gaussian(7, 130), "int4"), gaussian(3, 130)
    stored = packed.codes, packed.scale.double(), packed.offset.double(), packed.codebook
    ops = torch.ops.loftq_kernels
    for call in (
        lambda: ops.qlora_linear(x, *stored, 64, None, None, 1.0, None),
        lambda: ops.qlora_linear_grad_input(x[:, :7], *stored, 130, 64, None, None, 1.0),
        lambda: ops.dequantize(*stored, 130, 64, torch.float32),
    ):
        with pytest.raises(ValueError, match="scale has dtype float64"):
            call()


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("argument", range(5))
def test_subclasses_go_through_the_dispatcher(argument):
    """The short cut is for plain tensors: a subclass has its own way with an op."""
    arguments = plain_arguments()
    with torch.no_grad():
        assert functional._is_unseen(*arguments) and functional._is_unseen(*arguments[:2], None, None, None)
        arguments[argument] = arguments[argument].as_subclass(Subclass)
        assert not functional._is_unseen(*arguments)


def plain_arguments() -> list[torch.Tensor]:
    packed, (lora_A, lora_B) = lk.quantize(gaussian(7, 130)), adapter(7, 130, 3)
    return [gaussian(3, 130), packed.codes, torch.nn.Parameter(lora_A), torch.nn.Parameter(lora_B), gaussian(7)]


class TestShortCut:
    """Where nobody else has to see the product, the kernel is called below the dispatcher's derivatives."""

    def test_the_same_bits(self):
        packed = lk.quantize(gaussian(7, 130))
        x, (lora_A, lora_B), bias = gaussian(3, 130), adapter(7, 130, 3), gaussian(7)
        stored = packed.codes, packed.scale, packed.offset, packed.codebook, 64, lora_A, lora_B, 0.5, bias
        with torch.no_grad():
            assert functional._product(x, packed.codes, lora_A, lora_B, bias) is functional._below_autograd
            y = functional.linear_tensors(x, *stored, in_features=130)
        assert torch.equal(y, torch.ops.loftq_kernels.qlora_linear(x, *stored)) and not y.requires_grad

    @pytest.mark.parametrize("argument", (0, 2, 3, 4))
    def test_not_where_a_gradient_is_wanted(self, argument):
        arguments = [tensor.detach() for tensor in plain_arguments()]
        assert functional._is_unseen(*arguments)
        arguments[argument].requires_grad_(True)
        assert not functional._is_unseen(*arguments)
        with torch.no_grad():
            assert functional._is_unseen(*arguments)

    def test_not_under_a_mode(self):
        arguments = [tensor.detach() for tensor in plain_arguments()]
        with torch.autograd.forward_ad.dual_level():
            assert not functional._is_unseen(*arguments)
        with torch.utils._python_dispatch.TorchDispatchMode():
            assert not functional._is_unseen(*arguments)
        seen = []
        torch.func.vmap(lambda x: seen.append(functional._is_unseen(arguments[0], *arguments[1:])) or x)(arguments[0])
        assert seen == [False]

    def test_errors_give_the_reason(self):
        packed = lk.quantize(gaussian(7, 130))
        with torch.no_grad(), pytest.raises(ValueError, match=r"bias .*\(8,\)"):
            lk.qlora_linear(gaussian(3, 130), packed, bias=torch.zeros(8))
