"""The command line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TOKENS, gaussian, load_file, model_folder, save_file, tiny_bert, tiny_gpt2

import loftq_kernels as lk
from loftq_kernels import cli
from loftq_kernels.checkpoints.dense import load_dense
from loftq_kernels.checkpoints.manifest import CONFIG_NAME


@pytest.fixture
def bert(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
        (tmp_path / "bert" / name).write_text(name)
    return tmp_path / "bert"


@pytest.fixture
def plain(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {"embed.weight": gaussian(20, 64), "up.weight": gaussian(96, 64), "up.bias": gaussian(96)}
    tensors["body.0.down.weight"] = gaussian(64, 96)
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


class TestQuantize:
    def test_transformers(self, bert, tmp_path, capsys):
        target = tmp_path / "out"
        capsys.readouterr()  # transformers' bar as it wrote the model
        status, out, err = run(capsys, "quantize", bert, target, "--format", "int8", "--rank", 4, "--num-iter", 1)
        assert status == 0 and "13 layers" in out and str(target) in out
        assert re.fullmatch(r"quantize: 13 of 13 layers, \d+ s\n", err), "no bar where standard error is no terminal"
        loaded, dense = lk.load_quantized(target), tiny_bert()
        similarity = torch.nn.functional.cosine_similarity(loaded(TOKENS)[0], dense(TOKENS)[0], -1)
        assert similarity.min() > 0.999 and loaded.encoder.layer[0].output.dense.rank == 4
        for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
            assert (target / name).read_text() == name
        assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == "loftq"

    def test_plain(self, plain, tmp_path, capsys):
        """Without an architecture nothing is guessed: the caller names the layers."""
        status, out, err = run(capsys, "quantize", plain, tmp_path / "out", "--rank", 0)
        assert status == 2 and "--include PATTERN" in err and not (tmp_path / "out").exists()
        options = ["--rank", 3, "--group-size", 32, "--include", "up", "--include", "body.*.down"]
        status, out, _ = run(capsys, "quantize", plain, tmp_path / "out", *options)
        assert status == 0 and "2 layers" in out
        loaded = lk.load_quantized(tmp_path / "out")
        expected = lk.loftq_init_batch([gaussian(96, 64)], "nf4", 3, 5, group_size=32, names=["up.weight"])[0]
        assert loaded.up.packed.codes.shape == expected.packed.codes.shape
        assert torch.equal(loaded.embed.weight, gaussian(20, 64)) and torch.equal(loaded.up.bias, gaussian(96))
        with pytest.raises(NotImplementedError, match="load_quantized.path, model=YourModel"):
            loaded(gaussian(1, 64))
        with torch.device("meta"):
            target = torch.nn.ModuleDict({"embed": torch.nn.Embedding(20, 64), "up": torch.nn.Linear(64, 96)})
            target["body"] = torch.nn.ModuleList([torch.nn.ModuleDict({"down": torch.nn.Linear(96, 64, bias=False)})])
        real = lk.load_quantized(tmp_path / "out", target)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(real.state_dict()[name], tensor) and tensor.dtype == real.state_dict()[name].dtype
        assert run(capsys, "inspect", tmp_path / "out")[0] == 0

    def test_model_class(self, tmp_path, capsys, monkeypatch):
        """A plain folder of GPT-2, whose matrices are transposed."""
        folder, dense = tmp_path / "gpt2", tiny_gpt2()
        folder.mkdir()
        tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        options = ["--format", "int8", "--rank", 4, "--num-iter", 1]
        status, out, err = run(
            capsys, "quantize", folder, tmp_path / "out", *options, "--model-class", "helpers:tiny_gpt2"
        )
        assert status == 0, err
        logits = lk.load_quantized(tmp_path / "out")(TOKENS).logits
        assert (logits - dense(TOKENS).logits).norm() / dense(TOKENS).logits.norm() < 0.03
        for place, message in [
            ("no_such_module:Model", "No module named 'no_such_module'"),
            ("helpers:Nobody", "has no attribute 'Nobody'"),
            ("torch.nn:Linear", "missing 2 required positional arguments"),
            ("torch.nn:Identity", "the files are not those of Identity"),
            ("os:getcwd", "makes a str, not a torch.nn.Module"),
        ]:
            status, out, err = run(capsys, "quantize", folder, tmp_path / "x", "--model-class", place)
            assert (status, out, len(err.splitlines())) == (2, "", 1) and message in err

    def test_every_option_arrives(self, bert, tmp_path, capsys):
        options = "--format nf2 --group-size 128 --rank 4 --lora-alpha 8 --use-rslora --init qlora --num-iter 2"
        more = "--scale-dtype bfloat16 --scale-search --include *.layer.* --exclude *.key --device cpu"
        overrides = ["--override", "*.layer.0.output.*=int4", "--override", "*.query=dense"]
        status, out, _ = run(capsys, "quantize", bert, tmp_path / "out", *options.split(), *more.split(), *overrides)
        assert status == 0
        model = lk.load_quantized(tmp_path / "out")
        layers = {n: m for n, m in model.named_modules() if isinstance(m, lk.QuantLoRALinear)}
        assert len(layers) == 8 and not any("key" in name or "query" in name or "pooler" in name for name in layers)
        value = layers["encoder.layer.0.attention.self.value"]
        assert (value.format.name, value.group_size, value.rank, value.scaling) == ("nf2", 128, 4, 4)
        assert value.scale.dtype == torch.bfloat16 and not value.lora_B.any()
        assert layers["encoder.layer.0.output.dense"].format.name == "int4"
        weight = tiny_bert().encoder.layer[0].attention.self.value.weight
        expected = lk.quantize(weight, "nf2", 128, scale_dtype=torch.bfloat16, scale_search=True)
        assert torch.equal(value.dequantize(), expected.dequantize())

    def test_adapter_of_group_means(self, bert, tmp_path, capsys):
        options = ["--adapter", "qalora", "--rank", 2, "--layer-type", "linear", "--layer-type", "embedding"]
        options += ["--group-size", 32]
        status, out, _ = run(capsys, "quantize", bert, tmp_path / "out", *options)
        assert status == 0 and "13 layers" in out
        assert "is an nn.Embedding: --adapter qalora is for linear layers alone" in out
        model = lk.load_quantized(tmp_path / "out")
        assert model.pooler.dense.adapter == "qalora" and model.pooler.dense.lora_A.shape == (2, 2)
        assert set(lk.merge_adapters(model).values()) == {0.0}
        status, _, err = run(capsys, "quantize", bert, tmp_path / "other", "--adapter", "qalora", "--init", "eora")
        assert status == 2 and "--adapter qalora takes init of" in err and not (tmp_path / "other").exists()

    @pytest.mark.parametrize("init", ["eora", "aser", "loftq"])
    def test_calibration(self, bert, tmp_path, capsys, init):
        tokens = torch.randint(0, 50, (20, 12))
        file = tmp_path / "statistics.safetensors"
        lk.collect_activations(tiny_bert(), [tokens], lk.QuantConfig(exclude="pooler.*"), progress=False).save(file)
        options = f"--init {init} --format nf2 --rank 8 --num-iter 2 --exclude pooler.*".split()
        options += ["--rank-energy", 0.4, "--outlier-channels", 2] if init == "aser" else []
        status, out, _ = run(capsys, "quantize", bert, tmp_path / "out", "--calibration", file, *options)
        assert status == 0 and "12 layers" in out and "of outputs: " in out
        cfg = lk.QuantConfig(format="nf2", rank=8, init=init, num_iter=2, exclude="pooler.*")
        if init == "aser":
            cfg = dataclasses.replace(cfg, rank_energy=0.4, outlier_channels=2)
        expected = tiny_bert()
        lk.quantize_model(expected, cfg, statistics=lk.ActivationStatistics.load(file), progress=False)
        assert torch.equal(lk.load_quantized(tmp_path / "out")(TOKENS)[0], expected(TOKENS)[0])

    def test_calibration_errors(self, bert, plain, tmp_path, capsys):
        lk.ActivationStatistics({"up": lk.InputStatistics.from_inputs(gaussian(99, 64))}).save(tmp_path / "file")
        for options, message in [
            (
                ["--init", "eora"],
                "--init eora of layer 'encoder.layer.0.attention.self.query' needs --calibration FILE",
            ),
            (["--init", "eora", "--calibration", tmp_path / "nowhere"], "nowhere does not exist"),
            (["--init", "aser", "--calibration", bert / "model.safetensors"], "does not hold activation statistics"),
            (["--calibration", tmp_path / "file"], "the statistics lack layer 'encoder.layer.0.attention.self.query'"),
            (["--rank-energy", 0.5], "--rank-energy 0.5 is for --init aser alone, got --init loftq"),
        ]:
            status, out, err = run(capsys, "quantize", bert, tmp_path / "out", *options)
            assert status == 2 and out == "" and message in err, err
            assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere", "out"], "nowhere is not a folder"),
            ([".", "out"], "holds no .safetensors file"),
            (["bert", "out", "--include", "nothing"], "--include: the pattern 'nothing' matches no module"),
            (["bert", "out", "--exclude", "nothing"], "--exclude: the pattern 'nothing' matches no module"),
            (["bert", "out", "--override", "nothing=nf4"], "--override: the pattern 'nothing' matches no module"),
            (
                ["bert", "out", "--modules-to-save", "nobody"],
                "--modules-to-save: the pattern 'nobody'",
            ),
            (
                ["bert", "out", "--layer-type", "conv"],
                "--include *, no --exclude, --layer-type conv",
            ),
            (["bert", "out", "--include", "re:("], "re:("),
            (["bert", "out", "--device", "warp"], "--device warp"),
            (["bert", "out", "--device", "cuda:99"], "--device cuda:99"),
        ],
        ids=str,
    )
    def test_errors_are_one_line(self, bert, arguments, message, capsys, monkeypatch):
        monkeypatch.chdir(bert.parent)
        status, out, err = run(capsys, "quantize", *arguments)
        assert status == 2 and out == ""
        assert message in one_line(err)
        assert not (bert.parent / "out").exists()

    def test_already_quantized(self, bert, tmp_path, capsys):
        run(capsys, "quantize", bert, tmp_path / "out", "--rank", 4, "--num-iter", 1)
        status, _, err = run(capsys, "quantize", tmp_path / "out", tmp_path / "again")
        assert status == 2 and "already quantized" in err


def one_line(err: str) -> str:
    """The error, which is all that stands on standard error but progress."""
    lines = [line for line in err.splitlines() if not re.match(r"(quantize|plan): \d+ of \d+ layers, ", line)]
    assert len(lines) == 1 and lines[0].startswith("loftq-kernels: "), err
    return lines[0]


class TestFailures:
    """One line and status 2, whatever is wrong with the files, the machine or the weights."""

    def edit(self, bert, **changes):
        values = json.loads((bert / "config.json").read_text())
        (bert / "config.json").write_text(json.dumps({**values, **changes}))

    def refused(self, capsys, *arguments) -> str:
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == ""
        return one_line(err)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["FooModel"], "model_type": "foo"}, "'FooModel' is not a model class of transformers"),
            ({"hidden_size": "big"}, "cannot be loaded as BertModel"),
            ({"hidden_size": 128}, "the file holds (64"),
            ({"num_hidden_layers": 3}, "needs 16 tensors that the files lack"),
        ],
        ids=str,
    )
    def test_config(self, bert, tmp_path, capsys, changes, message):
        self.edit(bert, **changes)
        assert message in self.refused(capsys, "quantize", bert, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
    def test_damaged_config(self, bert, tmp_path, capsys, text):
        (bert / "config.json").write_bytes(text)
        assert "config.json" in self.refused(capsys, "quantize", bert, tmp_path / "out")

    @pytest.mark.parametrize("kept", [0, 7, 1000])
    def test_truncated_weights(self, bert, plain, tmp_path, capsys, kept):
        for folder, options in ((bert, []), (plain, ["--include", "up"])):
            file = folder / "model.safetensors"
            file.write_bytes(file.read_bytes()[:kept])
            assert "truncated" in self.refused(capsys, "quantize", folder, tmp_path / "out", *options)

    @pytest.mark.parametrize("command", ["quantize", "plan"])
    def test_weights(self, plain, tmp_path, capsys, command):
        options = ["--include", "up", *(["--budget", 3] if command == "plan" else [])]
        weight = gaussian(96, 64)
        for changed, message in [
            (weight.to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn, of which a scale stands elsewhere"),
            (weight * 1e-9, "float16"),
            (weight * 1e9, "use --scale-dtype float32"),
            (torch.where(weight > 2, torch.nan, weight), "holds nan in row"),
        ]:
            save_file({"up.weight": changed}, plain / "model.safetensors")
            assert message in self.refused(capsys, command, plain, tmp_path / "out", *options)

    @pytest.mark.parametrize("rank", [0, 4])
    def test_nearly_dead_rows(self, plain, tmp_path, capsys, rank):
        """What float16 scales lose of them is nothing beside the rest."""
        weight = gaussian(96, 64)
        weight[3:9] *= 1e-7
        save_file({"up.weight": weight}, plain / "model.safetensors")
        options = ["--format", "int8", "--rank", rank, "--include", "up"]
        assert run(capsys, "quantize", plain, tmp_path / "out", *options)[0] == 0
        dense = lk.load_quantized(tmp_path / "out").up.dense_weight()
        assert (dense - weight).norm() < 0.01 * weight.norm() and dense[3:9].abs().max() < 1e-3

    def test_places(self, bert, tmp_path, capsys, monkeypatch):
        (tmp_path / "file").write_text("x")
        quick = ["--rank", 4, "--num-iter", 1]
        plan = ["--budget", 3.2, "--candidate", "nf2", "--candidate", "nf4"]
        for arguments, message in [
            (["quantize", bert, tmp_path / "file", *quick], "file"),
            (["quantize", bert, tmp_path / "file" / "x", *quick], "file"),
            (["plan", bert, tmp_path / "nowhere" / "plan.json", *plan], "nowhere is not a folder"),
            (["quantize", bert, tmp_path / "out", "--plan", tmp_path / "file"], "JSON"),
            (["quantize", bert, tmp_path / "out", "--plan", tmp_path / "nowhere"], "nowhere does not exist"),
            (["inspect", tmp_path / "nowhere"], "is not a quantized checkpoint"),
        ]:
            assert message in self.refused(capsys, *arguments)
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Denied", "out")))
        assert "Denied" in self.refused(capsys, "quantize", bert, tmp_path / "out", *quick)

    @pytest.mark.parametrize(
        ("command", "output", "message"),
        [
            ("quantize", "file", "file is a file, not a folder"),
            ("quantize", "file/x/y", "file is not a folder: "),
            ("plan", "folder", "folder is a folder, not a file"),
            ("plan", "file/plan.json", "file is not a folder: "),
            ("plan", "nowhere/plan.json", "nowhere is not a folder: "),
        ],
    )
    def test_outputs_are_checked_before_the_run(self, tmp_path, capsys, command, output, message):
        """Before anything is read: the model's folder does not even exist."""
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder").mkdir()
        budget = ["--budget", 3] if command == "plan" else []
        assert message in self.refused(capsys, command, tmp_path / "model", tmp_path / output, *budget)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore advice"),
            MemoryError(),
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            ImportError("plans need scipy"),
            RecursionError("maximum recursion depth exceeded"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_of_the_machine(self, bert, tmp_path, capsys, monkeypatch, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(lk, "quantize_model", fail)
        line = self.refused(capsys, "quantize", bert, tmp_path / "out")
        assert (str(error).splitlines() or [type(error).__name__])[0] in line

    def test_without_scipy(self, bert, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy", None)
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
        assert "SciPy: pip install" in self.refused(capsys, "plan", bert, tmp_path / "plan.json", "--budget", 3)

    def test_a_full_disk(self, bert, tmp_path):
        """Files of this process may not grow beyond 20 kB: what was there stays, nothing is left behind."""

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        command = [
            sys.executable,
            "-m",
            "loftq_kernels",
            "quantize",
            bert,
            tmp_path / "out",
            "--rank=4",
            "--num-iter=1",
        ]
        done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
        assert done.returncode == 2 and "File too large" in one_line(done.stderr)
        assert not list((tmp_path / "out").iterdir())

    def test_interrupt(self, plain, tmp_path):
        script = (
            "import sys, time; from loftq_kernels import cli; from loftq_kernels.cli import options\n"
            "options.statistics = lambda args: (print('ready', flush=True), time.sleep(60))\n"
            f"sys.exit(cli.main(['quantize', {str(plain)!r}, {str(tmp_path / 'out')!r}]))"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGINT)
            err = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and err == "loftq-kernels: interrupted\n"


class TestCompanions:
    """What a user of transformers needs stands beside the weights, as transformers itself has written it."""

    @pytest.fixture
    def full(self, bert):
        transformers = pytest.importorskip("transformers")
        for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
            (bert / name).unlink()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
        tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
        tokenizer.save_pretrained(bert)
        transformers.CLIPImageProcessor(size={"shortest_edge": 42}).save_pretrained(bert)
        transformers.GenerationConfig(max_new_tokens=7).save_pretrained(bert)
        (bert / "video_preprocessor_config.json").write_text("{}")
        (bert / "tokenizer.model.v3").write_bytes(b"\x00\x01")
        for name in ("model.safetensors.index.json", "training_args.bin", "trainer_state.json", "pytorch_model.bin"):
            (bert / name).write_text("{}")
        return bert

    def test_everything_but_weights(self, full, tmp_path, capsys):
        import transformers

        out = tmp_path / "out"
        status, _, err = run(capsys, "quantize", full, out, "--rank", 4, "--num-iter", 1)
        assert status == 0, err
        written = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        source = {str(file.relative_to(full)) for file in full.rglob("*") if file.is_file()}
        weights = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
        expected = source - weights - {"training_args.bin", "trainer_state.json", "config.json"}
        assert written - expected == {"config.json", "model.safetensors"}
        assert written & expected == expected and "chat_template.jinja" in expected
        assert all((out / name).read_bytes() == (full / name).read_bytes() for name in expected)
        tokenizers = [transformers.AutoTokenizer.from_pretrained(p, local_files_only=True) for p in (full, out)]
        assert tokenizers[0]("packed weights") == tokenizers[1]("packed weights")
        assert tokenizers[0].chat_template == tokenizers[1].chat_template
        assert transformers.CLIPImageProcessor.from_pretrained(out).size == {"shortest_edge": 42}
        assert transformers.GenerationConfig.from_pretrained(out).max_new_tokens == 7
        configs = [transformers.AutoConfig.from_pretrained(path).to_dict() for path in (full, out)]
        assert configs[1].pop("quantization_config")["rank"] == 4
        assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}

    def test_not_in_place(self, full, capsys):
        """The folder of the dense model is no place for the quantized one."""
        before = load_file(full / "model.safetensors")
        status, _, err = run(capsys, "quantize", full, full, "--rank", 4, "--overwrite")
        assert status == 2 and "is not empty and no checkpoint of ours" in one_line(err)
        assert load_file(full / "model.safetensors").keys() == before.keys() and not (full / CONFIG_NAME).exists()


class TestInspect:
    @pytest.mark.parametrize(
        ("number", "said"),
        [(512, "512"), (3072, "3.07 thousand"), (21_233_664, "21.23 million"), (8_030_000_000, "8.03 billion")],
    )
    def test_counts_have_the_unit_that_fits(self, number, said):
        assert sys.modules["loftq_kernels.cli.inspect"]._count(number) == said

    def test_describes_the_layers(self, bert, tmp_path, capsys):
        run(capsys, "quantize", bert, tmp_path / "out", "--format", "nf2", "--rank", 4, "--num-iter", 1)
        status, out, _ = run(capsys, "inspect", tmp_path / "out")
        assert status == 0
        (line,) = [line for line in out.splitlines() if line.startswith("encoder.layer.1.intermediate.dense")]
        # 16 bytes of codes, 2 of the scale a row; 16 of the code book; lora_A, lora_B and the bias in float32.
        packed, others = 96 * (16 + 2) + 16, 4 * (4 * (96 + 64) + 96)
        kib = f"{(packed + others) / 1024:.1f}"
        assert line.split()[1:] == ["96x64", "nf2", "64", "4", "1", f"{8 * packed / (96 * 64):.3f}", "-", kib]
        assert "13 quantized layers" in out and "BertModel" in out and "--against DENSE_DIR" in out

    def test_sizes_are_those_of_the_file(self, bert, tmp_path, capsys):
        run(capsys, "quantize", bert, tmp_path / "out", "--rank", 4, "--num-iter", 1)
        _, out, _ = run(capsys, "inspect", tmp_path / "out")
        (file,) = (tmp_path / "out").glob("*.safetensors")
        stored = sum(t.nbytes for name, t in load_file(file).items() if not name.endswith("_extra_state"))
        half = sum(2 * parameter.numel() for parameter in tiny_bert().parameters())
        (line,) = [line for line in out.splitlines() if "in 16 bits" in line]
        assert line.startswith(f"{stored / 1024:.1f} KiB (packed ") and f": {stored / half:.1%} of the " in line

    @pytest.mark.parametrize("name", ["bert", "plain"])
    def test_against_the_dense_model(self, bert, plain, tmp_path, capsys, name):
        """The errors are those that quantizing reported, and not those of another model."""
        folder, options = (bert, []) if name == "bert" else (plain, ["--include", "up", "--include", "body.*.down"])
        run(capsys, "quantize", folder, tmp_path / "out", "--rank", 4, *options)
        model = load_dense(folder, layers=["up", "body.*.down"])
        report = lk.quantize_model(model, lk.QuantConfig(rank=4), progress=False)
        status, out, err = run(capsys, "inspect", tmp_path / "out", "--against", folder)
        assert status == 0, err
        shown = {words[0]: words[7] for line in out.splitlines() if len(words := line.split()) == 9}
        assert all(abs(float(shown[layer.name]) - layer.error) <= 1e-4 for layer in report.layers)
        mean = float(re.search(r"mean error ([\d.]+)", out)[1])
        assert len(report.layers) == (13 if name == "bert" else 2) and abs(mean - report.error) <= 1e-4

    def test_against_a_model_of_any_class(self, tmp_path, capsys, monkeypatch):
        """Plain files of a model whose matrices are transposed, its embeddings quantized too."""
        folder, dense = tmp_path / "gpt2", tiny_gpt2()
        folder.mkdir()
        tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        of_gpt2 = ["--model-class", "helpers:tiny_gpt2"]
        options = ["--layer-type", "linear", "--layer-type", "embedding", "--rank", 0, "--format", "int8"]
        status, _, err = run(capsys, "quantize", folder, tmp_path / "out", *of_gpt2, *options)
        assert status == 0, err
        status, out, err = run(capsys, "inspect", tmp_path / "out", "--against", folder, *of_gpt2)
        assert status == 0, err
        rows = {words[0]: words for line in out.splitlines() if len(words := line.split()) == 9}
        loaded = lk.load_quantized(tmp_path / "out", tiny_gpt2())
        for name in ("transformer.h.1.mlp.c_fc", "transformer.wpe"):
            weight, actual = dense.get_submodule(name).weight, loaded.get_submodule(name).dense_weight()
            expected = (
                weight - actual.view(weight.T.shape).T if "mlp" in name else weight - actual
            ).norm() / weight.norm()
            assert abs(float(rows[name][7]) - expected.item()) <= 1e-4 and 0 < expected < 0.02

    def test_against_another_model(self, bert, plain, tmp_path, capsys):
        run(capsys, "quantize", bert, tmp_path / "out", "--rank", 4, "--num-iter", 1)
        tiny_bert(hidden_size=128).save_pretrained(tmp_path / "wide")
        tiny_bert(num_hidden_layers=1).save_pretrained(tmp_path / "short")
        capsys.readouterr()
        for folder, message in [
            (plain, "'encoder.layer.0.attention.self.query' matches none of its matrices"),
            (tmp_path / "wide", "is (128, 128) in the dense model, and (64, 64) in the checkpoint"),
            (tmp_path / "short", "the dense model has no layer 'encoder.layer.1.attention.self.query'"),
            (tmp_path / "out", "is already quantized"),
            (tmp_path / "nowhere", "is not a folder"),
        ]:
            status, out, err = run(capsys, "inspect", tmp_path / "out", "--against", folder)
            assert status == 2 and out == "" and message in one_line(err)

    def test_damage(self, bert, plain, tmp_path, capsys):
        """One sentence for whatever is missing, of which load_quantized would say the same."""
        out = tmp_path / "out"
        run(capsys, "quantize", bert, out, "--rank", 4, "--num-iter", 1)
        (file,) = out.glob("*.safetensors")
        whole = file.read_bytes()

        def said() -> str:
            status, shown, err = run(capsys, "inspect", out)
            assert status == 2 and shown == ""
            return one_line(err)

        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if name != "pooler.dense.scale"}, file)
        assert "lacks 'pooler.dense.scale'" in said()
        file.write_bytes(whole[:1000])
        assert "truncated" in said()
        file.unlink()
        assert "names model.safetensors, which does not exist" in said()
        (out / "config.json").write_text("{")
        assert "not a quantized checkpoint" in said()
        status, shown, err = run(capsys, "inspect", plain)
        assert status == 2 and shown == "" and CONFIG_NAME in one_line(err)


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for part in (lk.__version__, torch.__version__, "extension:", *lk.available_backends(), *lk.format_names()):
        assert part in out


def test_warnings_are_one_line(bert, tmp_path, capsys):
    """Of the package, in the words of the command line, without a place in its source."""
    known = lk.collect_activations(tiny_bert(), [torch.randint(0, 50, (20, 12))])
    layers = {name: known[name] for name in known if name != "pooler.dense"}
    lk.ActivationStatistics(layers, unreached=["pooler.dense"]).save(tmp_path / "file")
    options = ["--init", "eora", "--calibration", tmp_path / "file", "--rank", 4]
    status, _, err = run(capsys, "quantize", bert, tmp_path / "out", *options)
    assert status == 0 and [line for line in err.splitlines() if not line.startswith("quantize: 13")] == [
        "loftq-kernels: warning: no calibration token reached 1 layers, which are initialized without data: "
        "pooler.dense"
    ]


def test_no_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "loftq_kernels", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == lk.__version__
