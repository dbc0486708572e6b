"""LoRA adapters as the engine computes with them, against models into which the same adapters were merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import RANK, change_adapter, load_adapter, merged, save_adapter
from tiny_models import (
    CONTEXT_TOKENS,
    LIMITS,
    attach,
    change_tensors,
    finish,
    greedy,
    prompt_of,
    run,
    run_transformers,
    save_model,
)

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.domain import Resume, Sampling
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import (
    AdapterInvalid,
    CheckpointEmpty,
    CheckpointTruncated,
    GenerationFailed,
    PickleCheckpoint,
    SllmError,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# One set of modules for each of two adapters.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], list[str] | str]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "all-linear"),
    "opt": ("OPTForCausalLM", {}, ["q_proj", "out_proj"], "all-linear"),
    "gpt2": ("GPT2LMHeadModel", {}, ["c_attn"], "all-linear"),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}, ["k_proj", "down_proj"], "all-linear"),
    "gpt-neox": ("GPTNeoXForCausalLM", {}, ["query_key_value"], "all-linear"),
    "falcon": ("FalconForCausalLM", {}, ["query_key_value", "dense"], "all-linear"),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"num_key_value_heads": 2}, ["q_proj"], ["o_proj", "v_proj"]),
}


def both(folder: Path, family: str) -> tuple[Path, Path, Path]:
    """Save a base and two adapters of it."""
    architecture, changes, first, second = FAMILIES[family]
    base = save_model(folder / "base", architecture, **changes)
    save_adapter(folder / "a", base, first, seed=1)
    return base, folder / "a", save_adapter(folder / "b", base, second, seed=2, use_rslora=True)


def runner_of(base: Path, *adapters: Path) -> Runner:
    model = attach(base)
    runner = Runner(model, (), CONTEXT_TOKENS, LIMITS)
    for adapter in adapters:
        runner.adapters.put(adapter.name, load_adapter(model, adapter))
    return runner


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return both(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_and_the_base_that_join_at_any_step_answer_as_merged_models(family: str, tmp_path: Path) -> None:
    base, first, second = both(tmp_path, family)
    runner = runner_of(base, first, second)
    runs = [(key, prompt_of(length, seed=length)) for length in (1, 40, 75) for key in ("a", "", "b")]
    running = []
    for key, prompt in runs:
        running.append(runner.begin(prompt, greedy(30), adapter=key))
        runner.step()
        runner.step()
    finish(runner)
    folders = {"": base, "a": merged(base, first, tmp_path / "ma"), "b": merged(base, second, tmp_path / "mb")}
    for generation, (key, prompt) in zip(running, runs, strict=True):
        assert generation.tokens == run_transformers(folders[key], prompt, 30), (key, len(prompt))
    answers = {tuple(generation.tokens) for generation in running[:3]}
    assert len(answers) == 3, "an adapter that changes nothing shows nothing"


def test_ranks_and_alphas_of_single_modules_are_those_of_the_patterns(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = llama[0]
    adapter = save_adapter(tmp_path / "p", base, ["q_proj", "v_proj"], ranks={"0.self_attn.v_proj": 7})
    change_adapter(adapter, alpha_pattern={"q_proj": 21})
    runner = runner_of(base, adapter)
    generation = runner.begin(prompt_of(20), greedy(30), adapter="p")
    finish(runner)
    assert generation.tokens == run_transformers(merged(base, adapter, tmp_path / "m"), prompt_of(20), 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_other_types_than_the_base_are_computed_in_theirs(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "LlamaForCausalLM", dtype=dtype)
    adapters = (
        save_adapter(tmp_path / "f", base, ["q_proj"]),
        save_adapter(tmp_path / "h", base, ["q_proj"], dtype=dtype),
    )
    runner = runner_of(base, *adapters)
    prompt = prompt_of(12)
    answers = [runner.begin(prompt, greedy(2), adapter=key) for key in ("f", "h", "")]
    finish(runner)
    assert answers[0].tokens[0] == run_transformers(merged(base, adapters[0], tmp_path / "m"), prompt, 1)[0]


def test_a_pass_without_adapters_finds_every_module_as_it_was(llama: tuple[Path, Path, Path]) -> None:
    runner = runner_of(*llama)
    model = runner._model
    seen: list[set[str]] = []
    model.register_forward_pre_hook(
        lambda *_: seen.append({name for name, module in model.named_modules() if "forward" in vars(module)})
    )
    runner.begin(prompt_of(3), greedy(1))
    finish(runner)
    runner.begin(prompt_of(3), greedy(1), adapter="a")
    finish(runner)
    plain, adapted = seen
    assert plain == set()
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_one_adapter_has_computed_is_no_beginning_for_another(llama: tuple[Path, Path, Path]) -> None:
    runner = runner_of(*llama)
    prompt = prompt_of(60)
    cached = []
    for key in ("a", "a", "b", ""):
        generation = runner.begin(prompt, greedy(3), adapter=key)
        finish(runner)
        cached.append(generation.cached_tokens)
    assert cached == [0, 59, 0, 0]


def test_a_seeded_answer_with_an_adapter_is_the_same_alone_and_among_others(llama: tuple[Path, Path, Path]) -> None:
    sampling = Sampling(max_tokens=30, temperature=1.0, top_p=0.95, seed=3, ignore_eos=True)
    alone = runner_of(*llama)
    wanted = alone.begin(prompt_of(30), sampling, adapter="a")
    finish(alone)
    runner = runner_of(*llama)
    others = [runner.begin(prompt_of(9, seed=k), greedy(20), adapter=key) for k, key in enumerate(("b", "", "a"))]
    runner.step()
    found = runner.begin(prompt_of(30), sampling, adapter="a")
    finish(runner)
    assert found.tokens == wanted.tokens
    assert all(len(other.tokens) == 20 for other in others)


@pytest.mark.parametrize("resume", Resume)
def test_an_answer_with_an_adapter_is_taken_up_where_another_engine_left_it(
    resume: Resume, llama: tuple[Path, Path, Path]
) -> None:
    whole = runner_of(*llama)
    wanted = whole.begin(prompt_of(40), greedy(24), adapter="a", resume=resume)
    finish(whole)
    other = runner_of(*llama)
    resumed = other.begin(prompt_of(40), greedy(24), generated=wanted.tokens[:10], resume=resume, adapter="a")
    finish(other)
    assert resumed.tokens == wanted.tokens


def test_an_adapter_that_was_dropped_is_refused_and_the_base_goes_on(llama: tuple[Path, Path, Path]) -> None:
    runner = runner_of(*llama)
    runner.adapters.drop("a")
    with pytest.raises(GenerationFailed, match="not loaded"):
        runner.begin(prompt_of(3), greedy(3), adapter="a")
    generation = runner.begin(prompt_of(3), greedy(3))
    finish(runner)
    assert generation.tokens == run(attach(llama[0]), prompt_of(3), greedy(3))


# What is refused.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "lora_only"}, "lora_only"),
    "biases of its own": ({"lora_bias": True}, "lora_bias"),
    "a base that changes": ({"init_lora_weights": "pissa"}, "pissa"),
    "copies of layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "what is not known": ({"use_something_new": {"a": 1}}, "use_something_new"),
    "no rank": ({"r": 0}, "r must be"),
    "a rank of another type": ({"r": True}, "r must be"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "an alpha that is no number": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "a pattern of ranks": ({"rank_pattern": {"(a+)+": 3}}, "rank_pattern"),
    "no expression": ({"target_modules": "(q_proj"}, "regular expression"),
    "no targets": ({"target_modules": []}, "target_modules"),
    "a target without tensors": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
    "tensors that are no targets": ({"target_modules": ["q_proj"]}, "v_proj"),
    "tensors that do not fit an expression": ({"target_modules": r".*\.q_proj"}, "v_proj"),
    "another rank": ({"r": RANK + 1}, r"shape \[4, 32\].*\[5, 32\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_computed_otherwise_than_by_peft_is_refused(
    what: str, llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    changes, named = REFUSED[what]
    adapter = change_adapter(save_adapter(tmp_path / "x", llama[0], ["q_proj", "v_proj"]), **changes)
    with pytest.raises(AdapterInvalid, match=named):
        load_adapter(attach(llama[0]), adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"use_dora": False, "modules_to_save": None, "loftq_config": {}, "peft_version": "0.18.0", "revision": None},
        {"init_lora_weights": "gaussian", "fan_in_fan_out": True},
    ],
)
def test_what_says_the_same_in_other_words_is_served(
    changes: dict[str, Any], llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    adapter = change_adapter(save_adapter(tmp_path / "x", llama[0], ["q_proj", "v_proj"]), **changes)
    assert len(load_adapter(attach(llama[0]), adapter).pairs) == 4


def test_an_adapter_of_another_base_is_refused_with_the_tensor_and_both_shapes(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    wide = save_model(tmp_path / "wide", "LlamaForCausalLM", hidden_size=64, head_dim=16)
    with pytest.raises(AdapterInvalid, match=r"lora_A.weight has shape \[4, 32\].*\[4, 64\].*another base"):
        load_adapter(attach(wide), llama[1])
    other = save_model(tmp_path / "opt", "OPTForCausalLM")
    with pytest.raises(AdapterInvalid, match="OPTForCausalLM has no such linear module"):
        load_adapter(attach(other), llama[1])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(
    number: float, llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "x", llama[0], ["q_proj"])
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3, 1] = number
        return tensors

    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    change_tensors(adapter, spoil)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match=name):
        load_adapter(attach(llama[0]), adapter)


def test_folders_that_are_no_whole_adapter_say_why(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "x", llama[0], ["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    wrong: list[tuple[type[SllmError], str]] = [(CheckpointTruncated, "adapter_model.safetensors")]
    with pytest.raises(wrong[0][0], match=wrong[0][1]):
        read_folder(adapter)
    weights.unlink()
    with pytest.raises(CheckpointEmpty, match=r"adapter_model\.safetensors"):
        read_folder(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(PickleCheckpoint, match="safe_serialization"):
        read_folder(adapter)
