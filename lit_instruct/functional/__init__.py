"""The arithmetic of InstructGPT as pure functions of tensors: no state, no I/O, no communication, no Lightning.

Tensors come positionally, coefficients by keyword; nothing is mutated; losses are computed in fp32 (fp64 if that is
what comes in) whatever the dtype of the model. Sums over ranks enter as arguments (``denominator=``, ``moments=``).
"""

from lit_instruct.functional.correlations import spearman_correlation, within_group_correlation
from lit_instruct.functional.diagnostics import correlation, distinct_rows, repeated_ngrams
from lit_instruct.functional.kl import KLEstimates, adaptive_kl_coef, kl_estimates
from lit_instruct.functional.language import next_token_loss, token_accuracy
from lit_instruct.functional.logprobs import Surprise, gather_logprobs, surprise_moments
from lit_instruct.functional.masking import (
    Moments,
    lengths_to_mask,
    masked_mean,
    masked_moments,
    merge_moments,
    whiten,
)
from lit_instruct.functional.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    missing_eos_scores,
    token_rewards,
)
from lit_instruct.functional.ranking import (
    Calibration,
    calibration,
    last_token_index,
    pair_credit,
    pair_differences,
    prompts_with_pair,
    ranking_accuracy,
    ranking_loss,
)
from lit_instruct.functional.schedules import cosine_to_floor, linear_warmup

__all__ = [
    "Calibration",
    "KLEstimates",
    "Moments",
    "Surprise",
    "adaptive_kl_coef",
    "calibration",
    "clipped_policy_loss",
    "clipped_value_loss",
    "correlation",
    "cosine_to_floor",
    "distinct_rows",
    "explained_variance",
    "gather_logprobs",
    "generalized_advantages",
    "kl_estimates",
    "last_token_index",
    "lengths_to_mask",
    "linear_warmup",
    "masked_mean",
    "masked_moments",
    "merge_moments",
    "missing_eos_scores",
    "next_token_loss",
    "pair_credit",
    "pair_differences",
    "prompts_with_pair",
    "ranking_accuracy",
    "ranking_loss",
    "repeated_ngrams",
    "spearman_correlation",
    "surprise_moments",
    "token_accuracy",
    "token_rewards",
    "whiten",
    "within_group_correlation",
]
