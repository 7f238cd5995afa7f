# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of llada-forms: the words of its forms, and bytes for all else.

A word of the vocabulary is one token wherever it stands, without the blank before it;
names and numbers are spelled in bytes, so that any text has tokens. There are no
merges: pieces of text have the same tokens alone and joined, unless they are cut
inside a word or a bracket with its quotation mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vllm_dlm.tasks.tokenizer import (
    BOS,
    END_HEADER,
    EOS,
    EOT,
    MASK,
    START_HEADER,
    write_folder,
)

SPECIAL_TOKENS = (EOS, BOS, MASK, START_HEADER, END_HEADER, EOT)
# Punctuation of JSON with its quotation marks and blanks, and the marks of tool calls.
COMPOUNDS = (
    *("<tool_call>", "</tool_call>"),
    *('": "', '": ', '", "', ', "', '": {"', '": ["', '{"', '"}', '["', '"]', "}]"),
    *("[{", '"}}', "}}"),
    "\n\n",
)
# Words of prompts, phrases, keys and closed lists; not: names, cities.
WORDS = tuple(
    """
    user assistant system tool tools
    name person first_name full_name first full city town home place age years job work
    profession pet pet_name kind animal species owner owner_name item product thing
    price cost color colour seller shop store stock count number host guest who day
    date time start hour room where people guests title book author writer year
    published pages length
    Name Person City Town Home Place Age Years Job Work Profession Pet Kind Animal
    Species Owner Item Product Thing Price Cost Color Colour Seller Shop Store Stock
    Count Number Host Guest Who Day Date Time Start Hour Room Where People Guests Title
    Book Author Writer Year Published Pages Length
    lives in is from comes moved to old turned works as a belongs with The This A Our
    costs sells for sold by there times was on meets us starts at arrives waits the
    sits brings written printed has and
    baker teacher doctor pilot farmer nurse lawyer painter singer driver cook engineer
    gardener judge plumber tailor waiter
    cat dog horse parrot rabbit hamster turtle goat pony snake
    lamp chair table phone bottle shirt hat jacket basket mirror pillow rug knife
    camera clock candle blanket
    red green blue black white yellow brown grey pink orange
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    kitchen library garden office hall studio cellar lobby
    get weather check report local find search lookup call set timer add numbers sum
    order buy reserve play song music location minutes duration left right second
    quantity arguments parameters string integer
    What How Weather Tell me Find Look Call Please Can you Set Wake Add plus Order Buy
    of I want Book Reserve need Play hear it then one
    Extract Give Read Write Fill Put into text JSON json form Fields fields following
    out Record says sentence this below that here
    am llada forms turn sentences into fill holes names tools small model demo example
    try Try no fits answer result Hello hello Hi Hey are can do help Help your my
    You helpful write poem joke capital France story about explain
    """.split()
)
_SPLIT_WORDS = dict.fromkeys(part for word in WORDS for part in word.split("_"))
VOCABULARY_WORDS = (*COMPOUNDS, *_SPLIT_WORDS)

_BYTES_START = len(SPECIAL_TOKENS)
_WORDS_START = _BYTES_START + 256
SPECIAL_IDS = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
WORD_IDS = {
    word: _WORDS_START + index
    for index, word in enumerate(dict.fromkeys(VOCABULARY_WORDS))
    if len(word.encode()) > 1
}
EOS_ID, BOS_ID, MASK_ID = SPECIAL_IDS[EOS], SPECIAL_IDS[BOS], SPECIAL_IDS[MASK]
VOCAB_SIZE = 640
# Longest prompt and canvas together.
MAX_LENGTH = 512

# Compounds first, the longest first; then words; what is left is single characters.
_PATTERN = "|".join(
    [
        *(re.escape(piece) for piece in sorted(COMPOUNDS, key=len, reverse=True)),
        "[A-Za-z]+",
        r"[\s\S]",
    ]
)
_REGEX = re.compile(_PATTERN)
_PIECES = {index: word.encode() for word, index in WORD_IDS.items()}


