"""Calibration: streamed statistics against all inputs at once, shared inputs, masks, files, and bad data."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import warnings
import weakref

import pytest
import torch
from helpers import (
    DEVICES,
    TOKENS,
    assert_unchanged,
    gaussian,
    load_file,
    parameters_of,
    save_file,
    tiny_bert,
    tiny_gpt2,
    tiny_model,
)
from torch import Tensor, nn

import loftq_kernels as lk
from loftq_kernels.calibration import collector, provenance
from loftq_kernels.models import convert

pytestmark = pytest.mark.filterwarnings("ignore:no token reached", "ignore:.*fewer tokens than channels")
WHAT = ("gram", "mean", "abs_mean", "abs_max")
ALL = lk.QuantConfig()


def collect(model, batches, cfg=ALL, **options) -> lk.ActivationStatistics:
    return lk.collect_activations(model, batches, cfg, progress=False, **options)


def assert_same(mine: lk.InputStatistics, other: lk.InputStatistics, rtol: float = 1e-5) -> None:
    assert mine.tokens == other.tokens
    for what in WHAT:
        a, b = (getattr(own, what).cpu().double() for own in (mine, other))
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item(), msg=what)


def inputs_of(model: nn.Module, name: str, batches) -> list[Tensor]:
    """Every input that a layer gets, call by call, in float64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].detach().double()), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(*batch if isinstance(batch, tuple) else (batch,))
    hook.remove()
    return seen


def assert_sums(mine: lk.InputStatistics, rows: Tensor) -> None:
    """Against explicit sums over rows [n, K], in float64."""
    rows = rows.double().reshape(-1, mine.channels)
    assert mine.tokens == len(rows)
    expected = (rows.T @ rows / len(rows), rows.mean(0), rows.abs().mean(0), rows.abs().amax(0))
    for what, b in zip(WHAT, expected, strict=True):
        a = getattr(mine, what).double()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item(), msg=what)


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Attention(nn.Module):
    """q, k and v of one tensor; out of another; and an expert that only some inputs reach."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.expert = nn.Linear(16, 8)

    def forward(self, x: Tensor, use_expert: bool = False) -> Tensor:
        y = self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        return self.expert(y) if use_expert else y


class TestStreaming:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("device", DEVICES)
    def test_equals_all_at_once(self, device, dtype):
        """Batches of any size, more rows than are multiplied at a time, in any shape; statistics stay float32."""
        x = gaussian(3001, 24, dtype=dtype, device=device) + 0.5
        model = nn.Sequential(nn.Linear(24, 8)).to(device=device, dtype=dtype)
        batches = [x[:1], x[1:1], x[1:2501], x[2501:3001].view(5, 100, 24)]
        own = collect(model, batches)["0"]
        assert {getattr(own, what).dtype for what in WHAT} == {torch.float32} and own.gram.device.type == device
        assert_same(own, lk.InputStatistics.from_inputs(x))

    def test_sums_are_kept_in_float64(self):
        """In float32, 2^24 + 1 is 2^24: all but the first token would be lost."""
        batches = [torch.full((1, 2), 4096.0)] + [torch.ones(1, 2)] * 1000
        own = collect(nn.Sequential(nn.Linear(2, 2)), batches)["0"]
        expected = torch.full((2, 2), (2**24 + 1000) / 1001)
        torch.testing.assert_close(own.gram, expected, rtol=1e-7, atol=0)

    def test_memory_does_not_grow_with_tokens(self):
        """Nothing of a batch is alive when the next one comes."""
        alive = []

        def batches():
            import weakref

            for seed in range(4):
                batch = gaussian(50, 64, seed=seed)
                alive.append(weakref.ref(batch))
                assert sum(reference() is not None for reference in alive[:-2]) == 0
                yield (batch,)
                del batch

        collect(tiny_model(), batches())

    def test_autocast_does_not_reach_the_products(self):
        x = gaussian(100, 24)
        with torch.autocast("cpu", torch.bfloat16):
            own = collect(nn.Sequential(nn.Linear(24, 8)), [x])["0"]
        assert_same(own, lk.InputStatistics.from_inputs(x))

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_any_gradient_mode(self, mode):
        x = gaussian(40, 16)  # one made in inference mode counts no writes to it, so it would not be shared
        with mode():
            own = collect(Attention(), [x])
        assert_same(own["q"], lk.InputStatistics.from_inputs(x))
        assert own["q"] is own["k"] and not own["q"].gram.requires_grad and not own["q"].gram.is_inference()

    @pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
    def test_kinds_of_batches(self, kind):
        x = gaussian(40, 16)
        batch = {"tensor": x, "tuple": (x, True), "list": [x, True], "dict": {"x": x, "use_expert": True}}[kind]
        own = collect(Attention(), [batch])
        assert_same(own["v"], lk.InputStatistics.from_inputs(x))
        assert ("expert" in own) == (kind != "tensor"), "a layer that was not called has no entry"

    def test_progress_goes_to_standard_error(self, capsys):
        lk.collect_activations(Attention(), [gaussian(40, 16)], progress=True)
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("calibrate: 1 of 1 batches, ")
        collect(Attention(), [gaussian(40, 16)])
        assert capsys.readouterr() == ("", "")

    def test_quantized_layers_too(self):
        """For adapters on top of a model that is quantized already."""
        model = tiny_model()
        before = collect(model, [gaussian(300, 64)])
        lk.quantize_model(model, lk.QuantConfig(rank=4, exclude=()), progress=False)
        after = collect(model, [gaussian(300, 64)])
        assert before.keys() == after.keys()
        assert_same(after["layers.0.up"], before["layers.0.up"])

    def test_conv1d(self):
        own = collect(tiny_gpt2(), [TOKENS] * 11, lk.QuantConfig())
        assert own["transformer.h.0.mlp.c_proj"].channels == 256 and "lm_head" not in own

    def test_fused_paths_of_torch(self):
        """Without gradients `nn.TransformerEncoderLayer` would read its weights without calling its layers."""
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        own = collect(layer, [gaussian(4, 30, 16)])
        assert list(own) == ["linear1", "linear2"] and own["linear2"].tokens == 120

    def test_selection(self):
        cfg = lk.QuantConfig(include="layers.*", exclude="*.1.*", overrides={"*.down": None})
        assert list(collect(tiny_model(), [gaussian(99, 64)], cfg)) == ["layers.0.up"]


class TestSharedInputs:
    def test_computed_and_stored_once(self, monkeypatch):
        counted = []
        add = collector._Sums.add
        monkeypatch.setattr(collector._Sums, "add", lambda own, rows: counted.append(1) or add(own, rows))
        batches = [gaussian(40, 16, seed=seed) for seed in range(3)]
        own = collect(Attention(), batches)
        assert own["q"] is own["k"] is own["v"] is not own["out"] and len(own.distinct()) == 2
        assert len(counted) == 3 * 2
        assert_same(own["q"], lk.InputStatistics.from_inputs(torch.cat(batches)))
        assert own.nbytes == 2 * 4 * (16 * 16 + 3 * 16) and "4 layers, 2 inputs" in repr(own)

    def test_same_without_sharing(self):
        batches = [gaussian(40, 16, seed=seed) for seed in range(3)]
        shared, single = (collect(Attention().double(), [b.double() for b in batches], share_inputs=s) for s in (1, 0))
        assert len(single.distinct()) == 4
        for name in ("q", "k", "v"):
            assert_same(shared[name], single[name], rtol=0)

    def test_a_layer_called_twice(self):
        """As in ALBERT: all its inputs count, and q, k, v still share them."""

        class Twice(Attention):
            def forward(self, x):
                return super().forward(super().forward(x) + 1)

        model, x = Twice(), gaussian(40, 16)
        own = collect(model, [x, x + 1])
        assert own["q"].tokens == 160 and own["q"] is own["v"]
        seen = []
        model.k.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        model(x), model(x + 1)
        assert_same(own["k"], lk.InputStatistics.from_inputs(torch.cat(seen)))

    def test_written_in_between(self):
        """The same tensor object is another input once it has been changed in place."""

        class InPlace(Attention):
            def forward(self, x):
                x = x + 0
                y = self.q(x)
                return y + self.k(x.mul_(2))

        x = gaussian(40, 16)
        own = collect(InPlace(), [x])
        assert_same(own["q"], lk.InputStatistics.from_inputs(x))
        assert_same(own["k"], lk.InputStatistics.from_inputs(2 * x))

    @pytest.mark.parametrize("change", ["other tensor", "not called"])
    def test_parted_later(self, change):
        class Parting(Attention):
            def forward(self, x, parted: bool):
                y = self.q(x) + self.v(x)
                if not parted:
                    return y + self.k(x)
                return y + self.k(x + 1) if change == "other tensor" else y

        batches = [(gaussian(40, 16, seed=seed), parted) for seed, parted in enumerate((False, True, False))]
        own = collect(Parting(), batches)
        assert own["q"] is own["v"] is not own["k"]
        assert_sums(own["q"], torch.cat([x for x, _ in batches]))
        others = [batches[1][0] + 1] if change == "other tensor" else []
        assert_sums(own["k"], torch.cat([batches[0][0], batches[2][0], *others]))

    def test_an_expert_that_comes_late(self):
        own = collect(Attention(), [(gaussian(40, 16), False), (gaussian(30, 16), True)])
        assert own["expert"].tokens == 30 and own["q"].tokens == 70


class Program(nn.Module):
    """Linear layers a to d, called as a text says for each batch: "ax" gives layer a the tensor x, "!x" writes to x in
    place, "~x" makes it another tensor. A convolution and a layer of its outputs run after every call."""

    def __init__(self, *texts: str):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 4) for name in "abcd"})
        self.conv, self.other = nn.Conv1d(5, 5, 1), nn.Linear(8, 4)
        self.texts = texts
        self.rows = {}  # by layer: what it was given, in float64
        self.history = {name: [] for name in "abcd"}  # by layer and batch: which inputs, in any order

    def forward(self, x: Tensor, number: int, attention_mask: Tensor | None = None) -> None:
        tensors = {name: x + i for i, name in enumerate("xyz")}
        states = dict.fromkeys("xyz", 0)
        given = {name: [] for name in "abcd"}
        for what, name in self.texts[number].split():
            if what in "!~":
                states[name] += 1
                tensors[name] = tensors[name].mul_(1.5) if what == "!" else tensors[name] - 0.25
                continue
            given[what].append((name, states[name]))
            self.call(f"layers.{what}", tensors[name], attention_mask)
            self.call("other", self.conv(tensors[name]), attention_mask)
        for name, own in given.items():
            self.history[name].append(tuple(sorted(own)))

    def call(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        rows = x.flatten(0, 1) if mask is None else x[mask]
        self.rows.setdefault(name, []).append(rows.double())
        self.get_submodule(name)(x)


def assert_program(texts: tuple[str, ...], masked: bool = False, every_share: bool = True) -> lk.ActivationStatistics:
    """Each layer's statistics are its own; layers have one object if, and only if, they had the same inputs."""
    batches = [{"x": gaussian(3, 5, 8, seed=i), "number": i} for i in range(len(texts))]
    for i, batch in enumerate(batches if masked else ()):
        batch["attention_mask"] = torch.arange(5) < torch.tensor([[5], [1 + i % 3], [3]])
    model, alone = Program(*texts), Program(*texts)
    alone.load_state_dict(model.state_dict())
    own, single = collect(model, batches), collect(alone, batches, share_inputs=False)
    assert own.keys() == single.keys() == model.rows.keys() and len(single.distinct()) == len(single)
    for name in own:
        assert_sums(own[name], torch.cat(model.rows[name]))
        assert_same(own[name], single[name], rtol=1e-6)
    called = [name for name in "abcd" if f"layers.{name}" in own]
    for first, second in itertools.combinations(called, 2):
        shared = own[f"layers.{first}"] is own[f"layers.{second}"]
        same = model.history[first] == model.history[second]
        assert shared == same if every_share else same or not shared, (first, second)
    return own


