"""README.md and docs/*.md followed literally: every code block is run in order, with tiny models in the place of real
ones, or is listed here with the reason why not."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documents import REPOSITORY, Block, blocks_of, commands_of, run_python
from helpers import gaussian, tiny_bert, tiny_model
from torch import nn

import loftq_kernels as lk
from loftq_kernels import cli
from loftq_kernels.recipes import small_lm

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md")))
LANGUAGES = ("python", "sh", "text")
# By document and a part of the text, with the reason.
NOT_RUN = {
    ("docs/vendoring.md", "AOTIModelPackageLoader"): "C++: test_export.py compiles and runs it",
    ("docs/vendoring.md", "FetchContent_Declare"): "CMake: the C++ tests build examples/consumer in each of these ways",
    ("docs/vendoring.md", "set_parallel_runner"): "C++: parallel_test.cpp hands over such a runner",
}
# They compile for ten seconds and more, and run in tests that are marked so.
SLOW = (("docs/vendoring.md", "aoti_compile_and_package"),)
SERVER = "127.0.0.1:8000"  # what documents call the server; tests have a free port
NOT_RUN_COMMANDS = {"loftq-kernels check": "takes most of a minute; test_check.py runs it"}


def llama(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "vocab_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def tokenizer():
    """A word is a token."""
    import tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "to", "be", "or", "not"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 96, (2, 16), generator=generator) for _ in range(5)]


def attention() -> SimpleNamespace:
    """`self` of a module with three projections of the same input."""
    layers = {f"{name}_proj": nn.Linear(128, 64) for name in "qkv"}
    return SimpleNamespace(
        **{name: lk.QuantLoRALinear.from_linear(layer, lk.QuantConfig(rank=4)) for name, layer in layers.items()}
    )


def sharding() -> Callable:
    """`fully_shard`, in a group of this process alone."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return lambda module: fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def packed() -> lk.PackedTensor:
    return lk.quantize(gaussian(128, 64), "nf4")


# What the text presupposes. Each block gets them anew, but for names that a block before it has bound.
PRESUPPOSED: dict[str, Callable[[], Any]] = {
    "lk": lambda: lk,
    "nn": lambda: nn,
    "torch": lambda: torch,
    "model": llama,
    "teacher": llama,
    "load_dense": lambda: llama,
    "batches": tokens,
    "network": tiny_model,
    "Network": lambda: tiny_model,
    "arguments": lambda: transformers.TrainingArguments("arguments"),
    "tokenizer": tokenizer,
    "cfg": lambda: lk.QuantConfig("nf2", rank=4, init="eora"),
    "dataset": lambda: [{"input_ids": one, "labels": one} for batch in tokens() for one in batch],
    "weight": lambda: gaussian(96, 128),
    "x": lambda: gaussian(5, 128),
    "bias": lambda: gaussian(96),
    "lora_A": lambda: gaussian(2, 4, 128),
    "lora_B": lambda: gaussian(2, 96, 4),
    "ids": lambda: torch.tensor([0, -1, 1, 1, 0]),
    "self": attention,
    "fully_shard": sharding,
}
# Where a document means others.
OF_DOCUMENT: dict[str, dict[str, Callable[[], Any]]] = {
    "docs/calibration.md": {
        "model": tiny_model,
        "batches": lambda: [gaussian(8, 64, seed=i) for i in range(3)],
        "weight": lambda: gaussian(128, 64),
        "packed": packed,
        "bias": lambda: gaussian(128),
        "compressed": lambda: packed().dequantize(),
        "gram": lambda: gaussian(256, 64).T @ gaussian(256, 64),
        "rank": lambda: 4,
    },
    "docs/mixed_precision.md": {"model": lambda: llama(5), "cfg": lambda: lk.QuantConfig("nf2", rank=4)},
}


def prepare(document: str, folder) -> None:
    """What the document's commands and blocks find in the folder in which they run."""
    for name in ("MODEL_DIR", "model"):
        tiny_bert().save_pretrained(folder / name)
    llama().save_pretrained(folder / "Llama-3.2-1B")
    if document == "docs/rilq.md":
        model = llama()
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=4), progress=False)
        lk.save_quantized(model, folder / "model-2bit")
        lk.cache_teacher(llama(), tokens(), folder / "states")


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """The folder in which the blocks run. Tuning and training end after two updates: in full they take minutes."""
    tune = lk.rilq_tune
    settle = transformers.TrainingArguments.__post_init__

    def briefly(model, teacher, batches, config=None, **options):
        config = replace(config or lk.RilqConfig(), steps=2, accumulate=1, validate_every=1)
        return tune(model, teacher, batches, config, **options)

    def few_steps(arguments):
        arguments.max_steps, arguments.report_to, arguments.disable_tqdm = 2, [], True
        settle(arguments)

    monkeypatch.setattr(lk, "rilq_tune", briefly)
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", few_steps)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_among(block: Block, listed) -> bool:
    return any(block.document == document and part in block.text for document, part in listed)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks(document, workshop, capsys):
    follow(document, workshop, capsys, [*NOT_RUN, *SLOW])


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted({document for document, _ in SLOW}))
def test_all_blocks(document, workshop, capsys):
    follow(document, workshop, capsys, NOT_RUN)


def follow(document: str, workshop, capsys, skipped) -> None:
    prepare(document, workshop)
    presupposed = {**PRESUPPOSED, **OF_DOCUMENT.get(document, {})}
    names: dict[str, Any] = {}
    section = None
    with Servers() as servers:
        for block in blocks_of(document):
            if block.section != section:
                section, names = block.section, {}
            if is_among(block, skipped) or block.language == "text":  # Formulas are text.
                continue
            assert block.language in LANGUAGES, f"{block} cannot be run: say why in NOT_RUN"
            try:
                if block.language == "python":
                    run_python(replace(block, text=servers.found_in(block.text)), names, presupposed)
                else:
                    for words in commands_of(block):
                        run_command([servers.found_in(word) for word in words], capsys, servers)
            except Exception as error:
                raise AssertionError(f"{block} fails: {error!r}") from error


