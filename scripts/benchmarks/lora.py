"""First token of a request for a LoRA adapter of 100 MB, against its base's warm one, on OPT-1.3B's shape (fp16).

Three by turns, each with a prompt of the same length that nobody has asked before: the base alone; an adapter that is
in the host pool and not in the engine; the same adapter, loaded. The engine holds one adapter and there are two, so
that each start of the one drops the other; the timeline of every request is checked for what it loaded and from where.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import OPTConfig

from benchmarks.asking import first_token
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.testing.node_process import NodeProcess, running_node

BASE, SHAPE, TINY_SHAPE = "opt1.3b", "opt-1.3b", "opt-125m"
ADAPTERS = ("first", "second")
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER_BYTES = 100_000_000
HOST = "host memory"
WORDS = ("river", "stone", "winter", "garden", "music", "paper", "silver", "window", "harbor", "summer")


def run(report: Report, repeats: int, work_dir: Path, data: Path, tiny: bool) -> None:
    """Measure the three by turns on one node."""
    shape = TINY_SHAPE if tiny else SHAPE
    folder = work_dir / shape
    command = [sys.executable, "-m", "sllm_actor.testing.shapes", str(folder), "--shape", shape]
    command += ["--shapes", str(data / "model_layouts"), "--tokenizers", str(data / "tokenizers")]
    subprocess.run(command, check=True)
    knobs = ("host_pool_bytes=3584MiB", "keep_alive_s=inf", "max_adapters_per_instance=1", "max_instances=1")
    with running_node(work_dir / "bench-data-lora", *knobs) as node:
        node.deploy(folder.absolute(), BASE, replace=True)
        for seed, name in enumerate(ADAPTERS):
            made = work_dir / f"{shape}-{name}"
            _save_adapter(made, folder, seed)
            node.deploy(made.absolute(), name, base=BASE, replace=True)
        asking = _Asking(node)
        for name in (BASE, *ADAPTERS):  # Into host memory; not counted.
            asking.time(name)
        base, start, loaded = list[float](), list[float](), list[float]()
        last: dict[str, Any] = {}
        for repeat in range(repeats):
            name = ADAPTERS[repeat % len(ADAPTERS)]
            base.append(asking.time(BASE)[0])
            took_s, last = asking.time(name)
            _see_load(last)
            start.append(took_s)
            took_s, warm = asking.time(name)
            if _loads(warm):
                raise SystemExit("the adapter was loaded twice")
            loaded.append(took_s)
            out.print(f"{repeat + 1}/{repeats} base {base[-1]:.3f} s, start {start[-1]:.3f} s, loaded {took_s:.3f} s")
    for label, values in (("base", base), ("adapter from the host pool", start), ("adapter, loaded", loaded)):
        report.row(request=label, part="request to first token", seconds=round(statistics.median(values), 4))
    span = _loads(last)[0]
    report.row(request="adapter from the host pool", part="adapter: lease, map, check (last)", seconds=_length_s(span))
    report.ratio(f"{shape}.adapter_start_over_base", [one / other for one, other in zip(start, base, strict=True)])
    report.ratio(f"{shape}.adapter_loaded_over_base", [one / other for one, other in zip(loaded, base, strict=True)])


def _save_adapter(folder: Path, base: Path, seed: int) -> None:
    """Write an adapter of the attentions in PEFT's layout, in fp16, of the rank that makes it 100 MB; keep one."""
    if (folder / "adapter_config.json").exists():
        return
    config = OPTConfig.from_pretrained(base)
    width = config.hidden_size
    rank = ADAPTER_BYTES // (config.num_hidden_layers * len(TARGETS) * 2 * width * 2)
    rank = min(rank, 256)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for target in TARGETS:
            name = f"base_model.model.model.decoder.layers.{layer}.self_attn.{target}"
            for side, shape in (("A", (rank, width)), ("B", (width, rank))):
                value = torch.randn(shape, generator=random) * 0.02
                tensors[f"{name}.lora_{side}.weight"] = value.to(torch.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))


class _Asking:
    def __init__(self, node: NodeProcess) -> None:
        self._node = node
        self._asked = 0

    def time(self, model: str) -> tuple[float, dict[str, Any]]:
        """Time a first token behind a prompt that begins as none before did, always as long."""
        self._asked += 1
        number, words = self._asked, []
        for _ in range(8):
            number, word = divmod(number, len(WORDS))
            words.append(WORDS[word])
        return first_token(self._node, model, " ".join(["", *words]))


def _loads(timeline: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for span in timeline["spans"] if span["name"] == "adapter"]


def _see_load(timeline: dict[str, Any]) -> None:
    """See that the adapter was loaded for this request, out of the host pool, on a base that was running."""
    tiers = [span["tier"] for span in _loads(timeline)]
    if timeline["cold"] or tiers != [HOST]:
        raise SystemExit(f"not the start that was to be measured: cold={timeline['cold']}, adapters from {tiers}")


def _length_s(span: dict[str, Any]) -> float:
    return round(float(span["end_s"] - span["begin_s"]), 4)
