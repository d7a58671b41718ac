"""Writes the folder of a kernel for the Hugging Face Hub: what `kernels.get_kernel` loads and kernel-builder builds.

    python hub/build.py dist/hf-kernel

build.toml, flake.nix and torch-ext/ are the source that kernel-builder takes. build/ holds what it would make of them,
for nothing is compiled ahead of time: torch-cuda, and torch-universal for versions of `kernels` that know no other name
and for machines without CUDA, where Triton's interpreter runs it.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VARIANTS = ("torch-cuda", "torch-universal")
SOURCE = ("build.toml", "flake.nix", "README.md")


def settings() -> dict[str, str]:
    """The plain values of build.toml's [general], and its list of capabilities."""
    text = (HERE / "build.toml").read_text(encoding="utf-8")
    values = dict(re.findall(r'^(name|version|license) = "?([^"\n]+)"?$', text, re.M))
    return {**values, "archs": re.search(r"^cuda_capabilities = (\[.*\])$", text, re.M)[1]}


def write_package(folder: Path) -> None:
    """The thin module and the kernels below it. Both import relatively, so the folder may have any name."""
    kernels = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "loftq_kernels" / "triton_kernels", folder / "triton_kernels", ignore=kernels)
    shutil.copy(HERE / "kernel.py", folder / "__init__.py")


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in base64, by its path; the metadata, which holds them, is not among them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "metadata.json")
    hashes = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).digest() for file in files}
    return {name: base64.b64encode(value).decode() for name, value in hashes.items()}


def write_variant(folder: Path) -> None:
    """A build variant: the package, the same names where old versions look for them, and the metadata."""
    about, files = settings(), {}
    module = about["name"].replace("-", "_")
    write_package(folder)
    (folder / module).mkdir()
    shutil.copy(HERE / "compatibility.py", folder / module / "__init__.py")
    files = digest(folder)
    content = hashlib.sha256(json.dumps([folder.name, files]).encode()).hexdigest()[:12]
    metadata = {
        "name": about["name"],
        "id": f"_{module}_{content}",  # The name of the module in a process, where several versions may be loaded.
        "version": int(about["version"]),
        "license": about["license"],
        "python-depends": [],
        "backend": {"type": "cuda", "archs": json.loads(about["archs"])},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def build(out: Path) -> None:
    """Write everything anew. Raises FileExistsError where something else is in the way."""
    if out.exists() and not (out / "build.toml").is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds other files than a kernel's: name an empty or a new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in SOURCE:
        shutil.copy(HERE / name, out / name)
    shutil.copy(HERE / "README.md", out / "CARD.md")
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    write_package(out / "torch-ext" / settings()["name"].replace("-", "_"))
    for variant in VARIANTS:
        write_variant(out / "build" / variant)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python hub/build.py FOLDER")
    build(Path(sys.argv[1]))
