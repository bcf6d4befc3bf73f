"""How the networks read rows: the training forward passes, each written once and used by all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_instruct.functional import Surprise, gather_logprobs, next_token_loss, surprise_moments, token_accuracy
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
    columns_R = response_columns(ids_BT.shape[1] - width, width, ids_BT.device)
    logits_BRV = language_model_logits(model, ids_BT, mask_BT, columns_R)
    mask_BR = responses.response_mask_BR[:, :width]
    logprobs_BR = gather_logprobs(logits_BRV, responses.response_ids_BR[:, :width], temperature=temperature)
    padding = (0, responses.response_ids_BR.shape[1] - width)
    moments = None
    if surprise:
        with torch.no_grad():  # a column at a time: the whole would hold several more tensors as large as the logits
            columns = [surprise_moments(logits_BRV[:, [t]], temperature=temperature) for t in range(width)]
        joined = (torch.cat(parts, dim=1).where(mask_BR, 0.0) for parts in zip(*columns, strict=True))
        moments = Surprise(*(nn.functional.pad(part, padding) for part in joined))
    return nn.functional.pad(logprobs_BR.where(mask_BR, 0.0), padding), moments


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
    values_BR = model.response_values(ids_BT, mask_BT, response_length=width)
    values_BR = values_BR.where(responses.response_mask_BR[:, :width], 0.0)
    return nn.functional.pad(values_BR, (0, responses.response_ids_BR.shape[1] - width))


def demonstration_loss(
    model: nn.Module, batch: DemonstrationBatch, *, denominator: Tensor | float | None = None
) -> tuple[Tensor, Metrics]:
    """Mean next-token loss over the loss mask: SFT, pretraining and ptx alike.

    Args:
        model: a causal language model.
        batch: demonstrations or pretraining text.
        denominator: None = the loss tokens of this batch; else what the sum is divided by.

    Returns:
        The loss (nats a token, fp32) and ``{"loss", "token_acc", "tokens"}`` of this batch.
    """
    ids_BT, mask_BT, loss_mask_BT = batch
    # Only columns that some row is to predict need logits; column c predicts the token at c + 1.
    columns_C = loss_mask_BT[:, 1:].any(dim=0).nonzero().squeeze(1)
    targets_N = ids_BT[:, columns_C + 1].flatten()
    target_mask_N = loss_mask_BT[:, columns_C + 1].flatten()
    logits_NV = language_model_logits(model, ids_BT, mask_BT, columns_C).flatten(0, 1)
    tokens = target_mask_N.sum()
    count = tokens.clamp_min(1)  # nothing to predict: a loss of 0, which still backpropagates
    total = next_token_loss(logits_NV, targets_N, target_mask_N, denominator=1.0)
    with torch.no_grad():
        accuracy = token_accuracy(logits_NV, targets_N, target_mask_N)
    metrics = {"loss": total.detach() / count, "token_acc": accuracy, "tokens": tokens}
    return total / (count if denominator is None else denominator), metrics
