"""Models as the engine builds and runs them, against transformers' own loading and `generate`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny_models import (
    CONTEXT_TOKENS,
    LIMITS,
    VOCABULARY_TOKENS,
    attach,
    change_config,
    change_tensors,
    finish,
    greedy,
    logit_gap,
    prompt_of,
    run,
    run_transformers,
    save_model,
    tensor_names,
)

from sllm_actor.checkpoint.safetensors_header import parse_header
from sllm_actor.domain import FinishReason, Sampling
from sllm_actor.engine import skeleton
from sllm_actor.engine.architectures import MODULES, choose
from sllm_actor.engine.generation import Generation
from sllm_actor.engine.kv_cache import FIRST_CAPACITY_TOKENS
from sllm_actor.engine.mapped_tensors import MappedTensors
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import (
    CheckpointConfigInvalid,
    CheckpointInvalid,
    GenerationFailed,
    UnsupportedArchitecture,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | parameters}


RW = {"multi_query": False, "parallel_attn": False, "bias": True}
FROM_80 = {"original_max_position_embeddings": 80}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-grouped-queries": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "llama-one-key-head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama-rope-linear": ("LlamaForCausalLM", rope("linear")),
    "llama-rope-dynamic": ("LlamaForCausalLM", rope("dynamic")),
    "llama-rope-yarn": ("LlamaForCausalLM", rope("yarn", **FROM_80)),
    "llama-rope-llama3": ("LlamaForCausalLM", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **FROM_80)),
    "llama-rope-long": ("LlamaForCausalLM", rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, **FROM_80)),
    "opt": ("OPTForCausalLM", {}),
    "opt-tied": ("OPTForCausalLM", {"tie_word_embeddings": True}),
    "opt-as-350m": (
        "OPTForCausalLM",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "tie_word_embeddings": True},
    ),
    "opt-bare": ("OPTForCausalLM", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-tied": ("GPT2LMHeadModel", {"tie_word_embeddings": True}),
    "gpt2-scaled-by-layer": ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast": ("GPT2LMHeadModel", {"reorder_and_upcast_attn": True}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "falcon-7b": ("FalconForCausalLM", {}),
    "falcon-7b-tied": ("FalconForCausalLM", {"tie_word_embeddings": True}),
    "falcon-40b": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": ("FalconForCausalLM", {**RW, "alibi": True}),
    "falcon-rw-rotary": ("FalconForCausalLM", RW),
    "falcon-alibi-odd-heads": ("FalconForCausalLM", {"alibi": True, "num_attention_heads": 6, "hidden_size": 48}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "gpt-neox-serial": ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-sliding": ("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"num_key_value_heads": 2}),
    "qwen3-moe-mixed": (
        "Qwen3MoeForCausalLM",
        {"mlp_only_layers": [0], "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3-sliding": ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
}
# Prompt length to new tokens: from the first token on, over the borders of capacities and of chunks.
RUNS = {1: 2 * FIRST_CAPACITY_TOKENS + 8, FIRST_CAPACITY_TOKENS - 1: 8, FIRST_CAPACITY_TOKENS: 70, 100: 110}


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    return next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def test_every_architecture_that_is_served_is_compared_below() -> None:
    assert {architecture for architecture, _ in VARIANTS.values()} == set(MODULES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers_that_join_at_any_step_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    """Prompts of one token and of several chunks come while others are computed and end; two begin alike."""
    architecture, changes = VARIANTS[variant]
    folder = save_model(tmp_path, architecture, **changes)
    runner = Runner(attach(folder), (), CONTEXT_TOKENS, LIMITS)
    runs = [(prompt_of(length), tokens) for length, tokens in RUNS.items()]
    runs += [(prompt_of(100)[:70] + prompt_of(9, seed=1), 20), (prompt_of(LIMITS.prefill_chunk_tokens, seed=2), 30)]
    running: list[Generation] = []
    for prompt, tokens in runs:
        running.append(runner.begin(prompt, greedy(tokens)))
        for _ in range(5):
            runner.step()
    finish(runner)
    for generation, (prompt, tokens) in zip(running, runs, strict=True):
        wanted = run_transformers(folder, prompt, tokens)
        assert first_difference(generation.tokens, wanted) is None, len(prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama-tied", "opt", "gpt2", "qwen2", "qwen3", "falcon-7b", "mistral", "gpt-neox"])
def test_half_precision_answers_are_those_of_transformers(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    architecture, changes = VARIANTS[variant]
    folder = save_model(tmp_path, architecture, dtype=dtype, **changes)
    model = attach(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    prompt = prompt_of(LIMITS.prefill_chunk_tokens)
    ours, theirs = run(model, prompt, greedy(80)), run_transformers(folder, prompt, 80)
    at = first_difference(ours, theirs)
    if at is not None:
        # Where memory lies decides the last bit of a sum, and with it between two tokens that are as likely.
        gap = logit_gap(folder, [*prompt, *theirs[:at]], ours[at], theirs[at])
        assert gap <= 4 * torch.finfo(dtype).eps, (at, gap)


def test_a_seeded_answer_depends_on_its_seed_alone(tmp_path: Path) -> None:
    model = attach(save_model(tmp_path, "LlamaForCausalLM"))

    def answer(seed: int) -> list[int]:
        return run(model, prompt_of(5), Sampling(max_tokens=30, temperature=1.0, top_p=0.9, seed=seed))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_an_answer_ends_at_an_end_token_at_its_limit_or_at_the_end_of_the_context(tmp_path: Path) -> None:
    model = attach(save_model(tmp_path, "GPT2LMHeadModel"))
    prompt = prompt_of(10)
    whole = run(model, prompt, greedy(50))
    eos = whole[20]
    end = whole.index(eos) + 1

    def ended(max_tokens: int, *, ignore_eos: bool) -> tuple[list[int], FinishReason | None]:
        runner = Runner(model, (eos,), CONTEXT_TOKENS, LIMITS)
        wish = Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0, ignore_eos=ignore_eos)
        generation = runner.begin(prompt, wish)
        finish(runner)
        return generation.tokens, generation.finish

    assert ended(50, ignore_eos=False) == (whole[:end], FinishReason.STOP)
    assert ended(end, ignore_eos=False) == (whole[:end], FinishReason.STOP)
    assert ended(end - 1, ignore_eos=False) == (whole[: end - 1], FinishReason.LENGTH)
    assert ended(50, ignore_eos=True) == (whole, FinishReason.LENGTH)
    full, reason = ended(10**9, ignore_eos=True)
    assert (len(prompt) + len(full), reason) == (CONTEXT_TOKENS, FinishReason.LENGTH)


def test_a_prompt_that_leaves_room_for_one_token_gets_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "OPTForCausalLM")
    prompt = prompt_of(CONTEXT_TOKENS - 1)
    assert run(attach(folder), prompt, greedy(10)) == run_transformers(folder, prompt, 1)


def test_a_token_that_the_checkpoint_calls_padding_is_a_token_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 looks for padding in each pass that comes without a mask, and warns of it."""
    warned: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", warned.append)
    folder = save_model(tmp_path, "GPT2LMHeadModel", pad_token_id=3)
    ours = run(attach(folder), [3, 7, 3], greedy(5))
    assert warned == []
    assert ours == run_transformers(folder, [3, 7, 3], 5)


