"""What all DataModules share: tokenizer, token limit, splits, loaders that count rows over all ranks, exact resume."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lit_instruct.data.bad_rows import OnBadRow, Problem, check_on_bad_row, data_error, listed, write_skipped
from lit_instruct.data.encoding import LongPrompt, Misfit, Tokenizer, fit_prompt
from lit_instruct.data.records import Loaded
from lit_instruct.data.sampling import (
    GlobalBatchSampler,
    OrderedBatchSampler,
    OrderedLoader,
    ResumableLoader,
    split_rows,
)
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)

Sources = str | list[str]


class Encoded(Protocol):
    """An encoded sample: a NamedTuple with a prompt and, maybe, responses."""

    @property
    def prompt_ids(self) -> list[int]: ...  # noqa: D102

    @property
    def response_len(self) -> int: ...  # noqa: D102

    def _replace(self, *, prompt_ids: list[int]) -> Any: ...


E = TypeVar("E", bound=Encoded)
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
T = TypeVar("T")


class Samples(Protocol[S_co]):
    """Encoded samples by number: a list, or the rows of an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> S_co: ...


class TokenLimit(NamedTuple):
    """How many tokens a sample may have (None: any number), and who says so."""

    tokens: int | None
    reason: str


class Split(NamedTuple, Generic[S]):
    """Samples to train on, to validate on and to test on, encoded."""

    train: Samples[S]
    val: Samples[S]
    test: Samples[S]


class TooFewRowsError(ConfigError):
    """The training rows do not fill one batch.

    Attributes:
        rows: how many there are.
        batch_size: how many a batch needs.
    """

    def __init__(self, rows: int, batch_size: int):
        """Say so.

        Args:
            rows: how many there are.
            batch_size: how many a batch needs.
        """
        super().__init__(
            f"batch_size: got {rows} training rows for batch_size={batch_size}; need at least one whole batch. Do: "
            "lower batch_size, or give more data."
        )
        self.rows, self.batch_size = rows, batch_size

    def __reduce__(self) -> tuple[type[TooFewRowsError], tuple[int, int]]:
        """A process that was started for a rank sends its error home."""
        return type(self), (self.rows, self.batch_size)


