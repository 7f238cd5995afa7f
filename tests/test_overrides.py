# SPDX-License-Identifier: Apache-2.0
"""A method of ours that stands in for one of vLLM's takes all that vLLM's takes.

vLLM adds parameters from release to release, and passes them to our subclasses. So an
override names what it uses, and hands on the rest.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter
from types import FunctionType

import vllm_dlm

OF_EXTRAS = {"vllm_dlm.evaluation.lm_eval_model": "lm_eval"}


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(vllm_dlm.__path__, "vllm_dlm."):
        needed = OF_EXTRAS.get(module.name, "vllm_dlm")
        if not module.name.endswith("__main__") and find_spec(needed):
            yield module.name


def function(member: object) -> FunctionType | None:
    """The function behind a class's member, if there is one."""
    if isinstance(member, classmethod | staticmethod):
        member = member.__func__
    return member if inspect.isfunction(member) else None


def overrides() -> Iterator[tuple[type, FunctionType, FunctionType]]:
    """Class, method of ours, and the method of vLLM that this method replaces."""
    for name in modules():
        for cls in vars(import_module(name)).values():
            if not inspect.isclass(cls) or cls.__module__ != name:
                continue
            for attribute, member in vars(cls).items():
                bases = (b for b in cls.__mro__[1:] if attribute in vars(b))
                base = next(bases, object)
                if attribute == "__init__" or not base.__module__.startswith("vllm."):
                    continue
                ours, theirs = function(member), function(vars(base)[attribute])
                if ours and theirs:
                    yield cls, ours, theirs


def refused(ours: FunctionType, theirs: FunctionType) -> list[str]:
    """The parameters of vLLM's method that ours cannot be called with."""
    parameters = inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_rest = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} <= kinds
    takes_keywords = Parameter.VAR_KEYWORD in kinds
    return [
        name
        for name, parameter in inspect.signature(theirs).parameters.items()
        if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        and name not in parameters
        and not takes_rest
        and not (takes_keywords and parameter.kind is Parameter.KEYWORD_ONLY)
    ]


def test_overrides_take_what_vllm_passes() -> None:
    found = list(overrides())
    assert len(found) > 50
    wrong = {
        f"{cls.__module__}.{ours.__qualname__}": names
        for cls, ours, theirs in found
        if (names := refused(ours, theirs))
    }
    assert not wrong


def test_an_override_that_refuses_a_parameter_is_seen() -> None:
    def theirs(self: object, request: int, limit: int | None = None) -> None: ...

    def narrow(self: object, request: int) -> None: ...

    def keywords(self: object, request: int, **kwargs: object) -> None: ...

    def rest(self: object, request: int, *args: object, **kwargs: object) -> None: ...

    assert refused(narrow, theirs) == ["limit"]
    assert refused(keywords, theirs) == ["limit"]
    assert not refused(rest, theirs)
