"""Vectors of every architecture are those of transformers' own forward pass and the pooling formula."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONTEXT_TOKENS, LIMITS, attach, change_config, change_tensors, greedy, prompt_of, save_model
from transformers import AutoModel

from sllm_actor.domain import Embedding, EngineLimits, ModelName, Pooling, RequestId
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.engine.architectures import BASES, ENCODERS, MODULES
from sllm_actor.engine.embedding_jobs import EmbeddingJobs
from sllm_actor.engine.encoder import EncoderRunner
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import CheckpointInvalid, UnsupportedArchitecture
from sllm_actor.messages.embedding import Embed, Embedded
from sllm_actor.messages.engine import GenerationError
from sllm_actor.messages.generation import Finished
from sllm_actor.runtime.clock import SystemClock

# One token, less than a chunk, and several chunks; the longest is neither first nor last.
TEXTS = [prompt_of(size, seed) for seed, size in enumerate((5, 1, 90, 17, 33, 5))]


def embedding(pooling: Pooling = Pooling.MEAN, *, normalize: bool = True) -> Embedding:
    return Embedding(pooling=pooling, normalize=normalize, dimensions=32, max_tokens=CONTEXT_TOKENS)


def ask(texts: Sequence[Sequence[int]], name: str = "one", dimensions: int = 0) -> Embed:
    return Embed(
        request_id=RequestId(name),
        model=ModelName("tiny"),
        prompt=b"".join(map(pack_uint32, texts)),
        sizes=pack_uint32(map(len, texts)),
        dimensions=dimensions,
    )


def runner_of(model: Any, limits: EngineLimits = LIMITS) -> Runner | EncoderRunner:
    if type(model).__name__ in ENCODERS:
        return EncoderRunner(model, CONTEXT_TOKENS, limits)
    return Runner(model, (), CONTEXT_TOKENS, limits)


def drive(runner: Runner | EncoderRunner, jobs: EmbeddingJobs) -> list[Any]:
    """Step as the engine process does until no text is left; give all that was said."""
    said: list[Any] = []
    while jobs.busy:
        said += jobs.feed()
        if runner.busy:
            said += jobs.tell(runner.step(), 0.0)
    return said


def vectors_of(said: Sequence[Any], name: str = "one") -> torch.Tensor:
    found = {item.index: item.vector for item in said if isinstance(item, Embedded) and item.request_id == name}
    assert [item.request_id for item in said if isinstance(item, Finished)].count(RequestId(name)) == 1
    return torch.stack([torch.frombuffer(bytearray(found[index]), dtype=torch.float32) for index in range(len(found))])


def embed(model: Any, texts: Sequence[Sequence[int]], how: Embedding, dimensions: int = 0) -> torch.Tensor:
    runner = runner_of(model)
    jobs = EmbeddingJobs(runner, how, SystemClock())
    jobs.take(ask(texts, dimensions=dimensions))
    return vectors_of(drive(runner, jobs))


def expected(folder: Path, texts: Sequence[Sequence[int]], how: Embedding) -> torch.Tensor:
    """transformers' own loading and forward pass, text by text, and the formulas of sentence-transformers."""
    model = AutoModel.from_pretrained(folder, dtype="auto").eval()
    rows = []
    for text in texts:
        with torch.inference_mode():
            hidden = model(torch.tensor([text])).last_hidden_state[0].float()
        rows.append(
            {
                Pooling.CLS: hidden[0], Pooling.LAST: hidden[-1], Pooling.MAX: hidden.max(0).values,
                Pooling.MEAN: hidden.mean(0), Pooling.MEAN_SQRT_LEN: hidden.sum(0) / len(text) ** 0.5,
            }[how.pooling]
        )  # fmt: skip
    stacked = torch.stack(rows)
    return torch.nn.functional.normalize(stacked, dim=1) if how.normalize else stacked


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("architecture", sorted(MODULES | ENCODERS))
def test_vectors_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "model", architecture)
    how = embedding()
    ours = embed(attach(folder), TEXTS, how)
    assert_same(ours, expected(folder, TEXTS, how))
    assert not torch.allclose(ours[0], ours[5], atol=1e-3), "texts of the same length differ"


@pytest.mark.parametrize("architecture", sorted(BASES))
def test_a_model_without_a_head_embeds(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "model", architecture)
    how = embedding(Pooling.LAST)
    assert_same(embed(attach(folder), TEXTS, how), expected(folder, TEXTS, how))


def test_a_checkpoint_with_a_head_is_built_without_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "Qwen3ForCausalLM")
    model = attach(folder, generates=False)
    assert type(model).__name__ == "Qwen3Model"
    how = embedding(Pooling.LAST)
    assert_same(embed(model, TEXTS, how), expected(folder, TEXTS, how))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("architecture", ["BertModel", "LlamaModel"])
def test_every_pooling_is_its_formula(tmp_path: Path, architecture: str, pooling: Pooling, normalize: bool) -> None:
    folder = save_model(tmp_path / "model", architecture)
    how = embedding(pooling, normalize=normalize)
    assert_same(embed(attach(folder), TEXTS, how), expected(folder, TEXTS, how))


def test_a_shortened_vector_is_the_beginning_made_of_length_one(tmp_path: Path) -> None:
    model = attach(save_model(tmp_path / "model", "BertModel"))
    whole, short = embed(model, TEXTS, embedding()), embed(model, TEXTS, embedding(), dimensions=8)
    assert_same(short, torch.nn.functional.normalize(whole[:, :8], dim=1))


