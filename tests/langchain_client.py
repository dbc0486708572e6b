"""Ask a node through langchain-openai, as its users do. Prints what it saw as JSON."""

from __future__ import annotations

import json
import sys

from langchain_openai import ChatOpenAI


def main() -> None:
    url, model = sys.argv[1:]
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="unused", model=model, max_retries=0, stream_usage=True)
    whole = chat.invoke("What is 47 + 35?")
    chunks = list(chat.stream("What is 47 + 35?"))
    absent = ""
    try:
        ChatOpenAI(base_url=f"{url}/v1", api_key="unused", model="absent", max_retries=0).invoke("Hi")
    except Exception as error:
        absent = str(getattr(error, "code", error))
    seen = {
        "chat": whole.content,
        "usage": whole.usage_metadata["total_tokens"],
        "streamed": "".join(chunk.content for chunk in chunks),
        "stream_usage": [chunk.usage_metadata["total_tokens"] for chunk in chunks if chunk.usage_metadata][-1],
        "absent": absent,
    }
    print(json.dumps(seen))


main()