class TestPartedInputs:
    """Layers that share some of their inputs, within a batch and across batches."""

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(
        ("texts", "objects"),
        [
            (("ax bx cx",) * 3, 1),
            (("ax bx cx ay",) * 2, 2),
            (("ax bx cx", "ax bx cx ay", "ax bx cx"), 2),
            (("ax bx ay by",) * 2, 1),
            (("ax bx ax bx",) * 2, 1),
            (("ax ax bx bx",) * 2, 1),
            (("ax ay bx by",) * 2, 1),
            (("ax ay by bx",) * 2, 1),
            (("ax by ay bx",) * 2, 1),
            (("ax bx ax",) * 2, 2),
            (("ax bx cx dx", "ax cx dx", "ax bx cx dx"), 2),
            (("ax bx", "", "ax bx"), 1),
            (("ax bx cx", "ax by cz"), 3),
            (("ax bx cx dx", "ax bx cy dy", "ax by cx dy"), 4),
            (("ax bx ay by", "ax by bx ay"), 1),
            (("ax !x bx",) * 2, 2),
            (("ax bx", "ax !x bx"), 2),
            (("ax bx cx", "ax bx !x cx", "ax bx cx"), 2),
            (("ax bx !x ax bx",) * 2, 1),
            (("ax bx cx", "ax ~x bx ax bx cx"), 3),
            (("ax bx ~x ax bx ~x bx ax",) * 2, 1),
            (("ax bx", "ax bx cx dx", "ax bx cx dx"), 2),
            (("ax ay az by bz bx cz cy cx", "ax bx ay by cy cx"), 1),
        ],
        ids=lambda own: ", ".join(own) if isinstance(own, tuple) else None,
    )
    def test_cases(self, texts, objects, masked):
        own = assert_program(texts, masked)
        assert len({id(own[name]) for name in own if name != "other"}) == objects

    @pytest.mark.parametrize("seed", range(30))
    def test_any_program(self, seed):
        draw = random.Random(seed)
        whole = "ax bx cx dx" if seed % 2 else "ax bx cx ay by"  # so that the layers share something
        calls = [f"{what}{name}" for what in "abcd!~" for name in "xyz"]
        parts = [" ".join(draw.choices(calls, k=draw.choice((0, 0, 1, 6)))) for _ in range(4)]
        texts = [f"{part} {whole}" if draw.random() < 0.5 else f"{whole} {part}" for part in parts]
        most = max(text.count(what) for text in texts for what in "abcd")
        assert_program(tuple(texts), masked=seed % 3 == 0, every_share=most <= 4)

    def test_tensors_that_count_no_writes(self):
        """Made in inference mode: they are summed up once per layer."""
        batches = [gaussian(40, 16, seed=seed) for seed in range(3)]
        with torch.inference_mode():
            batches[1] = batches[1].clone()

        class Direct(Attention):
            def forward(self, x):
                return self.q(x) + self.k(x)

        own = collect(Direct(), batches)
        for name in "qk":
            assert_sums(own[name], torch.cat(batches))

    def live_sums(self, monkeypatch, model: nn.Module, batches) -> tuple[lk.ActivationStatistics, int]:
        """The statistics, and the most sums that were held at a time."""
        live, most = weakref.WeakSet(), 0
        add = collector._Sums.add

        def added(own, rows):
            nonlocal most
            live.add(own)
            most = max(most, len(live))
            return add(own, rows)

        monkeypatch.setattr(collector._Sums, "add", added)
        return collect(model, batches), most

    def test_memory_of_the_ordinary_case(self, monkeypatch):
        """One for each different input, and one for what q, but not yet k and v, has been given."""
        own, most = self.live_sums(monkeypatch, nn.Sequential(*(Attention() for _ in range(5))), [gaussian(9, 16)] * 3)
        assert len(own.distinct()) == 10 and most <= 11

    def test_one_layer_far_ahead(self, monkeypatch):
        """Of many inputs that are alive at once, few are kept apart."""

        class Ahead(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

            def forward(self, x):
                many = [x + i for i in range(40)]
                return [layer(own) for layer in (self.a, self.b) for own in many]

        batches = [gaussian(9, 8, seed=seed) for seed in range(2)]
        own, most = self.live_sums(monkeypatch, Ahead(), batches)
        for name in "ab":
            assert_sums(own[name], torch.cat([x + i for x in batches for i in range(40)]))
        assert most <= 8

    def test_one_tensor_of_which_different_tokens_count(self):
        """The encoder's padding is not the decoder's, though both are given the same tensor."""

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.down = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)

            def get_encoder(self):
                return self.encoder

            def forward(self, x, decoder_input_ids, attention_mask):
                return self.encoder(x), self.down(x)

        x, mask = gaussian(9, 5, 8), torch.arange(5) < torch.tensor([[3]] + [[5]] * 8)
        batch = {"x": x, "attention_mask": mask, "decoder_input_ids": torch.zeros(9, 5, dtype=torch.long)}
        own = collect(Both(), [batch] * 2)
        assert_sums(own["encoder.0"], torch.cat([x[mask]] * 2))
        assert_sums(own["down"], torch.cat([x] * 2))