@pytest.mark.parametrize("architecture", ["BertModel", "LlamaForCausalLM"])
def test_requests_at_once_and_generations_beside_them_change_nothing(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "model", architecture)
    how = embedding()
    runner = runner_of(attach(folder))
    jobs = EmbeddingJobs(runner, how, SystemClock())
    jobs.take(ask(TEXTS, "one"))
    jobs.take(ask(TEXTS[::-1], "two"))
    alone = []
    if isinstance(runner, Runner):
        generation = runner.begin(TEXTS[2], greedy(20))
        by_itself = Runner(attach(folder), (), CONTEXT_TOKENS, LIMITS)
        other = by_itself.begin(TEXTS[2], greedy(20))
        while by_itself.busy:
            by_itself.step()
        alone = other.tokens
    said = drive(runner, jobs)
    if isinstance(runner, Runner):
        while runner.busy:
            runner.step()
        assert generation.tokens == alone
    theirs = expected(folder, TEXTS, how)
    assert_same(vectors_of(said, "one"), theirs)
    assert_same(vectors_of(said, "two"), theirs.flip(0))


def test_a_generation_waits_for_no_more_than_the_texts_that_run(tmp_path: Path) -> None:
    runner = Runner(attach(save_model(tmp_path / "model", "LlamaForCausalLM")), (), CONTEXT_TOKENS, LIMITS)
    jobs = EmbeddingJobs(runner, embedding(), SystemClock())
    jobs.take(ask([prompt_of(30, seed) for seed in range(200)]))
    jobs.feed()
    jobs.tell(runner.step(), 0.0)
    generation = runner.begin(TEXTS[0], greedy(1))
    said: list[object] = []
    while generation.finish is None:
        said += jobs.feed()
        said += jobs.tell(runner.step(), 0.0)
    assert jobs.busy
    assert len(said) <= LIMITS.slots


def test_a_request_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    for architecture in ("BertModel", "LlamaForCausalLM"):
        runner = runner_of(attach(save_model(tmp_path / architecture, architecture)))
        jobs = EmbeddingJobs(runner, embedding(), SystemClock())
        jobs.take(ask(TEXTS * 20, "gone"))
        jobs.take(ask(TEXTS, "stays"))
        jobs.tell(runner.step(), 0.0) if jobs.feed() or runner.busy else None
        jobs.cancel(RequestId("gone"))
        said = drive(runner, jobs)
        assert {item.request_id for item in said if not isinstance(item, Embedded)} == {"stays"}
        assert not runner.busy


def test_a_text_that_memory_does_not_suffice_for_fails_alone(tmp_path: Path) -> None:
    model = attach(save_model(tmp_path / "model", "LlamaForCausalLM"))
    runner = Runner(model, (), CONTEXT_TOKENS, EngineLimits(slots=4, kv_cache_bytes=40_000, prefill_chunk_tokens=16))
    jobs = EmbeddingJobs(runner, embedding(), SystemClock())
    jobs.take(ask([TEXTS[2]], "large"))
    jobs.take(ask([TEXTS[3], TEXTS[4]], "small"))
    said = drive(runner, jobs)
    assert [(item.request_id, item.code) for item in said if isinstance(item, GenerationError)] == [
        ("large", "invalid_request")
    ]
    assert len(vectors_of(said, "small")) == 2


def test_a_vector_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "BertModel")
    change_tensors(folder, lambda tensors: {name: value * float("inf") for name, value in tensors.items()})
    runner = runner_of(attach(folder))
    jobs = EmbeddingJobs(runner, embedding(), SystemClock())
    jobs.take(ask(TEXTS))
    said = drive(runner, jobs)
    assert [type(item) for item in said] == [GenerationError]
    assert "not finite" in said[0].text


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel", "MPNetModel", "DistilBertModel"])
def test_checkpoints_of_other_names_fit(tmp_path: Path, architecture: str) -> None:
    """With the prefix of a model with a head, with buffers and a pooler that nobody needs, or without a pooler."""
    folder = save_model(tmp_path / "model", architecture)
    how = embedding()
    theirs = expected(folder, TEXTS, how)
    prefix = {"BertModel": "bert.", "RobertaModel": "roberta.", "MPNetModel": "mpnet."}.get(architecture, "distilbert.")
    own = {name: value for name, value in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    change_tensors(folder, lambda _: own)
    assert_same(embed(attach(folder), TEXTS, how), theirs)
    prefixed = {prefix + name: value for name, value in own.items()}
    prefixed |= {f"{prefix}embeddings.position_ids": torch.arange(CONTEXT_TOKENS)[None], "cls.bias": torch.ones(3)}
    change_tensors(folder, lambda _: prefixed)
    masked = architecture.replace("Model", "ForMaskedLM")
    change_config(folder, architectures=[masked])
    assert_same(embed(attach(folder), TEXTS, how), theirs)
    change_tensors(
        folder, lambda tensors: {name: value for name, value in tensors.items() if "0.attention" not in name}
    )
    with pytest.raises(CheckpointInvalid, match="lacks the tensor"):
        attach(folder)


def test_the_oldest_names_of_layer_norms_fit(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "BertModel")
    theirs = expected(folder, TEXTS, embedding())
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for today, before in old.items():
            tensors = {f"bert.{name}".replace(today, before).replace("bert.bert.", "bert."): value
                       for name, value in tensors.items()}  # fmt: skip
        return tensors

    change_tensors(folder, rename)
    assert_same(embed(attach(folder), TEXTS, embedding()), theirs)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("BertModel", {"is_decoder": True}),
        ("BertModel", {"position_embedding_type": "relative_key"}),
        ("LlamaModel", {"is_causal": False}),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, object]
) -> None:
    folder = save_model(tmp_path / "model", architecture)
    change_config(folder, **changes)
    with pytest.raises(UnsupportedArchitecture):
        attach(folder)
