"""The demo on the real model, with fewer sentences and configurations."""

from __future__ import annotations

import json

import pytest
import torch

import loftq_kernels as lk
from loftq_kernels.cli import demo


def test_sentences():
    sentences = demo.read_sentences(400)
    assert len(set(sentences)) == 400 and all(40 < len(sentence) <= 202 for sentence in sentences)
    assert sentences == demo.read_sentences(400)
    with pytest.raises(ValueError, match="--sentences 1000000"):
        demo.read_sentences(1_000_000)


@pytest.mark.slow
def test_run(tmp_path, capsys, monkeypatch):
    """Two bits: the embeddings come closer to the full-precision ones with LoftQ, and closer still with rank."""
    monkeypatch.setattr(demo, "FORMATS", ("nf2",))
    monkeypatch.setattr(demo, "SAVED", ("nf2", 16))
    assert demo.run_demo(tmp_path, 24) == 0
    out = capsys.readouterr().out
    assert "identical embeddings" in out and "DIFFERENT" not in out and "nf2 | LoftQ r=16" in out
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [None, 16, 64]
    errors, cosines = ([row[key] for row in rows] for key in ("weight_error", "cosine"))
    assert errors == sorted(errors, reverse=True) and cosines == sorted(cosines) and 0 < cosines[0] < cosines[2] < 1
    assert all(2 < row["bits_per_weight"] < 2.5 and 0 <= row["neighbour"] <= 1 for row in rows)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "demo.md").read_text() in out
    loaded = lk.load_quantized(tmp_path / "model")
    assert loaded.encoder.layer[0].output.dense.rank == 16 and (tmp_path / "model" / "tokenizer.json").is_file()


def test_table():
    row = demo.Row("nf4", 16, 4.25, 7.5, 1.25, 0.0812, 0.98765, 0.5)
    header, rule, dense, line = demo.format_table([row], dense_mib=41.0).splitlines()
    assert {text.count("|") for text in (header, rule, dense, line)} == {9}
    assert line == "| nf4 | LoftQ r=16 | 4.25 | 7.5 | 1.2 | 0.0812 | 0.9877 | 50.0% |" and "41.0" in dense


def test_similarity_of_a_model_to_itself_is_one():
    embeddings = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    row = demo._row("nf4", None, lk.QuantizationReport(), embeddings, embeddings)
    assert row.cosine == pytest.approx(1) and row.neighbour == 1


def test_missing_model(monkeypatch):
    monkeypatch.setattr(demo, "_MODEL_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r"loftq_kernels\[demo\]"):
        demo.load_model()
