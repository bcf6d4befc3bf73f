"""Several sequences in one row, and K responses behind one prompt: exact, without a padding column.

A model is admitted by what it does, not by its name: :func:`enable_packing` looks at the configuration, then lets the
model read a packed row and the same sequences one by one, and checks the sliding windows that its layers ask for. All
others read padded rows, which every decoder does right.

::

    demonstrations      a a a a | b b | c c c         positions  0 1 2 3 | 0 1 | 0 1 2
    shared prompt       p p p | r r | s s s s         positions  0 1 2 | 3 4 | 3 4 5 6     r and s do not see each other
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_instruct.models.attention import NAME, NO_MASK, Segment, Segments
from lit_instruct.models.handover import first_line

log = logging.getLogger(__name__)

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_PROBE_ERROR = 1e-4
"""Right models stay below 1e-5 (24 layers, fp32); a fresh GPT-2 of width 16 that sees the whole row is at 9e-4."""
_ATTRIBUTE = "lit_packing"


class Admission(NamedTuple):
    """Whether a model may be given packed rows, and why not."""

    packs: bool
    reason: str


class Packed(NamedTuple):
    """One packed row.

    Attributes:
        ids_T: int64 ``[T]``, all sequences behind one another.
        positions_T: int64 ``[T]``, the position of each token in its own sequence.
        segments: how the row is cut.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments

    def arguments(self) -> dict[str, Any]:
        """What a Hugging Face model is called with."""
        return {
            "input_ids": self.ids_T[None],
            "position_ids": self.positions_T[None],
            "attention_mask": NO_MASK.to(self.ids_T.device),
            "segments": self.segments,
            "use_cache": False,
        }


def admission(model: nn.Module) -> Admission:
    """What :func:`enable_packing` found out about a model.

    Args:
        model: a language model or its decoder.

    Returns:
        Its admission; that of a model which was never asked is no.
    """
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Admission) else Admission(False, "packing was not enabled for it")


def enable_packing(model: PreTrainedModel) -> Admission:
    """Find out whether a model reads packed rows right; if so, they are what it gets from now on.

    Args:
        model: a causal language model with its weights. Its attention becomes
            :func:`~lit_instruct.models.attention.attention_forward` if it is admitted and stays as it is if not.

    Returns:
        The admission, kept on the model and on its decoder.
    """
    return _settle(model, _examine(model))


def refuse_packing(model: PreTrainedModel, reason: str) -> Admission:
    """Let a model read padded rows, whatever it could do.

    Args:
        model: a causal language model.
        reason: why.

    Returns:
        The admission: no.
    """
    return _settle(model, Admission(False, reason))


