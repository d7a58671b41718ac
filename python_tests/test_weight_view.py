"""`layer.weight`: free to look at, the product where it is multiplied by, decoded where it is read, never written."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from helpers import gaussian, parameters_of
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk

CPU_AND_META = ["cpu", "meta"]


class Counter(TorchDispatchMode):
    """Counts the dense decodes and the products of what runs inside."""

    def __init__(self):
        super().__init__()
        self.decodes = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.decodes += func is torch.ops.loftq_kernels.dequantize.default
        self.products += func is torch.ops.loftq_kernels.qlora_linear.default
        return func(*args, **(kwargs or {}))


def config(**options) -> lk.QuantConfig:
    return lk.QuantConfig(**{"rank": 3, "num_iter": 1, "lora_alpha": 6, "group_size": 32, **options})


def linear(adapter="lora", bias=True, dtype=torch.float32, **options) -> lk.QuantLoRALinear:
    torch.manual_seed(0)
    dense = nn.Linear(130, 33, bias, dtype=dtype)
    return lk.QuantLoRALinear.from_linear(dense, config(adapter=adapter, **options))


def disabled() -> lk.QuantLoRALinear:
    layer = linear()
    layer.disable_adapter()
    return layer


def conv(dimensions: int) -> nn.Module:
    torch.manual_seed(0)
    if dimensions == 1:
        return lk.QuantLoRAConv1d.from_conv(nn.Conv1d(6, 10, 3, padding=1), config())
    return lk.QuantLoRAConv2d.from_conv(nn.Conv2d(6, 10, (3, 2), stride=2, groups=2), config())


def embedding() -> lk.QuantLoRAEmbedding:
    torch.manual_seed(0)
    return lk.QuantLoRAEmbedding.from_embedding(nn.Embedding(37, 50, padding_idx=3), config())


LINEARS = {
    "lora": linear,
    "qalora": lambda: linear("qalora"),
    "without bias": lambda: linear(bias=False),
    "without adapter": lambda: linear(rank=None),
    "disabled": disabled,
}
LAYERS = {**LINEARS, "conv1d": lambda: conv(1), "conv2d": lambda: conv(2), "embedding": embedding}
DENSE_COPIES = {"conv1d": "merged_conv", "conv2d": "merged_conv", "embedding": "merged_embedding"}


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def layer(kind) -> nn.Module:
    return LAYERS[kind]()


def exact(layer, lora_A=None, lora_B=None) -> torch.Tensor:
    """The float64 weight, differentiable in the adapter given (default: the layer's own, detached)."""
    dense = layer.dequantize(torch.float64).flatten(1)
    if layer.has_adapter:
        lora_A = layer.lora_A.detach().double() if lora_A is None else lora_A
        lora_B = layer.lora_B.detach().double() if lora_B is None else lora_B
        if layer.adapter == "qalora":
            columns = torch.arange(dense.shape[1]) // layer.group_size
            lora_A = lora_A[:, columns] / layer.group_size
        dense = dense + layer.scaling * lora_B @ lora_A
    return dense.view(layer.dequantize().shape)


def doubles(layer) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B)]


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual.double(), expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


