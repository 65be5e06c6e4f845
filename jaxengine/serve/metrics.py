"""Prometheus metrics of an engine and of the requests to its server."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

COUNTERS = {
    "num_generated_tokens": "Tokens generated",
    "num_prompt_tokens": "Prompt tokens taken in",
    "num_cached_tokens": "Prompt tokens found in the prefix cache",
    "num_windows": "Decode windows run",
    "num_retractions": "Sequences preempted for pages",
}
GAUGES = {
    "num_running": "Sequences running",
    "num_waiting": "Sequences waiting",
    "num_free_pages": "KV pages free",
}
"""Entries of `Engine.stats` that are told, where the engine has them."""

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts requests; reads the engine when it is asked."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        """`stats` is `Engine.stats`."""
        self._stats = stats
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter(
            "jaxengine_requests", "Requests answered", ["path", "status"], registry=self._registry
        )
        self.aborted = Counter(
            "jaxengine_requests_aborted", "Requests whose client left", registry=self._registry
        )
        self.first_token_s = self._histogram("time_to_first_token", "Until the first token")
        self.request_s = self._histogram("request_duration", "Until the end of the answer")

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers, for the registry."""
        stats = self._stats()
        for name, what in COUNTERS.items():
            if name in stats:
                name_out = f"jaxengine_{name.removeprefix('num_')}"
                yield CounterMetricFamily(name_out, what, value=stats[name])
        for name, what in GAUGES.items():
            if name in stats:
                name_out = f"jaxengine_{name.removeprefix('num_')}"
                yield GaugeMetricFamily(name_out, what, value=stats[name])

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(
            f"jaxengine_{name}_seconds", what, buckets=SECONDS, registry=self._registry
        )
