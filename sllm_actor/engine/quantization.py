"""What a config may say of quantized weights: the kinds that are served, and why others are not."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sllm_actor.engine import four_bits
from sllm_actor.errors import CheckpointConfigInvalid, UnsupportedArchitecture

SERVED = "bitsandbytes"
EXTRA = "pip install 'sllm_actor[quant]'"


class _Any(msgspec.Struct, frozen=True):
    quant_method: str = ""
    load_in_4bit: bool = False
    load_in_8bit: bool = False


class _BitsAndBytes(_Any, frozen=True):
    """Of bitsandbytes' settings those that say how the weights are stored; others are for making them."""

    bnb_4bit_quant_storage: str = "uint8"
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"


def weight_bits(quantization: Any) -> int:
    """Read a config's `quantization_config`: of how many bits its quantized weights are.

    Raises:
        CheckpointConfigInvalid: it has fields of a wrong type, or no sense.
        UnsupportedArchitecture: weights of this kind are not served; the message says what is.
    """
    try:
        named = msgspec.convert(quantization, _Any)
        method = named.quant_method or (SERVED if named.load_in_4bit or named.load_in_8bit else "")
        if method != SERVED:
            raise UnsupportedArchitecture(_refusal(method))
        found = msgspec.convert(quantization, _BitsAndBytes)
    except msgspec.ValidationError as error:
        raise CheckpointConfigInvalid(f"config.json: quantization_config: {error}") from None
    if found.load_in_4bit == found.load_in_8bit:
        raise CheckpointConfigInvalid("config.json: quantization_config asks for neither of 4 and 8 bits, or for both")
    if found.load_in_8bit:
        return 8
    if found.bnb_4bit_quant_storage not in ("uint8", "torch.uint8"):
        raise UnsupportedArchitecture(
            f"4-bit weights stored as {found.bnb_4bit_quant_storage[:50]} are not served; save them as uint8"
        )
    if not four_bits.load():
        raise UnsupportedArchitecture(f"4-bit weights need the library bitsandbytes beside the node: {EXTRA}")
    return 4


def _refusal(method: str) -> str:
    return (
        f"config.json names the quantization {method[:50] or 'of no method'}, which this version does not serve; it "
        "serves checkpoints that bitsandbytes has quantized to 4 or 8 bits, and unquantized ones"
    )
