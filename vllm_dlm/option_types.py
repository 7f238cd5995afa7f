# SPDX-License-Identifier: Apache-2.0
"""Numbers in options: pydantic would take a boolean for one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
