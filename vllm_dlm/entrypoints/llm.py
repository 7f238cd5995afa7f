# SPDX-License-Identifier: Apache-2.0
"""`vllm.LLM` with the dlm options as keyword arguments.

Which there are, their types and their meaning follow from the fields of `DlmConfig`
and of the classes that wings have beside it:
`inspect.signature`, `help` and editors that ask for either show them.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, get_type_hints

import vllm

from vllm_dlm.entrypoints.flags import FLAG_PREFIX, fold_options, option_classes
from vllm_dlm.entrypoints.frames import CanvasFrame, FrameCalls, watching
from vllm_dlm.messages import unknown

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


def _with_options(init: Callable[..., None]) -> Callable[..., None]:
    """Show the options in a constructor's signature, in front of `**kwargs`."""
    own = inspect.signature(init)
    *named, others = own.parameters.values()
    # Without the validators.
    options = [
        inspect.Parameter(
            FLAG_PREFIX + name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=kind | None,
        )
        for each in option_classes().values()
        for name, kind in get_type_hints(each).items()
        if name in each.model_fields
    ]
    shown = own.replace(parameters=[*named, *options, others])
    init.__signature__ = shown  # type: ignore[attr-defined]
    return init


def _plain(value: Any) -> Any:
    """An option's value as `additional_config` can hold it."""
    return dict(value) if isinstance(value, Mapping) else value


def _described(kind: type[LLM]) -> type[LLM]:
    """Describe the options in the class's docstring, where `{options}` stands."""
    lines = [
        textwrap.fill(
            f"{FLAG_PREFIX}{name}: {field.description}",
            width=88,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        for each in option_classes().values()
        for name, field in each.model_fields.items()
    ]
    # `python -OO` leaves no docstrings.
    if kind.__doc__ is not None:
        kind.__doc__ = kind.__doc__.replace("        {options}", "\n".join(lines))
    return kind


@_described
class LLM(vllm.LLM):
    """`vllm.LLM` for diffusion language models.

    Args:
        model: a folder, a hub id, or an alias such as "llada-tiny".
        {options}
        additional_config: as in `vllm.LLM`; the options above go into it.
        **kwargs: everything else that `vllm.LLM` takes.

    Raises:
        TypeError: an unknown `dlm_*` argument; the message lists the known ones.
        ValueError: a value that is not valid; the message says what is.
    """

    @_with_options
    def __init__(
        self,
        model: str,
        *,
        additional_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {
            name: _plain(kwargs.pop(FLAG_PREFIX + name, None))
            for each in option_classes().values()
            for name in each.model_fields
        }
        for name in kwargs:
            if name.startswith(FLAG_PREFIX):
                valid = [FLAG_PREFIX + option for option in options]
                raise TypeError(f"LLM(): {unknown(name, valid)}")
        super().__init__(
            model,
            additional_config=fold_options(additional_config or {}, options),
            **kwargs,
        )

    def generate(
        self,
        *args: Any,
        on_frame: Callable[[CanvasFrame], object] | None = None,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """As `vllm.LLM.generate`.

        Args:
            *args: as there.
            on_frame: called after each denoise step of each sample with what changed on
                its canvas. The next step waits until the call returns.
            **kwargs: as there.
        """
        with _watched(on_frame):
            return super().generate(*args, **kwargs)

    def chat(
        self,
        *args: Any,
        on_frame: Callable[[CanvasFrame], object] | None = None,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """As `vllm.LLM.chat`; `on_frame` is as in `generate`."""
        with _watched(on_frame):
            return super().chat(*args, **kwargs)


def _watched(
    on_frame: Callable[[CanvasFrame], object] | None,
) -> AbstractContextManager[None]:
    """Have requests watched that are admitted meanwhile, if anybody wants it."""
    return nullcontext() if on_frame is None else watching(FrameCalls(on_frame))
