# SPDX-License-Identifier: Apache-2.0
"""The formats of strings that a JSON schema may name, as patterns.

Each is narrower than its standard, and bounded: what is written is valid, and not all
that is valid is written.
"""

from __future__ import annotations

_DATE = (
    "[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
_HOST = f"{_LABEL}(?:\\.{_LABEL}){{0,3}}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-f]"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"(?:{_DATE})T{_TIME}",
    "duration": "P(?:[0-9]{1,4}W|[0-9]{1,4}[YMD]|[0-9]{1,4}DT[0-9]{1,4}[HMS]"
    "|T[0-9]{1,4}[HMS])",
    "email": "[A-Za-z0-9_%+-]{1,32}(?:\\.[A-Za-z0-9_%+-]{1,32})?"
    f"@{_LABEL}(?:\\.{_LABEL}){{1,2}}",
    "hostname": _HOST,
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
    "ipv6": f"{_HEX}{{1,4}}(?::{_HEX}{{1,4}}){{7}}",
    "uri": f"https?://{_HOST}(?::[1-9][0-9]{{1,3}})?"
    "(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]{0,32}){0,4}"
    "(?:\\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]{1,64})?",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
}
"""Name -> pattern."""

NUMBER_FORMATS = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "float": None,
    "double": None,
}
"""Formats of numbers, from OpenAPI -> their bounds."""
