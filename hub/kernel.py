"""Products with quantized weights and a low-rank adapter, y = x @ W.T + scaling * (x @ lora_A.T) @ lora_B.T + bias, by
Triton kernels that read the packed weight: `qlora_linear` (differentiable), `qlora_linear_grad_input`, `dequantize`.
"""

from .triton_kernels.functional import dequantize, qlora_linear, qlora_linear_grad_input

__all__ = ["dequantize", "qlora_linear", "qlora_linear_grad_input"]
