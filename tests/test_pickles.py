"""Conversion of pickled weights: values are kept, code is not run, and the process that reads them is on a leash."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG
from converted import leftovers, stored
from safetensors.torch import load_file
from tiny_models import attach, prompt_of, save_model
from transformers import AutoModelForCausalLM

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.manifest import OriginFormat
from sllm_actor.checkpoint.pickle_child import Refused, Tensors, load_answer
from sllm_actor.errors import CheckpointInvalid, ConversionFailed, PickleInvalid, WriteFailed


def pickled(folder: Path, *files: object, **options: Any) -> Path:
    """A folder with pytorch_model.bin, or with shards of it and no index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = ["pytorch_model.bin"]
    if len(files) > 1:
        names = [f"pytorch_model-{k:05}-of-{len(files):05}.bin" for k in range(1, len(files) + 1)]
    for name, content in zip(names, files, strict=True):
        torch.save(content, folder / name, **options)
    return folder


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a converted folder by every name that it has."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: value for name, value in load_file(path).items() if not is_pad(name)}
    return found | {alias: found[name] for alias, name in read_folder(folder).aliases.items()}


BASE = torch.arange(120, dtype=torch.float32).reshape(10, 12)
CASES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "plain": lambda: {"a": BASE, "b": torch.ones(3)},
    "a view with an offset": lambda: {"tail": BASE[7:]},
    "a column": lambda: {"column": BASE[:, 3]},
    "transposed": lambda: {"t": BASE.t()},
    "every other": lambda: {"x": BASE[::2, 1::3]},
    "expanded": lambda: {"e": torch.tensor([1.0, 2.0]).reshape(2, 1).expand(2, 5)},
    "views of one storage": lambda: {"head": BASE[:2], "overlap": BASE[1:4], "all": BASE},
    "bf16": lambda: {"x": BASE.bfloat16()},
    "bool": lambda: {"x": BASE > 5},
    "float8": lambda: {"x": BASE.to(torch.float8_e4m3fn), "y": BASE.to(torch.float8_e5m2)},
    "complex": lambda: {"x": torch.complex(BASE, BASE + 1), "conj": torch.complex(BASE, BASE).conj()},
    "integers": lambda: {str(t): BASE.to(t) for t in (torch.int64, torch.int8, torch.uint8, torch.uint16)},
    "scalar": lambda: {"x": torch.tensor(3.5)},
    "zero size": lambda: {"x": torch.zeros(0, 4), "y": torch.zeros(3, 0), "z": torch.ones(2)},
    "a parameter": lambda: {"x": torch.nn.Parameter(BASE.clone())},
    "names": lambda: {"größe.名前": torch.ones(2), 'quote"back\\slash': torch.ones(3), "": torch.ones(4)},
    "other dictionary": lambda: OrderedDict(x=BASE),
}


def test_values_are_kept(tmp_path: Path) -> None:
    tensors = {f"{case}.{name}": value for case, make in CASES.items() for name, value in make().items()}
    convert(pickled(tmp_path / "a", tensors), tmp_path / "b")
    found = values(tmp_path / "b")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype is value.dtype and found[name].shape == value.shape, name
        whole = value.detach().resolve_conj().contiguous()
        assert found[name].flatten().view(torch.uint8).equal(whole.flatten().view(torch.uint8)), name
    assert leftovers(tmp_path) == []


def test_one_view_under_two_names_is_stored_once(tmp_path: Path) -> None:
    tied = torch.ones(64, 64)
    made = convert(pickled(tmp_path / "a", {"embed": tied, "x": torch.zeros(16), "head": tied}), tmp_path / "b")
    assert made.manifest.aliases == {"head": "embed"} and made.manifest.origin.format is OriginFormat.PICKLE
    assert set(stored(tmp_path / "b")) == {"embed", "x"}
    assert made.size_bytes < 4096 + 2 * 64 * 64 * 4
    assert values(tmp_path / "b")["head"].equal(tied)
    again = convert(tmp_path / "b", tmp_path / "c")
    assert (again.manifest.aliases, again.manifest.model_id) == (made.manifest.aliases, made.manifest.model_id)


