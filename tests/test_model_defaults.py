"""What a model says of its own sampling (generation_config.json) holds where a request is silent, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sllm_actor.checkpoint.model_config import ModelConfig, read_model_config
from sllm_actor.domain import Model, ModelName
from sllm_actor.errors import CheckpointConfigInvalid
from sllm_actor.frontend.schema import ChatRequest, CompletionRequest, parse
from sllm_actor.frontend.wishes import sampling_of
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess

CONFIG = {"vocab_size": 100, "max_position_embeddings": 64}
OWN = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "max_new_tokens": 7, "temperature": 0.7, "top_p": 0.8}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "x"}


def facts(folder: Path, generation: dict[str, Any]) -> ModelConfig:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(folder, CONFIG)


def model(**defaults: Any) -> Model:
    return Model(
        name=ModelName("m"), path="", fingerprint="1", architecture="", dtype="F32", size_bytes=1, host_bytes=1,
        context_tokens=64, vocabulary_tokens=100, eos_token_ids=(), chat=True, keep_alive_s=1.0, registered_wall_s=0.0,
        **{"default_temperature": 1.0, "default_top_p": 1.0} | defaults,
    )  # fmt: skip


def chat(of: Model, **options: Any) -> Any:
    return sampling_of(of, 4, parse(json.dumps(CHAT | options).encode(), ChatRequest))


def test_all_that_a_model_names_is_read_and_nothing_else_is_made_up(tmp_path: Path) -> None:
    read = facts(tmp_path, OWN)
    assert (read.default_top_k, read.default_min_p) == (20, 0.1)
    assert (read.default_repetition_penalty, read.default_max_tokens) == (1.05, 7)
    for silent in ({}, dict.fromkeys(OWN), {"top_k": -1}):
        read = facts(tmp_path, silent)
        assert (read.default_top_k, read.default_min_p) == (0, 0.0), "50 is transformers' default, not the model's"
        assert (read.default_repetition_penalty, read.default_max_tokens) == (1.0, None)


def test_a_model_that_is_greedy_draws_from_nothing_but_keeps_its_penalty(tmp_path: Path) -> None:
    read = facts(tmp_path, OWN | {"do_sample": False})
    assert (read.default_temperature, read.default_top_k, read.default_min_p) == (0.0, 0, 0.0)
    assert (read.default_repetition_penalty, read.default_max_tokens) == (1.05, 7)


@pytest.mark.parametrize(
    "wrong", [{"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": 0}, {"top_k": 1.5}]
)
def test_a_default_that_is_absurd_is_refused_with_the_file(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointConfigInvalid, match=r"generation_config\.json"):
        facts(tmp_path, wrong)


def test_a_requests_own_values_go_above_the_models() -> None:
    own = model(default_top_k=20, default_min_p=0.1, default_repetition_penalty=1.05, default_max_tokens=7)
    silent = chat(own)
    assert (silent.top_k, silent.min_p, silent.repetition_penalty, silent.max_tokens) == (20, 0.1, 1.05, 7)
    said = chat(own, top_k=-1, min_p=0, repetition_penalty=1, max_tokens=9)
    assert (said.top_k, said.min_p, said.repetition_penalty, said.max_tokens) == (0, 0.0, 1.0, 9)


def test_the_models_length_is_bound_by_the_context_and_is_none_of_completions() -> None:
    own = model(default_max_tokens=1000)
    assert chat(own).max_tokens == 60
    assert sampling_of(own, 4, parse(json.dumps(PLAIN).encode(), CompletionRequest)).max_tokens == 16


def test_a_registration_from_before_these_were_known_is_read() -> None:
    stored = msgspec.to_builtins(model())
    for name in ("default_top_k", "default_min_p", "default_repetition_penalty", "default_max_tokens"):
        del stored[name]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stored), type=Model) == model()


def test_a_node_answers_within_the_models_own_length(node: NodeProcess, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(BUILTIN["demo"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 3}))
    node.deploy(folder, "short")
    try:
        messages = [{"role": "user", "content": "What is 47 + 35?"}]
        answered = node.call("POST", "/v1/chat/completions", {"model": "short", "messages": messages})
        assert (answered["usage"]["completion_tokens"], answered["choices"][0]["finish_reason"]) == (3, "length")
        assert node.chat("short", "What is 47 + 35?", max_tokens=30) == "47 + 35 = 82"
    finally:
        node.call("DELETE", "/admin/models/short")
