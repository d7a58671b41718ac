"""`Constant`: what trains, averages, saves, moves, compiles and shards a model must leave it exactly as it is."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed import Collectives, run_processes
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils.flop_counter import FlopCounterMode

import loftq_kernels as lk
from loftq_kernels.ops.constant import Constant, keep_dtypes, loading, restore_constants

NAMES = ("codes", "scale", "codebook")
SIZE, RANK = 64, 4


class Toy(nn.Module):
    """The smallest module with a packed weight in constants and an adapter in parameters."""

    def __init__(self, rows: int = 13, format: str = "nf4", seed: int = 0, scale_dtype=torch.float16):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        packed = lk.quantize(torch.randn(rows, SIZE, generator=rng), format, 32, scale_dtype=scale_dtype)
        for name in NAMES:
            setattr(self, name, Constant(getattr(packed, name)))
        self.lora_A = nn.Parameter(0.1 * torch.randn(RANK, SIZE, generator=rng))
        self.lora_B = nn.Parameter(0.1 * torch.randn(rows, RANK, generator=rng))

    def forward(self, x):
        packed = self.codes, self.scale, None, self.codebook
        return torch.ops.loftq_kernels.qlora_linear(x, *packed, 32, self.lora_A, self.lora_B, 0.5, None)

    def _apply(self, fn, recurse=True):
        super()._apply(keep_dtypes(fn, self, NAMES), recurse)
        restore_constants(self, NAMES)
        return self

    def _load_from_state_dict(self, *args):
        with loading():
            super()._load_from_state_dict(*args)
        restore_constants(self, NAMES)


def bits(model: Toy) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name).detach().clone() for name in NAMES}


def assert_same(model: Toy, before: dict[str, torch.Tensor]) -> None:
    for name in NAMES:
        parameter = getattr(model, name)
        assert type(parameter) is Constant and not parameter.requires_grad
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name]), name


def assert_all_same(a: Toy, b: Toy) -> None:
    for name, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], value), name


def train(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer | None = None, steps: int = 5) -> list:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


AVERAGES = {
    "swa foreach of any device": (
        lambda: {"multi_avg_fn": get_swa_multi_avg_fn()},
        lambda e, p, n: e + (p - e) / (n + 1),
    ),
    "ema foreach": (lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, lambda e, p, n: 0.9 * e + 0.1 * p),
    "swa foreach": (lambda: {}, lambda e, p, n: e + (p - e) / (n + 1)),
    "ema": (lambda: {"avg_fn": get_ema_avg_fn(0.9)}, lambda e, p, n: 0.9 * e + 0.1 * p),
    "swa": (lambda: {"avg_fn": get_swa_avg_fn()}, lambda e, p, n: e + (p - e) / (n + 1)),
}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaging_keeps_constants_and_averages_adapters(average, scale_dtype, use_buffers):
    options, formula = AVERAGES[average]
    model = Toy(scale_dtype=scale_dtype)
    before = bits(model)
    averaged = AveragedModel(model, use_buffers=use_buffers, **options())
    expected = None
    for step in range(5):
        adapter = model.lora_A.detach().double()
        expected = adapter if expected is None else formula(expected, adapter, step)
        averaged.update_parameters(model)
        with torch.no_grad():
            model.lora_A.mul_(1.3).add_(0.1)
    assert_same(averaged.module, before)
    torch.testing.assert_close(averaged.module.lora_A.double(), expected)
    assert not torch.allclose(averaged.module.lora_A, model.lora_A)


@pytest.mark.parametrize("average", AVERAGES)
def test_averaging_different_packed_weights_is_refused(average):
    averaged = AveragedModel(Toy(), **AVERAGES[average][0]())
    averaged.update_parameters(Toy())
    before = bits(averaged.module)
    with pytest.raises(RuntimeError, match="packed weight, which is constant.*lk.train_only_adapters"):
        averaged.update_parameters(Toy(seed=1))
    assert torch.equal(averaged.module.codes, before["codes"])


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_a_slow_average_of_slightly_different_codes_is_refused(decay):
    """One code differs by one, so that an update changes it by 1 - decay."""
    codes = torch.full((4, 4), 3, dtype=torch.uint8)
    other = codes.clone()
    other[1, 2] += 1
    with pytest.raises(RuntimeError, match="is constant"):
        get_ema_multi_avg_fn(decay)([Constant(codes).detach()], [Constant(other).detach()], 1)


def access(how: str, parameter: torch.Tensor) -> torch.Tensor:
    return {"itself": lambda: parameter, "data": lambda: parameter.data, "detach": parameter.detach}[how]()


@pytest.mark.parametrize("how", ["itself", "data", "detach"])
@pytest.mark.parametrize(
    "write",
    [
        lambda e, p: e.lerp_(p, 0.1),
        lambda e, p: e.add_(p, alpha=0.5).sub_(p, alpha=0.5),
        lambda e, p: e.sub_(0.1 * (e - p)),
        lambda e, p: e.mul_(0.9).add_(p, alpha=0.1),
        lambda e, p: e.mul_(1),
        lambda e, p: e.__imul__(0.5),
        lambda e, p: e.__setitem__(0, 3),
        lambda e, p: e.zero_(),
        lambda e, p: e.fill_(7),
        lambda e, p: e.normal_(),
        lambda e, p: e.masked_fill_(torch.ones_like(e, dtype=torch.bool), 1),
        lambda e, p: e.bitwise_xor_(1),
        lambda e, p: e.copy_(0.9 * e.double() + 0.1 * p.double() + 1),
        lambda e, p: e.copy_(0.9 * e.double() + 0.1 * p.double()),
        lambda e, p: nn.init.uniform_(e),
        lambda e, p: nn.init.zeros_(e),
    ],
)
def test_arithmetic_in_place_is_exact_or_refused(write, how):
    model, other = Toy(), Toy()
    before, refused = bits(model), 0
    for name in NAMES:
        with torch.no_grad():
            try:
                write(access(how, getattr(model, name)), access(how, getattr(other, name)))
            except RuntimeError as error:  # float16 has no bits to flip
                assert "is constant" in str(error) or "not implemented" in str(error)
                refused += 1
    assert_same(model, before)
    assert refused in (0, 3)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_operands_that_were_rounded_before(scale_dtype):
    model = Toy(scale_dtype=scale_dtype)
    before, rounded = bits(model), 0
    for parameter in (getattr(model, name) for name in NAMES):
        average = 0.9 * parameter.detach() + 0.1 * parameter.detach()
        rounded += int((average != parameter).sum())
        parameter.detach().lerp_(average, 0.5)
    assert rounded
    assert_same(model, before)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_average_written_straight_into_the_parameters(scale_dtype):
    model, averaged = Toy(scale_dtype=scale_dtype), Toy(scale_dtype=scale_dtype)
    before, rounded = bits(model), 0
    with torch.no_grad():
        for _ in range(20):
            for old, new in zip(averaged.parameters(), model.parameters(), strict=True):
                if old.is_floating_point():
                    average = 0.9 * old + 0.1 * new
                    rounded += int(type(old) is Constant and not torch.equal(average, new))
                    old.copy_(average)
    assert rounded, "which would have drifted"
    assert_same(averaged, before)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_a_layer_loads_a_state_dict_to_the_last_bit(scale_dtype):
    layer = lk.QuantLoRALinear(SIZE, 8, format="nf4", group_size=32, rank=4, scale_dtype=scale_dtype)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["scale"] = torch.nextafter(torch.ones_like(state["scale"]), torch.full_like(state["scale"], 2))
    for start in (1, 1.5):
        layer.load_state_dict({**state, "scale": torch.full_like(state["scale"], start)})
        layer.load_state_dict(state)
        assert torch.equal(layer.scale, state["scale"])


@pytest.mark.parametrize("place", [0, 2**18 + 3, -1])
def test_a_change_anywhere_in_a_large_constant(place):
    constant = Constant(torch.arange(2**18 + 40, dtype=torch.float32))
    new = constant.double()
    constant.copy_(new)
    for change in (0.5, float("nan"), float("inf")):
        new[place] = change
        with pytest.raises(RuntimeError, match="is constant"):
            constant.copy_(new)
    assert torch.equal(constant, torch.arange(2**18 + 40, dtype=torch.float32))


def test_averages_of_data_by_assignment_and_into_out():
    model = Toy()
    before = bits(model)
    for parameter in (getattr(model, name) for name in NAMES):
        parameter.data = 0.9 * parameter.data + 0.1 * parameter.data
        torch.mul(parameter.data, 1, out=parameter.data)
        with pytest.raises(RuntimeError, match="constant"):
            torch.mul(parameter.data, 2, out=parameter.data)
    with pytest.raises(RuntimeError, match="constant"):
        model.codes.data = model.codes.data * 0.5
    assert_same(model, before)
    plain = torch.empty(0)
    torch.add(model.codebook.data, 1, out=plain)
    assert torch.equal(plain, before["codebook"] + 1)


def test_lists_that_mix_constants_and_tensors():
    constant, other = Constant(torch.arange(5.0)), Constant(torch.arange(5.0))
    plain, toward = torch.zeros(3), torch.ones(3)
    lists = [constant.detach(), plain], [other.detach(), toward]
    torch._foreach_lerp_(*lists, 0.25)
    assert torch.equal(plain, torch.full((3,), 0.25)) and torch.equal(constant, torch.arange(5.0))
    torch._foreach_mul_(lists[0], [1.0, 2.0])
    assert torch.equal(plain, torch.full((3,), 0.5)) and torch.equal(constant, torch.arange(5.0))
    with pytest.raises(RuntimeError, match="_foreach_mul_ would change.*up to 4"):
        torch._foreach_mul_(lists[0], 2.0)
    assert torch.equal(plain, torch.full((3,), 0.5)), "a refusal changes nothing"
    torch._foreach_copy_(lists[0], [Constant(torch.ones(5)), toward])
    assert torch.equal(constant, torch.ones(5)) and torch.equal(plain, toward)


def test_grouping_keeps_the_guard():
    constant = Constant(torch.arange(5, dtype=torch.uint8))
    alias = constant.detach()
    groups = _group_tensors_by_device_and_dtype([[alias, torch.ones(2)]])
    (grouped,), _ = groups[torch.device("cpu"), torch.uint8]
    assert type(grouped[0]) is type(alias) is not torch.Tensor


def test_reading_gives_plain_tensors_and_views_stay_guarded():
    constant = Constant(torch.arange(6.0).view(2, 3))
    alias = constant.detach()
    for own in (constant, alias):
        for read in (own + 1, own.clone(), own.double(), own[[0]], own.sum(), torch.stack([own, own])):
            assert type(read) is torch.Tensor
        same = own.detach(), own.data, own.view_as(own), own.view(3, 2)
        assert own.to("cpu") is own.float() is own.contiguous() is own
        for view in (*same, own[0], own.T, own.mT, own.view(torch.int32), *own, *own.chunk(2), *torch.unbind(own, 1)):
            assert type(view) is type(alias)
            assert view.untyped_storage().data_ptr() == constant.data_ptr()


WRITES = {
    "zero_": lambda c: torch.zero_(c),
    "fill_": lambda c: torch.fill_(c, 2),
    "clamp_": lambda c: torch.clamp_(c, 1, 2),
    "of Tensor": lambda c: torch.Tensor.mul_(c, 2),
    "of aten": lambda c: torch.ops.aten.mul_.Tensor(c, torch.tensor(2, dtype=c.dtype)),
    "aten, any overload": lambda c: torch.ops.aten.mul_(c, 2),
    "index_put_": lambda c: torch.index_put_(c, (torch.tensor([1]),), torch.tensor(9, dtype=c.dtype)),
    "out": lambda c: torch.add(c, 1, out=c),
    "out of a view": lambda c: torch.add(c.view(-1), 1, out=c.view(-1)),
    "foreach": lambda c: torch._foreach_mul_([c], 2),
    "foreach with another": lambda c: torch._foreach_add_([torch.ones(4), c], [torch.ones(4), c]),
    "foreach of views": lambda c: torch._foreach_mul_([c.view(-1)], 2),
    "foreach copy": lambda c: torch._foreach_copy_([c], [c.double() + 1]),
    "a flat average": lambda c: c.view(-1).mul_(0.9).add_(c.view(-1), alpha=0.1),
    "a row": lambda c: c[1].zero_(),
    "entries of a row": lambda c: c[1].__setitem__(slice(0, 2), 0),
    "rows": lambda c: [row.zero_() for row in c],
    "chunks": lambda c: [part.zero_() for part in c.chunk(2)],
    "transposed": lambda c: c.T.zero_(),
    "bits": lambda c: c.view(torch.uint8).bitwise_xor_(1),
    "inplace": lambda c: nn.functional.threshold(c, 4, 7, inplace=True),
    "init": lambda c: nn.init.constant_(c, 5),
}


@pytest.mark.parametrize("how", ["itself", "data", "detach"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_write_is_refused(write, dtype, how):
    values = torch.arange(12).view(3, 4).to(dtype)
    constant = Constant(values.clone())
    with pytest.raises(RuntimeError, match="is constant"), torch.no_grad():
        WRITES[write](access(how, constant))
    assert torch.equal(constant, values)


def test_a_fused_optimizer_step_is_refused():
    constant, plain = Constant(torch.ones(3)), torch.ones(2)
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.5, "dampening": 0.0}
    flags = {"nesterov": False, "maximize": False, "is_first_step": False}
    torch._fused_sgd_([constant, plain], [torch.zeros(3), torch.ones(2)], [], **options, **flags)
    assert torch.equal(constant, torch.ones(3)) and torch.equal(plain, torch.full((2,), 0.5))
    with pytest.raises(RuntimeError, match="_fused_sgd_ would change"):
        torch._fused_sgd_([constant, plain], [torch.ones(3), torch.ones(2)], [], **options, **flags)
    assert torch.equal(constant, torch.ones(3)) and torch.equal(plain, torch.full((2,), 0.5))


def test_a_constant_as_an_operand_of_what_writes_elsewhere():
    constant, out = Constant(torch.arange(3.0)), torch.zeros(3)
    assert torch.add(constant, 1, out=out) is out and torch.equal(out, torch.tensor([1.0, 2, 3]))
    assert out.mul_(constant) is out and torch.equal(out, torch.tensor([0.0, 2, 6]))
    torch._foreach_add_([out], [constant])
    assert torch.equal(out, torch.tensor([0.0, 3, 8]))
    index = torch.empty(0, dtype=torch.long)
    values, _ = torch.max(constant.view(1, 3), 1, out=(torch.empty(0), index))
    assert values.item() == index.item() == 2


def test_lists_of_constants_themselves_are_averaged():
    model, other = Toy(scale_dtype=torch.float32), Toy(scale_dtype=torch.float32)
    before, after = bits(model), 0.75 * model.lora_A.detach() + 0.25
    own, new = list(model.parameters()), list(other.parameters())
    with torch.no_grad():
        other.lora_A.fill_(1)
        torch._foreach_lerp_(own, new, 0.25)
        assert_same(model, before)
        torch.testing.assert_close(model.lora_A.detach(), after)
        torch._foreach_copy_(own, new)
    assert_same(model, before)
    assert torch.equal(model.lora_A, other.lora_A)


def test_a_call_of_a_layer_does_not_pass_through_the_guard(monkeypatch):
    layer, x = lk.QuantLoRALinear(SIZE, 8, format="nf4", group_size=32, rank=4), torch.randn(3, SIZE)
    expected = layer(x)

    def refuse(*args, **kwargs):
        raise AssertionError("a call costs more than it has to")

    monkeypatch.setattr("loftq_kernels.ops.constant._apply", refuse)
    assert torch.equal(layer(x), expected)
    with pytest.raises(AssertionError, match="a call costs more"):
        layer.codes.shape  # noqa: B018


def test_changes_of_shape_and_memory_reach_the_tensor_that_ops_are_given():
    constant = Constant(torch.arange(6.0).view(2, 3))
    for own in (constant, Constant(torch.arange(6.0).view(2, 3)).detach()):
        assert own.t_() is own and torch.equal(own.held, torch.arange(6.0).view(2, 3).T)
        assert own.set_(torch.ones(5)) is own and torch.equal(own.held, torch.ones(5)) and own.shape == (5,)
        own.data = torch.zeros(2)
        assert torch.equal(own + 1, torch.ones(2))


def test_fake_tensors_and_function_transforms():
    constant, x = Constant(torch.arange(6.0).view(2, 3)), torch.randn(4, 2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(constant)
        assert (fake + 1).shape == (constant + fake.view(2, 3)).shape == (2, 3)
    actual = torch.func.vmap(lambda x: constant * x + constant[1])(x)
    assert torch.equal(actual, torch.arange(6.0).view(2, 3) * x + torch.tensor([3.0, 4, 5]))
    gradient = torch.func.grad(lambda x: (constant.view(-1) * x.view(-1)).sum())(x[0])
    assert torch.equal(gradient, torch.arange(6.0).view(2, 3))


def test_copies_of_the_same_dtype_and_shape_write():
    new = torch.arange(12, dtype=torch.uint8).view(3, 4)
    for how in ("itself", "data", "detach"):
        constant = Constant(torch.zeros(3, 4, dtype=torch.uint8))
        access(how, constant).copy_(new)
        assert torch.equal(constant, new)
    constant.data = 2 * new
    assert torch.equal(constant, 2 * new)
    with pytest.raises(RuntimeError, match="constant"):
        constant.copy_(new.float())
    one, next_to_one = Constant(torch.ones(3)), torch.full((3,), 1 + 2**-23)
    one.copy_(next_to_one)
    assert (one == 1).all(), "taken for an average"
    with loading():
        one.copy_(next_to_one)
    assert (one > 1).all(), "a state dict is loaded to the last bit"


def test_no_gradient():
    constant = Constant(torch.ones(3))
    with pytest.raises(RuntimeError, match="lk.train_only_adapters"):
        constant.requires_grad = True
    with pytest.raises(RuntimeError, match="lk.train_only_adapters"):
        constant.detach().requires_grad = True
    calls = constant.requires_grad_, constant.data.requires_grad_, Toy().requires_grad_
    for ask in (*calls, lambda: Constant(torch.ones(2), requires_grad=True)):
        with pytest.raises(RuntimeError, match="lk.train_only_adapters"):
            ask()
    constant.requires_grad = False
    constant.detach().requires_grad = False
    assert not constant.requires_grad_(False).requires_grad
    assert not constant.detach().requires_grad_(False).requires_grad


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_given_all_parameters(optimizer):
    model, x = Toy(), torch.randn(5, SIZE)
    before, adapter = bits(model), model.lora_A.detach().clone()
    losses = train(model, x, OPTIMIZERS[optimizer](model.parameters()))
    assert losses[-1] < losses[0] and not torch.equal(model.lora_A, adapter)
    assert_same(model, before)


def test_copies_and_pickles_keep_the_class():
    model = Toy()
    before = bits(model)
    assert_same(copy.deepcopy(model), before)
    assert copy.deepcopy(model).codes.data_ptr() != model.codes.data_ptr()
    assert_same(pickle.loads(pickle.dumps(model)), before)
    twice = copy.deepcopy([model.codes, model.codes, model.codes.detach()])
    assert twice[0] is twice[1] and type(twice[2]) is torch.Tensor
    assert_same(model.share_memory(), before)
    assert model.codes.is_shared()


@pytest.fixture
def _swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("assign", [False, True])
def test_where_torch_swaps_tensors(assign):
    model, source = Toy().double(), Toy(seed=1)
    assert_same(model, bits(Toy()))
    model.float().load_state_dict(source.state_dict(), assign=assign)
    assert_same(model, bits(source))


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    assert b"_Alias" not in file.getvalue()
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    model, target = Toy(), Toy(seed=1)
    state = saved(model.state_dict(), weights_only=True)
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert not torch.equal(target.codes, model.codes)
    target.load_state_dict(state, assign=assign)
    assert_same(target, bits(model))
    assert_all_same(target, model)
    assert_same(saved(model, weights_only=False), bits(model))


def test_aliases_and_constants_are_saved_without_their_guard():
    constant = Constant(torch.arange(3.0))
    loaded = saved({"alias": constant.detach(), "constant": constant}, weights_only=True)
    assert type(loaded["alias"]) is torch.Tensor and type(loaded["constant"]) is Constant


def test_meta_and_to_empty():
    source = Toy()
    model = copy.deepcopy(source).to("meta")
    assert type(model.codes) is Constant and model.codes.is_meta
    AveragedModel(model).update_parameters(model)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same(model, bits(source))
    model = copy.deepcopy(source).to("meta")
    model.load_state_dict(source.state_dict(), assign=True)
    assert_same(model, bits(source))


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_conversions_keep_dtypes(convert):
    model = Toy()
    before = bits(model)
    converted = convert(model)
    assert_same(converted, before)
    assert converted.lora_A.dtype != torch.float32


def test_a_module_without_care_keeps_the_dtype_too():
    module = nn.ParameterList([Constant(torch.tensor([0.1, 2e5]))])
    assert torch.equal(module.bfloat16()[0], torch.tensor([0.1, 2e5]))
    with pytest.raises(RuntimeError, match="data = a torch.float16 tensor would change"):
        module.half()  # to infinity


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    model, x = Toy(), torch.randn(5, SIZE, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), (x, model.lora_A, model.lora_B))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        actual = torch.autograd.grad(compiled(x).square().sum(), (x, model.lora_A, model.lora_B))
    torch.testing.assert_close(actual, expected)


def test_compiled_code_may_read_the_data():
    constant, x = Constant(torch.arange(3.0)), torch.ones(3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * constant.data + constant.detach(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 2 * torch.arange(3.0))


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: FlopCounterMode(display=False)])
def test_compiled_under_a_dispatch_mode(around):
    """The compiler's check of custom operators reads `data` of parameters and refuses tensor subclasses."""
    model, x = Toy(), torch.randn(5, SIZE)
    torch._dynamo.reset()
    with around(), torch.no_grad():
        y = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(y, model(x))


