"""What users do to whole quantized models (averages, optimizers, casts, copies, files) leaves packed weights alone."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from helpers import gaussian
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn

import loftq_kernels as lk
from loftq_kernels.nn.base import PACKED
from loftq_kernels.ops.constant import Constant

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
ADAPTERS = ("lora_A", "lora_B")


class Mixed(nn.Module):
    """Every kind of layer, formats with and without offsets, both adapters, and running statistics."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(96, 64)
        self.conv = nn.Conv1d(64, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.up, self.down = nn.Linear(48, 97), nn.Linear(97, 64, bias=False)

    def forward(self, tokens):
        x = self.norm(self.conv(self.table(tokens).mT)).mT
        return self.down(torch.relu(self.up(x)))


def config(**options) -> lk.QuantConfig:
    return lk.QuantConfig(**{"rank": 4, "num_iter": 1, "group_size": 32, **options})


@functools.cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mixed":
        model = Mixed().eval()
        overrides = {"up": {"adapter": "qalora", "rank": 2}, "down": {"format": "int4"}, "conv": {"format": "nf2"}}
        options = {"layer_types": ("linear", "conv", "embedding"), "overrides": overrides}
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 64, "intermediate_size": 99, "num_hidden_layers": 2, "vocab_size": 96}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
        options = {"overrides": {"*.down_proj": {"format": "int4"}}}
    lk.quantize_model(model, config(**options), progress=False)
    return model


@pytest.fixture(params=["llama", "mixed"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> nn.Module:
    return copy.deepcopy(_made(kind))


def outputs(model: nn.Module) -> torch.Tensor:
    result = model(TOKENS)
    return result if isinstance(result, torch.Tensor) else result.logits


def loss_of(model: nn.Module) -> torch.Tensor:
    return outputs(model).square().mean()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "codes")}


