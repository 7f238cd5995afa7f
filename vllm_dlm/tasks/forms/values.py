# SPDX-License-Identifier: Apache-2.0
"""What stands in the texts and forms: names, cities, numbers, things.

Names and cities come from lists and from syllables; a stable hash keeps some of them
out of the training, so that copying is measured on words that no row has shown.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

# One name or city in HELD_OUT_PARTS is kept for evaluation.
HELD_OUT_PARTS = 8
SYLLABLE_SHARE = 0.6

_FIRST_NAMES = (
    "Ada Alice Amir Anna Ben Bela Boris Carl Carla Chen Clara Cleo Dan David Diego "
    "Dora Eli Emil Emma Erik Eva Fatima Felix Finn Flora Frank Gina Grace Gus Gwen "
    "Hana Hannah Hugo Ida Igor Ines Ivan Jack Jan Jane Jonas Julia Karl Kira Lars Lea "
    "Lena Leo Liam Lina Linus Lucy Luis Maja Mara Marie Max Mia Milo Mina Nadia Nina "
    "Noah Nora Olga Oscar Otto Paul Petra Pia Rafael Rita Rosa Rudi Samir Sara Sofia "
    "Sven Tara Theo Tim Tom Uma Vera Victor Yara Yuki Zara José Zoë Björn Jürgen "
    "Chloé"
).split()
_LAST_NAMES = (
    "Adler Baker Berg Castro Costa Diaz Evans Fischer Garcia Hansen Ito Jansen Keller "
    "Kim Klein Lopez Meyer Moreau Novak Okafor Patel Rossi Sato Silva Smith Tanaka "
    "Vogel Weber Young Müller"
).split()
_CITIES = (
    "Athens Basel Berlin Bern Boston Brno Cairo Chicago Delhi Dublin Essen Florence "
    "Geneva Graz Hamburg Hanoi Helsinki Kyoto Leeds Lima Lisbon London Lyon Madrid "
    "Milan Munich Nairobi Naples Nice Osaka Oslo Paris Porto Prague Quito Riga Rome "
    "Seoul Seville Sofia Tallinn Tokyo Toronto Tunis Turin Venice Vienna Vilnius "
    "Warsaw York Zurich Málaga Köln"
).split()
JOBS = (
    "baker teacher doctor pilot farmer nurse lawyer painter singer writer driver "
    "cook engineer gardener judge plumber tailor waiter"
).split()
PETS = "cat dog horse parrot rabbit hamster turtle goat pony snake".split()
ITEMS = (
    "lamp chair table book phone bottle shirt hat jacket basket mirror pillow rug "
    "knife camera clock candle blanket"
).split()
COLORS = "red green blue black white yellow brown grey pink orange".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ROOMS = "kitchen library garden office hall studio cellar lobby".split()
LANGUAGES = "German French Spanish Italian Polish Greek Dutch Danish".split()

_ONSETS = "b br c d dr f g gr h j k kr l m n p pr r s st t tr v w z sh ch th".split()
_VOWELS = "a e i o u a e i o u ai ea ia io ou".split()
_CODAS = " n r l s t m d k nd rt ck ".split(" ")


def is_held_out(word: str) -> bool:
    """True for the names and cities kept for evaluation, the same everywhere."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_PARTS == 0


def _syllables(rng: random.Random) -> str:
    count = rng.choice((1, 2, 2, 2))
    word = "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(count)
    )
    return word[:8].capitalize()


def _drawer(words: list[str]) -> Callable[[random.Random, bool], str]:
    """Draws of a list or of syllables, of the words that a split may show."""

    def draw(rng: random.Random, held_out: bool) -> str:
        while True:
            new = rng.random() < SYLLABLE_SHARE
            word = _syllables(rng) if new else rng.choice(words)
            if len(word) > 2 and is_held_out(word) == held_out:
                return word

    return draw


first_name = _drawer(_FIRST_NAMES)
_last_name = _drawer(_LAST_NAMES)
city = _drawer(_CITIES)


def name(rng: random.Random, held_out: bool) -> str:
    """A first name; one in eight with a surname."""
    first = first_name(rng, held_out)
    if rng.random() < 0.125:
        return f"{first} {_last_name(rng, held_out)}"
    return first


def title(rng: random.Random, held_out: bool) -> str:
    """A title of a book or song: one or two words."""
    words = [city(rng, held_out) for _ in range(rng.choice((1, 1, 2)))]
    return " ".join(words)


def clock(rng: random.Random, _: bool) -> str:
    """A time of the day."""
    return f"{rng.randint(6, 22):02d}:{rng.choice((0, 15, 30, 45)):02d}"


def price(rng: random.Random, _: bool) -> float:
    """A price with two digits behind the point, the last not 0."""
    return float(f"{rng.randint(1, 99)}.{rng.randint(0, 9)}{rng.randint(1, 9)}")


def one_of(words: list[str]) -> Callable[[random.Random, bool], str]:
    """Draws of a fixed list, which both splits share."""
    return lambda rng, _: rng.choice(words)


def between(low: int, high: int) -> Callable[[random.Random, bool], int]:
    """Whole numbers of a range, both ends included."""
    return lambda rng, _: rng.randint(low, high)
