"""What other packages write to standard error, in the manner of this one."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from loftq_kernels.progress import is_watched


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bar where standard error is redirected, which would get all of its states."""
    if is_watched() or importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
