"""The command line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from helpers import TOKENS, gaussian, save_file, tiny_bert

import loftq_kernels as lk
from loftq_kernels import cli
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
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


class TestQuantize:
    def test_transformers(self, bert, tmp_path, capsys):
        target = tmp_path / "out"
        status, out, _ = run(capsys, "quantize", bert, target, "--format", "int8", "--rank", 4, "--num-iter", 1)
        assert status == 0 and "13 layers" in out and str(target) in out
        loaded, dense = lk.load_quantized(target), tiny_bert()
        similarity = torch.nn.functional.cosine_similarity(loaded(TOKENS)[0], dense(TOKENS)[0], -1)
        assert similarity.min() > 0.999 and loaded.encoder.layer[0].output.dense.rank == 4
        for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
            assert (target / name).read_text() == name
        assert not (target / "model.safetensors").exists()

    def test_plain(self, plain, tmp_path, capsys):
        """Without an architecture an embedding looks like a linear layer; its name gives it away."""
        status, out, _ = run(capsys, "quantize", plain, tmp_path / "out", "--rank", 0, "--group-size", 32)
        assert status == 0 and "1 layers" in out and "embed" in out
        with torch.device("meta"):
            target = torch.nn.ModuleDict({"embed": torch.nn.Embedding(20, 64), "up": torch.nn.Linear(64, 96)})
        loaded = lk.load_quantized(tmp_path / "out", target)
        assert torch.equal(loaded["up"].dequantize(), lk.quantize(gaussian(96, 64), "nf4", 32).dequantize())

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
        assert "is an nn.Embedding: adapter='qalora' is for linear layers alone" in out
        model = lk.load_quantized(tmp_path / "out")
        assert model.pooler.dense.adapter == "qalora" and model.pooler.dense.lora_A.shape == (2, 2)
        assert set(lk.merge_adapters(model).values()) == {0.0}
        status, _, err = run(capsys, "quantize", bert, tmp_path / "other", "--adapter", "qalora", "--init", "eora")
        assert status == 2 and "adapter='qalora' takes init of" in err and not (tmp_path / "other").exists()

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
            (["--init", "eora"], "needs statistics"),
            (["--init", "eora", "--calibration", tmp_path / "nowhere"], "nowhere does not exist"),
            (["--init", "aser", "--calibration", bert / "model.safetensors"], "does not hold activation statistics"),
            (["--calibration", tmp_path / "file"], "the statistics lack layer 'encoder.layer.0.attention.self.query'"),
            (["--init", "aser", "--rank-energy", 2], "rank_energy=2.0"),
            (["--init", "aser", "--outlier-channels", -1], "outlier_channels=-1"),
        ]:
            status, out, err = run(capsys, "quantize", bert, tmp_path / "out", *options)
            assert status == 2 and out == "" and message in err, err
            assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere", "out"], "nowhere is not a folder"),
            ([".", "out"], "holds no .safetensors file"),
            (["bert", "out", "--rank", "65"], "rank=65"),
            (["bert", "out", "--rank", "-1"], "rank=-1"),
            (["bert", "out", "--num-iter", "0"], "num_iter=0"),
            (["bert", "out", "--lora-alpha", "-2"], "lora_alpha=-2"),
            (["bert", "out", "--include", "nothing"], "include=('nothing',)"),
            (["bert", "out", "--include", "re:("], "re:("),
            (["bert", "out", "--override", "*"], "--override '*'"),
            (["bert", "out", "--override", "*=nf9"], "nf9"),
            (["bert", "out", "--device", "warp"], "--device warp"),
            (["bert", "out", "--device", "cuda:99"], "--device cuda:99"),
        ],
        ids=str,
    )
    def test_errors_are_one_line(self, bert, arguments, message, capsys, monkeypatch):
        monkeypatch.chdir(bert.parent)
        status, out, err = run(capsys, "quantize", *arguments)
        assert status == 2 and out == ""
        lines = [line for line in re.split(r"[\r\n]+", err) if line and "%|" not in line]  # progress bars aside
        assert len(lines) == 1 and lines[0].startswith("loftq-kernels: ") and message in lines[0]
        assert not (bert.parent / "out").exists()

    @pytest.mark.parametrize("arguments", [["--format", "nf9"], ["--group-size", "48"], ["--init", "pissa"]], ids=str)
    def test_choices(self, bert, arguments, capsys):
        with pytest.raises(SystemExit, match="2"):
            run(capsys, "quantize", bert, "out", *arguments)
        assert arguments[1] in capsys.readouterr().err

    def test_already_quantized(self, bert, tmp_path, capsys):
        run(capsys, "quantize", bert, tmp_path / "out", "--rank", 4, "--num-iter", 1)
        status, _, err = run(capsys, "quantize", tmp_path / "out", tmp_path / "again")
        assert status == 2 and "already quantized" in err


class TestInspect:
    def test_describes_the_layers(self, bert, tmp_path, capsys):
        run(capsys, "quantize", bert, tmp_path / "out", "--format", "nf2", "--rank", 4, "--num-iter", 1)
        status, out, _ = run(capsys, "inspect", tmp_path / "out")
        assert status == 0
        (line,) = [line for line in out.splitlines() if line.startswith("encoder.layer.1.intermediate.dense")]
        assert line.split()[1:] == ["96x64", "nf2", "64", "4", "1"]
        assert "13 quantized layers" in out and "BertModel" in out and "MiB" in out

    def test_errors(self, plain, capsys):
        status, out, err = run(capsys, "inspect", plain)
        assert status == 2 and out == "" and CONFIG_NAME in err and len(err.splitlines()) == 1


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for part in (lk.__version__, torch.__version__, "extension:", *lk.available_backends(), *lk.format_names()):
        assert part in out


def test_no_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "loftq_kernels", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == lk.__version__
