"""The command line: ``loftq-kernels COMMAND``."""

from loftq_kernels.cli.main import main

__all__ = ["main"]
