# SPDX-License-Identifier: Apache-2.0
"""`suffix` of /v1/completions: the option of this name, under the name of OpenAI's API.

vLLM asks a model's renderer for one text of prompt and suffix, markers included, and
refuses the field where there is none. Here the suffix is no part of the prompt: it lies
behind the answer. So the field becomes an option before vLLM looks at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_dlm.messages import OptionError

if TYPE_CHECKING:
    from vllm.exceptions import VLLMValidationError

OPTION = "dlm_suffix"


def as_option(body: Any) -> Any:
    """A copy of a completion's body, with its suffix among the options.

    Raises:
        OptionError: the request asks for what cannot be had with a suffix.
    """
    options = dict(body.vllm_xargs or {})
    if body.echo:
        raise OptionError(
            "echo cannot be combined with suffix: the answer is the text between the "
            "two; remove it from the request",
            "echo",
        )
    if OPTION in options:
        raise OptionError(
            f"suffix is also set as {OPTION} in vllm_xargs; set it in one place",
            "suffix",
        )
    changed = {"suffix": None, "vllm_xargs": {**options, OPTION: body.suffix}}
    return body.model_copy(update=changed)


def as_sent(error: VLLMValidationError, body: Any) -> VLLMValidationError:
    """A refusal with the client's name of the suffix, if it sent one."""
    if getattr(body, "suffix", None) is None:
        return error
    text = str(error.args[0]) if error.args else ""
    parameter = error.parameter
    if parameter == f"vllm_xargs.{OPTION}":
        parameter = "suffix"
    return type(error)(text.replace(OPTION, "suffix"), parameter=parameter)
