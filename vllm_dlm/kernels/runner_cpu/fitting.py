# SPDX-License-Identifier: Apache-2.0
"""Replacements of kernels, fitted to the parameters that the installed vLLM passes.

A replacement takes the parameters of every vLLM it is made for: those that only some
versions pass have defaults.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_LAUNCH_OPTIONS = frozenset({"num_warps", "num_stages"})
"""Triton's own, which are no parameters of a kernel."""


def kernel_parameters(name: str) -> tuple[str, ...]:
    """The parameters of the installed vLLM's kernel, by its full name.

    Raises:
        RuntimeError: this vLLM has no such kernel.
    """
    from vllm import __version__
    from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel

    try:
        host, attribute = _resolve_kernel(name)
        return _kernel_arg_names(getattr(host, attribute))
    except (ImportError, AttributeError, ValueError) as error:
        raise RuntimeError(f"vLLM {__version__} has no kernel {name}") from error


def fit(
    replacement: Callable[..., None], name: str, parameters: tuple[str, ...]
) -> Callable[..., None]:
    """`replacement`, as a function of exactly `parameters`, in their order.

    Args:
        replacement: takes each of `parameters`, and others only with defaults.
        name: of the kernel, for the error.
        parameters: names, as vLLM's kernel has them.

    Raises:
        RuntimeError: it takes others, and would do something else than the kernel.
    """
    own = {
        own_name: parameter
        for own_name, parameter in inspect.signature(replacement).parameters.items()
        if own_name not in _LAUNCH_OPTIONS
    }
    unknown = [repr(p) for p in parameters if p not in own]
    absent = [
        repr(p)
        for p, parameter in own.items()
        if p not in parameters and parameter.default is parameter.empty
    ]
    if unknown or absent:
        from vllm import __version__

        what = [f"has {', '.join(unknown)}"] if unknown else []
        what += [f"lacks {', '.join(absent)}"] if absent else []
        raise RuntimeError(
            f"the kernel {name} of vLLM {__version__} {' and '.join(what)}, unlike "
            "the one that vllm-dlm replaces on a CPU"
        )
    if tuple(own) == parameters:
        return replacement

    @functools.wraps(replacement)
    def launch(*args: Any, **options: Any) -> None:
        replacement(**dict(zip(parameters, args, strict=False)), **options)

    # For vLLM, which forwards by name where it finds the kernel's own parameters.
    launch.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [own[p].replace(default=inspect.Parameter.empty) for p in parameters]
    )
    return launch


class FittedKernels(Mapping[str, Callable[..., None]]):
    """Full name of each replaced kernel, and its replacement for the installed vLLM.

    A value is made when it is asked for, which imports vLLM; KeyError for other names,
    RuntimeError where this vLLM's kernel is missing or is not the one replaced.
    """

    def __init__(self, replacements: Mapping[str, Callable[..., None]]) -> None:
        self._replacements = dict(replacements)

    def __getitem__(self, name: str) -> Callable[..., None]:
        replacement = self._replacements[name]
        return fit(replacement, name, kernel_parameters(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._replacements)

    def __len__(self) -> int:
        return len(self._replacements)

    def problems(self) -> dict[str, str]:
        """One sentence for each name whose kernel cannot be replaced."""
        found = {}
        for name in self:
            try:
                self[name]
            except RuntimeError as error:
                found[name] = str(error)
        return found


def refusal(problem: str) -> Callable[..., None]:
    """A kernel that ends the launch with `problem`: better than a wrong result."""

    def launch(*args: Any, **options: Any) -> None:
        raise RuntimeError(f"{problem}; `vllm-dlm doctor` lists all that does not fit")

    return launch
