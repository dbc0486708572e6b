"""Tokens per second of the engine against transformers, on one model in memory, both in this process.

One stream against `generate`; eight that come at once against its continuous batching, with the same tokens; and
arrivals spread over time against static batching, which takes whoever waits as one batch, when the last one has ended.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.report import Report
from benchmarks.serve_peers import Peer, Request
from sllm_actor.cli.show import out
from sllm_actor.domain import EngineLimits, Sampling
from sllm_actor.engine.generation import Generation
from sllm_actor.engine.runner import Runner
from sllm_actor.testing.shapes import OPT_125M
from sllm_actor.units import GIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES = {"opt-125m": ("opt", OPT_125M), "llama-60m": ("llama", LLAMA)}
LIMITS = EngineLimits(slots=16, kv_cache_bytes=4 * GIB, prefill_chunk_tokens=256)
STREAMS = 8
ARRIVALS, BATCH = 16, 8
# A request comes when this many tokens of a single stream would have been computed.
SPACING_TOKENS = 12


class Load(NamedTuple):
    """Prompts and how many tokens each is answered with."""

    one: list[Request]
    eight: list[Request]
    spread: list[Request]


def run(report: Report, repeats: int, tiny: bool) -> None:
    """Measure both shapes, ours and theirs in turns."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name, (kind, shape) in SHAPES.items():
        torch.manual_seed(20261121)
        config = AutoConfig.for_model(kind, **(shape | ({"num_hidden_layers": 2} if tiny else {})))
        theirs: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
        theirs.requires_grad_(False)
        theirs.generation_config.eos_token_id = None
        ours = _same_weights(theirs)
        times: dict[str, list[float]] = {}
        for repeat in range(repeats + 1):  # The first is not counted: it warms caches and threads.
            found = _repeat(ours, Peer(theirs), _load(config.vocab_size, repeat, tiny))
            if repeat:
                for part, value in found.items():
                    times.setdefault(part, []).append(value)
            out.print(f"{repeat}/{repeats} {name} " + ", ".join(f"{part} {value:.2f}" for part, value in found.items()))
        _write(report, name, times)


def _same_weights(theirs: PreTrainedModel) -> PreTrainedModel:
    """Make a model of ours that looks at the same tensors."""
    config = type(theirs.config)(**theirs.config.to_dict())
    with torch.device("meta"):
        ours: PreTrainedModel = type(theirs)._from_config(config, attn_implementation="slots")
    ours.load_state_dict(theirs.state_dict(), strict=False, assign=True)
    ours.tie_weights()
    for place, module in ours.named_modules():
        for buffer in module._non_persistent_buffers_set:
            setattr(module, buffer, getattr(theirs.get_submodule(place), buffer))
    return ours.eval()


def _load(vocabulary: int, seed: int, tiny: bool) -> Load:
    dice = random.Random(seed)

    def request(prompt_tokens: int, new_tokens: int) -> Request:
        scale = 4 if tiny else 1
        prompt = [dice.randrange(3, vocabulary) for _ in range(prompt_tokens // scale)]
        return Request(prompt, max(2, new_tokens // scale))

    return Load(
        one=[request(64, 64)],
        eight=[request(dice.randrange(16, 192), 48) for _ in range(STREAMS)],
        spread=[request(dice.randrange(16, 128), dice.choice((16, 24, 32, 96))) for _ in range(ARRIVALS)],
    )


def _repeat(model: PreTrainedModel, peer: Peer, load: Load) -> dict[str, float]:
    found: dict[str, float] = {}
    found["one_s"], answers = _timed(lambda: _all_at_once(model, load.one))
    found["generate_s"], wanted = _timed(lambda: [peer.generate(load.one[0])])
    assert answers == wanted, "one stream differs from generate"
    found["eight_s"], answers = _timed(lambda: _all_at_once(model, load.eight))
    found["continuous_s"], wanted = peer.continuous(load.eight)
    assert answers == wanted, "eight streams differ from continuous batching"
    spacing_s = SPACING_TOKENS * found["generate_s"] / load.one[0].new_tokens
    due = [spacing_s * place for place in range(len(load.spread))]
    ours = _spread(model, load.spread, due)
    theirs = peer.static(load.spread, due, BATCH)
    for name, served in (("ours", ours), ("static", theirs)):
        found[f"{name}_wait_s"] = statistics.mean(end - begin for end, begin in zip(served, due, strict=True))
        found[f"{name}_all_s"] = max(served)
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin_s = time.perf_counter()
    result = work()
    return time.perf_counter() - begin_s, result


def _begin(runner: Runner, request: Request) -> Generation:
    return runner.begin(
        request.prompt, Sampling(max_tokens=request.new_tokens, temperature=0.0, top_p=1.0, seed=0, ignore_eos=True)
    )


def _runner(model: PreTrainedModel) -> Runner:
    return Runner(model, (), int(model.config.max_position_embeddings), LIMITS)


def _all_at_once(model: PreTrainedModel, requests: Sequence[Request]) -> list[list[int]]:
    runner = _runner(model)
    generations = [_begin(runner, request) for request in requests]
    while runner.busy:
        runner.step()
    return [generation.tokens for generation in generations]


def _spread(model: PreTrainedModel, requests: Sequence[Request], due: Sequence[float]) -> list[float]:
    """Give the second at which each answer was whole."""
    runner, begin_s = _runner(model), time.perf_counter()
    running: dict[Generation, int] = {}
    ended = [0.0] * len(requests)
    coming = 0
    while coming < len(requests) or runner.busy:
        now_s = time.perf_counter() - begin_s
        while coming < len(requests) and due[coming] <= now_s:
            running[_begin(runner, requests[coming])] = coming
            coming += 1
        if not runner.busy:
            time.sleep(max(0.0, due[coming] - now_s))
            continue
        for generation in runner.step().advanced:
            if generation.finish is not None:
                ended[running[generation]] = time.perf_counter() - begin_s
    return ended


def _write(report: Report, name: str, times: dict[str, list[float]]) -> None:
    for part, values in times.items():
        report.row(
            shape=name, measured=part.removesuffix("_s"), unit="s", median=round(statistics.median(values), 3),
            min=round(min(values), 3), max=round(max(values), 3), n=len(values),
        )  # fmt: skip

    def ratio(over: str, under: str) -> list[float]:
        return [above / below for above, below in zip(times[over], times[under], strict=True)]

    report.ratio(f"{name}.one_stream.over_generate", ratio("generate_s", "one_s"))
    report.ratio(f"{name}.eight_streams.over_continuous_batching", ratio("continuous_s", "eight_s"))
    report.ratio(f"{name}.staggered.over_static", ratio("static_wait_s", "ours_wait_s"))
    report.ratio(f"{name}.staggered.rate_over_static", ratio("static_all_s", "ours_all_s"))
