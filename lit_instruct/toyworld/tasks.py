"""Prompts of seven kinds, each with an owner and a meaning that can be read back from its text alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lit_instruct.toyworld import lexicon
from lit_instruct.toyworld.grammar import SLOT_WORDS, Template

KINDS: dict[str, float] = {
    "open_question": 0.14,
    "closed_question": 0.12,
    "listing": 0.16,
    "rewriting": 0.14,
    "classification": 0.14,
    "extraction": 0.12,
    "generation": 0.18,
}
"""Kinds of prompts and their shares."""

OWNERS = 200
HELDOUT_SHARE = 0.25
GREETING_RATE = 0.5
THANKS_RATE = 0.25
MAX_MISSES = 20_000
"""So many draws in a row without a new prompt mean that there are no more."""

_TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lives": ("open_question", ("where does {person} live ?", "do you know where {person} lives ?")),
    "likes": ("open_question", ("what does {person} like ?", "which food does {person} like ?")),
    "works": ("open_question", ("what is the job of {person} ?", "which job does {person} have ?")),
    "pet": ("open_question", ("which animal does {person} have ?", "do you know the animal of {person} ?")),
    "habitat": ("open_question", ("where does the {animal} live ?", "do you know where the {animal} lives ?")),
    "eats": ("open_question", ("what does the {animal} eat ?", "which food does the {animal} eat ?")),
    "coat": ("open_question", ("what colour is the {animal} ?", "which colour does the {animal} have ?")),
    "owns": (
        "closed_question",
        (
            "{person} has a {colour} {thing} . {person2} has a {colour2} {thing} ."
            " what colour is the {thing} of {asked} ?",
        ),
    ),
    "stands": (
        "closed_question",
        (
            "{person} is in the {place} . {person2} is in the {place2} . where is {asked} ?",
            "{person} is in the {place} . {person2} is in the {place2} . do you know where {asked} is ?",
        ),
    ),
    "list": (
        "listing",
        (
            "name {count} {plural} .",
            "list {count} {plural} .",
            "give me {count} {plural} .",
            "i need {count} {plural} .",
        ),
    ),
    "list_without": (
        "listing",
        ("name {count} {plural} but not {member} .", "list {count} {plural} but not {member} ."),
    ),
    "past": (
        "rewriting",
        (
            "put this in the past : {person} {present} the {object} in the {place} .",
            "write this in the past : {person} {present} the {object} in the {place} .",
        ),
    ),
    "past_short": (
        "rewriting",
        (
            "put this in the past : {person} {present} the {object} .",
            "write this in the past : {person} {present} the {object} .",
        ),
    ),
    "polite": (
        "rewriting",
        ("make this polite : {order} me the {object} .", "write this with please : {order} me the {object} ."),
    ),
    "category": (
        "classification",
        ("is {member} {a_category} or {a_category2} ?", "what is {member} , {a_category} or {a_category2} ?"),
    ),
    "mood": (
        "classification",
        (
            "is this text happy or sad : {person} {mood_verb} the {object} .",
            "happy or sad ? {person} {mood_verb} the {object} .",
        ),
    ),
    "find": (
        "extraction",
        (
            "find the {found} in this text : {person} {past} the {object} in the {place} .",
            "which {found} is in this text : {person} {past} the {object} in the {place} .",
        ),
    ),
    "about_person": (
        "generation",
        ("write two sentences about {person} .", "tell me about {person} .", "describe {person} ."),
    ),
    "about_animal": (
        "generation",
        ("write two sentences about the {animal} .", "tell me about the {animal} .", "describe the {animal} ."),
    ),
    "story": (
        "generation",
        ("write a story about {person} and the {animal} .", "tell me a story about {person} and the {animal} ."),
    ),
}

FORMS: dict[str, tuple[str, tuple[Template, ...]]] = {
    form: (kind, tuple(map(Template, texts))) for form, (kind, texts) in _TEXTS.items()
}
"""Every form of prompt: its kind and the ways to word it."""

_FORM_WEIGHTS = {"stands": 1.0, "owns": 1.0, "list": 1.0, "list_without": 1.0, "past": 1.0, "past_short": 0.5}


@dataclass(frozen=True)
class Task:
    """A prompt and what it asks for.

    Attributes:
        prompt: the text.
        kind: one of ``KINDS``.
        form: one of ``FORMS``; it fixes which slots there are.
        owner: who sent it. One request has one owner however it is worded, so splits by owner never share one.
        slots: the words that the form leaves open.
    """

    prompt: str
    kind: str
    form: str
    owner: str
    slots: Mapping[str, str]


def split_of_owner(owner: str) -> str:
    """``train`` or ``heldout``, by a hash of the id, so that adding prompts never moves an owner."""
    return "heldout" if _fraction(f"split/{owner}") < HELDOUT_SHARE else "train"


def owner_of(form: str, slots: Mapping[str, str]) -> str:
    """The owner of what a prompt asks for: other wordings and greetings of the same request are the same owner's."""
    meaning = "/".join([form, *(f"{name}={slots[name]}" for name in sorted(slots))])
    return f"customer-{int(_fraction(f'owner/{meaning}') * OWNERS):03d}"


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


