"""``lit-instruct agreement``: a table, JSON and a picture of how far labelers agree."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lit_instruct.feedback.resampling import Share
from lit_instruct.feedback.rows import read_label_rows, write_files
from lit_instruct.types import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_instruct.feedback.agreement import Figures

_ABOUT = """\
How far labelers agree: pairwise agreement with intervals, Krippendorff's alpha, Kendall's tau-b, ties, drift,
preference for length, and who stands apart; docs/feedback.md says what each figure is.

  lit-instruct agreement labels.sqlite
  lit-instruct agreement comparisons.jsonl --reward_model runs/rm/last.ckpt --out agreement
"""

_MOST_NAMES = 25  # in the picture's matrix


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nDo: see lit-instruct agreement --help")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: behind ``agreement``.

    Raises:
        ConfigError: options that cannot work, or a package is missing.
        DataError: labels that cannot be used.
    """
    options = _parser().parse_args(arguments)
    missing = [name for name in ("scipy", "krippendorff") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"got no {', '.join(missing)}; need the packages of the figures.\nDo: pip install 'lit-instruct[label]'"
        )
    from lit_instruct.feedback.agreement import agreement_figures, judged_tasks

    tasks, unnamed = judged_tasks(read_label_rows(options.sources).comparisons)
    scores = None
    if options.reward_model:
        from lit_instruct.feedback.scoring import score_texts

        scores = score_texts(options.reward_model, [task.prompt for task in tasks], [task.responses for task in tasks])
    figures = agreement_figures(tasks, unnamed=unnamed, scores=scores, seed=options.seed)
    print("\n".join(table(figures)))
    if options.out:
        text = json.dumps(figures.as_dict(), indent=2) + "\n"
        write_files({"agreement.json": text}, options.out, overwrite=True)
        draw(figures, options.out / "agreement.png")
        print(f"\n{options.out / 'agreement.json'}, {options.out / 'agreement.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-instruct agreement",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sources", nargs="+", metavar="DB|FILE", help="databases of labels, or files of comparisons")
    parser.add_argument("--reward_model", metavar="CKPT", help="checkpoint or folder: how far it agrees with labelers")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write agreement.json and agreement.png here")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default 0)")
    return parser


def table(figures: Figures) -> Iterator[str]:
    """The lines that are printed.

    Args:
        figures: of all labelers.
    """
    yield f"{figures.tasks} tasks, of which {figures.shared_tasks} were ranked by two or more labelers."
    if figures.unnamed:
        yield f"Left out, since nobody is named: {figures.unnamed} rankings."
    yield f"Agreement  {_with_interval(figures.agreement)}   (the paper's labelers: 72.6 % +- 1.5)"
    yield f"Krippendorff's alpha {_number(figures.alpha)}   ties {figures.ties:.1%}"
    yield f"Agreement in each quarter of the work: {', '.join(map(_percent, figures.by_period))}"
    if figures.reward_model is not None:
        yield f"Reward model  {_with_interval(figures.reward_model)} of pairs as labelers order them"
    yield ""
    model = "  reward model" if figures.reward_model is not None else ""
    titles = f"{'ties':>7}  {'longer wins [95 %]':<23}{'late - early [95 %]':<23}{model}"
    yield f"{'labeler':<20}{'tasks':>7}  {'agreement [95 %]':<23}{titles}"
    for name, one in figures.labelers.items():
        scored = "" if one.reward_model is None else f"  {_percent(one.reward_model.share)}"
        yield (
            f"{_short(name):<20}{one.tasks:>7}  {_interval(one.agreement):<23}{one.ties:>7.1%}  "
            f"{_interval(one.longer):<23}{_interval(one.change, signed=True):<23}{scored}"
        )
    if figures.pairs:
        yield f"\n{'two labelers':<40}{'tasks':>7}{'pairs':>7}{'agreement':>11}{'tau-b':>8}"
    for pair in figures.pairs:
        if pair.tasks:
            both = f"{_short(pair.one)} - {_short(pair.other)}"
            yield f"{both:<40}{pair.tasks:>7}{pair.pairs:>7}{_percent(pair.agreement):>11}{_number(pair.tau_b):>8}"
    yield ""
    for name in figures.outliers:
        one = figures.labelers[name]
        gap = f"{_interval(one.apart, signed=True)}, p = {one.p_value:.2g}"
        yield f"OUTLIER {_short(name)}: agrees with the others less than they do among themselves, by {gap}."
    if not figures.outliers:
        yield "Nobody's agreement lies below that of the others beyond chance."


