"""`PackedTensor`: a quantized weight as it is stored, and the way to and from dense ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loftq_kernels import arguments, ops
from loftq_kernels.formats.format import Format, get_format
from loftq_kernels.ops import checks
from loftq_kernels.storage import files, packing

_METADATA_KEY = "loftq_packed_tensor"


class PackedTensor:
    """A weight [N, K] as codes, scales, offsets and a code book: W = codebook[codes] * scale + offset.

    Attributes:
        codes: uint8 [N, K_pad * bits / 8], laid out as in `loftq_kernels.storage.packing`.
        scale: [N, G], float16, bfloat16 or float32; G groups of ``group_size`` columns (the last may be partial).
        offset: [N, G] in the dtype of scale, for affine formats and for weights into which an adapter was merged;
            otherwise None. Merging a float64 adapter makes both float64. No kernel reads those: products are slow.
        codebook: float32 [2^bits].
        shape, group_size, format: (N, K), columns per group (-1: the row) and the `Format`.

    It copies with `copy.deepcopy`, pickles, moves with `to`, and saves with `save`. Its tensors are not to be edited.
    """

    __slots__ = ("codebook", "codes", "format", "group_size", "offset", "scale", "shape")

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        codebook: Tensor,
        *,
        in_features: int,
        group_size: int,
        format: str | Format,
    ):
        self.format = format if isinstance(format, Format) else get_format(format)
        self.codes, self.scale, self.offset, self.codebook = codes, scale, offset, codebook
        self.shape = torch.Size((codes.shape[0], in_features))
        self.group_size = group_size
        if not torch.compiler.is_compiling():
            # This is what `torch._dynamo.mark_static_address` does, without its import, which takes seconds. It keeps
            # torch.compile(mode="reduce-overhead") from copying the weight at every call.
            for tensor in self.tensors().values():
                tensor._dynamo_static_input_type = "unguarded"

    def validate(self) -> PackedTensor:
        """Raise ValueError unless the tensors agree with each other, the shape and the format; return self."""
        if checks.bits_of(self.codebook) != self.bits:
            raise ValueError(
                f"format {self.format.name} has {self.bits} bits, codebook has {self.codebook.numel()} entries"
            )
        if self.offset is None and self.format.affine:
            raise ValueError(f"format {self.format.name} is affine, but the weight has no offset")
        checks.check_packed(self.codes, self.scale, self.offset, self.codebook, self.shape[1], self.group_size)
        if not torch.equal(self.codebook, self.format.codebook(self.codebook.device)):
            raise ValueError(f"codebook is not that of format {self.format.name}: {self.codebook[:4].tolist()}...")
        return self

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.format.bits

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name; ``offset`` only where there is one."""
        named = {"codes": self.codes, "scale": self.scale, "offset": self.offset, "codebook": self.codebook}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, padding and code book included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (N K)."""
        return 8 * self.nbytes / max(self.shape.numel(), 1)

    def dequantize(self, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
        """codebook[codes] * scale + offset as a dense [N, K]; computed in float32 and rounded once to dtype."""
        return ops.dequantize_tensors(
            self.codes, self.scale, self.offset, self.codebook, self.shape[1], self.group_size, dtype, backend=backend
        )

    def _with_tensors(self, tensors: Mapping[str, Tensor]) -> PackedTensor:
        return PackedTensor(
            tensors["codes"],
            tensors["scale"],
            tensors.get("offset"),
            tensors["codebook"],
            in_features=self.shape[1],
            group_size=self.group_size,
            format=self.format,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedTensor:
        """The same weight on another device. Dtypes are part of the format and do not change."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"PackedTensor.to moves between devices; for {device} values use dequantize({device})")
        return self._with_tensors({k: t.to(device, non_blocking=non_blocking) for k, t in self.tensors().items()})

    def cpu(self) -> PackedTensor:
        return self.to("cpu")

    def cuda(self, device: torch.device | str = "cuda") -> PackedTensor:
        return self.to(device)

    def clone(self) -> PackedTensor:
        return self._with_tensors({k: t.clone() for k, t in self.tensors().items()})

    def __deepcopy__(self, memo) -> PackedTensor:
        return self.clone()

    def __reduce__(self):
        return _rebuild, (self.tensors(), self.shape[1], self.group_size, self.format.name)

    def __repr__(self) -> str:
        return (
            f"PackedTensor({self.format.name}, shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"scale_dtype={self.scale.dtype}, {self.bits_per_weight:.3f} bits/weight, device={self.device})"
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; an existing one stays as it was if that fails."""
        metadata = {"format": self.format.name, "in_features": self.shape[1], "group_size": self.group_size}
        if self.offset is not None and not self.format.affine:
            metadata["merged"] = True  # It tells this file from one that claims another format.
        files.save_tensors(path, self.tensors(), {_METADATA_KEY: json.dumps(metadata)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> PackedTensor:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError naming what is wrong with the file."""
        tensors, metadata = files.load_tensors(path, device)
        if _METADATA_KEY not in metadata:
            raise ValueError(f"{path} is not a saved PackedTensor: its header has no {_METADATA_KEY!r}")
        try:
            described = json.loads(metadata[_METADATA_KEY])
            packed = _rebuild(tensors, described["in_features"], described["group_size"], described["format"])
            if packed.offset is not None and not (packed.format.affine or described.get("merged") is True):
                raise ValueError(f"format {packed.format.name}: affine=False, but the weight has an offset")
            return packed.validate()
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _rebuild(tensors: Mapping[str, Tensor], in_features: int, group_size: int, format_name: str) -> PackedTensor:
    return PackedTensor(
        tensors["codes"],
        tensors["scale"],
        tensors.get("offset"),
        tensors["codebook"],
        in_features=in_features,
        group_size=group_size,
        format=format_name,
    )


