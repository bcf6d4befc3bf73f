"""Sequence classifiers of Hugging Face as judges of text: loading and running them.

The padding follows what their heads look for: those on decoders take the rightmost token that is not ``pad_token_id``,
and refuse batches where there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.models.classifier_input import ClassifierInput
from lit_instruct.models.handover import UNREADABLE, is_stage_checkpoint, why_unreadable
from lit_instruct.models.reward_folder import score_constant
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)


def load_classifier(
    source: str, *, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with its tokenizer.

    Args:
        source: hub name or folder.
        dtype: of the weights: ``float32``, ``bfloat16``, ``float16``.
        trust_remote_code: run the Python code that the source brings, if it brings some.

    Returns:
        The frozen model in eval mode, and its tokenizer.

    Raises:
        ConfigError: there is none, or it has no trained classification head.
    """
    if is_stage_checkpoint(source):
        raise ConfigError(
            f"ClassifierScorer model: got {source!r}, a checkpoint of this package; need a hub name or folder of a "
            "sequence classifier. Do: use lit_instruct.rewards.RewardModelScorer for the .ckpt of a reward stage."
        )
    if trust_remote_code:
        log.warning("trust_remote_code is set: Python code that %r brings is run, with all that you may do", source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except UNREADABLE as error:
        advice = "give a hub name or a folder."
        if "trust_remote_code" in str(error):
            advice = "read that code; if you trust it, set trust_remote_code of ClassifierScorer to true."
        raise ConfigError(
            f"ClassifierScorer model: no sequence classifier with its tokenizer could be loaded from {source!r}: "
            f"{why_unreadable(error)} Do: {advice}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"ClassifierScorer model: {source!r} brings no weights for {', '.join(missing[:3])}, so its scores "
            "would be random. Need a model that was trained as a sequence classifier."
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"ClassifierScorer model: {source!r} has a tokenizer without a tokenizer.json, which cannot tell which "
            "tokens belong to the prompt. Do: save the model with a fast tokenizer."
        )
    return model.eval().requires_grad_(False), tokenizer


def choose_output(model: PreTrainedModel, output: int | str | None) -> int:
    """Which of the classifier's outputs is the score.

    Args:
        model: the classifier.
        output: number or label; None where there is only one.

    Returns:
        Its number.

    Raises:
        ConfigError: there are several and none was chosen, or the chosen one does not exist.
    """
    labels = [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]
    if output is None and len(labels) == 1:
        return 0
    if isinstance(output, int) and 0 <= output < len(labels):
        return output
    if labels.count(str(output)) == 1:
        return labels.index(str(output))
    listed = ", ".join(f"{number} = {label}" for number, label in enumerate(labels))
    raise ConfigError(
        f"ClassifierScorer output: got {output!r}; need the number or label of the output that is the score. The model "
        f"has {len(labels)}: {listed}."
    )


@torch.no_grad()
def classify(model: PreTrainedModel, inputs: Sequence[ClassifierInput], *, batch_rows: int) -> Tensor:
    """All outputs of a classifier.

    Args:
        model: the classifier.
        inputs: B rows.
        batch_rows: rows a forward pass; rows of similar length share one.

    Returns:
        fp32 ``[B, labels]`` on the model's device, the outputs before any softmax. To those of a reward model that was
        exported the constant is added that its head has no room for.
    """
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row].ids))
    parts = [
        _outputs(model, [inputs[row] for row in order[start : start + batch_rows]])
        for start in range(0, len(order), batch_rows)
    ]
    sorted_BL = torch.cat(parts)
    outputs_BL = torch.empty_like(sorted_BL)
    outputs_BL[torch.tensor(order, device=sorted_BL.device)] = sorted_BL
    return outputs_BL


def _outputs(model: PreTrainedModel, rows: Sequence[ClassifierInput]) -> Tensor:
    device = model.device
    config = model.config.get_text_config()
    configured = config.pad_token_id
    # Without a pad token of its own the head would refuse the batch. Any id serves that ends no row: attention never
    # sees it, and the rightmost other token is the row's last, which is what the head reads of a row alone.
    ends = {row.ids[-1] for row in rows}
    pad = next(token for token in range(len(ends) + 1) if token not in ends) if configured is None else configured
    width = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values], device=device)

    given = {
        "input_ids": padded([row.ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
    }
    types = [row.types for row in rows if row.types is not None]
    if types:
        given["token_type_ids"] = padded(types, 0)
    try:
        config.pad_token_id = pad
        # In the model's own dtype also under autocast: bf16 has two to three digits, and scores are compared.
        with torch.autocast(device.type, enabled=False):
            return model(**given).logits.float() + score_constant(model.config)
    finally:
        config.pad_token_id = configured
