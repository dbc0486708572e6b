"""The load format `sllm` in vLLM: the same weights out of a node's pool and out of a folder, over a strict stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from test_engine_process import Pool
from tiny_models import VOCABULARY_TOKENS, change_tensors, save_model

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine.vllm_options import LoaderConfig, PooledWeights
from sllm_actor.errors import BackendInvalid, CheckpointInvalid, ConfigInvalid

ROOT = Path(__file__).parent.parent
CHUNK_BYTES = 4096
HIDDEN = 32


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The stand-in as `vllm`, with our plugin loaded as its entry point names it."""
    sys.path.insert(0, str(ROOT / "tests" / "vllm_standin"))
    before = set(sys.modules)
    module, _, name = entry_point().partition(":")
    getattr(import_module(module), name)()
    yield
    sys.path.pop(0)
    for loaded in set(sys.modules) - before:
        if loaded.split(".")[0] == "vllm" or loaded.startswith("sllm_actor.node.vllm"):
            del sys.modules[loaded]


def entry_point() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: str = project["entry-points"]["vllm.general_plugins"]["sllm"]
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


def pooled(pool: Pool, folder: Path, **changes: Any) -> dict[str, Any]:
    """Put a folder's files into a node's pool, and name them as its engine process does."""
    files = [
        PooledWeights(name=file.name, size_bytes=file.size_bytes, chunks=list(unpack_uint32(file.chunks)))
        for file in pool.add_folder(folder)
    ]
    config = LoaderConfig(
        pool=f"/proc/{os.getpid()}/fd/{pool.fd}",
        chunk_bytes=CHUNK_BYTES,
        files=files,
        aliases=read_folder(folder).aliases,
    )
    made: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(config, **changes))
    return made


def loaded(folder: Path, extra: dict[str, Any], **changes: Any) -> Any:
    """Load as vLLM does, by the name of the load format."""
    config, loaders = import_module("vllm.config"), import_module("vllm.model_executor.model_loader")
    models = import_module("vllm.model_executor.models")
    loader = loaders.get_model_loader(config.LoadConfig(load_format="sllm", model_loader_extra_config=extra))
    model = models.LastToken(VOCABULARY_TOKENS, HIDDEN, torch.bfloat16)
    named = config.ModelConfig(**{"model": str(folder), **changes})
    loader.download_model(named)
    loader.load_weights(model, named)
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    own = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm, "lm_head.weight": model.head}
    everything: dict[str, torch.Tensor] = own | model.passed_over
    return everything


def assert_same(model: Any, folder: Path) -> None:
    stored, found = load_file(folder / "model.safetensors"), weights_of(model)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name


def test_weights_come_out_of_a_nodes_pool_as_they_were_stored(llama: Path, pool: Pool) -> None:
    assert_same(loaded(Path("/not/read"), pooled(pool, llama)), llama)


def test_weights_come_out_of_a_folder_through_a_pool_of_the_loaders_own(llama: Path) -> None:
    assert_same(loaded(llama, {"chunk_bytes": 65536, "reading_threads": 2}), llama)


def test_a_converted_checkpoint_gives_no_padding_and_every_name_of_a_tied_tensor(llama: Path, tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", "LlamaForCausalLM", dtype=torch.bfloat16)
    change_tensors(tied, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    convert(tied, tmp_path / "converted", chunk_bytes=CHUNK_BYTES)
    assert_same(loaded(tmp_path / "converted", {"chunk_bytes": 65536}), tied)


def test_any_process_of_this_user_reaches_the_pool_by_the_path_that_it_is_told(llama: Path, pool: Pool) -> None:
    told = msgspec.json.encode(pooled(pool, llama)).decode()
    program = """if True:
        import os, sys, msgspec
        from sllm_actor.engine.vllm_options import LoaderConfig
        from sllm_actor.loader.mapping import HostFile, map_files
        config = msgspec.json.decode(sys.argv[1], type=LoaderConfig)
        files = [HostFile(file.name, file.size_bytes, tuple(file.chunks)) for file in config.files]
        mapped = map_files(os.open(config.pool, os.O_RDWR), config.chunk_bytes, files)
        sys.stdout.buffer.write(bytes(mapped.buffers[0]))
    """
    ran = subprocess.run([sys.executable, "-c", program, told], capture_output=True, timeout=60, check=True)
    assert ran.stdout == (llama / "model.safetensors").read_bytes()


@pytest.mark.parametrize("extra", [{"concurrency": 4}, {"chunk_bytes": "many"}, {"files": [{"name": "a"}]}])
def test_what_the_load_format_does_not_know_is_refused(llama: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid, match="model_loader_extra_config"):
        loaded(llama, extra)


def test_a_weight_that_is_missing_is_named_unless_weights_are_quantized(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM", dtype=torch.bfloat16)
    change_tensors(folder, lambda tensors: {name: one for name, one in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointInvalid, match="1 weights are not in the checkpoint: head"):
        loaded(folder, {"chunk_bytes": 65536})
    loaded(folder, {"chunk_bytes": 65536}, quantization="fp8")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendInvalid, match="reads folders"):
        loaded(tmp_path / "owner" / "name", {})


def test_the_stand_in_refuses_what_vllm_refuses() -> None:
    arguments, sampling = import_module("vllm.engine.arg_utils"), import_module("vllm.sampling_params")
    loaders = import_module("vllm.model_executor.model_loader")
    with pytest.raises(TypeError):
        arguments.AsyncEngineArgs(model="m", max_sequences=3)
    with pytest.raises(TypeError):
        sampling.SamplingParams(max_new_tokens=3)
    with pytest.raises(ValueError, match="max_tokens"):
        sampling.SamplingParams(max_tokens=0)
    with pytest.raises(ValueError, match="subclass"):
        loaders.register_model_loader("mine")(dict)
