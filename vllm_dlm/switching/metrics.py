# SPDX-License-Identifier: Apache-2.0
"""What a pair's server shows on `/metrics`: both engines, and who wrote how much.

vLLM makes its metrics for one engine a process: a second one would remove the first
one's. Here each engine has a registry of its own, and `/metrics` shows them together;
the label `model_name` tells them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import CollectorRegistry
from vllm.v1.metrics.loggers import PrometheusStatLogger

if TYPE_CHECKING:
    from vllm_dlm.switching.text import Text


class _Counters:
    """The metrics of a process. vLLM removes collectors with "vllm" in their names."""

    def __init__(self) -> None:
        counter = prometheus_client.Counter
        self.tokens = counter("dlm:pair_tokens", "Tokens written.", ["model"])
        self.prefill = counter(
            "dlm:pair_prefill_tokens",
            "Tokens before a turn that its model had to compute.",
            ["model"],
        )
        self.cached = counter(
            "dlm:pair_cached_tokens",
            "Tokens before a turn that were in its model's prefix cache.",
            ["model"],
        )
        self.switches = counter("dlm:pair_switches", "Changes of the model.")


_counters = functools.cache(_Counters)


def count_text(text: Text) -> None:
    """Count a text that is finished, or was left."""
    counters = _counters()
    segments = text.segments
    for segment in segments:
        counters.tokens.labels(segment.model).inc(segment.tokens)
        counters.prefill.labels(segment.model).inc(segment.prefill_tokens)
        counters.cached.labels(segment.model).inc(segment.cached_tokens)
    counters.switches.inc(max(0, len(segments) - 1))


class _BothEngines:
    """A collector: the metrics of all registries, each name once."""

    def __init__(self) -> None:
        self.registries: list[CollectorRegistry] = []
        prometheus_client.REGISTRY.register(self)

    def describe(self) -> Iterable[Any]:
        """Describe nothing: the collector is registered before anything is counted."""
        return []

    def collect(self) -> Iterable[Any]:
        """Metrics of one name belong together in Prometheus' text format."""
        families: dict[str, Any] = {}
        for registry in self.registries:
            for family in registry.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    # What names no model may be the same of both.
                    new = [each for each in family.samples if each not in known.samples]
                    known.samples.extend(new)
        return families.values()


_both_engines = functools.cache(_BothEngines)


class PairStatLogger(PrometheusStatLogger):
    """vLLM's metrics of an engine, in a registry of its own."""

    def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
        registry = CollectorRegistry()
        for kind in ("gauge", "counter", "histogram"):
            metric = getattr(prometheus_client, kind.capitalize())
            in_registry = functools.partial(metric, registry=registry)
            setattr(self, f"_{kind}_cls", in_registry)
        super().__init__(vllm_config, engine_indexes)
        _both_engines().registries.append(registry)