def test_a_token_outside_the_vocabulary_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    runner = Runner(attach(save_model(tmp_path, "LlamaForCausalLM")), (), CONTEXT_TOKENS, LIMITS)
    with pytest.raises(GenerationFailed, match=f"token {VOCABULARY_TOKENS} "):
        runner.begin([VOCABULARY_TOKENS], greedy(1))
    with pytest.raises(GenerationFailed, match=f"token {VOCABULARY_TOKENS} "):
        runner.begin([1], greedy(9), generated=[VOCABULARY_TOKENS])
    assert not runner.busy
    generation = runner.begin([VOCABULARY_TOKENS - 1], greedy(1))
    finish(runner)
    assert len(generation.tokens) == 1


# Checkpoints.


def without_prefix(prefix: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items()}


def with_head(factor: float, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**found, "lm_head.weight": factor * found["model.embed_tokens.weight"]}


def test_a_checkpoint_of_the_base_model_alone_is_served_where_the_head_is_tied(tmp_path: Path) -> None:
    for architecture, prefix in (
        ("GPT2LMHeadModel", "transformer."),
        ("OPTForCausalLM", "model."),
        ("Qwen2ForCausalLM", "model."),
    ):
        folder = save_model(tmp_path / architecture, architecture, tie_word_embeddings=True)
        wanted = run_transformers(folder, prompt_of(5), 20)
        change_tensors(folder, partial(without_prefix, prefix))
        assert run(attach(folder), prompt_of(5), greedy(20)) == wanted


