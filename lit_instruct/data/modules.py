"""The DataModules: demonstrations (SFT), comparisons (reward model), prompts (PPO) and pretraining text (ptx)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from lit_instruct.data.bad_rows import Flaw, OnBadRow, data_error
from lit_instruct.data.base import PromptedDataModule, RankedDataModule, Samples, Sources, Split, TokenLimit, log
from lit_instruct.data.collate import (
    EncodedComparison,
    EncodedDemonstration,
    EncodedPrompt,
    collate_chunks,
    collate_comparisons,
    collate_demonstrations,
    collate_prompts,
)
from lit_instruct.data.encoding import LongPrompt, encode_texts, try_encode_prompts, try_encode_responses
from lit_instruct.data.records import (
    ComparisonRecord,
    TextRecord,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
)
from lit_instruct.types import ComparisonBatch, ConfigError, DemonstrationBatch, PromptBatch

_CHUNK_TOKENS = 2048


class DemonstrationDataModule(PromptedDataModule[EncodedDemonstration]):
    """Prompts with the responses to imitate, for supervised fine-tuning.

    Args:
        demonstrations: Source, or list of sources, of rows {"prompt", "response"}, {"prompt", "completion"} or
            {"messages"}. A source is a .jsonl, .json, .csv or .parquet file, a dataset folder, or the name of a data
            set on the Hugging Face hub; the last two take a split after a colon (default: train).
        tokenizer: Hub name, folder, GGUF file or checkpoint of an earlier stage that holds the tokenizer, or a loaded
            tokenizer.
        template: How prompts become text: "auto" (the tokenizer's own chat template, else plain), "plain",
            "verbatim", or the path of a Jinja file.
        val: Validation data: a fraction of the rows (0 to below 1), chosen with the seed, or a source.
        test: Test data, for the command test: a source, or list of sources, of rows like the training data. Null: none.
        batch_size: Demonstrations per optimizer step, over all devices and accumulation steps.
        val_batch_size: Demonstrations per validation or test step, over all devices. Null: as many a device as in
            training.
        max_length: Most tokens of prompt and response together. Null: the model's limit.
        long_prompt: What to do with samples that are too long: "error" lists them and stops, "drop" leaves them out,
            "truncate_left" cuts the beginning of the prompt. Responses are never cut.
        loss_on_prompt: Learn to predict the prompt too, not only the response.
        num_workers: Processes that collate batches. 0: the main process, enough for most uses.
        seed: Decides the validation split and the order of rows.
        on_bad_row: What to do with rows that cannot be used: "error" lists them and stops, "skip" leaves them out and
            lists them in skipped_rows.jsonl, in the run's log folder (without a Trainer: the current folder).
    """

    def __init__(
        self,
        demonstrations: str | list[str],
        tokenizer: str | Any,
        *,
        template: str = "auto",
        val: float | str = 0.05,
        test: str | list[str] | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        max_length: int | None = None,
        long_prompt: LongPrompt = "error",
        loss_on_prompt: bool = False,
        num_workers: int = 0,
        seed: int = 1,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            template=template,
            val=val,
            test=test,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            own_limit=max_length,
            long_prompt=long_prompt,
        )
        self.demonstrations = demonstrations
        self.loss_on_prompt = loss_on_prompt

    def _load(self, limit: TokenLimit) -> Split[EncodedDemonstration]:
        return self._divide(self.demonstrations, lambda sources: _read_demonstrations(self, sources, limit))

    def _collate(self) -> Callable[[Sequence[EncodedDemonstration]], DemonstrationBatch]:
        return partial(collate_demonstrations, pad_id=self.pad_id, loss_on_prompt=self.loss_on_prompt)


class ComparisonDataModule(PromptedDataModule[EncodedComparison]):
    """Prompts with K ranked responses each, for the reward model.

    Args:
        comparisons: Source, or list of sources, of rows {"prompt", "responses", "ranks"} (rank 1 is best, equal ranks
            are ties, K may differ) or {"prompt", "chosen", "rejected"}. A source is a .jsonl, .json, .csv or .parquet
            file, a dataset folder, or the name of a data set on the Hugging Face hub; the last two take a split after
            a colon (default: train). A column "labeler", if there is one, says who ranked.
        tokenizer: Hub name, folder, GGUF file or checkpoint of an earlier stage that holds the tokenizer, or a loaded
            tokenizer.
        demonstrations: Source, or list of sources, of demonstrations; the reward model's bias is set so that their
            mean score is 0. Null: none.
        template: How prompts become text: "auto" (the tokenizer's own chat template, else plain), "plain",
            "verbatim", or the path of a Jinja file.
        val: Validation data: a fraction of the rankings (0 to below 1), chosen with the seed, or a source.
        test: Test data, for the command test: a source, or list of sources, of rows like the training data. Null: none.
        batch_size: Prompts, each with all its responses, per optimizer step, over all devices and accumulation steps.
        val_batch_size: Prompts per validation or test step, over all devices. Null: as many a device as in training.
        max_length: Most tokens of the prompt and its longest response together. Null: the model's limit.
        long_prompt: What to do with samples that are too long: "error" lists them and stops, "drop" leaves them out,
            "truncate_left" cuts the beginning of the prompt. Responses are never cut.
        num_workers: Processes that collate batches. 0: the main process, enough for most uses.
        seed: Decides the validation split and the order of rows.
        on_bad_row: What to do with rows that cannot be used: "error" lists them and stops, "skip" leaves them out and
            lists them in skipped_rows.jsonl, in the run's log folder (without a Trainer: the current folder).

    Attributes:
        labelers: their names, in the order in which the sources name them; a batch's ``labeler_B`` counts them. The
            same on every rank, since every rank reads all rows.
    """

    def __init__(
        self,
        comparisons: str | list[str],
        tokenizer: str | Any,
        *,
        demonstrations: str | list[str] | None = None,
        template: str = "auto",
        val: float | str = 0.05,
        test: str | list[str] | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        max_length: int | None = None,
        long_prompt: LongPrompt = "error",
        num_workers: int = 0,
        seed: int = 1,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            template=template,
            val=val,
            test=test,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            own_limit=max_length,
            long_prompt=long_prompt,
        )
        self.comparisons = comparisons
        self.demonstrations = demonstrations
        self.labelers: list[str] = []
        self._demonstration_samples: list[EncodedDemonstration] = []

    def _load(self, limit: TokenLimit) -> Split[EncodedComparison]:
        self.labelers = []
        split = self._divide(self.comparisons, lambda sources: self._read(sources, limit))
        if self.demonstrations is not None:
            self._demonstration_samples = _read_demonstrations(self, self.demonstrations, limit)
            self._demonstration_loader()  # what cannot be shared out fails now and not after the training
        return split

    def _read(self, sources: Sources, limit: TokenLimit) -> list[EncodedComparison]:
        loaded = read_comparisons(sources, on_bad_row="skip")  # encoding may find more: all are decided on together
        prompts = try_encode_prompts(self.tokenizer, [record.prompt for record in loaded.records])
        # All responses of all prompts in one call, then dealt back: K is ragged.
        texts = [response for record in loaded.records for response in record.responses]
        responses = iter(try_encode_responses(self.tokenizer, texts))
        numbers = {name: number for number, name in enumerate(self.labelers)}
        for record in loaded.records:
            if record.labeler is not None:
                numbers.setdefault(record.labeler, len(numbers))
        self.labelers = list(numbers)
        samples = [
            _comparison(record, prompt, list(islice(responses, len(record.responses))), numbers)
            for record, prompt in zip(loaded.records, prompts, strict=True)
        ]
        return self._fit(self._usable(loaded.then(samples)), limit)

    def _collate(self) -> Callable[[Sequence[EncodedComparison]], ComparisonBatch]:
        return partial(collate_comparisons, pad_id=self.pad_id)

    def demonstration_dataloader(self) -> DataLoader | None:
        """Loader of this rank's share of all demonstrations, in order; None if none were given."""
        if self.demonstrations is None:
            return None
        _ = self.samples  # says what to do if setup has not run
        return self._demonstration_loader()

    def _demonstration_loader(self) -> DataLoader:
        return self._ordered_loader(self._demonstration_samples, partial(collate_demonstrations, pad_id=self.pad_id))


class PromptDataModule(PromptedDataModule[EncodedPrompt]):
    """Prompts to sample responses for, for PPO.

    Args:
        prompts: Source, or list of sources, of rows {"prompt"}; of rows that hold responses too the prompt is taken.
            Other columns travel with the prompts, for rewards that want them (a reference answer, say). A source is a
            .jsonl, .json, .csv or .parquet file, a dataset folder, or the name of a data set on the Hugging Face hub;
            the last two take a split after a colon (default: train).
        tokenizer: Hub name, folder, GGUF file or checkpoint of an earlier stage that holds the tokenizer, or a loaded
            tokenizer.
        template: How prompts become text: "auto" (the tokenizer's own chat template, else plain), "plain",
            "verbatim", or the path of a Jinja file.
        val: Validation data: a fraction of the prompts (0 to below 1), chosen with the seed, or a source.
        test: Test data, for the command test: a source, or list of sources, of rows like the training data. Null: none.
        batch_size: Prompts per iteration, over all devices.
        val_batch_size: Prompts per validation or test step, over all devices. Null: as many a device as in training.
        max_prompt_tokens: Most tokens of a prompt. Null: the model's limit.
        long_prompt: What to do with prompts that are too long: "error" lists them and stops, "drop" leaves them out,
            "truncate_left" cuts their beginning.
        num_workers: Processes that collate batches. 0: the main process, enough for most uses.
        seed: Decides the validation split and the order of rows.
        on_bad_row: What to do with rows that cannot be used: "error" lists them and stops, "skip" leaves them out and
            lists them in skipped_rows.jsonl, in the run's log folder (without a Trainer: the current folder).
    """

    limit_argument = "max_prompt_tokens"

    def __init__(
        self,
        prompts: str | list[str],
        tokenizer: str | Any,
        *,
        template: str = "auto",
        val: float | str = 0.05,
        test: str | list[str] | None = None,
        batch_size: int = 512,
        val_batch_size: int | None = None,
        max_prompt_tokens: int | None = 1024,
        long_prompt: LongPrompt = "error",
        num_workers: int = 0,
        seed: int = 1,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            template=template,
            val=val,
            test=test,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            own_limit=max_prompt_tokens,
            long_prompt=long_prompt,
        )
        self.prompts = prompts

    @property
    def columns(self) -> list[str]:
        """Names of the rows' other columns, which rewards may want."""
        row = self.samples.train[0].row if len(self.samples.train) else None
        return [name for name in row or () if name != "prompt"]

    def _load(self, limit: TokenLimit) -> Split[EncodedPrompt]:
        return self._divide(self.prompts, lambda sources: self._read(sources, limit))

    def _read(self, sources: Sources, limit: TokenLimit) -> list[EncodedPrompt]:
        loaded = read_prompts(sources, on_bad_row="skip")
        names = dict.fromkeys(name for record in loaded.records for name in record.columns)
        prompts = try_encode_prompts(self.tokenizer, [record.prompt for record in loaded.records])
        samples = [
            # Each row gets every column, so that which ones a scorer is given does not depend on the batch.
            prompt_ids
            if isinstance(prompt_ids, Flaw)
            else EncodedPrompt(
                prompt_ids, {"prompt": record.prompt} | {name: record.columns.get(name) for name in names}
            )
            for prompt_ids, record in zip(prompts, loaded.records, strict=True)
        ]
        return self._fit(self._usable(loaded.then(samples)), limit)

    def _collate(self) -> Callable[[Sequence[EncodedPrompt]], PromptBatch]:
        return partial(collate_prompts, pad_id=self.pad_id)


class PretrainingDataModule(RankedDataModule[np.ndarray]):
    """Plain text in chunks of equal length, to keep a policy's language alive (PPO-ptx) or to train it further.

    Documents are shuffled with the seed, each ended by one end of text, joined and cut; what does not fill the last
    chunk is left out. Works without a Trainer too: ``setup()``, then ``train_dataloader()``.

    Args:
        text: Source, or list of sources, of rows {"text"}, a document each. A source is a .jsonl, .json, .csv or
            .parquet file, a dataset folder, or the name of a data set on the Hugging Face hub; the last two take a
            split after a colon (default: train).
        tokenizer: Hub name, folder, GGUF file or checkpoint of an earlier stage that holds the tokenizer, or a loaded
            tokenizer.
        template: Not used for text; sets the tokenizer's template as in the other data modules.
        chunk_tokens: Tokens of a chunk. Null: the model's limit, at most 2048.
        val: Validation data: a fraction of the documents (0 to below 1), chosen with the seed, or a source.
        test: Test data, for the command test: a source, or list of sources, of rows like the training data. Null: none.
        batch_size: Chunks per optimizer step, over all devices and accumulation steps.
        val_batch_size: Chunks per validation or test step, over all devices. Null: as many a device as in training.
        num_workers: Processes that collate batches. 0: the main process, enough for most uses.
        seed: Decides the validation split, the order of documents and the order of chunks.
        on_bad_row: What to do with rows that cannot be used: "error" lists them and stops, "skip" leaves them out and
            lists them in skipped_rows.jsonl, in the run's log folder (without a Trainer: the current folder).
    """

    limit_argument = "chunk_tokens"

    def __init__(
        self,
        text: str | list[str],
        tokenizer: str | Any,
        *,
        template: str = "auto",
        chunk_tokens: int | None = None,
        val: float | str = 0.01,
        test: str | list[str] | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            template=template,
            val=val,
            test=test,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            own_limit=chunk_tokens,
        )
        self.text = text

    def _load(self, limit: TokenLimit) -> Split[np.ndarray]:
        asked = self._own_limit
        if asked is not None and limit.tokens is not None and limit.tokens < asked:
            raise ConfigError(
                f"chunk_tokens: got {asked}, but {limit.reason}; need at most {limit.tokens}. Do: lower chunk_tokens."
            )
        length = asked or min(limit.tokens or _CHUNK_TOKENS, _CHUNK_TOKENS)
        train, val, test = self._divide(self.text, self._read)
        return Split(
            self._cut(train, length, "training"), self._cut(val, length, "validation"), self._cut(test, length, "test")
        )

    def _read(self, sources: Sources) -> list[TextRecord]:
        return self._usable(read_texts(sources, on_bad_row="skip")).records

    def _cut(self, records: Samples[TextRecord], length: int, what: str) -> np.ndarray:
        """Join the documents in random order and cut full chunks: int32 ``[C, length]``."""
        order = np.random.RandomState(self.seed).permutation(len(records))
        documents = encode_texts(self.tokenizer, [records[index].text for index in order])
        parts = [np.asarray(ids, dtype=np.int32) for ids in documents]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        if len(records) and len(tokens) < length:
            problem = f"{what} text: got {len(tokens)} tokens; need at least {length} for one chunk (chunk_tokens)"
            if what != "validation" or isinstance(self.val, str):
                raise data_error(f"{problem}.", [], "lower chunk_tokens or give more text.")
            if self._topology()[1] == 0:
                log.warning("%s: there is no validation on text in this run; raise val to have one", problem)
        chunks = len(tokens) // length
        return tokens[: chunks * length].reshape(chunks, length)

    def _collate(self) -> Callable[[Sequence[np.ndarray]], DemonstrationBatch]:
        return collate_chunks


def _read_demonstrations(
    module: PromptedDataModule[Any], sources: Sources, limit: TokenLimit
) -> list[EncodedDemonstration]:
    loaded = read_demonstrations(sources, on_bad_row="skip")
    prompts = try_encode_prompts(module.tokenizer, [record.prompt for record in loaded.records])
    responses = try_encode_responses(module.tokenizer, [record.response for record in loaded.records])
    return module._fit(module._usable(loaded.then(map(_demonstration, prompts, responses))), limit)


def _demonstration(prompt_ids: list[int] | Flaw, response_ids: list[int] | Flaw) -> EncodedDemonstration | Flaw:
    if isinstance(prompt_ids, Flaw):
        return prompt_ids
    return response_ids if isinstance(response_ids, Flaw) else EncodedDemonstration(prompt_ids, response_ids)


def _comparison(
    record: ComparisonRecord,
    prompt_ids: list[int] | Flaw,
    responses_ids: Sequence[list[int] | Flaw],
    labelers: Mapping[str, int],
) -> EncodedComparison | Flaw:
    if isinstance(prompt_ids, Flaw):
        return prompt_ids
    usable: list[list[int]] = []
    for number, response_ids in enumerate(responses_ids, start=1):
        if isinstance(response_ids, Flaw):
            return Flaw(f"response {number}", response_ids.problem)
        usable.append(response_ids)
    return EncodedComparison(
        prompt_ids, usable, record.ranks, -1 if record.labeler is None else labelers[record.labeler]
    )
