"""User adapters by name: active for all rows, or for each row its own, through whole models."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers import TOKENS, adapter, gaussian, parameters_of, tiny_gpt2, tiny_model
from test_stacking import calls_of
from torch import nn

import loftq_kernels as lk
from loftq_kernels.nn.adapter_slots import NamedAdapter
from loftq_kernels.nn.adapters import quantized_layers
from loftq_kernels.nn.named_adapters import active_adapters, add_adapter, loaded_adapters
from loftq_kernels.nn.stacking import Factors

RANKS = {"a": 3, "b": 5, "c": 2}


def add(model: nn.Module, name: str, *, rank: int | None = None, only: str = "", replaces: bool = False, seed: int = 0):
    """An adapter of a rank and scaling by its name, on the layers whose names contain ``only``."""
    rank = rank or RANKS[name]
    factors = {}
    for i, (layer_name, layer) in enumerate(quantized_layers(model).items()):
        if only in layer_name:
            pair = adapter(*layer.packed.shape, rank, seed=seed + 100 * ord(name) + 3 * i)
            factors[layer_name] = NamedAdapter(Factors(0.2 * pair[0], 0.2 * pair[1], 1.0 / rank), replaces)
    add_adapter(model, name, factors)


def quantized(model: nn.Module, **options) -> nn.Module:
    lk.quantize_model(model, lk.QuantConfig(**{"init": "qlora", "rank": 4, **options}))
    return model.eval()


def with_start(model: nn.Module) -> nn.Module:
    """qlora leaves lora_B zero; a start adapter that does something is what user adapters stand on."""
    for layer in quantized_layers(model).values():
        if layer.lora_B is not None:
            nn.init.normal_(layer.lora_B, std=0.05)
            layer.scaling = 0.5
    return model


def loaded(model: nn.Module | None = None) -> nn.Module:
    """A quantized model with start adapters, and the adapters a, b and c, c on some layers alone."""
    model = with_start(quantized(tiny_model() if model is None else model))
    add(model, "a")
    add(model, "b")
    add(model, "c", only="0")
    return model


def merged(model: nn.Module, *names: str) -> nn.Module:
    """The model with adapters added to dense copies of its weights, in float64: what it should compute."""
    dense = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        weight = layer.dequantize(torch.float64)
        chosen = [layer.slots.loaded[one] for one in names if one in layer.slots.loaded]
        if not any(one.replaces for one in chosen):
            weight += layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        for factors, _ in chosen:
            weight += factors.scaling * factors.lora_B.double() @ factors.lora_A.double()
        linear = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None)
        linear.weight.data = weight
        if layer.bias is not None:
            linear.bias.data = layer.bias.data
        dense.set_submodule(name, linear)
    return dense.double()


def close(y: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)


class TestSetAdapter:
    @pytest.mark.parametrize("names", [None, "a", ["b"], ["a", "b"], ["c", "a"], []])
    def test_computes_their_sum(self, names):
        model, x = loaded(), gaussian(2, 5, 64)
        lk.set_adapter(model, names)
        chosen = [names] if isinstance(names, str) else names or []
        assert active_adapters(model) == tuple(chosen)
        with torch.no_grad():
            close(model(x), merged(model, *chosen)(x.double()))

    def test_one_product_for_each_layer(self):
        model, x = loaded(), gaussian(2, 64)
        lk.set_adapter(model, ["a", "b"])
        with torch.no_grad():
            model(x)
            calls = calls_of(lambda: model(x))
        ours = [name for name in calls if name not in ("mm", "addmm", "matmul")]
        assert ours == ["qlora_linear"] * len(quantized_layers(model))

    def test_switching_back_and_forth(self):
        """Wider and narrower adapters share a slot: nothing of the one before is left in it."""
        model, x = loaded(), gaussian(3, 64)
        with torch.no_grad():
            for names in ("b", "c", "a", ["a", "b"], "c", None, "a"):
                lk.set_adapter(model, names)
                close(model(x), merged(model, *([names] if isinstance(names, str) else names or []))(x.double()))

    def test_in_the_place_of_the_start(self):
        model, x = loaded(), gaussian(3, 64)
        add(model, "r", rank=4, replaces=True)
        add(model, "s", rank=4, replaces=True)
        with torch.no_grad():
            for names in (["r"], ["r", "a"], ["a"]):
                lk.set_adapter(model, names)
                close(model(x), merged(model, *names)(x.double()))
        with pytest.raises(ValueError, match="'r' and 's' both stand in the place of the start adapter"):
            lk.set_adapter(model, ["r", "s"])
        assert active_adapters(model) == ("a",)
        lk.set_adapter(model, ["r", "a"])
        with pytest.raises(ValueError, match="both stand in the place"):
            add(model, "a", replaces=True)

    def test_a_disabled_start_stays_out(self):
        model, x = loaded(), gaussian(3, 64)
        lk.set_adapter(model, "a")
        for layer in quantized_layers(model).values():
            layer.disable_adapter()
        with torch.no_grad():
            y = model(x)
            for layer in quantized_layers(model).values():
                layer.scaling = 0.0
            close(y, merged(model, "a")(x.double()))

    def test_without_a_start(self):
        model = quantized(tiny_model(), rank=None)
        add(model, "a")
        lk.set_adapter(model, "a")
        x = gaussian(3, 64)
        expected = {name: layer.merged_linear() for name, layer in quantized_layers(model).items()}
        dense = copy.deepcopy(model)
        for name, linear in expected.items():
            dense.set_submodule(name, linear)
        with torch.no_grad():
            torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
            lk.set_adapter(model, None)
            assert not torch.allclose(model(x), dense(x), atol=1e-3)

    def test_start_adapters_train_under_it(self):
        model, x = loaded(), gaussian(3, 64)
        lk.set_adapter(model, "a")
        model.train()
        model(x).square().sum().backward()
        layer = next(iter(quantized_layers(model).values()))
        assert layer.lora_A.grad is not None and layer.slots.live.lora_A.grad is None

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("z", "no adapter 'z' is loaded: load_adapter.* does; loaded are 'a', 'b', 'c'"),
            (["a", "a"], "'a' is named twice"),
        ],
    )
    def test_refusals(self, names, message):
        model = loaded()
        lk.set_adapter(model, "b")
        with pytest.raises(ValueError, match=message):
            lk.set_adapter(model, names)
        assert active_adapters(model) == ("b",)
        with pytest.raises(ValueError, match="none is loaded"):
            lk.set_adapter(quantized(tiny_model()), "a")


class TestLife:
    def test_in_no_state(self, tmp_path):
        plain = with_start(quantized(tiny_model()))
        before, names = parameters_of(plain), set(plain.state_dict())
        add(plain, "a")
        lk.set_adapter(plain, "a")
        assert set(plain.state_dict()) == names and parameters_of(plain).keys() == before.keys()
        lk.save_quantized(plain, tmp_path)
        again = lk.load_quantized(tmp_path, tiny_model())
        assert not loaded_adapters(again)
        lk.set_adapter(plain, None)
        with torch.no_grad():
            assert torch.equal(again(gaussian(2, 64)), plain(gaussian(2, 64)))

    def test_moves_with_the_model(self):
        model, x = loaded(), gaussian(3, 64)
        lk.set_adapter(model, "a")
        with torch.no_grad():
            before = model(x)
            model.to(torch.bfloat16)
            layer = next(iter(quantized_layers(model).values()))
            for factors in (layer.slots.live, layer.slots.loaded["b"].factors):
                assert factors.lora_A.dtype == factors.lora_B.dtype == torch.bfloat16
            torch.testing.assert_close(model(x.bfloat16()).float(), before, rtol=0.05, atol=0.05)
            lk.set_adapter(model, "b")
            model(x.bfloat16())

    def test_copies_are_independent(self):
        model, x = loaded(), gaussian(3, 64)
        lk.set_adapter(model, "a")
        twin = copy.deepcopy(model)
        with torch.no_grad():
            y = model(x)
            assert torch.equal(twin(x), y)
            lk.set_adapter(twin, "b")
            assert torch.equal(model(x), y) and not torch.equal(twin(x), y)
            with lk.use_adapters(model, ["b", "b", "b"]):
                close(model(x), merged(model, "b")(x.double()))

    def test_is_shown(self):
        model = loaded()
        lk.set_adapter(model, "b")
        assert "user adapters: a, b (active), c" in repr(model) and "user adapters: a, b (active))" in repr(model)

    def test_deleted(self):
        model, x = loaded(), gaussian(3, 64)
        lk.set_adapter(model, ["a", "b"])
        lk.delete_adapter(model, "a")
        assert loaded_adapters(model).keys() == {"b", "c"} and active_adapters(model) == ("b",)
        with torch.no_grad():
            close(model(x), merged(model, "b")(x.double()))
        lk.delete_adapter(model, "b")
        lk.delete_adapter(model, "c")
        assert not loaded_adapters(model) and not active_adapters(model) and "user adapters" not in repr(model)
        with torch.no_grad():
            close(model(x), merged(model)(x.double()))
        with pytest.raises(ValueError, match="no adapter 'b' is loaded"):
            lk.delete_adapter(model, "b")

    def test_layers_that_have_none_left(self):
        model, x = quantized(tiny_model(), rank=None), gaussian(2, 64)
        add(model, "a")
        add(model, "c", only="0")
        lk.set_adapter(model, ["a"])
        lk.delete_adapter(model, "a")
        with torch.no_grad(), lk.use_adapters(model, ["c", None]):
            y = model(x)
        with torch.no_grad():
            assert torch.allclose(model(x)[1], y[1], atol=1e-5)
            lk.set_adapter(model, "c")
            assert torch.allclose(model(x)[0], y[0], atol=1e-5)

    def test_weights_include_it(self):
        model = loaded()
        lk.set_adapter(model, "a")
        name, layer = next(iter(quantized_layers(model).items()))
        expected = merged(model, "a").get_submodule(name).weight
        close(layer.weight.clone(), expected)
        close(layer.merged_linear().weight, expected)
        x = gaussian(2, 64)
        close(torch.nn.functional.linear(x, layer.weight), x.double() @ expected.T)

    def test_merging_waits(self):
        model = loaded()
        lk.set_adapter(model, "a")
        with pytest.raises(ValueError, match=r"user adapters a are active.* call set_adapter\(model, None\) first"):
            lk.merge_adapters(model, requantize=True)
        lk.set_adapter(model, None)
        add(model, "r", rank=4, replaces=True)
        with pytest.raises(ValueError, match=r"user adapter r stands in the place.* call delete_adapter\(model, 'r'\)"):
            lk.merge_adapters(model, requantize=True)
        lk.delete_adapter(model, "r")
        lk.merge_adapters(model, requantize=True)
        lk.set_adapter(model, "a")  # on top of what was merged
        x = gaussian(2, 64)
        with torch.no_grad():
            layer = next(iter(quantized_layers(model).values()))
            close(layer(x), layer.merged_linear().double()(x.double()))

    def test_tuning_waits(self):
        model = loaded(tiny_gpt2())
        lk.set_adapter(model, "a")
        with pytest.raises(ValueError, match=r"the user adapter 'a' is active, .*: set_adapter\(model, None\)"):
            lk.rilq_tune(model, tiny_gpt2(), [TOKENS] * 4)

    def test_groups_have_them(self):
        linears = [nn.Linear(64, rows) for rows in (16, 24)]
        model = with_start(quantized(nn.ModuleDict({"q": linears[0], "k": linears[1]})))
        group, x = lk.QuantLoRALinearGroup([model["q"], model["k"]]), gaussian(4, 64)
        add(model, "a")
        add(model, "b", only="k")
        with torch.no_grad():
            before = group(x)
            for names in (["a"], ["a", "b"], ["b"]):
                lk.set_adapter(model, names)
                for y, layer in zip(group(x), (model["q"], model["k"]), strict=True):
                    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
            lk.set_adapter(model, None)
            assert all(map(torch.equal, group(x), before))
            with lk.use_adapters(model, ["a", None, "b", "a"]):
                rows = group(x)
                for y, layer in zip(rows, (model["q"], model["k"]), strict=True):
                    torch.testing.assert_close(y, layer(x))
            assert torch.allclose(rows[0][1], before[0][1], atol=1e-5)


class TestRows:
    def test_each_row_has_its_own(self):
        model, x = loaded(), gaussian(5, 7, 64)
        add(model, "r", rank=4, replaces=True)
        lk.set_adapter(model, "b")  # not within use_adapters
        names = ["a", None, "c", "r", "a"]
        with torch.no_grad(), lk.use_adapters(model, names):
            y = model(x)
            flat = model(x.reshape(35, 64)).view_as(y)
        for row, name in enumerate(names):
            expected = merged(model, *([name] if name else []))(x[row].double())
            close(y[row], expected)
            close(flat[row], expected)
        with torch.no_grad():
            close(model(x), merged(model, "b")(x.double()))

    def test_one_product_for_each_layer(self):
        model, x = loaded(), gaussian(2, 3, 64)
        with torch.no_grad(), lk.use_adapters(model, ["a", "b"]):
            model(x)
            calls = calls_of(lambda: model(x))
        assert calls.count("qlora_linear_multi") == len(quantized_layers(model)) and "cat" not in calls

    def test_one_name_is_for_all_rows(self):
        """One term for all, as if it were active: any number of rows, of convolutions too, with gradients."""
        model, x = loaded(), gaussian(5, 7, 64)
        with lk.use_adapters(model, ["a"]):
            with torch.no_grad():
                close(model(x), merged(model, "a")(x.double()))
                ours = [name for name in calls_of(lambda: model(x)) if "linear" in name]
            assert ours == ["qlora_linear"] * len(quantized_layers(model))
            model(x).sum().backward()
            with torch.no_grad(), lk.use_adapters(model, [None]):
                close(model(x), merged(model)(x.double()))
        with torch.no_grad(), lk.use_adapters(model, ["b"] * 5):
            close(model(x), merged(model, "b")(x.double()))
            with pytest.raises(ValueError, match="names 5 rows"):
                model(x[:4])
        convolution = quantized(nn.Sequential(nn.Conv1d(8, 8, 3)), layer_types=("conv",))
        add(convolution, "a")
        x = gaussian(2, 8, 9)
        with torch.no_grad(), lk.use_adapters(convolution, ["a"]):
            torch.testing.assert_close(convolution(x), convolution[0].merged_conv()(x), rtol=1e-4, atol=1e-4)

    def test_weights_of_rows_that_differ(self):
        model, x = loaded(), gaussian(2, 64)
        layer = model.layers[0]["up"]
        with torch.no_grad(), lk.use_adapters(model, ["a", "b"]):
            assert torch.equal(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x))
            with pytest.raises(ValueError, match="there is no one weight for all rows"):
                layer.weight.clone()

    def test_repeated_rows(self):
        """Beams of a row are consecutive."""
        model, x = loaded(), gaussian(6, 7, 64)
        with torch.no_grad(), lk.use_adapters(model, ["a", "b"]):
            y = model(x)
        for row in range(6):
            close(y[row], merged(model, "ab"[row // 3])(x[row].double()))

    def test_more_adapters_for_all_rows(self):
        """As PEFT's are, which stand on the layer of a model that has user adapters for each row."""
        model, x = loaded(), gaussian(3, 64)
        layer = model.layers[0]["up"]
        more = [Factors(*adapter(*layer.packed.shape, 2, seed=9), 0.1)]
        with torch.no_grad(), lk.use_adapters(model, ["a", None, "b"]):
            y = layer.product(x, layer.bias, more=more)
            assert calls_of(lambda: layer.product(x, layer.bias, more=more)).count("qlora_linear_multi") == 1
        for row, name in enumerate(("a", None, "b")):
            weight = merged(model, *([name] if name else [])).layers[0]["up"].weight
            weight = weight + 0.1 * more[0].lora_B.double() @ more[0].lora_A.double()
            close(y[row], x[row].double() @ weight.T + layer.bias.double())

    def test_follows_changes(self):
        model, x = loaded(), gaussian(2, 3, 64)
        with torch.no_grad(), lk.use_adapters(model, ["a", None]):
            model(x)
            add(model, "a", seed=7)
            layer = next(iter(quantized_layers(model).values()))
            layer.lora_B.mul_(-1)
            y = model(x)
            close(y[0], merged(model, "a")(x[0].double()))
            close(y[1], merged(model)(x[1].double()))

    def test_dtypes_differ(self):
        model, x = loaded(), gaussian(2, 3, 64)
        for layer in quantized_layers(model).values():
            factors = layer.slots.loaded["a"].factors
            half = Factors(factors.lora_A.half(), factors.lora_B.bfloat16(), factors.scaling)
            layer.slots.loaded["a"] = NamedAdapter(half)
        with torch.no_grad(), lk.use_adapters(model, ["a", "b"]):
            y = model(x)
        close(y[0], merged(model, "a")(x[0].double()))
        close(y[1], merged(model, "b")(x[1].double()))

    @pytest.mark.parametrize("names", ["a", [], ()])
    def test_names_must_be_listed(self, names):
        with (
            pytest.raises(ValueError, match="must list a name, or None, for each row"),
            lk.use_adapters(loaded(), names),
        ):
            pass

    @pytest.mark.parametrize("shape", [(3, 7, 64), (7, 64), (1, 8, 64)])
    def test_wrong_numbers_of_rows(self, shape):
        model = loaded()
        with (
            torch.no_grad(),
            lk.use_adapters(model, ["a", "b"]),
            pytest.raises(ValueError, match=r"names 2 rows, and a layer's input \[.*, in_features\] does not divide"),
        ):
            model(gaussian(*shape))

    def test_refusals(self):
        model = loaded()
        with pytest.raises(ValueError, match="no adapter 'z' is loaded"), lk.use_adapters(model, ["a", "z"]):
            pass
        with lk.use_adapters(model, ["a", "b"]), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
            model(gaussian(2, 3, 64))

    def test_convolutions(self):
        model = quantized(nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv2d(1, 2, 3)), layer_types=("conv",))
        add(model, "a")
        message = "layer '0' is a convolution, which has none for each row"
        with pytest.raises(ValueError, match=message), lk.use_adapters(model, ["a", None]):
            pass
        conv, x = model[0], gaussian(2, 8, 9)
        lk.set_adapter(model, "a")
        with torch.no_grad():
            torch.testing.assert_close(conv(x), conv.merged_conv()(x), rtol=1e-4, atol=1e-4)

    def test_embeddings(self):
        model = with_start(quantized(nn.Sequential(nn.Embedding(50, 64)), layer_types=("embedding",)))
        add(model, "a")
        add(model, "b")
        tables = {}
        with torch.no_grad():
            for name in ("a", "b", None):
                lk.set_adapter(model, name)
                tables[name] = model[0].merged_embedding()
            close(model(TOKENS), tables[None].double()(TOKENS))
            lk.set_adapter(model, ["b"])
            close(model(TOKENS), tables["b"].double()(TOKENS))
            with lk.use_adapters(model, ["a", None]):
                y = model(TOKENS)
            close(y[0], tables["a"].double()(TOKENS[0]))
            close(y[1], tables[None].double()(TOKENS[1]))

    def test_threads_have_their_own(self):
        """Two threads compute at once, each with its adapters; one that is started inside has none."""
        model, x = loaded(), gaussian(2, 3, 64)
        wanted = {name: merged(model, *([name] if name else []))(x.double()).detach() for name in ("a", "b", None)}
        barrier, wrong = threading.Barrier(3), []

        def run(name: str | None) -> None:
            try:
                with torch.no_grad(), lk.use_adapters(model, [name, name]):
                    for _ in range(20):
                        barrier.wait(timeout=60)
                        close(model(x), wanted[name])
            except Exception as error:  # assertions of a thread would be lost
                wrong.append(error)
                barrier.abort()

        threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        with torch.no_grad():
            for _ in range(20):
                barrier.wait(timeout=60)
                close(model(x), wanted[None])
        for thread in threads:
            thread.join()
        assert not wrong

    def test_other_models_meanwhile(self):
        one, other, x = loaded(), loaded(), gaussian(2, 3, 64)
        with torch.no_grad(), lk.use_adapters(one, ["a", "a"]):
            close(other(x), merged(other)(x.double()))
            with lk.use_adapters(other, ["b", "b"]):
                close(one(x), merged(one, "a")(x.double()))
                close(other(x), merged(other, "b")(x.double()))
            close(other(x), merged(other)(x.double()))


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    def test_switching_compiles_nothing(self):
        """Once for the start alone and once with an active adapter, whichever it is."""
        model, x = loaded(), gaussian(3, 64)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        graphs = torch._dynamo.utils.counters["stats"]
        with torch.no_grad():
            for name, count in ((None, 1), ("a", 2), ("b", 2), ("c", 2), (None, 2), ("a", 2)):
                lk.set_adapter(model, name)
                close(compiled(x), merged(model, *([name] if name else []))(x.double()))
                assert graphs["unique_graphs"] == count, name

    def test_hot_swap_compiles_nothing(self):
        model, x = loaded(), gaussian(3, 64)
        lk.set_adapter(model, "a")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        layer = next(iter(quantized_layers(model).values()))
        with torch.no_grad():
            compiled(x)
            memory = layer.slots.live.lora_A.data_ptr()
            for rank in (3, 1, 5):  # 5 is that of b, which the slot fits, too
                add(model, "a", rank=rank, seed=rank)
                assert layer.slots.live.lora_A.data_ptr() == memory
                close(compiled(x), merged(model, "a")(x.double()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        add(model, "a", rank=9)
        with torch.no_grad():
            close(compiled(x), merged(model, "a")(x.double()))

    def test_rows_run_as_written(self):
        """Compiled code does not look for adapters of rows: it would compute without them and say nothing."""
        model, x = loaded(), gaussian(2, 3, 64)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            close(compiled(x), merged(model)(x.double()))
            with lk.use_adapters(compiled, ["a", "b"]):
                y = compiled(x)
            close(y[0], merged(model, "a")(x[0].double()))
            close(y[1], merged(model, "b")(x[1].double()))
            close(compiled(x), merged(model)(x.double()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestGenerate:
    """Rows of a batch generate what each does alone with its adapter active."""

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_decoder(self, options):
        model = loaded(tiny_gpt2())
        self.check(model, TOKENS[:, :6], options)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
    def test_encoder_decoder(self, options):
        transformers = pytest.importorskip("transformers")
        config = transformers.T5Config(
            vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = loaded(transformers.T5ForConditionalGeneration(config).eval())
        self.check(model, TOKENS[:, :6] + 1, options)

    @staticmethod
    def check(model, tokens, options):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        mask, alone = torch.ones_like(tokens), []
        names = ["b", None]
        for row, name in enumerate(names):
            lk.set_adapter(model, name)
            alone.append(model.generate(tokens[row : row + 1], attention_mask=mask[:1], **options))
        lk.set_adapter(model, "c")
        with lk.use_adapters(model, names):
            together = model.generate(tokens, attention_mask=mask, **options)
        assert torch.equal(together, torch.cat(alone))
