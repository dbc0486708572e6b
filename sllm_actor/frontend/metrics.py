"""What `/metrics` shows of requests: vLLM's names and buckets under `sllm:`, so that its dashboards fit.

Source of the names: vLLM's production metrics (docs, "Production Metrics").
"""

from __future__ import annotations

from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

from sllm_actor.frontend.visit import Visit

MAX_MODELS = 200
OTHER = "other"
METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
MODEL = ("model_name",)


class ModelMetrics(NamedTuple):
    """The metrics of one model."""

    first_token: Histogram
    between_tokens: Histogram
    per_token: Histogram
    whole: Histogram
    prompt_size: Histogram
    answer_size: Histogram
    prompt_tokens: Counter
    generated_tokens: Counter


class Metrics:
    """Owns the registry, which is no global one, and the metrics of requests in it."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._families = ModelMetrics(
            first_token=self._histogram("time_to_first_token", "From a request's arrival to its first text.", TTFT_S),
            between_tokens=self._histogram("inter_token_latency", "Between the tokens of an answer.", TOKEN_S),
            per_token=self._histogram("time_per_output_token", "Mean of an answer, its first token left out.", TOKEN_S),
            whole=self._histogram("e2e_request_latency", "From a request's arrival to its answer's end.", REQUEST_S),
            prompt_size=Histogram(
                "sllm:request_prompt_tokens", "Prompts.", MODEL, buckets=TOKENS, registry=registry
            ),
            answer_size=Histogram(
                "sllm:request_generation_tokens", "Answers.", MODEL, buckets=TOKENS, registry=registry
            ),
            prompt_tokens=Counter("sllm:prompt_tokens", "Tokens of prompts.", MODEL, registry=registry),
            generated_tokens=Counter("sllm:generation_tokens", "Tokens of answers.", MODEL, registry=registry),
        )  # fmt: skip
        self._success = Counter(
            "sllm:request_success", "Answers that ended: stop, length, or abort where the client left.",
            (*MODEL, "finished_reason"), registry=registry,
        )  # fmt: skip
        self._rejected = Counter(
            "sllm:requests_rejected", "Requests answered by an error.", ("reason",), registry=registry
        )
        self._http = Counter("sllm:http_requests", "Requests.", ("method", "route", "status"), registry=registry)
        self._models: dict[str, ModelMetrics] = {}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sllm:{name}_seconds", text, MODEL, buckets=buckets, registry=self.registry)

    def of(self, model: str) -> ModelMetrics:
        """Give the metrics of a model; those of models beyond `MAX_MODELS` are one."""
        name = self._label(model)
        if name not in self._models:
            labelled: list[Any] = [family.labels(name) for family in self._families]
            self._models[name] = ModelMetrics(*labelled)
        return self._models[name]

    def models(self) -> list[str]:
        """List the models that have metrics."""
        return list(self._models)

    def _label(self, model: str) -> str:
        return model if model in self._models or len(self._models) < MAX_MODELS else OTHER

    def note(self, visit: Visit) -> None:
        """Take in a request that has ended."""
        method = visit.method if visit.method in METHODS else OTHER
        self._http.labels(method, visit.route, str(visit.status)).inc()
        if visit.code:
            self._rejected.labels(visit.code).inc()
        if not visit.prompt_tokens:
            return
        model = self.of(visit.model)
        model.prompt_tokens.inc(visit.prompt_tokens)
        model.generated_tokens.inc(visit.generated_tokens)
        if not visit.finish:
            return
        self._success.labels(self._label(visit.model), visit.finish).inc()
        model.prompt_size.observe(visit.prompt_tokens)
        model.answer_size.observe(visit.generated_tokens)
        model.whole.observe(visit.end_s - visit.begin_s)
        if visit.generated_tokens > 1:
            model.per_token.observe((visit.last_token_s - visit.first_token_s) / (visit.generated_tokens - 1))
