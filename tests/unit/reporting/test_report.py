"""The page as a whole: what it shows and what it leaves out, texts that want to be markup, mistakes."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lit_instruct.cli import main
from lit_instruct.reporting import write_report
from lit_instruct.reporting.build import build
from lit_instruct.reporting.logs import Session
from lit_instruct.reporting.page import visible
from lit_instruct.reporting.runs import Found, Run
from lit_instruct.types import ConfigError, SaveError
from tests.unit.reporting.pages import Page
from tests.unit.reporting.places import ppo_curves, write_config, write_evaluation, write_events

HOSTILE = """</p></details><script>alert(1)</script><img src=http://a.org/x onerror='a'>" onload="a" &amp;{{ 7 * 7 }}"""
HEALTH = (
    "- **steps_too_large**: approx_kl is 0.2. Likely: a rate too high. Do: lower `model.learning_rate`.\n"
    "- **never_stops**: b. Do: c."
)


def sample_table(response: str) -> str:
    cell = response.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
    return f"| prompt | response | score | KL (nats) |\n|---|---|---|---|\n| ask | {cell} | 1.50 | -0.25 |"


def make_two_runs(folder: Path) -> tuple[Path, Path]:
    """PPO and PPO-ptx."""
    places = folder / "ppo", folder / "ppo_ptx"
    for place, lift in zip(places, (0.0, 1.0), strict=True):
        texts = {"ppo/val/samples": {3: sample_table("early"), 5: sample_table(f"late {place.name}")}}
        health = {"health": {2: HEALTH, 4: HEALTH.splitlines()[0]}} if lift else {}
        write_events(place / "logs", ppo_curves(lift=lift), texts | health)
        write_config(place / "logs", {"model": {"kl_coef": 0.02 + lift}, "trainer": {"devices": 1}})
    return places