class TestMask:
    def test_masked_tokens_do_not_count(self):
        """BERT with padding gives what the unpadded sentences give; the pooler sees one token of each."""
        model = tiny_bert()
        lengths = [12, 7, 1]
        tokens = torch.arange(36).view(3, 12)
        mask = torch.arange(12) < torch.tensor(lengths)[:, None]
        padded = collect(model, [{"input_ids": tokens, "attention_mask": mask.long()}])
        single = collect(model, [tokens[i : i + 1, :n] for i, n in enumerate(lengths)])
        for name in single:
            assert padded[name].tokens == (3 if name == "pooler.dense" else 20)
            assert_same(padded[name], single[name], rtol=1e-4)

    def test_flattened_inputs(self):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Linear(8, 8)

            def forward(self, x, attention_mask):
                return self.up(x.flatten(0, 1))

        x, mask = gaussian(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        assert collect(Flat(), [{"x": x, "attention_mask": mask}] * 2)["up"].tokens == 14

    def encoder_decoder(self, kind: str):
        from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        if kind == "t5":
            sizes = {"d_model": 64, "d_ff": 96, "d_kv": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
            return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
        both = ("layers", "attention_heads", "ffn_dim")
        sizes = {f"{of}_{what}": n for of in ("encoder", "decoder") for what, n in zip(both, (1, 2, 96), strict=True)}
        return BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=64, **sizes)).eval()

    @pytest.mark.parametrize("length", [12, 9])
    @pytest.mark.parametrize("kind", ["t5", "bart"])
    def test_encoder_decoder(self, kind, length):
        """The encoder's mask is for its layers and for cross-attention's keys and values, also at equal lengths."""
        model, tokens = self.encoder_decoder(kind), torch.arange(24).view(2, 12)
        mask, decoder_mask = torch.ones(2, 12, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
        mask[1, 5:] = 0
        decoder_mask[0, 7:] = 0
        batch = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens[:, :length] + 3}
        names = ("k", "v") if kind == "t5" else ("k_proj", "v_proj")
        crossed = "EncDecAttention" if kind == "t5" else "encoder_attn"
        for extra, decoded in (({}, 2 * length), ({"decoder_attention_mask": decoder_mask}, 7 + length)):
            own = collect(model, [{**batch, **extra}] * 2, lk.QuantConfig(quantize_head=True))
            for name in own:
                encodes = ".encoder." in f".{name}" or (crossed in name and name.rpartition(".")[2] in names)
                assert own[name].tokens == 2 * (17 if encodes else decoded), name
            assert {"lm_head"} < set(own) and any(crossed in name for name in own)

    def test_whose_mask_is_unknown(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x, decoder_input_ids, attention_mask):
                return self.up(x), self.down(nn.functional.one_hot(decoder_input_ids, 8).float())

        batch = {"x": gaussian(9, 5, 8), "attention_mask": torch.ones(9, 5, dtype=torch.long)}
        batch["decoder_input_ids"] = torch.arange(45).view(9, 5) % 8
        assert collect(Both(), [batch])["down"].tokens == 45  # nothing is masked
        batch["attention_mask"][0, 3:] = 0
        with pytest.raises(ValueError, match="attention_mask of batch 0 is the encoder's"):
            collect(Both(), [batch])
        own = collect(Both(), [{**batch, "decoder_input_ids": batch["decoder_input_ids"][:, :4]}])
        assert (own["up"].tokens, own["down"].tokens) == (43, 36)

    def test_nan_at_masked_tokens(self):
        """Attention over nothing gives NaN there; it is no one's business."""
        x = gaussian(2, 40, 16)
        x[1, 20:] = torch.nan
        mask = ~x[..., 0].isnan()

        class Masked(Attention):
            def forward(self, x, attention_mask):
                return super().forward(x)

        assert collect(Masked(), [{"x": x, "attention_mask": mask}])["out"].tokens == 60


def tiny_deberta():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    positions = {"relative_attention": True, "position_buckets": 16, "max_relative_positions": -1}
    config = transformers.DebertaV2Config(
        **sizes, **positions, vocab_size=50, share_att_key=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm"
    )
    return transformers.DebertaV2Model(config).eval()


