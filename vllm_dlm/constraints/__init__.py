# SPDX-License-Identifier: Apache-2.0
"""Text that must match: patterns and JSON schemas, as automata over a model's tokens.

Nothing here knows vLLM or torch. A pattern becomes a machine over bytes (`syntax.py`,
`byte_machine.py`), that one a machine over tokens (`vocabulary.py`, `automaton.py`).
`schema.py` writes a JSON schema as a pattern.
"""
