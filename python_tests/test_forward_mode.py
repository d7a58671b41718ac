"""`torch.func` and forward-mode derivatives: those of the dense twin, which is plain torch in float64."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fwd
from helpers import DEVICES, FORMATS, adapter, gaussian, op_arguments
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import loftq_kernels as lk
from loftq_kernels.ops.convolution import ConvGeometry, conv_tensors

OPS = torch.ops.loftq_kernels
SCALING = 0.5
SHAPES = [(1, 1, 1, ()), (3, 31, 2, (2,)), (5, 70, 2, (2, 2)), (3, 33, 1, (0,))]  # N, K, r, leading


def arguments(rows=5, columns=70, rank=2, leading=(3,), dtype=torch.float64, device="cpu", seed=3):
    """x, lora_A, lora_B and bias, of a size that keeps tanh of the output from saturating."""
    x = gaussian(*leading, columns, seed=seed, dtype=dtype, device=device) / columns**0.5
    lora = adapter(rows, columns, rank, seed=seed + 1, dtype=dtype, device=device)
    return x, *lora, gaussian(rows, seed=seed + 3, dtype=dtype, device=device)


def pair(packed):
    """tanh of the op and of its twin, as functions of x, lora_A, lora_B and bias; tanh has derivatives of any order."""
    dense = packed.dequantize(torch.float64)

    def ours(x, lora_A, lora_B, bias):
        return lk.qlora_linear(x, packed, lora_A, lora_B, scaling=SCALING, bias=bias).tanh()

    def twin(x, lora_A, lora_B, bias):
        return (x @ dense.T + SCALING * (x @ lora_A.T) @ lora_B.T + bias).tanh()

    return ours, twin


def grad_input_pair(packed):
    dense = packed.dequantize(torch.float64)

    def ours(g, lora_A, lora_B):
        weight = *op_arguments(packed), packed.shape[1], packed.group_size
        return OPS.qlora_linear_grad_input(g, *weight, lora_A, lora_B, SCALING).tanh()

    def twin(g, lora_A, lora_B):
        return (g @ dense + SCALING * (g @ lora_B) @ lora_A).tanh()

    return ours, twin


def total(f):
    return lambda *args: f(*args).sum()


def all_of(args):
    return tuple(range(len(args)))


def along(f, args, tangents):
    return jvp(f, args, tangents)[1]


def linearized(f, args, tangents):
    y, push = linearize(f, *args)
    return y, push(*tangents)


def dual(f, args, tangents):
    with fwd.dual_level():
        return tuple(fwd.unpack_dual(f(*map(fwd.make_dual, args, tangents))))


def reverse_over_dual(f, args, tangents):
    leaves = [arg.clone().requires_grad_() for arg in args]
    with fwd.dual_level():
        tangent = fwd.unpack_dual(f(*map(fwd.make_dual, leaves, tangents))).tangent
        return torch.autograd.grad(tangent.sum(), leaves)


def dual_over_reverse(f, args, tangents):
    leaves = [arg.clone().requires_grad_() for arg in args]
    with fwd.dual_level():
        duals = list(map(fwd.make_dual, leaves, tangents))
        return [tuple(fwd.unpack_dual(g)) for g in torch.autograd.grad(f(*duals).sum(), duals, create_graph=True)]


TRANSFORMS = {
    "jvp": jvp,
    "vjp": lambda f, args, t: (lambda y, pull: pull(torch.ones_like(y)))(*vjp(f, *args)),
    "linearize": linearized,
    "dual_level": dual,
    "reverse_over_dual": reverse_over_dual,
    "dual_over_reverse": dual_over_reverse,
    "jacfwd": lambda f, args, t: jacfwd(f, all_of(args))(*args),
    "jacrev": lambda f, args, t: jacrev(f, all_of(args))(*args),
    "hvp": lambda f, args, t: along(grad(total(f), all_of(args)), args, t),
    "hvp_by_reverse": lambda f, args, t: grad(lambda *a: along(total(f), a, t), all_of(args))(*args),
    "third": lambda f, args, t: along(
        lambda *a: along(lambda *b: along(f, b, t), a, tree_map(torch.sin, t)), args, tree_map(torch.cos, t)
    ),
}


def compare(ours, twin, tolerance=1e-10):
    """Every tensor of the two results, to a tolerance of the largest entry of the twin's."""
    mine, theirs = tree_leaves(ours), tree_leaves(twin)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        if b.numel():
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * (1 + b.abs().max().item()))


