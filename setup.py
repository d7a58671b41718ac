"""Builds the C++ extension ``loftq_kernels/libloftq_torch.so``; everything else about the package is in pyproject.toml.

    pip install .           compiles it against the torch of the environment that installs; a failure fails the install
    LOFTQ_SKIP_EXT=1        asks for a slow package in pure Python instead (also true, yes, on; 0, false, no, off)
    LOFTQ_PREBUILT=FILE     packs this library, compiled before
    MAX_JOBS=2              compiles that many files at a time
    CXX=g++-14              names the compiler

torch is deliberately no build requirement: an isolated build would download a second one, of gigabytes. Where the
isolated environment has none, that of the installing interpreter serves.
"""

import itertools
import os
import re
import shutil
import sys
import sysconfig
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import setuptools

OLDEST_SETUPTOOLS = (
    77  # The first that reads pyproject.toml's license; older ones lack modules that are imported below.
)
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"loftq_kernels: setuptools {setuptools.__version__} is too old to build it: "
        f"pip install 'setuptools>={OLDEST_SETUPTOOLS}'"
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.dist_info import dist_info  # noqa: E402

ROOT = Path(__file__).parent.resolve()
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0"
NAME = "loftq_kernels.libloftq_torch"
FILE = "libloftq_torch.so"
PURE = "or set LOFTQ_SKIP_EXT=1 for a slow package in pure Python"


def switch(name: str) -> bool:
    """Whether an environment variable is on; SystemExit for what is neither on nor off."""
    value = os.environ.get(name, "").strip().lower()
    if value not in ("1", "true", "yes", "on", "0", "false", "no", "off", ""):
        raise SystemExit(f"loftq_kernels: {name}={os.environ[name]} is neither on nor off: set it to 1 or 0")
    return value in ("1", "true", "yes", "on")


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

    It is a shared library and no Python module, and uses the stable C interface of torch alone, that of the version in
    csrc/aten/version.h: newer ones and every Python load it. With CUDA it is bound to that CUDA's runtime. Its threads
    are those of torch, so it needs no OpenMP.
    """
    import torch
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
        NAME,
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


def find_torch() -> None:
    """Make torch importable: an isolated build hides that of the interpreter which installs, the one to run with."""
    try:
        try:
            import torch
        except ImportError:
            sys.path.append(sysconfig.get_path("platlib"))
            import torch
    except ImportError as error:
        raise Unavailable(
            f"it is compiled against torch, which cannot be imported ({error}): install torch first, and if it is "
            f"there, use `pip install --no-build-isolation`, {PURE}"
        ) from error
    oldest = re.findall(r"^#define LOFTQ_TORCH_\w+ (\d+)$", (ROOT / "csrc/aten/version.h").read_text(), re.M)
    if [int(number) for number in torch.__version__.split(".")[:2]] < [int(number) for number in oldest]:
        raise Unavailable(f"torch {torch.__version__} is too old: install {'.'.join(oldest)} or newer")


def find_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise Unavailable(
            f"there is no C++ compiler {compiler!r}: install one (g++ 10 or newer) or name yours in CXX, {PURE}"
        )


def find_ninja() -> None:
    """Take the ninja of this Python, which is on the path in active environments alone.

    Another version, such as the system's, would compile everything anew: it hashes command lines in another way.
    """
    with suppress(ImportError):
        from ninja import BIN_DIR

        os.environ["PATH"] = os.pathsep.join((BIN_DIR, os.environ.get("PATH", os.defpath)))


def fail(reason: str) -> None:
    raise SystemExit(f"loftq_kernels: the C++ extension was not built: {reason}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def short(line: str) -> str | None:
    """A line of ninja's output as users want it: a command by its source file, the rest as it is."""
    if command := re.match(r"\[(\d+)/(\d+)\] .* -c (\S+)", line):
        done, total, source = command.groups()
        return f"{done} of {total}: {os.path.relpath(source, ROOT)}"
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
    """`command`, which says what it has compiled, and fails with the remedy."""

    class Build(command):
        def run(self):
            try:
                with short_output():
                    super().run()
            except Exception as error:
                fail(f"compiling failed ({error}), see above: it takes a C++20 compiler such as g++ 10, {PURE}")

        def build_extension(self, ext):
            compile_one, number = self.compiler._compile, itertools.count(1)

            def compile_and_say(obj, source, *rest):  # Without ninja, files are compiled one by one.
                say(f"{next(number)} of {len(ext.sources)}: {source}")
                compile_one(obj, source, *rest)

            self.compiler._compile = compile_and_say
            super().build_extension(ext)

    return Build


def prebuilt(library: Path):
    """A command that takes a library which was built before."""

    class Take(build_ext):
        def run(self):
            if not library.is_file():
                fail(f"LOFTQ_PREBUILT={library} does not exist")
            folder = Path(self.get_ext_fullpath(NAME)).parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, folder / FILE)

    return Take


def refusing(reason: str) -> dict[str, type]:
    """Commands that fail; pip runs that of the metadata first, before it downloads what the package needs."""

    def refuse(command):
        return type(command.__name__, (command,), {"run": lambda self: fail(reason)})

    return {"build_ext": refuse(build_ext), "dist_info": refuse(dist_info)}


class ForEveryPython(bdist_wheel):
    """The library is no Python module: the wheel's tag names the machine alone."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class ExtensionFirst(build):
    """Its outcome comes before the hundred lines about files that are copied."""

    sub_commands = sorted(build.sub_commands, key=lambda entry: entry[0] != "build_ext")


def find_extension() -> tuple[Extension, dict[str, type]]:
    """The extension, and the commands that make it; making a source distribution needs none of them."""
    if file := os.environ.get("LOFTQ_PREBUILT"):
        return Extension(NAME, []), {"build_ext": prebuilt(Path(file).resolve())}
    try:
        find_torch()
        find_compiler()
    except Unavailable as reason:
        return Extension(NAME, []), refusing(str(reason))
    find_ninja()
    module, command = extension()
    return module, {"build_ext": told(command)}


if switch("LOFTQ_SKIP_EXT"):
    if file := os.environ.get("LOFTQ_PREBUILT"):
        raise SystemExit(f"loftq_kernels: LOFTQ_SKIP_EXT leaves out the library LOFTQ_PREBUILT={file}: set one of them")
    setup()
else:
    module, commands = find_extension()
    setup(ext_modules=[module], cmdclass={**commands, "build": ExtensionFirst, "bdist_wheel": ForEveryPython})