def test_under_a_dispatch_mode_data_is_plain_and_detach_guarded():
    constant = Constant(torch.arange(3.0))
    with FlopCounterMode(display=False):
        assert type(constant.data) is torch.Tensor
        with pytest.raises(RuntimeError, match="is constant"):
            constant.detach().mul_(2)
    with pytest.raises(RuntimeError, match="is constant"):
        constant.data.mul_(2)


def test_export():
    model, x = Toy(), torch.randn(5, SIZE)
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        torch.testing.assert_close(exported.module()(x), model(x))


def test_a_parameter_of_data_becomes_a_constant_again():
    model, x = Toy(), torch.randn(5, SIZE)
    before, expected = bits(model), model(x)
    model.codes = nn.Parameter(model.codes.data, requires_grad=False)
    restore_constants(model, NAMES)
    assert_same(model, before)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_functional_call_with_detached_parameters():
    model, x = Toy(), torch.randn(5, SIZE)
    detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, detached, (x,)), model(x))


def packed_bytes(model: Toy) -> int:
    return sum(getattr(model, name).nbytes for name in NAMES)


def data_parallel(rank: int, world: int):
    model, x = Toy(seed=rank), torch.randn(6, SIZE)
    with Collectives() as setting_up:
        parallel = nn.parallel.DistributedDataParallel(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(parallel, x, steps=2)  # the first steps rearrange the buckets of gradients
    with Collectives() as stepping:
        train(parallel, x, steps=3)
    assert_same(model, state)
    return state, setting_up.bytes_of("broadcast_"), stepping.calls


def test_data_parallel_broadcasts_constants_once():
    model = Toy(seed=0)
    everything = sum(p.nbytes for p in model.parameters())
    adapter = model.lora_A.nbytes + model.lora_B.nbytes
    for state, at_first, calls in run_processes(data_parallel, 2):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert everything <= at_first <= everything + 64, "the rest compares the trained parameters' shapes"
        assert calls == [("allreduce_", adapter)] * 3


def sharded(rank: int, world: int, rows: int, format: str):
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    model, x = nn.Sequential(Toy(rows, format)), torch.randn(12, SIZE, generator=torch.Generator().manual_seed(1))
    before = bits(model[0])
    fully_shard(model, mesh=mesh)
    local = {name: getattr(model[0], name).to_local() for name in NAMES}
    losses = train_sharded(model, x.chunk(world)[rank], world)
    everything = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=everything)  # on rank 0

    other = nn.Sequential(Toy(rows, format, seed=5))
    fully_shard(other, mesh=mesh)
    set_model_state_dict(other, dict(state), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    loaded = {name: value.full_tensor() for name, value in other.state_dict().items()}
    kept = {name: value.full_tensor().dtype for name, value in model.double()[0].named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in local.items()}
    return before, shapes, sum(t.nbytes for t in local.values()), losses, state, loaded, kept


def train_sharded(model: nn.Module, x: torch.Tensor, world: int) -> torch.Tensor:
    """The losses of five steps on all processes' inputs together. Clipped nowhere."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(5):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    losses = torch.tensor(losses)
    if world > 1:
        dist.all_reduce(losses)
    return losses / world


@pytest.mark.parametrize("world,rows,format", [(2, 16, "nf4"), (3, 13, "nf2")])
def test_sharded(world, rows, format):
    """Three processes: 13 rows leave the last one 3, and the 4 entries of nf2's codebook leave it none."""
    model = nn.Sequential(Toy(rows, format))
    whole = packed_bytes(model[0])
    x = torch.randn(12, SIZE, generator=torch.Generator().manual_seed(1))
    expected = train_sharded(model, x, 1)
    results = run_processes(sharded, world, rows, format)
    assert sum(result[2] for result in results) == whole
    if world == 2:
        assert [result[2] for result in results] == [whole // 2] * 2
    else:
        assert results[-1][1]["codebook"] == (0,) and results[-1][1]["codes"][0] == 3
    saved_state = results[0][4]
    for before, _, _, losses, _, loaded, kept in results:
        torch.testing.assert_close(losses, expected)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(saved_state[name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(loaded[name], saved_state[name])
        for name in NAMES:
            assert torch.equal(saved_state[f"0.{name}"], before[name])
            assert kept[name] == before[name].dtype
        assert kept["lora_A"] == torch.float64


def sharded_in_bfloat16(rank: int, world: int):
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    policy, x = MixedPrecisionPolicy(param_dtype=torch.bfloat16), torch.randn(4, SIZE)
    together = nn.Sequential(nn.Linear(SIZE, SIZE), Toy(16))
    fully_shard(together, mesh=mesh, mp_policy=policy)
    try:
        together(x)
    except Exception as error:
        refused = str(error)
    apart = nn.Sequential(nn.Linear(SIZE, SIZE), Toy(16))
    fully_shard(apart[1], mesh=mesh)
    fully_shard(apart, mesh=mesh, mp_policy=policy)
    y = apart(x)
    y.square().mean().backward()
    gradients = [p.grad.dtype for p in apart.parameters() if p.requires_grad]
    return refused, y.dtype, gradients


def test_mixed_precision_needs_a_group_without_it():
    """A policy casts every float parameter of its group, the frozen ones too: the packed weight is a group apart."""
    for refused, dtype, gradients in run_processes(sharded_in_bfloat16, 2):
        assert "codebook has dtype" in refused
        assert dtype == torch.bfloat16 and gradients == [torch.float32] * 4
