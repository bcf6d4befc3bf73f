"""Choose among the checkpoints of SFT by what a reward model thinks of their samples."""

from __future__ import annotations

from typing import Any, get_args

import lightning.pytorch as pl
import numpy as np
import torch

from lit_instruct.data.bad_rows import OnBadRow, check_on_bad_row
from lit_instruct.data.base import log_folder
from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import LongPrompt, Misfit, fit_prompt
from lit_instruct.data.modules import PromptDataModule
from lit_instruct.models.backbone import context_length
from lit_instruct.models.generation import sample_responses
from lit_instruct.models.tokenizer import padding_id
from lit_instruct.modules.sft import SFTModule
from lit_instruct.modules.strategies import numbers_over_ranks, rank, world_size
from lit_instruct.rewards import RewardModelScorer
from lit_instruct.types import ConfigError, PromptBatch, Responses


class RewardScoreSelection(pl.Callback):
    """Logs the mean score of samples after each validation, as ``sft/val/rm_score``, for ModelCheckpoint to choose by.

    Ouyang et al. 2022, 3.5 and C.1: SFT is trained for 16 epochs and overfits on validation loss after one, while
    reward scores and human preference go on rising; so the checkpoint is chosen by score::

        - class_path: lightning.pytorch.callbacks.ModelCheckpoint
          init_args: {monitor: sft/val/rm_score, mode: max}

    The same prompts and the same random streams every time, so that checkpoints differ in nothing else. With
    ``WeightEMA`` the samples are those of the averaged weights, like the rest of validation. Also logged:
    ``sft/val/response_len`` (tokens, the end of text included) and ``sft/val/eos_rate``.
    """

    def __init__(
        self,
        reward_model: str,
        prompts: str | list[str] | None = None,
        max_prompts: int | None = None,
        max_response_tokens: int = 1024,
        long_prompt: LongPrompt = "error",
        temperature: float = 1.0,
        rollout_batch_size: int = 256,
        micro_batch_size: int = 32,
        seed: int | None = None,
        on_bad_row: OnBadRow = "error",
    ):
        """Name the reward model, and what to sample for.

        Args:
            reward_model: checkpoint of the reward stage, with the tokenizer and template of this run.
            prompts: files or hub names with a prompt column; default: the prompts of the validation demonstrations.
            max_prompts: take only so many, the first ones; null: all.
            max_response_tokens: the most tokens that a response may have.
            long_prompt: what to do with prompts that leave no room for a response in the context: error, drop or
                truncate_left.
            temperature: of sampling; 1 samples the policy itself.
            rollout_batch_size: rows decoded together, on each device; changes memory, not responses.
            micro_batch_size: rows that the reward model reads together, on each device.
            seed: key of the random streams; default: that of the run's data, else 1.
            on_bad_row: What to do with rows of ``prompts`` that cannot be used: "error" lists them and stops, "skip"
                leaves them out and lists them in reward_score_selection/skipped_rows.jsonl, in the run's log folder.
        """
        super().__init__()
        for name, value in (
            ("max_prompts", max_prompts),
            ("max_response_tokens", max_response_tokens),
            ("rollout_batch_size", rollout_batch_size),
            ("micro_batch_size", micro_batch_size),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"RewardScoreSelection {name}: got {value}; need at least 1.")
        if not temperature >= 0 or (seed is not None and seed < 0):
            raise ConfigError(
                f"RewardScoreSelection: got temperature {temperature}, seed {seed}; need both to be at least 0."
            )
        if long_prompt not in get_args(LongPrompt):
            raise ConfigError(
                f"RewardScoreSelection long_prompt: got {long_prompt!r}; need one of {', '.join(get_args(LongPrompt))}."
            )
        check_on_bad_row(on_bad_row)
        self.reward_model, self.prompts, self.max_prompts = reward_model, prompts, max_prompts
        self.max_response_tokens, self.long_prompt, self.temperature = max_response_tokens, long_prompt, temperature
        self.rollout_batch_size, self.micro_batch_size, self.seed = rollout_batch_size, micro_batch_size, seed
        self.on_bad_row = on_bad_row
        self._scorer: RewardModelScorer | None = None
        self._samples: list[EncodedPrompt] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the reward model and the prompts; what cannot work is refused now and not after the first epoch."""
        if stage not in ("fit", "validate"):
            return
        if not isinstance(pl_module, SFTModule):
            raise ConfigError(
                f"RewardScoreSelection: got a {type(pl_module).__name__}; need an SFTModule, whose checkpoints it "
                "helps to choose. Remove it."
            )
        data: Any = getattr(trainer, "datamodule", None)
        held_out = data.samples.val if hasattr(data, "samples") else None
        never = stage == "fit" and not trainer.enable_validation
        if never or (held_out is not None and not len(held_out)):
            raise ConfigError(
                "RewardScoreSelection: got no validation data, so it would never run; need some. Do: set data.val, and "
                "leave trainer.limit_val_batches above 0."
            )
        if self.seed is None:
            self.seed = getattr(data, "seed", 1)
        if self._scorer is None:
            # Networks are built with random weights before the right ones are put in: dropout must not notice.
            with torch.random.fork_rng(devices=[]):
                self._scorer = RewardModelScorer(self.reward_model, batch_rows=self.micro_batch_size)
        self._scorer.check(pl_module.tokenizer)
        self._samples = self._read(pl_module, held_out, trainer)[: self.max_prompts]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, score and log; ModelCheckpoint looks at it afterwards."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, SFTModule)
        with trainer.precision_plugin.val_step_context():
            measured = self.measure(pl_module)
        for name, value in measured.items():
            shown = name == "rm_score"
            pl_module.log(f"sft/val/{name}", value, prog_bar=shown, sync_dist=world_size() > 1)

    @torch.no_grad()
    def measure(self, module: SFTModule) -> dict[str, float]:
        """Sample a response for each prompt and score it; every process must call it.

        Args:
            module: whose policy samples.

        Returns:
            ``rm_score``, ``response_len`` and ``eos_rate``: exact means over the prompts of all ranks.
        """
        assert self._scorer is not None
        rows = np.array_split(np.arange(len(self._samples)), world_size())[rank()].tolist()
        sums = [0.0, 0.0, 0.0]
        # Every process enters: weights that are sharded are gathered together.
        with module.sampling_weights():
            answered = self._answer(module, rows) if rows else None
        if answered is not None:
            prompts, responses = answered
            # It lies on the device only while it is read: training needs the room. Outside of inference mode, since
            # tensors that are made there can never be trained with, and the module is a user's to keep.
            with torch.inference_mode(False):
                self._scorer.to(module.device)
            scores_B = self._scorer(prompts, responses, tokenizer=module.tokenizer)
            with torch.inference_mode(False):
                self._scorer.to("cpu")
            sums = [float(x.double().sum()) for x in (scores_B.cpu(), responses[1].cpu(), responses[2].cpu())]
        totals = numbers_over_ranks(*sums, device=module.device)
        means = (total / len(self._samples) for total in totals)
        return dict(zip(("rm_score", "response_len", "eos_rate"), means, strict=True))

    def _answer(self, module: SFTModule, rows: list[int]) -> tuple[PromptBatch, Responses]:
        assert self.seed is not None
        batch = collate_prompts([self._samples[row] for row in rows], padding_id(module.tokenizer))
        device = module.device
        prompts = PromptBatch(batch.prompt_ids_BP.to(device), batch.prompt_mask_BP.to(device), batch.rows)
        responses = sample_responses(
            module.policy,
            prompts,
            max_tokens=self.max_response_tokens,
            eos_ids=[module.tokenizer.eos_token_id],
            pad_id=padding_id(module.tokenizer),
            temperature=self.temperature,
            rows=rows,
            seed=self.seed,
            batch_rows=self.rollout_batch_size,
        )
        return prompts, responses

    def _read(self, module: SFTModule, held_out: Any, trainer: pl.Trainer) -> list[EncodedPrompt]:
        assert self._scorer is not None
        contexts = [context_length(network.config) for network in (module.policy, self._scorer.model)]
        context = min((tokens for tokens in contexts if tokens is not None), default=None)
        room = None if context is None else context - self.max_response_tokens
        if room is not None and room < 1:
            raise ConfigError(
                f"RewardScoreSelection max_response_tokens: got {self.max_response_tokens}, but prompt and response "
                f"must fit into the context of {context} tokens that policy and reward model share; lower it."
            )
        if self.prompts is not None:
            data = PromptDataModule(
                self.prompts,
                module.tokenizer,
                val=0.0,
                batch_size=world_size(),
                max_prompt_tokens=room,
                long_prompt=self.long_prompt,
                on_bad_row=self.on_bad_row,
            )
            if self.on_bad_row == "skip":
                data.skipped_folder = log_folder(trainer) / "reward_score_selection"
            data.setup("validate")
            return [data.samples.train[row] for row in range(len(data.samples.train))]
        if held_out is None or not hasattr(held_out[0], "prompt_ids"):
            raise ConfigError(
                "RewardScoreSelection prompts: got none, and the data of this run have no validation demonstrations to "
                "take them from; need some. Do: name a source."
            )
        return self._fit([sample.prompt_ids for sample in held_out], room)

    def _fit(self, prompts_ids: list[list[int]], room: int | None) -> list[EncodedPrompt]:
        fitted = [fit_prompt(ids, 0, max_tokens=room, long_prompt=self.long_prompt) for ids in prompts_ids]
        kept = [EncodedPrompt(ids) for ids in fitted if not isinstance(ids, Misfit)]
        misfits = [misfit for misfit in fitted if isinstance(misfit, Misfit)]
        if misfits and (self.long_prompt == "error" or not kept):
            longest = max(misfit.prompt_len for misfit in misfits)
            raise ConfigError(
                f"RewardScoreSelection: got {len(misfits)} of {len(fitted)} validation prompts with more than {room} "
                f"tokens (the longest {longest}), which leave no room for {self.max_response_tokens} tokens of "
                "response. Do: lower max_response_tokens, set long_prompt to drop or truncate_left, or name other "
                "prompts."
            )
        return kept
