"""The names of the package one folder up, for versions of the kernels package before 0.11, which look for them here."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).absolute().parents[1] / "__init__.py"
_name = f"_{Path(__file__).absolute().parent.name}_{hash(_path):x}".replace("-", "_")
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _path)
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
__all__ = sys.modules[_name].__all__
globals().update({name: getattr(sys.modules[_name], name) for name in __all__})
