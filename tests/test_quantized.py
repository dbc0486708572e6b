"""Weights of eight and of four bits, as bitsandbytes stores them, against transformers with that library."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import load_adapter, merged, save_adapter
from safetensors.torch import load_file
from tiny_models import (
    CONTEXT_TOKENS,
    LIMITS,
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
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sllm_actor.checkpoint.convert import convert
from sllm_actor.engine import four_bits, quantization, quantized, skeleton
from sllm_actor.engine.architectures import MODULES
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import CheckpointConfigInvalid, CheckpointInvalid, SllmError, UnsupportedArchitecture
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

four_bits.load()  # As the fork server does, and before transformers would in its own way.

# The library is what we are compared with, and its own ways for AVX-512 are wrong for layers as small as these:
# of rows that do not end with a block it makes other numbers, and what it packs anew for AVX512-BF16 fails.
_unpack_rows = torch.ops.bitsandbytes.dequantize_4bit.default


def _unpack_as_one_row(
    packed: torch.Tensor, scales: torch.Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    found: torch.Tensor = _unpack_rows(packed, scales, block, kind, (math.prod(shape),), dtype)
    return found.view(*shape)


@pytest.fixture(autouse=True)
def _library_as_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(torch.ops.bitsandbytes.dequantize_4bit, "default", _unpack_as_one_row)


KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
# transformers leaves Falcon's linear layers, which are of a class of their own, as they are.
QUANTIZED = sorted(MODULES.keys() - {"FalconForCausalLM"})
ATTENTION = "model.layers.0.self_attn.q_proj"


def quantize(source: Path, target: Path, kind: str, **settings: Any) -> Path:
    """Let transformers and bitsandbytes write a quantized checkpoint."""
    config = BitsAndBytesConfig(**KINDS[kind], **settings)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto").save_pretrained(target)
    return target


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny quantized model: `save(kind, architecture, **shape)`."""

    def saved(kind: str, architecture: str = "LlamaForCausalLM", **shape: Any) -> Path:
        torch.manual_seed(20261128)  # How near the best two tokens are to each other depends on the weights.
        return quantize(save_model(tmp_path / "whole", architecture, **shape), tmp_path / kind, kind)

    return saved


def assert_alike(folder: Path, prompt: list[int], ours: list[int], theirs: list[int], *, gap: float) -> None:
    """The first token that differs must have been as good as the other, to `gap` of the largest logit."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            assert logit_gap(folder, prompt + theirs[:place], one, other) < gap, place
            return


# Answers.


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
@pytest.mark.parametrize("architecture", QUANTIZED)
def test_four_bits_answer_as_with_transformers(architecture: str, kind: str, save: Callable[..., Path]) -> None:
    folder = save(kind, architecture)
    assert any("bitsandbytes__nf4" in name for name in tensor_names(folder))
    prompt = prompt_of(LIMITS.prefill_chunk_tokens + 8)
    assert run(attach(folder), prompt, greedy(24)) == run_transformers(folder, prompt, 24)


@pytest.mark.parametrize("architecture", QUANTIZED)
def test_eight_bits_answer_as_their_numbers_do_in_full(architecture: str, save: Callable[..., Path]) -> None:
    """The same numbers in fp32 are what transformers' library computes, had it not rounded the activations."""
    folder = save("int8", architecture)
    prompt = prompt_of(LIMITS.prefill_chunk_tokens + 8)
    ours, theirs = run(attach(folder), prompt, greedy(24)), run_transformers(folder, prompt, 24)
    assert_alike(folder, prompt, ours, theirs, gap=0.1)
    written_out = change_config(change_tensors(folder, in_full), quantization_config=None)
    assert not any(name.endswith("SCB") for name in tensor_names(folder))
    assert_alike(folder, prompt, ours, run_transformers(written_out, prompt, 24), gap=0.02)