def test_other_views_of_a_storage_are_no_aliases(tmp_path: Path) -> None:
    tensors = {"a": BASE, "flat": BASE.view(-1), "first": BASE[:5], "empty": BASE[:0]}
    square = torch.arange(16.0).reshape(4, 4)
    tensors |= {"square": square, "turned": square.t()}
    assert convert(pickled(tmp_path / "a", tensors), tmp_path / "b").manifest.aliases == {}
    found = values(tmp_path / "b")
    assert found["first"].equal(BASE[:5]) and found["turned"].equal(square.t())


def test_a_slice_of_a_large_storage_brings_only_itself(tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    assert convert(pickled(tmp_path / "a", {"x": large[10:20]}), tmp_path / "b").size_bytes == 4096 + 40


def test_shards_with_and_without_an_index_are_put_together(tmp_path: Path) -> None:
    first, second = {"a": BASE, "b": BASE[2:]}, {"c": torch.ones(5)}
    source = pickled(tmp_path / "a", first, second)
    convert(source, tmp_path / "b")
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[0], "c": names[1]}}))
    convert(source, tmp_path / "c")
    assert stored(tmp_path / "b") == stored(tmp_path / "c") and set(stored(tmp_path / "b")) == {"a", "b", "c"}
    index.write_text(json.dumps({"weight_map": {"a": names[0], "c": names[0]}}))
    with pytest.raises(PickleInvalid, match=r"puts tensor 'c' in pytorch_model-00001"):
        convert(source, tmp_path / "d")
    index.write_text(json.dumps({"weight_map": {"a": "../a.bin"}}))
    with pytest.raises(CheckpointInvalid, match="impossible name"):
        convert(source, tmp_path / "d")
    index.unlink()
    (source / names[0]).unlink()
    with pytest.raises(CheckpointInvalid, match="1 of 2 shards"):
        convert(source, tmp_path / "d")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PickleInvalid, match=r"'a' is in pytorch_model-00002"):
        convert(pickled(tmp_path / "a", {"a": BASE}, {"a": BASE}), tmp_path / "b")


def test_files_of_the_old_kind_are_read_too(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"a": BASE[3:], "t": BASE.t()}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(source / "pytorch_model.bin")
    convert(source, tmp_path / "b")
    assert values(tmp_path / "b")["t"].equal(BASE.t())


def test_a_lone_pt_file_is_found_beside_what_training_left(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"a": BASE})
    (source / "pytorch_model.bin").rename(source / "model.pt")
    torch.save({"lr": 1}, source / "optimizer.pt")
    convert(source, tmp_path / "b")
    assert values(tmp_path / "b")["a"].equal(BASE)
    torch.save({}, source / "other.pt")
    with pytest.raises(CheckpointInvalid, match="2 files that may be"):
        convert(source, tmp_path / "c")


