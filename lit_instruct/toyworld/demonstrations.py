"""Responses as an ordinary contractor writes them: good on the whole, with faults at known rates.

Imitation therefore has a ceiling, and comparisons have something to show.
"""

from __future__ import annotations

import random

from lit_instruct.toyworld import lexicon
from lit_instruct.toyworld.answers import good_sentences, off_subject_sentences, wrong_sentences
from lit_instruct.toyworld.grammar import SENTENCES, SLOT_WORDS
from lit_instruct.toyworld.tasks import Task
from lit_instruct.toyworld.world import ToyWorld

RUDE_RATE = 0.2
RUN_ON_RATE = 0.2
OFF_SUBJECT_RATE = 0.06
WRONG_RATE = 0.04
"""Rates of the faults, drawn independently (but a response is never both off the subject and wrong)."""

BARE_RATE = 0.25
OPENING_RATE = 0.35
CLOSING_RATE = 0.3
"""How often a response is short, opens with a courtesy, closes with one. No faults, but matters of quality."""

FAULTS = ("rude", "run_on", "off_subject", "wrong")


def sample_faults(rng: random.Random) -> frozenset[str]:
    """Draw the faults of one demonstration."""
    faults = {name for name, rate in (("rude", RUDE_RATE), ("run_on", RUN_ON_RATE)) if rng.random() < rate}
    draw = rng.random()
    if draw < OFF_SUBJECT_RATE + WRONG_RATE:
        faults.add("off_subject" if draw < OFF_SUBJECT_RATE else "wrong")
    return frozenset(faults)


def write_response(
    world: ToyWorld,
    task: Task,
    rng: random.Random,
    *,
    faults: frozenset[str] = frozenset(),
    bare: bool = False,
    opening: bool = False,
    closing: bool = False,
) -> str:
    """A response with exactly these faults and matters of style.

    Args:
        world: decides what is true.
        task: the prompt.
        rng: draws the words.
        faults: some of ``FAULTS``.
        bare: the short form of the answer where there is one.
        opening: a courtesy first.
        closing: a courtesy last.

    Raises:
        ValueError: a fault is unknown.
    """
    if not faults <= set(FAULTS):
        raise ValueError(f"faults are {sorted(faults)}, they must be among {FAULTS}.")
    if "off_subject" in faults:
        sentences = off_subject_sentences(world, task, rng)
    elif "wrong" in faults:
        sentences = wrong_sentences(world, task, rng)
    else:
        sentences = good_sentences(world, task, rng, bare=bare)
    if "run_on" in faults:
        sentences += [_stray_sentence(world, sentences, rng) for _ in range(rng.choice((1, 2)))]
    if opening:
        sentences = [rng.choice(lexicon.OPENINGS), *sentences]
    if "rude" in faults:
        sentences = _insult(sentences, rng)
    if closing:
        sentences.append(rng.choice(lexicon.CLOSINGS))
    return " ".join(sentences)


def write_demonstration(world: ToyWorld, task: Task, rng: random.Random) -> str:
    """A response with faults and style drawn at the rates of this file."""
    return write_response(
        world,
        task,
        rng,
        faults=sample_faults(rng),
        bare=rng.random() < BARE_RATE,
        opening=rng.random() < OPENING_RATE,
        closing=rng.random() < CLOSING_RATE,
    )


def _stray_sentence(world: ToyWorld, sentences: list[str], rng: random.Random) -> str:
    """A repetition, a fact that nobody asked for, or an event from nowhere."""
    draw = rng.random()
    if draw < 0.25:
        return sentences[0]
    if draw < 0.6:
        subject = rng.choice(lexicon.PEOPLE + lexicon.ANIMALS)
        sentence = world.statement(rng.choice(world.forms_about(subject)), subject)
    else:
        sentence = SENTENCES["past_short"].fill({name: rng.choice(words) for name, words in SLOT_WORDS.items()})
    return sentence if sentence not in sentences else _stray_sentence(world, sentences, rng)


def _insult(sentences: list[str], rng: random.Random) -> list[str]:
    draw = rng.random()
    if draw < 0.4:
        return [rng.choice(lexicon.INSULTS), *sentences]
    if draw < 0.7:
        return [*sentences, rng.choice(lexicon.INSULTS)]
    return [*sentences[:-1], sentences[-1].removesuffix(" .") + rng.choice(lexicon.TAUNTS) + " ."]
