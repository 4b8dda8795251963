"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine import Engine
from server.outcomes import BatchReport, Reply

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FILL = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The numbers of one server, in a registry of its own. Labels have few values: routes, codes and reasons."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dvpo_requests", "Requests answered.", ["route", "code"], registry=self.registry)
        self.rejected = Counter("dvpo_rejected", "Requests refused.", ["reason"], registry=self.registry)
        self._queue = Histogram(
            "dvpo_queue_seconds", "Waiting time of a request.", buckets=_SECONDS, registry=self.registry
        )
        self._inference = Histogram(
            "dvpo_inference_seconds",
            "Time of the batches a request was in.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "dvpo_tokens", "Tokens scored; cached ones among the prompt's.", ["kind"], registry=self.registry
        )
        self._cache = Counter(
            "dvpo_prompt_cache", "Texts whose prompt was kept, or not.", ["outcome"], registry=self.registry
        )
        self._batches = Counter("dvpo_batches", "Batches run.", ["outcome"], registry=self.registry)
        self._fill = Histogram(
            "dvpo_batch_fill", "Share of the token budget that a batch used.", buckets=_FILL, registry=self.registry
        )
        self._waiting = Gauge("dvpo_waiting", "What waits to be scored.", ["what"], registry=self.registry)

    def batch(self, report: BatchReport) -> None:
        """Takes a batch as run."""
        self._batches.labels("failed" if report.failed else "done").inc()
        self._fill.observe(report.fill)

    def scored(self, reply: Reply, prompt_tokens: int, response_tokens: int) -> None:
        """Takes a scored request."""
        self._queue.observe(reply.queue_seconds)
        self._inference.observe(reply.inference_seconds)
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("response").inc(response_tokens)
        self._tokens.labels("cached").inc(sum(s.cached_tokens for s in reply.scored))
        hits = sum(s.cached_tokens > 0 for s in reply.scored)
        self._cache.labels("hit").inc(hits)
        self._cache.labels("miss").inc(len(reply.scored) - hits)

    def text(self, engine: Engine) -> bytes:
        """The page that Prometheus reads."""
        stats = engine.stats()
        self._waiting.labels("items").set(stats.waiting_items)
        self._waiting.labels("tokens").set(stats.waiting_tokens)
        return generate_latest(self.registry)
