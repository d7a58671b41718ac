"""Triton kernels on raw tensors and ints; one kernel a file with its launcher below. This file imports no triton."""
