"""Small tasks of plain text, with and without examples: what a base model can do and alignment may cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lit_instruct.toyworld import lexicon
from lit_instruct.toyworld.grammar import FACT_FORMS, SENTENCES, SLOT_WORDS
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.toyworld.writing import write_jsonl

QUESTIONS = 300
SHOTS = 2
CHOICES = 4


class Question(NamedTuple):
    """A text to go on with.

    Attributes:
        prompt: its beginning.
        right: how it goes on.
        wrong: how it does not.
    """

    prompt: str
    right: str
    wrong: list[str]


def write_tax_tasks(world: ToyWorld, folder: Path) -> None:
    """Write one file a task, for ``MultipleChoice``: rows with the conditions ``zero`` and ``few`` (examples).

    Args:
        world: decides the facts.
        folder: where the files go; it is made.
    """
    folder.mkdir(parents=True)
    for name, ask in TASKS.items():
        rng = world.stream(f"tax/{name}")
        rows = []
        for _ in range(QUESTIONS):
            question = ask(world, rng)
            examples = "".join(f"{q.prompt} {q.right} " for q in (ask(world, rng) for _ in range(SHOTS)))
            choices = [question.right, *question.wrong]
            rng.shuffle(choices)
            answers = {"choices": [f" {choice}" for choice in choices], "correct": choices.index(question.right)}
            rows.append({"prompt": question.prompt, "condition": "zero", **answers})
            rows.append({"prompt": examples + question.prompt, "condition": "few", **answers})
        write_jsonl(folder / f"{name}.jsonl", rows)


def _fact(world: ToyWorld, rng: random.Random) -> Question:
    """``ben lives in the`` ... castle."""
    form = rng.choice(FACT_FORMS)
    _, value_slot = world.subject_and_value(form)
    subject = rng.choice(tuple(world.facts[form]))
    value = world.facts[form][subject]
    others = rng.sample([word for word in SLOT_WORDS[value_slot] if word != value], CHOICES - 1)
    beginning = world.statement(form, subject).removesuffix(f"{value} .").rstrip()
    return Question(beginning, f"{value} .", [f"{other} ." for other in others])


def _past(world: ToyWorld, rng: random.Random) -> Question:
    """``ben finds the cat . ben`` ... found the cat."""
    slots = {name: rng.choice(words) for name, words in SLOT_WORDS.items()}
    verbs = [lexicon.PAST[slots["present"]]]
    verbs += rng.sample([verb for verb in lexicon.PAST.values() if verb not in verbs], CHOICES - 1)
    now = SENTENCES["present_short"].fill(slots)
    right, *wrong = (
        SENTENCES["past_short"].fill(slots | {"past": verb}).removeprefix(slots["person"]).lstrip() for verb in verbs
    )
    return Question(f"{now} {slots['person']}", right, wrong)


def _scene(world: ToyWorld, rng: random.Random) -> Question:
    """``ben has a red cup . mia has a blue cup . the cup of mia is`` ... blue."""
    people, colours = rng.sample(lexicon.PEOPLE, 2), rng.sample(lexicon.COLOURS, CHOICES)
    thing = rng.choice(lexicon.THINGS)
    said = [
        SENTENCES["has"].fill({"person": person, "colour": colour, "thing": thing})
        for person, colour in zip(people, colours, strict=False)
    ]
    asked = rng.randrange(2)
    right = colours[asked]
    return Question(
        f"{' '.join(said)} the {thing} of {people[asked]} is",
        f"{right} .",
        [f"{colour} ." for colour in colours if colour != right],
    )


def _echo(world: ToyWorld, rng: random.Random) -> Question:
    """``ben said : mia saw the cup . leo said :`` ... mia saw the cup."""
    sentences: list[str] = []
    while len(sentences) < CHOICES:
        slots = {name: rng.choice(words) for name, words in SLOT_WORDS.items()}
        sentence = SENTENCES["past_short"].fill(slots)
        if sentence not in sentences:
            sentences.append(sentence)
    first, second = rng.sample(lexicon.PEOPLE, 2)
    return Question(f"{first} said : {sentences[0]} {second} said :", sentences[0], sentences[1:])


TASKS: dict[str, Callable[[ToyWorld, random.Random], Question]] = {
    "facts": _fact,
    "past": _past,
    "scenes": _scene,
    "echo": _echo,
}
"""Name to what asks one question."""
