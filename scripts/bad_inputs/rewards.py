"""Rewards from elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lit_instruct.rewards import ClassifierScorer, HttpScorer
from scripts.bad_inputs.case import Case
from scripts.bad_inputs.world import Run, furnish, ppo, with_file
from tests.helpers.raw_server import RESET, Parts, RawServer, dripping, http
from tests.unit.rewards.batches import TOKENIZER, batch_of


def function(name: str, source: str = "") -> Run:
    """PPO with a reward function in pay.py."""
    run = ppo("--model.reward", "lit_instruct.rewards.FunctionScorer", "--model.reward.function", name, scored_by=None)
    return with_file("pay.py", source, run)


def server(url: str, *more: Any) -> Run:
    """PPO with a server."""
    scorer = [
        "--model.reward",
        "lit_instruct.rewards.HttpScorer",
        "--model.reward.url",
        url,
        "--model.reward.retries",
        0,
    ]
    return ppo(*scorer, *more, scored_by=None)


def answer(*parts: bytes, **settings: Any) -> Run:
    """Two responses and what a server says of them."""
    return answers(lambda: parts, **settings)


def answers(parts: Any, **settings: Any) -> Run:
    """As :func:`answer`, made anew for each request."""

    def run(folder: Path) -> None:
        os.environ["NO_PROXY"] = "*"
        with RawServer(lambda _: parts()) as running:
            scorer = HttpScorer(running.url, **({"retries": 0, "timeout": 0.3} | settings))
            scorer(*batch_of(["w1", "w2"], ["w3", "w4"]), tokenizer=TOKENIZER)

    return run


def scores(*values: Any) -> bytes:
    """A well-formed answer."""
    return http(json.dumps({"scores": values}).encode())


def much() -> Parts:
    """More than a server may say."""
    yield http(b"", length=False)
    for _ in range(100):
        yield b" " * 10_000


def classifier_with_code(folder: Path) -> None:
    """A classifier that brings its code."""
    furnish(folder)
    config = {
        "model_type": "foreign",
        "auto_map": {"AutoModelForSequenceClassification": "code.Model", "AutoConfig": "code.C"},
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    ClassifierScorer("base")


CASES = [
    Case("a reward function in no file", function("elsewhere.py:pay")),
    Case("a reward function without a file", function("pay")),
    Case("a misspelt reward function", function("pay.py:play", "def pay(prompts, responses): ...")),
    Case("a reward function of one parameter", function("pay.py:pay", "def pay(responses): ...")),
    Case("responses before prompts", function("pay.py:pay", "def pay(responses, prompts): ...")),
    Case("an async reward function", function("pay.py:pay", "async def pay(prompts, responses): ...")),
    Case("a column that the data have not", function("pay.py:pay", "def pay(prompts, responses, answer): ...")),
    Case("too few scores", function("pay.py:pay", "def pay(prompts, responses): return [1.0]")),
    Case(
        "a score that is NaN",
        function("pay.py:pay", "def pay(prompts, responses): return [float('nan')] * len(responses)"),
    ),
    Case(
        "a classifier that is none",
        ppo("--model.reward", "lit_instruct.rewards.ClassifierScorer", "--model.reward.model", "base", scored_by=None),
    ),
    Case("a classifier that brings its own code", classifier_with_code),
    Case("a server without http", server("localhost:80")),
    Case("a password in the address", server("https://me:secret@rewards.example/score")),
    Case("a token in the address", server("https://rewards.example/score?token=secret")),
    Case(
        "a token that is not set", server("http://localhost:9/score", "--model.reward.token_variable", "NO_SUCH_TOKEN")
    ),
    Case("nobody at the address", server("http://localhost:9/score")),
    Case("a server that breaks off", answer(scores(1, 2)[:-5], RESET)),
    Case("a server that drips", answers(lambda: dripping(scores(1, 2), 0.05))),
    Case("a server that says too much", answers(much, timeout=5.0)),
    Case("a web page", answer(http(b"<!DOCTYPE html><title>Sign in</title>", "Content-Type: text/html"))),
    Case("an answer in gzip", answer(http(b"\x1f\x8b\x08", "Content-Encoding: gzip"))),
    Case("a redirect", answer(http(b"", "Location: http://elsewhere/", status="302 Found"))),
    Case("an error of the server", answer(http(b"out of memory", status="500 Internal Server Error"))),
    Case("a token that is refused", answer(http(b"", status="401 Unauthorized"))),
    Case("an answer of another form", answer(http(b'{"rewards": [1, 2]}'))),
    Case("a score too few", answer(scores(1))),
    Case("scores that are text", answer(scores("1", "2"))),
    Case("scores that are true and false", answer(scores(True, False))),
    Case("an infinite score", answer(http(b'{"scores": [1, Infinity]}'))),
    Case("what is no HTTP", answer(b"\x16\x03\x01\x02\x00")),
]