class TestLinear:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_is_the_dense_twin(self, transform, shape):
        rows, columns, _, _ = shape
        f, twin = pair(lk.quantize(gaussian(rows, columns), "nf4", 32))
        args, tangents = arguments(*shape), arguments(*shape, seed=20)
        compare(TRANSFORMS[transform](f, args, tangents), TRANSFORMS[transform](twin, args, tangents))

    @pytest.mark.parametrize("format", FORMATS)
    def test_formats(self, format):
        f, twin = pair(lk.quantize(gaussian(5, 70), format, 32))
        args, tangents = arguments(), arguments(seed=20)
        for transform in ("jvp", "hvp"):
            compare(TRANSFORMS[transform](f, args, tangents), TRANSFORMS[transform](twin, args, tangents))

    @pytest.mark.parametrize("second", [False, True], ids=["hessian", "jacfwd of jacfwd"])
    def test_hessian(self, second):
        """Two forward modes, one in the other: https://github.com/pytorch/pytorch/issues/197867."""
        transform = (lambda f, n: jacfwd(jacfwd(f, n), n)) if second else hessian
        f, twin = pair(lk.quantize(gaussian(3, 33), "int4", 32))
        args = arguments(3, 33, 1, ())
        compare(transform(total(f), all_of(args))(*args), transform(total(twin), all_of(args))(*args))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("transform", ["jvp", "vjp", "hvp", "dual_level"])
    def test_dtypes(self, transform, dtype, device):
        """The tangents are of the dtypes of the primals; adapters stay float32."""
        packed = lk.quantize(gaussian(5, 70), "nf4").to(device)
        f, twin = pair(packed)

        def cast(x, *rest):
            return x.to(dtype), *(t.float() for t in rest)

        args, tangents = (cast(*arguments(seed=seed, device=device)) for seed in (3, 20))
        mine = TRANSFORMS[transform](f, args, tangents)
        exact = TRANSFORMS[transform](twin, *(tuple(t.double() for t in ts) for ts in (args, tangents)))
        compare(mine, exact, 20 * torch.finfo(dtype).eps)
        assert tree_leaves(mine)[0].dtype == dtype

    @pytest.mark.parametrize("kept", range(4))
    def test_one_tangent(self, kept):
        f, twin = pair(lk.quantize(gaussian(5, 70)))
        args, tangent = list(arguments()), arguments(seed=20)[kept]

        def of_one(function):
            return lambda t: function(*args[:kept], t, *args[kept + 1 :])

        compare(jvp(of_one(f), (args[kept],), (tangent,)), jvp(of_one(twin), (args[kept],), (tangent,)))

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_without_adapter(self, with_bias):
        packed, (x, _, _, bias) = lk.quantize(gaussian(5, 70)), arguments()
        tangent, dense = gaussian(*x.shape, seed=8, dtype=torch.float64), packed.dequantize(torch.float64)
        bias = bias if with_bias else None
        y, y_t = jvp(lambda x: lk.qlora_linear(x, packed, bias=bias), (x,), (tangent,))
        compare((y, y_t), (torch.nn.functional.linear(x, dense, bias), tangent @ dense.T))

    def test_no_tangent_makes_none(self):
        f, _ = pair(lk.quantize(gaussian(5, 70)))
        with fwd.dual_level():
            assert fwd.unpack_dual(f(*arguments())).tangent is None

    def test_gradcheck(self):
        f, _ = pair(lk.quantize(gaussian(3, 33), "nf4", 32))
        leaves = [t.requires_grad_() for t in arguments(3, 33, 2, (2,))]
        assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(f, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)

    def test_what_it_keeps(self):
        """An x that no derivative needs is not kept alive, for the forward mode either."""
        packed, (x, lora_A, lora_B, _) = lk.quantize(gaussian(5, 70)), arguments()
        hidden = x.requires_grad_() * 2
        alive = weakref.ref(hidden)
        y = lk.qlora_linear(hidden, packed, lora_A, lora_B)
        del hidden
        gc.collect()
        assert y.requires_grad and alive() is None


