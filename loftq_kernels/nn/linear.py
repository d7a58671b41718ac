"""`QuantLoRALinear`: `nn.Linear` with a quantized weight and a low-rank adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loftq_kernels.initializers import AdapterInit, InputStatistics, LayerConfig, initialize
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.nn.base import QuantLoRAModule


class QuantLoRALinear(QuantLoRAModule):
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias

    A drop-in for `nn.Linear` in inference and training. The packed weight lives in frozen parameters whose dtypes never
    change (`.to(dtype)` moves the adapter and the bias only) and is constant; the adapter is trained, the bias frozen.
    A new layer holds the zero weight, lora_A Kaiming-uniform and lora_B zero, to be filled by a checkpoint;
    `from_linear` and `from_init` make one from a weight.

    With ``adapter="qalora"`` (Xu et al., ICLR 2024) the adapter sees the means of x over the quantization groups,

        scaling * (avg(x) @ lora_A.T) @ lora_B.T,   lora_A [rank, G],   avg(x) [..., G] = sums over groups / group_size,

    so that it is constant in each group and `merge_adapter` can move it into the offsets exactly.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`; dtype is that of the bias.
        adapter_dtype: of lora_A and lora_B; None: dtype, but float32 where that is float16 or bfloat16, as in PEFT.
        format, group_size, scale_dtype: as for `quantize`.
        rank: 1 .. min(in_features, out_features), or None for no adapter; for "qalora" 1 .. min(G, out_features).
        adapter: "lora" or "qalora".
        offset: have offsets in any format, as after merging an adapter.
        lora_alpha, use_rslora: scaling = lora_alpha / rank (/ sqrt(rank) with use_rslora); None means scaling 1.

    Shapes: x [..., in_features] -> [..., out_features], in the dtype of x. Parameters lora_A [rank, in_features],
    lora_B [out_features, rank], bias [out_features]. Raises ValueError or TypeError for arguments out of range.
    """

    kind = "linear"
    dense_copy = "merged_linear"
    adapters = ADAPTERS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nf4",
        group_size: int = 64,
        rank: int | None = 16,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        adapter: str = "lora",
        scale_dtype: torch.dtype = torch.float16,
        offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            out_features,
            in_features,
            bias,
            format=format,
            group_size=group_size,
            rank=rank,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            adapter=adapter,
            scale_dtype=scale_dtype,
            offset=offset,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )
        self.out_features, self.in_features = self.packed.shape

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, cfg: LayerConfig | None = None, statistics: InputStatistics | None = None
    ) -> QuantLoRALinear:
        """Quantize the weight of an `nn.Linear` as cfg says (default: LoftQ, NF4, rank 16); it is not changed.

        ``statistics`` of its input are for the initializers that take them.
        """
        cfg = cfg or LayerConfig()
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}")
        calibration = None if statistics is None else [statistics]
        init = initialize([linear.weight.detach()], cfg, statistics=calibration)[0]
        layer = cls.from_init(init, linear.bias, dtype=linear.weight.dtype, adapter_dtype=cfg.adapter_dtype)
        return layer.train(linear.training)

    @classmethod
    def from_init(
        cls,
        init: AdapterInit,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> QuantLoRALinear:
        """A layer that holds what an initializer returned; ``bias`` [out_features] is copied."""
        with torch.inference_mode(False):  # Parameters made in inference mode could never be trained.
            out_features, in_features = init.packed.shape
            layer = cls(in_features, out_features, bias is not None, **cls._init_options(init, dtype, adapter_dtype))
            layer._fill(init, bias)
            return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self._parameters["bias"])

    def merged_linear(self) -> nn.Linear:
        """A plain `nn.Linear` that computes the same: weight = Q + scaling * lora_B @ lora_A, dense."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.dense_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._describe_weight()}"
        )
