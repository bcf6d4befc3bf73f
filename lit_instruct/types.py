"""The records that cross rooms: plain NamedTuples of tensors, and the error types that a user meets.

Shape legend, used in names everywhere (``ids_BT`` is an int64 tensor ``[B, T]``)::

    B  sequences (or prompts)      P  padded prompt length       K  responses ranked together
    T  padded sequence, P + R      R  padded response length     N  all responses of a batch, sum of K
    V  vocabulary

Padding, everywhere: prompts are padded on the LEFT, responses on the RIGHT, so that a response starts in one
column and ``cat([prompt, response], dim=1)`` is a row that a decoder can continue or score::

              prompt_ids_BP        response_ids_BR
              P = 4                R = 5
    row 0   [ .  .  a  b ]       [ x  y  E  .  . ]      E = end of text, . = padding
    row 1   [ a  b  c  d ]       [ x  y  z  w  v ]      (ran into the length limit: no E)

    mask      F  F  T  T           T  T  T  F  F         built from lengths, never from ids == pad:
              T  T  T  T           T  T  T  T  T         pad and end of text may be the same id

Demonstrations and pretraining text are whole sequences, padded on the right. Masks are bool, True = counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Message = dict[str, str]
"""One chat turn: ``{"role": "user" | "assistant" | "system", "content": text}``."""

Prompt = str | list[Message]
"""A prompt as text, or as chat turns that end with the user's."""


class ConfigError(ValueError):
    """A setting cannot work. The message says what was got, what is needed and what to do."""


class DataError(ValueError):
    """Rows of a data set cannot be used. The message names file, line and field of each (first) bad row."""


class NonFiniteError(RuntimeError):
    """Training was stopped because its numbers are no longer finite. The weights were kept from them."""


class SaveError(OSError):
    """Something could not be written. The message names the file and says what is left."""


class DemonstrationBatch(NamedTuple):
    """Whole sequences to imitate: prompt + response + end of text, or a chunk of pretraining text.

    Attributes:
        input_ids_BT: int64 ``[B, T]``, padded on the right.
        attention_mask_BT: bool ``[B, T]``, True at real tokens.
        loss_mask_BT: bool ``[B, T]``, True at the tokens that are to be predicted (the response with its end of
            text; everything in pretraining text). The mask stands at the token itself, not at its predictor:
            ``functional.next_token_loss`` shifts.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor


class ComparisonBatch(NamedTuple):
    """B prompts, each once, with their ragged K ranked responses (N in all, no padding responses).

    Attributes:
        prompt_ids_BP: int64 ``[B, P]``, padded on the left.
        prompt_mask_BP: bool ``[B, P]``.
        response_ids_NR: int64 ``[N, R]``, padded on the right, each with its end of text.
        response_mask_NR: bool ``[N, R]``.
        ranks_N: int64 ``[N]``, 1 is best, equal ranks are ties.
        group_N: int64 ``[N]``, the prompt (row of ``prompt_ids_BP``) that a response belongs to; ascending.
        labeler_B: int64 ``[B]``, who ranked the responses to each prompt: a number of one's own choosing, the same on
            all ranks (``ComparisonDataModule`` counts its ``labelers``); -1 = not known. None: nobody is known.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    response_ids_NR: Tensor
    response_mask_NR: Tensor
    ranks_N: Tensor
    group_N: Tensor
    labeler_B: Tensor | None = None


class PromptBatch(NamedTuple):
    """Prompts to sample responses for.

    Attributes:
        prompt_ids_BP: int64 ``[B, P]``, padded on the left.
        prompt_mask_BP: bool ``[B, P]``.
        rows: B rows of the data: ``prompt`` as the user gave it (whole, also where the ids were cut) and the row's
            other columns. Scorers that read text need them; empty where there are ids only.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    rows: Sequence[dict[str, Any]] = ()


class Responses(NamedTuple):
    """What sampling produced for B prompts.

    Attributes:
        response_ids_BR: int64 ``[B, R]``, padded on the right; the end of text belongs to the response.
        response_mask_BR: bool ``[B, R]``, True up to and including the end of text.
        finished_B: bool ``[B]``, True where the response ended by itself and not at the length limit.
    """

    response_ids_BR: Tensor
    response_mask_BR: Tensor
    finished_B: Tensor


class Rollout(NamedTuple):
    """Sampled responses with everything the frozen models say about them (no gradient anywhere).

    Column t of every ``_BR`` tensor belongs to response token t: ``old_logprobs_BR[:, t]`` is the policy's
    log pi(token t | before), ``old_values_BR[:, t]`` the value of the state before token t. Zero at padding.

    Attributes:
        prompt_ids_BP: int64 ``[B, P]``, padded on the left.
        prompt_mask_BP: bool ``[B, P]``.
        response_ids_BR: int64 ``[B, R]``, padded on the right.
        response_mask_BR: bool ``[B, R]``.
        finished_B: bool ``[B]``, the response ended with its end of text.
        old_logprobs_BR: fp32 ``[B, R]``, nats, under the policy that sampled.
        reference_logprobs_BR: fp32 ``[B, R]``, nats, under the frozen reference.
        old_values_BR: fp32 ``[B, R]``.
        raw_scores_B: fp32 ``[B]``, as the reward model gives them.
        scores_B: fp32 ``[B]``, after the missing-end-of-text rule.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    response_ids_BR: Tensor
    response_mask_BR: Tensor
    finished_B: Tensor
    old_logprobs_BR: Tensor
    reference_logprobs_BR: Tensor
    old_values_BR: Tensor
    raw_scores_B: Tensor
    scores_B: Tensor


class Experience(NamedTuple):
    """A rollout with what PPO learns from; constants for the whole iteration. A minibatch is one with fewer rows.

    Attributes:
        rollout: the samples.
        rewards_BR: fp32 ``[B, R]``, -kl_coef * KL per token plus the score at the last token.
        advantages_BR: fp32 ``[B, R]``, whitened if asked for, zero at padding.
        returns_BR: fp32 ``[B, R]``, advantages before whitening + values, zero at padding.
    """

    rollout: Rollout
    rewards_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


Metrics = dict[str, Any]
"""Names (without the ``stage/split/`` prefix) to scalars: fp32 tensors without gradient, or floats."""