class TestGradInput:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_is_the_dense_twin(self, transform):
        f, twin = grad_input_pair(lk.quantize(gaussian(5, 70), "int2", 32))
        args, tangents = ((gaussian(2, 3, 5, seed=s, dtype=torch.float64) / 4, *arguments(seed=s)[1:3]) for s in (4, 5))
        args = args[0], args[1] / 8, args[2]
        compare(TRANSFORMS[transform](f, args, tangents), TRANSFORMS[transform](twin, args, tangents))

    @pytest.mark.parametrize(
        "in_dims", [(0, None, None), (1, 0, None), (None, None, 0), (None, 1, 2), (0, 0, 0)], ids=str
    )
    def test_vmap(self, in_dims):
        f, twin = grad_input_pair(lk.quantize(gaussian(5, 70), "int2", 32))
        args = stacked((gaussian(2, 5, seed=4, dtype=torch.float64), *arguments()[1:3]), in_dims)
        compare(vmap(f, in_dims)(*args), vmap(twin, in_dims)(*args))


def stacked(args, in_dims, samples=3):
    """args with a dimension of different samples where in_dims says."""
    factors = torch.linspace(-1, 2, samples, dtype=torch.float64)
    return tuple(
        arg if dim is None else torch.stack([arg * f.to(arg.dtype) for f in factors], dim)
        for arg, dim in zip(args, in_dims, strict=True)
    )


class TestVmap:
    MAPS = [(0, None, None, None), (2, None, None, None), (None, 0, 0, 0), (None, None, None, 0), (1, None, 1, None)]

    @pytest.mark.parametrize("leading", [(), (4,), (2, 2)], ids=str)
    @pytest.mark.parametrize("in_dims", MAPS, ids=str)
    def test_is_the_dense_twin(self, in_dims, leading):
        in_dims = tuple(None if dim is None else min(dim, len(leading)) for dim in in_dims)
        f, twin = pair(lk.quantize(gaussian(5, 70), "nf4", 32))
        args = stacked(arguments(leading=leading), in_dims)
        compare(vmap(f, in_dims)(*args), vmap(twin, in_dims)(*args))
        wanted = tuple(range(4))
        compare(vmap(grad(total(f), wanted), in_dims)(*args), vmap(grad(total(twin), wanted), in_dims)(*args))
        mapped_inside = (grad(lambda *a, g=g: vmap(g, in_dims)(*a).sum(), wanted)(*args) for g in (f, twin))
        compare(*mapped_inside)

    def test_twice(self):
        f, twin = pair(lk.quantize(gaussian(5, 70)))
        x, *rest = arguments(leading=(3, 2))
        both = [vmap(vmap(g, (0, None, None, None)), (0, None, None, None))(x, *rest) for g in (f, twin)]
        compare(*both)

    def test_over_weights(self):
        """Layers stacked as by torch.func.stack_module_state: each sample has a weight of its own."""
        weights = [lk.quantize(gaussian(5, 70, seed=s), "int4", 32) for s in range(3)]
        codes, scale, offset, codebook = (torch.stack(ts) for ts in zip(*map(op_arguments, weights), strict=True))
        x, lora_A, lora_B, bias = arguments()

        def op(codes, scale, offset, x):
            return OPS.qlora_linear(x, codes, scale, offset, codebook[0], 32, lora_A, lora_B, SCALING, bias).tanh()

        expected = torch.stack([pair(packed)[1](x, lora_A, lora_B, bias) for packed in weights])
        compare(vmap(op, (0, 0, 0, None))(codes, scale, offset, x), expected)
        ours = vmap(lambda *w: along(lambda x: op(*w, x), (x,), (x,)), (0, 0, 0))(codes, scale, offset)
        compare(
            ours, torch.stack([along(lambda x, p=p: pair(p)[1](x, lora_A, lora_B, bias), (x,), (x,)) for p in weights])
        )

        def decode(codes, scale, offset, codebook):
            return OPS.dequantize(codes, scale, offset, codebook, 70, 32, torch.float32)

        dense = torch.stack([packed.dequantize() for packed in weights])
        for dims in ((0, 0, 0, None), (0, 0, 0, 0)):
            assert torch.equal(
                vmap(decode, dims)(codes, scale, offset, codebook[0] if dims[3] is None else codebook), dense
            )
        one_scale = vmap(decode, (0, None, None, None))(codes, scale[0], offset[0], codebook[0])
        assert torch.equal(one_scale[0], dense[0]) and not torch.equal(one_scale[1], dense[1])


