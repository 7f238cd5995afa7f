# SPDX-License-Identifier: Apache-2.0
"""Files: written whole or not at all, and checked before anything in them is believed.

A file is written under a name of its own beside its goal, reaches the disk, and then
takes the goal's place (`replacing`): a reader sees the old one or the new one, whatever
else writes and whenever the process ends. What others may read gets the mode that the
umask leaves; what holds texts of users is `private`, for its owner alone.

Only ordinary files are read: neither folders nor devices, and no pipe, which would be
waited for. Each has a bound on its size. What is wrong is a `BadFile`, a ValueError
that names the file and what of it is wrong. `tensor_files.py` has tensors on top of
this.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_dlm.messages import explain

MIB = 1 << 20

JSON_BYTES = 64 * MIB
"""Most of a file that is read as JSON."""
LINE_CHARACTERS = 64 * MIB
"""Most of a line of text."""
REASON_CHARACTERS = 600
"""Most of what an error message quotes."""

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class BadFile(ValueError):
    """A file that is not what it should be.

    Args:
        what: the kind of file, in words that go after "the".
        path: where it is.
        reason: what is wrong, and in which part of it.
    """

    def __init__(self, what: str, path: str | os.PathLike[str], reason: object) -> None:
        self.reason = str(reason)
        if len(self.reason) > REASON_CHARACTERS:  # a file may say what it likes
            self.reason = self.reason[:REASON_CHARACTERS] + " ..."
        super().__init__(f"cannot read the {what} {os.fspath(path)}: {self.reason}")


# -- writing --------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """A new, empty file; once it is written, it takes the place of `path`.

    Where the writing fails, `path` is as before and the new file is gone. Folders that
    are missing are made; a link goes on to lead where it does.

    Args:
        private: for its owner alone (mode 0600), whatever the umask is.

    Raises:
        ValueError: something that is no ordinary file has this name.
    """
    goal = Path(os.path.realpath(path))
    if goal.exists() and not goal.is_file():
        raise ValueError(
            f"cannot write to {os.fspath(path)!r}: it is {_kind(goal.stat().st_mode)}; "
            "name an ordinary file"
        )
    make_folder(goal.parent)
    # No suffix that others look for: vLLM loads every *.safetensors of a folder.
    part = goal.with_name(f".{secrets.token_hex(12)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        made = os.open(part, flags, 0o600 if private else 0o666)
    except OSError as error:  # name the file that was asked for
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    try:
        mode = stat.S_IMODE(os.fstat(made).st_mode)
        os.close(made)
        yield part
        # Some libraries put a file of their own there, readable by its owner only.
        part.chmod(mode)
        _to_disk(part)
        part.replace(goal)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # Not every file system can do this with a folder, nor every user read it.
    with contextlib.suppress(OSError):
        _to_disk(goal.parent)


def write_text(
    path: str | os.PathLike[str], text: str, *, private: bool = False
) -> None:
    """Write a text file whole, as `replacing` does."""
    with replacing(path, private=private) as part:
        part.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike[str],
    value: Any,
    *,
    indent: int | None = 2,
    private: bool = False,
) -> None:
    """Write a JSON file whole, as `replacing` does."""
    text = json.dumps(value, indent=indent) + "\n"
    write_text(path, text, private=private)


def make_folder(path: str | os.PathLike[str], *, private: bool = False) -> None:
    """Make a folder and those above it, if they are missing.

    Args:
        private: a folder that is made here is for its owner alone (mode 0700).
    """
    os.makedirs(path, mode=0o700 if private else 0o777, exist_ok=True)


def path_part(name: str, what: str) -> str:
    """A name that came out of a file, as a part of a path below a folder of ours.

    Raises:
        ValueError: it could lead elsewhere.
    """
    if name in (".", "..") or not re.fullmatch(r"[\w.-]{1,80}", name):
        raise ValueError(
            f"{what} {name[:80]!r} cannot be a part of a file's name: expected up to "
            "80 letters, digits, '.', '-' and '_'"
        )
    return name


def _to_disk(path: Path) -> None:
    """Wait until it is on the disk; some full disks say so only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading --------------------------------------------------------------


