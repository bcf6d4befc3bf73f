"""The findings of InstructGPT in miniature: train and measure everything, say which of them come out.

    python scripts/reproduce_paper                              # all of it, three seeds: hours
    python scripts/reproduce_paper --parts figure1 --seeds 1    # a piece of it
    python scripts/reproduce_paper --fast                       # one seed, two sizes: a quarter of an hour
    python scripts/reproduce_paper --page                       # write docs/reproduction.md from the results again

Stopped at any time, the same command goes on where it stood: everything lies in runs/reproduction, each model in a
folder with the configuration that trained it. A part whose seeds are all done writes its results to
docs/reproduction/PART.json, and the page is written from these.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder stands there instead


def main() -> None:
    """Run the wanted parts."""
    from scripts.reproduce_paper.page import write_page
    from scripts.reproduce_paper.parts import PARTS
    from scripts.reproduce_paper.plan import FAST, FULL
    from scripts.reproduce_paper.results import reproduce

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the small form; its results stay in its folder")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, help="only these of the form's seeds")
    parser.add_argument("--jobs", type=int, default=2, help="side by side, one thread each (default 2)")
    parser.add_argument("--work", type=Path, help="folder of all runs (default runs/reproduction, with --fast beside)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    scale = FAST if options.fast else FULL
    work = options.work or Path("runs/reproduction-fast" if options.fast else "runs/reproduction")
    if unknown := set(options.seeds or ()) - set(scale.seeds):
        parser.error(f"--seeds: got {sorted(unknown)}; the seeds are {list(scale.seeds)}")
    out = work / "results" if options.fast else ROOT / "docs" / "reproduction"
    page = work / "reproduction.md" if options.fast else ROOT / "docs" / "reproduction.md"
    if not options.page:
        reproduce(scale, work.resolve(), out, parts=options.parts, seeds=options.seeds, processes=options.jobs)
    write_page(out, page)


if __name__ == "__main__":
    main()