def dense_linear(layer):
    """A QuantLoRALinear as a plain function of its parameters and x, in float64."""
    dense = layer.packed.dequantize(torch.float64)

    def twin(params, x):
        seen = x
        if layer.adapter == "qalora":
            width = layer.group_size
            groups = [x[..., i : i + width].mean(-1) for i in range(0, x.shape[-1], width)]
            seen = torch.stack(groups, -1)
        return x @ dense.T + layer.scaling * (seen @ params["lora_A"].T) @ params["lora_B"].T + params["bias"]

    return twin


@pytest.mark.parametrize("adapter", ["lora", "qalora"])
class TestModule:
    def make(self, adapter):
        torch.manual_seed(0)
        linear = torch.nn.Linear(64, 7).double()
        layer = lk.QuantLoRALinear.from_linear(
            linear, lk.QuantConfig(format="int4", group_size=32, rank=2, num_iter=1, adapter=adapter)
        )
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        params = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
        params.setdefault("bias", layer.bias.detach())
        return layer, params, gaussian(5, 64, seed=6, dtype=torch.float64) / 8

    def test_per_sample_gradients(self, adapter):
        layer, params, xs = self.make(adapter)
        twin = dense_linear(layer)
        ours = vmap(grad(lambda p, x: functional_call(layer, p, (x,)).tanh().sum()), (None, 0))(params, xs)
        theirs = vmap(grad(lambda p, x: twin(p, x).tanh().sum()), (None, 0))(params, xs)
        assert ours.keys() == theirs.keys() == {"lora_A", "lora_B", "bias"}
        compare(ours, theirs)

    def test_forward_mode(self, adapter):
        layer, params, xs = self.make(adapter)
        twin = dense_linear(layer)
        functions = [lambda p, x: functional_call(layer, p, (x,)).tanh(), lambda p, x: twin(p, x).tanh()]
        tangents = {name: torch.cos(p) for name, p in params.items()}, xs.sin()
        compare(*(jvp(f, (params, xs), tangents) for f in functions))
        compare(*(jacfwd(f)(params, xs) for f in functions))
        compare(*(hessian(total(f))(params, xs) for f in functions))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "geometry",
    [{"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 2), "stride": 2, "groups": 2, "padding_mode": "replicate"}],
    ids=str,
)
def test_convolution(geometry, transform):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, padding=geometry.pop("padding", (1, 0)), **geometry).double()
    layer = lk.QuantLoRAConv2d.from_conv(conv, lk.QuantConfig("nf4", rank=2, num_iter=1))
    dense = layer.merged_conv().double()
    args, tangents = ((gaussian(2, 4, 5, 4, seed=s, dtype=torch.float64),) for s in (1, 2))
    mine, theirs = (TRANSFORMS[transform](lambda x, m=m: m(x).tanh(), args, tangents) for m in (layer, dense))
    compare(mine, theirs)
    per_sample = (vmap(grad(lambda x, m=m: m(x).tanh().sum()))(args[0]) for m in (layer, dense))
    compare(*per_sample)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_embedding(transform):
    torch.manual_seed(0)
    table = torch.nn.Embedding(11, 70, padding_idx=2).double()
    layer = lk.QuantLoRAEmbedding.from_embedding(table, lk.QuantConfig(rank=2, num_iter=1))
    dense, indices = layer.packed.dequantize(torch.float64), torch.tensor([[1, 2, 4], [1, 1, 10]])

    def ours(lora_A, lora_B, indices=indices):
        return functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (indices,)).tanh()

    def twin(lora_A, lora_B, indices=indices):
        rows = torch.nn.functional.embedding(indices, lora_B, 2)
        return (dense[indices] + layer.scaling * rows @ lora_A).tanh()

    args = layer.lora_A.detach(), layer.lora_B.detach()
    tangents = tuple(map(torch.cos, args))
    compare(TRANSFORMS[transform](ours, args, tangents), TRANSFORMS[transform](twin, args, tangents))
    per_sample = (vmap(grad(total(f), (0, 1)), (None, None, 0))(*args, indices) for f in (ours, twin))
    compare(*per_sample)