class TestMetadata:
    def test_as_of_the_dense_weight_and_free(self, layer):
        dense = layer.dense_weight()
        with Counter() as counter:
            weight = layer.weight
            assert isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter)
            for one in (weight, weight.data, weight.detach()):
                assert one.shape == one.size() == dense.shape and one.size(0) == one.shape[0] == len(one)
                assert (one.dtype, one.device, one.layout) == (dense.dtype, dense.device, dense.layout)
                assert one.ndim == one.dim() == dense.dim() and one.numel() == torch.numel(one) == dense.numel()
                assert one.stride() == dense.stride() and one.stride(0) == dense.stride(0) and one.is_contiguous()
                assert one.element_size() == 4 and one.nbytes == dense.nbytes and one.type() == dense.type()
                assert one.is_floating_point() and torch.is_floating_point(one) and not one.is_complex()
                assert not (one.requires_grad or one.is_cuda or one.is_meta or one.is_sparse) and one.is_leaf
                assert one.grad is None and one.grad_fn is None and one.get_device() == -1
                assert {one: 1}[one] == 1 and hash(one) == id(one)
                text = repr(one)
                assert type(layer).__name__ in text and str(tuple(dense.shape)) in text and len(text) < 200
                assert f"{one}" == text
        assert counter.decodes == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_follows_the_layer(self, layer, dtype):
        layer.to(dtype)
        assert layer.weight.dtype == (layer.lora_A if layer.lora_A is not None else layer.bias).dtype == dtype
        assert layer.weight.float().dtype == torch.float32 and layer.weight.clone().dtype == dtype
        meta = layer.to("meta").weight
        assert meta.is_meta and meta.device.type == "meta" and meta.mT.is_meta

    def test_is_no_parameter(self, layer):
        assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())
        before = parameters_of(layer)
        assert "weight" not in before and layer.weight.sum().isfinite()
        assert copy.deepcopy(layer).weight.equal(layer.weight)