def open_file(
    path: str | os.PathLike[str], what: str, most_bytes: int | None = None
) -> io.BufferedReader:
    """Open an ordinary file for reading.

    Args:
        what: the kind of file, for error messages.
        most_bytes: its largest size; None for one that is read piece by piece.

    Raises:
        BadFile: there is none, it is something else, or it is larger.
    """
    try:
        # Opening a pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise BadFile(what, path, reason) from None
    found = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(found.st_mode):
            kind = _kind(found.st_mode)
            raise BadFile(what, path, f"it is {kind}; expected an ordinary file")
        if most_bytes is not None and found.st_size > most_bytes:
            reason = f"it has {found.st_size} bytes, and at most {most_bytes} are read"
            raise BadFile(what, path, reason)
        return os.fdopen(descriptor, "rb")
    except BadFile:
        os.close(descriptor)
        raise


def read_text(
    path: str | os.PathLike[str], what: str, most_bytes: int = JSON_BYTES
) -> str:
    """The text of a file in UTF-8.

    Raises:
        BadFile: as `open_file`; or it is no such text.
    """
    with open_file(path, what, most_bytes) as file:
        # Of a file that grows meanwhile, not more.
        content = file.read(most_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(what, path, f"it is no text in UTF-8 ({error})") from None


def read_lines(path: str | os.PathLike[str], what: str) -> Iterator[str]:
    """The lines of a text file in UTF-8, each with its line break, one at a time.

    Raises:
        BadFile: as `read_text`, or a line has more than `LINE_CHARACTERS`.
    """
    number = 0
    with io.TextIOWrapper(open_file(path, what), encoding="utf-8") as lines:
        try:
            while line := lines.readline(LINE_CHARACTERS):
                number += 1
                if len(line) == LINE_CHARACTERS and not line.endswith("\n"):
                    raise BadFile(
                        what,
                        path,
                        f"line {number} is longer than {LINE_CHARACTERS} characters",
                    )
                yield line
        except (UnicodeDecodeError, OSError) as error:
            raise BadFile(what, path, f"behind line {number}: {error}") from None


def parse_lines(
    path: str | os.PathLike[str],
    what: str,
    parse: Callable[[str], T],
    most: int | None = None,
) -> list[T]:
    """What the lines of a text file say; blank lines say nothing.

    Args:
        path: the file.
        what: it is, for error messages ("rows").
        parse: what a line says, without its line break. Its ValueError gets the line's
            number.
        most: how many are read at most; None reads all.

    Raises:
        BadFile: as `read_lines`, or a line cannot be parsed.
    """
    found: list[T] = []
    for number, line in enumerate(read_lines(path, what), 1):
        if len(found) == most:
            break
        if not line.strip():
            continue
        try:
            found.append(parse(line.rstrip("\r\n")))
        except ValueError as error:
            raise BadFile(what, path, f"line {number}: {error}") from None
    return found


def read_json(
    path: str | os.PathLike[str],
    what: str,
    model: type[Model],
    most_bytes: int = JSON_BYTES,
) -> Model:
    """A JSON file, as the pydantic model that says what it holds.

    Raises:
        BadFile: as `read_text`; it is not JSON, or a field is missing or not valid.
    """
    text = read_text(path, what, most_bytes)
    try:
        return checked(model, parse_json(text))
    except ValueError as error:
        raise BadFile(what, path, error) from None


def checked(model: type[Model], value: Any) -> Model:
    """A value of JSON as the pydantic model that says what it holds.

    Raises:
        ValueError: a field is missing or not valid; the message is of bounded length.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error)[:REASON_CHARACTERS]) from None


def parse_json(text: str) -> Any:
    """A value of JSON, which knows neither NaN nor infinity.

    Raises:
        ValueError: it is none, or nested deeper than Python reads.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from None


def remembered(read: Callable[[Path], T]) -> Callable[[str | os.PathLike[str]], T]:
    """`read`, but a file that has not changed is not read again.

    What it returns is shared: it must not be changed. Errors are not remembered.
    """

    @lru_cache(maxsize=64)
    def known(path: Path, stamp: tuple[int, ...]) -> T:
        return read(path)

    def look(path: str | os.PathLike[str]) -> T:
        path = Path(path)
        try:
            found = path.stat()
        except (OSError, ValueError):
            return read(path)  # it says what is wrong
        times = (found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        return known(path.absolute(), (found.st_dev, found.st_ino, *times))

    return look


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
