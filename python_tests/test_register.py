"""Our layers become known to another package whichever of the two is imported first. Each case is a process."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from test_import import python

HOST = """
    import sys, warnings
    sys.path.insert(0, {folder!r})
    warnings.simplefilter("error")
    from loftq_kernels.integrations import register
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
    return HOST.format(folder=str(tmp_path))


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


def test_import_of_ours_loads_no_host():
    python("import sys, loftq_kernels\nassert not {'peft', 'transformers'} & set(sys.modules)")