class TestConstants:
    """What the packed weight is made of has no derivative: asking for one raises, forward and backward."""

    @pytest.fixture(params=["qlora_linear", "qlora_linear_grad_input", "dequantize", "conv"])
    def op(self, request):
        packed, (x, lora_A, lora_B, _) = lk.quantize(gaussian(5, 70), "int4", 32), arguments(dtype=torch.float32)
        codes, *constants = op_arguments(packed)
        calls = {
            "qlora_linear": lambda *c: OPS.qlora_linear(x, codes, *c, 32, lora_A, lora_B, 0.5, None),
            "qlora_linear_grad_input": lambda *c: OPS.qlora_linear_grad_input(
                x[:, :5], codes, *c, 70, 32, lora_A, lora_B, 0.5
            ),
            "dequantize": lambda *c: OPS.dequantize(codes, *c, 70, 32, torch.float32),
            "conv": lambda *c: conv_tensors(
                x[:, :, None], codes, *c, None, ConvGeometry((70, 1), 32, (1,), (0,), (1,), 1)
            ),
        }
        return calls[request.param], [t.float() for t in constants]

    @pytest.mark.parametrize("which", ["scale", "offset", "codebook"])
    def test_raise(self, op, which):
        call, constants = op
        place = ["scale", "offset", "codebook"].index(which)

        def of_one(t):
            return call(*constants[:place], t, *constants[place + 1 :])

        one = constants[place]
        with pytest.raises(RuntimeError, match=f"no derivative with respect to its {which}; detach"):
            jvp(of_one, (one,), (one,))
        with pytest.raises(RuntimeError, match=f"no derivative with respect to its {which}; detach"):
            grad(total(of_one))(one)
        with pytest.raises(RuntimeError, match=f"no derivative with respect to its {which}; detach"):
            of_one(one.clone().requires_grad_()).sum().backward()
        with fwd.dual_level(), pytest.raises(RuntimeError, match=which):
            of_one(fwd.make_dual(one, one))
        with torch.no_grad():
            of_one(one.clone().requires_grad_())


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
class TestAdapterIds:
    def call(self, backend=None):
        packed, ids = lk.quantize(gaussian(5, 70)), torch.tensor([0])
        lora_A, lora_B = (torch.stack([t, t]) for t in arguments(dtype=torch.float32)[1:3])
        return lambda x: lk.qlora_linear(x, packed, lora_A, lora_B, adapter_ids=ids, backend=backend)

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_raises_for_tangents(self, backend):
        call, x = self.call(backend), gaussian(1, 70)
        for ask in (
            lambda: jvp(call, (x,), (x,)),
            lambda: jacfwd(call)(x),
            lambda: grad(total(call))(x),
            lambda: dual(call, (x,), (x,)),
        ):
            with pytest.raises(RuntimeError, match="adapter_ids is for inference: x would need a gradient or carries"):
                ask()
        assert torch.equal(call(x), self.call()(x)) or backend

    def test_raises_when_compiled(self):
        compiled = torch.compile(self.call(), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="adapter_ids is for inference: x would"):
            compiled(gaussian(1, 70).requires_grad_())

    def test_raises_below_a_vmap(self):
        """There the wrapper sees no gradient: it belongs to a transform further out."""
        call, x = vmap(self.call()), gaussian(3, 1, 70)
        for ask in (lambda: jvp(call, (x,), (x,)), lambda: grad(total(call))(x)):
            with pytest.raises(RuntimeError, match="adapter_ids is for inference: x would"):
                ask()