def quantize(
    weight: Tensor,
    format: str = "nf4",
    group_size: int = 64,
    *,
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    backend: str | None = None,
    name: str = "weight",
) -> PackedTensor:
    """Round a weight to the nearest values that a format can store.

    Args:
        weight: [N, K], floating point, any strides.
        format: one of `format_names()`.
        group_size: 32, 64, 128, 256 or -1 (the whole row): columns that share a scale.
        scale_dtype: float16, bfloat16 or float32. Codes are chosen against the scale as stored.
        scale_search: try 25 scales per group and keep the one of least squared error, instead of the format's rule.
        backend: one of `available_backends()`; None lets the device of weight choose.
        name: what error messages call the weight.

    Raises ValueError for an unknown format or group size, NaN or Inf in weight (naming the row), a meta tensor, or a
    group whose scale does not fit scale_dtype; TypeError for a weight that is not floating point.
    """
    fmt = get_format(format)
    checks.check_floating(name, weight)
    group_size = packing.check_group_size(group_size)
    codebook = fmt.codebook(weight.device)
    codes, scale, offset = ops.quantize_tensors(
        weight, codebook, group_size, fmt.scale_rule, scale_dtype, scale_search, backend=backend, name=name
    )
    return PackedTensor(codes, scale, offset, codebook, in_features=weight.shape[1], group_size=group_size, format=fmt)


def empty_packed(
    out_features: int,
    in_features: int,
    format: str,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    offset: bool = False,
    device: torch.device | str | None = None,
) -> PackedTensor:
    """A packed weight of zeros [out_features, in_features], to be filled by a checkpoint; works on the meta device.

    ``offset``: have offsets even in a format without, as after merging an adapter; scale_dtype may then be float64.
    """
    fmt = get_format(format)
    group_size = packing.check_group_size(group_size)
    out_features = arguments.whole_number("out_features", out_features, 1)
    in_features = arguments.whole_number("in_features", in_features, 1)
    arguments.choice("scale_dtype", scale_dtype, checks.STORED_DTYPES if offset else checks.SCALE_DTYPES)
    groups = (out_features, packing.num_groups(in_features, group_size))
    scale = torch.zeros(groups, dtype=scale_dtype, device=device)
    return PackedTensor(
        torch.zeros(out_features, packing.row_bytes(in_features, fmt.bits), dtype=torch.uint8, device=device),
        scale,
        torch.zeros_like(scale) if fmt.affine or offset else None,
        fmt.codebook(scale.device),
        in_features=in_features,
        group_size=group_size,
        format=fmt,
    )
