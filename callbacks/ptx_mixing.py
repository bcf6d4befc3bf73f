"""Mix pretraining gradients into the updates: what turns PPO into PPO-ptx."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_instruct.data.bad_rows import OnBadRow, check_on_bad_row
from lit_instruct.data.base import TooFewRowsError, log_folder
from lit_instruct.data.modules import PretrainingDataModule
from lit_instruct.models.backbone import context_length
from lit_instruct.models.forward import demonstration_loss
from lit_instruct.modules.strategies import world_size
from lit_instruct.types import ConfigError, DemonstrationBatch, Metrics


class PtxMixing(pl.Callback):
    """Adds the next-token loss on pretraining text to every optimizer step (Ouyang et al. 2022, equation 2).

    The callback owns the endless stream of text, the coefficient and the ratio. Its micro-batches go backward one at a
    time before the module's own loss, into the same gradients; then ONE optimizer step is taken. Two steps would
    differ: Adam normalises each, and the coefficient would all but cancel.

    It serves PPO (``mode: add``: loss + coef * text loss) and SFT (``mode: fraction``: (1 - coef) * loss + coef * text
    loss, for the model that PPO starts from: 10 % pretraining data, appendix C.3).
    """

    def __init__(
        self,
        text: str | list[str],
        coef: float = 27.8,
        ratio: float = 8.0,
        mode: Literal["add", "fraction"] = "add",
        micro_batch_size: int = 32,
        chunk_tokens: int | None = None,
        seed: int | None = None,
        grad_norms_every: int | None = 10,
        on_bad_row: OnBadRow = "error",
    ):
        """Name the text and its weight.

        Args:
            text: files or hub names with a text column: what the base model was pretrained on.
            coef: weight of the mean text loss a token (the paper's PPO-ptx: 27.8).
            ratio: chunks of text for each episode (PPO) or demonstration (SFT) of an optimizer step (the paper's: 8).
            mode: add (PPO) or fraction (SFT).
            micro_batch_size: chunks a forward and backward pass, on each device.
            chunk_tokens: tokens of a chunk; default: the model's context, at most 2048.
            seed: of the order of the text; default: that of the run's data, else 1.
            grad_norms_every: PPO: every so many iterations, log the gradient norms of the text and of PPO's own loss
                (``ptx/grad_norm``, ``policy/own_grad_norm``); costs a copy of the policy's gradients. Null: never.
            on_bad_row: What to do with rows of text that cannot be used: "error" lists them and stops, "skip" leaves
                them out and lists them in ptx_mixing/skipped_rows.jsonl, in the run's log folder.
        """
        super().__init__()
        if mode not in ("add", "fraction"):
            raise ConfigError(f"PtxMixing mode: got {mode!r}; need add or fraction.")
        if not 0 <= coef < (1.0 if mode == "fraction" else float("inf")):
            raise ConfigError(f"PtxMixing coef: got {coef} in mode {mode}; need 0 or more, in mode fraction below 1.")
        for name, value in (
            ("ratio", ratio),
            ("micro_batch_size", micro_batch_size),
            ("grad_norms_every", grad_norms_every),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"PtxMixing {name}: got {value}; need more than 0.")
        check_on_bad_row(on_bad_row)
        self.text, self.coef, self.ratio, self.mode = text, coef, ratio, mode
        self.micro_batch_size, self.chunk_tokens, self.seed = micro_batch_size, chunk_tokens, seed
        self.grad_norms_every, self.on_bad_row = grad_norms_every, on_bad_row
        self.own_weight = 1.0 - coef if mode == "fraction" else 1.0
        self.data: PretrainingDataModule | None = None
        self._loader: Any = None
        self._iterator: Iterator[DemonstrationBatch] | None = None
        self._losses: list[Tensor] = []
        self._restored: dict[str, Any] | None = None

    def prepare(self, module: Any, trainer: pl.Trainer | None = None) -> None:
        """Read and encode the text; called by the Trainer before training, by hand in a custom loop.

        Args:
            module: the module whose tokenizer and context length the text is cut for.
            trainer: of the run; rows that are left out are listed in its log folder.
        """
        if self.data is not None:
            return
        context = context_length(module.policy.config)
        if self.chunk_tokens is not None and context is not None and self.chunk_tokens > context:
            raise ConfigError(
                f"PtxMixing chunk_tokens: got {self.chunk_tokens}, but the policy's context is {context} tokens; lower "
                "it, or leave it out for whole contexts."
            )
        tokens = self.chunk_tokens or min(context or 2048, 2048)
        self.data = PretrainingDataModule(
            self.text,
            module.tokenizer,
            chunk_tokens=tokens,
            batch_size=self.micro_batch_size * world_size(),
            val=0.0,
            seed=1 if self.seed is None else self.seed,
            on_bad_row=self.on_bad_row,
        )
        if self.on_bad_row == "skip":
            self.data.skipped_folder = log_folder(trainer) / "ptx_mixing"
        try:
            self.data.setup("fit")
        except TooFewRowsError as error:
            raise ConfigError(
                f"PtxMixing micro_batch_size: got {error.rows} chunks of {tokens} tokens in {self.text!r} "
                f"for micro_batch_size {self.micro_batch_size} x {world_size()} processes; need at least so many. "
                "Do: lower micro_batch_size or chunk_tokens, or give more text."
            ) from error

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bad text, sizes that do not divide and a module without a policy must be found before training."""
        if not hasattr(pl_module, "policy"):
            raise ConfigError(
                f"PtxMixing: got a {type(pl_module).__name__}; need an SFTModule or a PPOModule, whose policy reads "
                "the text. Do: remove it."
            )
        if stage == "fit" and self.coef:  # without a weight no text is needed
            data: Any = getattr(trainer, "datamodule", None)
            if self.seed is None:
                self.seed = getattr(data, "seed", 1)
            self.prepare(pl_module, trainer)
            # PPO says how many episodes an update has; SFT's demonstrations are those of the data's batch.
            if rows := getattr(pl_module, "update_rows", 0) or getattr(data, "batch_size", 0):
                self._micro_batches(rows)

    def auxiliary_losses(self, module: Any, minibatch: Any) -> Iterator[Tensor]:
        """Yield the weighted text losses of one optimizer step, one micro-batch at a time.

        Args:
            module: its ``update_rows`` says how many episodes or demonstrations the step has over all ranks.
            minibatch: not read; the protocol hands it to every callback.

        Yields:
            Scalar losses whose sum is ``coef`` times the mean text loss a token of this rank's chunks.
        """
        if self.coef == 0:
            return
        count = self._micro_batches(module.update_rows)
        self._losses = []
        for _ in range(count):
            batch = DemonstrationBatch(*(x.to(module.device) for x in next(self._stream(module))))
            loss, _ = demonstration_loss(module.policy, batch)
            self._losses.append(loss.detach())
            # All chunks have the same length, so the mean of micro-batch means is the mean over tokens.
            yield loss * (self.coef / count)

    def measures_gradients(self, module: Any) -> bool:
        """Whether PPO is to measure the gradient norm of each part in this iteration.

        Args:
            module: its ``iterations_done`` is the number of this iteration.
        """
        return self.grad_norms_every is not None and module.iterations_done % self.grad_norms_every == 0

    def after_update(self, module: Any, minibatch_metrics: Metrics) -> None:
        """PPO: report the text loss beside the module's own numbers."""
        if self._losses:
            minibatch_metrics["ptx/nll"] = torch.stack(self._losses).mean()
        self._losses = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """SFT: the same, at the steps at which the Trainer writes its log."""
        every = getattr(trainer, "log_every_n_steps", 0)  # set by a connector, and not declared
        if pl_module.automatic_optimization and self._losses and every and trainer.global_step % every == 0:
            pl_module.log("sft/train/ptx/nll", torch.stack(self._losses).mean(), sync_dist=world_size() > 1)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of text stands."""
        if self._restored is not None and self._iterator is None:
            return self._restored  # restored, and nothing drawn since
        return {"loader": None if self._loader is None else self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there at the next draw."""
        self._restored, self._iterator = state_dict, None

    def _micro_batches(self, update_rows: int) -> int:
        chunks = max(round(self.ratio * update_rows), 1)
        together = self.micro_batch_size * world_size()
        if chunks % together:
            raise ConfigError(
                f"PtxMixing: got {self.ratio} chunks for each of {update_rows} rows = {chunks} an optimizer step; "
                f"need a multiple of micro_batch_size {self.micro_batch_size} x {world_size()} processes. "
                "Change ratio or micro_batch_size."
            )
        return chunks // together

    def _stream(self, module: Any) -> Iterator[DemonstrationBatch]:
        """The text without end; a new order each time it has been read."""
        if self._iterator is None:
            self._iterator = self._endless(module)
        return self._iterator

    def _endless(self, module: Any) -> Iterator[DemonstrationBatch]:
        self.prepare(module)
        assert self.data is not None
        self._loader = self.data.train_dataloader()
        if self._restored is not None and self._restored["loader"] is not None:
            self._loader.load_state_dict(self._restored["loader"])
        for epoch in itertools.count(1):  # a restored loader knows where it stands and takes this as "one epoch more"
            yield from self._loader
            self._loader.sampler.set_epoch(epoch)
