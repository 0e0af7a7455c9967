"""What is counted and timed, for Prometheus."""

from collections.abc import Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of a server, each described where it is made."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry = CollectorRegistry()
        self.requests = Counter("tangram_requests", "Requests answered, by HTTP status.", ["status"], registry=registry)
        self.cancelled = Counter("tangram_cancelled", "Texts whose client went away.", registry=registry)
        self.tokens = Counter("tangram_tokens", "Tokens made.", registry=registry)
        self.prompt_tokens = Counter("tangram_prompt_tokens", "Tokens of prompts taken up.", registry=registry)
        self.waiting = Gauge("tangram_waiting", "Texts that wait for a place.", registry=registry)
        self.running = Gauge("tangram_running", "Texts that workers have.", registry=registry)
        self.workers = Gauge("tangram_workers", "Workers that are ready.", registry=registry)
        self.deaths = Counter("tangram_worker_deaths", "Workers that died.", registry=registry)
        self.cache_bytes = Gauge("tangram_cache_bytes", "Bytes that the trunk's caches hold.", registry=registry)
        self.rounds = Counter("tangram_rounds", "Forwards of the trunk for a text.", registry=registry)
        self.offered = Counter(
            "tangram_drafts_offered", "Drafts whose predecessors were kept.", ["depth"], registry=registry
        )
        self.accepted = Counter("tangram_drafts_accepted", "Drafts that were kept.", ["depth"], registry=registry)
        self.first_token = Histogram(
            "tangram_first_token_seconds",
            "From arrival to the first token of a text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request = Histogram(
            "tangram_request_seconds", "Until a request's last byte.", buckets=_SECONDS, registry=registry
        )

    def drafted(self, offered: Sequence[int], accepted: Sequence[int]) -> None:
        """Count drafts of every depth."""
        for depth, (more, kept) in enumerate(zip(offered, accepted, strict=True), start=1):
            self.offered.labels(str(depth)).inc(more)
            self.accepted.labels(str(depth)).inc(kept)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
