"""Triton kernels on raw tensors and ints, each in a file with what launches it. This file imports no Triton.

The folder stands alone: it imports torch, triton and itself, by relative imports, so that a copy of it works within any
other package. `functional` is what such a package calls.
"""
