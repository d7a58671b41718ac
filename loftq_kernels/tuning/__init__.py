"""RILQ: tuning the adapters of all layers together towards the full-precision model."""