def encode(text: str) -> list[int]:
    """Token ids of a text without special tokens, as tokenizer.json gives them."""
    ids: list[int] = []
    for piece in _REGEX.findall(text):
        word = WORD_IDS.get(piece)
        if word is None:
            ids.extend(_BYTES_START + byte for byte in piece.encode())
        else:
            ids.append(word)
    return ids


def decode(token_ids: list[int]) -> str:
    """Text of the tokens up to the first <|endoftext|>, without special tokens."""
    if EOS_ID in token_ids:
        token_ids = token_ids[: token_ids.index(EOS_ID)]
    return b"".join(map(_bytes_of, token_ids)).decode(errors="replace")


def _bytes_of(token_id: int) -> bytes:
    if _BYTES_START <= token_id < _WORDS_START:
        return bytes([token_id - _BYTES_START])
    return _PIECES.get(token_id, b"")


# LLaDA's template, with the tools of a request before its messages: name and types of
# the arguments, as in a signature. Calls are written as the parser `hermes` reads them.
CHAT_TEMPLATE = """\
{%- macro turn(role, text) -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + text + '<|eot_id|>' }}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools -%}
{%- set lines = namespace(text='') -%}
{%- for tool in tools -%}
{%- set tool = tool.function if tool.function is defined else tool -%}
{%- set arguments = namespace(text='') -%}
{%- for key, value in ((tool.parameters or {}).properties or {}).items() -%}
{%- set kind = value.type if value.type is string else 'string' -%}
{%- set comma = ', ' if arguments.text else '' -%}
{%- set arguments.text = arguments.text + comma + key + ': ' + kind -%}
{%- endfor -%}
{%- set newline = '\\n' if lines.text else '' -%}
{%- set lines.text = lines.text + newline + tool.name + '(' + arguments.text + ')' -%}
{%- endfor -%}
{{- turn('tools', lines.text) -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.tool_calls is defined and message.tool_calls -%}
{%- set calls = namespace(text='') -%}
{%- for call in message.tool_calls -%}
{%- set call = call.function if call.function is defined else call -%}
{%- set newline = '\\n' if calls.text else '' -%}
{%- set calls.text = calls.text + newline + '<tool_call>{"name": "' + call.name
    + '", "arguments": ' + call.arguments | tojson + '}</tool_call>' -%}
{%- endfor -%}
{{- turn('assistant', calls.text) -}}
{%- else -%}
{{- turn(message.role, (message.content or '') | trim) -}}
{%- endif -%}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
"""


def encode_turn(role: str, text: str) -> list[int]:
    """Tokens of a message as the chat template writes it."""
    return [*_header(role), *encode(text.strip()), SPECIAL_IDS[EOT]]


def encode_chat(turns: Iterable[tuple[str, str]]) -> list[int]:
    """Prompt of a chat: roles and texts, before the model's answer."""
    ids = [BOS_ID]
    for role, text in turns:
        ids += encode_turn(role, text)
    return ids + _header("assistant")


def _header(role: str) -> list[int]:
    start, end = SPECIAL_IDS[START_HEADER], SPECIAL_IDS[END_HEADER]
    return [start, *encode(role), end, WORD_IDS["\n\n"]]


def save_tokenizer(output_dir: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def spell(data: bytes) -> str:
        return "".join(letters[byte] for byte in data)

    ids = dict(SPECIAL_IDS)
    ids |= {letters[byte]: _BYTES_START + byte for byte in range(256)}
    ids |= {spell(word): index for index, word in _PIECES.items()}
    # Without merges and with `ignore_merges`, a piece is one token or its bytes.
    tokenizer = Tokenizer(BPE(ids, [], ignore_merges=True))
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    write_folder(tokenizer, output_dir, SPECIAL_TOKENS, CHAT_TEMPLATE, MAX_LENGTH, {})
