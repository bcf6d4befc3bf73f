"""How the networks read rows: the training forward passes, each written once and used by all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_instruct.functional import Surprise, gather_logprobs, surprise_moments, token_accuracy
from lit_instruct.models.packing import admission, pack_rows
from lit_instruct.models.unembedding import unembedding
from lit_instruct.types import DemonstrationBatch, Metrics, PromptBatch, Responses

if TYPE_CHECKING:
    from lit_instruct.models.scalar_head import ScalarModel


def position_ids(mask_BT: Tensor) -> Tensor:
    """Positions that count real tokens only: 0 for the first, clamped at 0 in the padding before it.

    Args:
        mask_BT: bool ``[B, T]``.

    Returns:
        int64 ``[B, T]``.
    """
    return (mask_BT.long().cumsum(dim=1) - 1).clamp_min(0)


def language_model_logits(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, columns_C: Tensor | None = None) -> Tensor:
    """Logits of a language model, at chosen columns only.

    Args:
        model: a Hugging Face causal language model (or a wrapper with its signature).
        ids_BT: int64 ``[B, T]``.
        mask_BT: bool ``[B, T]``, padding on either side.
        columns_C: int64 ``[C]``, the positions whose logits are wanted (the same in all rows); None = all. The
            head over the vocabulary is by far the widest layer, so it runs only there.

    Returns:
        ``[B, C, V]`` in the model's dtype; entry c predicts the token at position ``columns_C[c] + 1``.
    """
    keep: Tensor | int = 0 if columns_C is None else columns_C
    return model(
        input_ids=ids_BT,
        attention_mask=mask_BT.long(),
        position_ids=position_ids(mask_BT),
        use_cache=False,
        logits_to_keep=keep,
    ).logits


def response_columns(prompt_length: int, response_length: int, device: torch.device) -> Tensor:
    """The positions whose output belongs to each response token: the one before it.

    ::

        position     0   1   2   3   4   5        P = 3, R = 3
        token        p   p   p   a   b   c
        predicts     p   p   a   b   c   (dropped)
                             ^   ^   ^            returned: [2, 3, 4]

    Args:
        prompt_length: P, padded.
        response_length: R, padded.
        device: where the result lies.

    Returns:
        int64 ``[R]``.
    """
    return torch.arange(prompt_length - 1, prompt_length + response_length - 1, device=device)


def join(prompts: PromptBatch, responses: Responses) -> tuple[Tensor, Tensor, int]:
    """Prompt and response as one row each, columns that are padding in every row left out.

    Args:
        prompts: B prompts, padded on the left.
        responses: their responses, padded on the right.

    Returns:
        ids ``[B, T]``, mask ``[B, T]`` and the number of columns at the end that belong to responses.
    """
    first = int(prompts.prompt_mask_BP.any(dim=0).long().argmax())
    width = int(responses.response_mask_BR.sum(dim=1).max())
    ids_BT = torch.cat([prompts.prompt_ids_BP[:, first:], responses.response_ids_BR[:, :width]], dim=1)
    mask_BT = torch.cat([prompts.prompt_mask_BP[:, first:], responses.response_mask_BR[:, :width]], dim=1)
    return ids_BT, mask_BT, width


def packed_columns(wanted_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Where the wanted places of padded rows stand in the packed row.

    Args:
        wanted_BT: bool ``[B, T]``, True at real tokens only.
        mask_BT: bool ``[B, T]``, the real tokens.

    Returns:
        int64 ``[N]``, ascending: row by row, as ``x[wanted_BT]`` is ordered.
    """
    return wanted_BT[mask_BT].nonzero().squeeze(1)


def before_response_tokens(mask_BT: Tensor, response_mask_BR: Tensor) -> Tensor:
    """Mark the places whose output belongs to a response token: the one before each.

    Args:
        mask_BT: bool ``[B, T]``, of rows that end with the response's R columns.
        response_mask_BR: bool ``[B, R]``.

    Returns:
        bool ``[B, T]``.
    """
    columns_R = response_columns(
        mask_BT.shape[1] - response_mask_BR.shape[1], response_mask_BR.shape[1], mask_BT.device
    )
    return torch.zeros_like(mask_BT).index_copy(1, columns_R, response_mask_BR)


def token_hidden(decoder: nn.Module, ids_BT: Tensor, mask_BT: Tensor, wanted_BT: Tensor) -> Tensor:
    """A decoder's hidden states at chosen places of padded rows; see :func:`token_logits`.

    Args:
        decoder: a language model without its unembedding (``language_model.base_model``).
        ids_BT: int64 ``[B, T]``.
        mask_BT: bool ``[B, T]``, padding on either side.
        wanted_BT: bool ``[B, T]``, N of the real tokens.

    Returns:
        ``[N, D]``, row by row.
    """
    if admission(decoder).packs:
        hidden_TD = decoder(**pack_rows(ids_BT, mask_BT).arguments()).last_hidden_state[0]
        return hidden_TD[packed_columns(wanted_BT, mask_BT)]
    hidden_BTD: Tensor = decoder(
        input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=position_ids(mask_BT), use_cache=False
    ).last_hidden_state
    return hidden_BTD[wanted_BT]


