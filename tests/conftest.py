"""What every test runs with."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """The same tests on every machine: without its GPUs, but for those that are there to try them (``-m gpu``).

    A process that a test has begun, and that crashes, says where: pytest itself listens in its own process alone.
    """
    os.environ["PYTHONFAULTHANDLER"] = "1"
    marks = config.getoption("markexpr")
    if "gpu" not in marks or "not gpu" in marks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers whichever tests ran before, in fixtures too: those that are made once are made here."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted GGUF files of tests do not land in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_INSTRUCT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
