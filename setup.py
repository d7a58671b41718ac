"""Builds the C++ extension ``loftq_kernels._C``; everything else about the package is in pyproject.toml.

    pip install .           compiles it against the torch of the environment that installs; a failure fails the install
    LOFTQ_SKIP_EXT=1        asks for a slow package in pure Python instead
    LOFTQ_PREBUILT=FILE     packs this library, compiled before (its record ``_build.json`` lies beside it)
    MAX_JOBS=2              compiles that many files at a time
    CXX=g++-14              names the compiler

torch is deliberately no build requirement: an isolated build would download a second one, of gigabytes. Where the
isolated environment has none, that of the installing interpreter serves.
"""

import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0"
NAME = "loftq_kernels._C"
RECORD = "_build.json"  # what the library needs, read by loftq_kernels/ops/extension.py before it is loaded
OLDEST_SETUPTOOLS = 77  # the first that reads pyproject.toml's license
PURE = "or set LOFTQ_SKIP_EXT=1 for a slow package in pure Python"


def sources(folder: str, suffix: str) -> list[str]:
    # The paths are relative, as setuptools requires, and sorted, so that builds are the same everywhere.
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def headers() -> list[str]:
    """Every file of csrc that others include: a change of one compiles anew what depends on it."""
    return sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl")
    )


def extension():
    """The extension and its build command, for the torch that is importable now."""
    import torch
    from torch.utils import cpp_extension

    # Contracting a * b + c into one rounding would make results depend on the instruction set.
    flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden"]
    link_flags = []
    if sys.platform == "linux":
        flags.append("-fopenmp")
        link_flags.append("-fopenmp")
    files = (
        sources("cpu", ".cpp")
        + sources("loftq", ".cpp")
        + [path for path in sources("bindings", ".cpp") if not path.endswith("_cuda.cpp")]
    )
    macros = []
    with_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None and bool(sources("cuda", ".cu"))
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        files += sources("cuda", ".cu") + sources("bindings", "_cuda.cpp")
        macros.append(("LOFTQ_WITH_CUDA", None))
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    module = make(
        NAME,
        files,
        include_dirs=[str(ROOT / "csrc" / "include"), str(ROOT / "csrc")],
        define_macros=macros,
        depends=headers(),
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        extra_link_args=link_flags,
    )
    return module, cpp_extension.BuildExtension


def record() -> dict[str, str]:
    """The torch that the library was built with, and the versions that it works with: torch's C++ changes with each."""
    import torch

    major, minor = map(int, torch.__version__.split(".")[:2])
    return {"torch": torch.__version__, "from": f"{major}.{minor}", "before": f"{major}.{minor + 1}"}


class Unavailable(Exception):
    """The extension cannot be built here."""


def find_torch() -> None:
    """Make torch importable: an isolated build hides that of the interpreter which installs, the one that must fit."""
    with suppress(ImportError):
        import torch  # noqa: F401

        return
    sys.path.append(sysconfig.get_path("platlib"))
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise Unavailable(
            f"it is compiled against torch, which cannot be imported ({error}): install torch first, and if it is "
            f"there, use `pip install --no-build-isolation`, {PURE}"
        ) from error


def find_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise Unavailable(
            f"there is no C++ compiler {compiler!r}: install one (g++ 10 or newer) or name yours in CXX, {PURE}"
        )


def find_ninja() -> None:
    """pip puts ninja beside a Python whose folder of programs is not on the path unless its environment is active."""
    with suppress(ImportError):
        from ninja import BIN_DIR

        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), BIN_DIR))


def fail(reason: str) -> None:
    raise SystemExit(f"loftq_kernels: the C++ extension was not built: {reason}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def short(line: str) -> str | None:
    """A line of ninja's output as users want it: a command by its source file, the rest as it is."""
    if command := re.match(r"\[(\d+)/(\d+)\] .* -c (\S+)", line):
        done, total, source = command.groups()
        return f"compiled {os.path.relpath(source.strip(chr(39)), ROOT)} ({done} of {total})"
    return None if line.startswith("ninja: no work") else line


@contextmanager
def short_output():
    """What programs write to standard output meanwhile goes to standard error, shortened line by line."""
    sys.stdout.flush()
    kept, (reading, writing) = os.dup(1), os.pipe()
    os.dup2(writing, 1)
    os.close(writing)

    def forward() -> None:
        with open(reading, errors="replace") as lines:
            for text in filter(None, map(short, map(str.rstrip, lines))):
                say(text)

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        thread.join()


def told(command):
    """`command`, which says what it has compiled, writes the library's record beside it, and fails with the remedy."""

    class Build(command):
        def run(self):
            try:
                with short_output():
                    super().run()
            except Exception as error:
                fail(f"compiling failed, see above ({error}): it takes a C++20 compiler such as g++ 10, {PURE}")
            folder = Path(self.get_ext_fullpath(NAME)).parent
            (folder / RECORD).write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")

        def build_extension(self, ext):
            compile_one, number = self.compiler._compile, itertools.count(1)

            def compile_and_say(obj, source, *rest):  # without ninja, files are compiled one by one
                compile_one(obj, source, *rest)
                say(f"compiled {source} ({next(number)} of {len(ext.sources)})")

            self.compiler._compile = compile_and_say
            super().build_extension(ext)

    return Build


def prebuilt(library: Path):
    """A command that takes a library which was built before, and its record."""

    class Take(build_ext):
        def run(self):
            folder = Path(self.get_ext_fullpath(NAME)).parent
            folder.mkdir(parents=True, exist_ok=True)
            for path in (library, library.with_name(RECORD)):
                if not path.is_file():
                    fail(f"LOFTQ_PREBUILT={library} needs {path}, which does not exist")
                shutil.copy2(path, folder)

    return Take


def refused(reason: str):
    """A command that fails: only building needs the extension, a source distribution does not."""

    class Refuse(build_ext):
        def run(self):
            fail(reason)

    return Refuse


class ExtensionFirst(build):
    """Its outcome comes before the hundred lines about files that are copied."""

    sub_commands = sorted(build.sub_commands, key=lambda entry: entry[0] != "build_ext")


def find_extension():
    if file := os.environ.get("LOFTQ_PREBUILT"):
        return Extension(NAME, []), prebuilt(Path(file).resolve())
    try:
        find_torch()
        find_compiler()
    except Unavailable as reason:
        return Extension(NAME, []), refused(str(reason))
    find_ninja()
    module, command = extension()
    return module, told(command)


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"loftq_kernels: setuptools {setuptools.__version__} is too old: pip install 'setuptools>={OLDEST_SETUPTOOLS}'"
    )
if os.environ.get("LOFTQ_SKIP_EXT") == "1":
    setup()
else:
    module, command = find_extension()
    setup(ext_modules=[module], cmdclass={"build_ext": command, "build": ExtensionFirst})
