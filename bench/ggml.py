"""llama.cpp's matrix product on CPUs, a peer, through the shared libraries of ggml.

Set GGML_LIBRARIES to the folder with libggml-base.so and libggml-cpu.so: the lib folder of an installed
llama-cpp-python, or the build folder of the ggml that its source package holds.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"Q4_0": 2, "IQ4_NL": 20}  # enum ggml_type: 32 codes of 4 bits and a float16 scale in 18 bytes
_F32 = 0
_BLOCK, _BLOCK_BYTES = 32, 18
_FILES = ("libggml-base.so", "libggml-cpu.so")


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


_SIGNATURES = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_cpu_init": (None, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, ctypes.c_char_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
}


_SILENCE = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)(lambda *_: None)


def missing() -> str | None:
    """Why the libraries cannot be used, with the remedy; None if they can."""
    remedy = "pip install llama-cpp-python, and set GGML_LIBRARIES to the folder of its libggml-*.so"
    if "GGML_LIBRARIES" not in os.environ:
        return f"GGML_LIBRARIES is not set ({remedy})"
    folder = Path(os.environ["GGML_LIBRARIES"])
    absent = [file.name for file in map(folder.joinpath, _FILES) if not file.is_file()]
    return f"GGML_LIBRARIES={folder} holds no {' nor '.join(absent)} ({remedy})" if absent else None


@functools.cache
def _library() -> dict[str, Callable]:
    """Functions by name, typed."""
    folder = Path(os.environ["GGML_LIBRARIES"])
    parts = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in _FILES]
    functions = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(parts[0], name, None) or getattr(parts[1], name)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    functions["ggml_log_set"](_SILENCE, None)
    functions["ggml_cpu_init"]()
    return functions


@functools.cache
def _buffer_type() -> int:
    """The buffer type that llama.cpp prefers: it interleaves rows for the widest registers, where it can."""
    g = _library()
    registry = g["ggml_backend_cpu_reg"]()
    address = g["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(g["ggml_backend_reg_dev_get"](registry, 0))
    return extra[0] or g["ggml_backend_cpu_buffer_type"]()


class _Weight:
    """A packed weight of random codes, and a float32 graph y = x W^T for every number of rows of x so far."""

    def __init__(self, name: str, shape: tuple[int, int]):
        g = _library()
        self._rows, self._columns = shape
        blocks = torch.randint(0, 256, (shape[0] * shape[1] // _BLOCK, _BLOCK_BYTES), dtype=torch.uint8)
        blocks[:, :2] = torch.rand(len(blocks), 1).mul(0.02).half().view(torch.uint8)
        context = g["ggml_init"](_InitParams(1 << 12, None, True))
        self._tensor = g["ggml_new_tensor_2d"](context, TYPES[name], self._columns, self._rows)
        buffer = g["ggml_backend_buft_alloc_buffer"](_buffer_type(), blocks.nbytes + 4096)
        g["ggml_backend_tensor_alloc"](buffer, self._tensor, g["ggml_backend_buffer_get_base"](buffer))
        g["ggml_backend_tensor_set"](self._tensor, blocks.data_ptr(), 0, blocks.nbytes)
        self._graphs: dict[int, tuple[int, Tensor, int, int, _Plan, Tensor]] = {}

    def _graph(self, m: int):
        g = _library()
        context = g["ggml_init"](_InitParams(8 * m * (self._columns + self._rows) + (1 << 20), None, False))
        x = g["ggml_new_tensor_2d"](context, _F32, self._columns, m)
        y = g["ggml_mul_mat"](context, self._tensor, x)
        graph = g["ggml_new_graph"](context)
        g["ggml_build_forward_expand"](graph, y)
        plan = g["ggml_graph_plan"](graph, torch.get_num_threads(), None)
        work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        return g["ggml_get_data"](x), g["ggml_get_data"](y), graph, plan, work

    def __call__(self, x: Tensor) -> Tensor:
        """y of float32 x [M, K], in memory of the graph."""
        if len(x) not in self._graphs:
            self._graphs[len(x)] = self._graph(len(x))
        source, result, graph, plan, _ = self._graphs[len(x)]
        ctypes.memmove(source, x.data_ptr(), x.nbytes)
        _library()["ggml_graph_compute"](graph, ctypes.byref(plan))
        return torch.frombuffer((ctypes.c_float * (len(x) * self._rows)).from_address(result), dtype=torch.float32)


def weight(name: str, shape: tuple[int, int], device: str) -> _Weight:
    """One packed weight; calling it multiplies float32 rows."""
    return _Weight(name, shape)
