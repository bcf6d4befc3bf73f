import random

import pytest

from lit_instruct.toyworld import ToyWorld


@pytest.fixture(scope="session")
def world():
    return ToyWorld(3)


@pytest.fixture
def rng():
    return random.Random(0)