@pytest.mark.usefixtures("_fresh_dynamo")
class TestTraced:
    @pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "hvp", "dual_level"])
    def test_compiled(self, transform):
        f, twin = pair(lk.quantize(gaussian(5, 70), "nf4", 32))
        args, tangents = arguments(), arguments(seed=20)
        compiled = torch.compile(
            lambda args, tangents: TRANSFORMS[transform](f, args, tangents), fullgraph=True, backend="aot_eager"
        )
        compare(compiled(args, tangents), TRANSFORMS[transform](twin, args, tangents))

    def test_compiled_per_sample(self):
        f, twin = pair(lk.quantize(gaussian(5, 70), "nf4", 32))

        def per_sample(g):
            return vmap(grad(total(g), (1, 2)), (0, None, None, None))

        compiled = torch.compile(lambda *args: per_sample(f)(*args), fullgraph=True, backend="aot_eager")
        compare(compiled(*arguments()), per_sample(twin)(*arguments()))

    @pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
    def test_functionalize(self, remove):
        f, twin = pair(lk.quantize(gaussian(5, 70)))
        compare(torch.func.functionalize(f, remove=remove)(*arguments()), twin(*arguments()))
        inside = grad(total(torch.func.functionalize(f, remove=remove)))(*arguments())
        compare(inside, grad(total(twin))(*arguments()))


STATISTICS = lk.InputStatistics.from_inputs(gaussian(90, 70))
INITIALIZERS = {
    "quantize": lambda w: lk.quantize(w),
    "qlora": lambda w: lk.qlora_init(w, rank=4).packed,
    "loftq": lambda w: lk.loftq_init(w, rank=4, num_iter=1).packed,
    "qalora": lambda w: lk.qalora_init(w, rank=1, num_iter=1).packed,
    "eora": lambda w: lk.eora_init(w, STATISTICS, rank=4).packed,
    "aser": lambda w: lk.aser_init(w, STATISTICS, rank=4).packed,
}


@pytest.mark.parametrize("name", INITIALIZERS)
class TestQuantizing:
    """Choosing codes has no derivative: refused, where it would be zero or fail inside."""

    def decoded(self, name: str):
        return lambda w: INITIALIZERS[name](w).dequantize()

    def test_transforms(self, name):
        f, w = self.decoded(name), gaussian(70, 70)
        for run in (
            lambda: jvp(f, (w,), (w,)),
            lambda: grad(lambda w: f(w).sum())(w),
            lambda: vjp(f, w),
            lambda: jacfwd(f)(w),
        ):
            with pytest.raises(RuntimeError, match=r"is an argument of a transform of torch\.func.*quantize outside"):
                run()

    def test_a_tangent(self, name):
        w = gaussian(70, 70)
        with fwd.dual_level(), pytest.raises(RuntimeError, match="carries a tangent.*has no derivative"):
            self.decoded(name)(fwd.make_dual(w, w))

    def test_constants_within_a_transform(self, name):
        """The derivative in x of a product with a weight that is quantized on the way."""
        w, x = gaussian(70, 70), gaussian(3, 70)
        f = self.decoded(name)
        torch.manual_seed(0)
        torch.testing.assert_close(grad(lambda x: (x @ f(w)).sum())(x), f(w).sum(1).expand(3, -1))

    def test_a_weight_that_requires_a_gradient(self, name):
        w = gaussian(70, 70)
        f = self.decoded(name)
        result = f(w.clone().requires_grad_())
        assert not result.requires_grad and torch.equal(result, f(w))