class TestProduct:
    @pytest.mark.parametrize("name", [*LINEARS, "embedding"])
    @pytest.mark.parametrize("with_bias", [True, False])
    def test_linear(self, name, with_bias):
        layer, rows = LAYERS[name](), LAYERS[name]().weight.shape[0]
        x = gaussian(2, 5, layer.weight.shape[1]).requires_grad_()
        bias = gaussian(rows, seed=3).requires_grad_() if with_bias else None
        with Counter() as counter:
            y = functional.linear(x, layer.weight, bias=bias) if with_bias else functional.linear(x, layer.weight)
        assert (counter.decodes, counter.products) == (0, 1) and y.dtype == x.dtype
        own = [p for p in (layer.lora_A, layer.lora_B) if layer.has_adapter]
        wide = doubles(layer) if own else []
        x64 = x.detach().double().requires_grad_()
        bias64 = None if bias is None else bias.detach().double().requires_grad_()
        expected = functional.linear(x64, exact(layer, *wide), bias64)
        close(y, expected)
        probe, leaves, leaves64 = gaussian(*y.shape, seed=5), [x, *own], [x64, *wide]
        if with_bias:
            leaves, leaves64 = [*leaves, bias], [*leaves64, bias64]
        actual = torch.autograd.grad((y * probe).sum(), leaves)
        for grad, grad64 in zip(actual, torch.autograd.grad((expected * probe).sum(), leaves64), strict=True):
            close(grad, grad64, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        "view", [lambda w: w.data, lambda w: w.detach(), torch.detach], ids=["data", "method", "f"]
    )
    def test_detached(self, view):
        layer = linear()
        x = gaussian(4, 130).requires_grad_()
        with Counter() as counter:
            y = functional.linear(x, view(layer.weight), layer.bias)
        assert (counter.decodes, counter.products) == (0, 1)
        y.sum().backward()
        assert layer.lora_A.grad is None and layer.lora_B.grad is None
        close(x.grad, exact(layer).sum(0).expand(4, -1), atol=1e-4)
        assert not view(layer.weight).sum().requires_grad and layer.weight.sum().requires_grad

    def test_every_call_of_linear(self):
        layer, x = linear(), gaussian(4, 130)
        for call in (
            lambda: functional.linear(input=x, weight=layer.weight, bias=layer.bias),
            lambda: functional.linear(x, weight=layer.weight, bias=layer.bias),
            lambda: torch.ops.aten.linear.default(x, layer.weight, layer.bias),
        ):
            torch.testing.assert_close(call(), layer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(functional.linear(layer.weight, x), (layer.dense_weight() @ x.T))
        torch.testing.assert_close(functional.linear(layer.weight, layer.weight).diag(), layer.weight.square().sum(1))
        with pytest.raises(ValueError, match="129"):
            functional.linear(x[:, :129], layer.weight)

    def test_autocast(self):
        layer, x = linear(), gaussian(4, 130)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(functional.linear(x, layer.weight, layer.bias), layer(x))
            assert torch.equal(layer.weight.clone(), layer.dense_weight())  # the adapter is added in float32

    def test_tied_head(self):
        table = embedding()
        head = functional.linear(table(torch.tensor([1, 5])), table.weight)
        head.square().sum().backward()
        twin = nn.Embedding.from_pretrained(exact(table), freeze=False, padding_idx=3)
        expected = functional.linear(twin(torch.tensor([1, 5])), twin.weight)
        close(head, expected)
        expected.square().sum().backward()
        gradient = table.scaling * twin.weight.grad
        close(table.lora_B.grad, gradient @ table.lora_A.double().T, rtol=1e-3, atol=1e-3)
        close(table.lora_A.grad, table.lora_B.double().T @ gradient, rtol=1e-3, atol=1e-3)


class TestReads:
    def test_values(self, layer):
        expected, weight = exact(layer), layer.weight
        for one in (
            weight,
            weight.data,
            weight.detach(),
            weight.cpu(),
            weight.float(),
            weight.double(),
            weight.clone(),
        ):
            close(one, expected)
        close(weight.mT.reshape(-1), expected.mT.reshape(-1))
        close(weight[-1], expected[-1])
        close(weight.flatten(1) @ weight.flatten(1).T, expected.flatten(1) @ expected.flatten(1).T, atol=1e-4)
        close(weight.sum(), expected.sum(), atol=1e-3)
        close(torch.cat([weight, weight]), torch.cat([expected, expected]))
        close(torch.stack(list(weight)), expected)
        close(weight.max(0).values, expected.max(0).values)
        assert torch.equal(weight, layer.dense_weight()) and weight.tolist() == layer.dense_weight().tolist()
        assert weight.flatten()[1].item() == pytest.approx(expected.flatten()[1].item(), rel=1e-4)
        with torch.no_grad(), torch.inference_mode():
            close(weight * 1, expected)

    def test_into_others(self, layer):
        dense = layer.dense_weight()
        other = torch.zeros_like(layer.weight)
        assert type(other) is torch.Tensor and torch.equal(other.copy_(layer.weight), dense)
        assert torch.equal(other.add_(layer.weight), 2 * dense)
        with torch.no_grad():
            other = other.detach()
            torch.sub(other, layer.weight, out=other)
        assert torch.equal(other, dense)
        torch._foreach_sub_([other], [layer.weight])
        assert not other.any()
        other = other.detach()
        with pytest.raises(RuntimeError, match="incompatible tensor type"):  # it asks no subclass, and shares memory
            other.data = layer.weight
        other.data = layer.weight.clone()
        other.mul_(2)
        assert torch.equal(other, 2 * dense) and torch.equal(layer.weight, dense)

    def test_gradients(self, layer):
        if not layer.has_adapter:
            assert not layer.weight.sum().requires_grad
            return
        wide, probe = doubles(layer), gaussian(*layer.weight.shape, seed=9)
        expected = torch.autograd.grad((exact(layer, *wide).square() * probe).sum(), wide)
        actual = torch.autograd.grad((layer.weight.square() * probe).sum(), [layer.lora_A, layer.lora_B])
        for one, other in zip(actual, expected, strict=True):
            close(one, other, rtol=1e-3, atol=1e-4)
        row = layer.weight[2]
        assert torch.autograd.grad(row.sum(), row)[0].eq(1).all() and row.requires_grad
        with torch.no_grad():
            assert not layer.weight.clone().requires_grad

    def test_functions_of_the_dense_layers(self):
        table, indices = embedding(), torch.tensor([[0, 36], [3, 5]])
        close(functional.embedding(indices, table.weight), exact(table)[indices])
        one, x = conv(1), gaussian(2, 6, 17)
        close(functional.conv1d(x, one.weight, one.bias, padding=1), one(x).double())
        two, x = conv(2), gaussian(2, 6, 9, 8)
        close(functional.conv2d(x, two.weight, two.bias, stride=2, groups=2), two(x).double())

    def test_functorch(self):
        layer, x = linear(), gaussian(4, 130)

        def loss(lora_A, call):
            return torch.func.functional_call(Calls(layer, call), {"layer.lora_A": lora_A}, (x,)).square().sum()

        gradient = torch.func.grad(loss)(layer.lora_A.detach(), lambda x, w: x @ w.T)
        wide = doubles(layer)
        (expected,) = torch.autograd.grad((x.double() @ exact(layer, *wide).T).square().sum(), wide[:1])
        close(gradient, expected, rtol=1e-3, atol=1e-3)
        batch = torch.vmap(lambda row: functional.linear(row, layer.weight.detach()))(x)
        close(batch, functional.linear(x.double(), exact(layer)))


class Calls(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(x, self.layer.weight)


class TestCopies:
    def test_are_plain_and_dense(self, layer):
        dense = layer.dense_weight()
        file = io.BytesIO()
        torch.save({"w": layer.weight, "row": layer.weight[1]}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert torch.equal(saved["row"], dense[1])
        copies = [copy.deepcopy(layer.weight), copy.copy(layer.weight), pickle.loads(pickle.dumps(layer.weight))]
        for one in (*copies, saved["w"], copy.deepcopy([layer.weight.mT])[0].mT):
            assert type(one) is torch.Tensor and torch.equal(one, dense) and not one.requires_grad
            one.zero_()
        assert torch.equal(layer.weight, dense)

    def test_saved_views_are_not_larger(self):
        file = io.BytesIO()
        torch.save(linear().weight[1], file)
        assert len(file.getvalue()) < 4 * 33 * 130

    def test_numpy(self, layer):
        dense = layer.dense_weight().numpy()
        views = {"numpy": layer.weight.numpy(), "array": np.asarray(layer.weight), "row": layer.weight[:1].numpy()}
        for name, array in views.items():
            assert np.array_equal(array, dense[:1] if name == "row" else dense) and not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        assert np.asarray(layer.weight, dtype=np.float64).dtype == np.float64


def iadd(w):
    w += 1


def ipow(w):
    w **= 2


def set_item(w):
    w[0] = 1


def set_data(w):
    w.data = torch.zeros(w.shape)


def set_grad(w):
    w.grad = torch.zeros(w.shape)


def need_grad(w):
    w.requires_grad = True


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "add_": lambda w: w.add_(torch.ones(w.shape), alpha=2),
    "copy_": lambda w: w.copy_(torch.ones(w.shape)),
    "+=": iadd,
    "**=": ipow,
    "w[0] =": set_item,
    "fill by index": lambda w: w.index_fill_(0, torch.tensor([0]), 1.0),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "swap dimensions": lambda w: w.transpose_(0, -1),
    "detach_": lambda w: w.detach_(),
    "share": lambda w: w.share_memory_(),
    "data =": set_data,
    "grad =": set_grad,
    "requires_grad =": need_grad,
    "requires_grad_": lambda w: w.requires_grad_(),
    "Parameter": nn.Parameter,
    "frozen Parameter": lambda w: nn.Parameter(w, requires_grad=False),
    "out=": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "out= of two": lambda w: torch.aminmax(torch.ones(2, *w.shape), dim=0, out=(w, torch.ones(w.shape))),
    "foreach": lambda w: torch._foreach_mul_([torch.ones(2), w], 2),
    "op": lambda w: torch.ops.aten.mul_.Tensor(w, 2),
    "op out": lambda w: torch.ops.aten.add.out(torch.ones(w.shape), 1, out=w),
    "normal_": nn.init.normal_,
    "zeros_": nn.init.zeros_,
    "uniform_ by name": lambda w: nn.init.uniform_(tensor=w),
    "relu inplace": lambda w: functional.relu(w, inplace=True),
    "relu_": functional.relu_,
    "dropout inplace": lambda w: functional.dropout(w, inplace=True),
    "attribute": lambda w: setattr(w, "tag", 1),
}
VIEWS = {
    "weight": lambda w: w,
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "T": lambda w: w.mT,
    "row": lambda w: w[0:1],
    "view": lambda w: w.view(1, -1),
    "flatten": lambda w: w.flatten(),
    "data flatten": lambda w: w.data.flatten(),
    "flatten data": lambda w: w.flatten().data,
    "chunk": lambda w: w.chunk(2)[1],
    "unbind": lambda w: w.unbind()[2],
    "split": lambda w: torch.split(w, 2)[0],
    "iterate": lambda w: list(w)[0],
    "no-op": lambda w: w.float().contiguous().to("cpu"),
    "as_strided": lambda w: w.as_strided((2, 2), (1, 2)),
    "expand": lambda w: w.expand(2, *w.shape)[0],
    "view of a view": lambda w: w.mT[0:2].detach()[..., 0:1],
    "as_tensor": torch.as_tensor,
}


class TestWrites:
    @pytest.mark.parametrize("write", WRITES)
    def test_raise(self, layer, kind, write):
        before, values = layer.dense_weight(), parameters_of(layer)
        with pytest.raises(RuntimeError, match=r"is refused: \w+\.weight is read-only") as raised:
            WRITES[write](layer.weight)
        self.check_message(str(raised.value), layer, kind)
        assert torch.equal(layer.dense_weight(), before)
        assert all(torch.equal(value, values[name]) for name, value in parameters_of(layer).items())

    @staticmethod
    def check_message(message, layer, kind):
        assert f"{type(layer).__name__}.weight" in message and "lora_A and lora_B" in message
        assert "merge_adapter(requantize=True)" in message and "\n" not in message
        assert f"{DENSE_COPIES.get(kind, 'merged_linear')}()" in message
        assert callable(getattr(layer, layer.dense_copy))

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("view", VIEWS)
    def test_to_views(self, view, mode):
        layer = linear()
        for name, write in WRITES.items():
            with mode(), pytest.raises(RuntimeError) as raised:
                write(VIEWS[view](layer.weight))
            assert "QuantLoRALinear.weight is read-only" in str(raised.value), name
        for make in (lambda: conv(2), embedding):
            layer = make()
            with mode(), pytest.raises(RuntimeError, match=f"{type(layer).__name__}.weight is read-only"):
                VIEWS[view](layer.weight).zero_()

    @pytest.mark.parametrize("device", CPU_AND_META)
    def test_meta(self, device):
        layer = linear().to(device)
        for view in (lambda w: w, lambda w: w.T, lambda w: w.data[0]):
            with pytest.raises(RuntimeError, match="read-only"):
                view(layer.weight).zero_()

    def test_embedding_that_renormalizes(self):
        with pytest.raises(RuntimeError, match="QuantLoRAEmbedding.weight is read-only"):
            functional.embedding(torch.tensor([1]), embedding().weight, max_norm=0.01)

    def test_nothing_else_of_a_list_is_written(self):
        other = torch.ones(3)
        with pytest.raises(RuntimeError, match="read-only"):
            torch._foreach_mul_([other, linear().weight], 2)
        assert torch.equal(other, torch.ones(3))

    def test_freezing_is_no_write(self):
        weight = linear().weight
        weight.requires_grad = False
        assert weight.requires_grad_(False) is weight

    @pytest.mark.parametrize(
        "ask",
        [
            lambda w: w.data_ptr(),
            lambda w: w.untyped_storage(),
            lambda w: w.storage(),
            lambda w: w.T.data_ptr(),
            torch.from_dlpack,
        ],
    )
    def test_memory(self, ask):
        with pytest.raises(RuntimeError, match=r"clone\(\).*QuantLoRALinear\.weight is read-only"):
            ask(linear().weight)


class TestAssignment:
    @pytest.mark.parametrize(
        "value",
        [torch.zeros(2), nn.Parameter(torch.zeros(2)), nn.Buffer(torch.zeros(2)), nn.Linear(1, 1), None, 3],
        ids=lambda value: type(value).__name__,
    )
    def test_of_the_attribute(self, layer, value, kind):
        with pytest.raises(RuntimeError, match="assigning to weight is refused") as raised:
            layer.weight = value
        TestWrites.check_message(str(raised.value), layer, kind)
        assert type(layer.weight).__name__ == "QuantizedWeight" and "weight" not in layer.state_dict()

    def test_arithmetic_assignment(self, layer):
        with pytest.raises(RuntimeError, match="read-only"):
            layer.weight += 1
        with pytest.raises(RuntimeError, match="read-only"):
            layer.weight.data += 1
        with pytest.raises(RuntimeError, match="assigning to weight"):
            layer.weight @= torch.ones(layer.weight.shape[-1], 1)

    def test_deletion_and_registration(self, layer):
        with pytest.raises(RuntimeError, match="deleting weight is refused"):
            del layer.weight
        with pytest.raises(RuntimeError, match="registering a parameter weight is refused"):
            layer.register_parameter("weight", nn.Parameter(torch.zeros(2)))
        with pytest.raises(KeyError, match="weight"):
            layer.register_buffer("weight", torch.zeros(2))
        layer.register_parameter("extra", nn.Parameter(torch.zeros(2)))
        layer.lora_A = None
        del layer.extra
        assert layer.lora_A is None

    def test_a_dense_layer_cannot_take_it_over(self):
        dense = nn.Linear(130, 33)
        with pytest.raises(TypeError, match="as parameter 'weight'"):
            dense.weight = linear().weight


class TestCompiled:
    @pytest.mark.parametrize("adapter", ["lora", "qalora"])
    @pytest.mark.parametrize(
        "call",
        [
            lambda x, w: functional.linear(x.to(w.dtype), w),
            lambda x, w: (x @ w.T) * w.shape[0] + w[0, 0],
        ],
        ids=["linear", "matmul"],
    )
    def test_values_and_gradients(self, call, adapter):
        model, x = Calls(linear(adapter), call), gaussian(5, 130).requires_grad_()
        leaves = [x, model.layer.lora_A, model.layer.lora_B]
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        expected = model(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        actual = torch.autograd.grad(y.square().sum(), leaves)
        for one, other in zip(actual, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("name", LINEARS)
    def test_export(self, name, strict):
        layer, x = LINEARS[name](), gaussian(5, 130)
        for call in (lambda x, w: functional.linear(x, w), lambda x, w: (x @ w.T) * w.shape[0] + w[0, 0]):
            model = Calls(layer, call)
            exported = torch.export.export(model, (x,), strict=strict)
            torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)
        exported = torch.export.export(ReadsDtype(layer), (x,))
        targets = [str(node.target) for node in exported.graph.nodes if "loftq_kernels" in str(node.target)]
        assert targets == ["loftq_kernels.qlora_linear.default"]

    @pytest.mark.parametrize("gradients", [True, False])
    def test_reading_the_dtype_decodes_nothing(self, gradients):
        model, x, graphs = ReadsDtype(linear()), gaussian(5, 130), []

        def remember(graph, _):
            graphs.append(graph)
            return graph

        backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=remember)
        with torch.set_grad_enabled(gradients):
            y = torch.compile(model, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, model(x))
        targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        assert any("qlora_linear" in target for target in targets)
        assert not any("dequantize" in target for target in targets)


class ReadsDtype(nn.Module):
    """As T5 does before its last projection."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer.weight, torch.Tensor) and self.layer.weight.dtype != x.dtype:
            x = x.to(self.layer.weight.dtype)
        return self.layer(x)


class TestTransformerEncoder:
    @staticmethod
    def encoder(layers=2):
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True)
        encoder = nn.TransformerEncoder(block, layers).eval()
        dense = copy.deepcopy(encoder)
        for mine, twin in zip(encoder.layers, dense.layers, strict=True):
            for name in ("linear1", "linear2"):
                setattr(mine, name, lk.QuantLoRALinear.from_linear(getattr(mine, name), config(rank=4)))
                setattr(twin, name, getattr(mine, name).merged_linear())
        return encoder, dense.double()

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("masked", [False, True])
    def test_multiplies_by_the_packed_weights(self, mode, masked):
        encoder, dense = self.encoder()
        x, mask = gaussian(3, 7, 64), torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 5:] = masked
        mask = mask if masked else None
        with mode(), Counter() as counter:
            y = encoder(x, src_key_padding_mask=mask)
        assert (counter.decodes, counter.products) == (0, 4)
        with torch.enable_grad():  # where torch has no fast path either
            expected = dense(x.double(), src_key_padding_mask=mask)
        real = torch.ones(3, 7, dtype=torch.bool) if mask is None else ~mask
        close(y[real], expected.detach()[real], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_output_projection_of_attention(self, mode):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(64, 2, batch_first=True).eval()
        dense = copy.deepcopy(attention).double()
        attention.out_proj = lk.QuantLoRALinear.from_linear(nn.Linear(64, 64), config())
        dense.out_proj = attention.out_proj.merged_linear().double()
        x = gaussian(3, 7, 64)
        with mode():
            y = attention(x, x, x)[0]
        close(y, dense(x.double(), x.double(), x.double())[0].detach())
        if mode is torch.enable_grad:
            y.square().sum().backward()
            weight = torch.autograd.grad(dense(*[x.double()] * 3)[0].square().sum(), dense.out_proj.weight)[0]
            layer = attention.out_proj
            close(layer.lora_B.grad, layer.scaling * weight @ layer.lora_A.double().T, rtol=1e-3, atol=1e-3)


class TestTransformers:
    def test_t5_decodes_nothing(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
        ).eval()
        report = lk.quantize_model(model, config(), progress=False)
        assert any(layer.name.endswith(".wo") for layer in report.layers)
        dense = copy.deepcopy(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, lk.QuantLoRALinear):
                dense.set_submodule(name, layer.merged_linear())
        tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), Counter() as counter:
            logits = model(input_ids=tokens, labels=tokens).logits
        assert counter.decodes == 0 and counter.products == len(report.layers)
        with torch.no_grad():
            close(logits, dense.double()(input_ids=tokens, labels=tokens).logits, rtol=1e-3, atol=1e-3)


class TestPeft:
    @staticmethod
    def model():
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        modules = nn.ModuleDict({"up": nn.Linear(130, 33), "table": nn.Embedding(37, 50), "conv": nn.Conv2d(6, 10, 3)})
        model = peft.get_peft_model(modules, peft.LoraConfig(r=2, target_modules=["up", "table", "conv"]))
        for wrapper in model.base_model.model.values():
            base = wrapper.base_layer
            if isinstance(base, nn.Linear):
                wrapper.base_layer = lk.QuantLoRALinear.from_linear(base, config(rank=None))
            elif isinstance(base, nn.Embedding):
                wrapper.base_layer = lk.QuantLoRAEmbedding.from_embedding(base, config(rank=None))
            else:
                wrapper.base_layer = lk.QuantLoRAConv2d.from_conv(base, config(rank=None))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        return model

    @pytest.mark.parametrize("safe", [False, True])
    @pytest.mark.parametrize("kind", ["up", "table", "conv"])
    def test_merging_raises(self, kind, safe):
        wrapper = self.model().base_model.model[kind]
        before = wrapper.base_layer.dequantize()
        with pytest.raises(RuntimeError, match=rf"{type(wrapper.base_layer).__name__}\.weight is read-only"):
            wrapper.merge(safe_merge=safe)
        assert torch.equal(wrapper.base_layer.dequantize(), before) and not wrapper.merged_adapters

    def test_merging_the_model_raises(self):
        for merge in ("merge_and_unload", "merge_adapter"):
            with pytest.raises(RuntimeError, match="read-only"):
                getattr(self.model(), merge)()

    def test_merging_into_the_dense_copy_is_right(self):
        """What the message advises."""
        model, x = self.model(), gaussian(5, 130)
        wrapper = model.base_model.model["up"]
        expected = wrapper(x)
        wrapper.base_layer = wrapper.base_layer.merged_linear()
        wrapper.merge()
        torch.testing.assert_close(wrapper.base_layer(x), expected, rtol=1e-4, atol=1e-4)
