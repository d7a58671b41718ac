"""The fine-tuning recipe and its language model, a few steps of each."""

from __future__ import annotations

import json

import pytest
import torch

from loftq_kernels.recipes import finetune, small_lm


def test_command(tmp_path, capsys):
    """One step of training and of fine-tuning: all files are there and say the same."""
    assert finetune.main(["--pretrain-steps", "1", "--steps", "1", "--rank", "2", "--output", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "finetune.json").read_text())["runs"]
    assert [(run["format"], run["init"]) for run in runs] == [(f, i) for f in finetune.FORMATS for i in finetune.STARTS]
    for run in runs:
        assert run["steps"] == [0, 1] and run["perplexity"][1] < run["perplexity"][0]
    table = (tmp_path / "finetune.md").read_text()
    assert table in capsys.readouterr().out and f"{runs[3]['perplexity'][1]:.3f} |" in table
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")


def test_model_sees_the_past_only():
    torch.manual_seed(0)
    model = small_lm.SmallLM(width=32, layers=2, heads=2, hidden=64)
    tokens = torch.randint(small_lm.BYTES, (2, 20))
    other = tokens.clone()
    other[:, 12:] = 7
    for ours, theirs in zip(model(tokens), model(other), strict=True):
        torch.testing.assert_close(ours[:, :12], theirs[:, :12])
        assert not torch.equal(ours[:, 12:], theirs[:, 12:])


def test_texts():
    """Long enough, the same every time, and held-out text is none of the training text."""
    for text in (small_lm.english, small_lm.code):
        train, held_out = text()
        assert train.dtype == torch.uint8 and len(train) > 8 * len(held_out) > 8 * 96 * small_lm.CONTEXT
        assert torch.equal(text()[0], train)


@pytest.mark.parametrize("option", ["--steps", "--rank", "--pretrain-steps"])
def test_bad_options(option, tmp_path):
    with pytest.raises(SystemExit):
        finetune.main([option, "0", "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