class Positions(nn.Module):
    """One layer for the tokens and for what `positions` makes of a table; another for the latter alone."""

    def __init__(self, positions):
        super().__init__()
        self.both, self.only = nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(gaussian(10, 8, seed=1))
        self.register_buffer("kept", gaussian(10, 8, seed=2))
        self.norm = nn.LayerNorm(8)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions(self, x)
        return self.both(x).sum() + self.both(positions).sum() + self.only(positions).sum()


def filled(write):
    """What a function writes into the buffer is the batch's."""

    def positions(model, x):
        write(model.kept, x[0, :10])
        return model.kept

    return positions


def through_out(kept, data):
    torch.mul(data, 1, out=kept)


def through_numpy(kept, data):
    kept.numpy()[:] = data.numpy()


def through_data_pointer(kept, data):
    import ctypes

    ctypes.memmove(kept.data_ptr(), data.contiguous().data_ptr(), kept.nbytes)


def into_new_memory(model, x):
    """As a compiled extension writes, of which torch is told nothing."""
    new = model.kept.new_empty(10, 8)
    with torch._C.DisableTorchFunction():
        through_data_pointer(new, x[0, :10])
    return new


CONSTANT = {
    "parameter": lambda m, x: m.table,
    "buffer": lambda m, x: m.kept,
    "computed": lambda m, x: m.norm(m.table * 2)[None, :4].expand(3, -1, -1).to(x.dtype),
    "several": lambda m, x: torch.cat([m.table, *m.kept.chunk(2)]).add_(m.kept[0]),
    "shaped by the batch": lambda m, x: m.table[0].expand_as(x).to(x),
    "arange": lambda m, x: torch.sin(torch.arange(10)[:, None] * m.kept),
}
OF_THE_BATCH = {
    "computed": lambda m, x: m.table + x[0, :10],
    "chosen": lambda m, x: m.table[x[0, :, 0].argsort() % 10],
    "assigned": filled(lambda kept, data: kept.__setitem__(slice(None), data)),
    "copied": filled(lambda kept, data: kept.copy_(data)),
    "through a view": filled(lambda kept, data: kept[:10].view(-1).copy_(data.flatten())),
    "through .data": filled(lambda kept, data: kept.data.copy_(data)),
    "through detach": filled(lambda kept, data: kept.detach().copy_(data)),
    "through out": filled(through_out),
    "through numpy": filled(through_numpy),
    "through a pointer": filled(through_data_pointer),
    "other memory": filled(lambda kept, data: setattr(kept, "data", data.clone())),
    "from numbers": lambda m, x: torch.tensor(x[0, :10].tolist()),
    "into new memory": into_new_memory,
}


class TestInputsWithoutTheBatch:
    """Inputs made of parameters and buffers alone are no tokens of a layer that has tokens."""

    @pytest.mark.parametrize("share_inputs", [True, False])
    def test_deberta(self, share_inputs):
        """Query and key projections are also given the relative positions, here [1, 32, K], as are the tokens."""
        model = tiny_deberta()
        mask = (torch.arange(32) < 20).long()[None]
        batches = [{"input_ids": torch.arange(32)[None] + i, "attention_mask": mask} for i in range(3)]
        own = collect(model, batches, share_inputs=share_inputs)
        for layer in range(2):
            name = f"encoder.layer.{layer}.attention.self"
            values = inputs_of(model, f"{name}.value_proj", batches)
            expected = torch.cat([x[0, :20] for x in values])
            assert len(inputs_of(model, f"{name}.key_proj", batches)) == 6
            for which in ("query_proj", "key_proj", "value_proj"):
                assert_sums(own[f"{name}.{which}"], expected)
        lk.quantize_model(model, lk.QuantConfig(rank=4), progress=False)
        quantized = collect(model, batches, share_inputs=share_inputs)
        assert {statistics.tokens for statistics in quantized.values()} == {60}

    @pytest.mark.parametrize("share_inputs", [True, False])
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("kind", CONSTANT)
    def test_constant(self, kind, mode, share_inputs):
        model, batches = Positions(CONSTANT[kind]), [gaussian(3, 12, 8, seed=i) for i in range(2)]
        with mode():
            own = collect(model, batches, share_inputs=share_inputs)
        assert_sums(own["both"], torch.cat(batches))
        assert_sums(own["only"], torch.cat(inputs_of(model, "only", batches)))

    @pytest.mark.parametrize("kind", OF_THE_BATCH)
    def test_of_the_batch(self, kind):
        """What is computed or written from the batch counts, and what may be."""
        model, batches = Positions(OF_THE_BATCH[kind]), [gaussian(3, 12, 8, seed=i) for i in range(2)]
        own = collect(model, batches, share_inputs=False)
        assert_sums(own["both"], torch.cat([x.reshape(-1, 8) for x in inputs_of(model, "both", batches)]))
        assert_sums(own["only"], torch.cat(inputs_of(model, "only", batches)))

    def test_written_in_an_earlier_batch(self):
        """A memory of the batch before is data, though a buffer."""

        def remember(model, x):
            before = model.kept + 0
            model.kept.copy_(x[0, :10])
            return before

        model, batches = Positions(remember), [gaussian(3, 12, 8, seed=i) for i in range(3)]
        own = collect(model, batches)
        assert_sums(own["both"], torch.cat([x.view(-1, 8) for x in [*batches, batches[0][0, :10], batches[1][0, :10]]]))
        assert_sums(own["only"], torch.cat([batches[0][0, :10], batches[1][0, :10]]))

    def test_positions_before_the_first_tokens(self):
        """Also where a layer has its first tokens in a later batch, and shared its positions until then."""

        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
                self.table = nn.Parameter(gaussian(10, 8))

            def forward(self, x, late: bool):
                y = self.q(self.table) + self.k(self.table) + self.v(self.table)
                return self.k(x).sum() + y.sum() if late else y

        x, model = gaussian(30, 8), Late()
        own = collect(model, [(x, False), (x, True), (x, False)])
        assert_sums(own["k"], x)
        for name in ("q", "v"):
            assert_sums(own[name], torch.cat([model.table.detach()] * 3))
        assert own["q"] is own["v"]

    def test_swin_keeps_its_position_mlp(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
        torch.manual_seed(0)
        model = transformers.Swinv2Model(transformers.Swinv2Config(**sizes)).eval()
        batches = [{"pixel_values": gaussian(2, 3, 16, 16, seed=i)} for i in range(2)]
        own = collect(model, batches)
        names = [name for name in own if "continuous_position_bias_mlp" in name]
        assert len(names) == 2 and own.unreached == ()
        for name in names:
            assert_sums(own[name], torch.cat([x.flatten(0, -2) for x in inputs_of(model, name, batches)]))

    def test_masks_are_of_tokens(self):
        """A layer that has nothing but positions has all of them, also where they have the mask's shape."""

        class Masked(Positions):
            def forward(self, x, attention_mask):
                return super().forward(x)

        model, x = Masked(lambda m, x: m.table[None]), gaussian(1, 10, 8)
        own = collect(model, [{"x": x, "attention_mask": torch.arange(10)[None] < 6}])
        assert_sums(own["both"], x[0, :6])
        assert_sums(own["only"], model.table.detach())

    def test_offloaded(self):
        """Weights that are put in place for each forward are constant, too."""
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.cpu_offload(tiny_deberta(), "cpu", preload_module_classes=["DebertaV2Encoder"])
        mask = (torch.arange(32) < 20).long()[None]
        own = collect(model, [{"input_ids": torch.arange(32)[None], "attention_mask": mask}] * 2)
        assert {statistics.tokens for statistics in own.values()} == {40}

    def test_nothing_is_held(self):
        model = Positions(lambda m, x: m.norm(m.table))
        own = provenance.Provenance(model)
        for _ in range(50):
            with own, torch.no_grad():
                model(gaussian(3, 12, 8))
            own.forget_dead()
        assert len(own._known) == len([*model.parameters(), *model.buffers()])


class TestWrappers:
    """Models inside wrappers, compiled and called before, have their own names and every layer observed."""

    def wrapped(self, model, kind: str):
        model = model.eval()
        if kind == "blocks":
            for layer in model.layers:
                for name in ("up", "down"):
                    layer[name] = torch.compile(layer[name], backend="eager")
        elif kind == "method":
            model.compile(backend="eager")
        else:
            model = torch.compile(model, backend="eager")
        model(gaussian(2, 64))
        return nn.DataParallel(model) if kind == "twice" else model

    @pytest.mark.parametrize("kind", ["whole", "blocks", "method", "twice"])
    def test_compiled_and_called(self, kind):
        own = collect(self.wrapped(tiny_model(), kind), [gaussian(200, 64)])
        expected = collect(tiny_model(), [gaussian(200, 64)])
        assert list(own) == list(expected) and own.unreached == ()
        for name in own:
            assert_same(own[name], expected[name])

    def test_nothing_is_compiled_anew(self):
        compiled = []
        model = torch.compile(tiny_model(), backend=lambda graph, _: compiled.append(1) or graph.forward)
        model(gaussian(2, 64))
        before = len(compiled)
        collect(model, [gaussian(200, 64), gaussian(100, 64)])
        for layer in model._orig_mod.layers:
            layer["up"] = torch.compile(layer["up"], backend=lambda graph, _: compiled.append(1) or graph.forward)
        collect(model, [gaussian(200, 64), gaussian(100, 64)])
        assert len(compiled) == before > 0

    def test_compiled_encoder(self):
        model = TestMask().encoder_decoder("t5")
        tokens, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
        mask[1, 5:] = 0
        batch = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens + 3}
        expected = {name: own.tokens for name, own in collect(model, [batch]).items()}
        model.encoder = torch.compile(model.encoder, backend="eager")
        assert {name: own.tokens for name, own in collect(model, [batch]).items()} == expected

    def test_flex_attention(self):
        model = tiny_bert()
        expected = collect(model, [TOKENS])
        model.set_attn_implementation("flex_attention")
        for name, own in collect(model, [TOKENS]).items():
            assert_same(own, expected[name], rtol=1e-4)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Mixtral's layer as it was before its experts became one tensor: all experts are called, some with no token."""

    def __init__(self, skips: bool):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(64, 4, bias=False)
        self.gate.weight.data[3] = -self.gate.weight.data[:3].mean(0)  # some tokens choose it: see `forward`
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.gate(flat)[:, :3].topk(2).indices  # expert 3 is never chosen
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (tokens,) = (chosen == number).any(1).nonzero(as_tuple=True)
            if len(tokens) or not self.skips:
                y.index_add_(0, tokens, expert(flat[tokens]))
        return y.view_as(x)


