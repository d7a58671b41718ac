"""Formats: code books, the registry, and weights stored in one."""

from loftq_kernels.formats.format import Format, format_names, get_format
from loftq_kernels.formats.linear import qlora_linear
from loftq_kernels.formats.packed_tensor import PackedTensor, empty_packed, quantize

__all__ = ["Format", "PackedTensor", "empty_packed", "format_names", "get_format", "qlora_linear", "quantize"]