def test_of_two_tied_tensors_either_one_is_enough(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    wanted = run_transformers(folder, prompt_of(5), 20)

    def only_head(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {"model.embed_tokens.weight": "lm_head.weight"}
        return {renamed.get(name, name): value for name, value in found.items()}

    change_tensors(folder, only_head)
    model = attach(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert run(model, prompt_of(5), greedy(20)) == wanted


def test_two_tied_tensors_that_are_equal_are_one_and_that_differ_stay_two(tmp_path: Path) -> None:
    for name, factor in (("equal", 1.0), ("different", -1.0)):
        folder = save_model(tmp_path / name, "LlamaForCausalLM", tie_word_embeddings=True)
        change_tensors(folder, partial(with_head, factor))
        model = attach(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (factor == 1.0)
        assert run(model, prompt_of(5), greedy(20)) == run_transformers(folder, prompt_of(5), 20)


def test_a_tied_checkpoint_without_either_tensor_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    change_tensors(folder, lambda found: {name: value for name, value in found.items() if "embed" not in name})
    with pytest.raises(CheckpointInvalid, match=r"lacks the tensor .*(embed_tokens|lm_head)"):
        attach(folder)


@pytest.mark.parametrize("architecture", MODULES)
def test_a_missing_tensor_is_named(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, architecture)
    left_out = next(name for name in tensor_names(folder) if ".1." in name)
    change_tensors(folder, lambda found: {name: value for name, value in found.items() if name != left_out})
    with pytest.raises(CheckpointInvalid, match=f"lacks the tensor {left_out} "):
        attach(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    change_tensors(folder, lambda found: {**found, "model.norm.weight": torch.zeros(33)})
    with pytest.raises(CheckpointInvalid, match=r"model\.norm\.weight has shape \[33\], config\.json implies \[32\]"):
        attach(folder)
    folder = save_model(tmp_path / "transposed", "LlamaForCausalLM")
    change_tensors(folder, lambda found: {name: value.mT if "gate" in name else value for name, value in found.items()})
    with pytest.raises(CheckpointInvalid, match="gate_proj"):
        attach(folder)


def test_a_head_that_the_config_does_not_tie_must_be_there(tmp_path: Path) -> None:
    folder = change_config(
        save_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True), tie_word_embeddings=False
    )
    with pytest.raises(CheckpointInvalid, match=r"lacks the tensor lm_head\.weight"):
        attach(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_of_the_engine_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    change_tensors(folder, lambda found: {**found, "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32).to(dtype)})
    with pytest.raises(UnsupportedArchitecture, match=r"up_proj\.weight has type"):
        attach(folder)


def test_a_checkpoint_of_a_type_that_is_not_computed_with_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    for dtype in ("F64", "F8_E4M3", "I8", ""):
        with pytest.raises(UnsupportedArchitecture, match="use F32, F16 or BF16"):
            skeleton.build(str(folder), dtype)


def test_a_mixed_checkpoint_is_computed_in_its_dominant_type(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM", dtype=torch.bfloat16)
    change_tensors(
        folder, lambda found: {name: value.float() if "norm" in name else value for name, value in found.items()}
    )
    model = attach(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(run(model, prompt_of(5), greedy(5))) == 5


def test_tensors_that_lie_unaligned_are_read_right_and_aligned_ones_are_views(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "Qwen3ForCausalLM", tie_word_embeddings=True)
    wanted = run_transformers(folder, prompt_of(5), 20)
    for shift_bytes in (0, 1, 2, 3, 5):
        assert run(attach(folder, shift_bytes=shift_bytes), prompt_of(5), greedy(20)) == wanted


def test_a_file_is_handed_to_torch_once_for_each_dtype_however_many_tensors_it_has() -> None:
    values = {f"{k}": torch.randn(k % 4, 3, 2).to((torch.float32, torch.float16)[k % 2]) for k in range(1, 40)}
    raw = memoryview(bytearray(save(values)))
    header = parse_header(raw, len(raw))
    mapped = MappedTensors(raw)
    found = {tensor.name: mapped.view(tensor) for tensor in header.tensors}
    assert all(torch.equal(found[name], value) and found[name].is_contiguous() for name, value in values.items())
    assert len({found[name].untyped_storage().data_ptr() for name, value in values.items() if value.numel()}) == 1
    assert len({id(found[name]._base) for name, value in values.items() if value.numel()}) == 2


@pytest.mark.parametrize("architecture", MODULES)
def test_a_pass_uses_nothing_that_transformers_warns_of(tmp_path: Path, architecture: str) -> None:
    model = attach(save_model(tmp_path, architecture))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run(model, prompt_of(5), greedy(2))) == 2


def test_a_tensor_that_no_place_takes_is_left_out(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "GPT2LMHeadModel")
    wanted = run_transformers(folder, prompt_of(5), 20)
    change_tensors(
        folder, lambda found: {**found, "transformer.h.0.attn.bias": torch.zeros(1, 1, 8, 8), "other": torch.zeros(3)}
    )
    assert run(attach(folder), prompt_of(5), greedy(20)) == wanted


def test_a_model_of_several_files_is_put_together(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "one", "LlamaForCausalLM")
    wanted = run_transformers(folder, prompt_of(5), 20)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert run(attach(tmp_path / "many"), prompt_of(5), greedy(20)) == wanted


# Configurations.


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": "two"},
        {"hidden_size": "wide"}, {"hidden_size": -8}, {"hidden_size": 2**70}, {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"hidden_act": "no_such_activation"}, {"model_type": "no_such_type"}, {"model_type": None},
        {"model_type": "opt"},
        {"rope_parameters": {"rope_type": "no_such_rope"}}, {"rope_parameters": 5}, {"pad_token_id": 10**18},
        {"vocab_size": [5]},
        {"architectures": [5]},
    ],
)  # fmt: skip
def test_a_config_that_no_model_can_be_built_from_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path, "LlamaForCausalLM"), **changes)
    with pytest.raises(CheckpointConfigInvalid, match=r"config\.json"):
        skeleton.build(str(folder), "F32")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"model_type": "llama"', "[" * 10_000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointConfigInvalid):
        skeleton.build(str(tmp_path), "F32")


def test_an_architecture_that_is_not_served_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    for named in (["MixtralForCausalLM"], [], None, ["T5Model"], ["x" * 10_000]):
        change_config(folder, architectures=named)
        with pytest.raises(UnsupportedArchitecture, match="GPT2LMHeadModel, GPTNeoXForCausalLM, Llama") as caught:
            skeleton.build(str(folder), "F32")
        assert len(caught.value.message) < 500
    assert choose(["Other", "OPTForCausalLM", "GPT2LMHeadModel"]) == "OPTForCausalLM"


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "eager", "output_attentions": True},
        {"output_hidden_states": True, "return_dict": False, "use_cache": False},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}},
    ],
)
def test_a_config_chooses_neither_code_nor_outputs(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    wanted = run_transformers(folder, prompt_of(5), 20)
    (folder / "evil.py").write_text("raise SystemExit('code of the model was run')")
    model = attach(change_config(folder, **changes))
    assert model.config._attn_implementation == "slots"
    assert run(model, prompt_of(5), greedy(20)) == wanted


def test_building_leaves_the_default_type_as_it_was(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    assert skeleton.build(str(folder), "BF16").lm_head.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    change_config(folder, hidden_size=-8)
    with pytest.raises(CheckpointConfigInvalid):
        skeleton.build(str(folder), "BF16")
    assert torch.get_default_dtype() == torch.float32


def test_a_skeleton_takes_no_memory_for_weights(tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path, "LlamaForCausalLM"), vocab_size=2**31 - 1)
    model = skeleton.build(str(folder), "F32")
    assert model.lm_head.weight.is_meta
    assert model.lm_head.weight.numel() > 2**35


def test_the_config_of_every_tiny_model_names_its_architecture(tmp_path: Path) -> None:
    for architecture in MODULES:
        folder = save_model(tmp_path / architecture, architecture)
        assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