IDLE = ("experts.3.w1", "experts.3.w2", "experts.3.w3")


class TestUnreached:
    CFG = lk.QuantConfig("nf2", rank=8, include="experts.*")

    def collected(self, skips: bool = False):
        return collect(Mixture(skips), [gaussian(5, 40, 64, seed=i) for i in range(2)], self.CFG)

    @pytest.mark.parametrize("skips", [False, True])
    def test_named_once(self, skips):
        """Whether an expert without tokens is called or not."""
        with pytest.warns(UserWarning, match="no token reached 3 of 12 layers.*experts.3.w1") as warned:
            own = self.collected(skips)
        assert len(warned) == 1 and own.unreached == IDLE and len(own) == 9
        x = gaussian(5, 40, 64), gaussian(5, 40, 64, seed=1)
        assert_sums(own["experts.0.w1"], torch.cat(inputs_of(Mixture(skips), "experts.0.w1", x)))

    def test_file(self, tmp_path):
        own = self.collected()
        own.save(tmp_path / "file")
        assert lk.ActivationStatistics.load(tmp_path / "file").unreached == IDLE

    def test_file_from_before(self, tmp_path):
        """One without the field."""
        self.collected().save(tmp_path / "file")
        ((key, text),) = TestFile().metadata(tmp_path / "file").items()
        described = json.loads(text)
        del described["unreached"]
        save_file(load_file(tmp_path / "file"), tmp_path / "file", {key: json.dumps(described)})
        own = lk.ActivationStatistics.load(tmp_path / "file")
        assert own.unreached == () and len(own) == 9
        with pytest.raises(ValueError, match="lack layer 'experts.3.w1'"):
            lk.quantize_model(
                Mixture(False), dataclasses.replace(self.CFG, init="eora"), statistics=own, progress=False
            )

    @pytest.mark.parametrize("init", ["eora", "aser", "loftq"])
    def test_quantized_without_data(self, init, tmp_path):
        """They get LoftQ without data; the others what they would get alone."""
        self.collected().save(tmp_path / "file")
        statistics = lk.ActivationStatistics.load(tmp_path / "file")
        model, cfg = Mixture(False), dataclasses.replace(self.CFG, init=init)
        with pytest.warns(UserWarning, match="no calibration token reached 3 layers.*experts.3.w1") as warned:
            report = lk.quantize_model(model, cfg, statistics=statistics, progress=False)
        assert len(warned) == 1 and len(report.layers) == 12
        reached, idle = Mixture(False), Mixture(False)
        lk.quantize_model(
            reached, dataclasses.replace(cfg, exclude="experts.3.*"), statistics=statistics, progress=False
        )
        lk.quantize_model(
            idle, dataclasses.replace(cfg, include="experts.3.*", init="loftq"), statistics=None, progress=False
        )
        for layer in report.layers:
            alone = (idle if layer.name in IDLE else reached).get_submodule(layer.name)
            x = gaussian(5, alone.in_features)
            torch.testing.assert_close(model.get_submodule(layer.name)(x), alone(x), msg=layer.name)
            assert (layer.weighted_error is None) == (layer.name in IDLE)

    @pytest.mark.parametrize("init", ["eora", "loftq"])
    def test_planned(self, init):
        pytest.importorskip("scipy")
        cfg = dataclasses.replace(self.CFG, init=init)
        statistics = self.collected()
        with pytest.warns(UserWarning, match="no calibration token reached 3 layers") as warned:
            plan = lk.plan_bits(Mixture(False), 3.0, ["nf2", "nf4"], cfg, statistics=statistics, progress=False)
        assert len(warned) == 1
        assert set(IDLE) < set(plan.layers) and len(plan.layers) == 12
        with pytest.warns(UserWarning, match="no calibration token reached 3 layers"):
            lk.quantize_model(Mixture(False), cfg, plan=plan, statistics=statistics, progress=False)

    def test_layers_that_are_never_called(self):
        own = collect(Attention(), [gaussian(40, 16)])
        assert own.unreached == ("expert",)


