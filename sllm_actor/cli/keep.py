"""`sllm-node pin`, `unpin` and `evict`: what is to stay in a node's tiers, and what is to go."""

from __future__ import annotations

from typing import Annotated

import typer

from sllm_actor.cli import completion
from sllm_actor.cli.asking import Json, Key, Url, ask
from sllm_actor.cli.client import DEFAULT_URL
from sllm_actor.cli.show import out, print_json
from sllm_actor.domain import TierChoice

Model = Annotated[
    str,
    typer.Argument(
        help="Its name; or the id that 'ps' shows of what is not registered.", autocompletion=completion.models
    ),
]
Tier = Annotated[TierChoice, typer.Option("--tier", help="Where: host memory, the SSD, or wherever it is.")]
_PLACES = {"host": "in host memory", "ssd": "on the SSD"}


def pin(
    model: Model, tier: Tier = TierChoice.ALL, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False
) -> None:
    """Keep a model where it is: nothing makes room at its expense. On the SSD that outlives the node.

    Example: sllm-node pin opt --tier ssd
    """
    _change("pin", "pinned", model, tier, url, api_key, as_json=as_json)


def unpin(
    model: Model, tier: Tier = TierChoice.ALL, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False
) -> None:
    """Let a model make room again.

    Example: sllm-node unpin opt
    """
    _change("unpin", "unpinned", model, tier, url, api_key, as_json=as_json)


def evict(
    model: Model, tier: Tier = TierChoice.ALL, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False
) -> None:
    """Give up what the tiers have of a model, half a download too; it stays registered. Refused while it is in use.

    Example: sllm-node stop opt && sllm-node evict opt --tier host
    """
    _change("evict", "evicted", model, tier, url, api_key, as_json=as_json)


def _change(verb: str, done: str, model: str, tier: TierChoice, url: str, api_key: str, *, as_json: bool) -> None:
    path, body = f"/admin/models/{model}/{verb}", {"tier": tier.value}
    answer = ask(url, api_key, lambda client: client.call("POST", path, body), as_json=as_json, about=model)
    if as_json:
        print_json(answer)
        return
    places = " and ".join(_PLACES[name] for name in answer["tiers"])
    out.print(f"{done} {model} {places}" if places else f"{model}: nothing was there to be {done}")
