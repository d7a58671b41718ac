"""Quantized models in two processes: DDP sends packed weights once, FSDP2 and tensor parallel plans shard them."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import Collectives, run_processes
from helpers import gaussian, tiny_model
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import loftq_kernels as lk
from loftq_kernels.nn.base import PACKED

TOKENS = torch.randint(0, 96, (4, 9), generator=torch.Generator().manual_seed(0))
OFF = "model.layers.1.self_attn.v_proj"  # its adapter is disabled
EVERYTHING = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def quantized(model: nn.Module, **options) -> nn.Module:
    lk.quantize_model(model, lk.QuantConfig(**{"rank": 4, "num_iter": 1, "group_size": 32, **options}), progress=False)
    return model


def llama(seed: int = 0, **options) -> nn.Module:
    """A tiny Llama of odd widths, with biases, int4 (that is, offsets) in one kind of layer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 99, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    return quantized(model, overrides={"*.down_proj": {"format": "int4"}}, **options)


def trained_llama() -> nn.Module:
    model = llama(lora_alpha=16)
    model.get_submodule(OFF).disable_adapter()
    return model


def shard(model: nn.Module) -> nn.Module:
    """As FSDP2's users do: each block, then the root."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, lk.QuantLoRALinear)}


def packed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    held = {f"{name}.{key}": layer._parameters[key] for name, layer in layers_of(model).items() for key in PACKED}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def train(step: Callable[[], torch.Tensor], parameters, steps: int = 5) -> list[float]:
    """Losses of AdamW steps, which is given all parameters."""
    optimizer, losses = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1), []
    for _ in range(steps):
        loss = step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_of(model: nn.Module, tokens: torch.Tensor, steps: int = 5) -> list[float]:
    return train(lambda: model(input_ids=tokens, labels=tokens).loss, model.parameters(), steps)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def averaged(losses: list[float]) -> torch.Tensor:
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def states(model: nn.Module) -> dict[str, tuple[float, bool]]:
    return {name: (layer.scaling, layer.adapter_enabled) for name, layer in layers_of(model).items()}


def message_of(function: Callable) -> str:
    """What a refusal says; "" where there is none."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- the parts of the one run of two processes, of which the start takes most of the time


def data_parallel(rank: int, world: int):
    model, x = quantized(tiny_model(seed=rank)), gaussian(6, 64).chunk(world)[rank]
    with Collectives() as first:
        parallel = nn.parallel.DistributedDataParallel(model)
    state = copy.deepcopy(model.state_dict())
    losses = train(lambda: parallel(x).square().mean(), parallel.parameters(), steps=2)  # which rearrange buckets
    with Collectives() as later:
        losses += train(lambda: parallel(x).square().mean(), parallel.parameters(), steps=3)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    return state, averaged(losses), first.bytes_of("broadcast_"), later.calls, changed


def sharded(rank: int, world: int, folder: str) -> dict:
    folder, found = Path(folder), {}
    model = shard(trained_llama())
    local = {name: tensor.to_local() for name, tensor in packed_tensors(model).items()}
    found["local bytes"] = sum(tensor.nbytes for tensor in local.values())
    found["local rows"] = {name: len(tensor) for name, tensor in local.items()}
    found["losses"] = averaged(losses_of(model, TOKENS.chunk(world)[rank]))
    found["logits"] = logits_of(model)
    found["state"] = get_model_state_dict(model, options=EVERYTHING)
    found["refusals"] = refusals(model, folder)
    lk.save_quantized(model, folder / "native")
    found["load"] = message_of(lambda: lk.load_quantized(folder / "native", model))
    found["saved"] = sorted(file.name for file in (folder / "native").iterdir())  # when any process returns
    found |= {"gathered": gathered(model), "again": str(lk.quantize_model(model, progress=False).summary)}
    found |= {"bfloat16": in_bfloat16(folder), "quantize": dense_and_sharded()}
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder / "parts")
    found["from parts"] = from_parts(folder / "parts")
    found["from the whole"] = from_the_whole(folder / "whole.pt", meta=False)
    found["from the whole, on meta"] = from_the_whole(folder / "whole.pt", meta=True)
    return found


