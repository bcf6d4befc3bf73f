"""What every test runs with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted GGUF files of tests do not land in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_INSTRUCT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
