"""Ask a node through litellm, as its users do. Prints what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys

# It would fetch a list of prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm


def main() -> None:
    url, model = sys.argv[1:]
    asked = {
        "model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0,
        "messages": [{"role": "user", "content": "What is 47 + 35?"}],
    }  # fmt: skip
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    absent = ""
    try:
        litellm.completion(**asked | {"model": "openai/absent"})
    except litellm.NotFoundError:
        absent = "model_not_found"
    seen = {
        "chat": whole.choices[0].message.content,
        "usage": whole.usage.total_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "stream_usage": [chunk.usage.total_tokens for chunk in chunks if getattr(chunk, "usage", None)][-1],
        "absent": absent,
    }
    print(json.dumps(seen))


main()