def packed_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A plain copy of every packed tensor."""
    held = {f"{name}.{key}": layer._parameters[key] for name, layer in layers_of(model).items() for key in PACKED}
    return {name: tensor.detach().clone() for name, tensor in held.items() if tensor is not None}


def assert_packed(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = packed_bits(model)
    assert now.keys() == before.keys() and len(now) > 10
    for name, tensor in now.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
        assert type(model.get_parameter(name)) is Constant and not model.get_parameter(name).requires_grad


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if name.rpartition(".")[2] in ADAPTERS}


def train(model: nn.Module, steps: int = 1, make=torch.optim.AdamW, **options) -> list[float]:
    optimizer, losses = make(model.parameters(), **{"lr": 1e-2, **options}), []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


AVERAGES = {
    "default": dict,
    "ema": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa by one": lambda: {"avg_fn": get_swa_avg_fn()},
}


class TestAveraging:
    @pytest.mark.parametrize("use_buffers", [False, True])
    @pytest.mark.parametrize("average", AVERAGES)
    def test_of_an_unchanged_model(self, model, average, use_buffers):
        before, expected = packed_bits(model), outputs(model)
        averaged = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average]())
        for _ in range(3):
            averaged.update_parameters(model)
        assert_packed(averaged.module, before)
        torch.testing.assert_close(outputs(averaged), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_right_after_steps(self, model, use_buffers):
        before = packed_bits(model)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        averaged.update_parameters(model)
        expected = {name: value.double() for name, value in adapters_of(model).items()}
        for _ in range(3):
            train(model)
            averaged.update_parameters(model)
            expected = {name: 0.5 * expected[name] + 0.5 * now.double() for name, now in adapters_of(model).items()}
        assert_packed(averaged.module, before)
        assert_packed(model, before)
        for name, value in adapters_of(averaged.module).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, adapters_of(model)[name])

    def test_of_another_model_is_refused(self, kind, model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            layer = next(iter(layers_of(other).values()))
            layer.codes.copy_(255 - layer.codes)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        averaged.update_parameters(model)
        with pytest.raises(RuntimeError, match="packed weight, which is constant.*lk.train_only_adapters"):
            averaged.update_parameters(other)

    def test_update_bn(self):
        model = copy.deepcopy(_made("mixed"))
        before = packed_bits(model)
        averaged = AveragedModel(model.train())
        averaged.update_parameters(model)
        update_bn([TOKENS, TOKENS.flip(0)], averaged)
        assert_packed(averaged.module, before)
        assert averaged.module.norm.num_batches_tracked == 2 and averaged.module.norm.running_mean.any()

    @pytest.mark.parametrize("decay", [0.9, 0.9998])
    def test_loops_over_state_dicts(self, model, decay):
        """As timm's ModelEmaV2 and many trainers have them."""
        before, average, now = packed_bits(model), copy.deepcopy(model), adapters_of(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5) if parameter.requires_grad else None
            for _ in range(3):
                for mine, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                    mine.copy_(decay * mine + (1 - decay) * new)
        assert_packed(average, before)
        for name, value in adapters_of(average).items():
            expected = 1.5 * now[name].double() - decay**3 * 0.5 * now[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("of", ["parameters", "state_dict"])
    def test_loops_that_tell_dtypes_apart(self, model, of, foreach):
        """As timm's ModelEmaV3: floats are interpolated, all else is copied."""
        before, average = packed_bits(model), copy.deepcopy(model)
        train(model)
        pairs = [list(m.parameters() if of == "parameters" else m.state_dict().values()) for m in (average, model)]
        with torch.no_grad():
            for _ in range(3):
                floats = [i for i, tensor in enumerate(pairs[0]) if tensor.is_floating_point()]
                if foreach:
                    torch._foreach_lerp_([pairs[0][i] for i in floats], [pairs[1][i] for i in floats], weight=0.1)
                for i, (mine, new) in enumerate(zip(*pairs, strict=True)):
                    if i not in floats:
                        mine.copy_(new)
                    elif not foreach:
                        mine.lerp_(new.to(mine), weight=0.1)
        assert_packed(average, before)

    def test_loops_of_adapters_by_hand(self, model):
        before, average = packed_bits(model), copy.deepcopy(model)
        train(model)
        for mine, new in zip(average.parameters(), model.parameters(), strict=True):
            mine.data.mul_(0.9).add_(new.data, alpha=0.1) if new.requires_grad else mine.data.copy_(new.data)
        assert_packed(average, before)

    def test_a_state_dict_is_no_way_around(self, model):
        before = packed_bits(model)
        for name, value in model.state_dict().items():
            if name.rpartition(".")[2] in PACKED:
                with pytest.raises(RuntimeError, match="is constant"):
                    value.add_(1)
        assert_packed(model, before)


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw foreach": (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.05}),
    "sgd foreach": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "foreach": True, "lr": 0.05}),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_given_all_parameters(model, optimizer):
    make, options = OPTIMIZERS[optimizer]
    before, start = packed_bits(model), adapters_of(model)
    losses = train(model, 4, make, **options)
    assert losses[-1] < losses[0]
    assert_packed(model, before)
    assert not any(torch.equal(value, start[name]) for name, value in adapters_of(model).items())


def test_gradients_accumulate(model):
    """Two halves of a batch give the gradients of the whole."""
    whole = copy.deepcopy(model)
    outputs(whole).square().sum().backward()
    for half in TOKENS.chunk(2):
        result = model(half)
        (result if isinstance(result, torch.Tensor) else result.logits).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).grad
        assert (parameter.grad is None) == (not parameter.requires_grad) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


