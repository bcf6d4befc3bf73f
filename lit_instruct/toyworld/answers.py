"""What a good response to a prompt says, and the ways to get it wrong."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

from lit_instruct.toyworld import lexicon
from lit_instruct.toyworld.grammar import FACT_FORMS, SENTENCES, SLOT_WORDS, Sentence, Template, join_items
from lit_instruct.toyworld.tasks import Task
from lit_instruct.toyworld.world import ToyWorld


class Answer(NamedTuple):
    """The one right answer to a prompt that has one (everything but listing and generation).

    Attributes:
        sentence: form and slots of the full answer.
        subject: the slot that the answer is about.
        value: the slot that the prompt asks for.
        full: the full answer as text.
        bare: the short answer that leaves the subject out, None where there is none.
    """

    sentence: Sentence
    subject: str
    value: str
    full: str
    bare: str | None


_SUBJECT_AND_VALUE = {
    "owns": ("asked", "colour"),
    "stands": ("asked", "place"),
    "category": ("member", "a_category"),
    "mood": ("mood", "mood"),
    "find": ("found", "noun_phrase"),
    "past": ("person", "past"),
    "past_short": ("person", "past"),
    "polite": ("object", "order"),
}

_BARE = {
    form: Template(text)
    for form, text in {
        "lives": "in the {place} .",
        "likes": "{food} .",
        "works": "a {job} .",
        "pet": "a {animal} .",
        "habitat": "in the {place} .",
        "eats": "{food} .",
        "coat": "{colour} .",
        "owns": "{colour} .",
        "stands": "in the {place} .",
        "category": "{a_category} .",
        "mood": "{mood} .",
        "find": "{noun_phrase} .",
    }.items()
}


def is_bare(task: Task, text: str) -> bool:
    """Whether a text has the shape of the short answers to this prompt, right or wrong."""
    template = _BARE.get(task.form)
    return template is not None and template.read(text) is not None


@lru_cache(maxsize=100_000)
def _answer_of(world: ToyWorld, prompt: str) -> Answer:
    task = world.task_of(prompt)
    slots = dict(task.slots)
    form = task.form
    if form in FACT_FORMS:
        subject, value = world.subject_and_value(form)
        slots[value] = world.facts[form][slots[subject]]
    else:
        subject, value = _SUBJECT_AND_VALUE[form]
        _complete(form, slots)
    form = "found" if form == "find" else form
    full = SENTENCES[form].fill(slots)
    bare = _BARE.get(task.form)
    names = SENTENCES[form].read(full)
    assert names is not None, full  # the template reads what it wrote
    return Answer(Sentence(form, names), subject, value, full, bare.fill(slots) if bare else None)


def _complete(form: str, slots: dict[str, str]) -> None:
    """Work out the slot that the prompt asks for from those that it gives."""
    if form in {"owns", "stands"} and slots["asked"] == slots["person2"]:
        name = "colour" if form == "owns" else "place"
        slots[name] = slots[f"{name}2"]
    elif form == "category":
        slots["a_category"] = lexicon.with_article(lexicon.CATEGORY_OF[slots["member"]])
    elif form == "mood":
        slots["mood"] = lexicon.MOOD_OF_VERB[slots["mood_verb"]]
    elif form == "find":
        name = slots["found"] if slots["found"] in {"person", "place"} else "object"
        slots["noun_phrase"] = lexicon.noun_phrase(slots[name])
    elif form in {"past", "past_short"}:
        slots["past"] = lexicon.PAST[slots["present"]]


def answer_of(world: ToyWorld, task: Task) -> Answer:
    """The right answer to a task that has one: all kinds but listing and generation."""
    return _answer_of(world, task.prompt)


def good_sentences(world: ToyWorld, task: Task, rng: random.Random, *, bare: bool = False) -> list[str]:
    """A right response without courtesies; ``bare`` asks for the short form where there is one."""
    if task.kind == "listing":
        return [_list_sentence(task, lexicon.PLURALS[task.slots["plural"]], rng, bare=bare)]
    if task.form == "story":
        return story(task.slots["person"], task.slots["animal"], rng)
    if task.kind == "generation":
        return statements_about(world, _subject(task), rng)
    answer = answer_of(world, task)
    return [answer.bare if bare and answer.bare else answer.full]


def wrong_sentences(world: ToyWorld, task: Task, rng: random.Random) -> list[str]:
    """A response that keeps to the subject and gets it wrong: a false value, too few or foreign items."""
    if task.kind == "listing":
        return [_wrong_list(task, rng)]
    if task.form == "story":
        return story(task.slots["person"], task.slots["animal"], rng)[:1]
    if task.kind == "generation":
        return statements_about(world, _subject(task), rng, true=False)
    answer = answer_of(world, task)
    kind = answer.value
    if task.form == "find":
        words = [word for word in SLOT_WORDS["noun_phrase"] if word != answer.sentence.slots[kind]]
    elif task.form == "category":
        words = [task.slots[name] for name in ("a_category", "a_category2")]
        words.remove(answer.sentence.slots[kind])
    else:
        words = [word for word in SLOT_WORDS[kind] if word != answer.sentence.slots[kind]]
    return [SENTENCES[answer.sentence.form].fill(answer.sentence.slots | {kind: rng.choice(words)})]


def off_subject_sentences(world: ToyWorld, task: Task, rng: random.Random) -> list[str]:
    """A well-formed response about something that the prompt does not ask for."""
    if task.kind == "listing":
        asked = lexicon.PLURALS[task.slots["plural"]]
        return [_list_sentence(task, rng.choice([c for c in lexicon.MEMBERS if c != asked]), rng, bare=False)]
    if task.form == "story":
        person = rng.choice([word for word in lexicon.PEOPLE if word != task.slots["person"]])
        return story(person, rng.choice([word for word in lexicon.ANIMALS if word != task.slots["animal"]]), rng)
    avoid = set(task.prompt.split())
    subjects = [word for word in lexicon.PEOPLE + lexicon.ANIMALS if word not in avoid]
    count = 2 if task.kind == "generation" else 1
    return statements_about(world, rng.choice(subjects), rng)[:count]


def statements_about(world: ToyWorld, subject: str, rng: random.Random, *, true: bool = True) -> list[str]:
    """Two different facts about one person or animal."""
    forms = rng.sample(world.forms_about(subject), 2)
    return [world.statement(form, subject, true=true, rng=rng) for form in forms]


def story(person: str, animal: str, rng: random.Random) -> list[str]:
    """Two sentences in which both occur: an event and a feeling or a second event."""
    place, past = rng.choice(lexicon.PLACES), rng.choice(SLOT_WORDS["past"])
    first = SENTENCES["past"].fill({"person": person, "past": past, "object": animal, "place": place})
    slots = {"person": person, "animal": animal, "mood": rng.choice(lexicon.MOODS)}
    return [first, SENTENCES[rng.choice(("felt", "animal_felt"))].fill(slots)]


def _subject(task: Task) -> str:
    return task.slots["person" if task.form == "about_person" else "animal"]


def _list_sentence(task: Task, category: str, rng: random.Random, *, bare: bool) -> str:
    words = [word for word in lexicon.MEMBERS[category] if word != task.slots.get("member")]
    return _write_list(task, category, rng.sample(words, lexicon.NUMBER_OF[task.slots["count"]]), bare=bare)


def _write_list(task: Task, category: str, items: list[str], *, bare: bool) -> str:
    plural = next(plural for plural, of in lexicon.PLURALS.items() if of == category)
    slots = {"count": task.slots["count"], "plural": plural, "items": join_items(items)}
    return SENTENCES["bare_list" if bare else "list"].fill(slots)


def _wrong_list(task: Task, rng: random.Random) -> str:
    category, number = lexicon.PLURALS[task.slots["plural"]], lexicon.NUMBER_OF[task.slots["count"]]
    words = [word for word in lexicon.MEMBERS[category] if word != task.slots.get("member")]
    items = rng.sample(words, number)
    foreign = [word for word in lexicon.CATEGORY_OF if lexicon.CATEGORY_OF[word] != category]
    items[rng.randrange(number)] = rng.choice([rng.choice(foreign), items[rng.randrange(number) - 1]])
    if len(set(items)) == number and all(lexicon.CATEGORY_OF[item] == category for item in items):
        items[0] = rng.choice(foreign)
    return _write_list(task, category, items, bare=False)


def bare_texts() -> list[str]:
    """The templates of the short answers."""
    return [template.text for template in _BARE.values()]
