"""Builds the C++ extension ``loftq_kernels/libloftq_torch.so``; everything else about the package is in pyproject.toml.

The extension is optional: without torch at build time, a compiler, or a successful compilation the package installs as
pure Python and says why. torch is deliberately not a build requirement: an isolated build would download a second one.

    pip install --no-build-isolation -e .    builds the extension against the torch that is installed
    LOFTQ_REQUIRE_EXT=1                      a failure to build it is an error
    LOFTQ_SKIP_EXT=1                         does not build it
    MAX_JOBS=2                               compiles that many files at a time
"""

import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0"
REQUIRE = os.environ.get("LOFTQ_REQUIRE_EXT") == "1"
SKIP = os.environ.get("LOFTQ_SKIP_EXT") == "1"


def sources(folder: str, suffix: str) -> list[str]:
    # The paths are relative, as setuptools requires, and sorted, so that builds are the same everywhere.
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def version_tag() -> str:
    """The inline namespace of the C++ code: "v0_1_0" for version 0.1.0. CMake makes the same of the same line."""
    text = (ROOT / "loftq_kernels" / "__init__.py").read_text(encoding="utf-8")
    return "v" + re.search(r"^__version__ = .*?(\d+\.\d+\.\d+)", text, re.M)[1].replace(".", "_")


def headers() -> list[str]:
    """Every file of csrc that others include: a change of one compiles anew what depends on it."""
    return sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl")
    )


def extension():
    """The extension and its build command, for the torch that is importable now.

    It is a shared library and no Python module: it uses the stable C interface of torch alone, and runs with every
    Python and with every torch from csrc/aten/version.h on. Its threads are those of torch, so it needs no OpenMP.
    """
    import torch
    from setuptools import Extension
    from torch.utils import cpp_extension

    # Contracting a * b + c into one rounding would make results depend on the instruction set.
    flags = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    link_flags = ["-Wl,-dead_strip", "-undefined", "dynamic_lookup"]
    if sys.platform == "linux":
        flags += ["-ffunction-sections", "-fdata-sections"]
        link_flags = ["-Wl,--gc-sections", "-Wl,--strip-all"]
    files = (
        sources("cpu", ".cpp")
        + sources("aten", ".cpp")
        + sources("loftq", ".cpp")
        + [path for path in sources("bindings", ".cpp") if not path.endswith(("_cuda.cpp", "schemas.cpp"))]
    )
    macros = [("LOFTQ_VERSION", version_tag())]
    libraries = ["torch_cpu"]
    with_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None and bool(sources("cuda", ".cu"))
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        files += sources("cuda", ".cu") + sources("bindings", "_cuda.cpp")
        macros.append(("LOFTQ_WITH_CUDA", None))
        libraries += ["torch_cuda", "cudart"]
    module = Extension(
        "loftq_kernels.libloftq_torch",
        files,
        include_dirs=[str(ROOT / "csrc" / "include"), str(ROOT / "csrc"), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths("cuda" if with_cuda else "cpu"),
        libraries=libraries,
        define_macros=macros,
        depends=headers(),
        language="c++",
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        extra_link_args=link_flags,
    )
    return module, cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)


class Unavailable(Exception):
    """The extension cannot be built here."""


def find_extension():
    if SKIP:
        raise Unavailable("LOFTQ_SKIP_EXT=1 is set")
    try:
        module, command = extension()
    except ImportError as error:
        raise Unavailable(f"torch is needed ({error}); install torch, then use --no-build-isolation") from error
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise Unavailable(f"there is no C++ compiler {compiler!r} (set CXX)")
    return module, command


def say_pure_python(reason: str) -> None:
    if REQUIRE and not SKIP:
        raise SystemExit(f"loftq_kernels: the C++ extension was not built: {reason}")
    warnings.warn(f"loftq_kernels installs as pure Python, without its C++ extension: {reason}", stacklevel=2)


def optional_build(command):
    """`command`, but a compilation that fails leaves a pure Python package, unless LOFTQ_REQUIRE_EXT=1."""

    class OptionalBuild(command):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if REQUIRE:
                    raise
                say_pure_python(f"its compilation failed: {error}")
                self.extensions = []

    return OptionalBuild


try:
    module, command = find_extension()
    setup(ext_modules=[module], cmdclass={"build_ext": optional_build(command)})
except Unavailable as reason:
    say_pure_python(str(reason))
    setup()
