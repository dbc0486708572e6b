"""Checkpoints of real shapes with random weights, saved as stock Hugging Face folders.

`python -m sllm_actor.testing.shapes OUT [--shape opt-1.3b] [--shapes FOLDER] [--tokenizers FOLDER]` writes one.
Imports torch: not for a node's own process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SEED = 20240710
# facebook/opt-125m as published (OPT, Zhang et al. 2022, table 1), for machines without the folder of shapes.
OPT_125M: dict[str, Any] = {
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
# Those that can be written; the larger one as facebook/opt-1.3b is (the same table).
OPT = {
    "opt-125m": OPT_125M,
    "opt-1.3b": OPT_125M
    | {"ffn_dim": 8192, "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24}
    | {"word_embed_proj_dim": 2048},
}
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
OPT_TOKENS = 50265


def save_opt(out: Path, shape: str, shapes: Path | None = None, tokenizers: Path | None = None) -> None:
    """Write one of `OPT` with seeded random weights in float16, as it was published; keeps what is there.

    `shapes` may hold `derived_configs/SHAPE/config.json`, and `tokenizers` the `opt_metaseq` vocabulary.
    """
    if (out / "config.json").exists():
        return
    config = OPT[shape]
    if shapes is not None and (shapes / f"derived_configs/{shape}/config.json").is_file():
        config = json.loads((shapes / f"derived_configs/{shape}/config.json").read_text())
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.manual_seed(SEED)
    OPTForCausalLM(OPTConfig(**config)).to(torch.float16).save_pretrained(unfinished)
    _opt_tokenizer(tokenizers).save_pretrained(unfinished)
    os.rename(unfinished, out)


def _opt_tokenizer(tokenizers: Path | None) -> PreTrainedTokenizerFast:
    folder = tokenizers / "opt_metaseq" if tokenizers is not None else None
    if folder is not None and folder.is_dir():
        bpe = models.BPE.from_file(str(folder / "gpt2-vocab.json"), str(folder / "gpt2-merges.txt"))
    else:
        bpe = models.BPE(*_made_up_vocabulary())
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )


def _made_up_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Make a byte-level vocabulary of OPT's size: bytes, then pairs and triples of letters."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = list(itertools.product("Ġ" + string.ascii_letters, string.ascii_letters))
    triples = ((first + second, third) for (first, second) in pairs for third in string.ascii_letters)
    merges = list(itertools.islice(itertools.chain(pairs, triples), OPT_TOKENS - len(tokens)))
    tokens += [left + right for left, right in merges]
    return {token: number for number, token in enumerate(tokens)}, merges


def main() -> None:
    """Write the shape where the command line says."""
    parser = argparse.ArgumentParser(description=save_opt.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=OPT, default="opt-125m")
    parser.add_argument("--shapes", type=Path)
    parser.add_argument("--tokenizers", type=Path)
    arguments = parser.parse_args()
    save_opt(arguments.out, arguments.shape, arguments.shapes, arguments.tokenizers)


if __name__ == "__main__":
    main()
