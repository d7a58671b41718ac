"""Models inside torch's wrappers: everything that names layers names them as the model itself does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import gaussian, tiny_bert, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import loftq_kernels as lk
from loftq_kernels.nn.adapters import adapter_parameters
from loftq_kernels.nn.wrappers import named_modules, named_tensors, submodule

pytest.importorskip("safetensors")
X = gaussian(3, 64)
CFG = lk.QuantConfig("nf2", rank=4, num_iter=1, quantize_head=True)


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def inside(wrap, *names: str):
    """Wraps modules of a model rather than itself."""

    def wrapped(model: nn.Module) -> nn.Module:
        for name in names:
            parent, _, key = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, key, wrap(getattr(owner, key)))
        return model

    return wrapped


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


WRAPPERS = {
    "compile": compiled,
    "compile in place": compiled_in_place,
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "checkpoint": checkpoint_wrapper,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of DDP": lambda model: compiled(DistributedDataParallel(model)),
    "checkpoint inside": inside(checkpoint_wrapper, "layers.0.up", "layers.1"),
    "compile inside": inside(compiled, "layers.0.up", "head"),
    "compile of checkpoint inside": inside(lambda module: compiled(checkpoint_wrapper(module)), "layers.0.up"),
    "DDP inside": inside(DistributedDataParallel, "layers.0.up", "head"),
    "AveragedModel inside": inside(AveragedModel, "head"),
}


@pytest.mark.parametrize("name", WRAPPERS)
class TestWrapped:
    def test_names(self, name):
        plain, wrapped = tiny_model(), WRAPPERS[name](tiny_model())
        assert [n for n, _ in named_modules(wrapped)] == [n for n, _ in plain.named_modules()]
        assert [n for n, _ in named_tensors(wrapped, persistent=True)] == list(plain.state_dict(keep_vars=True))
        for path, module in named_modules(wrapped):
            assert submodule(wrapped, path) is module

    def test_quantize_save_load(self, name, tmp_path):
        """Files are byte for byte those of the plain model; a wrapper runs the layers that are in it now."""
        plain, wrapped = tiny_model(), WRAPPERS[name](tiny_model())
        wrapped(X)
        expected = lk.quantize_model(plain, CFG, progress=False)
        report = lk.quantize_model(wrapped, CFG, progress=False)
        assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
        assert [(t.name, t.nbytes, t.state) for t in report.tensors] == [
            (t.name, t.nbytes, t.state) for t in expected.tensors
        ]
        assert torch.equal(wrapped(X), plain(X))
        lk.save_quantized(plain, tmp_path / "plain")
        lk.save_quantized(wrapped, tmp_path / "wrapped")
        assert contents(tmp_path / "plain") == contents(tmp_path / "wrapped")
        other = WRAPPERS[name](tiny_model(9))
        other(X)
        assert lk.load_quantized(tmp_path / "wrapped", other) is other
        assert torch.equal(other(X), plain(X)) and torch.equal(
            lk.load_quantized(tmp_path / "wrapped", tiny_model(9))(X), plain(X)
        )

    def test_train_and_merge(self, name):
        wrapped = WRAPPERS[name](tiny_model())
        lk.quantize_model(wrapped, CFG, progress=False)
        for parameter in wrapped.parameters():
            parameter.requires_grad_(False)
        lk.train_only_adapters(wrapped)
        trained = {id(p) for p in wrapped.parameters() if p.requires_grad}
        assert trained == {id(p) for p in adapter_parameters(wrapped).values()} and len(trained) == 10
        assert "layers.0.up.lora_A" in adapter_parameters(wrapped)
        before = wrapped(X)
        added = lk.merge_adapters(wrapped, requantize=True)
        assert added.keys() == {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"}
        assert not torch.equal(wrapped(X), before)

    def test_rilq(self, name):
        """The same losses as without."""
        dense = tiny_model()
        tuned = []
        for wrap in (lambda model: model, WRAPPERS[name]):
            model = copy.deepcopy(dense)
            lk.quantize_model(model, CFG, progress=False)
            cfg = lk.RilqConfig(lr=1e-2, steps=3, accumulate=1, validate_every=1, weight=1.0)
            tuned.append(lk.rilq_tune(wrap(model), wrap(copy.deepcopy(dense)), [X, -X], cfg, progress=False))
        assert [point.loss for point in tuned[0].train] == pytest.approx([p.loss for p in tuned[1].train], rel=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_transformers_model_is_known_inside_a_wrapper(tmp_path):
    model = compiled(tiny_bert())
    lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False)
    lk.save_quantized(model, tmp_path)
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(lk.load_quantized(tmp_path)(tokens)[0], model(tokens)[0])


def test_a_module_of_ones_own_called_module():
    """Only torch's wrappers are looked through."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(64, 64)

    assert [name for name, _ in named_modules(Mine())] == ["", "module"]