class Padded(nn.Module):
    """A layer of tokens in any layout, which is given a mask that only calibration reads."""

    def __init__(self, layout=lambda x: x):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.layout = layout

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.up(self.layout(x))


def added(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


LEFT, RIGHT = torch.arange(5) >= torch.tensor([[3], [0], [1]]), torch.arange(5) < torch.tensor([[2], [5], [4]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
MASKS = {
    "bool": lambda mask: mask,
    "int32": lambda mask: mask.int(),
    "uint8": lambda mask: mask.byte(),
    "float16": lambda mask: mask.half(),
    "segments": lambda mask: mask.long() * 3,
    "added": added,
    "added half": lambda mask: torch.where(mask, 0.0, -torch.inf).half(),
    "of keys": lambda mask: mask[:, None, None],
    "of keys, added": lambda mask: added(mask[:, None, None]),
    "of pairs": lambda mask: mask[:, None] & mask[..., None],
    "causal": lambda mask: added(mask[:, None, None] & CAUSAL),
}
LAYOUTS = {
    "batch first": lambda x: x,
    "tokens first": lambda x: x.transpose(0, 1),
    "flat": lambda x: x.flatten(0, 1),
    "heads": lambda x: x[:, :, None].expand(-1, -1, 2, -1),
    "heads first": lambda x: x[:, None].expand(-1, 2, -1, -1),
}


class TestMasks:
    """Of every form, against explicit sums over the tokens."""

    @pytest.mark.parametrize("side", [LEFT, RIGHT], ids=["left", "right"])
    @pytest.mark.parametrize("form", MASKS)
    def test_forms(self, form, side):
        x = gaussian(3, 5, 8)
        batches = [{"x": x, "attention_mask": MASKS[form](side)}] * 2
        assert_sums(collect(Padded(), batches)["up"], torch.cat([x[side]] * 2))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout):
        """Also batches of different lengths."""
        batches, kept = [], []
        for length in (5, 9, 3):
            x, mask = gaussian(3, length, 8, seed=length), torch.arange(length) < torch.tensor([[2], [length], [1]])
            batches.append({"x": x, "attention_mask": mask})
            kept.append(x[mask].repeat(2 if "heads" in layout else 1, 1))
        # The last is square: its layout is that of those before.
        assert_sums(collect(Padded(LAYOUTS[layout]), batches)["up"], torch.cat(kept))

    def test_all_that_is_added_is_zero(self):
        """As of a batch without padding, or with nothing but padding where integers say so."""
        x = gaussian(3, 5, 8)
        assert collect(Padded(), [{"x": x, "attention_mask": torch.zeros(3, 5)}])["up"].tokens == 15
        batches = [{"x": x, "attention_mask": mask.long().expand(3, 5)} for mask in (torch.zeros(1), torch.ones(1))]
        assert_sums(collect(Padded(), batches)["up"], x)

    @pytest.mark.parametrize("kind", [tuple, list])
    def test_by_position(self, kind):
        x = gaussian(3, 5, 8)
        assert_sums(collect(Padded(), [kind((x, RIGHT))])["up"], x[RIGHT])

    def test_of_a_tokenizer(self):
        """A BatchEncoding is a mapping, though no dict; and left padding counts as right padding."""
        transformers = pytest.importorskip("transformers")
        model, mask = tiny_bert(), torch.arange(12) >= torch.tensor([[4], [0]])
        batch = transformers.BatchEncoding({"input_ids": TOKENS, "attention_mask": mask.long()})
        own = collect(model, [batch])
        seen = inputs_of(model, "encoder.layer.1.output.dense", [dict(batch)])[0]
        assert_sums(own["encoder.layer.1.output.dense"], seen[mask])

    def test_tokens_removed_by_the_model(self):
        """Padding that never reaches a layer is not cut a second time."""

        class Unpadded(Padded):
            def forward(self, x, attention_mask):
                return self.up(x[attention_mask])

        x = gaussian(3, 5, 8)
        with pytest.warns(UserWarning, match=r"attention mask of shape \(3, 5\) fits the input of no selected layer"):
            own = collect(Unpadded(), [{"x": x, "attention_mask": RIGHT}])
        assert_sums(own["up"], x[RIGHT])

    def test_tokens_first_of_transformers(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, d_inner=48)
        model, mask = transformers.XLNetModel(config).eval(), torch.ones(2, 12, dtype=torch.long)
        mask[0, 7:] = 0
        own = collect(model, [{"input_ids": TOKENS, "attention_mask": mask}])
        assert own and {statistics.tokens for statistics in own.values()} == {19}

    def test_both_signs(self):
        mask = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]]).expand(3, 5)
        with pytest.raises(ValueError, match="attention_mask of batch 0 holds numbers from -1 to 1"):
            collect(Padded(), [{"x": gaussian(3, 5, 8), "attention_mask": mask}])


class TestWhichLayersAndCalls:
    def test_input_by_keyword(self):
        class Keyword(Padded):
            def forward(self, x):
                return self.up(input=x)

        x = gaussian(30, 8)
        assert_sums(collect(Keyword(), [x])["up"], x)

    def test_an_optional_layer(self):
        """A layer of which a subclass takes None passes by."""
        model = Padded()
        model.up.forward = lambda x: x if x is None else nn.functional.linear(x, model.up.weight)
        model.layout = lambda x: None if len(x) == 0 else x
        assert_sums(collect(model, [gaussian(0, 8), gaussian(30, 8)])["up"], gaussian(30, 8))

    def test_one_module_under_two_names(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        model.append(model[0])
        own, x = collect(model, [gaussian(30, 8)]), gaussian(30, 8)
        assert list(own) == ["0"]
        with torch.no_grad():
            assert_sums(own["0"], torch.cat([x, torch.tanh(model[0](x))]))

    def test_modules_to_save_and_heads(self):
        cfg = lk.QuantConfig(modules_to_save=("head",))
        assert "head" not in collect(tiny_model(), [gaussian(200, 64)], cfg)
        assert "lm_head" in collect(tiny_gpt2(), [TOKENS], lk.QuantConfig(quantize_head=True))

    def test_adapters_of_peft(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=4, target_modules=["query"]))
        own = collect(model, [TOKENS])
        assert not any("lora" in name for name in [*own, *own.unreached])
        assert own["base_model.model.encoder.layer.0.attention.self.query.base_layer"].tokens == 24


