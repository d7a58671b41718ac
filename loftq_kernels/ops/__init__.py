"""Ops on raw tensors: schemas, reference, derivatives and checked wrappers."""

from loftq_kernels.ops import autograd as autograd
from loftq_kernels.ops import schemas as schemas
from loftq_kernels.ops import triton_backend as triton_backend
from loftq_kernels.ops.backends import available_backends
from loftq_kernels.ops.constant import plain_program
from loftq_kernels.ops.functional import dequantize_tensors, linear_tensors, quantize_tensors

__all__ = ["available_backends", "dequantize_tensors", "linear_tensors", "plain_program", "quantize_tensors"]
