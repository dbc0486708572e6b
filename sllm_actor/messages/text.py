"""Gateway and its text processes: prompts to token ids and token ids to text, over a Unix socket pair.

`call` pairs an answer with its question. `path` is the folder that holds the model's tokenizer.
"""

from __future__ import annotations

from sllm_actor.messages.declare import message


@message("text.chat_turn")
class ChatTurn:
    """One message of a conversation, as chat templates expect it."""

    role: str
    content: str


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
    """Apply the chat template and tokenize. Answered by `Encoded` or `TextFailed`."""

    call: int
    path: str
    turns: tuple[ChatTurn, ...]


@message("text.encode")
class EncodeText:
    """Tokenize a bare prompt, with the special tokens that the tokenizer adds. Answered like `RenderChat`."""

    call: int
    path: str
    text: str


@message("text.encoded")
class Encoded:
    """Token ids, little-endian uint32."""

    call: int
    token_ids: bytes


@message("text.decode")
class Detokenize:
    """Say what `token_ids[read:]` add to the text of `token_ids[:read]`; `final` flushes a torn character.

    Answered by `Detokenized` or `TextFailed`.
    """

    call: int
    path: str
    token_ids: bytes
    read: int
    final: bool


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
    """The question `call` can't be answered."""

    call: int
    code: str
    text: str


TO_TEXT = (LoadTokenizer, RenderChat, EncodeText, Detokenize, DescribeTokens)
FROM_TEXT = (TokenizerLoaded, Encoded, Detokenized, TokensDescribed, TextFailed)
