"""Ask a node for vectors with the official client, which asks for base64 unless it is told otherwise."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def main() -> None:
    url, model, sentences = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    texts: list[str] = json.loads(sentences)
    seen: dict[str, Any] = {}
    seen["base64"] = client.embeddings.create(model=model, input=texts).data[0].embedding
    seen["float"] = client.embeddings.create(model=model, input=texts, encoding_format="float").data[0].embedding
    try:
        client.embeddings.create(model=model, input=texts, dimensions=7)
    except openai.BadRequestError as error:
        seen["unsupported"] = error.param
    print(json.dumps(seen))


main()
