"""What to do next, by the code of an error whose message does not say it itself."""

from __future__ import annotations

from sllm_actor.cli.client import NodeClient, NodeRefused
from sllm_actor.cli.names import Noun, known_names, nearest

_FOLDER = (
    "a checkpoint is a folder with config.json and safetensors files, or hf://OWNER/NAME, https://, s3://, sllm://"
)
HINTS = {
    "model_not_found": "'sllm-node ls' lists the registered models, 'sllm-node deploy SOURCE' registers one",
    "node_not_found": "'sllm-node status' lists the nodes",
    "request_not_found": "'sllm-node top' shows the streams that run; an answer has its id in the header X-Request-Id",
    "model_exists": "--replace takes the place of what is registered; --name gives another name",
    "invalid_api_key": "--api-key KEY, or the variable SLLM_API_KEY; 'sllm-node keys create' makes one",
    "access_denied": "use a key that may: 'sllm-node keys list' shows what each is for",
    "checkpoint_missing": _FOLDER,
    "checkpoint_empty": _FOLDER,
    "backend_invalid": "docs/vllm.md says what vLLM needs; --backend sllm has this project's own engine serve it",
    "target_busy": "wait for the other process, or choose another target",
    "model_too_large": "'sllm-node start --set host_pool_bytes=…' gives models more memory",
    "no_capacity": "'sllm-node ps' shows what runs, 'sllm-node stop MODEL' makes room",
    "queue_full": "'sllm-node top' shows what is waited for; try again, or raise max_waiting_requests",
    "rate_limit_exceeded": "try again later; 'sllm-node keys list' shows the bounds of each key",
    "conflict": "'sllm-node ps' shows what is held, pinned or on its way, and by whom",
    "source_unreachable": "the same command goes on where this one has stopped; behind a proxy the node needs "
    "HTTPS_PROXY, and without a network a folder that was downloaded elsewhere",
    "source_refused": "docs/sources.md says where credentials are looked for",
    "source_missing": "look at the name, and at the revision behind @",
    "role_missing": "'sllm-node status' shows which node has which role; name it with --url",
    "no_leader": "'sllm-node status' shows who leads; without etcd nobody does",
    "node_down": "'sllm-node status' shows which nodes answer",
    "draining": "'sllm-node status' lists the nodes that go on",
    "checkpoint_corrupt": "fetch or convert it again",
}


async def hint_for(client: NodeClient, error: NodeRefused, about: str) -> str:
    """Say what to do next; where `about`, which the verb was given, is not there, first whether another was meant."""
    meant = ""
    if about and error.code in {noun.value for noun in Noun}:
        meant = nearest(about, await known_names(client, Noun(error.code)))
    return "; ".join(filter(None, (meant, HINTS.get(error.code, ""))))
