"""Numbers to text: the printed table, the markdown of the documentation. No imports beyond the standard library."""

from __future__ import annotations

from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def figure(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def comparison_row(row: dict[str, Any]) -> list[str]:
    """One line of the table of comparisons."""
    median, low, high = row["ratio"]
    goal = "" if row["goal"] is None else f"{row['goal'][0]:g} / {row['goal'][1]:g}"
    return [
        row["case"],
        f"{figure(row['ours'][0])} {row['unit']}/s",
        f"{figure(row['theirs'][0])} {row['unit']}/s",
        f"{median:.2f}x ({low:.2f} to {high:.2f})",
        goal,
        f"{row['ours_mib']:,.0f} / {row['theirs_mib']:,.0f}",
    ]


COMPARISON = ["case", "ours", "peer", "ratio: median (min to max)", "goal / stretch", "peak MiB: ours / peer"]
LIMIT = ["case", "ideal s", "measured s", "share"]
SCALING = ["case", "a second", "peak MiB"]
FIGURES = ["what", "value"]


def sections(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table that there are results for.

    Args:
        results: as ``run.py`` writes them.
    """
    found = [
        ("Against the peers", COMPARISON, [comparison_row(row) for row in results.get("comparisons", [])]),
        (
            "SFT: share of the bf16 matrix-product limit",
            LIMIT,
            [
                [row["case"], figure(row["ideal_seconds"]), figure(row["seconds"]), f"{row['share']:.0%}"]
                for row in results.get("limits", [])
            ],
        ),
        (
            "Overhead",
            FIGURES,
            [[row["what"], f"{figure(row['value'])} {row['unit']}"] for row in results.get("figures", [])],
        ),
        (
            "How time and memory grow (ours alone)",
            SCALING,
            [
                [row["case"], f"{figure(row['rate'])} {row['unit']}", f"{row['peak_mib']:,.0f}"]
                for row in results.get("scaling", [])
            ],
        ),
    ]
    return [section for section in found if section[2]]


def as_text(results: dict[str, Any]) -> str:
    """Tables with columns of equal width."""
    parts = []
    for title, header, rows in sections(results):
        widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows]
        ]
        parts.append("\n".join([title, *(line.rstrip() for line in lines)]))
    return "\n\n".join(parts)


def as_markdown(results: dict[str, Any]) -> str:
    """The same as markdown, with what it was measured on."""
    machine = results["machine"]
    measure = "CPU seconds of the process" if machine["measure"] == "cpu" else "seconds by the clock"
    where = f"{machine['processor']}, {machine['cores']} cores"
    peers = "; ".join(listed(one) for one in machine["peers"].values())
    parts = [
        f"{where}; {machine['threads']} thread(s), {measure}; {machine['date']}. Ours: {listed(machine['ours'])}. "
        f"Peers: {peers}."
    ]
    for title, header, rows in sections(results):
        lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
        parts.append("\n".join([f"### {title}", "", *lines]))
    return "\n\n".join(parts)


def listed(versions: dict[str, str]) -> str:
    """Names with their releases."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def between_markers(text: str, fragment: str) -> str:
    """Put a fragment between the markers of a document.

    Raises:
        ValueError: the document does not hold both markers once, in their order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document must hold {BEGIN} and behind it {END}, each once")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{fragment}\n\n{END}{rest.split(END)[1]}"


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Rows of an earlier run, those that were measured again replaced in their place, new ones at the end."""
    fresh = {row[key]: row for row in new}
    kept = [fresh.pop(row[key], row) for row in old]
    return [*kept, *fresh.values()]
