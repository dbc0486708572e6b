"""Which model classes the engine serves: those that a test compares with transformers' own forward pass.

Free of torch, so that a node can refuse the others when they are deployed.
"""

from __future__ import annotations

from collections.abc import Sequence

from sllm_actor.errors import UnsupportedArchitecture

# Class name -> module. The fork server imports every one of them before the first fork.
MODULES = {
    "FalconForCausalLM": "transformers.models.falcon.modeling_falcon",
    "GPT2LMHeadModel": "transformers.models.gpt2.modeling_gpt2",
    "GPTNeoXForCausalLM": "transformers.models.gpt_neox.modeling_gpt_neox",
    "LlamaForCausalLM": "transformers.models.llama.modeling_llama",
    "MistralForCausalLM": "transformers.models.mistral.modeling_mistral",
    "OPTForCausalLM": "transformers.models.opt.modeling_opt",
    "Qwen2ForCausalLM": "transformers.models.qwen2.modeling_qwen2",
    "Qwen3ForCausalLM": "transformers.models.qwen3.modeling_qwen3",
    "Qwen3MoeForCausalLM": "transformers.models.qwen3_moe.modeling_qwen3_moe",
}
# The same without their heads, and the models that look both ways: they embed and do not generate.
BASES = {
    f"{name.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}Model": module for name, module in MODULES.items()
}
ENCODERS = {
    "BertModel": "transformers.models.bert.modeling_bert",
    "DistilBertModel": "transformers.models.distilbert.modeling_distilbert",
    "MPNetModel": "transformers.models.mpnet.modeling_mpnet",
    "RobertaModel": "transformers.models.roberta.modeling_roberta",
    "XLMRobertaModel": "transformers.models.xlm_roberta.modeling_xlm_roberta",
}
EVERY = MODULES | BASES | ENCODERS


def choose(architectures: Sequence[str], *, generates: bool = True) -> str:
    """Pick the class that serves a checkpoint from its config's `architectures`; the one without a head where it
    is not to generate, or can't.

    Raises:
        UnsupportedArchitecture: none of them is served; the message lists those that are.
    """
    for name in architectures:
        headless = name.removesuffix("ForMaskedLM").removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        headless = headless if headless in EVERY else f"{headless}Model"
        if name in MODULES:
            return name if generates else headless
        if name in EVERY or (headless in ENCODERS and name.endswith("ForMaskedLM")):
            return headless
    raise UnsupportedArchitecture(
        f"config.json names {', '.join(architectures)[:160] or 'no architecture'}; this version serves "
        + ", ".join(sorted(MODULES | ENCODERS))
        + ", and the former without their heads",
        param="architectures",
    )
