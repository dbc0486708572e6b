"""Gateway and its text processes: prompts to token ids and token ids to text, over a Unix socket pair.

`call` pairs an answer with its question. `path` is the folder that holds the model's tokenizer.
"""

from __future__ import annotations

from sllm_actor.messages.declare import message


@message("text.tool_call")
class PastCall:
    """A tool call that the model has made before; `arguments` is JSON, if the model wrote any."""

    id: str
    name: str
    arguments: str


@message("text.chat_turn")
class ChatTurn:
    """One message of a conversation, as chat templates expect it. `tool_call_id` is that of the call it answers."""

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[PastCall, ...] = ()
    tool_call_id: str = ""


@message("text.load")
class LoadTokenizer:
    """Load the tokenizer of `path` and keep it. Answered by `TokenizerLoaded` or `TextFailed`."""

    call: int
    path: str


@message("text.loaded")
class TokenizerLoaded:
    """`chat` tells whether the tokenizer brings a chat template that renders."""

    call: int
    vocabulary_tokens: int
    chat: bool


@message("text.render")
class RenderChat:
    """Apply the chat template and tokenize. Answered by `Encoded` or `TextFailed`.

    `tools` is a JSON list of OpenAI's tools, empty where there are none.
    """

    call: int
    path: str
    turns: tuple[ChatTurn, ...]
    tools: str = ""


@message("text.encode")
class EncodeText:
    """Tokenize a bare prompt, with the special tokens that the tokenizer adds. Answered like `RenderChat`."""

    call: int
    path: str
    text: str


@message("text.encoded")
class Encoded:
    """Token ids, little-endian uint32.

    Where tools were rendered: the name of the format that the model calls them in, and the special token, if it is
    one, that a call begins with.
    """

    call: int
    token_ids: bytes
    tool_format: str = ""
    marker: int | None = None


@message("text.decode")
class Detokenize:
    """Say what `token_ids[read:]` add to the text of `token_ids[:read]`; `final` flushes a torn character.

    Special tokens write nothing, but for the `marker`. Answered by `Detokenized` or `TextFailed`.
    """

    call: int
    path: str
    token_ids: bytes
    read: int
    final: bool
    marker: int | None = None


@message("text.decoded")
class Detokenized:
    """The added text; `complete` is false while the last character still misses bytes (then `text` is empty)."""

    call: int
    text: str
    complete: bool


@message("text.describe")
class DescribeTokens:
    """Give the bytes of each of `token_ids` (little-endian uint32). Answered by `TokensDescribed` or `TextFailed`."""

    call: int
    path: str
    token_ids: bytes


@message("text.described")
class TokensDescribed:
    """The bytes of each token; of one that the tokenizer does not have, none."""

    call: int
    pieces: tuple[bytes, ...]


@message("text.failed")
class TextFailed:
    """The question `call` can't be answered; `param` is the field that is wrong, where one is."""

    call: int
    code: str
    text: str
    param: str = ""


TO_TEXT = (LoadTokenizer, RenderChat, EncodeText, Detokenize, DescribeTokens)
FROM_TEXT = (TokenizerLoaded, Encoded, Detokenized, TokensDescribed, TextFailed)
