"""Sentence templates that write and read: ``"{person} likes {food} ."`` fills in slots and finds them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from lit_instruct.toyworld import lexicon

SLOT_WORDS: dict[str, tuple[str, ...]] = {
    "person": lexicon.PEOPLE,
    "asked": lexicon.PEOPLE,
    "animal": lexicon.ANIMALS,
    "food": lexicon.FOODS,
    "place": lexicon.PLACES,
    "colour": lexicon.COLOURS,
    "job": lexicon.JOBS,
    "thing": lexicon.THINGS,
    "object": lexicon.ANIMALS + lexicon.THINGS,
    "present": tuple(lexicon.PAST),
    "past": tuple(lexicon.PAST.values()),
    "mood_verb": tuple(lexicon.MOOD_OF_VERB),
    "order": lexicon.ORDERS,
    "mood": lexicon.MOODS,
    "count": lexicon.COUNTS,
    "plural": tuple(lexicon.PLURALS),
    "member": tuple(lexicon.CATEGORY_OF),
    "a_category": tuple(lexicon.with_article(category) for category in lexicon.MEMBERS),
    "found": ("person", "animal", "thing", "place"),
    "noun_phrase": tuple(map(lexicon.noun_phrase, lexicon.PEOPLE + lexicon.ANIMALS + lexicon.THINGS + lexicon.PLACES)),
}
"""Slot names and what may stand there. A digit at the end of a name makes a second slot of the same kind."""

_SLOT = re.compile(r"\{([a-z_]+)(\d?)\}")
_ITEM = "|".join(lexicon.CATEGORY_OF)
_ITEMS = rf"(?P<items>(?:{_ITEM})(?: , (?:{_ITEM}))* and (?:{_ITEM}))"


class Template:
    """One sentence (or prompt) with slots; a slot that occurs twice must hold the same word both times."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._pattern = re.compile(self._to_pattern(text))

    @staticmethod
    def _to_pattern(text: str) -> str:
        seen: set[str] = set()
        pattern, end = "", 0
        for match in _SLOT.finditer(text):
            pattern += re.escape(text[end : match.start()])
            kind, name = match.group(1), match.group(1) + match.group(2)
            if name in seen:
                pattern += f"(?P={name})"
            elif kind == "items":
                pattern += _ITEMS
            else:
                pattern += f"(?P<{name}>{'|'.join(SLOT_WORDS[kind])})"
            seen.add(name)
            end = match.end()
        return pattern + re.escape(text[end:])

    def fill(self, slots: Mapping[str, str]) -> str:
        """The sentence with these slots; further slots are ignored."""
        return self.text.format_map(slots)

    def read(self, text: str) -> dict[str, str] | None:
        """The slots of a text of exactly this shape, else None."""
        match = self._pattern.fullmatch(text)
        return match.groupdict() if match else None


FACT_FORMS = ("lives", "likes", "works", "pet", "habitat", "eats", "coat")
"""Statements whose truth the facts of the world decide."""

SENTENCES: dict[str, Template] = {
    form: Template(text)
    for form, text in {
        "lives": "{person} lives in the {place} .",
        "likes": "{person} likes {food} .",
        "works": "{person} works as a {job} .",
        "pet": "{person} has a {animal} .",
        "habitat": "the {animal} lives in the {place} .",
        "eats": "the {animal} eats {food} .",
        "coat": "the {animal} is {colour} .",
        "owns": "the {thing} of {asked} is {colour} .",
        "has": "{person} has a {colour} {thing} .",
        "stands": "{asked} is in the {place} .",
        "category": "{member} is {a_category} .",
        "mood": "the text is {mood} .",
        "found": "the {found} is {noun_phrase} .",
        "past": "{person} {past} the {object} in the {place} .",
        "past_short": "{person} {past} the {object} .",
        "present": "{person} {present} the {object} in the {place} .",
        "present_short": "{person} {present} the {object} .",
        "felt": "{person} was {mood} .",
        "animal_felt": "the {animal} was {mood} .",
        "polite": "please {order} me the {object} .",
        "order": "{order} me the {object} .",
        "list": "{count} {plural} are {items} .",
        "bare_list": "{items} .",
    }.items()
}
"""All sentences that are not questions, bare answers, courtesies or insults."""


class Sentence(NamedTuple):
    """What a sentence says: its form (a key of ``SENTENCES``) and its slots."""

    form: str
    slots: dict[str, str]


@lru_cache(maxsize=200_000)
def read_sentence(text: str) -> Sentence | None:
    """The form and slots of a well-formed sentence, None for anything else."""
    for form, template in SENTENCES.items():
        slots = template.read(text)
        if slots is not None:
            return Sentence(form, slots)
    return None


def split_sentences(text: str) -> list[str]:
    """Cut after ``.`` and ``?``; words left over at the end are a last, unfinished sentence."""
    sentences: list[str] = []
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if word in {".", "?"}:
            sentences.append(" ".join(words))
            words = []
    if words:
        sentences.append(" ".join(words))
    return sentences


def items_of(listed: str) -> list[str]:
    """The words of ``bread , soup and rice``."""
    return listed.replace(" and ", " , ").split(" , ")


def join_items(items: Iterable[str]) -> str:
    """``bread , soup and rice`` from its words."""
    *first, last = items
    return f"{' , '.join(first)} and {last}"