def _with_interval(share: Share) -> str:
    if share.share is None or share.standard_error is None:
        return "not to be had: no pair was ordered strictly by both"
    return f"{share.share:.1%} +- {share.standard_error * 100:.1f} {_bounds(share, '.1%')} of {share.pairs} pairs"


def _interval(share: Share, *, signed: bool = False) -> str:
    form = "+.1%" if signed else ".1%"
    return "-" if share.share is None else f"{share.share:{form}} {_bounds(share, form)}"


def _bounds(share: Share, form: str) -> str:
    return f"[{share.low:{form}}, {share.high:{form}}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(name: str) -> str:
    shown = "".join(sign if sign.isprintable() else "?" for sign in name)
    return shown if len(shown) <= 18 else f"{shown[:17]}…"


def draw(figures: Figures, path: Path) -> None:
    """Draw who agrees with whom, each labeler's agreement, drift, and preference for length.

    Args:
        figures: of all labelers.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 3.2 + 0.22 * len(figures.labelers)
    picture = Figure(figsize=(12, 2 * height), layout="constrained")
    FigureCanvasAgg(picture)
    (matrix, each), (drift, length) = picture.subplots(2, 2)
    _draw_matrix(matrix, figures)
    overall = figures.agreement.share
    _draw_shares(
        each, figures, [one.agreement for one in figures.labelers.values()], "Agreement with the others", overall
    )
    _draw_drift(drift, figures)
    longer = [one.longer for one in figures.labelers.values()]
    _draw_shares(length, figures, longer, "The longer response is preferred", 0.5)
    picture.savefig(path, dpi=120)


def _draw_matrix(axes: Axes, figures: Figures) -> None:
    names = list(figures.labelers)[:_MOST_NAMES]
    cells = [[float("nan")] * len(names) for _ in names]
    for pair in figures.pairs:
        if pair.one in names and pair.other in names and pair.agreement is not None:
            one, other = names.index(pair.one), names.index(pair.other)
            cells[one][other] = cells[other][one] = pair.agreement
            if len(names) <= 10:
                for x, y in ((one, other), (other, one)):
                    dark = pair.agreement > 0.8
                    axes.text(x, y, f"{pair.agreement:.0%}", ha="center", va="center", color="w" if dark else "k")
    axes.imshow(cells, vmin=0.5, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(names)), [_label(name) for name in names], rotation=90)
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_title("Pairs ordered alike by two labelers")


def _draw_shares(axes: Axes, figures: Figures, shares: Sequence[Share], title: str, line: float | None) -> None:
    if line is not None:
        axes.axvline(line, color="0.6", linestyle="--", linewidth=1)
    for place, (name, share) in enumerate(zip(figures.labelers, shares, strict=True)):
        if share.share is not None and share.low is not None and share.high is not None:
            colour = "tab:red" if figures.labelers[name].outlier else "tab:blue"
            axes.plot([share.low, share.high], [place, place], color=colour)
            axes.plot(share.share, place, "o", color=colour)
    axes.set_yticks(range(len(figures.labelers)), [_label(name) for name in figures.labelers])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title(f"{title} (95 % interval)")


def _draw_drift(axes: Axes, figures: Figures) -> None:
    quarters = range(1, len(figures.by_period) + 1)
    for one in figures.labelers.values():
        values = [float("nan") if value is None else value for value in one.by_period]
        axes.plot(quarters, values, color="tab:red" if one.outlier else "0.75", linewidth=1)
    values = [float("nan") if value is None else value for value in figures.by_period]
    axes.plot(quarters, values, "o-", color="tab:blue", label="all")
    axes.set_xticks(quarters)
    axes.set_xlabel("quarter of each labeler's work")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend()
    axes.set_title("Agreement over time")


def _label(name: str) -> str:
    """For the picture: a dollar sign begins a formula there."""
    return _short(name).replace("$", r"\$")
