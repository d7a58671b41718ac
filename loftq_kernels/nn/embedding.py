"""`QuantLoRAEmbedding`: `nn.Embedding` with a quantized table and a low-rank adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from loftq_kernels import arguments
from loftq_kernels.initializers import AdapterInit, LayerConfig, initialize
from loftq_kernels.nn.adapter_slots import RowNames, by_row, mixed_rows_of
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.ops import dequantize_tensors

_INDEX_DTYPES = (torch.int64, torch.int32)  # What nn.Embedding accepts.


class QuantLoRAEmbedding(QuantLoRAModule):
    """y = (codebook[codes] * scale + offset)[indices] + scaling * lora_B[indices] @ lora_A

    A drop-in for `nn.Embedding` that decodes the rows asked for and no others. Moves, state_dict and training are as
    for `QuantLoRALinear`; the adapter is that of LoftQ's and PEFT's code, with the names of this package: lora_B
    belongs to the rows.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as for `nn.Embedding`. The padding row has
            no adapter: its row of lora_B is zero and gets no gradient.
        max_norm: must be None: it rescales rows in place, which a packed row cannot be.
        format, group_size, scale_dtype, rank, lora_alpha, use_rslora, adapter_dtype: as for `QuantLoRALinear`.

    Shapes: indices [...] int64 or int32 -> [..., embedding_dim], in ``dtype``, which `.to(dtype)` changes.
    Parameters lora_A [rank, embedding_dim], lora_B [num_embeddings, rank].
    Raises ValueError or TypeError for arguments out of range and IndexError for an index outside the table.
    """

    kind = "embedding"
    dense_copy = "merged_embedding"
    geometry_names = ("padding_idx",)
    bias: None
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False  # nn.Embedding's, which PEFT reads

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *,
        format: str = "nf4",
        group_size: int = 64,
        rank: int | None = 16,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        if max_norm is not None:
            raise ValueError(f"max_norm={max_norm!r} rescales rows in place, which a quantized table cannot do")
        super().__init__(
            num_embeddings,
            embedding_dim,
            False,
            format=format,
            group_size=group_size,
            rank=rank,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            scale_dtype=scale_dtype,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )
        self.num_embeddings, self.embedding_dim = self.packed.shape
        self.padding_idx = _padding_row(padding_idx, self.num_embeddings)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, cfg: LayerConfig | None = None) -> QuantLoRAEmbedding:
        """Quantize the table of an `nn.Embedding` as cfg says (default: LoftQ, NF4, rank 16); it is not changed.

        Raises TypeError for other classes, subclasses included, and ValueError for an embedding with max_norm,
        scale_grad_by_freq or sparse gradients, for adapter="qalora", and as the initializer.
        """
        if type(embedding) is not nn.Embedding:
            raise TypeError(f"from_embedding takes a torch.nn.Embedding, got {type(embedding).__name__}")
        if reason := unsupported(embedding):
            raise ValueError(f"the embedding has {reason}")
        cfg = cfg or LayerConfig()
        if cfg.has_qalora:
            cls._check_adapter(cfg.adapter)
        init = initialize([embedding.weight.detach()], cfg)[0]
        layer = cls.from_init(
            init, embedding.padding_idx, dtype=embedding.weight.dtype, adapter_dtype=cfg.adapter_dtype
        )
        return layer.train(embedding.training)

    @classmethod
    def from_init(
        cls,
        init: AdapterInit,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> QuantLoRAEmbedding:
        """A layer that holds what an initializer returned for the table."""
        with torch.inference_mode(False):  # Parameters made in inference mode could never be trained.
            layer = cls(*init.packed.shape, padding_idx, **cls._init_options(init, dtype, adapter_dtype))
            layer._fill(init, None)
            if layer.padding_idx is not None and layer.lora_B is not None:
                layer.lora_B.data[layer.padding_idx] = 0
            return layer

    def forward(self, indices: Tensor) -> Tensor:
        if not isinstance(indices, Tensor) or indices.dtype not in _INDEX_DTYPES:
            raise TypeError(f"indices must be int64 or int32, got {getattr(indices, 'dtype', type(indices))}")
        try:
            y = self._rows(indices.reshape(-1))
        except (IndexError, RuntimeError) as error:
            self._check_indices(indices)
            raise error
        if (rows := mixed_rows_of(self.slots)) is not None:
            y = self._add_by_row(y, indices, rows)
        elif (term := self.low_rank()) is not None:
            hidden = functional.embedding(indices.reshape(-1), term.lora_B, self.padding_idx)
            y = torch.add(y, (hidden @ term.lora_A).to(y.dtype), alpha=term.scaling)
        return y.view(*indices.shape, self.embedding_dim)

    def _add_by_row(self, y: Tensor, indices: Tensor, rows: RowNames) -> Tensor:
        """y [n, embedding_dim] and the adapters that `use_adapters` has given to each row of indices."""
        start = self.start_terms()
        lora_A, lora_B, ids = by_row(self, self.slots.loaded, rows, start, len(start), indices.shape)
        ids, indices = ids.reshape(-1), indices.reshape(-1)
        hidden = lora_B[ids.clamp(min=0), indices]
        for i, factor in enumerate(lora_A):
            y = torch.where((ids == i).unsqueeze(1), y + (hidden @ factor).to(y.dtype), y)
        return y

    def _rows(self, indices: Tensor) -> Tensor:
        """Decode rows [n, embedding_dim]: a row's codes and scales are contiguous, and decode without the others."""
        *stored, codebook = self.stored()
        codes, scale, offset = (None if t is None else t.index_select(0, indices) for t in stored)
        return dequantize_tensors(codes, scale, offset, codebook, self.embedding_dim, self.group_size, self.dtype)

    def _check_indices(self, indices: Tensor) -> None:
        outside = (indices < 0) | (indices >= self.num_embeddings)
        if outside.any():
            raise IndexError(f"index {indices[outside][0].item()} is outside 0 .. {self.num_embeddings - 1}")

    def merged_embedding(self) -> nn.Embedding:
        """A plain `nn.Embedding` that looks up the same: table = Q + scaling * lora_B @ lora_A, dense."""
        embedding = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta", dtype=self.dtype
        )
        embedding.weight = nn.Parameter(self.dense_weight())
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._describe_weight()}"


def unsupported(embedding: nn.Embedding) -> str | None:
    """The option of an embedding that a quantized one cannot honour, with the reason; None if there is none."""
    if embedding.max_norm is not None:
        return f"max_norm={embedding.max_norm}, which rescales rows in place; a quantized table is constant"
    if embedding.scale_grad_by_freq:
        return "scale_grad_by_freq=True, which the adapter's gradients do not follow"
    if embedding.sparse:
        return "sparse=True, but the adapter's gradients are dense"
    return None


def _padding_row(padding_idx: int | None, num_embeddings: int) -> int | None:
    """padding_idx as nn.Embedding reads it: a negative one counts from the end."""
    if padding_idx is None:
        return None
    note = f" (the table of num_embeddings={num_embeddings})"
    row = arguments.whole_number("padding_idx", padding_idx, -num_embeddings, num_embeddings - 1, note=note)
    return row % num_embeddings