class TestModelIsLeftAsItWas:
    def assert_restored(self, model, before):
        assert not has_hooks(model) and model.training and not model.norm.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert_unchanged(model, before)

    def mixed(self):
        model = tiny_model().train()
        model.norm.eval()
        return model

    def test_after_a_run(self):
        model = self.mixed()
        before = parameters_of(model)
        modes = []
        model.head.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
        collect(model, [gaussian(200, 64)])
        model.head._forward_hooks.clear()
        assert modes == [(False, False)]
        self.assert_restored(model, before)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_after_an_interruption(self, error):
        """In the middle of a forward, after some layers were observed; a second run is not affected."""
        model = self.mixed()
        before = parameters_of(model)
        calls = []

        def interrupt(*_):
            calls.append(1)
            if len(calls) == 2:
                raise error

        handle = model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            collect(model, [gaussian(200, 64)] * 3)
        handle.remove()
        self.assert_restored(model, before)
        again, fresh = collect(model, [gaussian(200, 64)]), collect(self.mixed(), [gaussian(200, 64)])
        for name in fresh:
            assert_same(again[name], fresh[name], rtol=0)

    def test_after_data_that_fail(self):
        model = self.mixed()
        before = parameters_of(model)

        def batches():
            yield gaussian(200, 64)
            raise OSError("disk")

        with pytest.raises(OSError, match="disk"):
            collect(model, batches())
        self.assert_restored(model, before)


class TestBadData:
    def test_fewer_tokens_than_channels(self):
        """Works, and warns once, with the layer and the numbers."""
        with pytest.warns(UserWarning, match=r"fewer tokens than channels.*layers.0.up \(9 tokens, 64 channels\)") as w:
            own = collect(tiny_model(), [gaussian(9, 64)])
        assert len(w) == 1
        for init in ("eora", "aser", "loftq"):
            model = tiny_model()
            cfg = lk.QuantConfig(init=init, rank=4, exclude=())
            report = lk.quantize_model(model, cfg, statistics=own, progress=False)
            assert 0 <= report.weighted_error < 0.2
            assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    def test_enough_tokens_give_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            collect(tiny_model(), [gaussian(128, 64)])

    @pytest.mark.parametrize(
        ("value", "message"), [(torch.nan, "NaN or Inf"), (torch.inf, "NaN or Inf"), (1e30, "squares overflow")]
    )
    def test_activations_that_are_not_finite(self, value, message):
        bad = gaussian(200, 64)
        bad[150, 3] = value
        model = tiny_model()
        with pytest.raises(ValueError, match=f"input of layer 'layers.0.up' .*{message}.* in batch 1"):
            collect(model, [gaussian(200, 64), bad])
        assert not has_hooks(model)

    def test_the_layer_is_named(self):
        """The one whose input it is, not the first."""
        model = tiny_model()
        model.layers[1]["up"].weight.data[3] = torch.nan
        with pytest.raises(ValueError, match="'layers.1.down'"):
            collect(model, [gaussian(200, 64)])

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "batches is empty"),
            (iter(()), "batches is empty"),
            ([torch.zeros(0, 64)], "no token reached a selected layer in 1 batches"),
        ],
        ids=str,
    )
    def test_no_data(self, batches, message):
        with pytest.raises(ValueError, match=message):
            collect(tiny_model(), batches)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (torch.zeros(3, 64), "one Tensor"),
            ({"x": torch.zeros(3, 64)}, "one dict"),
            ([7], "got int"),
            (["text"], "got str"),
        ],
        ids=str,
    )
    def test_other_kinds(self, batches, message):
        with pytest.raises(TypeError, match=message):
            collect(tiny_model(), batches)

    def test_arguments(self):
        with pytest.raises(TypeError, match="cfg must be a QuantConfig, got 'nf4'"):
            collect(tiny_model(), [gaussian(9, 64)], "nf4")
        with pytest.raises(TypeError, match="statistics must map layer names to InputStatistics, got str"):
            lk.quantize_model(tiny_model(), statistics="file.safetensors", progress=False)

    def test_no_layer(self):
        with pytest.raises(ValueError, match="no linear layer to observe"):
            collect(tiny_model(), [gaussian(9, 64)], lk.QuantConfig(exclude=("layers.*", "head")))
        with pytest.raises(ValueError, match="no linear layer to observe"):
            collect(tiny_model(), [gaussian(9, 64)], lk.QuantConfig(layer_types=("embedding",)))
        with pytest.raises(ValueError, match="'haed' matches no module of the model; near: 'head'"):
            collect(tiny_model(), [gaussian(9, 64)], lk.QuantConfig(exclude=("haed",)))


@pytest.fixture(scope="module")
def own():
    return collect(tiny_model(), [gaussian(400, 64)])


