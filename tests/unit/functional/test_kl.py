from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_instruct.functional import adaptive_kl_coef, kl_estimates
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS, f64

CASE = VECTORS["kl_estimators_three_outcome_distribution"]
CONTROLLER = VECTORS["adaptive_kl_controller_steps"]


def test_estimators_vector():
    policy, reference, need = f64(CASE["q"]), f64(CASE["p"]), CASE["expected"]
    estimates = kl_estimates(policy.log(), reference.log())
    for name, got in estimates._asdict().items():
        assert_vector(got, need[f"{name}_per_outcome"])
        assert_vector((policy * got).sum(), need[f"E_{name}"])
        variance = (policy * (got - (policy * got).sum()).square()).sum()
        assert_vector(variance.sqrt(), need[f"std_{name}"])
    assert_vector((policy * estimates.k3).sum(), need["exact_kl_q_p"])
    assert (policy * estimates.k1).sum() != pytest.approx(need["reverse_kl_p_q"], abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative(seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64) * 2
    policy, reference = torch.log_softmax(logits, dim=-1)
    exact = (policy.exp() * (policy - reference)).sum()
    estimates = kl_estimates(policy, reference)
    assert_close((policy.exp() * estimates.k1).sum(), exact, dtype=torch.float64)
    assert_close((policy.exp() * estimates.k3).sum(), exact, dtype=torch.float64)
    assert (estimates.k2 >= 0).all()
    assert (estimates.k3 >= 0).all()


@pytest.mark.parametrize("gap", [7e-4, 1e-3, 1.3e-3])
def test_k3_of_nearly_equal_models_keeps_its_digits_in_fp32(gap):
    got = kl_estimates(torch.tensor([0.0]), torch.tensor([gap]))
    assert float(got.k3) == pytest.approx(math.expm1(gap) - gap, rel=1e-3)


def test_bf16_is_widened():
    estimates = kl_estimates(torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
    assert {part.dtype for part in estimates} == {torch.float32}


@pytest.mark.parametrize(
    ("episodes", "key"),
    [(CONTROLLER["n_episodes"], "beta_after_each_step_code"), (1000, "beta_after_each_step_paper")],
)
def test_controller_vector(episodes, key):
    kl_coef, trace = CONTROLLER["beta0"], []
    for observed in CONTROLLER["kl_sequence"]:
        kl_coef = adaptive_kl_coef(
            kl_coef, observed, target=CONTROLLER["target"], horizon=CONTROLLER["horizon"], episodes=episodes
        )
        trace.append(kl_coef)
    assert_vector(trace, CONTROLLER["expected"][key])


def test_controller_takes_a_tensor_and_gives_a_float():
    kl_coef = adaptive_kl_coef(0.1, torch.tensor(12.0), target=6.0, horizon=1000.0, episodes=1000)
    assert isinstance(kl_coef, float)
    assert kl_coef == pytest.approx(0.12)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 1.0), (-1.0, 1.0), (6.0, 0.0)])
def test_controller_refuses_a_target_or_horizon_of_zero(target, horizon):
    with pytest.raises(ValueError, match="need both above 0"):
        adaptive_kl_coef(0.1, 1.0, target=target, horizon=horizon, episodes=1)