def in_full(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write out what the weights of int8 stand for, as the model's own classes store them."""
    found = {name: value for name, value in tensors.items() if not name.endswith((".SCB", ".weight_format"))}
    for name, value in found.items():
        scales = tensors.get(f"{name.removesuffix('.weight')}.SCB")
        if scales is not None:
            weight = value * scales[:, None] / 127
            found[name] = weight.T if ".c_" in name else weight  # GPT-2 has its weights the other way round.
    return found


def test_fp4_answers_as_with_transformers(save: Callable[..., Path]) -> None:
    folder, prompt = save("fp4"), prompt_of(40)
    assert run(attach(folder), prompt, greedy(24)) == run_transformers(folder, prompt, 24)


def test_quantized_answers_are_not_those_of_the_whole_model(save: Callable[..., Path]) -> None:
    folder, prompt = save("nf4"), prompt_of(40)
    assert run(attach(folder), prompt, greedy(24)) != run(attach(folder.parent / "whole"), prompt, greedy(24))


@pytest.mark.parametrize("kind", ["int8", "nf4-nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_computes_in_its_own_type(
    dtype: torch.dtype, kind: str, save: Callable[..., Path]
) -> None:
    folder, prompt = save(kind, dtype=dtype), prompt_of(40)
    model = attach(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_alike(folder, prompt, run(model, prompt, greedy(24)), run_transformers(folder, prompt, 24), gap=0.08)


def test_quantized_requests_that_run_together_answer_as_alone(save: Callable[..., Path]) -> None:
    model = attach(save("nf4-nested"))
    prompts = [prompt_of(length, seed=length) for length in (3, 20, 50)]
    runner = Runner(model, (), CONTEXT_TOKENS, LIMITS)
    together = [runner.begin(prompt, greedy(12)) for prompt in prompts]
    finish(runner)
    assert [generation.tokens for generation in together] == [run(model, prompt, greedy(12)) for prompt in prompts]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_an_adapter_is_added_to_quantized_weights(architecture: str, save: Callable[..., Path]) -> None:
    folder, prompt = save("int8", architecture), prompt_of(40)
    adapter = save_adapter(folder.with_name("adapter"), folder.with_name("whole"), "all-linear")
    model = attach(folder)
    runner = Runner(model, (), CONTEXT_TOKENS, LIMITS)
    runner.adapters.put("adapter", load_adapter(model, adapter))
    adapted, bare = runner.begin(prompt, greedy(12), adapter="adapter"), runner.begin(prompt, greedy(12))
    finish(runner)
    assert bare.tokens == run(model, prompt, greedy(12)) != adapted.tokens
    written_out = change_config(change_tensors(folder, in_full), quantization_config=None)
    wanted = merged(written_out, adapter, folder.with_name("merged"))
    assert_alike(wanted, prompt, adapted.tokens, run_transformers(wanted, prompt, 12), gap=0.02)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_an_adapter_is_added_to_weights_of_four_bits(kind: str, save: Callable[..., Path]) -> None:
    folder, prompt = save(kind), prompt_of(40)
    adapter = save_adapter(folder.with_name("adapter"), folder.with_name("whole"), "all-linear")
    model = attach(folder)
    runner = Runner(model, (), CONTEXT_TOKENS, LIMITS)
    runner.adapters.put("adapter", load_adapter(model, adapter))
    adapted, bare = runner.begin(prompt, greedy(12), adapter="adapter"), runner.begin(prompt, greedy(12))
    finish(runner)
    assert bare.tokens == run(model, prompt, greedy(12)) != adapted.tokens
    # What the library itself makes of its weights, with the adapter in them.
    written_out = folder.with_name("written-out")
    AutoModelForCausalLM.from_pretrained(folder).dequantize().save_pretrained(written_out)
    wanted = merged(change_config(written_out, quantization_config=None), adapter, folder.with_name("merged"))
    assert_alike(wanted, prompt, adapted.tokens, run_transformers(wanted, prompt, 12), gap=0.02)


@pytest.mark.parametrize("kind", ["int8", "nf4-nested"])
@pytest.mark.parametrize("hidden", [24, 32])
def test_a_layer_that_is_unpacked_in_parts_is_the_same(
    hidden: int, kind: str, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 24 numbers neither fill blocks of 64, so that parts end where both do, nor torch's registers."""
    folder = save(kind, hidden_size=hidden, head_dim=8)
    rows = torch.randn(9, hidden, generator=torch.Generator().manual_seed(5))
    layer = attach(folder).get_submodule(ATTENTION)
    whole = layer(rows)
    monkeypatch.setattr(quantized, "_UNPACKED_BYTES", 1)
    torch.testing.assert_close(layer(rows), whole, rtol=1e-5, atol=1e-5)
    stored = load_file(folder / "model.safetensors")
    if kind == "int8":
        wanted = stored[f"{ATTENTION}.weight"] * stored[f"{ATTENTION}.SCB"][:, None] / 127
        assert (whole - rows @ wanted.T).abs().max() < 0.01 * whole.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 1024, 4096])
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (33, 96), (3, 25), (8, 64), (100, 1000), (16, 4096)])
def test_four_bits_are_unpacked_as_they_are_defined(shape: tuple[int, int], block: int, kind: str) -> None:
    dice = torch.Generator().manual_seed(3)
    count = math.prod(shape)
    packed = torch.randint(0, 256, (-(-count // 2), 1), generator=dice, dtype=torch.uint8)
    scales = torch.rand(-(-count // block), generator=dice)
    places = torch.cat([packed >> 4, packed & 15], 1).flatten()[:count].long()
    wanted = four_bits.numbers(kind)[places] * scales.repeat_interleave(block)[:count]
    torch.testing.assert_close(four_bits.unpack(packed, scales, block, kind, shape), wanted.view(shape))


def converted(folder: Path) -> Path:
    """Lay the tensors of a checkpoint out so that each is aligned."""
    convert(folder, folder.with_name("converted"))
    return folder.with_name("converted")


@pytest.mark.parametrize("kind", ["int8", "nf4-nested"])
def test_quantized_weights_and_scales_are_views_of_the_file(kind: str, save: Callable[..., Path]) -> None:
    layer = attach(converted(save(kind))).get_submodule(ATTENTION)
    for name, part in layer.named_buffers():
        assert part.untyped_storage().nbytes() > part.nbytes, f"{name} is a copy"


@pytest.mark.parametrize("shift_bytes", [1, 8])
def test_eight_bits_off_their_registers_are_copied_and_the_same(shift_bytes: int, save: Callable[..., Path]) -> None:
    folder = converted(save("int8"))
    model = attach(folder, shift_bytes=shift_bytes)
    weight = model.get_submodule(ATTENTION).weight
    assert weight.data_ptr() % quantized.WEIGHT_ALIGNMENT_BYTES == 0
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert run(model, prompt_of(40), greedy(12)) == run(attach(folder), prompt_of(40), greedy(12))


def test_eight_bits_take_rows_that_lie_anyhow(save: Callable[..., Path]) -> None:
    layer = attach(save("int8")).get_submodule(ATTENTION)
    wide = torch.randn(5, 100, generator=torch.Generator().manual_seed(5)).bfloat16()
    for rows in (
        wide[:, 1:33],
        wide.T[1:3, :5].repeat(1, 7)[:, 1:33],
        wide[:0, :32],
        wide.reshape(-1)[1:65].view(2, 32),
    ):
        torch.testing.assert_close(layer(rows), layer(rows.clone()))


@pytest.mark.parametrize("kind", ["int8", "nf4-nested"])
def test_a_converted_checkpoint_keeps_its_quantized_weights(
    kind: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    folder, prompt = save(kind), prompt_of(40)
    convert(folder, tmp_path / "converted")
    assert run(attach(tmp_path / "converted"), prompt, greedy(12)) == run(attach(folder), prompt, greedy(12))


# What configs say.


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "fp8", "compressed-tensors", "torchao", "of-tomorrow", "x" * 5000, ""]
)
def test_another_quantization_is_refused_with_what_is_served(method: str, tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path, "LlamaForCausalLM"), quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedArchitecture, match="bitsandbytes has quantized to 4 or 8 bits") as caught:
        skeleton.build(str(folder), "F32")
    assert method[:50] in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": 4}, {"quant_method": None}, {"quant_method": ["bitsandbytes"]}, "bitsandbytes", [4], 4, True,
        {"quant_method": "bitsandbytes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": "yes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": 1},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": 8},
    ],
)  # fmt: skip
def test_a_quantization_config_that_makes_no_sense_is_refused(said: Any) -> None:
    with pytest.raises(CheckpointConfigInvalid, match="quantization_config"):
        quantization.weight_bits(said)


def test_a_quantization_config_says_of_how_many_bits_the_weights_are() -> None:
    assert quantization.weight_bits({"quant_method": "bitsandbytes", "load_in_8bit": True, "of_tomorrow": [1]}) == 8
    assert quantization.weight_bits({"load_in_4bit": True}) == 4, "as older versions wrote it"
    with pytest.raises(UnsupportedArchitecture, match="save them as uint8"):
        quantization.weight_bits({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"})


def test_four_bits_without_the_library_are_refused_with_how_to_get_it(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    four, eight = save("nf4"), save("int8")
    monkeypatch.setattr(four_bits, "LIBRARY", "no_such_library")
    with pytest.raises(UnsupportedArchitecture, match=r"pip install 'sllm_actor\[quant\]'"):
        attach(four)
    assert len(run(attach(eight), prompt_of(5), greedy(3))) == 3, "eight bits need no library"


def test_the_library_prepares_no_compiler_and_starts_no_thread() -> None:
    """Forks come from a process of one thread; what compiled on demand would do so in the middle of an answer."""
    look = (
        "import os, sys, torch; before = torch.compile, torch.cuda.is_available\n"
        "from sllm_actor.engine import four_bits; four_bits.load()\n"
        "assert before == (torch.compile, torch.cuda.is_available) and 'kernels' not in sys.modules\n"
        "print('bitsandbytes' in sys.modules, 'torch._dynamo' in sys.modules, len(os.listdir('/proc/self/task')))"
    )
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", look], env=alone, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "1"]


# What tensors say.


def state_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Write another state beside one weight."""

    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = f"{ATTENTION}.weight.quant_state.bitsandbytes__nf4"
        state = change(json.loads(bytes(tensors[name].tolist())))
        text = state if isinstance(state, bytes) else json.dumps(state).encode()
        return tensors | {name: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    return changed


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {f"{ATTENTION}.{name}": change(tensors[f"{ATTENTION}.{name}"])}


def without(name: str) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda tensors: {known: value for known, value in tensors.items() if known != f"{ATTENTION}.{name}"}


FOUR: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], str]] = {
    "no scales": (without("weight.absmax"), "lacks the state or the scales"),
    "no numbers": (without("weight.quant_map"), r"lacks weight\.quant_map"),
    "no weight": (without("weight"), "lacks weight"),
    "no scales of scales": (without("weight.nested_absmax"), r"lacks weight\.nested_absmax"),
    "too few scales": (part("weight.absmax", lambda found: found[:-9]), "scales for 1024 numbers"),
    "no list of scales": (part("weight.absmax", lambda found: found[0]), "lacks the state or the scales"),
    "whole scales": (part("weight.absmax", lambda found: found.short()), "is I16"),
    "half a weight": (part("weight", lambda found: found[: len(found) // 2]), r"is U8 \[256, 1\]"),
    "signed weight": (part("weight", lambda found: found.char()), "is I8"),
    "other numbers": (part("weight.quant_map", lambda found: found.flip(0)), "numbers of .* are not those of nf4"),
    "state of no text": (state_of(lambda _: b"\xff{"), "can't be read"),
    "state of a list": (state_of(lambda _: []), "can't be read"),
    "state without end": (state_of(lambda state: state | {"x": "y" * 5000}), "no text of a bounded length"),
    "state of another shape": (state_of(lambda state: state | {"shape": [16, 64]}), "of another layer"),
    "state of a huge shape": (state_of(lambda state: state | {"shape": [2**40, 64]}), "can't be read"),
    "state of another block": (state_of(lambda state: state | {"blocksize": 128}), "of another layer"),
    "state of no block": (state_of(lambda state: state | {"blocksize": 0}), "can't be read"),
    "state of another type": (state_of(lambda state: state | {"quant_type": "fp4"}), "of another layer"),
    "state that is not nested": (state_of(lambda state: state | {"nested_blocksize": None}), "of another layer"),
    "no layer": (
        lambda tensors: tensors | {"model.norm.quant.weight.quant_state.bitsandbytes__nf4": torch.zeros(2).byte()},
        "is no linear layer",
    ),
    "not one": (
        lambda tensors: {name: value for name, value in tensors.items() if "quant_state" not in name},
        "no tensor of the checkpoint is one",
    ),
}
EIGHT: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], str]] = {
    "no scales": (without("SCB"), "has type I8"),
    "no weight": (without("weight"), "lacks weight"),
    "too few scales": (part("SCB", lambda found: found[1:]), r"F32 \[31\], its layer implies F32 \[32\]"),
    "half scales": (part("SCB", lambda found: found.half()), "is F16"),
    "whole weight": (part("weight", lambda found: found.float()), "is F32"),
    "turned weight": (part("weight_format", lambda found: found + 1), "as one kind of GPU reads them"),
}


@pytest.mark.parametrize("damage", FOUR)
def test_four_bits_that_are_damaged_are_refused(damage: str, save: Callable[..., Path]) -> None:
    change, message = FOUR[damage]
    folder = change_tensors(save("nf4-nested"), change)
    with pytest.raises((CheckpointInvalid, UnsupportedArchitecture), match=message):
        attach(folder)


@pytest.mark.parametrize("damage", EIGHT)
def test_eight_bits_that_are_damaged_are_refused(damage: str, save: Callable[..., Path]) -> None:
    change, message = EIGHT[damage]
    folder = change_tensors(save("int8"), change)
    with pytest.raises((CheckpointInvalid, UnsupportedArchitecture), match=message):
        attach(folder)


def test_weights_of_other_bits_than_the_config_says_are_refused(save: Callable[..., Path]) -> None:
    folder = save("int8")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(SllmError, match="names weights of 4 bits"):
        attach(folder)


# In a node.


@pytest.mark.parametrize("kind", ["int8", "nf4-nested"])
def test_a_node_serves_a_quantized_model_and_imports_nothing_for_it(
    kind: str, node: NodeProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], folder)
    quantize(BUILTIN["demo"], folder, kind)
    node.deploy(folder, "quantized")
    try:
        assert "82" in node.chat("quantized", "What is 47 + 35?", temperature=0, max_tokens=20)
        listed = node.call("GET", "/admin/instances")["instances"]
        assert [instance["late_imports"] for instance in listed if instance["model"] == "quantized"] == [[]]
    finally:
        node.call("DELETE", "/admin/models/quantized")


def test_a_quantized_model_that_lacks_scales_is_not_deployed(node: NodeProcess, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], folder)
    change_tensors(quantize(BUILTIN["demo"], folder, "nf4"), without("weight.absmax"))
    reply = node.request("POST", "/admin/models", {"source": str(folder), "name": "lacking"})
    assert reply.status == 400
    assert reply.json()["error"]["code"] == "checkpoint_invalid"
    assert ATTENTION in reply.json()["error"]["message"]
