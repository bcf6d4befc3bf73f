"""A small world of people and animals whose facts a seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from lit_instruct.toyworld import lexicon, tasks
from lit_instruct.toyworld.grammar import FACT_FORMS, SENTENCES, SLOT_WORDS

_FACT_SLOTS = {
    "lives": ("person", "place"),
    "likes": ("person", "food"),
    "works": ("person", "job"),
    "pet": ("person", "animal"),
    "habitat": ("animal", "place"),
    "eats": ("animal", "food"),
    "coat": ("animal", "colour"),
}
"""Subject and value of each form of fact."""


class ToyWorld:
    """Who lives where, likes, does and has what; which animal lives where, eats what and has which colour.

    The words and the shapes of sentences are the same in every world, the facts follow the seed.

    Args:
        seed: decides the facts, and every random stream of ``stream``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.stream("facts")
        self.facts: dict[str, dict[str, str]] = {
            form: {subject: rng.choice(SLOT_WORDS[value]) for subject in SLOT_WORDS[subject_slot]}
            for form, (subject_slot, value) in _FACT_SLOTS.items()
        }

    def stream(self, purpose: str) -> random.Random:
        """A random stream of its own for one purpose: the same in every process, whatever else was drawn."""
        return random.Random(f"toyworld/{self.seed}/{purpose}")

    @staticmethod
    def subject_and_value(form: str) -> tuple[str, str]:
        """The slot names of a form of fact: ``("person", "place")`` for ``lives``."""
        return _FACT_SLOTS[form]

    def is_true(self, form: str, slots: Mapping[str, str]) -> bool | None:
        """Whether a statement holds. None where neither facts nor meanings of words decide."""
        if form in _FACT_SLOTS:
            subject, value = _FACT_SLOTS[form]
            return self.facts[form][slots[subject]] == slots[value]
        if form == "category":
            return slots["a_category"] == lexicon.with_article(lexicon.CATEGORY_OF[slots["member"]])
        return None

    def statement(self, form: str, subject: str, *, true: bool = True, rng: random.Random | None = None) -> str:
        """A sentence that states one fact, or (with ``true=False``, which needs an ``rng``) something false."""
        subject_slot, value_slot = _FACT_SLOTS[form]
        value = self.facts[form][subject]
        if not true:
            if rng is None:
                raise ValueError("A false statement is drawn at random: pass `rng`.")
            value = rng.choice([word for word in SLOT_WORDS[value_slot] if word != value])
        return SENTENCES[form].fill({subject_slot: subject, value_slot: value})

    def forms_about(self, subject: str) -> tuple[str, ...]:
        """The forms of facts that a person or an animal has."""
        slot = "person" if subject in lexicon.PEOPLE else "animal"
        return tuple(form for form in FACT_FORMS if _FACT_SLOTS[form][0] == slot)

    def task_of(self, prompt: str) -> tasks.Task:
        """What a prompt asks for, read from its text; ValueError where it is no prompt of this world."""
        return tasks.task_of(prompt)

    def tasks(self, split: str, *, purpose: str = "tasks", exclude: set[str] | None = None) -> Iterator[tasks.Task]:
        """Endless distinct prompts of the owners of one split, see ``tasks.sample_tasks``."""
        return tasks.sample_tasks(self.stream(f"{purpose}/{split}"), split, exclude=exclude)
