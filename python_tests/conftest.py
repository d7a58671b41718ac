"""Fixtures, and what every test runs under."""

from __future__ import annotations

import os
import warnings

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

import torch  # noqa: E402
from properties import settings  # noqa: E402

# Deadlines are timing asserts; the examples are the same in every run.
settings.register_profile("repeatable", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
