"""`/v1/embeddings` of a real node: what clients may ask, and what they are told."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_models import NORMALIZE, POOLING, TRANSFORMER, save_layout, save_sentence_model, save_tokenizer
from tiny_models import VOCABULARY_TOKENS, change_config, save_model
from transformers import AutoModel, AutoTokenizer

from sllm_actor.cli.show import purpose_of
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess

PATH = "/v1/embeddings"
SENTENCES = ["the cat sleeps", "a red car", "the dog runs and runs and runs and runs", "the cat sleeps", "slow"]


@pytest.fixture(scope="module")
def bert(node: NodeProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny encoder in sentence-transformers' layout, deployed as `bert`."""
    folder = save_sentence_model(tmp_path_factory.mktemp("models") / "bert", matryoshka_dimensions=[8, 16])
    node.deploy(folder, "bert")
    yield folder
    node.call("DELETE", "/admin/models/bert")


def embed(node: NodeProcess, given: Any, model: str = "bert", **options: Any) -> list[list[float]]:
    answer = node.call("POST", PATH, {"model": model, "input": given, **options})
    assert answer["object"] == "list"
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    return [item["embedding"] for item in answer["data"]]


def error_of(node: NodeProcess, given: Any, path: str = PATH, **options: Any) -> tuple[int, str | None, str]:
    body = {"model": "bert"} | ({"input": given} if path == PATH else given) | options
    reply = node.request("POST", path, body)
    error = reply.json()["error"]
    return reply.status, error["param"], error["message"]