class RankedDataModule(LightningDataModule, ABC, Generic[S]):
    """Base of the DataModules: reads, validates and encodes everything in ``setup``, before any training.

    ``batch_size`` counts rows per optimizer step over all ranks and accumulation steps. World size, rank and
    accumulation come from the attached Trainer; without one this is a single process.

    Args:
        tokenizer: where the tokenizer comes from, or a loaded one.
        template: how prompts become text.
        val: fraction of the rows, or a source, to validate on.
        test: sources to test on; None: there is no test.
        batch_size: rows per optimizer step.
        val_batch_size: rows per validation or test step, over all ranks; None: as much a rank as in training.
        num_workers: loader processes.
        seed: of the split and the order of rows.
        on_bad_row: what becomes of rows that cannot be used.
        own_limit: most tokens of a sample; None: the model's limit alone.

    Attributes:
        skipped_folder: where rows that are left out are listed; None: in the log folder of the attached Trainer.
    """

    limit_argument = "max_length"
    """Name of the argument that holds ``_own_limit``, for errors."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        template: str,
        val: float | str,
        test: Sources | None,
        batch_size: int,
        val_batch_size: int | None,
        num_workers: int,
        seed: int,
        on_bad_row: OnBadRow,
        own_limit: int | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(val, seed=seed, num_workers=num_workers)
        check_on_bad_row(on_bad_row)
        sizes = {"batch_size": batch_size, "val_batch_size": val_batch_size, self.limit_argument: own_limit}
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"{name}: got {size!r}; need an integer of at least 1. Do: change {name}.")
        self.tokenizer: Tokenizer
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val = val
        self.test = test
        self.on_bad_row = on_bad_row
        self._tokenizer_source = tokenizer
        self._template = template
        self._own_limit = own_limit
        self._split: Split[S] | None = None
        self._limit: TokenLimit | None = None
        self._rows_read = 0
        self._skipped: list[Problem] = []
        self.skipped_folder: Path | None = None

    @abstractmethod
    def _load(self, limit: TokenLimit) -> Split[S]:
        """Read, split and encode."""

    @abstractmethod
    def _collate(self) -> Callable[[Sequence[S]], Any]:
        """Give the function that makes a batch; it must survive pickling, for loader processes."""

    def setup(self, stage: str | None = None) -> None:
        """Read, validate and encode all data; a second call does it again only if the token limit has changed.

        Args:
            stage: Lightning's name of what comes next; all stages use the same data.

        Raises:
            ConfigError: what comes next is a test, and there are no data to test on; or a size cannot work.
            DataError: rows cannot be used, and are not to be left out; or none is left.
        """
        if stage == "test":
            self._check_test()
        limit = self._token_limit()
        if self._split is None or limit != self._limit:
            self._loader_batch_size()
            self.tokenizer = load_tokenizer(self._tokenizer_source, template=self._template)
            self._rows_read, self._skipped = 0, []
            split = self._load(limit)
            if self.on_bad_row == "skip":
                self._report_skipped()
            for held_out in (split.val, split.test):
                if len(held_out):
                    self._ordered_loader(held_out, self._collate())  # what cannot be shared out fails now
            self._split, self._limit = split, limit
        if stage in (None, "fit") and len(self.samples.train) < self.batch_size:
            raise TooFewRowsError(len(self.samples.train), self.batch_size)

    def check_sizes(self) -> None:
        """Refuse, before any data are read, batches that cannot be shared out over ranks and accumulation steps.

        Raises:
            ConfigError: so it is.
        """
        self._loader_batch_size()
        self._val_loader_batch_size()

    @property
    def samples(self) -> Split[S]:
        """The encoded samples.

        Raises:
            ConfigError: ``setup`` has not run.
        """
        if self._split is None:
            raise ConfigError(f"{type(self).__name__}: got no data yet; need setup() first. Do: call setup().")
        return self._split

    def train_dataloader(self) -> ResumableLoader:
        """Loader of this rank's share of each training batch; shuffled anew for each ``sampler.set_epoch``.

        It has ``state_dict`` and ``load_state_dict``, with which Lightning resumes in the middle of an epoch. Outside
        of Lightning call ``loader.sampler.set_epoch(epoch)`` before each epoch, else every epoch has the same order.
        """
        train = self.samples.train
        size = self._loader_batch_size()
        world_size, rank, _ = self._topology()
        sampler = GlobalBatchSampler(
            len(train),
            batch_size=self.batch_size,
            loader_batch_size=size,
            world_size=world_size,
            rank=rank,
            seed=self.seed,
        )
        return ResumableLoader(
            train,
            batch_size=size,
            sampler=sampler,
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            generator=self._generator(),
        )

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Loader of this rank's validation rows, in order; an empty list without validation data."""
        return self._ordered_loader(self.samples.val, self._collate()) if len(self.samples.val) else []

    def test_dataloader(self) -> DataLoader:
        """Loader of this rank's test rows, in order.

        Raises:
            ConfigError: no test data were given.
        """
        self._check_test()
        return self._ordered_loader(self.samples.test, self._collate())

    def _check_test(self) -> None:
        if self.test is None:
            raise ConfigError(
                "test: got no test data; need a source, or a list of sources, of rows like the training data. Do: set "
                "data.test (--data.test FILE)."
            )

    def _ordered_loader(self, samples: Samples[Any], collate: Callable[[Sequence[Any]], Any]) -> DataLoader:
        world_size, rank, _ = self._topology()
        sampler = OrderedBatchSampler(
            len(samples), loader_batch_size=self._val_loader_batch_size(), world_size=world_size, rank=rank
        )
        return OrderedLoader(
            _Batches(samples),
            batch_size=None,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            generator=self._generator(),
        )

    def _generator(self) -> torch.Generator:
        # A loader without one draws from the global stream whenever it is iterated, and moves dropout and sampling.
        return torch.Generator().manual_seed(self.seed)

    @property
    def pad_id(self) -> int:
        """The id that fills padding; masks never depend on it."""
        return padding_id(self.tokenizer)

    def _topology(self) -> tuple[int, int, int]:
        """World size, rank and accumulation steps."""
        if self.trainer is None:  # a callback's own data, or a custom loop
            together = dist.is_available() and dist.is_initialized()
            return (dist.get_world_size(), dist.get_rank(), 1) if together else (1, 0, 1)
        return self.trainer.world_size, self.trainer.global_rank, self.trainer.accumulate_grad_batches

    def _loader_batch_size(self) -> int:
        world_size, _, accumulate = self._topology()
        size, rest = divmod(self.batch_size, world_size * accumulate)
        if rest or not size:
            raise ConfigError(
                f"batch_size: got {self.batch_size}, which counts rows over {world_size} ranks x {accumulate} "
                f"accumulation steps; need a multiple of {world_size * accumulate}. Do: change batch_size, devices or "
                "accumulate_grad_batches."
            )
        return size

    def _val_loader_batch_size(self) -> int:
        if self.val_batch_size is None:
            return self._loader_batch_size()
        world_size, _, _ = self._topology()
        size, rest = divmod(self.val_batch_size, world_size)
        if rest or not size:
            raise ConfigError(
                f"val_batch_size: got {self.val_batch_size}, which counts rows over {world_size} ranks; need a "
                f"multiple of {world_size}. Do: change val_batch_size or devices."
            )
        return size

    def _token_limit(self) -> TokenLimit:
        """The smaller of this module's own limit and that of the LightningModule."""
        own = TokenLimit(self._own_limit, f"{self.limit_argument}={self._own_limit} of {type(self).__name__}")
        model = self.trainer.lightning_module if self.trainer is not None else None
        allowed = getattr(model, "sample_token_limit", None)
        if allowed is None:
            return own if own.tokens is not None else TokenLimit(None, "no limit")
        theirs = f"{type(model).__name__} allows {allowed}"
        if own.tokens is not None and own.tokens <= allowed:
            return TokenLimit(own.tokens, f"{own.reason}; {theirs}")
        return TokenLimit(allowed, theirs if own.tokens is None else f"{theirs}; {own.reason}")

    def _usable(self, loaded: Loaded[T]) -> Loaded[T]:
        """Note the rows that are left out, where ``on_bad_row`` lets them be. Every rank reads, and keeps, the same.

        Raises:
            DataError: rows cannot be used, and are not to be left out; or none is left.
        """
        loaded.check(self.on_bad_row)
        self._rows_read += len(loaded.records) + len(loaded.problems)
        self._skipped += loaded.problems
        if loaded.repeated_ids and self._topology()[1] == 0:
            log.warning(
                "%d rows of %s have an id that stands in an earlier row; all are used:\n%s\n"
                "Do: check whether data were added twice.",
                len(loaded.repeated_ids),
                loaded.kind,
                "\n".join(listed(loaded.repeated_ids)),
            )
        return loaded

    def _report_skipped(self) -> None:
        """List the rows that were left out in a file beside the run, and say how many there are."""
        # Ranks find the folder together (the logger's version is rank 0's), also where there is nothing to say.
        folder = self.skipped_folder or log_folder(self.trainer)
        if self._topology()[1] != 0:
            return
        try:
            told = f"Do: read {write_skipped(folder, self._skipped)}, which lists them."
        except OSError as error:  # no reason to end the run
            told = "\n".join([f"They could not be listed in {folder} ({error}):", *listed(self._skipped)])
        if self._skipped:
            log.warning("on_bad_row=skip: left out %d of %d rows. %s", len(self._skipped), self._rows_read, told)

    def _divide(self, sources: Sources, prepare: Callable[[Sources], list[T]]) -> Split[T]:
        """Prepare all data; those to validate on are split off unless they have a source of their own."""
        rows = prepare(sources)
        test = [] if self.test is None else prepare(self.test)
        if isinstance(self.val, str):
            return Split(rows, prepare(self.val), test)
        train, val = split_rows(len(rows), self.val, seed=self.seed)
        return Split([rows[index] for index in train], [rows[index] for index in val], test)


