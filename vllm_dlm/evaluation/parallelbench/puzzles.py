# SPDX-License-Identifier: Apache-2.0
"""The two puzzles: a Latin square, with many answers, and a Sudoku, with one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import permutations
from string import ascii_uppercase, digits

SIZE = 4
BLANKS = 4
"""Cells of a Sudoku that are left open."""


def draw_symbols(rng: random.Random) -> list[str]:
    """Symbols of a Latin square: capital letters and digits."""
    return rng.sample(ascii_uppercase + digits, SIZE)


def draw_latin_square(rng: random.Random, symbols: Sequence[str]) -> str:
    """A Latin square as CSV."""
    rows = [[(row + column) % SIZE for column in range(SIZE)] for row in range(SIZE)]
    rng.shuffle(rows)
    names = rng.sample(list(symbols), SIZE)
    return "\n".join(",".join(names[cell] for cell in row) for row in rows)


def is_latin_square(symbols: Sequence[str], text: str) -> bool:
    """Whether the first rows that are one of the symbols each make a Latin square."""
    wanted = set(symbols)
    lines = ([cell.strip() for cell in line.split(",")] for line in text.splitlines())
    rows = [row for row in lines if len(row) == SIZE and set(row) == wanted][:SIZE]
    if len(rows) < SIZE:
        return False
    return all(set(column) == wanted for column in zip(*rows, strict=True))


def draw_sudoku(rng: random.Random) -> tuple[str, str]:
    """A question of four rows of digits, 0 where one is missing, and its solution."""
    while True:
        solution = rng.choice(_SUDOKUS)
        blanks = rng.sample(range(SIZE * SIZE), BLANKS)
        givens = [0 if i in blanks else cell for i, cell in enumerate(solution)]
        fits = (
            all(given in (0, cell) for given, cell in zip(givens, one, strict=True))
            for one in _SUDOKUS
        )
        if sum(fits) == 1:
            return _rows(givens), _rows(solution)


def is_sudoku(solution: str, text: str) -> bool:
    """Whether the lines with digits are the solution's."""
    return _digits(text) == _digits(solution)


def _digits(text: str) -> list[list[str]]:
    lines = ([c for c in line if c.isdigit()] for line in text.splitlines())
    return [line for line in lines if line]


def _rows(cells: Sequence[int]) -> str:
    rows = (cells[i : i + SIZE] for i in range(0, len(cells), SIZE))
    return "\n".join("".join(map(str, row)) for row in rows)


def _all_sudokus() -> Iterator[tuple[int, ...]]:
    """All 288 grids of four by four."""
    rows = list(permutations(range(1, SIZE + 1)))
    for first in rows:
        for second in rows:
            if set(first[:2]) & set(second[:2]):
                continue
            for third in rows:
                for fourth in rows:
                    grid = (first, second, third, fourth)
                    columns = zip(*grid, strict=True)
                    if set(third[:2]) & set(fourth[:2]):
                        continue
                    if all(len(set(column)) == SIZE for column in columns):
                        yield sum(grid, ())


_SUDOKUS = tuple(_all_sudokus())
