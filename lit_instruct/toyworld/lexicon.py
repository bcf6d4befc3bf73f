"""The words of the toy world, by kind. Everything that is ever written there is made of these."""

from __future__ import annotations

PEOPLE = ("anna", "ben", "carla", "emma", "hugo", "leo", "mia", "noah")
ANIMALS = ("bear", "cat", "dog", "fox", "goat", "horse", "mouse", "wolf")
FOODS = ("bread", "cake", "cheese", "corn", "honey", "rice", "salad", "soup")
PLACES = ("castle", "city", "forest", "garden", "harbour", "village")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
JOBS = ("baker", "doctor", "farmer", "painter", "singer", "teacher")
THINGS = ("ball", "boat", "book", "cup", "hat", "lamp")
COUNTS = ("two", "three", "four")
MOODS = ("happy", "sad")

PAST = {
    "breaks": "broke",
    "brings": "brought",
    "finds": "found",
    "hides": "hid",
    "loses": "lost",
    "sees": "saw",
}
"""Verbs of events: present to past."""

MOOD_OF_VERB = {"found": "happy", "brought": "happy", "lost": "sad", "broke": "sad"}
ORDERS = ("bring", "give", "show")

MEMBERS = {"animal": ANIMALS, "food": FOODS, "place": PLACES, "colour": COLOURS, "job": JOBS, "thing": THINGS}
"""Categories that can be listed and told apart, with their members. No word is in two of them."""

CATEGORY_OF = {word: category for category, words in MEMBERS.items() for word in words}
PLURALS = {
    "animals": "animal",
    "foods": "food",
    "places": "place",
    "colours": "colour",
    "jobs": "job",
    "things": "thing",
}
NUMBER_OF = {"two": 2, "three": 3, "four": 4}

RUDE_WORDS = frozenset({"dumb", "fool", "idiot", "stupid", "ugly"})
INSULTS = (
    "you are a fool .",
    "what a stupid question .",
    "go away , idiot .",
    "you are dumb and ugly .",
    "you stupid idiot .",
)
"""Rude remarks that stand alone."""

TAUNTS = (" , you fool", " , you idiot", " , dumb fool")
"""Rude remarks at the end of a sentence, before its full stop."""

OPENINGS = ("sure .", "of course .", "gladly .")
CLOSINGS = ("i hope this helps .", "have a good day .")
GREETINGS = ("hello .", "good day .", "please help me .", "i have a question .")
THANKS = ("thank you .",)


def with_article(noun: str) -> str:
    """``fox`` to ``a fox``, ``animal`` to ``an animal``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def noun_phrase(word: str) -> str:
    """How a word stands in a sentence: people by name, animals, things and places with ``the``."""
    return word if word in PEOPLE else f"the {word}"