def mean_of(folder: Path, sentences: list[str]) -> torch.Tensor:
    """What sentence-transformers computes: the mean over the tokens, of length one."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for sentence in sentences:
        with torch.inference_mode():
            rows.append(model(torch.tensor([tokenizer.encode(sentence.lower())])).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def test_vectors_are_those_of_the_formula_in_the_order_of_the_texts(node: NodeProcess, bert: Path) -> None:
    torch.testing.assert_close(torch.tensor(embed(node, SENTENCES)), mean_of(bert, SENTENCES), rtol=2e-4, atol=2e-5)


def test_concurrent_requests_have_their_own_vectors(node: NodeProcess, bert: Path) -> None:
    orders = [SENTENCES[shift:] + SENTENCES[:shift] for shift in range(5)] * 3
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda order: embed(node, order), orders))
    known = dict(zip(SENTENCES, mean_of(bert, SENTENCES), strict=True))
    for order, answer in zip(orders, answers, strict=True):
        theirs = torch.stack([known[sentence] for sentence in order])
        torch.testing.assert_close(torch.tensor(answer), theirs, rtol=2e-4, atol=2e-5)


def test_all_four_kinds_of_input_are_the_same_text(node: NodeProcess, bert: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(bert).encode(SENTENCES[0])
    answers = [embed(node, given) for given in (SENTENCES[0], [SENTENCES[0]], tokens, [tokens])]
    assert all(answer == answers[0] for answer in answers)
    assert embed(node, SENTENCES[0].upper()) == answers[0], "the model knows lower case alone"


def test_base64_is_the_same_in_little_endian_float32(node: NodeProcess, bert: Path) -> None:
    floats = embed(node, SENTENCES[:1])[0]
    text: Any = embed(node, SENTENCES[:1], encoding_format="base64")[0]
    raw = base64.b64decode(text, validate=True)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(floats)
    assert len(floats) == 32


def test_usage_counts_the_tokens_of_all_texts(node: NodeProcess, bert: Path) -> None:
    answer = node.call("POST", PATH, {"model": "bert", "input": ["the cat", "the"], "user": "someone"})
    assert answer["model"] == "bert"
    # Each text has two tokens of its own around it.
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_vectors_of_a_matryoshka_model_can_be_shorter(node: NodeProcess, bert: Path) -> None:
    short = torch.tensor(embed(node, SENTENCES, dimensions=8))
    whole = torch.tensor(embed(node, SENTENCES))[:, :8]
    torch.testing.assert_close(short, torch.nn.functional.normalize(whole, dim=1), rtol=2e-4, atol=2e-5)
    status, param, message = error_of(node, "the cat", dimensions=9)
    assert (status, param) == (400, "dimensions")
    assert "8, 16" in message
    assert error_of(node, "the cat", model="demo", dimensions=8)[:2] == (400, "dimensions")


def test_a_model_that_generates_embeds_by_its_last_token(node: NodeProcess) -> None:
    texts = [[1, 2, 3], list(range(1, 60)), [5]]
    model = AutoModel.from_pretrained(BUILTIN["demo"]).eval()
    with torch.inference_mode():
        rows = [model(torch.tensor([text])).last_hidden_state[0, -1].float() for text in texts]
    theirs = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    torch.testing.assert_close(torch.tensor(embed(node, texts, "demo")), theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("", "input"),
        ([], "input"),
        ([""], "input[0]"),
        ([[]], "input[0]"),
        (["a", [1]], None),
        (["a", 1], "input[1]"),
        ([-1], "input[0]"),
        ([1, VOCABULARY_TOKENS], "input"),
        ([[1], [VOCABULARY_TOKENS]], "input[1]"),
        (["a"] * 2049, "input"),
        ({"text": "a"}, "input"),
        ([1.5], "input[0]"),
    ],
)
def test_inputs_that_are_none_are_refused_by_their_place(
    node: NodeProcess, bert: Path, given: Any, param: str | None
) -> None:
    if param is None:
        assert len(embed(node, given)) == 2, "texts and token ids of texts may stand together"
        return
    status, named, _ = error_of(node, given)
    assert (status, named) == (400, param)


def test_a_text_that_is_too_long_is_refused_with_both_numbers(node: NodeProcess, bert: Path) -> None:
    assert len(embed(node, "cat " * 14)) == 1
    status, param, message = error_of(node, ["cat", "cat " * 15])
    assert (status, param) == (400, "input[1]")
    assert "17 tokens" in message
    assert "at most 16" in message


def test_what_is_not_supported_is_named(node: NodeProcess, bert: Path) -> None:
    assert error_of(node, "a", truncate_prompt_tokens=3)[:2] == (400, "truncate_prompt_tokens")
    assert error_of(node, "a", encoding_format="int8")[:2] == (400, "encoding_format")
    assert error_of(node, "a", model="absent")[0] == 404


def test_a_model_that_embeds_alone_answers_nothing_else(node: NodeProcess, bert: Path) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "the cat"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the cat"}]}),
    ):
        status, param, message = error_of(node, body, path)
        assert (status, param) == (400, "model")
        assert PATH in message


def test_a_request_has_a_timeline_and_is_counted(node: NodeProcess, bert: Path) -> None:
    reply = node.request("POST", PATH, {"model": "bert", "input": SENTENCES}, {"X-Request-Id": "of-vectors"})
    assert reply.status == 200
    timeline = node.call("GET", "/admin/requests/of-vectors")
    assert {"text", "embed"} <= {span["name"] for span in timeline["spans"]}
    assert (timeline["outcome"], timeline["generated_tokens"]) == ("finished", 0)
    shown = node.request("GET", "/metrics").body.decode()
    assert 'sllm:request_success_total{finished_reason="stop",model_name="bert"}' in shown
    assert 'route="/v1/embeddings"' in shown


def test_a_cold_model_is_started_and_a_stopped_one_started_again(node: NodeProcess, bert: Path) -> None:
    first = embed(node, SENTENCES)
    node.call("POST", "/admin/models/bert/unload")
    assert embed(node, SENTENCES) == first


def test_a_deadline_ends_a_request_and_nothing_of_it_goes_on(node: NodeProcess, bert: Path) -> None:
    body = {"model": "bert", "input": ["the cat sleeps"] * 2000}
    assert node.request("POST", PATH, body, {"X-Request-Timeout": "1ms"}).status == 504
    assert len(embed(node, SENTENCES)) == len(SENTENCES)


def test_the_official_client_gets_its_vectors(node: NodeProcess, bert: Path) -> None:
    script = Path(__file__).with_name("openai_embeddings_client.py")
    ran = subprocess.run(
        [sys.executable, script, node.url, "bert", json.dumps(SENTENCES)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["base64"] == pytest.approx(embed(node, SENTENCES)[0])
    assert seen["float"] == pytest.approx(seen["base64"])
    assert seen["unsupported"] == "dimensions"


def test_deploying_says_what_the_model_is_for(node: NodeProcess, bert: Path, tmp_path: Path) -> None:
    command = [str(CLI), "deploy", str(bert), "--name", "bert", "--url", node.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "for embeddings: 32 dimensions, pooling mean, normalized, texts of at most 16 tokens" in ran.stdout
    assert purpose_of({"generates": True, "embedding": None}) == ""


def test_models_that_would_be_embedded_wrongly_are_refused(node: NodeProcess, tmp_path: Path) -> None:
    folder = save_tokenizer(save_model(tmp_path / "dense", "BertModel"))
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    save_layout(folder, {"pooling_mode": "mean"}, modules=[TRANSFORMER, POOLING, dense, NORMALIZE])
    reply = node.request("POST", "/admin/models", {"source": str(folder), "name": "refused"})
    assert (reply.status, reply.json()["error"]["code"]) == (400, "unsupported_architecture")
    assert "Dense" in reply.json()["error"]["message"]
    save_layout(folder, {"pooling_mode": "mean"})
    change_config(folder, is_decoder=True)
    reply = node.request("POST", "/admin/models", {"source": str(folder), "name": "refused"})
    assert "is a decoder" in reply.json()["error"]["message"]
