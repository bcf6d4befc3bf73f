"""``lit-instruct evaluate``: several models on the same held-out prompts, one result each."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.records import read_prompts, read_texts
from lit_instruct.evaluation.best_of_n import best_of_n_kl, best_of_n_scores
from lit_instruct.evaluation.bootstrap import Interval, owner_interval
from lit_instruct.evaluation.judges import Judge, PairJudge, ScoreJudge
from lit_instruct.evaluation.likelihood import kl_to_reference, pretraining_loss
from lit_instruct.evaluation.matched_length import matched_win_rate
from lit_instruct.evaluation.protocols import Protocol, owners_of
from lit_instruct.evaluation.responses import Asked, Sampled, Sampling, sample
from lit_instruct.evaluation.results import FORMAT_VERSION, write_pairs, write_results, write_samples
from lit_instruct.evaluation.scoring import check_scorer, name_of, score
from lit_instruct.evaluation.subjects import ModelSource, Subject, load_subject, read_sources
from lit_instruct.evaluation.win_rate import WinRate
from lit_instruct.models.tokenizer import reads_alike
from lit_instruct.rewards import Scorer
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)


def evaluate(
    models: Sequence[str | ModelSource],
    *,
    out: str,
    prompts: str | list[str] | None = None,
    owner_column: str | None = None,
    max_prompts: int | None = None,
    scorer: Scorer | None = None,
    judge: Judge | None = None,
    baseline: str | None = None,
    reference: str | None = None,
    best_of_n: list[int] | None = None,
    picker: Scorer | None = None,
    pretraining_text: str | list[str] | None = None,
    chunk_tokens: int | None = None,
    protocols: dict[str, Protocol] | None = None,
    max_response_tokens: int = 256,
    temperature: float = 1.0,
    long_prompt: Literal["error", "truncate_left"] = "error",
    seed: int = 1,
    batch_rows: int = 256,
    micro_batch_rows: int = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """Compare models on held-out prompts.

    Args:
        models: NAME=SOURCE for each model; a source is the checkpoint of a stage, a Hugging Face folder or hub name,
            or a GGUF file. In a configuration also {name, source, template, ema, prefix}.
        out: folder for results.json, samples.jsonl and the responses, which a second run reads again.
        prompts: file, or list of files, of rows with a prompt: of owners whose prompts no model was trained on. Null:
            nothing is sampled for them.
        owner_column: column with the owner of a prompt, over whom intervals are drawn. Null: the column owner; without
            one each prompt has an owner of its own.
        max_prompts: take only so many prompts, the first ones. Null: all.
        scorer: gives each response a score: a class of lit_instruct.rewards, or lit_instruct.toyworld.GoldScorer.
        judge: decides which of two responses is better: PairJudge or HumanChoices of lit_instruct.evaluation. Null: the
            one with the higher score; without a scorer the pairs are written to pairs.jsonl for people to judge.
        baseline: name of the model that all others are compared with. Null: the first.
        reference: name of a model, or a source, to which the KL is measured. Null: the baseline.
        best_of_n: sizes n for which the score of the best of n responses is estimated; as many responses as the largest
            are sampled for each prompt.
        picker: scores by which the best of n is picked, a reward model say where the scorer is gold. Null: the scorer.
        pretraining_text: files of rows with a text, on which the loss is measured.
        chunk_tokens: tokens of a chunk of that text. Null: as many as the model reads, at most 2048.
        protocols: name to what else is asked of each model: BiasEntropy, MultipleChoice, Continuations or Harness of
            lit_instruct.evaluation.
        max_response_tokens: the most tokens that a response may have.
        temperature: of sampling; 1 samples the model itself, 0 is greedy.
        long_prompt: what to do with prompts that leave no room for a response: error, or truncate_left to cut their
            beginning.
        seed: key of all random streams.
        batch_rows: rows decoded together; changes memory, not responses.
        micro_batch_rows: rows a forward pass where nothing is decoded.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...

    Returns:
        What results.json holds.

    Raises:
        ConfigError: settings that cannot work together.
        DataError: prompts or other data that cannot be used.
    """
    sources = read_sources(models)
    settings = Settings(
        sampling=Sampling(max_response_tokens, temperature, seed, long_prompt, batch_rows),
        best_of_n=sorted(set(best_of_n or ())),
        pretraining_text=pretraining_text,
        chunk_tokens=chunk_tokens,
        micro_batch_rows=micro_batch_rows,
        device=device,
    )
    settings.check()
    asked = None if prompts is None else read_asked(prompts, owner_column=owner_column, max_prompts=max_prompts)
    evaluation = Evaluation(
        sources,
        asked,
        settings,
        Path(out),
        scorer=scorer,
        judge=judge,
        baseline=baseline,
        reference=reference,
        picker=picker,
        protocols=protocols or {},
    )
    evaluation.check()
    results = evaluation.run()
    results["prompts"] = (
        None
        if asked is None
        else {
            "sources": [prompts] if isinstance(prompts, str) else prompts,
            "count": len(asked.rows),
            "owners": len(set(asked.owners)),
        }
    )
    write_results(Path(out), results)
    return results


@dataclass(frozen=True)
class Settings:
    """How models are measured; see :func:`evaluate`."""

    sampling: Sampling
    best_of_n: list[int]
    pretraining_text: str | list[str] | None
    chunk_tokens: int | None
    micro_batch_rows: int
    device: str

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a setting cannot.
        """
        self.sampling.check("")
        for name, value in (("micro_batch_rows", self.micro_batch_rows), ("chunk_tokens", self.chunk_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}; need at least 1.")
        if self.best_of_n and self.best_of_n[0] < 1:
            raise ConfigError(f"best_of_n: got {self.best_of_n[0]}; need sizes of at least 1.")
        if self.best_of_n and self.sampling.temperature == 0:
            raise ConfigError("best_of_n: got temperature 0, at which all samples are alike. Do: raise temperature.")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """Where the models run."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"device: got {self.device!r}; need auto, cpu, cuda or cuda:NUMBER.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: got {self.device!r}, and there is no such GPU here. Do: leave device out.")
        return device

    def described(self) -> dict[str, Any]:
        """As the results say it."""
        return {
            **self.sampling._asdict(),
            "best_of_n": self.best_of_n,
            "pretraining_text": self.pretraining_text,
            "chunk_tokens": self.chunk_tokens,
        }


class Evaluation:
    """Measures one model after the other, so that no two of them (but the reference) are in memory at once."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        asked: Asked | None,
        settings: Settings,
        out: Path,
        *,
        scorer: Scorer | None,
        judge: Judge | None,
        baseline: str | None,
        reference: str | None,
        picker: Scorer | None,
        protocols: Mapping[str, Protocol],
    ) -> None:
        """Take everything that :func:`evaluate` has read; see there."""
        self.sources = {source.name: source for source in sources}
        self.asked = asked
        self.settings = settings
        self.out = out
        self.scores = None if scorer is None else ScoreJudge(scorer)
        self.judge = judge or self.scores
        self.baseline = sources[0].name if baseline is None else baseline
        self.reference = self.baseline if reference is None else reference
        self.picker = picker
        self.protocols = protocols
        self.sampled: dict[str, Sampled] = {}

    def check(self) -> None:
        """Refuse before anything is loaded what cannot work.

        Raises:
            ConfigError: settings that do not belong together, or a judge that cannot work.
            DataError: text without documents.
        """
        if self.baseline not in self.sources:
            raise ConfigError(
                f"baseline: got {self.baseline!r}; need the name of one of the models: {', '.join(self.sources)}."
            )
        if self.asked is None and (self.judge is not None or self.settings.best_of_n):
            raise ConfigError("prompts: got none for a scorer or judge; need some. Do: name a file of prompts.")
        if self.asked is None and self.settings.pretraining_text is None and not self.protocols:
            raise ConfigError("got nothing to measure. Do: give prompts, pretraining_text or protocols.")
        if self.settings.best_of_n and self.scores is None:
            raise ConfigError("best_of_n: needs a scorer. Do: give a class of lit_instruct.rewards (scorer).")
        if self.picker is not None and not self.settings.best_of_n:
            raise ConfigError("picker: got one without best_of_n. Do: give best_of_n, or leave picker out.")
        if self.settings.pretraining_text is not None:
            read_texts(self.settings.pretraining_text)
        if self.picker is not None:
            check_scorer(self.picker)
        for part in dict.fromkeys((self.scores, self.judge, *self.protocols.values())):  # one may be both
            if part is not None:
                part.check()

    def run(self) -> dict[str, Any]:
        """Measure every model, then judge.

        Returns:
            The results, without ``prompts``.
        """
        device = self.settings.torch_device()
        for part in (self.scores, self.judge):
            if isinstance(part, ScoreJudge | PairJudge):
                part.scorer.to(device)
        if self.picker is not None:
            self.picker.to(device)
        has_kl = self.asked is not None and self.settings.sampling.temperature > 0  # what is greedy has no density
        reference = self._load_reference(device) if has_kl else None
        rows = {}
        for name, source in self.sources.items():
            log.info("%s: %s", name, source.source)
            same = reference is not None and reference.about == source
            rows[name] = self._measure(reference if same and reference else load_subject(source, device), reference)
        if self.asked is not None:
            for name in self.sources:
                rows[name] |= self._compare(name)
            scores = {} if self.scores is None else {n: self.scores.of(some) for n, some in self.sampled.items()}
            write_samples(self.out, self.asked, self.sampled, scores)
            if self.judge is None:
                write_pairs(self.out, self.sampled, self.baseline, seed=self.settings.sampling.seed)
        return {
            "format_version": FORMAT_VERSION,
            "baseline": self.baseline,
            "reference": self.reference,
            "scorer": None if self.scores is None else self.scores.identity(),
            "judge": None if self.judge is None else self.judge.identity(),
            "picker": None if self.picker is None else name_of(self.picker),
            "models": rows,
            "settings": self.settings.described(),
        }

    def _load_reference(self, device: torch.device) -> Subject:
        known = self.sources.get(self.reference)
        return load_subject(known or ModelSource("reference", self.reference), device)

    def _measure(self, subject: Subject, reference: Subject | None) -> dict[str, Any]:
        about = dataclasses.asdict(subject.about)
        row: dict[str, Any] = {**about, "sha256": subject.sha256}
        del row["name"]
        responses = self.out / "responses"
        if self.asked is not None:
            samples = max(self.settings.best_of_n, default=1)
            sets = sample(subject, self.asked, self.settings.sampling, responses, samples=samples)
            self.sampled[subject.name] = sets[0]
            row |= self._described(subject, reference, sets)
        if self.settings.pretraining_text is not None:
            loss = pretraining_loss(
                subject.model,
                subject.tokenizer,
                self.settings.pretraining_text,
                chunk_tokens=self.settings.chunk_tokens,
                rows=self.settings.micro_batch_rows,
            )
            row |= {"pretraining_loss": loss.nats_per_token, "pretraining_bits_per_byte": loss.bits_per_byte}
        if self.protocols:
            row["protocols"] = {}
        for name, protocol in self.protocols.items():
            log.info("%s: %s", subject.name, name)
            row["protocols"][name] = {
                measure: {condition: interval._asdict() for condition, interval in found.items()}
                for measure, found in protocol.measure(subject, responses).items()
            }
        return row

    def _described(self, subject: Subject, reference: Subject | None, sets: Sequence[Sampled]) -> dict[str, Any]:
        """What is said about a model's responses without comparing them."""
        first = sets[0]
        row: dict[str, Any] = {
            "mean_length": float(np.mean([len(text) for text in first.texts])),
            "finished": float(first.responses.finished_B.double().mean()),
        }
        if self.scores is not None:
            row["score"] = self._interval(self.scores.of(first))._asdict()
            if self.settings.best_of_n:
                row["best_of_n"] = self._best_of_n(self.scores, sets)
        if reference is not None and reads_alike(reference.tokenizer, subject.tokenizer):
            kl = kl_to_reference(
                subject.model,
                reference.model,
                first.prompts,
                first.responses,
                temperature=self.settings.sampling.temperature,
                rows=self.settings.micro_batch_rows,
            )
            row |= {"kl": float(kl.k1_B.double().mean()), "kl_k3": float(kl.k3_B.double().mean())}
        return row

    def _best_of_n(self, scores: ScoreJudge, sets: Sequence[Sampled]) -> list[dict[str, Any]]:
        rest = [score(scores.scorer, some) for some in sets[1:]]
        scores_PN = np.stack([scores.of(sets[0]), *rest], axis=1)
        picked_by_PN = None
        if self.picker is not None:
            picked_by_PN = np.stack([score(self.picker, some) for some in sets], axis=1)
        found = []
        for n in self.settings.best_of_n:
            best = self._interval(best_of_n_scores(scores_PN, n, picked_by_PN=picked_by_PN))
            found.append({"n": n, "kl": best_of_n_kl(n), "score": best.mean, "low": best.low, "high": best.high})
        return found

    def _compare(self, name: str) -> dict[str, Any]:
        """Win rates against the baseline; none for the baseline itself."""
        if self.judge is None or name == self.baseline:
            return {}
        assert self.asked is not None
        ours, theirs = self.sampled[name], self.sampled[self.baseline]
        outcomes = self.judge.outcomes(ours, theirs)
        judged = [int(place) for place in np.flatnonzero(~np.isnan(outcomes))]
        owners = [self.asked.owners[place] for place in judged]
        matched = matched_win_rate(
            outcomes[judged],
            [len(ours.texts[place]) for place in judged],
            [len(theirs.texts[place]) for place in judged],
            owners,
        )
        return {
            "win_rate": WinRate(*owner_interval(outcomes[judged], owners))._asdict(),
            "win_rate_matched_length": None if matched is None else matched._asdict(),
        }

    def _interval(self, values: np.ndarray) -> Interval:
        assert self.asked is not None
        return owner_interval(values, self.asked.owners)


