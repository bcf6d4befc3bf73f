"""What a reward model is measured by on held-out rankings (accuracies, calibration, length), and its picture.

No running means: the meter keeps a few numbers per response, gathers those of all ranks at the end, and computes
everything once over the whole set. So no result depends on how the set was cut into batches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_instruct.functional import (
    Calibration,
    calibration,
    pair_credit,
    pair_differences,
    ranking_loss,
    spearman_correlation,
    within_group_correlation,
)
from lit_instruct.types import ComparisonBatch

LABELER_CURVES = 40
"""At most so many labelers (those with the most pairs; the paper had about 40) get accuracies of their own logged."""

LABELER_PAIRS = 20
"""Labelers with fewer pairs count neither for the lowest accuracy of a labeler nor for the spread: those are noise."""

_PROMPTS_AT_ONCE = 16


class Agreement(NamedTuple):
    """How often an order was met, over some of the pairs.

    Attributes:
        correct: pairs whose better response got the higher score; equal scores count one half.
        longer: pairs whose better response is the longer one; equal lengths count one half.
        pairs: how many pairs.
    """

    correct: float
    longer: float
    pairs: int

    @property
    def accuracy(self) -> float:
        """Share of the pairs; NaN without any."""
        return self.correct / self.pairs if self.pairs else math.nan

    @property
    def length_baseline(self) -> float:
        """What "the longer response wins" would get."""
        return self.longer / self.pairs if self.pairs else math.nan


class RankingReport(NamedTuple):
    """What a set of rankings says about the scores.

    Attributes:
        values: metrics by name; those of pairs are NaN if there is no pair.
        overall: over all pairs.
        calibration: of ``sigmoid(difference)``, over all pairs.
        by_labeler: number of the labeler -> over this labeler's pairs; labelers with a pair only.
        by_size: K -> over the pairs of prompts with K responses.
        rankings: prompts, those without a pair too.
    """

    values: dict[str, float]
    overall: Agreement
    calibration: Calibration
    by_labeler: dict[int, Agreement]
    by_size: dict[int, Agreement]
    rankings: int


class RankingMeter(Metric):
    """Keeps score, rank and length of every response, and who ranked each prompt, until the set is complete."""

    full_state_update = False
    scores: list[Tensor]
    ranks: list[Tensor]
    lengths: list[Tensor]
    sizes: list[Tensor]
    labelers: list[Tensor]

    def __init__(self, normalize: str):
        """Start empty.

        Args:
            normalize: of ``ranking_loss``, for the value ``loss``.
        """
        super().__init__()
        self.normalize = normalize
        for name in ("scores", "ranks", "lengths", "sizes", "labelers"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores_N: Tensor, batch: ComparisonBatch) -> None:
        """Keep a batch.

        Args:
            scores_N: one score a response.
            batch: what was scored.
        """
        size_B = batch.group_N.bincount(minlength=len(batch.prompt_ids_BP))
        self.scores.append(scores_N.detach().float())
        self.ranks.append(batch.ranks_N)
        self.lengths.append(batch.response_mask_NR.sum(dim=1))
        self.sizes.append(size_B)
        self.labelers.append(torch.full_like(size_B, -1) if batch.labeler_B is None else batch.labeler_B)

    def compute(self) -> RankingReport:
        """Measure everything kept, by all ranks together."""
        kept = (dim_zero_cat(x).cpu() for x in (self.scores, self.ranks, self.lengths, self.sizes, self.labelers))
        return report(*kept, normalize=self.normalize)


def report(
    scores_N: Tensor, ranks_N: Tensor, lengths_N: Tensor, size_B: Tensor, labeler_B: Tensor, *, normalize: str
) -> RankingReport:
    """Measure the scores of a whole set of rankings (names as in :class:`RewardModule`).

    Args:
        scores_N: float ``[N]``, those of one prompt side by side.
        ranks_N: int ``[N]``, 1 is best.
        lengths_N: int ``[N]``, tokens of each response, its end of text included.
        size_B: int ``[B]``, K of each prompt; they sum to N.
        labeler_B: int ``[B]``, -1 = not known.
        normalize: of ``ranking_loss``, for the value ``loss``.

    Returns:
        The report, computed in fp64.
    """
    scores_N, group_N = scores_N.double(), torch.arange(len(size_B)).repeat_interleave(size_B)
    # Pairs are found in an n x n table, so the set is gone through in pieces of whole prompts.
    rows = [int(part.sum()) for part in size_B.split(_PROMPTS_AT_ONCE)]
    pieces = [x.split(rows) for x in (scores_N, lengths_N.double(), ranks_N, group_N)]
    differences, longer, prompts, loss = [], [], [], 0.0
    for scores, lengths, ranks, groups in zip(*pieces, strict=True):
        of_scores, of_prompt = pair_differences(scores, ranks, groups)
        differences.append(of_scores)
        longer.append(pair_differences(lengths, ranks, groups)[0])
        prompts.append(of_prompt)
        loss += float(ranking_loss(scores, ranks, groups, normalize=normalize, denominator=1.0))
    differences_M, prompt_M = torch.cat(differences), torch.cat(prompts)
    credits_M = torch.stack([pair_credit(differences_M), pair_credit(torch.cat(longer))])
    credits_B, pairs_B = credits_M.new_zeros(2, len(size_B)), prompt_M.bincount(minlength=len(size_B))
    credits_B.index_add_(1, prompt_M, credits_M)
    table = torch.cat([credits_B, pairs_B[None].double()])
    fit, overall = calibration(differences_M), _agreement(table.sum(dim=1))
    kept = pairs_B > 0
    of_prompts = (credits_B / pairs_B)[:, kept].mean(dim=1)  # NaN without any
    values = {
        "loss": loss / int(kept.sum()) if overall.pairs else math.nan,
        "log_loss": float(fit.log_loss) if overall.pairs else math.nan,
        "acc": overall.accuracy,
        "acc_len_baseline": overall.length_baseline,
        "acc_prompt_mean": float(of_prompts[0]),
        "acc_len_baseline_prompt_mean": float(of_prompts[1]),
        "margin": float(differences_M.mean()),
        "ece": float(fit.ece) if overall.pairs else math.nan,
        "brier": float(fit.brier) if overall.pairs else math.nan,
        "score_mean": float(scores_N.mean()),
        "score_std": float(scores_N.std(correction=0)),
        "len_corr": float(spearman_correlation(scores_N, lengths_N)),
        "len_corr_within_prompts": float(within_group_correlation(scores_N, lengths_N.double(), group_N)),
    }
    return RankingReport(
        values, overall, fit, _split(table, labeler_B, least=0), _split(table, size_B, least=2), len(size_B)
    )


def named_values(measured: RankingReport, names: Sequence[str]) -> dict[str, float]:
    """All metrics with those of each K and of the labelers, by the names they are logged under.

    Args:
        measured: the report.
        names: of the labelers, by number; a labeler beyond them is named by the number.

    Returns:
        ``values``, ``acc_k/K``, ``acc_labeler/NAME`` of the ``LABELER_CURVES`` labelers with the most pairs, each with
        its ``acc_len_baseline_...``, and ``acc_labeler_min`` and ``acc_labeler_spread`` (the standard deviation) over
        the labelers with at least ``LABELER_PAIRS`` pairs, if there are any.
    """
    values = dict(measured.values)
    for size, agreement in sorted(measured.by_size.items()):
        values |= {f"acc_k/{size}": agreement.accuracy, f"acc_len_baseline_k/{size}": agreement.length_baseline}
    solid = [agreement.accuracy for agreement in measured.by_labeler.values() if agreement.pairs >= LABELER_PAIRS]
    if solid:
        values |= {"acc_labeler_min": min(solid), "acc_labeler_spread": float(np.std(solid))}
    called = _tags([names[n] if n < len(names) else str(n) for n in range(max(measured.by_labeler, default=-1) + 1)])
    most = sorted(measured.by_labeler, key=lambda number: -measured.by_labeler[number].pairs)[:LABELER_CURVES]
    for number in sorted(most, key=lambda number: called[number]):
        agreement, name = measured.by_labeler[number], called[number]
        values[f"acc_labeler/{name}"] = agreement.accuracy
        values[f"acc_len_baseline_labeler/{name}"] = agreement.length_baseline
    return values


def reliability_picture(fit: Calibration) -> np.ndarray:
    """Draw accuracy against confidence, a bar a bin; on the diagonal a probability means what it says.

    Args:
        fit: of the pairs of a set.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    # Drawn on a canvas of its own: pyplot would keep figures open and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.12, 0.1, 0.84, 0.83))
    edges, accuracies, counts = (x.cpu().numpy() for x in (fit.bin_edges, fit.bin_accuracies, fit.bin_counts))
    filled = counts > 0
    axes.bar(edges[:-1], accuracies, width=np.diff(edges), align="edge", color="tab:blue", alpha=0.6, edgecolor="white")
    axes.plot(
        fit.bin_confidences.cpu().numpy()[filled], accuracies[filled], "o", color="tab:blue", label="mean of a bin"
    )
    axes.plot([0.5, 1.0], [0.5, 1.0], "--", color="gray", label="confidence = accuracy")
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        axes.text((left + right) / 2, 0.01, f"{count:,.0f}", ha="center", fontsize=8)
    axes.set(xlim=(0.5, 1.0), ylim=(0.0, 1.0), xlabel="confidence max(p, 1 - p)", ylabel="accuracy")
    axes.set_title(f"{int(counts.sum()):,} pairs (their number in each bar), ECE {float(fit.ece):.3f}", fontsize=10)
    axes.legend(loc="upper left", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def reliability_table(fit: Calibration) -> str:
    """The numbers of the picture as a Markdown table, bins without pairs left out.

    Args:
        fit: of the pairs of a set.

    Returns:
        A row a bin: mean confidence, accuracy, pairs.
    """
    lines = ["| confidence | accuracy | pairs |", "|---|---|---|"]
    bins = zip(fit.bin_confidences.tolist(), fit.bin_accuracies.tolist(), fit.bin_counts.tolist(), strict=True)
    lines += [f"| {confidence:.6f} | {accuracy:.6f} | {pairs:.0f} |" for confidence, accuracy, pairs in bins if pairs]
    return "\n".join(lines)


def _split(table: Tensor, key_B: Tensor, *, least: int) -> dict[int, Agreement]:
    """One agreement a key, of prompts with a pair; ``table`` is fp64 ``[3, B]``: correct, longer, pairs."""
    keys, index_B = key_B.unique(return_inverse=True)
    sums = table.new_zeros(3, len(keys)).index_add_(1, index_B, table)
    found = {int(key): _agreement(column) for key, column in zip(keys, sums.T, strict=True) if int(key) >= least}
    return {key: agreement for key, agreement in found.items() if agreement.pairs}


def _agreement(column: Tensor) -> Agreement:
    correct, longer, pairs = column.tolist()
    return Agreement(correct, longer, int(pairs))


def _tags(names: Sequence[str]) -> list[str]:
    """Names that TensorBoard shows as they are; two that would become one get a number."""
    tags: list[str] = []
    for name in names:
        plain = tag = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII) or "_"
        count = 1
        while tag in tags:
            count += 1
            tag = f"{plain}_{count}"
        tags.append(tag)
    return tags