@pytest.mark.parametrize(("architecture", "tied"), [("LlamaForCausalLM", True), ("OPTForCausalLM", False)])
def test_a_pickled_model_computes_the_same_in_transformers_and_here(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    stock = save_model(tmp_path / "stock", architecture, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(stock).eval()
    source = tmp_path / "a"
    source.mkdir()
    (source / "config.json").write_bytes((stock / "config.json").read_bytes())
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    made = convert(source, tmp_path / "b")
    assert bool(made.manifest.aliases) is tied
    ids = torch.tensor([prompt_of(7)])
    with torch.inference_mode():
        expected = model(ids).logits
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()(ids).logits.equal(expected)
        assert attach(tmp_path / "b")(ids).logits.equal(expected)


def test_an_alias_that_no_config_ties_is_found_under_its_stored_name(tmp_path: Path) -> None:
    stock = save_model(tmp_path / "stock", "LlamaForCausalLM")
    weights = dict(AutoModelForCausalLM.from_pretrained(stock).state_dict())
    name = "model.layers.{}.mlp.up_proj.weight"
    weights[name.format(1)] = weights[name.format(0)]
    source = tmp_path / "a"
    source.mkdir()
    (source / "config.json").write_bytes((stock / "config.json").read_bytes())
    torch.save(weights, source / "pytorch_model.bin")
    assert convert(source, tmp_path / "b").manifest.aliases == {name.format(1): name.format(0)}
    attached = attach(tmp_path / "b").state_dict()
    assert attached[name.format(1)].equal(weights[name.format(0)])


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    witness = tmp_path / "ran"
    source = pickled(tmp_path / "a", {"a": BASE, "b": Touch(witness)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PickleInvalid, match="system") as refused:
        convert(source, tmp_path / "b")
    assert "weights_only" not in refused.value.message
    assert not witness.exists() and not (tmp_path / "b").exists() and leftovers(tmp_path) == []
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the pickle is one that would have run"


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: {"s": torch.eye(3).to_sparse()}, "'s' is sparse"),
    "sparse rows": (lambda: {"s": torch.eye(3).to_sparse_csr()}, "'s' is sparse"),
    "quantised": (lambda: {"q": torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8)}, "'q' is quantised"),
    "meta": (lambda: {"m": torch.empty(3, device="meta")}, "'m' is without bytes"),
    "complex128": (lambda: {"c": BASE.to(torch.complex128)}, r"'c' is of type torch\.complex128"),
    "no dictionary": (lambda: [BASE], "holds a list"),
    "a number": (lambda: {"a": BASE, "step": 7}, "'step' is a int"),
    "nested": (lambda: {"model": {"a": BASE}}, "'model' is a dict"),
    "a key": (lambda: {3: BASE}, "the key 3"),
    "a nameless thing": (lambda: {"a": None}, "'a' is a NoneType"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_converted_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    make, said = REFUSED[case]
    source = pickled(tmp_path / "a", make())
    # As the child does it, without the seconds that a child takes.
    with pytest.raises(PickleInvalid, match=said):
        Tensors().load([str(source / "pytorch_model.bin")])


@pytest.mark.parametrize(
    ("content", "said"), [({"__pad_0__": BASE}, "only pads may have"), ({"a": BASE, "b": 7}, "'b' is a int")]
)
def test_a_refusal_leaves_nothing_behind(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(PickleInvalid, match=said):
        convert(pickled(tmp_path / "a", content), tmp_path / "b")
    assert not (tmp_path / "b").exists() and leftovers(tmp_path) == []


def test_a_damaged_pickle_is_refused_with_its_reason(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"a": BASE})
    path = source / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(PickleInvalid, match="can't be converted: EOFError"):
        convert(source, tmp_path / "b")
    for raw in (b"no pickle", whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(raw)
        answer = load_answer(Tensors(), [str(path)])
        assert isinstance(answer, Refused) and answer.reason
    assert not (tmp_path / "b").exists()


def test_a_view_larger_than_the_disk_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"bomb": torch.ones(1).expand(2**46)})
    with pytest.raises(WriteFailed, match="free and"):
        convert(source, tmp_path / "b")


def test_a_view_larger_than_the_childs_memory_ends_the_child_alone(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"bomb": torch.ones(1).expand(6 * 2**28)})
    with pytest.raises(ConversionFailed, match="memory"):
        convert(source, tmp_path / "b")
    assert leftovers(tmp_path) == [] and not (tmp_path / "b").exists()


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_a_child_that_is_killed_is_a_typed_error_that_says_so(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {f"t{k}": torch.ones(1000) for k in range(50)})
    before = set(children())

    def kill(done_bytes: int, total_bytes: int) -> None:
        for pid in set(children()) - before:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ConversionFailed, match="killed by signal 9"):
        convert(source, tmp_path / "b", on_progress=kill)
    assert leftovers(tmp_path) == [] and not (tmp_path / "b").exists()
    assert set(children()) <= before


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"t": torch.ones(1000)})
    program = (
        "import os, signal, sys; from pathlib import Path; from sllm_actor.checkpoint.convert import convert\n"
        "def stop(done, total):\n"
        "    print(Path(f'/proc/self/task/{os.getpid()}/children').read_text(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=stop)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "b")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    child = int(ran.stdout)
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(child)
        assert select.select([ended], [], [], 60)[0], "the child is still there"
        os.close(ended)


def test_the_child_can_write_no_file(tmp_path: Path) -> None:
    source = pickled(tmp_path / "a", {"t": torch.ones(10)})
    program = (
        "import sys; from sllm_actor.checkpoint.pickle_child import _limit; _limit([sys.argv[1]])\n"
        "import os; os.write(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT), b'x')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(source / "pytorch_model.bin"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "File too large" in ran.stderr and (tmp_path / "out").read_bytes() == b""