def log_folder(trainer: Any) -> Path:
    """Where a run lists what it left out; every process must ask, since the logger's version is rank 0's.

    Args:
        trainer: of the run, or None.

    Returns:
        Its log folder; ``default_root_dir`` where there is no logger; the current folder without a Trainer.
    """
    return Path(".") if trainer is None else Path(trainer.log_dir or trainer.default_root_dir)


class PromptedDataModule(RankedDataModule[E]):
    """Base of the DataModules whose samples have prompts, which may be too long."""

    def __init__(self, *, long_prompt: LongPrompt, **shared: Any) -> None:
        super().__init__(**shared)
        if long_prompt not in get_args(LongPrompt):
            raise ConfigError(
                f"long_prompt: got {long_prompt!r}; need one of {', '.join(get_args(LongPrompt))}. Do: change it."
            )
        self.long_prompt = long_prompt

    def _fit(self, loaded: Loaded[E], limit: TokenLimit) -> list[E]:
        """Cut, drop or report the samples that exceed the limit, as ``long_prompt`` says.

        Raises:
            DataError: samples do not fit and may not be dropped, or none is left.
        """
        kept: list[E] = []
        misfits: list[str] = []
        samples = loaded.records
        for sample, place in zip(samples, loaded.places, strict=True):
            fitted = fit_prompt(
                sample.prompt_ids, sample.response_len, max_tokens=limit.tokens, long_prompt=self.long_prompt
            )
            if isinstance(fitted, Misfit):
                misfits.append(f"{place}: field 'prompt': {fitted}")
            else:
                kept.append(sample._replace(prompt_ids=fitted))
        if misfits and (self.long_prompt != "drop" or not kept):
            advice = {
                "error": "shorten these rows, raise the limit, or set long_prompt to drop or truncate_left.",
                "truncate_left": "shorten or remove these responses: only prompts are cut, and one token stays.",
                "drop": "raise the limit: long_prompt=drop would leave nothing.",
            }[self.long_prompt]
            headline = f"{len(misfits)} of {len(samples)} samples have more tokens than allowed ({limit.reason}):"
            raise data_error(headline, misfits, advice)
        if misfits and self._topology()[1] == 0:
            log.warning("long_prompt=drop: dropped %d of %d samples (%s)", len(misfits), len(samples), limit.reason)
        return kept


class _Batches(Dataset[list[Any]]):
    """Samples by batch of indices. A single index gives a batch of one: Lightning puts such a sampler in to overfit."""

    def __init__(self, samples: Samples[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return [self._samples[i] for i in ([index] if isinstance(index, int) else index)]


def _check_arguments(val: float | str, *, seed: int, num_workers: int) -> None:
    if isinstance(val, bool) or (not isinstance(val, str) and not 0 <= val < 1):
        raise ConfigError(f"val: got {val!r}; need a fraction, 0 <= val < 1, or the name of a source. Do: change val.")
    for name, number in (("seed", seed), ("num_workers", num_workers)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(f"{name}: got {number!r}; need an integer of at least 0. Do: change {name}.")
