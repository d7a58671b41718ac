"""The program ``loftq-kernels``: it begins without torch, which takes seconds to import, and says so to the package.

It stands beside the package, for whatever stands inside is imported after the package itself.
"""

running = False  # Whether this process is the program; loftq_kernels/__init__.py reads it.


def main() -> int:
    global running
    running = True
    from loftq_kernels.cli.main import main

    return main()
