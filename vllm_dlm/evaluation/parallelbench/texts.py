# SPDX-License-Identifier: Apache-2.0
"""The five tasks whose answer is free text, and what an answer is compared with.

Sentences of four given words are asked for in three degrees: words of one everyday
theme, of two such themes, of four fields that have little to do with each other.
Sentences to paraphrase and conversations to summarize are put together from parts: they
are simpler than the published ones, which are other people's (`--data` reads them).
None has a solved example in front, as published.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vllm_dlm.tasks.problems import NAMES

WORDS = 4


@dataclass(frozen=True)
class Reference:
    """What metrics compare an answer with."""

    words: tuple[str, ...] = ()
    """Words that have to occur."""
    text: str = ""
    """The sentence that is paraphrased, or the conversation."""
    summary: str = ""


Draw: TypeAlias = Callable[[random.Random], Reference]


@dataclass(frozen=True)
class TextTask:
    """One of the five tasks."""

    draw: Draw
    ask: Callable[[Reference], str]
    metrics: tuple[str, ...]
    """Names of what can be measured of its answers (`text_metrics.py`)."""


THEMES = [
    line.split()
    for line in (
        "spoon bread oven plate soup cup",
        "flower tree bird grass rain bench",
        "teacher book pencil desk lesson bell",
        "train ticket suitcase station map hotel",
        "door window lamp chair stairs key",
        "apple basket cheese coin farmer fish",
        "sand wave shell boat towel sun",
        "car bicycle shop light corner bus",
    )
]
FIELDS = [
    line.split()
    for line in (
        "molecule gravity enzyme orbit voltage fossil",
        "verdict contract witness treaty tariff jury",
        "violin rhythm chorus opera trumpet melody",
        "anchor harbor reef captain tide lighthouse",
        "doubt patience memory courage envy nostalgia",
        "hammer loom varnish kiln needle anvil",
    )
]

DONE = (
    "sold an old bicycle",
    "met two former neighbors",
    "lost a bunch of keys",
    "read the whole newspaper",
    "repaired a broken radio",
    "painted a picture of the river",
)
PLACES = ("at the market", "in the garden", "behind the school", "near the station")
TIMES = ("on Sunday", "last night", "in the early morning", "before the storm")
REASONS = (
    "because the weather was good",
    "although there was little time",
    "while everybody else was asleep",
    "after the train had been canceled",
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
GOALS = ("cinema", "museum", "zoo", "swimming pool", "theater")
CHORES = ("work late", "visit the dentist", "study for an exam", "help a neighbor move")
THINGS = ("raincoat", "jacket", "phone", "notebook", "scarf")
SPOTS = ("on the kitchen table", "behind the sofa", "next to the front door")
KEEPERS = ("brother", "sister", "roommate", "neighbor")


def _words_of(groups: Sequence[Sequence[str]], of_each: int) -> Draw:
    """Draws words, so many of each of some groups, in any order."""

    def draw(rng: random.Random) -> Reference:
        chosen = rng.sample(groups, WORDS // of_each)
        words = [word for group in chosen for word in rng.sample(group, of_each)]
        rng.shuffle(words)
        return Reference(words=tuple(words))

    return draw


def _draw_sentence(rng: random.Random) -> Reference:
    parts = (NAMES, DONE, PLACES, TIMES, REASONS)
    return Reference(text=" ".join(map(rng.choice, parts)) + ".")


def _draw_conversation(rng: random.Random) -> Reference:
    return rng.choice((_draw_appointment, _draw_loss))(rng)


def _draw_appointment(rng: random.Random) -> Reference:
    a, b = rng.sample(NAMES, 2)
    first, then = rng.sample(DAYS, 2)
    goal, chore, hour = rng.choice(GOALS), rng.choice(CHORES), rng.randint(2, 9)
    return Reference(
        text=f"{a}: Do you want to come to the {goal} with me on {first}?\n"
        f"{b}: I would love to, but I have to {chore} that day.\n"
        f"{a}: What a pity. How about {then}?\n"
        f"{b}: {then} is fine. Let's meet there at {hour}.\n"
        f"{a}: Great, see you then!",
        summary=f"{a} and {b} will meet at the {goal} on {then} at {hour}, because {b} "
        f"has to {chore} on {first}.",
    )


def _draw_loss(rng: random.Random) -> Reference:
    a, b = rng.sample(NAMES, 2)
    thing, spot, day = rng.choice(THINGS), rng.choice(SPOTS), rng.choice(DAYS)
    keeper = rng.choice(KEEPERS)
    return Reference(
        text=f"{a}: Did I leave my {thing} at your place?\n"
        f"{b}: Yes, it is {spot}.\n"
        f"{a}: Thank goodness! May I fetch it on {day}?\n"
        f"{b}: I will be away then, but my {keeper} can give it to you.\n"
        f"{a}: Perfect, thanks a lot.",
        summary=f"{a} left a {thing} at {b}'s place and will get it from {b}'s "
        f"{keeper} on {day}.",
    )


def _ask_sentence(reference: Reference) -> str:
    *words, last = reference.words
    return f"Write one sentence with the words {', '.join(words)}, and {last}.\n"


def _ask_paraphrase(reference: Reference) -> str:
    return (
        "Say this in other words, and answer with the new sentence alone:\n"
        f"{reference.text}\n"
    )


def _ask_summary(reference: Reference) -> str:
    return (
        "Sum up this conversation in a sentence or two, and answer with nothing else:\n"
        f"{reference.text}\n"
    )


def _of_words(groups: Sequence[Sequence[str]], of_each: int) -> TextTask:
    metrics = ("grammar", "inclusion", "product")
    return TextTask(_words_of(groups, of_each), _ask_sentence, metrics)


TEXT_TASKS = {
    "paraphrasing": TextTask(
        _draw_sentence,
        _ask_paraphrase,
        ("grammar", "inverse_bleu", "bertscore", "product"),
    ),
    "summarization": TextTask(
        _draw_conversation,
        _ask_summary,
        ("grammar", "rouge1", "rouge2", "rougeL", "product"),
    ),
    "words_to_sentence_easy": _of_words(THEMES, 4),
    "words_to_sentence_medium": _of_words(THEMES, 2),
    "words_to_sentence_hard": _of_words(FIELDS, 1),
}