class TestQuantizeModel:
    @pytest.mark.parametrize("init", ["eora", "aser", "loftq"])
    @pytest.mark.parametrize("device", DEVICES)
    def test_reports_the_weighted_error(self, own, init, device):
        """It is the relative error of the layers' outputs, on the data of the calibration."""
        model, dense = tiny_model().to(device), tiny_model()
        cfg = lk.QuantConfig(format="nf2", init=init, rank=8, num_iter=3, exclude=())
        report = lk.quantize_model(model, cfg, statistics=own, progress=False)
        assert f"of outputs: {report.weighted_error:.4f}" in str(report)
        x = gaussian(400, 64) + dense.shift
        layer, linear = model.layers[0]["up"], dense.layers[0]["up"]
        expected = x @ linear.weight.T
        error = (layer(x.to(device)).cpu() - layer.bias.cpu() - expected).norm() / expected.norm()
        assert report.layers[0].weighted_error == pytest.approx(error.item(), rel=1e-3)

    def test_statistics_are_looked_at_only_where_taken(self, own):
        cfg = lk.QuantConfig(init="qlora", rank=4, exclude=(), overrides={"head": {"init": "eora"}})
        report = lk.quantize_model(tiny_model(), cfg, statistics={"head": own["head"]}, progress=False)
        assert [layer.weighted_error is not None for layer in report.layers] == [False] * 4 + [True]
        rounded = lk.quantize_model(tiny_model(), lk.QuantConfig(init="eora", rank=None), progress=False)
        assert rounded.weighted_error is None and "of outputs" not in str(rounded)

    def refuses(self, message, statistics, **fields):
        model = tiny_model()
        before = parameters_of(model)
        with pytest.raises((ValueError, TypeError), match=message):
            cfg = lk.QuantConfig(rank=4, exclude=(), **fields)
            lk.quantize_model(model, cfg, statistics=statistics, progress=False)
        assert_unchanged(model, before)

    def test_none(self):
        self.refuses("init='eora' of layer 'layers.0.up' needs statistics", None, init="eora")
        with pytest.raises(ValueError, match="init='aser' needs statistics"):
            lk.QuantLoRALinear.from_linear(nn.Linear(64, 64), lk.QuantConfig(init="aser"))

    @pytest.mark.parametrize("init", ["eora", "aser", "loftq"])
    def test_of_another_model(self, own, init):
        self.refuses("lack layer 'head'", {name: own[name] for name in own if name != "head"}, init=init)
        other = collect(tiny_model(width=32), [gaussian(99, 32)])
        self.refuses("layer 'layers.0.up' have 32 channels, the weight has 64", other, init=init)

    def kinds(self):
        """A linear layer and a convolution whose matrices have one shape, and an embedding."""
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(64, 64), "conv": nn.Conv1d(64, 64, 1), "embed": nn.Embedding(64, 64)})

    def test_other_kinds_get_the_start_without_data(self, own):
        model, statistics = self.kinds(), {"up": own["head"]}
        cfg = lk.QuantConfig("nf2", rank=4, layer_types=("linear", "conv", "embedding"))
        expected = lk.loftq_init(model["conv"].weight.detach().flatten(1), "nf2", 4)
        report = lk.quantize_model(model, cfg, statistics=statistics, progress=False)
        known = {layer.name: layer.weighted_error is not None for layer in report.layers}
        assert known == {"up": True, "conv": False, "embed": False}
        assert "; 2 layers without statistics)" in str(report)
        assert report.layers[1].error == pytest.approx(expected.error, rel=1e-3)

    @pytest.mark.parametrize("init", ["eora", "aser"])
    def test_other_kinds_cannot_take_statistics(self, own, init):
        model, statistics = self.kinds(), {"up": own["head"]}
        cfg = lk.QuantConfig(init=init, rank=4, layer_types=("linear", "conv", "embedding"))
        before = parameters_of(model)
        for given in (statistics, {}, None):
            only = dataclasses.replace(cfg, layer_types=("conv",))
            with pytest.raises(ValueError, match="'conv', an nn.Conv1d.*linear layers alone.*init='loftq'"):
                lk.quantize_model(model, cfg if given else only, statistics=given, progress=False)
        assert_unchanged(model, before)
        cfg = dataclasses.replace(cfg, overrides={"conv": {"init": "loftq"}, "embed": {"init": "loftq"}})
        assert len(lk.quantize_model(model, cfg, statistics=statistics, progress=False).layers) == 3

    @pytest.mark.parametrize("what", WHAT)
    def test_damaged(self, own, what):
        """Values of a file are checked where they are used, and before anything is changed."""
        damaged = copy.deepcopy(own["head"])
        getattr(damaged, what)[0] = torch.nan
        self.refuses(f"layer 'head': {what} holds NaN or Inf", {**own, "head": damaged}, init="eora")
        self.refuses("got dict", {**own, "head": {}}, init="eora")

    def test_interrupted_and_taken_up_again(self, own, monkeypatch):
        whole = tiny_model()
        cfg = lk.QuantConfig(init="eora", rank=4, exclude=())
        lk.quantize_model(whole, cfg, statistics=own, progress=False)
        model, initialize, calls = tiny_model(), convert.initialize, []

        def interrupt(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return initialize(*args, **kwargs)

        monkeypatch.setattr(convert, "initialize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lk.quantize_model(model, cfg, statistics=own, progress=False)
        kinds = {type(m) for m in model.modules()}
        assert {nn.Linear, lk.QuantLoRALinear} <= kinds
        lk.quantize_model(model, cfg, statistics=own, progress=False)
        x = gaussian(5, 64)
        assert torch.equal(model(x), whole(x))


class TestFile:
    @pytest.fixture
    def stored(self):
        return collect(Attention(), [gaussian(40, 16)])

    @pytest.fixture
    def file(self, stored, tmp_path):
        stored.save(tmp_path / "statistics.safetensors")
        return tmp_path / "statistics.safetensors"

    def test_round_trip(self, stored, file):
        own, loaded = stored, lk.ActivationStatistics.load(file)
        assert list(own) == list(loaded)
        for name in own:
            assert_same(loaded[name], own[name], rtol=0)
        assert loaded["q"] is loaded["v"] and len(loaded.distinct()) == 2, "shared ones are stored once"
        assert file.stat().st_size < own.nbytes + 2000

    def test_float64_statistics_are_rounded(self, tmp_path):
        own = lk.ActivationStatistics({"a": lk.InputStatistics.from_inputs(gaussian(40, 16))})
        own.save(tmp_path / "file")
        assert_same(lk.ActivationStatistics.load(tmp_path / "file")["a"], own["a"], rtol=1e-6)

    @pytest.mark.parametrize("keep", [0, 7, 100, -1])
    def test_truncated(self, file, keep):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=f"{file.name} is not a readable safetensors file"):
            lk.ActivationStatistics.load(file)

    def test_missing_and_foreign(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            lk.ActivationStatistics.load(tmp_path / "nowhere")
        save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
        with pytest.raises(ValueError, match="does not hold activation statistics: its header has no"):
            lk.ActivationStatistics.load(tmp_path / "foreign")

    @pytest.mark.parametrize(
        ("tensor", "value", "message"),
        [
            ("0.gram", torch.zeros(16, 15), r"'0.gram' has shape \[16, 15\], expected \[16, 16\]"),
            ("1.mean", torch.zeros(15), r"'1.gram' has shape \[16, 16\], expected \[15, 15\]"),
            ("0.mean", torch.tensor(1.0), "shape"),
            ("0.abs_max", torch.zeros(16, 16), "'0.abs_max' has shape"),
            ("0.abs_mean", torch.zeros(16, dtype=torch.float64), "'0.abs_mean' is F64"),
            ("0.gram", None, "lacks tensors: 0.gram"),
            ("7.gram", torch.zeros(1), "unknown tensors: 7.gram"),
        ],
        ids=str,
    )
    def test_edited_tensors(self, file, tensor, value, message):
        tensors = load_file(file)
        tensors[tensor] = value
        save_file({k: t for k, t in tensors.items() if t is not None}, file, self.metadata(file))
        with pytest.raises(ValueError, match=message):
            lk.ActivationStatistics.load(file)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": 2}, "version is 2"),
            ({"layers": []}, "layers"),
            ({"layers": {}}, "layers"),
            ({"layers": {"q": 2}}, "layer 'q' has statistics 2 of 2"),
            ({"layers": {"q": -1}}, "layer 'q' has statistics -1"),
            ({"layers": {"q": True}}, "layer 'q' has statistics True"),
            ({"tokens": [1]}, "of 1"),
            ({"tokens": [1, 0]}, "tokens must be"),
            ({"tokens": 10**9}, "tokens must be"),
            ({"tokens": [1] * 3}, "lacks tensors: 2."),
        ],
        ids=str,
    )
    def test_edited_header(self, file, changes, message):
        (key, text) = next(iter(self.metadata(file).items()))
        save_file(load_file(file), file, {key: json.dumps({**json.loads(text), **changes})})
        with pytest.raises(ValueError, match=message):
            lk.ActivationStatistics.load(file)
        for text in ("{", "[]", "null"):
            save_file(load_file(file), file, {key: text})
            with pytest.raises(ValueError, match="hold activation statistics: (this is not JSON|version is None)"):
                lk.ActivationStatistics.load(file)

    def metadata(self, file):
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return opened.metadata()


def test_from_inputs_refuses():
    with pytest.raises(ValueError, match="no token"):
        lk.InputStatistics.from_inputs(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="gram holds NaN"):
        lk.InputStatistics.from_inputs(torch.full((3, 4), torch.nan))
    with pytest.raises(TypeError, match="floating point"):
        lk.InputStatistics.from_inputs(torch.zeros(3, 4, dtype=torch.int64))
