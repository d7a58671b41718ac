"""Whole tasks, each one command: ``python -m loftq_kernels.recipes.finetune``."""
