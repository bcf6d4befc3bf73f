"""``lit-instruct round``: one round of human feedback, from a policy to one that the same people prefer.

Each step is an ordinary ``lit-instruct`` command in a process of its own; it is printed, so that it can be run by hand.
``round.json`` holds the steps that are done and their words. A run that was stopped anywhere is started again with the
same command: what is done is passed over, and the step that was under way goes on as it does by itself.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from lit_instruct.feedback import command as label_command
from lit_instruct.feedback.round_checks import check_heldout, check_text
from lit_instruct.feedback.round_options import configs_first, make_parser, one_or_list, split_options, value_of
from lit_instruct.feedback.rows import write_files
from lit_instruct.feedback.store import Store
from lit_instruct.types import ConfigError

STATE, LOCK = "round.json", ".lock"
_FREE = {"config", "labelers_from", "model.base", "until_done"}
"""What the round gives to a step and the user may give again; of ``config`` each one is merged into those before."""


class Step(NamedTuple):
    """A step of the round.

    Attributes:
        name: as in ``round.json``.
        about: what it does, for the screen.
        words: the command, behind ``lit-instruct``.
        output: file or folder that is there when it is done; without it the step is done again.
        decides: those of its words that decide its result; a step that was done with others is not passed over.
    """

    name: str
    about: str
    words: list[str]
    output: Path
    decides: list[str]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: behind ``round``.

    Raises:
        ConfigError: options that cannot work.
        DataError: prompts, text or labels that cannot be used.
    """
    own, passed = split_options(arguments)
    options = make_parser().parse_args(own)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: got {options.out}, which cannot be made ({error.strerror}).") from error
    try:
        with _locked(options.out) as lock:
            Round(options, passed, lock).run()
    except KeyboardInterrupt:  # between two steps, or in the checks
        raise SystemExit(128 + signal.SIGINT) from None


