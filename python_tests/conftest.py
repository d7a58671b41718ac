"""Fixtures, and what every test runs under."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

import torch  # noqa: E402
from gpu_session import Case, GpuSession, in_order_of_risk  # noqa: E402
from properties import settings  # noqa: E402

from loftq_kernels import threads  # noqa: E402

# Deadlines are timing asserts; the examples are the same in every run.
settings.register_profile("repeatable", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "runs with -m gpu, whose cases come in order of risk")
    group.addoption("--gpu-report", type=Path, help="JSON file of outcomes, kept up to date; continued if it exists")
    group.addoption("--gpu-seconds", type=float, help="time after which the cases left are reported as not run")


def pytest_configure(config: pytest.Config) -> None:
    report, seconds = config.getoption("--gpu-report"), config.getoption("--gpu-seconds")
    if report is not None or seconds is not None:
        config.pluginmanager.register(GpuSession(report, float("inf") if seconds is None else seconds))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "gpu":
        by_id = {item.nodeid: item for item in items if item.get_closest_marker("gpu")}
        others = [item for item in items if item.nodeid not in by_id]  # which pytest then deselects
        items[:] = [by_id[case.nodeid] for case in in_order_of_risk(map(Case.of, by_id.values()))] + others
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """The reference serves where the extension is missing: the warning that says so has a test of its own."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="loftq_kernels: .* served by the slow plain-torch reference")
        yield


@pytest.fixture(scope="session")
def torch_library(tmp_path_factory) -> Path:
    """The library of the ops for programs without Python, in the folder where CMake built it and its test."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("there is no cmake or no c++")
    repository, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("torch_library")
    options = [
        "-DLOFTQ_TORCH=ON",
        "-DLOFTQ_TESTS=ON",
        "-DLOFTQ_CUDA=OFF",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    ]
    jobs = os.environ.get("MAX_JOBS", "2")
    for command in (
        ["cmake", "-S", repository, "-B", folder, *options],
        ["cmake", "--build", folder, "--target", "loftq_torch", "torch_ops_test", "-j", jobs],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libloftq_torch.so"


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def machine(monkeypatch):
    """machine(n): n processors, and n threads of torch's in this thread and in new ones."""
    before = torch.get_num_threads()

    def sized(count: int) -> None:
        monkeypatch.setattr(threads, "available_cpus", lambda: count)
        torch.set_num_threads(count)

    yield sized
    torch.set_num_threads(before)
