"""Fixtures and rules that hold for every test: seeds, deterministic operations, an own kernel cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Tests run in two processes, each with one thread."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot show, with the reason."""
    no_data = pytest.mark.skip(reason="needs real data: set FMETA_DATA to the folder that holds it")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("data") and not os.environ.get("FMETA_DATA"):
            item.add_marker(no_data)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True, scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled kernels go to a folder of this run, so that no test depends on an earlier one."""
    folder = Path(os.environ.get("FMETA_CACHE") or tmp_path_factory.mktemp("kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMETA_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Same seed for every test; operations without a deterministic version raise."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def data_root() -> Path:
    """Where the real data lies (``FMETA_DATA``)."""
    return Path(os.environ["FMETA_DATA"])
