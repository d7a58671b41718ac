"""Several adapters on one layer are one term: one call of the op, with the values and gradients of their sum."""

from __future__ import annotations

import pytest
import torch
from helpers import adapter, gaussian
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk
from loftq_kernels.nn.kept import forget
from loftq_kernels.nn.stacking import Factors, concatenated

OUT, IN = 48, 130  # the last group of 64 is cut short


class Calls(TorchDispatchMode):
    """Names of the calls that reach a device: ours, and every product and concatenation of torch."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "loftq_kernels" or name in ("mm", "addmm", "bmm", "matmul", "cat"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def calls_of(run) -> list[str]:
    with Calls() as calls:
        run()
    return calls.names


def make_layer(start: str | None = "lora", *, dtype=torch.float32) -> lk.QuantLoRALinear:
    """With a start adapter of scaling 0.5, of either kind, or none."""
    linear = torch.nn.Linear(IN, OUT, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(gaussian(OUT, IN))
    options = {} if start is None else {"adapter": start}
    layer = lk.QuantLoRALinear.from_linear(
        linear, lk.LayerConfig(rank=None if start is None else 2, adapter_dtype=dtype, init="qlora", **options)
    )
    if start is not None:
        layer.scaling = 0.5
        torch.nn.init.normal_(layer.lora_B)
    return layer


def users(*dtypes: torch.dtype, trained: bool = False) -> list[Factors]:
    """Adapters of ranks 3, 5, ... and scalings 2, 0.25, ..."""
    made = []
    for i, dtype in enumerate(dtypes or (torch.float32, torch.float32)):
        pair = adapter(OUT, IN, 3 + 2 * i, seed=10 + 3 * i, dtype=dtype)
        made.append(Factors(*(factor.requires_grad_(trained) for factor in pair), 2.0 * 0.125**i))
    return made


def expected(layer, x, more):
    """In float64, term by term."""
    x = x.double()
    y = x @ layer.dequantize(torch.float64).T + layer.bias.double()
    if layer.has_adapter:
        y = y + layer.scaling * (x @ layer.over_columns(layer.lora_A.double()).T) @ layer.lora_B.double().T
    for lora_A, lora_B, scaling in more:
        y = y + scaling * (x @ lora_A.double().T) @ lora_B.double().T
    return y


class TestValues:
    @pytest.mark.parametrize("start", ["lora", "qalora", None, "disabled"])
    def test_is_the_sum_of_the_terms(self, start):
        layer, more, x = make_layer("lora" if start == "disabled" else start), users(), gaussian(3, IN)
        if start == "disabled":
            layer.disable_adapter()
        with torch.no_grad():
            for given in ([], more[:1], more):
                y = layer.product(x, layer.bias, more=given)
                torch.testing.assert_close(y.double(), expected(layer, x, given), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("own", "first", "second"),
        [
            (torch.float32, torch.float16, torch.bfloat16),
            (torch.bfloat16, torch.float32, torch.float32),
            (torch.float16, torch.float16, torch.float16),
        ],
    )
    def test_dtypes_differ(self, own, first, second):
        layer, more = make_layer(), users(first, second)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(own), layer.lora_B.data.to(own)
        x = gaussian(4, IN)
        with torch.no_grad():
            y = layer.product(x, layer.bias, more=more)
        assert y.dtype == torch.float32
        # Every lora_B times its scaling was rounded to the common dtype; those here are powers of two.
        torch.testing.assert_close(y.double(), expected(layer, x, more), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_scalings_that_round(self, dtype):
        """7 / 4 times a bfloat16 is none: the product is rounded to float32."""
        layer, more, x = make_layer(), [one._replace(scaling=1.75) for one in users(dtype, dtype)], gaussian(4, IN)
        assert concatenated(more).lora_B.dtype == torch.float32
        with torch.no_grad():
            y = layer.product(x, layer.bias, more=more)
        torch.testing.assert_close(y.double(), expected(layer, x, more), rtol=1e-5, atol=1e-5)

    def test_the_concatenation_itself(self):
        a, b = users(torch.float16, torch.float32)
        one = concatenated([a, b])
        assert one.lora_A.dtype == one.lora_B.dtype == torch.float32 and one.scaling == 1
        assert one.lora_A.shape == (8, IN) and one.lora_B.shape == (OUT, 8)
        dense = a.scaling * a.lora_B.double() @ a.lora_A.double() + b.scaling * b.lora_B.double() @ b.lora_A.double()
        torch.testing.assert_close(one.lora_B.double() @ one.lora_A.double(), dense, rtol=1e-5, atol=1e-5)

    def test_ranks_may_exceed_the_smaller_side(self):
        layer, x = make_layer(), gaussian(2, IN)
        more = [Factors(*adapter(OUT, IN, OUT, seed=seed), 1.0) for seed in (3, 7)]
        with torch.no_grad():
            y = layer.product(x, layer.bias, more=more)
        torch.testing.assert_close(y.double(), expected(layer, x, more), rtol=1e-4, atol=1e-4)


class TestOneCall:
    @pytest.mark.parametrize("start", ["lora", "qalora", None])
    def test_without_gradients(self, start):
        """The second call concatenates nothing, and multiplies once."""
        layer, more, x = make_layer(start).requires_grad_(False), users(), gaussian(3, IN)
        assert calls_of(lambda: layer.product(x, layer.bias, more=more)).count("qlora_linear") == 1
        assert calls_of(lambda: layer.product(x, layer.bias, more=more)) == ["qlora_linear"]

    def test_in_training(self):
        layer, more, x = make_layer(), users(trained=True), gaussian(3, IN).requires_grad_()
        ours = [name for name in calls_of(lambda: layer.product(x, layer.bias, more=more)) if name != "cat"]
        assert ours == ["qlora_linear"]
        y = layer.product(x, layer.bias, more=more)
        backward = calls_of(lambda: y.sum().backward())
        # The gradients of one adapter's factors are four products; they have the ranks of all.
        assert backward.count("qlora_linear_grad_input") == 1 and backward.count("mm") == 4


class TestGradients:
    @pytest.mark.parametrize("start", ["lora", "qalora", None])
    def test_of_every_factor(self, start):
        layer, more = make_layer(start), users(trained=True)
        x, upstream = gaussian(5, IN).requires_grad_(), gaussian(5, OUT, seed=9)
        own = [] if start is None else [layer.lora_A, layer.lora_B]
        wanted = [x, *own, *(factor for term in more for factor in term[:2])]
        got = torch.autograd.grad((layer.product(x, layer.bias, more=more) * upstream).sum(), wanted)
        reference = torch.autograd.grad((expected(layer, x, more) * upstream.double()).sum(), wanted)
        for mine, theirs in zip(got, reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    def test_detached_none_arrives(self):
        layer, more, x = make_layer(), users(trained=True), gaussian(2, IN).requires_grad_()
        layer.product(x, layer.bias, more=more, detach=True).sum().backward()
        assert x.grad is not None
        assert all(factor.grad is None for factor in (layer.lora_A, layer.lora_B, *more[0][:2], *more[1][:2]))


class TestKept:
    @pytest.mark.parametrize(
        "how", ["start", "user", "scaling", "set data", "optimizer", "replaced", "another", "disabled", "forgotten"]
    )
    @pytest.mark.parametrize("start", ["lora", "qalora"])
    def test_made_anew_after_a_change(self, start, how):
        layer, more, x = make_layer(start), users(trained=True), gaussian(3, IN)
        with torch.no_grad():
            layer.product(x, layer.bias, more=more)
            if how == "start":
                layer.lora_A.mul_(-1)
            elif how == "user":
                more[1].lora_B[3, 2] += 7
            elif how == "scaling":
                more[0] = more[0]._replace(scaling=-3.0)
            elif how == "set data":
                layer.lora_B.data = layer.lora_B.data + 1
            elif how == "optimizer":
                more[0].lora_A.grad = torch.ones_like(more[0].lora_A)
                torch.optim.AdamW([more[0].lora_A], 0.1).step()
            elif how == "replaced":
                layer.lora_B = torch.nn.Parameter(-layer.lora_B)
            elif how == "another":
                more = more[:1]
            elif how == "disabled":
                layer.disable_adapter()
            else:
                layer.lora_B.data.mul_(2)
                forget(layer)
            y = layer.product(x, layer.bias, more=more)
        torch.testing.assert_close(y.double(), expected(layer, x, more), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("between", ["a call with gradients", "eval", "nothing"])
    def test_writes_that_nobody_counts(self, between):
        """Optimizers in C++ write to the memory alone; training steps and evaluations alternate all the same."""
        layer, more, x = make_layer(), users(), gaussian(3, IN)
        with torch.no_grad():
            layer.product(x, layer.bias, more=more)
        if between == "eval":
            layer.eval()
        elif between != "nothing":  # On a CPU the ends of the memory tell.
            layer.product(x, layer.bias, more=more)
        layer.lora_A.data.add_(1)
        with torch.no_grad():
            y = layer.product(x, layer.bias, more=more)
        torch.testing.assert_close(y.double(), expected(layer, x, more), rtol=1e-5, atol=1e-5)

    def test_made_in_inference_mode_it_serves_training(self):
        """The factors are frozen, the layer below is trained: a backward saves what inference mode has kept."""
        layer, more, x = make_layer().requires_grad_(False), users(), gaussian(3, IN)
        with torch.inference_mode():
            first = layer.product(x, layer.bias, more=more)
        x.requires_grad_()
        y = layer.product(x, layer.bias, more=more)
        y.sum().backward()
        assert torch.equal(y, first) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_whole(trained):
    layer, more, x = make_layer(), users(trained=trained), gaussian(3, IN)
    compiled = torch.compile(lambda x: layer.product(x, layer.bias, more=more), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer.product(x, layer.bias, more=more))
    if trained:
        y.square().sum().backward()
        assert all(factor.grad is not None for term in more for factor in term[:2])
