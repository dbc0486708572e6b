"""Whole, 8-bit and 4-bit weights of one model: tokens per second, starts from host memory, bytes.

The checkpoints are written by transformers with bitsandbytes. The peer is the same two, that read the same folder and
answer one stream with `generate`. Starts are those of a node, over HTTP, whose host pool has the checkpoint already.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from benchmarks.coldstart import DATA
from benchmarks.report import Report
from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.safetensors_header import Tensor
from sllm_actor.cli.show import out
from sllm_actor.domain import EngineLimits, Sampling
from sllm_actor.engine import four_bits, skeleton
from sllm_actor.engine.mapped_tensors import MappedTensors
from sllm_actor.engine.runner import Runner
from sllm_actor.testing.node_process import NodeProcess, running_node
from sllm_actor.units import GIB, MIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50272, "max_position_embeddings": 2048,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
LIMITS = EngineLimits(slots=16, kv_cache_bytes=GIB, prefill_chunk_tokens=256)
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "int8": (torch.bfloat16, {"load_in_8bit": True}),
    "nf4": (torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
}
SHAPES = ("opt-125m", "llama-210m")
PROMPT_TOKENS, NEW_TOKENS, STREAMS = 32, 16, 8


def run(report: Report, repeats: int, work_dir: Path, only: Sequence[str], tiny: bool) -> None:
    """Measure the shapes, all or those in `only`, the kinds in turns."""
    four_bits.load()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for shape in only or SHAPES:
        folders = {kind: checkpoint(work_dir, shape, kind, tiny) for kind in KINDS}
        models = {kind: _attach(folder) for kind, folder in folders.items()}
        peers = {kind: AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for kind, folder in folders.items()}
        times: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
        with running_node(work_dir / "bench-data", "host_pool_bytes=3GiB") as node:
            for kind, folder in folders.items():
                node.deploy(folder.absolute(), f"{shape}-{kind}", replace=True)
            for repeat in range(repeats + 1):  # The first is not counted: it warms caches and threads.
                for kind in KINDS:
                    found = {
                        "one_s": _ours(models[kind], 1), "eight_s": _ours(models[kind], STREAMS),
                        "peer_s": _theirs(peers[kind]), "start_s": _start(node, f"{shape}-{kind}"),
                    }  # fmt: skip
                    out.print(
                        f"{repeat}/{repeats} {shape} {kind} " + ", ".join(f"{k} {v:.3f}" for k, v in found.items())
                    )
                    for part, value in found.items():
                        if repeat:
                            times[kind].setdefault(part, []).append(value)
        _write(report, shape, folders, times)


def checkpoint(work_dir: Path, shape: str, kind: str, tiny: bool) -> Path:
    """Make a checkpoint, laid out by `convert`, with OPT's tokenizer; keeps what is there."""
    folder = work_dir / f"weights-{'tiny-' if tiny else ''}{shape}-{kind}"
    if (folder / "sllm.json").exists():
        return folder
    tokenizer = work_dir / "opt-125m"
    words = [sys.executable, "-m", "sllm_actor.testing.shapes", str(tokenizer)]
    words += ["--shapes", str(DATA / "model_layouts"), "--tokenizers", str(DATA / "tokenizers")]
    subprocess.run(words, check=True)
    dtype, quantization = KINDS[kind]
    made = folder.with_name(folder.name + ".made")
    opt = shape == "opt-125m"
    config = AutoConfig.from_pretrained(tokenizer) if opt else AutoConfig.for_model("llama", **LLAMA)
    config.num_hidden_layers = 1 if tiny else config.num_hidden_layers
    torch.manual_seed(20261128)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(made)
    if quantization:
        asked = BitsAndBytesConfig(**quantization)
        AutoModelForCausalLM.from_pretrained(made, quantization_config=asked, dtype=dtype).save_pretrained(made)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(made)
    convert(made, folder)
    shutil.rmtree(made)
    return folder


def _attach(folder: Path) -> PreTrainedModel:
    """Map a checkpoint and make its bytes a model's weights, as an engine does."""
    checkpoint = read_folder(folder)
    model = skeleton.build(str(folder), checkpoint.dtype)
    tensors: list[Tensor] = []
    views: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        with checkpoint.file_path(file).open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        data = MappedTensors(memoryview(mapped))
        tensors += file.header.tensors
        views |= {tensor.name: data.view(tensor) for tensor in file.header.tensors}
    paired = skeleton.match(model, tensors, checkpoint.aliases)
    skeleton.put_weights(model, {name: views[tensor.name] for name, tensor in paired.items()})
    return model


def _prompt(seed: int) -> list[int]:
    return [3 + (seed * 7919 + place * 104729) % 50000 for place in range(PROMPT_TOKENS)]


def _ours(model: PreTrainedModel, streams: int) -> float:
    runner = Runner(model, (), int(model.config.max_position_embeddings), LIMITS)
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, top_p=1.0, seed=0, ignore_eos=True)
    begin_s = time.perf_counter()
    for stream in range(streams):
        runner.begin(_prompt(stream), sampling)
    while runner.busy:
        failed = runner.step().failed
        assert not failed, failed
    return time.perf_counter() - begin_s


def _theirs(model: PreTrainedModel) -> float:
    ids = torch.tensor([_prompt(0)])
    model.generation_config.eos_token_id = None
    begin_s = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return time.perf_counter() - begin_s


def _start(node: NodeProcess, name: str) -> float:
    """Time a request to its first token, its model in the host pool and no instance of it running."""
    body = {"model": name, "prompt": "The quick brown fox", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    begin_s = time.perf_counter()
    node.call("POST", "/v1/completions", body)
    took_s = time.perf_counter() - begin_s
    late = [late for found in node.call("GET", "/admin/instances")["instances"] for late in found["late_imports"]]
    node.call("POST", f"/admin/models/{name}/unload", {})
    if late:
        raise SystemExit(f"modules were imported after the node was ready: {late}")
    return took_s


def _write(report: Report, shape: str, folders: dict[str, Path], times: dict[str, dict[str, list[float]]]) -> None:
    for kind, found in times.items():
        median = {part: statistics.median(values) for part, values in found.items()}
        size_bytes = sum(path.stat().st_size for path in folders[kind].glob("*.safetensors"))
        report.row(
            shape=shape, weights=kind, checkpoint_mib=round(size_bytes / MIB, 1),
            one_stream_tokens_s=round(NEW_TOKENS / median["one_s"], 1),
            eight_streams_tokens_s=round(STREAMS * NEW_TOKENS / median["eight_s"], 1),
            peer_one_stream_tokens_s=round(NEW_TOKENS / median["peer_s"], 1),
            start_from_host_s=round(median["start_s"], 4),
        )  # fmt: skip
    for kind, found in times.items():
        report.ratio(f"{shape}.{kind}.one_stream.rate_over_transformers", _ratio(found["peer_s"], found["one_s"]))
        if kind != "bf16":
            whole = times["bf16"]
            report.ratio(f"{shape}.{kind}.one_stream.rate_over_bf16", _ratio(whole["one_s"], found["one_s"]))
            report.ratio(f"{shape}.{kind}.eight_streams.rate_over_bf16", _ratio(whole["eight_s"], found["eight_s"]))


def _ratio(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(over, under, strict=True)]
