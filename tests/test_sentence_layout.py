"""How a checkpoint embeds is read from the files of sentence-transformers, or follows from its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_models import NORMALIZE, POOLING, TRANSFORMER, save_layout

from sllm_actor.checkpoint.embedding_config import embedding_of, names_width
from sllm_actor.checkpoint.model_config import ModelConfig
from sllm_actor.checkpoint.sentence_layout import SentenceLayout, read_sentence_layout
from sllm_actor.domain import Pooling
from sllm_actor.engine.architectures import choose
from sllm_actor.errors import CheckpointConfigInvalid, UnsupportedArchitecture

DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
FACTS = ModelConfig(
    context_tokens=514,
    vocabulary_tokens=100,
    eos_token_ids=(),
    default_temperature=1.0,
    default_top_p=1.0,
    default_top_k=0,
    default_min_p=0.0,
    default_repetition_penalty=1.0,
    default_max_tokens=None,
)


def test_a_folder_without_modules_has_no_layout(tmp_path: Path) -> None:
    assert read_sentence_layout(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
        ({"pooling_mode_mean_tokens": True}, Pooling.MEAN),
        ({"pooling_mode_max_tokens": True}, Pooling.MAX),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, Pooling.MEAN_SQRT_LEN),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, Pooling.LAST),
        ({"pooling_mode": "mean"}, Pooling.MEAN),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, Pooling.MEAN_SQRT_LEN),
    ],
)
def test_pooling_is_read(tmp_path: Path, config: dict[str, Any], pooling: Pooling) -> None:
    layout = read_sentence_layout(save_layout(tmp_path, config))
    assert layout == SentenceLayout(pooling=pooling, normalize=True, max_tokens=None, lower_case=False)


def test_lengths_case_and_normalization_are_read(tmp_path: Path) -> None:
    folder = save_layout(
        tmp_path, {"pooling_mode": "cls"}, modules=[TRANSFORMER, POOLING],
        lengths={"max_seq_length": 256, "do_lower_case": True},
    )  # fmt: skip
    layout = read_sentence_layout(folder)
    assert layout == SentenceLayout(pooling=Pooling.CLS, normalize=False, max_tokens=256, lower_case=True)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls and max"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({}, "no kind"),
    ],
)
def test_another_pooling_is_refused_by_its_name(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=named):
        read_sentence_layout(save_layout(tmp_path, config))


@pytest.mark.parametrize(
    "modules", [[TRANSFORMER], [TRANSFORMER, POOLING, DENSE, NORMALIZE], [POOLING, TRANSFORMER], []]
)
def test_other_modules_are_refused(tmp_path: Path, modules: list[dict[str, Any]]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="computes Transformer, Pooling"):
        read_sentence_layout(save_layout(tmp_path, {"pooling_mode": "cls"}, modules=modules))


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/b", ""])
def test_a_module_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    modules = [TRANSFORMER, POOLING | {"path": path}]
    with pytest.raises(CheckpointConfigInvalid, match="folder"):
        read_sentence_layout(save_layout(tmp_path, {"pooling_mode": "cls"}, modules=modules))


def test_a_pooling_that_did_not_come_along_is_refused_and_not_guessed(tmp_path: Path) -> None:
    folder = save_layout(tmp_path, {"pooling_mode": "mean"})
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointConfigInvalid, match="deploy the folder as it was published"):
        read_sentence_layout(folder)


@pytest.mark.parametrize("raw", [b"{", b"{}", b'[{"path": ""}]', b"\xff", b"[" * 100_000])
def test_broken_modules_are_refused(tmp_path: Path, raw: bytes) -> None:
    folder = save_layout(tmp_path, {"pooling_mode": "mean"})
    (folder / "modules.json").write_bytes(raw)
    with pytest.raises(CheckpointConfigInvalid):
        read_sentence_layout(folder)


def test_silent_checkpoints_pool_as_their_kind_does() -> None:
    encoder = embedding_of({"hidden_size": 8}, FACTS, None, encodes=True)
    assert (encoder.pooling, encoder.normalize, encoder.max_tokens) == (Pooling.CLS, True, 514)
    decoder = embedding_of({"n_embd": 8}, FACTS, None, encodes=False)
    assert (decoder.pooling, decoder.normalize, decoder.dimensions) == (Pooling.LAST, True, 8)


def test_the_shorter_of_two_lengths_holds() -> None:
    layout = SentenceLayout(pooling=Pooling.MEAN, normalize=False, max_tokens=256, lower_case=True)
    config = {"hidden_size": 8, "model_type": "roberta", "pad_token_id": 1}
    found = embedding_of(config, FACTS, layout, encodes=True)
    assert (found.max_tokens, found.normalize, found.lower_case) == (256, False, True)
    # Positions of RoBERTa begin behind that of the padding token.
    assert embedding_of(config, FACTS, None, encodes=True).max_tokens == 512


def test_matryoshka_is_read_from_the_config() -> None:
    config = {"hidden_size": 8, "matryoshka_dimensions": [8, 4]}
    found = embedding_of(config, FACTS, None, encodes=True)
    assert (found.matryoshka, found.matryoshka_dimensions) == (True, (4, 8))
    assert not embedding_of({"hidden_size": 8}, FACTS, None, encodes=True).matryoshka


@pytest.mark.parametrize(
    "config", [{}, {"hidden_size": 0}, {"hidden_size": "8"}, {"hidden_size": 8, "pad_token_id": -1}]
)
def test_a_config_without_a_length_of_vectors_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointConfigInvalid):
        embedding_of(config, FACTS, None, encodes=True)


@pytest.mark.parametrize(
    ("named", "generates", "chosen"),
    [
        ("Qwen3ForCausalLM", True, "Qwen3ForCausalLM"),
        ("Qwen3ForCausalLM", False, "Qwen3Model"),
        ("GPT2LMHeadModel", False, "GPT2Model"),
        ("MistralModel", True, "MistralModel"),
        ("BertForMaskedLM", True, "BertModel"),
        ("XLMRobertaModel", False, "XLMRobertaModel"),
    ],
)
def test_the_class_without_a_head_serves_what_does_not_generate(named: str, generates: bool, chosen: str) -> None:
    assert choose([named], generates=generates) == chosen


@pytest.mark.parametrize("named", ["BertForSequenceClassification", "LlamaForMaskedLM", "T5Model", "Model", ""])
def test_another_class_is_refused(named: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match="this version serves"):
        choose([named])


def test_a_config_that_leaves_the_width_to_its_family_is_told_from_one_that_names_it() -> None:
    assert not names_width({"model_type": "opt", "vocab_size": 8})
    assert all(names_width({name: 8}) for name in ("word_embed_proj_dim", "hidden_size", "dim", "n_embd"))