@pytest.fixture
def two_runs(tmp_path: Path, undrawn: None) -> tuple[Path, Path]:
    """Runs to report without their pictures."""
    return make_two_runs(tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are about words, and drawing is slow."""
    monkeypatch.setattr("lit_instruct.reporting.report.as_png", lambda chart, theme: b"picture")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with its pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    return write_report(make_two_runs(folder), folder / "out")


def test_a_comparison_of_two_runs(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = write_report(two_runs, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    page = Page(path)
    assert page.headings[:2] == ["ppo, ppo_ptx", "Reinforcement learning"]
    overview, numbers, differences = page.tables[0], page.tables[1], page.tables[-1]
    assert [row[0] for row in overview] == ["", "ppo", "ppo_ptx"]
    assert overview[1][1:3] == ["Reinforcement learning", "5 iterations"]
    assert {row[0]: row[1:] for row in numbers}["Score, training"] == ["2.50", "3.50"]
    assert differences == [["", "ppo", "ppo_ptx"], ["model.kl_coef", "0.02", "1.02"]]
    for text in ("iteration 3", "late ppo_ptx", "score 1.50", "KL −0.25", "All settings of ppo_ptx", "devices: 1"):
        assert text in page.text
    assert "steps_too_large ppo_ptx, iteration 2 (told 2 times, last in 4)approx_kl is 0.2." in page.text
    assert page.text.count("steps_too_large") == 1
    assert "Do: lower model.learning_rate." in page.text
    assert len(page.of("code")) == 1
    assert "never_stops ppo_ptx, iteration 2b." in page.text


def test_every_picture_is_in_the_page_and_beside_it(drawn: Path) -> None:
    page = Page(drawn)
    files = {file.read_bytes() for file in (drawn.parent / "figures").iterdir()}
    shown = [base64.b64decode(image["src"].partition(",")[2]) for image in page.of("img")]
    assert len(shown) == 5  # score, KL, two frontiers, length
    assert set(shown) == files
    dark = [base64.b64decode(source["srcset"].partition(",")[2]) for source in page.of("source")]
    assert all(Image.open(io.BytesIO(picture)).format == "PNG" for picture in dark)
    assert not set(dark) & files
    assert page.of("img")[0]["alt"].startswith("Score: score against iteration. ppo: from 0.500 at 1 to 2.50 at 5, ")


def test_the_page_needs_nothing_from_outside_and_runs_nothing(drawn: Path) -> None:
    page = Page(drawn)
    assert page.loads() == []
    assert page.runs_code() == []
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert any(meta.get("name") == "viewport" for meta in page.of("meta"))
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in page.of("a")} <= anchors


def test_texts_that_want_to_be_markup_are_text(undrawn: None, tmp_path: Path) -> None:
    tables = {"ppo/val/samples": {1: sample_table(HOSTILE)}, "health": {1: f"- **rule**: {HOSTILE}"}}
    write_events(tmp_path / "<b>run" / "logs", ppo_curves(), tables)
    write_config(tmp_path / "<b>run" / "logs", {"model": {HOSTILE: HOSTILE}})
    rows = [{"model": HOSTILE, "prompt": HOSTILE, "response": HOSTILE * 20}]
    write_evaluation(
        tmp_path / "judged",
        {HOSTILE: {"kl": 1, "score": {"mean": 1}, "protocols": {HOSTILE: {"mean": 1}}}},
        rows,
        judge=HOSTILE,
    )
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert page.runs_code() == []
    assert page.loads() == []
    assert page.text.count(HOSTILE) > 20 + 5
    assert any(HOSTILE in image["alt"] for image in page.of("img"))


def test_characters_that_cannot_be_seen_or_written(undrawn: None, tmp_path: Path) -> None:
    odd = "bell\x07 esc\x1b[0m reversed\u202e half \ud800 done"
    write_evaluation(tmp_path / "judged", {"sft": {}}, [{"model": "sft", "prompt": odd, "response": odd}])
    page = Page(write_report([tmp_path / "judged"], tmp_path / "out"))
    assert page.text.count("bell\u2407 esc\u241b[0m reversed\ufffd half ? done") == 2
    assert visible("tab\tline\nß…") == "tab\tline\nß…"


def test_long_texts_are_folded_and_whole(undrawn: None, tmp_path: Path) -> None:
    long = "word " * 400 + "the end"
    write_evaluation(tmp_path / "judged", {"sft": {}}, [{"model": "sft", "prompt": "p", "response": long}])
    page = Page(write_report([tmp_path / "judged"], tmp_path / "out"))
    assert long in page.text
    assert page.text.count("whole text") == 1


def test_what_was_not_logged_is_not_shown(undrawn: None, tmp_path: Path) -> None:
    write_events(tmp_path / "sft" / "logs", {"sft/train/loss": {10: 2.0, 20: 1.5}})
    page = Page(write_report([tmp_path / "sft"], tmp_path / "out"))
    assert page.headings == ["sft", "Supervised fine-tuning", "Loss"]
    assert len(page.tables) == 2
    assert [row[0] for row in page.tables[1]] == ["", "Loss, training (nats a token)"]
    for absent in ("Samples", "Settings", "Health", "More metrics", "None", "nan", "held out"):
        assert absent not in page.text


def test_a_csv_log_has_no_times(undrawn: None, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("sft/train/loss,step\n2.0,10\n1.5,20\n", encoding="utf-8")
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert page.tables[0][0] == ["", "Stage", "Length", "Log"]
    assert page.tables[1][1] == ["Loss, training (nats a token)", "1.50"]


def test_stages_and_evaluations_have_sections_in_order(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    write_events(tmp_path / "rm" / "logs", {"rm/train/acc": {1: 0.5, 2: 0.75}})
    write_evaluation(tmp_path / "judged", {"ppo": {"win_rate": {"rate": 0.75, "low": 0.7, "high": 0.8, "n": 9}}})
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert [link["href"] for link in page.of("a")] == ["#rm", "#ppo", "#evaluation"]
    win = page.tables[-1]
    assert win == [["", "ppo"], ["Preferred to sft", "75.0\u00a0% [70.0\u00a0%, 80.0\u00a0%]"]]
    assert (tmp_path / "out" / "figures" / "evaluation-win-rate.png").is_file()


def test_the_same_settings_are_said_to_be_the_same(undrawn: None, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_events(tmp_path / name, ppo_curves())
        write_config(tmp_path / name, {"model": {"kl_coef": 0.02}})
    assert "The settings of these runs are the same." in Page(write_report([tmp_path], tmp_path / "out")).text


def test_other_runs_in_the_same_place_are_mentioned(undrawn: None, tmp_path: Path) -> None:
    for version in (0, 1):
        write_events(tmp_path / "rm" / f"version_{version}", {"rm/train/acc": {1: 0.5, 2: 0.75}})
    page = Page(write_report([tmp_path / "rm"], tmp_path / "out"))
    assert "rm: other runs in its place are not shown (version_0). To see one, name its folder." in page.text


def test_whose_held_out_numbers_are_those_of_the_average_is_said(undrawn: None, tmp_path: Path) -> None:
    callbacks = [{"class_path": "lit_instruct.callbacks.WeightEMA", "init_args": {"decay": 0.992}}]
    for name, used in (("averaged", callbacks), ("plain", [])):
        curves = {"ppo/train/objective/kl": {1: 9.0}, "ppo/val/objective/kl": {1: 0.1}}
        write_events(tmp_path / name, curves)
        write_config(tmp_path / name, {"trainer": {"callbacks": used}})
    write_events(tmp_path / "unseen", {"ppo/train/objective/kl": {1: 9.0}})
    write_config(tmp_path / "unseen", {"trainer": {"callbacks": callbacks}})
    text = Page(write_report([tmp_path], tmp_path / "out")).text
    assert "averaged: held-out numbers are those of the averaged weights (WeightEMA)" in text
    assert text.count("averaged weights") == 1


def test_a_resumed_run_says_so(undrawn: None, tmp_path: Path) -> None:
    write_events(tmp_path / "logs", {"rm/train/acc": {0: 0.5, 1: 0.75}})  # as Lightning numbers steps
    write_events(tmp_path / "logs", {"rm/train/acc": {1: 0.5, 2: 0.75}})
    overview, *_ = Page(write_report([tmp_path], tmp_path / "out")).tables
    assert overview[0] == ["", "Stage", "Length", "Started", "Time", "Log"]
    assert overview[1][2] == "3 optimizer steps"
    assert overview[1][4].endswith(" in 2 sessions")


def test_times_of_sessions_add_up() -> None:
    sessions = [Session(1_700_000_000.0, 60.0), Session(1_700_009_000.0, 30.0)]
    run = Run("a", Path("a"), "rm", {"rm/train/acc": {0: 0.5}}, {}, sessions, {}, [])
    ((_, cells),) = build(Found([run], []), prompts=0).overview.rows
    assert cells == ["Reward model", "1 optimizer step", "2023-11-14 22:13 UTC", "1 min 30 s in 2 sessions", "a"]


def test_a_title_names_a_few_runs(undrawn: None, tmp_path: Path) -> None:
    for number in range(6):
        write_events(tmp_path / f"run{number}", {"rm/train/acc": {1: 0.5, 2: 0.75}})
    assert Page(write_report([tmp_path], tmp_path / "out")).headings[0] == "run0, run1 and 4 more"
    shutil.rmtree(tmp_path / "run5")
    assert Page(write_report([tmp_path], tmp_path / "out")).headings[0] == "run0, run1, run2, run3, run4"


def test_the_number_of_prompts(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert "late ppo" not in Page(write_report(two_runs, tmp_path / "out", prompts=0)).text
    with pytest.raises(ConfigError, match=r"got prompts -1; need 0 \(no samples\) or more"):
        write_report(two_runs, tmp_path / "out", prompts=-1)


def test_a_second_report_replaces_the_first(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    write_report(two_runs[:1], tmp_path / "out")
    assert Page(write_report(two_runs[1:], tmp_path / "out")).headings[0] == "ppo_ptx"


def test_mistakes_are_told_in_a_line(undrawn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"got no runs.*Do: "):
        write_report([], tmp_path / "out")
    write_events(tmp_path / "rm", {"rm/train/acc": {1: 0.5, 2: 0.75}})
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file could not be written.*Do: give another folder"):
        write_report([tmp_path / "rm"], tmp_path / "file")
    for arguments, message in (
        ([], "report: the following arguments are required: RUN. Do: see lit-instruct report --help."),
        ([str(tmp_path / "gone")], "report: there is no folder"),
        ([str(tmp_path / "rm"), "--prompts", "x"], "report: argument --prompts: invalid int value: 'x'."),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", *arguments])
        assert capsys.readouterr().err.startswith(f"lit-instruct: error: {message}")
    main(["report", str(tmp_path / "rm"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"Report: {tmp_path / 'out' / 'report.html'}\n"
