"""Conversion of what ServerlessLLM's sllm-store has saved: values are kept, and a lie in its index is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converted import leftovers, stored
from safetensors.torch import load_file
from store_checkpoints import Index, change_index, save_store_model, save_tensors
from tiny_models import attach, greedy, prompt_of, run, run_transformers, save_model
from transformers import AutoModelForCausalLM

from sllm_actor.checkpoint import store_index
from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.manifest import OriginFormat
from sllm_actor.checkpoint.verify import verify
from sllm_actor.errors import (
    AdapterInvalid,
    CheckpointConfigInvalid,
    CheckpointEmpty,
    CheckpointHeaderInvalid,
    CheckpointInvalid,
    CheckpointTruncated,
    ReadFailed,
)

BASE = torch.arange(120, dtype=torch.float32).reshape(10, 12)
CASES: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: BASE.clone(),
    "odd": lambda: torch.arange(7, dtype=torch.uint8),
    "transposed": lambda: BASE.clone().t(),
    "turned in three": lambda: torch.arange(60, dtype=torch.int64).reshape(3, 4, 5).permute(2, 0, 1),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.tensor([1.0, 2.0]).reshape(2, 1).expand(2, 5),
    "one of everything": lambda: torch.tensor([[[3.5]]]).expand(1, 1, 1),
    "scalar": lambda: torch.tensor(3.5),
    "zero size": lambda: torch.zeros(0, 4),
    "other zero size": lambda: torch.zeros(3, 0),
    "bf16": lambda: BASE.bfloat16(),
    "half turned": lambda: BASE.half().t(),
    "bool": lambda: BASE > 5,
    "float8": lambda: BASE.to(torch.float8_e4m3fn),
    "packed int32": lambda: BASE.to(torch.int32),
    "complex turned": lambda: torch.complex(BASE, BASE + 1).t(),
    'quote"back\\slash.größe': lambda: torch.ones(3),
}


def bytes_of(value: torch.Tensor) -> bytes:
    return bytes(value.contiguous().flatten().view(torch.uint8).tolist())


def values(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: value for name, value in load_file(path).items() if not is_pad(name)}
    return found | {alias: found[name] for alias, name in read_folder(folder).aliases.items()}


@pytest.mark.parametrize("file_bytes", [10 * 2**30, 512])
def test_values_are_kept_from_one_file_and_from_several(tmp_path: Path, file_bytes: int) -> None:
    tensors = {name: make() for name, make in CASES.items()}
    source = save_tensors(tmp_path / "a", tensors, file_bytes=file_bytes)
    assert len(list(source.glob("tensor.data_*"))) == (1 if file_bytes > 512 else 9)
    convert(source, tmp_path / "b")
    found = values(tmp_path / "b")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype is value.dtype and found[name].shape == value.shape, name
        assert bytes_of(found[name]) == bytes_of(value), name
    verify(tmp_path / "b")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "LlamaForCausalLM"])
def test_a_model_that_sllm_store_saved_answers_as_its_original_does(tmp_path: Path, architecture: str) -> None:
    stock = save_model(tmp_path / "stock", architecture, tie_word_embeddings=architecture.startswith("OPT"))
    model = AutoModelForCausalLM.from_pretrained(stock)
    source = save_store_model(model, tmp_path / "store", file_bytes=20_000)
    assert len(list(source.glob("tensor.data_*"))) > 2
    made = convert(source, tmp_path / "ours")
    state = model.state_dict()
    found = values(tmp_path / "ours")
    assert found.keys() == state.keys()
    assert all(found[name].equal(value) for name, value in state.items())
    assert made.manifest.origin.format is OriginFormat.SLLM_STORE
    tokens = run_transformers(stock, prompt_of(12), 16)
    assert run(attach(tmp_path / "ours"), prompt_of(12), greedy(16)) == tokens


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    tied = torch.ones(64, 64)
    source = save_tensors(tmp_path / "a", {"embed": tied, "x": torch.zeros(16), "head": tied, "turned": tied.t()})
    made = convert(source, tmp_path / "b")
    assert made.manifest.aliases == {"head": "embed"}
    assert set(stored(tmp_path / "b")) == {"embed", "x", "turned"}


def test_ranks_get_slices_of_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    stock = save_model(tmp_path / "stock", "LlamaForCausalLM")
    model = AutoModelForCausalLM.from_pretrained(stock)
    for parameter in model.parameters():
        parameter.data = parameter.data.t().contiguous().t()
    source = save_store_model(model, tmp_path / "store", file_bytes=10_000)
    convert(source, tmp_path / "a", tensor_parallel=2)
    convert(stock, tmp_path / "b", tensor_parallel=2)
    ranks = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert len(ranks) == 2
    for name in ranks:
        ours, expected = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert {key for key in ours if not is_pad(key)} == {key for key in expected if not is_pad(key)}
        assert all(ours[key].equal(value) for key, value in expected.items() if not is_pad(key))


def test_the_tokenizer_that_serverlessllm_put_below_comes_along(tmp_path: Path) -> None:
    source = save_tensors(tmp_path / "a", {"x": BASE})
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "tokenizer.json").write_text("{}")
    (source / "tokenizer" / "config.json").write_text('{"another": "file"}')
    (source / "tokenizer" / "tokenizer.py").write_text("print()")
    convert(source, tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "model.safetensors", "sllm.json", "config.json", "tokenizer.json",
    }  # fmt: skip
    assert "another" not in (tmp_path / "b" / "config.json").read_text()


def test_two_models_of_one_shape_have_two_generations(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": BASE})
    save_tensors(tmp_path / "b", {"x": BASE + 1})
    made = [convert(tmp_path / name, tmp_path / f"{name}-ours").manifest.origin.generation for name in "ab"]
    assert made[0] != made[1]


def test_deploying_it_unconverted_is_refused_with_the_command(tmp_path: Path) -> None:
    source = save_tensors(tmp_path / "a", {"x": BASE})
    with pytest.raises(CheckpointEmpty, match=r"sllm-node convert .*a .*a-safetensors"):
        read_folder(source)


def lie(change: Callable[[Index], object]) -> Callable[[Path], object]:
    return lambda folder: change_index(folder, change)


def put(name: str, place: int, value: object) -> Callable[[Path], object]:
    return lie(lambda index: index[name].__setitem__(place, value))


def make_a_pipe(folder: Path) -> None:
    (folder / "tensor.data_0").unlink()
    os.mkfifo(folder / "tensor.data_0")


REFUSED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "beyond the data": (put("x", 0, 64), CheckpointTruncated, "ends at byte 544 and the data at 536"),
    "far beyond": (put("x", 0, 2**52), CheckpointTruncated, "ends at byte"),
    "negative offset": (put("x", 0, -8), CheckpointHeaderInvalid, "x.*>= 0"),
    "an offset that is no number": (put("x", 0, "0"), CheckpointHeaderInvalid, "Expected `int`"),
    "an offset that is true": (put("x", 0, True), CheckpointHeaderInvalid, "Expected `int`"),
    "a fraction": (put("x", 0, 0.5), CheckpointHeaderInvalid, "Expected `int`"),
    "an offset of many digits": (put("x", 0, 10**30), CheckpointHeaderInvalid, r"\$\[\.\.\.\]\[0\]"),
    "overlap": (put("y", 0, 472), CheckpointHeaderInvalid, "overlaps another"),
    "larger than its storage": (put("x", 2, [11, 12]), CheckpointHeaderInvalid, "needs 528 bytes and has 480"),
    "smaller than its storage": (put("x", 2, [9, 12]), CheckpointHeaderInvalid, "does not say which"),
    "strides beyond its storage": (put("x", 3, [13, 1]), CheckpointHeaderInvalid, "needs 516 bytes and has 480"),
    "negative stride": (put("x", 3, [-12, 1]), CheckpointHeaderInvalid, ">= 0"),
    "absurd shape": (put("x", 2, [2**40, 2**40]), CheckpointHeaderInvalid, "impossible shape"),
    "a dimension too many": (put("x", 2, [10, 12, 1]), CheckpointHeaderInvalid, "3 dimensions and 2 strides"),
    "ever so many dimensions": (put("x", 2, [1] * 65), CheckpointHeaderInvalid, "length <= 64"),
    "expanded to what nobody can hold": (
        lie(lambda index: index.update(y=[480, 4, [2**40], [0], "torch.float32"])),
        CheckpointHeaderInvalid, "not contiguous and larger than",
    ),
    "rows that nobody can wait for": (
        lie(lambda index: index.update(x=[0, 480, [2**25, 120], [0, 1], "torch.int8"])),
        CheckpointHeaderInvalid, "more than 16777216 rows",
    ),
    "unknown dtype": (put("x", 4, "torch.quint4x2"), CheckpointHeaderInvalid, "unknown dtype 'torch.quint4x2'"),
    "a pad's name": (
        lie(lambda index: index.update(__pad_0__=index.pop("x"))), CheckpointHeaderInvalid, "only pads may have",
    ),
    "a field too many": (lie(lambda index: index["x"].append(1)), CheckpointHeaderInvalid, "length 5"),
    "a list": (lie(lambda index: "[]"), CheckpointHeaderInvalid, "Expected `object`"),
    "a key twice": (lie(lambda index: '{"x": [], "x": []}'), CheckpointHeaderInvalid, "twice"),
    "not JSON": (lie(lambda index: "{"), CheckpointHeaderInvalid, "not JSON"),
    "nested": (lie(lambda index: "[" * 100_000), CheckpointHeaderInvalid, "nested too deeply|not JSON"),
    "half a surrogate": (lie(lambda index: '{"\\ud800": 1}'), CheckpointHeaderInvalid, "not UTF-8"),
    "no data": (lambda folder: (folder / "tensor.data_0").unlink(), CheckpointTruncated, "tensor.data_0 is missing"),
    "a file missing between": (
        lambda folder: (folder / "tensor.data_2").write_bytes(b""), CheckpointTruncated, "tensor.data_1 is missing",
    ),
    "data cut short": (
        lambda folder: os.truncate(folder / "tensor.data_0", 500), CheckpointTruncated, "and the data at 500",
    ),
    "a pipe": (make_a_pipe, ReadFailed, "not a regular file"),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"), AdapterInvalid, "LoRA adapter as sllm-store",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), CheckpointConfigInvalid, "no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, case: str) -> None:
    damage, error, message = REFUSED[case]
    source = save_tensors(tmp_path / "a", {"x": BASE, "y": torch.arange(14, dtype=torch.int32)})
    damage(source)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists() and leftovers(tmp_path) == []


def test_an_index_longer_than_any_may_be_is_refused_unread(tmp_path: Path) -> None:
    source = save_tensors(tmp_path / "a", {"x": BASE})
    os.truncate(source / "tensor_index.json", 100_000_001)
    with pytest.raises(CheckpointHeaderInvalid, match="longer than 100000000 bytes"):
        convert(source, tmp_path / "b")


def test_more_tensors_than_any_may_have_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store_index, "MAX_TENSORS", 2)
    convert(save_tensors(tmp_path / "a", {"x": BASE, "y": BASE}), tmp_path / "b")
    with pytest.raises(CheckpointHeaderInvalid, match="3 tensors and at most 2"):
        convert(save_tensors(tmp_path / "c", {"x": BASE, "y": BASE, "z": BASE}), tmp_path / "d")


def test_what_vllm_fused_is_not_taken_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({}))
    save_tensors(tmp_path / "a" / "rank_0", {"qkv": BASE})
    with pytest.raises(CheckpointInvalid, match="vLLM has fused"):
        convert(tmp_path / "a", tmp_path / "b")
