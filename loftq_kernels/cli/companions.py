"""What belongs to a model beside its weights, and goes with it: configs, tokenizers, processors, chat templates."""

from __future__ import annotations

import shutil
from pathlib import Path

from loftq_kernels.checkpoints import hosted
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.storage import files

_ENDINGS = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm", ".vocab"}
_OTHERS = (CONFIG_NAME, "*.index.json", "training_args*", "trainer_state*", "adapter_config.json")
_FOLDERS = ("chat_templates", "additional_chat_templates")


def names(folder: Path) -> set[Path]:
    """The companions in a model's folder, relative to it."""
    own = {file.relative_to(folder) for file in folder.iterdir() if file.is_file() and _is_companion(file)}
    inside = (file for name in _FOLDERS for file in (folder / name).rglob("*") if file.is_file())
    return own | {file.relative_to(folder) for file in inside}


def check(source: Path, target: Path) -> None:
    """Raise ValueError where the target has companions that the source would not replace: another model's."""
    others = sorted(names(target) - names(source)) if target.is_dir() else []
    if others:
        raise ValueError(
            f"{target} holds {', '.join(map(str, others[:3]))}, which {source} has not: files of another model "
            "would be mixed in; remove them, or choose another folder"
        )


def copy(source: Path, target: Path) -> None:
    """Copy the companions of a model to where save_quantized has written it; a config.json that says so stays."""
    written = {Path(hosted.CONFIG_NAME)} if hosted.is_hosted(target) else set()
    for name in sorted(names(source) - written):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def _is_companion(file: Path) -> bool:
    if any(file.match(name) for name in _OTHERS):
        return False
    return file.suffix in _ENDINGS or file.name.startswith("tokenizer.")  # tokenizer.model.v3, as Mistral has it