def refusals(model: nn.Module, folder: Path) -> dict[str, str]:
    """What a sharded layer says to those who want its whole weight."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    layer, x = model.model.layers[0].self_attn.q_proj, torch.ones(2, 64)
    reads = {
        "read": lambda: layer.weight.sum(),
        "product": lambda: nn.functional.linear(x, layer.weight),
        "forward": lambda: layer(x),
        "dequantize": layer.dequantize,
        "packed": lambda: layer.packed.dequantize(),
        "validate": lambda: layer.packed.validate(),
        "merged_linear": layer.merged_linear,
        "merge_adapter": lambda: layer.merge_adapter(requantize=True),
        "merge_adapters": lambda: lk.merge_adapters(model, requantize=True),
        "write": lambda: layer.weight.zero_(),
        "averaging": lambda: torch.optim.swa_utils.AveragedModel(layer),
    }
    found = {name: message_of(read) for name, read in reads.items()}
    assert layer.weight.shape == layer.packed.shape == (64, 64) and layer.weight.dtype == torch.float32
    assert (
        layer.packed.nbytes == sum(layer._parameters[key].numel() * w for key, w in (("codes", 1), ("scale", 2))) + 64
    )
    assert "rank=4, scaling=4" in repr(layer) and "shape=(64, 64)" in repr(layer.weight)
    return found


def gathered(model: nn.Module) -> torch.Tensor:
    """What the refusal advises: the whole weight after unshard(), which merging refuses still."""
    block = model.model.layers[0]
    block.unshard()
    weight = block.self_attn.q_proj.weight.clone().detach()
    assert "would undo the merge" in message_of(lambda: block.self_attn.q_proj.merge_adapter(requantize=True))
    assert block.self_attn.q_proj.has_adapter
    block.reshard()
    return weight


def in_bfloat16(folder: Path) -> dict:
    """A policy casts every parameter of its groups; quantized layers are groups apart, without one."""
    policy, found = MixedPrecisionPolicy(param_dtype=torch.bfloat16), {}
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(trained_llama(), mesh=mesh, mp_policy=policy)
    found["together"] = message_of(lambda: logits_of(model))
    model = trained_llama()
    for layer in layers_of(model).values():
        fully_shard(layer, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found["gradients"] = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    found["logits"] = logits_of(model)
    lk.save_quantized(model, folder / "bfloat16")
    return found


def dense_and_sharded() -> str:
    """What quantizing a model says that is sharded already."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    return message_of(lambda: quantized(model))


def from_parts(folder: Path) -> tuple:
    """A sharded checkpoint in a model of other values, scaling and switches."""
    model = shard(llama(seed=1))
    state = get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    return logits_of(model), states(model)


def from_the_whole(file: Path, meta: bool) -> tuple:
    """One process's state_dict, which process 0 alone reads, in a sharded model."""
    model = llama(seed=1)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if meta:
        model = shard(model.to("meta"))
        model.to_empty(device="cpu")
        for name, buffer in model.named_buffers():  # which state_dict leaves out
            buffer.copy_(buffers[name])
    else:
        model = shard(model)
    state = torch.load(file, weights_only=True) if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=BROADCAST)
    return logits_of(model), states(model)


class Rowwise(ParallelStyle):
    """Shards what has a row per output (which torch calls column-wise), and computes with the local rows."""

    SHARDED = ("codes", "scale", "offset", "lora_B", "bias")

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        rows, local = module.codes.shape[0], copy.copy(module)  # which shares the parameters
        distribute_module(module, device_mesh, self.partition)

        def forward(x: torch.Tensor) -> torch.Tensor:
            x = DTensor.from_local(x, device_mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            held = {name: self.local(name, own) for name, own in module.named_parameters()}
            y = torch.func.functional_call(local, held, (x,))
            shape = (*x.shape[:-1], rows)
            return DTensor.from_local(
                y, device_mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=torch.empty(shape).stride()
            ).full_tensor()

        module.forward = forward
        return module

    @classmethod
    def partition(cls, name: str, module: nn.Module, mesh) -> None:
        for key, own in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if key in cls.SHARDED else Replicate()
            parts = nn.Parameter(distribute_tensor(own, mesh, [placement]), requires_grad=own.requires_grad)
            module.register_parameter(key, parts)

    @classmethod
    def local(cls, name: str, own: DTensor) -> torch.Tensor:
        if name == "lora_A":  # each process adds the gradient of its rows
            return own.to_local(grad_placements=[Partial()])
        return own.to_local()


def wide_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 97), nn.GELU(), nn.Linear(97, 64), nn.GELU(), nn.Linear(64, 33, bias=False))
    quantized(model, overrides={"2": {"format": "int4"}, "4": {"adapter": "qalora", "rank": 2}})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def tensor_parallel(rank: int, world: int, folder: str):
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    model = parallelize_module(wide_model(), mesh, {name: Rowwise() for name in ("0", "2", "4")})
    x = gaussian(5, 64).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    size = sum(tensor.to_local().nbytes for tensor in packed_tensors(model).values())
    state = get_model_state_dict(model, options=EVERYTHING)
    lk.save_quantized(model, Path(folder) / "tensor parallel")
    return y.detach(), x.grad, gradients, size, state


