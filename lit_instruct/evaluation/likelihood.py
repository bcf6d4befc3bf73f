"""What models think of given tokens: KL to a reference, loss on plain text, log-probabilities of choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.data.collate import EncodedPrompt, collate_chunks, collate_prompts
from lit_instruct.data.modules import PretrainingDataModule
from lit_instruct.evaluation.responses import pad_responses
from lit_instruct.functional import kl_estimates
from lit_instruct.models.backbone import context_length
from lit_instruct.models.forward import demonstration_loss, response_logprobs
from lit_instruct.models.packing import admission
from lit_instruct.rollouts import passes
from lit_instruct.types import ConfigError, DemonstrationBatch, PromptBatch, Responses

_CHUNK_TOKENS = 2048
_PASS_TOKENS = 4096
"""The most tokens of a forward pass: the logits of more, over a vocabulary of 50,000 in fp32, outgrow a laptop."""


class KL(NamedTuple):
    """KL of a policy to a reference for each of B sequences, nats, estimated from the policy's own samples.

    Attributes:
        k1_B: fp32 ``[B]``, unbiased; what the penalty of PPO is made of.
        k3_B: fp32 ``[B]``, never negative.
    """

    k1_B: Tensor
    k3_B: Tensor


@torch.no_grad()
def kl_to_reference(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: PromptBatch,
    responses: Responses,
    *,
    temperature: float = 1.0,
    rows: int = 32,
) -> KL:
    """Estimate how far a policy is from a reference, as training does (``objective/kl``).

    Args:
        policy: wrote the responses.
        reference: reads the same tokens.
        prompts: B prompts.
        responses: of the policy.
        temperature: the one that sampled; it must be above 0.
        rows: rows a forward pass, fewer where these are long.

    Returns:
        Both estimates, on the CPU.
    """
    k1_B, k3_B = torch.zeros(len(responses.finished_B)), torch.zeros(len(responses.finished_B))
    for places, some_prompts, some_responses in _passes(policy, prompts, responses, rows):
        ours_BR, theirs_BR = (
            response_logprobs(model, some_prompts, some_responses, temperature=temperature)[0]
            for model in (policy, reference)
        )
        estimates = kl_estimates(ours_BR, theirs_BR)  # 0 at padding, where both log-probabilities are
        k1_B[places], k3_B[places] = estimates.k1.sum(dim=1).cpu(), estimates.k3.sum(dim=1).cpu()
    return KL(k1_B, k3_B)


@torch.no_grad()
def continuation_logprobs(
    model: PreTrainedModel, contexts: Sequence[list[int]], continuations: Sequence[list[int]], *, rows: int = 32
) -> list[float]:
    """Log-probability of each continuation given its context.

    Args:
        model: a language model.
        contexts: token ids of each of B contexts, at least one token each.
        continuations: token ids of each continuation, at least one token each.
        rows: rows a forward pass, fewer where these are long.

    Returns:
        B sums over the continuation's tokens, nats.
    """
    prompts = collate_prompts([EncodedPrompt(ids) for ids in contexts], pad_id=0)
    responses = pad_responses(continuations, [False] * len(continuations), pad_id=0)
    total_B = torch.zeros(len(contexts))
    for places, some_prompts, some_responses in _passes(model, prompts, responses, rows):
        total_B[places] = response_logprobs(model, some_prompts, some_responses, temperature=1.0)[0].sum(dim=1).cpu()
    return total_B.tolist()


class TextLoss(NamedTuple):
    """Loss on plain text.

    Attributes:
        nats_per_token: comparable between models of one tokenizer.
        bits_per_byte: comparable between all models: the same loss for each byte of the text in UTF-8.
    """

    nats_per_token: float
    bits_per_byte: float


@torch.no_grad()
def pretraining_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | list[str],
    *,
    chunk_tokens: int | None = None,
    rows: int = 32,
) -> TextLoss:
    """Mean next-token loss on documents, in chunks as in pretraining.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        text: sources of rows with a ``text``.
        chunk_tokens: tokens of a chunk; None: as many as the model reads, at most 2048.
        rows: chunks a forward pass, fewer where these are long.

    Returns:
        The loss.

    Raises:
        ConfigError: the model does not read such long chunks.
        DataError: there is less text than one chunk.
    """
    context = context_length(model.config)
    if chunk_tokens is not None and context is not None and chunk_tokens > context:
        raise ConfigError(
            f"chunk_tokens: got {chunk_tokens} for a model that reads {context} tokens. Do: lower chunk_tokens."
        )
    chunk_tokens = chunk_tokens or min(context or _CHUNK_TOKENS, _CHUNK_TOKENS)
    data = PretrainingDataModule(text, tokenizer, chunk_tokens=chunk_tokens, batch_size=1, val=0.0)
    data.setup("fit")
    chunks = data.samples.train
    nats = tokens = 0.0
    rows = max(1, min(rows, _PASS_TOKENS // chunk_tokens))
    for start in range(0, len(chunks), rows):
        batch = collate_chunks([chunks[index] for index in range(start, min(start + rows, len(chunks)))])
        loss, metrics = demonstration_loss(
            model, DemonstrationBatch(*(x.to(model.device) for x in batch)), denominator=1.0
        )
        nats += float(loss)
        tokens += float(metrics["tokens"])
    written = tokenizer.batch_decode([chunks[index].tolist() for index in range(len(chunks))], skip_special_tokens=True)
    return TextLoss(nats / tokens, nats / math.log(2.0) / max(1, sum(len(text.encode()) for text in written)))


def _passes(
    model: PreTrainedModel, prompts: PromptBatch, responses: Responses, rows: int
) -> Iterator[tuple[Tensor, PromptBatch, Responses]]:
    """Rows cut into forward passes on the model's device, with their places."""
    lengths = (prompts.prompt_mask_BP.sum(dim=1) + responses.response_mask_BR.sum(dim=1)).tolist()
    cut = passes(lengths, rows=rows, tokens=_PASS_TOKENS, padded=not admission(model).packs)
    for places in cut:
        yield (
            places,
            PromptBatch(
                prompts.prompt_ids_BP[places].to(model.device), prompts.prompt_mask_BP[places].to(model.device)
            ),
            Responses(*(part[places].to(model.device) for part in responses)),
        )
