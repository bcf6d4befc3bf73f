"""Reward models as Hugging Face folders: how their scores are told from the logits of a plain classifier.

Classifiers on decoders in transformers have a head without a bias. What is missing stands in ``config.json``::

    score = logit + score_bias          score_bias = the head's bias - what is taken off every score
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from lit_instruct.models.handover import UNREADABLE, why_unreadable
from lit_instruct.types import ConfigError

SCORE_BIAS = "score_bias"
"""The field of ``config.json``."""

_CLASSIFIER_FIELDS = (SCORE_BIAS, "num_labels", "id2label", "label2id", "problem_type")


def score_constant(config: PretrainedConfig) -> float:
    """What is added to a classifier's logit.

    Args:
        config: of the classifier.

    Returns:
        0 for a classifier that was not exported by this package.
    """
    return float(getattr(config, SCORE_BIAS, 0.0))


def is_reward_folder(source: str | PathLike[str]) -> bool:
    """Whether a reward model was exported there.

    Args:
        source: a folder or hub name.

    Returns:
        False also where nothing can be read: who loads it then says why.
    """
    if Path(source).is_file():  # a GGUF file is not read through to find that it is no JSON
        return False
    try:
        fields, _ = PretrainedConfig.get_config_dict(str(source))
    except (OSError, ValueError):
        return False
    return SCORE_BIAS in fields


def read_reward_folder(source: str | PathLike[str]) -> tuple[PreTrainedModel, Tensor, float]:
    """Read an exported reward model.

    Args:
        source: for which :func:`is_reward_folder` holds.

    Returns:
        A causal language model in fp32 whose decoder has the weights (and whose unembedding has none), the head's
        weight ``[1, D]``, and the constant that is added to its product.

    Raises:
        ConfigError: the files are not there or damaged.
    """
    try:
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            str(source), dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except UNREADABLE as error:
        raise ConfigError(
            f"no reward model could be loaded from {str(source)!r}: {why_unreadable(error)} Give the folder as "
            "`lit-instruct export` wrote it."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"{str(source)!r}: got no weights for {', '.join(missing[:3])}; need the reward model whole. Give the "
            "folder as `lit-instruct export` wrote it."
        )
    constant = score_constant(classifier.config)
    fields = {name: value for name, value in classifier.config.to_dict().items() if name not in _CLASSIFIER_FIELDS}
    language_model = AutoModelForCausalLM.from_config(type(classifier.config).from_dict(fields), dtype=torch.float32)
    language_model.base_model.load_state_dict(classifier.base_model.state_dict())
    return language_model, classifier.score.weight.detach(), constant
