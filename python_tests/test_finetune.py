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


def test_as_a_folder_of_transformers(tmp_path):
    """The same logits, a byte for a token, and a server's chat is the text of its messages."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = small_lm.SmallLM(width=32, layers=2, heads=2, hidden=64)
    small_lm.save_pretrained(model, tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = small_lm.windows(small_lm.code()[0], 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    held_out = small_lm.english()[1]
    assert small_lm.perplexity(llama, held_out) == pytest.approx(small_lm.perplexity(model, held_out), rel=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a b\n\tÄ€ 'it''s' \x00\x7f\xad\U0001f642  "
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "one "}, {"role": "assistant", "content": "two"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "one two"


def test_small_lm_command(tmp_path, capsys):
    assert small_lm.main([str(tmp_path / "new"), "--steps", "1"]) == 0
    assert "918656 weights, perplexity " in capsys.readouterr().out
    before = sorted((tmp_path / "new").iterdir())
    for arguments in ([str(tmp_path / "new")], [str(before[0])], [str(tmp_path / "other"), "--steps", "0"]):
        with pytest.raises(SystemExit):
            small_lm.main(arguments)
    assert sorted((tmp_path / "new").iterdir()) == before and not (tmp_path / "other").exists()
