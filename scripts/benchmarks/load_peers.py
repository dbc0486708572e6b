"""The peers, each a process of its own: `python -m benchmarks.load_peers peer SYSTEM LIBRARY`.

Runs in the peers' environment, which has no sllm_actor. Each is used as its own documentation says, with its defaults
for the CPU; whatever a load returns stays alive until the clock has stopped, and is dropped before the answer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.actors_process import Commands, serve
from benchmarks.load_meter import Meter, quiet, weight_files

# What a load gives: its tensors, and whatever they live in, to be closed in this order.
Loaded = tuple[Mapping[str, torch.Tensor], tuple[Any, ...]]


def _load_file(folder: str) -> Loaded:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= load_file(path)
    return tensors, ()


def _from_pretrained(folder: str) -> Loaded:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return dict(model.named_parameters()), (model,)


def _fastsafetensors(folder: str) -> Loaded:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: weight_files(folder)})
    buffer = loader.copy_files_to_device()
    return {name: buffer.get_tensor(name) for name in loader.get_keys()}, (buffer, loader)


def _runai(folder: str) -> Loaded:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(weight_files(folder))
        return dict(streamer.get_tensors()), ()


def _tensorizer(folder: str) -> Loaded:
    from tensorizer import TensorDeserializer

    (path,) = weight_files(folder, ".tensors")
    deserializer = TensorDeserializer(path, device="cpu")
    return dict(deserializer), (deserializer,)


def _torch_load(folder: str) -> Loaded:
    (path,) = weight_files(folder, ".bin")
    return torch.load(path, map_location="cpu", weights_only=True), ()


def _torch_load_mmap(folder: str) -> Loaded:
    (path,) = weight_files(folder, ".bin")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True), ()


# By the name in the report: what must be imported beforehand, the distribution, the function.
PEERS: dict[str, tuple[str, str, Callable[[str], Loaded]]] = {
    "safetensors": ("safetensors.torch", "safetensors", _load_file),
    "from_pretrained": ("transformers.models.auto.modeling_auto", "transformers", _from_pretrained),
    "fastsafetensors": ("fastsafetensors", "fastsafetensors", _fastsafetensors),
    "runai-model-streamer": ("runai_model_streamer", "runai-model-streamer", _runai),
    "tensorizer": ("tensorizer", "tensorizer", _tensorizer),
    "torch.load": ("torch", "torch", _torch_load),
    "torch.load mmap": ("torch", "torch", _torch_load_mmap),
}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


async def peer(system: str, library: str) -> tuple[dict[str, str], Commands]:
    """Import what the system needs, then load on request; a failure is an answer, too."""
    quiet()
    module, distribution, load_it = PEERS[system]
    meter = Meter(library)
    try:
        import_module(module)
        ready = {"distribution": distribution, "version": version(distribution), "torch": version("torch")}
    except Exception as error:
        ready = {"failed": _reason(error)}

    async def load(folder: str, digest: bool) -> dict[str, Any]:
        try:
            meter.begin()
            tensors, kept = load_it(folder)
            answer = meter.end(tensors, digest)
        except Exception as error:
            return {"failed": _reason(error)}
        del tensors
        for each in kept:
            if hasattr(each, "close"):
                each.close()
        del kept
        gc.collect()
        return answer

    return ready, {"load": load}


async def writer() -> tuple[None, Commands]:
    """Write a checkpoint in the peers' own formats, from a folder of safetensors."""
    quiet()

    async def write(system: str, folder: str, target: str) -> str:
        try:
            tensors, _ = _load_file(folder)
            if system == "tensorizer":
                from tensorizer import TensorSerializer

                serializer = TensorSerializer(target)
                serializer.write_state_dict(tensors)
                serializer.close()
            else:
                torch.save(tensors, target)
        except Exception as error:
            Path(target).unlink(missing_ok=True)
            return _reason(error)
        return ""

    return None, {"write": write}


if __name__ == "__main__":
    serve(peer=peer, writer=writer)
