"""What quantizing did to a model, to the byte: quantized layers, what was left dense and why, what is trained."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loftq_kernels.nn.adapters import peft_adapters
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.wrappers import named_modules, unwrapped

PACKED_STATE, ADAPTER, DENSE, BUFFER = "packed", "adapter", "dense", "buffer"
_NAMED = 3  # of what is left dense, in the summary
_MIB = 2**20
_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: its error ||W - Q - s B A||_F / ||W||_F and the bytes it took and takes.

    ``weighted_error`` is that of the layer's output on calibration data, where the initializer was given statistics.
    ``note`` says where it got something else than the config asked for, such as a smaller rank.
    """

    name: str
    out_features: int
    in_features: int
    format: str
    rank: int | None
    error: float
    bytes_before: int
    bytes_after: int
    packed_bytes: int
    weighted_error: float | None = None
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weight alone: codes, scales, offsets and code book."""
        return 8 * self.packed_bytes / (self.out_features * self.in_features)

    def __str__(self) -> str:
        rank = "-" if self.rank is None else self.rank
        shape = f"{self.out_features}x{self.in_features}"
        note = f"  {self.note}" if self.note else ""
        numbers = f"{self.bits_per_weight:>7.3f} {self.error:>7.4f}"
        return f"{self.name:<44} {shape:>13} {self.format:>8} {rank:>5} {numbers}{note}"


@dataclass(frozen=True)
class TensorReport:
    """One parameter or buffer of the model: its bytes, what they are, and for dense ones why they are still dense.

    ``state`` is "packed" (codes, scales, offsets, code books), "adapter" (lora_A, lora_B, and those of PEFT), "dense"
    or "buffer".
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    state: str
    trained: bool
    reason: str = ""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        trained = ", trained" if self.trained else ""
        return f"{self.name:<44} {shape:>13} left dense{trained}, {size_text(self.nbytes)}: {self.reason}"


@dataclass
class QuantizationReport:
    """What `quantize_model` did: quantized layers, skipped ones with the reason, every byte, and the time it took.

    Attributes:
        layers: those that this call quantized.
        skipped: layers that were looked at and left as they are -> the reason.
        already: names of layers that had been quantized before this call.
        tensors: every parameter and buffer of the model as it is now, each once: their bytes are the model's.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    already: list[str] = field(default_factory=list)
    tensors: list[TensorReport] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def model_bytes(self) -> int:
        """Bytes of all parameters and buffers of the model."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def bytes_of(self, state: str) -> int:
        """Bytes of the model in a `TensorReport.state`."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.state == state)

    @property
    def left_dense(self) -> list[TensorReport]:
        """Dense parameters, the largest first."""
        return sorted((t for t in self.tensors if t.state == DENSE), key=lambda t: -t.nbytes)

    @property
    def dense_share(self) -> float:
        """Bytes of dense parameters over those of the model."""
        return self.bytes_of(DENSE) / max(self.model_bytes, 1)

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weights of all layers together."""
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        return 8 * sum(layer.packed_bytes for layer in self.layers) / max(weights, 1)

    @property
    def error(self) -> float:
        """Mean of the layers' relative errors."""
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def weighted_error(self) -> float | None:
        """Mean of the layers' weighted errors; None where no layer has one."""
        known = [layer.weighted_error for layer in self.layers if layer.weighted_error is not None]
        return sum(known) / len(known) if known else None

    def __str__(self) -> str:
        lines = [f"{'layer':<44} {'shape':>13} {'format':>8} {'rank':>5} {'bits/w':>7} {'error':>7}"]
        lines += [str(layer) for layer in self.layers]
        lines += [f"{name:<44} skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [str(tensor) for tensor in self.left_dense if self._is_news(tensor)]
        return "\n".join([*lines, self.summary])

    def _is_news(self, tensor: TensorReport) -> bool:
        """Whether no line about a layer has said it yet: matrices, and stacks of them, outside of known layers."""
        return len(tensor.shape) > 1 and tensor.name.rpartition(".")[0] not in self.skipped

    @property
    def summary(self) -> str:
        """One line: what was quantized, and what share of the model was not."""
        return f"{self._quantized_line()}; {dense_line(self.tensors)}"

    def _quantized_line(self) -> str:
        before = f"{len(self.already)} layers were quantized before" if self.already else ""
        if not self.layers:
            return before or "0 layers"
        line = f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits/weight, mean error {self.error:.4f}"
        if self.weighted_error is not None:
            unknown = sum(layer.weighted_error is None for layer in self.layers)
            without = f"; {unknown} layers without statistics" if unknown else ""
            line += f" (of outputs: {self.weighted_error:.4f}{without})"
        line += f", {self.bytes_before / _MIB:.1f} -> {self.bytes_after / _MIB:.1f} MiB, {self.seconds:.1f} s"
        return f"{line}; {before}" if before else line


def dense_line(tensors: list[TensorReport]) -> str:
    """What share of a model's bytes is dense, and the largest parts of it by their names' last two components."""
    total = sum(tensor.nbytes for tensor in tensors)
    parts: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        if tensor.state == DENSE:
            parts[_kind_of_name(tensor.name)] += tensor.nbytes
    dense = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])[:_NAMED]
    named = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    share = dense / max(total, 1)
    line = f"left dense: {size_text(dense)} of the model's {size_text(total)}, {share:.1%}"
    return f"{line} ({named})" if named else line


def _kind_of_name(name: str) -> str:
    """The last two parts of a tensor's name that are no numbers: the same in every block of a model."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


def size_text(nbytes: int) -> str:
    return f"{nbytes / _MIB:.1f} MiB" if nbytes >= _MIB // 10 else f"{nbytes / 1024:.1f} KiB"


def account(model: nn.Module, why_dense: Callable[[str, nn.Module, Tensor], str] = lambda *_: "") -> list[TensorReport]:
    """Every parameter and buffer of a model once, with its bytes. ``why_dense(module's name, module, parameter)``."""
    seen: set[int] = set()
    foreign = peft_adapters(unwrapped(model))
    tensors = []
    for owner, module in named_modules(model):
        for key, tensor, is_buffer in _own_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            state = ADAPTER if id(tensor) in foreign else _state(module, key, is_buffer)
            reason = why_dense(owner, module, tensor) if state == DENSE else ""
            name = f"{owner}.{key}" if owner else key
            shape = () if is_lazy(tensor) else tuple(tensor.shape)
            tensors.append(TensorReport(name, shape, bytes_of(tensor), state, tensor.requires_grad, reason))
    return tensors


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    parameters = ((key, tensor, False) for key, tensor in module._parameters.items())
    buffers = ((key, tensor, True) for key, tensor in module._buffers.items())
    return ((key, tensor, own) for key, tensor, own in itertools.chain(parameters, buffers) if tensor is not None)


def _state(module: nn.Module, key: str, is_buffer: bool) -> str:
    if is_buffer:
        return BUFFER
    if isinstance(module, QuantLoRAModule) and key != "bias":
        return PACKED_STATE if key in PACKED else ADAPTER
    return DENSE


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(bytes_of(tensor) for tensor in itertools.chain(module.parameters(), module.buffers()))


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values, and of the indices of a sparse one; 0 of one that has no shape yet (lazy modules)."""
    if is_lazy(tensor):
        return 0
    parts = _SPARSE_PARTS.get(tensor.layout)
    return tensor.nbytes if parts is None else sum(getattr(tensor.detach(), part)().nbytes for part in parts)
