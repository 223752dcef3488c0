"""What the server counts, for Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from orogen.infer.pages import Pool
from orogen.infer.prefix import Prefix
from orogen.infer.schedule import Scheduler

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Measures:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry, "namespace": "orogen"}
        self.waiting = Gauge("requests_waiting", "Requests without a first token yet.", **kept)
        self.running = Gauge("requests_running", "Requests that have begun to answer and go on.", **kept)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of the prompts that were taken.", **kept)
        self.tokens = Counter("generation_tokens", "Tokens that were generated.", **kept)
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_FIRST, **kept
        )
        self.between = Histogram(
            "inter_token_seconds", "Between tokens of a request; those of a step share its time.", buckets=_BETWEEN,
             **kept
        )  # fmt: skip
        self.finished = Counter("requests_finished", "Requests by why they ended.", ["reason"], **kept)
        self.responses = Counter("http_responses", "Responses by route and status.", ["route", "status"], **kept)

    def watch(self, scheduler: Callable[[], Scheduler]) -> None:
        """Adds what an engine's requests and its prefix cache hold. Each number is read from another thread's state, so
        that two of them may be of different moments. scheduler: gives the engine's, which other weights replace."""
        slots = lambda: sum(len(rank.slots) for rank in scheduler().ranks)  # noqa: E731
        self._gauge("slots", "Requests that can run at a time.", slots)
        self._gauge("slots_used", "Slots that have a request.", lambda: scheduler().occupied)
        for what in ("pages", "snapshots"):
            self._watch_pools(what, scheduler)

    def _watch_pools(self, what: str, scheduler: Callable[[], Scheduler]) -> None:
        def pools() -> list[Pool]:
            return [pool for rank in scheduler().ranks if (pool := getattr(rank, what)) is not None]

        def cached() -> int:
            return _evictable([rank.prefix for rank in scheduler().ranks if rank.prefix is not None], what)

        used = lambda: sum(pool.count - pool.free for pool in pools())  # noqa: E731
        self._gauge(what, f"Room for {what} of caches, over all data ranks.", lambda: sum(p.count for p in pools()))
        self._gauge(f"{what}_cached", f"Those {what} that only the prefix cache keeps.", cached)
        self._gauge(f"{what}_held", f"Those {what} that requests have.", lambda: used() - cached())

    def _gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        Gauge(name, help, registry=self.registry, namespace="orogen").set_function(value)

    def text(self) -> bytes:
        """The counters in Prometheus' text format."""
        return generate_latest(self.registry)


def _evictable(caches: Sequence[Prefix], what: str) -> int:
    return sum(getattr(cache, f"evictable_{what}") for cache in caches)
