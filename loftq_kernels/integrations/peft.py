"""PEFT works on our layers."""


def register() -> None:
    """Make our layers known to PEFT."""


register()