class TestCasts:
    @pytest.mark.parametrize(
        "cast,dtype",
        [
            (lambda m: m.half(), torch.float16),
            (lambda m: m.bfloat16(), torch.bfloat16),
            (lambda m: m.to(torch.float64), torch.float64),
            (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
            (lambda m: m.type(torch.float64), torch.float64),
        ],
        ids=["half", "bfloat16", "float64", "to", "type"],
    )
    def test_dtype(self, model, cast, dtype):
        before, expected = packed_bits(model), outputs(model)
        model = cast(model)
        assert_packed(model, before)
        y = outputs(model)
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float64 else 0.05
        scale = expected.abs().max().item()
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * scale)
        cast(model).float()
        assert_packed(model, before)

    def test_meta_and_back(self, model):
        state, before = copy.deepcopy(model.state_dict()), packed_bits(model)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = outputs(model)
        model.to("meta")
        assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert all(isinstance(own, Constant) for own in model.parameters() if own.dtype == torch.uint8)
        model.to_empty(device="cpu").load_state_dict(state)
        for name, buffer in model.named_buffers():  # also those that state_dict leaves out
            buffer.copy_(buffers[name])
        assert_packed(model, before)
        assert torch.equal(outputs(model), expected)

    def test_training_all_is_refused_in_words(self, model):
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(
            RuntimeError, match=r"constant and takes no gradient: lk\.train_only_adapters\(model\) sets what trains"
        ):
            model.requires_grad_(True)
        model.requires_grad_(False)
        assert not any(p.requires_grad for p in model.parameters())
        lk.train_only_adapters(model)
        now = {name: p.requires_grad for name, p in model.named_parameters()}
        assert now == before


class TestCopies:
    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: through_a_file(model, weights_only=False),
            lambda model: with_state(model, through_a_file(model.state_dict(), weights_only=True)),
            lambda model: with_state(model, through_a_file(model.state_dict(), weights_only=True), assign=True),
            lambda model: with_state(model, copy.deepcopy(model.state_dict())),
            lambda model: with_state(model, model.state_dict()),
        ],
        ids=["deepcopy", "pickle", "file", "state", "state assigned", "state copied", "state itself"],
    )
    def test_are_the_model_and_their_own(self, model, copied):
        before, expected = packed_bits(model), outputs(model)
        other = copied(model)
        assert_packed(other, before)
        assert torch.equal(outputs(other), expected)
        train(other)
        assert torch.equal(outputs(model), expected) and not torch.equal(outputs(other), expected)
        theirs = {parameter.data_ptr() for parameter in other.parameters() if parameter.numel()}
        assert theirs.isdisjoint(parameter.data_ptr() for parameter in model.parameters())

    def test_safetensors_of_a_state_dict(self, model, tmp_path):
        """It refuses tensors that are not contiguous, or that share memory."""
        files = pytest.importorskip("safetensors.torch")
        before, expected = packed_bits(model), outputs(model)
        files.save_file(model.state_dict(), tmp_path / "model.safetensors")
        other = with_state(model, files.load_file(tmp_path / "model.safetensors"))
        assert_packed(other, before)
        assert torch.equal(outputs(other), expected)


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def with_state(model: nn.Module, state, **options) -> nn.Module:
    """A model of other values that takes over a state_dict."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers_of(other).values():
            layer.codes.copy_(255 - layer.codes)
            layer.scale.copy_(2 * layer.scale)
    other.load_state_dict(state, **options)
    return other


def test_functional_call_with_a_state_dict(model):
    expected = outputs(model)
    result = torch.func.functional_call(model, model.state_dict(), (TOKENS,))
    assert torch.equal(result if isinstance(result, torch.Tensor) else result.logits, expected)


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training(backend):
    """fullgraph=True: forward and backward of a tiny Llama, before and after a step."""
    model = copy.deepcopy(_made("llama")).train()
    del model.model.layers[1:]
    before, eager = packed_bits(model), copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(logits_of, fullgraph=True, backend=backend)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, eager)]
    for _ in range(2):
        y, expected = compiled(model, TOKENS), logits_of(eager, TOKENS)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.square().mean().backward()
        expected.square().mean().backward()
        for name, parameter in model.named_parameters():
            grad = eager.get_parameter(name).grad
            assert (grad is None) == (parameter.grad is None), name
            if grad is not None:
                torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_packed(model, before)


def test_gaussian_noise_on_all_parameters_is_refused(model):
    """As reset and perturbation recipes have it; what is trained may be written to."""
    before = packed_bits(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="is constant"):
        for parameter in model.parameters():
            parameter.add_(gaussian(*parameter.shape).to(parameter.dtype))
    assert_packed(model, before)
