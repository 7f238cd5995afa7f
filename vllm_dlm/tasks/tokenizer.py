# SPDX-License-Identifier: Apache-2.0
"""Word-level tokenizer of llada-tiny: names, task words, digits, letters.

The words of the questions carry their own spaces, so that joining the tokens gives
the text back exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dlm.files.whole_files import replacing, write_json, write_text
from vllm_dlm.tasks.problems import LETTERS, NAMES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
EOT, UNK = "<|eot_id|>", "<unk>"
SPECIAL_TOKENS = (EOS, BOS, MASK, START_HEADER, END_HEADER, EOT, UNK)

_ROLES = ("user", "assistant", "system")
_LEADING_WORDS = (
    "Copy ",
    "Reverse ",
    "Sort ",
    "Insert ",
    "Remove ",
    "Replace ",
    "Add ",
    "Spell ",
    "Shuffle ",
    "any name",
)
_INNER_WORDS = (
    " after ",
    " in ",
    " from ",
    " with ",
    " anywhere",
    " backwards",
    "\n\n",
    ", ",
)
_CHARACTERS = (*"[]+=, \n.?!:", *"0123456789", *LETTERS)
VOCABULARY = (
    *SPECIAL_TOKENS,
    *_ROLES,
    *_LEADING_WORDS,
    *_INNER_WORDS,
    *_CHARACTERS,
    *NAMES,
)
VOCAB_SIZE = 128
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}
EOS_ID, BOS_ID, MASK_ID = TOKEN_IDS[EOS], TOKEN_IDS[BOS], TOKEN_IDS[MASK]
UNK_ID = TOKEN_IDS[UNK]

# Whole words first; whatever is left is split into characters, known or not.
_PATTERN = "|".join(
    [
        rf"\b(?:{'|'.join((*NAMES, *_ROLES))})\b",
        rf"\b(?:{'|'.join(_LEADING_WORDS)})",
        "|".join(_INNER_WORDS),
        r"[\s\S]",
    ]
)
_REGEX = re.compile(_PATTERN)

# LLaDA's own template: it ignores add_generation_prompt.
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def encode(text: str) -> list[int]:
    """Token ids of a text without special tokens; unknown pieces give <unk>.

    The same as the tokenizer in tokenizer.json, but fast enough for training.
    """
    return [TOKEN_IDS.get(piece, UNK_ID) for piece in _REGEX.findall(text)]


def decode(token_ids: list[int]) -> str:
    """Text of the answer tokens up to the first <|endoftext|>."""
    if EOS_ID in token_ids:
        token_ids = token_ids[: token_ids.index(EOS_ID)]
    return "".join(VOCABULARY[i] if i < len(VOCABULARY) else UNK for i in token_ids)


def encode_prompt(question: str, chat: bool) -> list[int]:
    """Prompt of a question, as plain text or as the user's first chat message."""
    if not chat:
        return [BOS_ID, *encode(question)]
    header = [TOKEN_IDS[START_HEADER], TOKEN_IDS["user"], TOKEN_IDS[END_HEADER]]
    newlines = TOKEN_IDS["\n\n"]
    reply = [TOKEN_IDS[START_HEADER], TOKEN_IDS["assistant"], TOKEN_IDS[END_HEADER]]
    return [
        *(BOS_ID, *header, newlines),
        *encode(question.strip()),
        *(TOKEN_IDS[EOT], *reply, newlines),
    ]


def save_tokenizer(output_dir: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    tokenizer = Tokenizer(WordLevel(TOKEN_IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.decoder = Fuse()
    write_folder(
        tokenizer, output_dir, SPECIAL_TOKENS, CHAT_TEMPLATE, 1024, {"unk_token": UNK}
    )


def write_folder(
    tokenizer: Tokenizer,
    output_dir: str | Path,
    special_tokens: Sequence[str],
    chat_template: str,
    max_length: int,
    more: Mapping[str, str],
) -> None:
    """Finish a built-in model's tokenizer, and write the files that load it.

    Args:
        tokenizer: knows `special_tokens` already, among them this module's.
        output_dir: the model's folder.
        special_tokens: texts that are one token wherever they stand.
        chat_template: in Jinja.
        max_length: the longest text, in tokens.
        more: further entries of tokenizer_config.json.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special_tokens]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, BOS_ID)],
    )
    output_dir = Path(output_dir)
    with replacing(output_dir / "tokenizer.json") as part:
        tokenizer.save(str(part))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        **more,
        "extra_special_tokens": [START_HEADER, END_HEADER, EOT],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    write_json(output_dir / "tokenizer_config.json", config)
    write_text(output_dir / "chat_template.jinja", chat_template)