def all_parts(rank: int, world: int, folder: str) -> dict:
    found = {"data parallel": data_parallel(rank, world), "tensor parallel": tensor_parallel(rank, world, folder)}
    return {**found, **sharded(rank, world, folder)}


@functools.cache
def whole() -> tuple[nn.Module, list[float]]:
    """The same five steps in one process, and their losses."""
    torch.manual_seed(0)
    model = trained_llama()
    return model, losses_of(model, TOKENS)


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        torch.save(whole()[0].state_dict(), Path(folder) / "whole.pt")
        yield run_processes(all_parts, 2, folder), Path(folder)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of gradients in another order, five steps of AdamW later."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


class TestFullyShard:
    def test_each_process_holds_half(self, results):
        held = packed_tensors(whole()[0])
        rows = {name: [found["local rows"][name] for found in results[0]] for name in held}
        assert all(sum(rows[name]) == len(tensor) for name, tensor in held.items())
        assert all(abs(one - other) <= 1 for one, other in rows.values())
        assert any(one != other for one, other in rows.values()), "99 rows"
        sizes = [found["local bytes"] for found in results[0]]
        odd_row = sum(tensor[0].nbytes for name, tensor in held.items() if len(tensor) % 2)
        assert sum(sizes) == sum(tensor.nbytes for tensor in held.values())
        assert 0 < max(sizes) - min(sizes) <= odd_row

    def test_losses_equal_one_process(self, results):
        for found in results[0]:
            torch.testing.assert_close(found["losses"], torch.tensor(whole()[1]), rtol=1e-4, atol=0)
            close(found["logits"], logits_of(whole()[0]))
        assert whole()[1][-1] < whole()[1][0]

    def test_state_of_process_0_in_one_process(self, results):
        first, second = results[0]
        assert first["state"].keys() == whole()[0].state_dict().keys() and not second["state"]
        model = llama(seed=1)
        model.load_state_dict(first["state"])
        torch.testing.assert_close(logits_of(model), first["logits"], rtol=1e-4, atol=1e-5)
        assert states(model) == states(whole()[0]) and states(model)[OFF] == (4.0, False)
        for name, tensor in packed_tensors(whole()[0]).items():
            assert torch.equal(first["state"][name], tensor) and first["state"][name].dtype == tensor.dtype

    @pytest.mark.parametrize("way", ["from the whole", "from the whole, on meta"])
    def test_state_of_one_process_in_shards(self, results, way):
        for found in results[0]:
            logits, scaled = found[way]
            torch.testing.assert_close(logits, logits_of(whole()[0]), rtol=1e-4, atol=1e-5)
            assert scaled == states(whole()[0])

    def test_sharded_checkpoint(self, results):
        for found in results[0]:
            assert torch.equal(found["from parts"][0], found["logits"])
            assert found["from parts"][1] == states(whole()[0])

    def test_save_quantized_gathers(self, results):
        found, folder = results
        assert found[0]["saved"] == found[1]["saved"] and len(found[0]["saved"]) == 3
        model = lk.load_quantized(folder / "native")
        assert type(model).__name__ == "LlamaForCausalLM" and states(model) == states(whole()[0])
        torch.testing.assert_close(logits_of(model), found[0]["logits"], rtol=1e-4, atol=1e-5)

    def test_reads_of_shards_are_refused_in_words(self, results):
        for found in results[0]:
            said = found["refusals"]
            for name in ("read", "product", "forward", "dequantize", "packed", "validate", "merged_linear"):
                assert "ValueError: the packed weight is sharded (codes (64, 32), of which (32, 32)" in said[name], name
                assert "call unshard()" in said[name] and "\n" not in said[name]
            for name in ("merge_adapter", "merge_adapters"):
                assert "fully_shard manages the layer's parameters and would undo the merge" in said[name]
                assert "save_quantized" in said[name]
            assert "read-only" in said["write"]

    def test_what_the_refusal_advises(self, results):
        expected = whole()[0].model.layers[0].self_attn.q_proj.weight.clone().detach()
        for found in results[0]:
            close(found["gathered"], expected)

    def test_layers_inside_a_mixed_precision_policy(self, results):
        model = trained_llama()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for found in (result["bfloat16"] for result in results[0]):
            assert "codebook must be float32, got torch.bfloat16" in found["together"]
            assert "fully_shard" in found["together"] and "\n" not in found["together"]
            assert found["logits"].dtype == torch.bfloat16
            torch.testing.assert_close(found["logits"].float(), logits_of(model), rtol=0.05, atol=0.02)
            trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert found["gradients"].keys() == trained.keys()
            for name, gradient in found["gradients"].items():
                assert gradient.dtype == torch.float32
                difference = (gradient - trained[name]).norm() / trained[name].norm().clamp_min(1e-12)
                assert difference < 0.05, name
        loaded = lk.load_quantized(results[1] / "bfloat16")
        assert torch.equal(logits_of(loaded), logits_of(model)) and states(loaded) == states(model)

    def test_conversions_after_sharding_are_refused(self, results):
        for found in results[0]:
            assert "is sharded: load into the whole model, then call fully_shard" in found["load"]
            assert "its weight is sharded: quantize the whole model, then call fully_shard" in found["quantize"]

    def test_quantizing_again(self, results):
        assert all("14 layers were quantized before" in found["again"] for found in results[0])


