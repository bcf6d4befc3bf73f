"""A decoder with one scalar per token: read at the last token it is a reward model, at every token a value model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lit_instruct.functional import last_token_index
from lit_instruct.models.adapter_checkpoints import load_base, own_state, settings_of, with_adapter
from lit_instruct.models.adapters import add_adapter, base_of, merge_adapter, shared_twin
from lit_instruct.models.backbone import Base, load_language_model, load_weights
from lit_instruct.models.forward import join, spread, token_hidden
from lit_instruct.models.handover import is_stage_checkpoint, read_handover
from lit_instruct.models.packing import admission, enable_packing, pack_shared
from lit_instruct.models.reward_folder import is_reward_folder, read_reward_folder
from lit_instruct.models.rms_norm import quicken_norms
from lit_instruct.types import ComparisonBatch, ConfigError, PromptBatch, Responses


class ScalarModel(nn.Module):
    """A causal language model whose unembedding is replaced by a linear map to one scalar.

    The head starts at N(0, 1 / (d + 1)) with bias 0 (Stiennon et al. 2020, B.1). ``score_bias`` is subtracted from
    every scalar; after reward training it is set so that demonstrations score 0 on average (Ouyang et al. 2022,
    3.5), and a value model copied from the reward model keeps it.
    """

    score_bias: Tensor

    def __init__(self, trunk: PreTrainedModel):
        """Put a fresh head on ``trunk``.

        Args:
            trunk: the decoder without its unembedding (``language_model.base_model``); the final norm included.
        """
        super().__init__()
        self.trunk = trunk
        config = trunk.config.get_text_config()
        # OPT-350m projects its last hidden states down to the width of its embeddings.
        width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        self.head = ScalarHead(width)
        self.register_buffer("score_bias", torch.zeros((), dtype=torch.float32))

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the decoder."""
        return self.trunk.config

    @classmethod
    def from_base(cls, base: Base | PathLike[str]) -> Self:
        """Load a scalar model: a reward model whole, anything else as a decoder with a fresh head.

        Args:
            base: as in :func:`~lit_instruct.models.backbone.load_language_model`, or a reward model: its ``.ckpt`` (an
                adapter is merged) or the folder into which it was exported.

        Returns:
            The model in fp32.
        """
        if isinstance(base, dict):
            return cls.on_language_model(load_language_model(base))
        if is_stage_checkpoint(Path(base)):
            handed = read_handover(base)
            if handed.stage == "rm" and handed.adapter is not None:
                model = load_base(handed.adapter, base, cls.from_base, lambda loaded: loaded.trunk)
                model.trunk = with_adapter(model.trunk, handed.adapter)
                load_weights(own_state(model), handed.weights, Path(base))
                merge_adapter(model.trunk)
                return model.train()
            if handed.stage == "rm":
                language_model = AutoModelForCausalLM.from_config(handed.config, dtype=torch.float32)
                model = cls(_decoder(language_model))
                load_weights(model.state_dict(), handed.weights, Path(base))
                return model._ready(language_model)
        elif is_reward_folder(base):
            language_model, weight, constant = read_reward_folder(base)
            model = cls(_decoder(language_model))
            with torch.no_grad():
                model.head.weight.copy_(weight)
            model.score_bias.fill_(-constant)
            return model._ready(language_model)
        return cls.on_language_model(load_language_model(base))

    @classmethod
    def sharing(cls, policy: PreTrainedModel, path: str | PathLike[str], argument: str) -> Self:
        """Load a reward model whose adapter was trained on the policy's base; the base is not loaded again.

        Args:
            policy: a frozen base (:func:`~lit_instruct.models.adapters.make_base`) without an adapter.
            path: a reward model's ``.ckpt``.
            argument: the setting that it came from, for the error.

        Returns:
            The model, with an adapter and a head of its own; the weights below are the policy's tensors.

        Raises:
            ConfigError: it has no adapter, or one on other weights.
        """
        handed = read_handover(path)
        adapter, base = handed.adapter, base_of(policy)
        assert base is not None
        if handed.stage != "rm" or adapter is None or (adapter.sha256, adapter.quantization) != base[1:]:
            raise ConfigError(
                f"{argument}: got {str(path)!r}, which is no adapter on the policy's base as it is here (quantization: "
                f"{base.quantization or 'null'}), so that memory: shared_base cannot share it; need a reward model "
                "trained with model.adapter, the same model.quantization, and --model.base the policy that PPO starts "
                "from. Do: train it so, or set memory to separate."
            )
        model = cls.on_language_model(shared_twin(policy, policy))
        add_adapter(model.trunk, settings_of(adapter))
        load_weights(own_state(model), handed.weights, Path(path))
        return model

    @classmethod
    def on_language_model(cls, language_model: PreTrainedModel) -> Self:
        """Take the unembedding off a causal language model and put a fresh head in its place.

        Args:
            language_model: its decoder is used, not copied.

        Returns:
            The model.

        Raises:
            ConfigError: it has no decoder apart from its head.
        """
        return cls(_decoder(language_model))

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The scalar at every position.

        Args:
            ids_BT: int64 ``[B, T]``.
            mask_BT: bool ``[B, T]``, padding on either side.

        Returns:
            fp32 ``[B, T]``; zero at padding.
        """
        return spread(self.at(ids_BT, mask_BT, mask_BT), mask_BT)

    def at(self, ids_BT: Tensor, mask_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        """The scalar at chosen places.

        Args:
            ids_BT: int64 ``[B, T]``.
            mask_BT: bool ``[B, T]``, padding on either side.
            wanted_BT: bool ``[B, T]``, N of the real tokens.

        Returns:
            fp32 ``[N]``, row by row.
        """
        return self._scalars(token_hidden(self.trunk, ids_BT, mask_BT, wanted_BT))

    def scores(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """One score a sequence: the scalar at its last real token (the end of text of a finished response).

        Args:
            ids_BT: int64 ``[B, T]``.
            mask_BT: bool ``[B, T]``.

        Returns:
            fp32 ``[B]``.
        """
        last_B = last_token_index(mask_BT)
        return self.at(ids_BT, mask_BT, torch.arange(mask_BT.shape[1], device=mask_BT.device) == last_B[:, None])

    def ranking_scores(self, batch: ComparisonBatch) -> Tensor:
        """One score for each of the responses to some prompts; each prompt is read once, if the decoder packs.

        Args:
            batch: B prompts with N responses.

        Returns:
            fp32 ``[N]``.
        """
        if admission(self.trunk).packs:
            packed, ends_N = pack_shared(*batch[:4], batch.group_N)
            return self._scalars(self.trunk(**packed.arguments()).last_hidden_state[0, ends_N])
        prompts = PromptBatch(batch.prompt_ids_BP[batch.group_N], batch.prompt_mask_BP[batch.group_N])
        finished_N = torch.ones_like(batch.group_N, dtype=torch.bool)
        ids_NT, mask_NT, _ = join(prompts, Responses(batch.response_ids_NR, batch.response_mask_NR, finished_N))
        return self.scores(ids_NT, mask_NT)

    @contextmanager
    def unshifted(self) -> Iterator[None]:
        """Scores without the shift by ``score_bias``, whose rounding would depend on it."""
        held = self.score_bias
        self.score_bias = torch.zeros_like(held)
        try:
            yield
        finally:
            self.score_bias = held

    def _ready(self, language_model: PreTrainedModel) -> Self:
        """As a loaded language model is made ready, once its decoder has the weights."""
        quicken_norms(language_model)
        enable_packing(language_model)
        return self

    def _scalars(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) - self.score_bias


class ScalarHead(nn.Linear):
    """A linear map to one scalar, N(0, 1 / (width + 1)) with bias 0 (Stiennon et al. 2020, B.1).

    It computes in fp32, under autocast too: a score is compared with others at the third decimal.
    """

    def __init__(self, width: int):
        """Draw its weights.

        Args:
            width: of the hidden states.
        """
        super().__init__(width, 1)
        nn.init.normal_(self.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Read hidden states.

        Args:
            hidden: ``[..., D]``.

        Returns:
            fp32 ``[...]``.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def _decoder(language_model: PreTrainedModel) -> PreTrainedModel:
    trunk = language_model.base_model
    if trunk is language_model:
        raise ConfigError(
            f"{type(language_model).__name__} has no decoder apart from its head; a reward model cannot be built on it."
        )
    return trunk