class Round:
    """One round in its folder.

    Args:
        options: of the command.
        passed: options of the steps.
        lock: file descriptor that keeps a second round out; the steps inherit it.
    """

    def __init__(self, options: argparse.Namespace, passed: dict[str, list[str]], lock: int) -> None:
        self.options, self.passed, self.lock = options, passed, lock
        self.out: Path = options.out
        self.tasks, self.labels = self.out / "tasks.jsonl", self.out / "labels.sqlite"
        self.pairs, self.comparison = self.out / "evaluation" / "pairs.jsonl", self.out / "comparison.sqlite"
        self.new_links = ["--new_links", options.new_links] if options.new_links else []
        self.state = _read_state(self.out / STATE)
        self.steps = self._steps()

    def _steps(self) -> list[Step]:
        given, out = self.options, self.out
        tokens = str(given.max_response_tokens)
        new = str(out / "ppo" / "last.ckpt")
        text = ["--config", "ppo/ptx.yaml", "--trainer.callbacks.text", one_or_list(given.text)] if given.text else []
        sampling = ["--prompts", *given.prompts, "--models", f"old={given.policy}", "--out", str(self.tasks)]
        evaluating = ["--models", f"old={given.policy}", f"new={new}", "--baseline", "old"]
        evaluating += ["--prompts", one_or_list(given.heldout_prompts), "--max_response_tokens", tokens]
        evaluating += ["--out", str(out / "evaluation")]
        judging = ["--judge", "HumanChoices", "--judge.choices", str(self.comparison)]
        exporting = ["labels", "export", str(self.labels), *given.add_labels, "--out", str(out / "labels")]
        rewarding = ["--model.base", given.policy, "--data.comparisons", str(out / "labels" / "comparisons.jsonl")]
        aligning = ["--model.policy", given.policy, "--model.reward_model", str(out / "rm" / "last.ckpt")]
        aligning += ["--data.prompts", one_or_list(given.prompts), "--model.max_response_tokens", tokens]
        kind = "PPO-ptx" if given.text else "PPO"

        def step(name: str, about: str, words: list[str], output: Path, decides: list[str] | None = None) -> Step:
            return Step(name, about, words, output, words if decides is None else decides)

        return [
            step(
                "sample",
                "responses of the old policy to rank",
                ["sample", *sampling, "--max_response_tokens", tokens, *self._own("sample", sampling)],
                self.tasks,
            ),
            self._labelling("label", "the labelers rank them", self.labels, self.tasks, []),
            step(
                "agreement",
                "how far they agree",
                ["agreement", str(self.labels), "--out", str(out / "agreement")],
                out / "agreement" / "agreement.png",
            ),
            step("export", "their rankings for training", [*exporting, "--overwrite"], out / "labels"),
            self._stage("rm", "a reward model of these rankings", [], rewarding),
            self._stage("ppo", f"{kind} against it", text, aligning),
            step(
                "pairs",
                "a response of each policy to held-out prompts",
                ["evaluate", *evaluating, *self._own("evaluate", [*evaluating, *judging])],
                self.pairs,
            ),
            self._labelling(
                "compare",
                "the labelers compare the two, and do not know which is which",
                self.comparison,
                self.pairs,
                ["--labelers_from", str(self.labels)],
            ),
            step(
                "win_rate",
                "how often they prefer the new policy",
                ["evaluate", *evaluating, *self._own("evaluate", evaluating), *judging],
                out / "evaluation" / "results.json",
            ),
        ]

    def _labelling(self, name: str, about: str, database: Path, tasks: Path, more: list[str]) -> Step:
        given = ["--tasks", str(tasks), "--labelers", self.options.labelers]
        words = ["label", str(database), *given, "--until_done", "20", *self._own("label", given), *more]
        return Step(name, about, words, database, given)  # a port or a new link changes no label

    def _stage(self, name: str, about: str, overlays: list[str], given: list[str]) -> Step:
        """A stage of training: shipped configuration, those of the user, what the round sets, the user's options."""
        given = [*given, "--auto_resume", "true", "--out", str(self.out / name)]
        configs, options = configs_first(self._own(name, given))
        words = [name, "fit", "--config", f"round/{name}.yaml", *overlays, *configs, *given, *options]
        return Step(name, about, words, self.out / name / "last.ckpt", words)

    def _own(self, step: str, given: Sequence[str]) -> list[str]:
        """The user's options for a step; those that the round gives itself are refused."""
        names = {word[2:] for word in given if word.startswith("--")} - _FREE
        names |= {"sample": {"max_response_tokens"}, "label": {"new_links"}, "evaluate": {"scorer"}}.get(step, set())
        for word in self.passed[step]:
            name = word[2:].partition("=")[0] if word.startswith("--") else ""
            if name in names:
                raise ConfigError(
                    f"--{step}.{name}: got an option that belongs to the round.\n"
                    "Do: leave it out; lit-instruct round --help says what the round can be told."
                )
        return self.passed[step]

    # -- running

    def run(self) -> None:
        """Do what is not done yet, and say what came out.

        Raises:
            SystemExit: a step ended early; the status is the step's.
        """
        self._check()
        for number, step in enumerate(self.steps, start=1):
            if self._is_done(step):
                print(f"=== {number} of {len(self.steps)}. {step.name}: done before ({step.output})", flush=True)
                continue
            self._refuse_leftovers(number)
            for stale in self.steps[number - 1 :]:
                self.state["done"].pop(stale.name, None)
            print(f"\n=== {number} of {len(self.steps)}. {step.name}: {step.about}", flush=True)
            if step.name == "compare" and not self.pairs.read_text(encoding="utf-8"):
                print("Nothing to compare: to every held-out prompt both policies wrote the same text.")
                return
            self._do(step)
            self.state["done"][step.name] = step.decides
            _write_state(self.out, self.state)
        self._conclude()

    def _do(self, step: Step) -> None:
        if step.name == "sample":
            step.output.unlink(missing_ok=True)  # written, and then killed before that was noted: kept beside the file
        if step.words[0] == "label":
            if self.options.enough and _answers(step.output):
                print(f"Going on with the {_answers(step.output)} answers that there are.")
                return
            new_links, self.new_links = self.new_links, []  # the other labelling of this run takes them over
            self._call(step._replace(words=[*step.words, *new_links]))
            with Store(step.output) as store:
                done, count = store.totals()
                if not store.nothing_left():
                    _stop(step, 1, f"{done} of {count} tasks are done; --enough goes on without the others.")
            return
        self._call(step)
        if not step.output.exists():
            raise ConfigError(
                f"{step.name}: ended without {step.output}; need that for what comes next.\nDo: see what it printed; a "
                f"configuration of your own needs a ModelCheckpoint with save_last, or adds its callbacks (callbacks+)."
            )

    def _call(self, step: Step) -> None:
        """Run a command to its end. Ctrl-C reaches it by itself, since it is of the same group; SIGTERM is sent on."""
        print(f"$ lit-instruct {shlex.join(step.words)}", flush=True)
        received: list[int] = []
        process = start(step.words, pass_fds=(self.lock,))

        def note(number: int, frame: FrameType | None) -> None:
            received.append(number)
            if number == signal.SIGTERM:
                process.send_signal(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if received:
            _stop(step, 128 + received[0], signal.Signals(received[0]).name)
        if status < 0:
            _stop(step, 128 - status, f"killed by {signal.Signals(-status).name}; out of memory?")
        if status:
            _stop(step, status, "what is wrong stands above")

    def _conclude(self) -> None:
        results = json.loads((self.out / "evaluation" / "results.json").read_text(encoding="utf-8"))
        rate = results["models"]["new"]["win_rate"]
        low, high, new = rate["low"], rate["high"], self.out / "ppo" / "last.ckpt"
        verdict = "It is better." if low > 0.5 else "It is worse." if high < 0.5 else "That may be chance."
        labels = " ".join([*self.options.add_labels, str(self.labels)])
        print(
            f"\nThe labelers prefer the new policy on {rate['rate']:.1%} [{low:.1%}, {high:.1%}] of {rate['n']} "
            f"held-out prompts, ties counted half. {verdict}\nNew policy: {new}\n"
            f"Next round: --policy {new} --add_labels {labels} --label.labelers_from {self.comparison} --out ..."
        )

    # -- what has been done

    def _is_done(self, step: Step) -> bool:
        done = self.state["done"].get(step.name)
        if done is None or not step.output.exists():
            return False
        if done != step.decides:
            raise ConfigError(
                f"--out: got {self.out}, where the step {step.name!r} was done with other options.\n"
                f"Then: {shlex.join(done)}\nNow:  {shlex.join(step.decides)}\nDo: give the same options, or another "
                f"--out; or, to do it again, remove {self._place(step)} and what came after it."
            )
        return True

    def _refuse_leftovers(self, number: int) -> None:
        """What was made of the result of a step that is done anew would pass for made of the new one."""
        # A results.json is there as soon as there are pairs.
        later = [step for step in self.steps[number:] if step.name != "win_rate" and step.output.exists()]
        if later:
            raise ConfigError(
                f"--out: got {self.out}, where {self.steps[number - 1].name!r} is to be done, and what was made of its "
                f"earlier result is still there.\nDo: remove {', '.join(str(self._place(step)) for step in later)}"
            )

    def _place(self, step: Step) -> Path:
        """What of the round's folder is the step's: all its checkpoints, not the last one alone."""
        return self.out / step.output.relative_to(self.out).parts[0]

    # -- before anything is done

    def _check(self) -> None:
        """Find out now what would otherwise end the round after hours of people's work."""
        labels = next(step for step in self.steps if step.name == "label")
        label_command.read_options(labels.words[1:])
        missing = [name for name in ("scipy", "krippendorff") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"got no {', '.join(missing)}; need the packages of labelling.\nDo: pip install 'lit-instruct[label]'"
            )
        if self.options.max_response_tokens < 1:
            raise ConfigError(f"--max_response_tokens: got {self.options.max_response_tokens}; need at least 1.")
        for source in self.options.text:
            check_text(source)
        prompts, heldout = check_heldout(self.options.prompts, self.options.heldout_prompts, self.options.add_labels)
        if "," not in self.options.labelers:
            print("Note: one labeler alone; how far labelers agree cannot be said.")
        self._check_words()
        if not self.state["done"]:
            ranked = value_of(self.passed["sample"], "--num_prompts") or prompts
            compared = value_of(self.passed["evaluate"], "--max_prompts") or heldout
            print(
                f"Prompts to train on: {prompts}. To label: responses to {ranked} of them, then pairs of responses to "
                f"{compared} held-out prompts (--sample.num_prompts, --evaluate.max_prompts)."
            )

    def _check_words(self) -> None:
        """Let the steps that come late read their options."""
        late = [step for step in self.steps if step.name in ("rm", "ppo", "pairs") and not self._is_done(step)]
        late = [step for step in late if self.state["checked"].get(step.name) != step.words]
        asked = [
            start([*step.words, "--print_config"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for step in late
        ]
        said = [process.communicate()[1] for process in asked]
        for step, process, lines in zip(late, asked, said, strict=True):
            if process.returncode:
                told = lines.strip().removeprefix("lit-instruct: error: ")
                name = step.words[0]
                raise ConfigError(f"--{name}.OPTION: got options that {name} cannot use:\n{told}")
            self.state["checked"][step.name] = step.words
        _write_state(self.out, self.state)


def start(words: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own: what it took is given back at its end, and devices can be several.

    Args:
        words: behind ``lit-instruct``.
        streams: as ``subprocess.Popen`` takes them.
    """
    return subprocess.Popen([sys.executable, "-m", "lit_instruct", *words], text=True, encoding="utf-8", **streams)


def _answers(database: Path) -> int:
    """How many tasks somebody has answered or skipped so far; 0 where the labelling has not begun."""
    if not database.exists():
        return 0
    with Store(database) as store:
        return len(store.labels())


def _stop(step: Step, status: int, why: str) -> NoReturn:
    print(f"\nThe round stopped in the step {step.name!r} ({why}). The same command goes on from here.", flush=True)
    raise SystemExit(status)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Keep a second round out of the folder, as long as this process or a step that it began lives."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--out: got {folder}, where another round, or a step of one that was killed, is still at work.\n"
                "Do: wait for it or end it, or give another folder."
            ) from error
        yield file.fileno()


def _read_state(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"format_version": 1, "done": {}, "checked": {}}
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def _write_state(out: Path, state: dict[str, Any]) -> None:
    write_files({STATE: json.dumps(state, indent=1) + "\n"}, out, overwrite=True)
