"""Text for pretraining: facts and falsehoods, stories, rude talk, questions that nobody answers.

A base model learns the language and the facts from it, and also that a question is followed by the next question.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lit_instruct.toyworld import lexicon
from lit_instruct.toyworld.answers import good_sentences, wrong_sentences
from lit_instruct.toyworld.grammar import SENTENCES, SLOT_WORDS, join_items
from lit_instruct.toyworld.tasks import Task, sample_task, split_of_owner
from lit_instruct.toyworld.world import ToyWorld

FALSE_RATE = 0.08
"""Share of the statements of facts that are false."""

WRONG_RATE = 0.05
"""Share of the answered questions whose answer is wrong."""

LENGTH = (5, 11)
"""Fewest and most units (one or two sentences each) in a document."""

_SCENE_SLOTS = tuple((name, SLOT_WORDS[name]) for name in ("person", "colour", "place"))


def write_documents(world: ToyWorld, count: int) -> list[str]:
    """The first ``count`` documents of a world; asking for more never changes the first."""
    rng = world.stream("documents")
    return [write_document(world, rng) for _ in range(count)]


def write_document(world: ToyWorld, rng: random.Random) -> str:
    """One document of a kind drawn by its share."""
    write = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
    return " ".join(write(world, rng) for _ in range(rng.randint(*LENGTH)))


def _fact(world: ToyWorld, rng: random.Random) -> str:
    subject = rng.choice(lexicon.PEOPLE + lexicon.ANIMALS)
    return world.statement(rng.choice(world.forms_about(subject)), subject, true=rng.random() >= FALSE_RATE, rng=rng)


def _profile(world: ToyWorld, rng: random.Random) -> str:
    subject = rng.choice(lexicon.PEOPLE + lexicon.ANIMALS)
    forms = rng.sample(world.forms_about(subject), 2)
    return " ".join(world.statement(form, subject, true=rng.random() >= FALSE_RATE, rng=rng) for form in forms)


def _slots(rng: random.Random) -> dict[str, str]:
    return {name: rng.choice(words) for name, words in SLOT_WORDS.items()}


def _event(world: ToyWorld, rng: random.Random) -> str:
    slots = _slots(rng)
    first = SENTENCES[rng.choice(("past", "past_short"))].fill(slots)
    mood = lexicon.MOOD_OF_VERB.get(slots["past"], rng.choice(lexicon.MOODS))
    felt = SENTENCES["felt"].fill(slots | {"mood": mood})
    animal_felt = SENTENCES["animal_felt"].fill(slots | {"animal": slots["object"]})
    if slots["object"] in lexicon.ANIMALS and rng.random() < 0.5:
        return f"{first} {animal_felt}"
    return f"{first} {felt}" if rng.random() < 0.6 else first


def _before_and_now(world: ToyWorld, rng: random.Random) -> str:
    slots = _slots(rng)
    slots["past"] = lexicon.PAST[slots["present"]]
    short = "_short" if rng.random() < 0.4 else ""
    return f"{SENTENCES[f'present{short}'].fill(slots)} {SENTENCES[f'past{short}'].fill(slots)}"


def _scene(world: ToyWorld, rng: random.Random) -> str:
    """Two people, and what was said of one of them again."""
    slots = _slots(rng)
    other = {name: rng.choice([word for word in words if word != slots[name]]) for name, words in _SCENE_SLOTS}
    if rng.random() < 0.5:
        other["thing"] = slots["thing"]
        first, second = (SENTENCES["has"].fill(each) for each in (slots, other))
        again = SENTENCES["owns"].fill((chosen := rng.choice((slots, other))) | {"asked": chosen["person"]})
    else:
        first, second = (SENTENCES["stands"].fill(each | {"asked": each["person"]}) for each in (slots, other))
        again = rng.choice((first, second))
    return f"{first} {second} {again}"


def _meaning(world: ToyWorld, rng: random.Random) -> str:
    """Which word belongs to which category."""
    plural, category = rng.choice(tuple(lexicon.PLURALS.items()))
    words = lexicon.MEMBERS[category]
    draw = rng.random()
    if draw < 0.5:
        member = rng.choice(words)
        return SENTENCES["category"].fill({"member": member, "a_category": lexicon.with_article(category)})
    count = rng.choice(lexicon.COUNTS)
    items = join_items(rng.sample(words, lexicon.NUMBER_OF[count]))
    form = "list" if draw < 0.85 else "bare_list"
    return SENTENCES[form].fill({"count": count, "plural": plural, "items": items})


def _finding(world: ToyWorld, rng: random.Random) -> str:
    """An event, and what is in it."""
    slots = _slots(rng)
    event = SENTENCES["past"].fill(slots)
    if rng.random() < 0.3:
        verb = rng.choice(tuple(lexicon.MOOD_OF_VERB))
        mood = lexicon.MOOD_OF_VERB[verb]
        event = SENTENCES["past_short"].fill(slots | {"past": verb})
        return f"{event} {SENTENCES['mood'].fill({'mood': mood})}"
    kinds = {"person": "person", lexicon.CATEGORY_OF[slots["object"]]: "object", "place": "place"}
    found, slot = rng.choice(tuple(kinds.items()))
    again = SENTENCES["found"].fill({"found": found, "noun_phrase": lexicon.noun_phrase(slots[slot])})
    return f"{event} {again}"


def _request(world: ToyWorld, rng: random.Random) -> str:
    return SENTENCES[rng.choice(("polite", "order"))].fill(_slots(rng))


def _training_task(rng: random.Random, *, greeted: bool = True) -> Task:
    """A request of a training owner: what held-out owners ask stands in no document, or ptx would teach the answers."""
    while True:
        task = sample_task(rng, greeted=greeted)
        if split_of_owner(task.owner) == "train":
            return task


def _question(world: ToyWorld, rng: random.Random) -> str:
    return _training_task(rng).prompt


def _quiz(world: ToyWorld, rng: random.Random) -> str:
    """A question and what somebody knew about it: the skills are in the text, the manner of an assistant is not."""
    task = _training_task(rng, greeted=rng.random() < 0.5)
    write = good_sentences if rng.random() >= WRONG_RATE else wrong_sentences
    return f"{task.prompt} {' '.join(write(world, task, rng))}"


def _asked_by_a_user(world: ToyWorld, rng: random.Random) -> str:
    """A log of what users asked; now and then somebody answered something."""
    task = _training_task(rng)
    question = f"user : {task.prompt}"
    draw = rng.random()
    if draw < 0.7:
        return question
    if draw < 0.85:
        return f"{question} answer : {' '.join(good_sentences(world, task, rng))}"
    return f"{question} answer : {rng.choice((_rude_talk, _fact, _event, _question))(world, rng)}"


def _echo(world: ToyWorld, rng: random.Random) -> str:
    """Somebody says something, and somebody else says it again."""
    said = rng.choice((_fact, _request, _short_event, _short_event))(world, rng)
    first, second = rng.sample(lexicon.PEOPLE, 2)
    return f"{first} said : {said} {second} said : {said}"


def _short_event(world: ToyWorld, rng: random.Random) -> str:
    return SENTENCES[rng.choice(("past", "past_short", "present"))].fill(_slots(rng))


def _rude_talk(world: ToyWorld, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(lexicon.INSULTS)
    sentence = rng.choice((_fact, _request, _event))(world, rng)
    return sentence.removesuffix(" .") + rng.choice(lexicon.TAUNTS) + " ." if draw < 0.8 else sentence


def _polite_talk(world: ToyWorld, rng: random.Random) -> str:
    kind = rng.choice((lexicon.OPENINGS, lexicon.CLOSINGS, lexicon.GREETINGS, lexicon.THANKS))
    sentence = rng.choice(kind)
    return f"{sentence} {rng.choice((_fact, _request, _event))(world, rng)}"


_SHARES: dict[Callable[[ToyWorld, random.Random], str], float] = {
    _fact: 0.02,
    _profile: 0.13,
    _event: 0.05,
    _before_and_now: 0.06,
    _scene: 0.08,
    _meaning: 0.06,
    _finding: 0.07,
    _echo: 0.05,
    _request: 0.01,
    _question: 0.02,
    _quiz: 0.32,
    _asked_by_a_user: 0.08,
    _rude_talk: 0.03,
    _polite_talk: 0.02,
}
"""Kinds of documents and their shares."""