def test_data_parallel_sends_packed_weights_once(results):
    model = quantized(tiny_model(seed=0))
    state, x = copy.deepcopy(model.state_dict()), gaussian(6, 64)
    everything = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    adapters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    expected = train(lambda: model(x).square().mean(), model.parameters(), steps=2)
    expected += train(lambda: model(x).square().mean(), model.parameters(), steps=3)
    for sent, losses, at_first, calls, changed in (found["data parallel"] for found in results[0]):
        assert all(torch.equal(sent[name], value) for name, value in state.items()), "those of process 0"
        assert everything <= at_first <= everything + 512, "the rest compares the trained parameters' shapes"
        gradients = sum(size for name, size in calls if name == "allreduce_")
        buffers = sum(size for name, size in calls if name != "allreduce_")
        assert gradients == 3 * adapters and buffers == 3 * model.shift.nbytes, "no packed bytes in a step"
        assert changed and all(name.rpartition(".")[2].startswith("lora_") for name in changed)
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_tensor_parallel_plans_shard_packed_weights(results):
    model, x = wide_model(), gaussian(5, 64).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    folder = results[1] / "tensor parallel"
    results = [found["tensor parallel"] for found in results[0]]
    held = packed_tensors(model)
    sharded = sum(tensor.nbytes for name, tensor in held.items() if not name.endswith("codebook"))
    replicated = sum(tensor.nbytes for name, tensor in held.items() if name.endswith("codebook"))
    assert sum(result[3] for result in results) == sharded + 2 * replicated
    for actual, grad, gradients, size, _ in results:
        assert size < 0.53 * sharded + replicated
        torch.testing.assert_close(actual, y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-6)
        assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    loaded = lk.load_quantized(folder, wide_model_without_quantization())
    torch.testing.assert_close(loaded(x), y)
    for name, value in model.state_dict().items():
        assert torch.equal(results[0][4][name], value), name


def wide_model_without_quantization() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 97), nn.GELU(), nn.Linear(97, 64), nn.GELU(), nn.Linear(64, 33, bias=False))
