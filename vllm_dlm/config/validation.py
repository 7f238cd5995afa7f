# SPDX-License-Identifier: Apache-2.0
"""Validation of named values that somebody set, with errors that say what is right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_dlm.config.foreign_names import PREFIX, advice, plain
from vllm_dlm.messages import LONGEST_QUOTE, OptionError, explain, first_field, unknown

Model = TypeVar("Model", bound=BaseModel)

Names = Mapping[str, str]
"""Option or parameter -> the name that somebody set it under, for messages."""


def foreign_hint(name: object) -> str:
    """What another server's option is called here; "" if `name` is none."""
    found = advice(plain(str(name)[:LONGEST_QUOTE]))
    if found is None or " " in found:
        return found or ""
    return f"It is {found.removeprefix(PREFIX)!r} here."


def validated(
    kind: type[Model],
    values: Mapping[str, Any],
    *,
    where: str,
    valid: Collection[str] | None = None,
    numbers: Collection[str] = (),
    names: Names | None = None,
    to_blame: str | None = None,
    hint: Callable[[str], str] = foreign_hint,
) -> Model:
    """Validate values as the fields of a model.

    Args:
        kind: the model.
        values: field -> value; None means "not set".
        where: names the source in error messages.
        valid: the fields that may be set here; None for all.
        numbers: the fields for which a boolean, which Python takes for a number, is
            refused here.
        names: of those fields that were set under another name.
        to_blame: the option that all errors are about; without it an error is about
            the field's own name.
        hint: what to say of an unknown name, if anything.

    Raises:
        OptionError: unknown names, wrong types, values out of range; the message says
            what is valid.
    """
    names = names or {}
    valid = kind.model_fields if valid is None else valid
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in valid:
            text = unknown(name, valid, hint=hint(name))
            raise OptionError(f"{where}: {text}", to_blame or names.get(name))
    for name in numbers:
        if isinstance(given.get(name), bool):
            set_as = names.get(name, name)
            raise OptionError(
                f"{where}: {set_as}: expected a number, not a boolean",
                to_blame or set_as,
            )
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise OptionError(
            f"{where}: {explain(error, names)}", to_blame or first_field(error, names)
        ) from None


def parse_policy(
    option: str,
    kinds: Mapping[Any, type[Model]],
    name: str,
    values: Mapping[str, Any],
    *,
    where: str,
    names: Names | None = None,
) -> Model:
    """Validate the parameters of a policy, which are an option of their own.

    Args:
        option: "cache", say; the parameters are then the option "cache_config".
        kinds: name of a policy -> its class.
        name: whose parameters they are.
        values: parameter -> value; None means "not set".
        where: names the source in error messages.
        names: under the parameters' option, how that was set.

    Raises:
        ValueError: unknown or wrong parameters; the message lists the valid ones.
    """
    kind, set_as = kinds[name], f"{option}_config"
    set_as = (names or {}).get(set_as, set_as)
    fields = kind.model_fields.items()
    return validated(
        kind,
        values,
        where=f"{where} ({option} {name!r}): {set_as}",
        numbers=[field for field, info in fields if info.annotation is not bool],
        to_blame=set_as,
    )