def take_admission(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Let a model read rows as another of its architecture does, without a test of its own.

    Rounded weights would not pass it: 8 bits look at all tokens of a call together.

    Args:
        model: changed in place.
        like: was asked before.
    """
    found = admission(like)
    if found.packs:
        model.set_attn_implementation(NAME)
    for part in (model, model.base_model):
        setattr(part, _ATTRIBUTE, found)


def _settle(model: PreTrainedModel, found: Admission) -> Admission:
    if not found.packs:
        log.warning(
            "%s reads padded rows, not packed ones: %s. The numbers are the same; it takes longer.",
            type(model).__name__,
            found.reason,
        )
    for part in (model, model.base_model):
        setattr(part, _ATTRIBUTE, found)
    return found


def pack_rows(ids_BT: Tensor, mask_BT: Tensor) -> Packed:
    """Put the real tokens of padded rows behind one another.

    Args:
        ids_BT: int64 ``[B, T]``, padding on either side or on both.
        mask_BT: bool ``[B, T]``; a row's real tokens are neighbours.

    Returns:
        One segment for each row that has a token, in the order of the rows. ``x[mask_BT]`` is packed like this for
        any ``x`` of shape ``[B, T, ...]``.
    """
    lengths_B = mask_BT.sum(dim=1)
    positions_BT = mask_BT.long().cumsum(dim=1) - 1
    stops = list(itertools.accumulate(lengths_B.tolist()))
    parts = [Segment(start, stop) for start, stop in zip([0, *stops], stops, strict=False) if stop > start]
    return Packed(ids_BT[mask_BT], positions_BT[mask_BT], Segments(parts))


def pack_shared(
    prompt_ids_BP: Tensor, prompt_mask_BP: Tensor, response_ids_NR: Tensor, response_mask_NR: Tensor, group_N: Tensor
) -> tuple[Packed, Tensor]:
    """Put each prompt, once, before all responses to it.

    ::

        row    p0 p0 p0 | r0 r0 | r1 r1 r1 | p1 p1 | r2 | r3 r3
                          ^ sees p0 and itself        ^ sees p1 and itself

    Args:
        prompt_ids_BP: int64 ``[B, P]``, padded on the left.
        prompt_mask_BP: bool ``[B, P]``.
        response_ids_NR: int64 ``[N, R]``, padded on the right.
        response_mask_NR: bool ``[N, R]``.
        group_N: int64 ``[N]``, the prompt of each response.

    Returns:
        The row, in which a prompt without responses stands too, and the column of each response's last token, int64
        ``[N]``.
    """
    prompt_lengths, response_lengths = prompt_mask_BP.sum(dim=1).tolist(), response_mask_NR.sum(dim=1).tolist()
    prompt_ids = prompt_ids_BP[prompt_mask_BP].split(prompt_lengths)
    response_ids = response_ids_NR[response_mask_NR].split(response_lengths)
    responses_of: list[list[int]] = [[] for _ in prompt_lengths]
    for response, prompt in enumerate(group_N.tolist()):
        responses_of[prompt].append(response)
    columns = torch.arange(max(prompt_lengths) + max(response_lengths), device=group_N.device)
    parts, ids, positions, column = [], [], [], 0
    ends = [0] * len(response_ids)
    for prompt, responses in enumerate(responses_of):
        left, right = column, column + prompt_lengths[prompt]
        parts.append(Segment(left, right))
        ids.append(prompt_ids[prompt])
        positions.append(columns[: right - left])
        column = right
        for response in responses:
            stop = column + response_lengths[response]
            parts.append(Segment(column, stop, left, right))
            ids.append(response_ids[response])
            positions.append(columns[right - left : right - left + stop - column])
            ends[response] = stop - 1
            column = stop
    packed = Packed(torch.cat(ids), torch.cat(positions), Segments(parts))
    return packed, torch.tensor(ends, device=group_N.device)


def _examine(model: PreTrainedModel) -> Admission:
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if not layers <= _KNOWN_LAYERS:
        unknown = ", ".join(sorted(layers - _KNOWN_LAYERS))
        return Admission(False, f"it has layers of the type {unknown}, which are not told where a segment begins")
    if getattr(config, "attention_chunk_size", None):
        return Admission(False, "its attention is cut into chunks, of which an attention function is not told")
    if getattr(model, "_is_stateful", False):
        return Admission(False, "it is recurrent: its state runs on from one segment to the next")
    if config.is_encoder_decoder or not model._can_set_attn_implementation():
        return Admission(False, "its attention cannot be replaced from outside")
    before = model.config._attn_implementation
    with _evaluating(model):
        try:
            alone = _read_alone(model)
            model.set_attn_implementation(NAME)
            reason = _probe(model, alone)
        except Exception as error:  # noqa: BLE001 - whatever a foreign model raises means no, and is said
            reason = f"it cannot read the rows of the test ({type(error).__name__}: {first_line(error)[:120]})"
        if reason:
            model.set_attn_implementation(before)
    return Admission(not reason, reason)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


_PROMPT, _RESPONSES, _OTHER = 5, (4, 6), 7


def _probe_tokens(model: PreTrainedModel) -> tuple[Tensor, list[Tensor], Tensor]:
    """A prompt, two responses to it, and a sequence of its own: tokens that differ, in a vocabulary of 22 or more."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    total = _PROMPT + sum(_RESPONSES) + _OTHER
    tokens = (torch.arange(total, device=model.device) + 3) % vocabulary
    prompt, *responses, other = tokens.split([_PROMPT, *_RESPONSES, _OTHER])
    return prompt, responses, other


def _read_alone(model: PreTrainedModel) -> Tensor:
    """Logits of the responses and of the other sequence, each read in a row of its own."""
    prompt, responses, other = _probe_tokens(model)
    logits = []
    for before, row in [*((_PROMPT, torch.cat([prompt, response])) for response in responses), (0, other)]:
        positions = torch.arange(len(row), device=row.device)
        read = model(input_ids=row[None], position_ids=positions[None], use_cache=False).logits
        logits.append(read[0, before:])
    return torch.cat(logits).float()


def _probe(model: PreTrainedModel, alone: Tensor) -> str:
    """Read the same in one packed row; why the model must not be given such rows, or nothing."""
    prompt, responses, other = _probe_tokens(model)
    lengths = [_PROMPT, *_RESPONSES, _OTHER]
    starts = [0, *itertools.accumulate(lengths)]
    parts = [Segment(0, _PROMPT)]
    parts += [Segment(starts[n], starts[n + 1], 0, _PROMPT) for n in (1, 2)]
    parts.append(Segment(starts[3], starts[4]))
    segments = Segments(parts, watch_windows=True)
    first = [0, _PROMPT, _PROMPT, 0]
    positions = [torch.arange(start, start + length) for start, length in zip(first, lengths, strict=True)]
    packed = Packed(torch.cat([prompt, *responses, other]), torch.cat(positions).to(prompt.device), segments)
    together = model(**packed.arguments()).logits[0, _PROMPT:].float()
    error = float((together - alone).norm() / alone.norm().clamp_min(1e-12))
    if not error < _PROBE_ERROR:
        return f"a packed row gives it other logits than its sequences alone (relative error {error:.1g})"
    promised = _promised_windows(model)
    if segments.windows != promised:
        return (
            f"its layers ask for the attention windows {_brief(segments.windows)}, while its configuration promises "
            f"{_brief(promised)}"
        )
    return ""


def _promised_windows(model: PreTrainedModel) -> list[int | None]:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _brief(windows: Sequence[int | None] | None) -> str:
    counted = [f"{window} in {windows.count(window)} layers" for window in dict.fromkeys(windows or ())]  # type: ignore[union-attr]
    return ", ".join(counted) or "none"
