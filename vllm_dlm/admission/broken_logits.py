# SPDX-License-Identifier: Apache-2.0
"""What users and the log are told of a request whose logits are no numbers."""

from __future__ import annotations

import time

REASON = (
    "the model's logits left no token to choose: they are NaN or infinite, as damaged "
    "weights or a number format that overflows make them, or the request allows only "
    "tokens of logit -inf"
)
"""The `stop_reason` of such an output, and the text of the HTTP error 500."""

SECONDS_BETWEEN_LINES = 60.0


class Reports:
    """Makes log lines about such requests: the first at once, then one a minute.

    Args:
        model: its name, as users call it.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._unreported = 0
        self._quiet_until = float("-inf")

    def add(self, requests: int) -> str | None:
        """The line to log, if any is due, after so many more requests have failed."""
        self._unreported += requests
        now = time.monotonic()
        if not self._unreported or now < self._quiet_until:
            return None
        count, self._unreported = self._unreported, 0
        self._quiet_until = now + SECONDS_BETWEEN_LINES
        return (
            f"{self._model}: {count} request{'s' if count > 1 else ''} ended with an "
            f"error, for {REASON}"
        )