@lru_cache(maxsize=200_000)
def task_of(prompt: str) -> Task:
    """Read a prompt text.

    Raises:
        ValueError: the text is no prompt of the toy world.
    """
    core = prompt
    for greeting in lexicon.GREETINGS:
        core = core.removeprefix(f"{greeting} ")
    for thanks in lexicon.THANKS:
        core = core.removesuffix(f" {thanks}")
    for form, (kind, templates) in FORMS.items():
        for template in templates:
            slots = template.read(core)
            if slots is not None and _makes_sense(form, slots):
                return Task(prompt, kind, form, owner_of(form, slots), slots)
    raise ValueError(f"Not a prompt of the toy world: {prompt!r}. Prompts come from `sample_task` or `ToyWorld.tasks`.")


def _makes_sense(form: str, slots: Mapping[str, str]) -> bool:
    if form in {"owns", "stands"}:
        value = "colour" if form == "owns" else "place"
        differ = slots["person"] != slots["person2"] and slots[value] != slots[f"{value}2"]
        return differ and slots["asked"] in {slots["person"], slots["person2"]}
    if form == "list_without":
        return lexicon.CATEGORY_OF[slots["member"]] == lexicon.PLURALS[slots["plural"]]
    if form == "category":
        right = lexicon.with_article(lexicon.CATEGORY_OF[slots["member"]])
        return slots["a_category"] != slots["a_category2"] and right in {slots["a_category"], slots["a_category2"]}
    if form == "find":
        return slots["found"] in {"person", "place", lexicon.CATEGORY_OF[slots["object"]]}
    return True


def sample_task(rng: random.Random, kind: str | None = None, *, greeted: bool = True) -> Task:
    """Draw one prompt, of a kind drawn by its share unless given; ``greeted=False`` leaves out greeting and thanks."""
    if kind is None:
        kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    forms = [form for form, (of_kind, _) in FORMS.items() if of_kind == kind]
    form = rng.choices(forms, [_FORM_WEIGHTS.get(form, 1.0) for form in forms])[0]
    template = rng.choice(FORMS[form][1])
    prompt = template.fill(_sample_slots(form, rng))
    courteous = greeted and form != "owns"  # those are long enough
    if courteous and rng.random() < GREETING_RATE:
        prompt = f"{rng.choice(lexicon.GREETINGS)} {prompt}"
    if courteous and rng.random() < THANKS_RATE:
        prompt = f"{prompt} {rng.choice(lexicon.THANKS)}"
    return task_of(prompt)


def _sample_slots(form: str, rng: random.Random) -> dict[str, str]:
    slots = {name: rng.choice(words) for name, words in SLOT_WORDS.items()}
    for name in ("person", "colour", "place"):
        slots[f"{name}2"] = rng.choice([word for word in SLOT_WORDS[name] if word != slots[name]])
    slots["asked"] = rng.choice((slots["person"], slots["person2"]))
    if form == "list_without":
        slots["member"] = rng.choice(lexicon.MEMBERS[lexicon.PLURALS[slots["plural"]]])
    right = lexicon.CATEGORY_OF[slots["member"]]
    other = rng.choice([category for category in lexicon.MEMBERS if category != right])
    pair = [lexicon.with_article(right), lexicon.with_article(other)]
    rng.shuffle(pair)
    slots["a_category"], slots["a_category2"] = pair
    slots["found"] = rng.choice(("person", "place", lexicon.CATEGORY_OF[slots["object"]]))
    return slots


def sample_tasks(rng: random.Random, split: str, *, exclude: set[str] | None = None) -> Iterator[Task]:
    """Endless prompts of one split, every text at most once.

    Args:
        rng: where the prompts come from.
        split: ``train`` or ``heldout``.
        exclude: prompt texts that must not come; the texts that came are added to it.

    Raises:
        ValueError: the split is neither ``train`` nor ``heldout``, or there are no more prompts to be found.
    """
    if split not in {"train", "heldout"}:
        raise ValueError(f"split is {split!r}, it must be 'train' or 'heldout'.")
    seen = set() if exclude is None else exclude
    misses = 0
    while misses < MAX_MISSES:
        task = sample_task(rng)
        misses += 1
        if task.prompt not in seen and split_of_owner(task.owner) == split:
            misses = 0
            seen.add(task.prompt)
            yield task
    raise ValueError(f"{MAX_MISSES} draws gave no new prompt of the {split} owners: ask for fewer prompts.")
