"""Ask a node for choices, log-probabilities and the rest with the official client. Prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": "What is 47 + 35?"}]
COUNT: Any = [{"role": "user", "content": "Count from 3 to 20."}]


def streamed(chunks: Any) -> dict[str, Any]:
    """Put a stream together again: each choice's text, finish and log-probabilities, and the usages that came."""
    seen: dict[str, Any] = {"texts": {}, "finishes": {}, "logprobs": {}, "roles": {}, "usages": []}
    for chunk in chunks:
        seen["usages"].append(chunk.usage.model_dump() if chunk.usage else None)
        for choice in chunk.choices:
            at = choice.index
            delta = getattr(choice, "delta", None)
            text = choice.text if delta is None else delta.content
            seen["texts"][at] = seen["texts"].get(at, "") + (text or "")
            if delta is not None and delta.role:
                seen["roles"][at] = delta.role
            if choice.finish_reason:
                seen["finishes"][at] = choice.finish_reason
            if choice.logprobs is not None:
                if delta is None:
                    seen["logprobs"].setdefault(at, []).extend(choice.logprobs.tokens)
                else:
                    tokens = [token.model_dump() for token in choice.logprobs.content]
                    seen["logprobs"].setdefault(at, []).extend(tokens)
    return seen


def refusals(client: openai.OpenAI, model: str, wrong: dict[str, Any]) -> dict[str, Any]:
    """Send each wrong value alone, and give the field that each refusal names."""
    named = {}
    for field, value in wrong.items():
        try:
            client.chat.completions.create(model=model, messages=MESSAGES, extra_body={field: value})
        except openai.BadRequestError as error:
            named[field] = error.param
    return named


def main() -> None:
    url, model, wrong = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    chat, plain = client.chat.completions.create, client.completions.create
    seen: dict[str, Any] = {}

    sampled: Any = {"model": model, "prompt": "7", "temperature": 2, "max_tokens": 12, "seed": 5}
    three = plain(**sampled, n=3)
    seen["three"] = [choice.text for choice in sorted(three.choices, key=lambda choice: choice.index)]
    seen["again"] = [choice.text for choice in plain(**sampled, n=3).choices]
    seen["alone"] = plain(**sampled).choices[0].text
    seen["three_usage"] = three.usage.model_dump() if three.usage else None
    seen["three_streamed"] = streamed(
        plain(**sampled, n=3, logprobs=2, stream=True, stream_options={"include_usage": True})
    )

    asked: Any = {"model": model, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    whole = chat(**asked)
    seen["chat"] = whole.choices[0].message.content
    content = whole.choices[0].logprobs.content if whole.choices[0].logprobs else None
    seen["chat_logprobs"] = [token.model_dump() for token in content or ()]
    every: Any = {"include_usage": True, "continuous_usage_stats": True}
    seen["chat_streamed"] = streamed(chat(**asked, n=2, stream=True, stream_options=every))

    on: Any = {"model": model, "temperature": 0, "extra_body": {"ignore_eos": True}}
    columns = plain(**on, prompt="7", max_tokens=6, logprobs=2)
    seen["columns"] = columns.choices[0].model_dump()
    echoed = plain(**on, prompt=["1, 2, 3", "5, 6"], max_tokens=4, n=2, echo=True)
    seen["echoed"] = [choice.text for choice in echoed.choices]
    seen["echo_streamed"] = streamed(plain(**on, prompt="1, 2", max_tokens=2, echo=True, stream=True))["texts"]

    seen["stops"] = {}
    for stop in (", 9", " 9, 1", "8,", "7, 8, 9", "3"):
        stopped = chat(model=model, messages=COUNT, stop=[stop, "never"], logprobs=True, top_logprobs=0)
        choice = stopped.choices[0]
        tokens = [token.token for token in (choice.logprobs.content if choice.logprobs else None) or ()]
        chunks = chat(model=model, messages=COUNT, stop=stop, stream=True, logprobs=True)
        seen["stops"][stop] = [choice.message.content, choice.finish_reason, tokens, streamed(chunks)]

    seen["refused"] = refusals(client, model, json.loads(wrong))
    print(json.dumps(seen))


main()
