"""A stand-in for vLLM, which can't be installed where the tests run: names and signatures of v0.33.0, and no more.

What the real ones refuse is refused: unknown arguments, values out of bounds, tokens that the model does not have. The
model behind it looks at the last token alone, so that a test can say what it must answer.
"""

from __future__ import annotations

from typing import TypedDict

from vllm.sampling_params import SamplingParams


class TokensPrompt(TypedDict):
    """A prompt that is tokens already."""

    prompt_token_ids: list[int]


class _Registry:
    def get_supported_archs(self) -> set[str]:
        """Name the model classes that are served."""
        return {"LlamaForCausalLM"}


ModelRegistry = _Registry()

__all__ = ["ModelRegistry", "SamplingParams", "TokensPrompt"]
