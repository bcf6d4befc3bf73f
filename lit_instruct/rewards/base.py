"""What every source of scores has in common, and the sum of several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from numbers import Real
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from lit_instruct.types import ConfigError, Prompt, PromptBatch, Responses

_SHOWN = 80


class Scorer(nn.Module, ABC):
    """Gives each response one score. PPO asks nothing else of a source of scores.

    It is a module so that the LightningModule that holds it moves its networks to the device. It never learns:
    networks inside are frozen, and it stays in eval mode whatever mode the rest of the training is put into.
    """

    @abstractmethod
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        """Score each response.

        Args:
            prompts: B prompts; scorers that read text need their ``rows``.
            responses: their responses.
            tokenizer: the policy's, which turns responses into text.

        Returns:
            fp32 ``[B]`` on the device of the responses, without gradient.

        Raises:
            ConfigError: the source gave no usable scores.
        """

    def check(self, tokenizer: Any) -> None:
        """Refuse before training what cannot work with this policy; called once by PPOModule.

        Args:
            tokenizer: the policy's.

        Raises:
            ConfigError: it cannot work.
        """

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse before training prompts whose rows lack a column; called once, where the data are known.

        Args:
            columns: of the prompts' rows, beside the prompt.

        Raises:
            ConfigError: one that it needs is not among them.
        """

    def identity(self) -> str:
        """What makes its scores beside its weights; a run goes on only with a source of the same identity."""
        return type(self).__qualname__

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: dropout in a reward model would be noise in the rewards."""
        return super().train(False)


class WeightedSum(Scorer):
    """The weighted sum of several sources of scores."""

    def __init__(self, scorers: list[Scorer], weights: list[float]):
        """Combine them.

        Args:
            scorers: one or more sources; may be sums themselves.
            weights: one for each of them; negative ones are prices.
        """
        super().__init__()
        if not scorers or len(scorers) != len(weights):
            raise ConfigError(
                f"WeightedSum: got {len(scorers)} scorers and {len(weights)} weights; need one weight a scorer, and at "
                "least one."
            )
        for weight in weights:
            if not math.isfinite(weight):
                raise ConfigError(f"WeightedSum weights: got {weight}; need finite numbers.")
        self.scorers = nn.ModuleList(scorers)
        self.weights = list(weights)
        self.eval()

    @torch.no_grad()
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        """The sum of all parts' scores, each times its weight.

        Args:
            prompts: B prompts.
            responses: their responses.
            tokenizer: the policy's.

        Returns:
            fp32 ``[B]``.
        """
        total_B = torch.zeros_like(responses.finished_B, dtype=torch.float32)
        for scorer, weight in zip(self.scorers, self.weights, strict=True):
            total_B += weight * scorer(prompts, responses, tokenizer=tokenizer).float()
        return total_B

    def identity(self) -> str:
        """Its weights and parts."""
        parts = [part.identity() for part in self.scorers if isinstance(part, Scorer)]
        return f"{super().identity()} {self.weights} {parts}"

    def check(self, tokenizer: Any) -> None:
        """Check every part.

        Args:
            tokenizer: the policy's.

        Raises:
            ConfigError: a part cannot work.
        """
        for scorer in self.scorers:
            assert isinstance(scorer, Scorer)
            scorer.check(tokenizer)

    def check_columns(self, columns: Collection[str]) -> None:
        """Let every part look.

        Args:
            columns: of the prompts' rows.

        Raises:
            ConfigError: a part needs one that is not among them.
        """
        for scorer in self.scorers:
            assert isinstance(scorer, Scorer)
            scorer.check_columns(columns)


class Texts(NamedTuple):
    """B prompts and responses in words.

    Attributes:
        prompts: as the rows of the data had them, text or chat messages.
        responses: decoded, without special tokens.
        columns: every other column of the rows, B values each; None where a row lacks the column.
    """

    prompts: list[Prompt]
    responses: list[str]
    columns: dict[str, list[Any]]


def texts_of(prompts: PromptBatch, responses: Responses, tokenizer: Any) -> Texts:
    """Put a batch into words.

    Args:
        prompts: B prompts with their rows.
        responses: their responses.
        tokenizer: the policy's.

    Returns:
        Prompts, responses and columns.

    Raises:
        ConfigError: the prompts came without their rows.
    """
    rows, count = prompts.rows, len(responses.finished_B)
    if len(rows) != count:
        raise ConfigError(
            f"PromptBatch.rows: got {len(rows)} rows for {count} prompts; a scorer that reads text needs the row of "
            'each prompt. Do: take batches from PromptDataModule, or give rows=[{"prompt": text}, ...].'
        )
    ids = [ids[mask].tolist() for ids, mask in zip(*(x.cpu() for x in responses[:2]), strict=True)]
    # Decoded as it was written: a tidied text would be another response than the one that learns from the score.
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    return Texts([row["prompt"] for row in rows], texts, {name: [row.get(name) for row in rows] for name in names})


def as_scores(values: Any, *, source: str, texts: Texts, device: torch.device) -> Tensor:
    """Turn what a function or a server gave into scores.

    Args:
        values: what it gave; a list, tuple, array or tensor of B numbers.
        source: its name, for errors.
        texts: the B rows that it scored.
        device: where the scores shall lie.

    Returns:
        fp32 ``[B]``.

    Raises:
        ConfigError: these are not B finite numbers.
    """
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    count = len(texts.responses)
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{source}: got a {type(values).__name__}; need a list of {count} numbers, one a response.")
    if len(values) != count:
        raise ConfigError(f"{source}: got {len(values)} scores for {count} responses; need one each, in their order.")
    # Numpy's and torch's numbers become Python's.
    numbers: list[Any] = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    largest = torch.finfo(torch.float32).max
    for row, value in enumerate(numbers):
        # Compared as it is: an integer may be too large to become a float.
        if not isinstance(value, Real) or not -largest <= cast("Any", value) <= largest:
            raise ConfigError(
                f"{source}: got {shortened(value)} as the score of response {shortened(texts.responses[row])} to the "
                f"prompt {shortened(texts.prompts[row])}; need a finite number."
            )
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def shortened(value: Any) -> str:
    """The value as an error shows it: cut after some 80 characters.

    Args:
        value: anything.

    Returns:
        Its ``repr``, or the beginning of it.
    """
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