class Servers(contextlib.ExitStack):
    """The servers that a document has started; the last one is asked."""

    address = SERVER

    def found_in(self, text: str) -> str:
        """The text with the address that the server has."""
        return text.replace(SERVER, self.address)

    def start(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "loftq_kernels", *words, "--port", "0"]
        process = self.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        self.callback(process.terminate)
        self.address = re.search(r"http://([\d.:]+)/v1;", process.stdout.readline())[1]
        for _ in range(600):  # It says so before it listens.
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://{self.address}/v1/models", timeout=60).close()
                return
            time.sleep(0.1)

    @staticmethod
    def ask(words: list[str]) -> None:
        """What ``curl`` is given: an address, headers and JSON. The answer has text."""
        url, *options = words
        given = dict(zip(options[::2], options[1::2], strict=True))
        headers = dict([given["-H"].split(": ")])
        with urllib.request.urlopen(urllib.request.Request(url, given["-d"].encode(), headers), timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"]


def run_command(words: list[str], capsys, servers: Servers) -> None:
    program, *rest = words
    line = " ".join(words)
    if any(line.startswith(start) for start in NOT_RUN_COMMANDS):
        return
    if line.startswith("python -m loftq_kernels.recipes.small_lm "):
        assert small_lm.main([*rest[2:], "--steps", "2"]) == 0
    elif line.startswith("loftq-kernels serve "):
        servers.start(rest)
    elif program == "curl":
        servers.ask(rest)
    elif program == "loftq-kernels":
        status = cli.main(rest)
        output = capsys.readouterr()
        assert status == 0, output.out + output.err
    else:
        CHECKS[program](rest)


def check_pip(words: list[str]) -> None:
    """`pip install` is not run, but its extras exist."""
    assert words[0] == "install", words
    extras = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M)
    for word in words[1:]:
        asked = re.fullmatch(r"(?:\.|loftq[_-]kernels)\[([\w,-]+)\].*", word)
        assert asked is None or set(asked[1].split(",")) <= set(extras), f"{word}: {extras}"


def check_make(words: list[str]) -> None:
    """The target exists; what follows it explains."""
    assert re.search(rf"^{re.escape(words[0])}:", (REPOSITORY / "Makefile").read_text(), re.M), words


def check_python(words: list[str]) -> None:
    """`python -m MODULE` and `python FILE` are not run, but exist."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words
    else:
        assert (REPOSITORY / words[0]).is_file(), words


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "pip": check_pip,
    "make": check_make,
    "python": check_python,
    "cmake": lambda words: None,  # The library's build has tests of its own, and test_export.py compiles the program.
    "c++": lambda words: None,
    "git": lambda words: None,
}


def test_what_is_not_run_is_there():
    """A reason that no block needs any more is out of date."""
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    assert all(any(is_among(block, [entry]) for block in blocks) for entry in [*NOT_RUN, *SLOW])
    lines = [" ".join(words) for d in DOCUMENTS for b in blocks_of(d) if b.language == "sh" for words in commands_of(b)]
    assert all(any(line.startswith(start) for line in lines) for start in NOT_RUN_COMMANDS)


def test_blocks_are_found():
    """The extraction itself: README has python and shell blocks, and none in a language that is not known."""
    blocks = blocks_of("README.md")
    assert sum(b.language == "python" for b in blocks) >= 4 and sum(b.language == "sh" for b in blocks) >= 3
    assert any(b.section == "Use it" for b in blocks) and {b.language for b in blocks} <= set(LANGUAGES)


def test_what_is_taken_for_formulas():
    """Indented blocks that are no commands neither call nor import: code is fenced, so that it runs."""
    for block in (block for document in DOCUMENTS for block in blocks_of(document) if block.language == "text"):
        with contextlib.suppress(SyntaxError):
            nodes = list(ast.walk(ast.parse(block.text)))
            assert not any(isinstance(node, ast.Call | ast.Import | ast.ImportFrom) for node in nodes), block


@pytest.mark.parametrize("document", DOCUMENTS)
def test_inline_commands(document):
    """`make X`, `python -m X`, `loftq-kernels X` within sentences name what exists."""
    text = re.sub(r"```.*?```", "", (REPOSITORY / document).read_text(encoding="utf-8"), flags=re.S)
    for command in re.findall(r"`((?:make|python|loftq-kernels) [^`\n]+)`", text):
        program, *words = command.split()
        if program == "loftq-kernels":
            with pytest.raises(SystemExit) as ended:
                cli.main([words[0], "--help"])
            assert ended.value.code == 0, command
        else:
            CHECKS[program](words)


def test_named_tests():
    """A test that a document names exists."""
    named = re.compile(r"`(test_\w+\.py)(?:::(\w+))?(?:::(\w+))?`")
    for document in DOCUMENTS:
        for file, *parts in named.findall((REPOSITORY / document).read_text(encoding="utf-8")):
            (path,) = [path for folder in ("python_tests", "bench") if (path := REPOSITORY / folder / file).is_file()]
            scope = ast.parse(path.read_text(encoding="utf-8"))
            for part in filter(None, parts):
                found = [node for node in scope.body if getattr(node, "name", None) == part]
                assert found, f"{document} names {file}::{part}"
                (scope,) = found


def test_links():
    """Relative links of the documents lead to files of the repository."""
    for document in DOCUMENTS:
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert (REPOSITORY / document).parent.joinpath(target).exists(), f"{document} links to {target}"
