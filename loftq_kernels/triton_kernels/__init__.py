"""Triton kernels on raw tensors and ints, each in a file with what launches it. This file imports no Triton."""
