"""Ground floor: how codes lie in bytes, and how tensors and descriptions lie in files."""
