"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

    def text(self) -> bytes:
        """The counters in Prometheus' text format."""
        return generate_latest(self.registry)
