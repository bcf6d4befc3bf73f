"""Bias entropy and multiple choice: the stored vector, scipy, and cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from lit_instruct.evaluation.bias import choice_entropy
from lit_instruct.evaluation.multiple_choice import choice_credit
from tests.helpers.numbers import assert_vector


def test_vector_bias_entropy_bits_binary_choice() -> None:
    assert_vector(choice_entropy([-35.2, -36.0]), 0.8932029133)


@pytest.mark.parametrize("logprobs", [[-1.0, -2.0], [-700.0, -701.5, -690.0], [-5.0, -5.0, -5.0, -5.0], [-3.0, -900.0]])
def test_scipy_agrees(logprobs: list[float]) -> None:
    assert_vector(choice_entropy(logprobs), float(entropy(softmax(logprobs), base=2)))


def test_no_preference_and_certainty() -> None:
    assert_vector([choice_entropy([-40.0, -40.0]), choice_entropy([-40.0, -np.inf])], [1.0, 0.0])


def test_a_choice_needs_two() -> None:
    with pytest.raises(ValueError, match="two or more"):
        choice_entropy([-1.0])


def test_the_mean_a_token_decides_and_not_the_sum() -> None:
    logprobs, tokens = [-4.0, -6.0], [1, 3]
    assert choice_credit(logprobs, tokens, correct=1) == 1.0
    assert choice_credit(logprobs, tokens, correct=0) == 0.0


def test_options_that_tie_share_the_credit() -> None:
    assert_vector([choice_credit([-2.0, -4.0, -9.0], [1, 2, 3], correct=n) for n in range(3)], [0.5, 0.5, 0.0])
