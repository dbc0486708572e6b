"""Names that come from outside, matched whole against a narrow alphabet."""

from __future__ import annotations

import re
from typing import NewType

from sllm_actor.errors import InvalidName

ModelName = NewType("ModelName", str)
NodeId = NewType("NodeId", str)
RequestId = NewType("RequestId", str)

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_MODEL_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_NODE_ID = re.compile(_PART)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_model_name(text: str) -> ModelName:
    """Accept `name` or `owner/name`: ASCII letters, digits, `.`, `_`, `-`, at most 96 characters a part.

    Raises:
        InvalidName: anything else; two dots in a row are refused too.
    """
    if not _MODEL_NAME.fullmatch(text) or ".." in text:
        raise InvalidName(
            f"{text[:120]!r} is not a model name: use NAME or OWNER/NAME of ASCII letters, digits, '.', '_' "
            "and '-', beginning and ending with a letter or digit, at most 96 characters a part",
            param="model",
        )
    return ModelName(text)


def check_node_id(text: str) -> NodeId:
    """Accept one name part, as in a model name.

    Raises:
        InvalidName: anything else.
    """
    if not _NODE_ID.fullmatch(text) or ".." in text:
        raise InvalidName(f"{text[:120]!r} is not a node id", param="node")
    return NodeId(text)


def is_request_id(text: str) -> bool:
    """Tell whether a client's own request id can be taken over as it is."""
    return _REQUEST_ID.fullmatch(text) is not None