def read_asked(prompts: str | list[str], *, owner_column: str | None, max_prompts: int | None) -> Asked:
    """Read the prompts that all models answer.

    Args:
        prompts: sources of rows with a prompt.
        owner_column: column with the owner; None: ``owner``, where there is one.
        max_prompts: take only the first ones; None: all.

    Returns:
        The prompts.

    Raises:
        ConfigError: a number that cannot work.
        DataError: rows that cannot be used.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ConfigError(f"max_prompts: got {max_prompts}; need at least 1.")
    loaded = read_prompts(prompts)
    records, places = loaded.records[:max_prompts], loaded.places[:max_prompts]
    column = owner_column or "owner"
    lacking = [place for place, record in zip(places, records, strict=True) if record.columns.get(column) is None]
    if lacking and (owner_column is not None or len(lacking) < len(records)):
        raise data_error(
            f"{len(lacking)} of {len(records)} prompts have no owner:",
            [f"{place}: field {column!r}: got none; need the prompt's owner as text or number" for place in lacking],
            "add the column to these rows, take it out of all others, or name another one (owner_column).",
        )
    names = dict.fromkeys(name for record in records for name in record.columns)
    rows = [{"prompt": record.prompt} | {name: record.columns.get(name) for name in names} for record in records]
    return Asked(rows, places, owners_of([record.columns for record in records], column))
