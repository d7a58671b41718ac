"""Our layers become known to another package whichever of the two is imported first. Each case is a process."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from test_import import REPOSITORY, python

REGISTER = REPOSITORY / "loftq_kernels" / "integrations" / "register.py"
HOST = """
    import sys, warnings
    sys.path.insert(0, {folder!r})
    warnings.simplefilter("error")
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("register", {register!r})  # alone, without torch
    register = module_from_spec(spec)
    spec.loader.exec_module(register)
    def when_imported():
        register.when_imported("host.part", "ours", "1.2")
"""


@pytest.fixture
def prelude(tmp_path: Path) -> str:
    """A package ``host`` with a module ``part`` that keeps a list, and a module ``ours`` that puts its name there."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "__init__.py").write_text("from host.part import known\nseen = list(known)\n")
    (tmp_path / "host" / "part.py").write_text("known = []\n")
    ours = """
        from host import part
        def register():
            if "ours" not in part.known:
                part.known.append("ours")
        register()
    """
    (tmp_path / "ours.py").write_text(textwrap.dedent(ours))
    return HOST.format(folder=str(tmp_path), register=str(REGISTER))


@pytest.mark.parametrize("order", ["when_imported()\nimport host", "import host\nwhen_imported()"])
def test_both_orders(prelude, order):
    code = """
        assert host.part.known == ["ours"]
        when_imported()
        assert host.part.known == ["ours"] and sys.meta_path.count(register._finder) == 1
    """
    python(prelude, order, code)


def test_before_the_package_goes_on(prelude):
    """As soon as the module is executed: what the package builds on it sees ours."""
    python(prelude, "when_imported()\nimport host\nassert host.seen == ['ours']")


def test_ours_imported_by_the_user(prelude):
    python(prelude, "when_imported()\nimport ours, host\nassert host.part.known == ['ours']")


def test_reload_registers_again(prelude):
    code = """
        import importlib
        when_imported()
        import host.part
        host.part.known.append("lost")
        assert importlib.reload(host.part) is host.part
        assert host.part.known == ["ours"]
    """
    python(prelude, code)


def test_the_host_has_its_own_spec_and_loader(prelude):
    code = """
        import importlib.util, inspect
        from importlib.machinery import SourceFileLoader
        when_imported()
        spec = importlib.util.find_spec("host.part")
        assert spec.origin.endswith("part.py")
        import host.part
        assert type(host.part.__loader__) is SourceFileLoader and host.part.__spec__.loader is host.part.__loader__
        assert "exec_module" not in vars(host.part.__loader__)
        assert inspect.getsource(host.part) == "known = []\\n"
        assert importlib.util.find_spec("host.nothing") is None
        again = importlib.util.module_from_spec(importlib.util.find_spec("host.part"))
        assert again.__name__ == "host.part"
    """
    python(prelude, code)


def test_a_missing_host_stays_missing(prelude):
    code = """
        register.when_imported("nowhere.part", "ours", "1")
        try:
            import nowhere.part
        except ModuleNotFoundError as error:
            assert error.name == "nowhere"
        else:
            raise AssertionError
    """
    python(prelude, code)


@pytest.mark.parametrize("order", ["when_imported()\nimport host", "import host\nwhen_imported()"])
def test_a_host_that_ours_does_not_fit(prelude, tmp_path, order):
    """The host is imported all the same, and one warning names the versions that work."""
    (tmp_path / "ours.py").write_text("from host.part import gone\n")
    code = """
        assert host.part.known == []
        (warning,) = caught
        assert warning.category is RuntimeWarning
        for word in ("host of unknown version", "host 1.2", "cannot import name 'gone'"):
            assert word in str(warning.message), str(warning.message)
    """
    catch = "warnings.simplefilter('always')\ncaught = warnings.catch_warnings(record=True).__enter__()"
    python(prelude, catch, order, code)


class TestPeft:
    """The layers themselves are tested in test_peft.py."""

    KNOWN = """
        import loftq_kernels as lk, peft, torch
        layer = torch.nn.ModuleDict({"up": lk.QuantLoRALinear.from_linear(torch.nn.Linear(64, 64))})
        model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["up"]))
        assert type(model.base_model.model["up"]).__name__ == "LoraQuantizedLinear"
        assert early is peft.prepare_model_for_kbit_training is peft.utils.other.prepare_model_for_kbit_training
        assert early._loftq_kernels and early.__module__ == "peft.utils.other"
    """

    @pytest.mark.parametrize(
        "order",
        [
            "from peft import prepare_model_for_kbit_training as early; import loftq_kernels",
            "import loftq_kernels; from peft import prepare_model_for_kbit_training as early",
            "from peft import prepare_model_for_kbit_training as early; import loftq_kernels.integrations.peft",
        ],
    )
    def test_orders(self, order):
        """Also the functions that users have imported by name are ours by then."""
        pytest.importorskip("peft")
        python(f"import warnings; warnings.simplefilter('error', RuntimeWarning)\n{order}", self.KNOWN)

    def test_another_version(self):
        """Without a function that ours stands in for, PEFT stays as it is, and is imported all the same."""
        pytest.importorskip("peft")
        code = """
            import warnings
            from peft.tuners.lora.model import LoraModel
            from peft.tuners import tuners_utils
            del LoraModel._create_new_module
            inject = tuners_utils.BaseTuner.inject_adapter
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                import loftq_kernels
            (warning,) = [w for w in caught if w.category is RuntimeWarning]
            for word in ("does not know the layers of loftq_kernels", "peft 0.21", "_create_new_module"):
                assert word in str(warning.message)
            assert tuners_utils.BaseTuner.inject_adapter is inject
        """
        python(code)
