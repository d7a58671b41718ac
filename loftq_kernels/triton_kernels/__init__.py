"""Triton kernels on raw tensors and integers: one kernel a file, its launcher below it. Imported on first use only."""