def token_logits(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, wanted_BT: Tensor) -> Tensor:
    """Logits of a language model at chosen places of padded rows; no other place is unembedded.

    Where the model is admitted (:mod:`lit_instruct.models.packing`) it does not see the padding either.

    Args:
        model: a Hugging Face causal language model.
        ids_BT: int64 ``[B, T]``.
        mask_BT: bool ``[B, T]``, padding on either side.
        wanted_BT: bool ``[B, T]``, N of the real tokens.

    Returns:
        ``[N, V]`` in the model's dtype, row by row; each predicts the token behind its place.
    """
    if admission(model).packs:
        packed = pack_rows(ids_BT, mask_BT)
        return model(**packed.arguments(), logits_to_keep=packed_columns(wanted_BT, mask_BT)).logits[0]
    columns_C = wanted_BT.any(dim=0).nonzero().squeeze(1)
    return language_model_logits(model, ids_BT, mask_BT, columns_C)[wanted_BT[:, columns_C]]


def response_logprobs(
    model: nn.Module, prompts: PromptBatch, responses: Responses, *, temperature: float, surprise: bool = False
) -> tuple[Tensor, Surprise | None]:
    """Log-probabilities of the response tokens, by the forward pass that training uses.

    Args:
        model: a causal language model.
        prompts: B prompts.
        responses: their responses.
        temperature: the one that sampled; logits are divided by it here too, else the ratio is not 1 at the start.
        surprise: work out entropy and variance too; over a large vocabulary they cost more than the log-probabilities.

    Returns:
        fp32 ``[B, R]`` log-probabilities in nats, and, if asked for, entropy and variance of the full distribution's
        surprise at each response token, fp32 ``[B, R]`` (without gradient). Zero at padding.
    """
    ids_BT, mask_BT, width = join(prompts, responses)
    mask_BR = responses.response_mask_BR
    wanted_BT = before_response_tokens(mask_BT, mask_BR[:, :width])
    logits_NV = token_logits(model, ids_BT, mask_BT, wanted_BT)
    logprobs_N = gather_logprobs(logits_NV, responses.response_ids_BR[mask_BR], temperature=temperature)
    moments = None
    if surprise:
        found = surprise_moments(logits_NV.detach(), temperature=temperature)
        moments = Surprise(*(spread(part, mask_BR) for part in found))
    return spread(logprobs_N, mask_BR), moments


def spread(values_N: Tensor, mask_BR: Tensor) -> Tensor:
    """Put the values of tokens back to where the tokens stand.

    Args:
        values_N: ``[N]``, one for each True, row by row.
        mask_BR: bool ``[B, R]``.

    Returns:
        fp32 ``[B, R]``, zero elsewhere.
    """
    values_N = values_N.float()
    return values_N.new_zeros(mask_BR.shape).masked_scatter(mask_BR, values_N)


def response_values(model: ScalarModel, prompts: PromptBatch, responses: Responses) -> Tensor:
    """The value of the state before each response token.

    Args:
        model: the value model.
        prompts: B prompts.
        responses: their responses.

    Returns:
        fp32 ``[B, R]``, zero at padding.
    """
    ids_BT, mask_BT, width = join(prompts, responses)
    mask_BR = responses.response_mask_BR
    values_N = model.at(ids_BT, mask_BT, before_response_tokens(mask_BT, mask_BR[:, :width]))
    return spread(values_N, mask_BR)


def demonstration_loss(
    model: nn.Module,
    batch: DemonstrationBatch,
    *,
    denominator: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Metrics]:
    """Mean next-token loss over the loss mask: SFT, pretraining and ptx alike.

    Args:
        model: a causal language model.
        batch: demonstrations or pretraining text.
        denominator: None = the loss tokens of this batch; else what the sum is divided by.
        chunk_tokens: hold the logits of so many tokens at a time, and work them out again in the backward pass; None:
            of all tokens, once. A model whose unembedding stands apart (:mod:`lit_instruct.models.unembedding`).

    Returns:
        The loss (nats a token, fp32) and ``{"loss", "token_acc", "tokens"}`` of this batch.
    """
    ids_BT, mask_BT, loss_mask_BT = batch
    predicted_BT = loss_mask_BT[:, 1:] & mask_BT[:, :-1]  # the first token of a row has none before it
    wanted_BT = nn.functional.pad(predicted_BT, (0, 1))
    targets_N = ids_BT[:, 1:][predicted_BT]
    tokens = predicted_BT.sum()
    count = tokens.clamp_min(1)  # nothing to predict: a loss of 0, which still backpropagates
    if chunk_tokens is None:
        total, correct = _summed_loss(token_logits(model, ids_BT, mask_BT, wanted_BT), targets_N)
    else:
        assert isinstance(model, PreTrainedModel)
        logits_of = unembedding(model)
        hidden_ND = token_hidden(model.base_model, ids_BT, mask_BT, wanted_BT)
        parts = [
            checkpoint(lambda some, ids: _summed_loss(logits_of(some), ids), *part, use_reentrant=False)
            for part in zip(hidden_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
        ]
        total, correct = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
    metrics = {"loss": total.detach() / count, "token_acc": correct / count, "tokens": tokens}
    return total / (count if denominator is None else denominator), metrics


def _summed_loss(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss, and how many tokens are the most likely ones."""
    everywhere_N = torch.ones_like(targets_N, dtype=torch.bool)
    correct = token_accuracy(logits_NV, targets_N, everywhere_N, denominator=1.0)
    return -gather_logprobs(logits_NV, targets_N).sum(), correct
