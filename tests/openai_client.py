"""Drive a node with the official client, as a user's own program would. Prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def main() -> None:
    url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    messages: Any = [{"role": "user", "content": "What is 47 + 35?"}]
    seen: dict[str, Any] = {}

    whole = client.chat.completions.create(model=model, messages=messages)
    seen["chat"] = whole.choices[0].message.content
    seen["chat_finish"] = whole.choices[0].finish_reason
    seen["chat_usage"] = whole.usage.model_dump() if whole.usage else None

    chunks = list(
        client.chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    seen["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    seen["stream_pieces"] = sum(1 for chunk in chunks if chunk.choices and chunk.choices[0].delta.content)
    seen["stream_role"] = chunks[0].choices[0].delta.role
    seen["stream_finish"] = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
    seen["stream_usage"] = chunks[-1].usage.model_dump() if chunks[-1].usage else None

    options: Any = {"model": model, "prompt": "1, 2, 3", "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    plain = client.completions.create(**options)
    seen["completion_finish"] = plain.choices[0].finish_reason
    seen["completion_tokens"] = plain.usage.completion_tokens if plain.usage else None
    pieces = client.completions.create(**options, stream=True)
    seen["completion_same"] = "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text

    seen["models"] = [card.id for card in client.models.list()]
    seen["retrieved"] = client.models.retrieve(model).id

    try:
        client.chat.completions.create(model="absent", messages=messages)
    except openai.NotFoundError as error:
        seen["absent"] = error.code
    try:
        client.chat.completions.create(model=model, messages=messages, service_tier="flex")
    except openai.BadRequestError as error:
        seen["unsupported"] = error.param
    print(json.dumps(seen))


main()
