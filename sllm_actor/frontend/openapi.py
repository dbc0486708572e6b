"""The description of the HTTP endpoint: bodies from the structs that check them, the rest written down here.

`openapi.yaml` beside this module is what this gives (`scripts/openapi` writes it); tests hold the one to the other, and
the node to both.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from sllm_actor.frontend.schema import (
    NOTICE_S,
    ChatRequest,
    CompletionRequest,
    DeployRequest,
    EmbeddingRequest,
    MigrationRequest,
    TierRequest,
)

SHIPPED = Path(__file__).with_name("openapi.yaml")
BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest, DeployRequest, MigrationRequest, TierRequest)
REF = "#/components/schemas/{name}"

STRING: dict[str, Any] = {"type": "string"}
INTEGER: dict[str, Any] = {"type": "integer"}
NUMBER: dict[str, Any] = {"type": "number"}
OBJECT: dict[str, Any] = {"type": "object"}
NULLABLE_STRING: dict[str, Any] = {"type": ["string", "null"]}
ANY: dict[str, Any] = {}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(name=name)}


ANSWERS: dict[str, Any] = {
    "Error": _object(error=_object(message=STRING, type=STRING, param=NULLABLE_STRING, code=STRING)),
    "Usage": _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER),
    "Explained": _object(
        request_id=STRING,
        model=STRING,
        text=STRING,
        instance_id=STRING,
        node=STRING,
        beside=INTEGER,
        start_of=STRING,
        decision={"type": ["object", "null"]},
    ),
    "ModelCard": _object(
        id=STRING,
        object={"const": "model"},
        created=INTEGER,
        owned_by=STRING,
        max_model_len=INTEGER,
        parent=NULLABLE_STRING,
    ),
    "ChatCompletion": _object(
        id=STRING,
        object={"const": "chat.completion"},
        created=INTEGER,
        model=STRING,
        choices=_list(_object(index=INTEGER, message=OBJECT, logprobs=ANY, finish_reason=STRING)),
        usage=_ref("Usage"),
    ),
    "Completion": _object(
        id=STRING,
        object={"const": "text_completion"},
        created=INTEGER,
        model=STRING,
        choices=_list(_object(index=INTEGER, text=STRING, logprobs=ANY, finish_reason=STRING)),
        usage=_ref("Usage"),
    ),
    "Embeddings": _object(
        object={"const": "list"},
        data=_list(
            _object(
                object={"const": "embedding"},
                index=INTEGER,
                embedding={"oneOf": [_list({"type": "number"}), STRING | {"contentEncoding": "base64"}]},
            )
        ),
        model=STRING,
        usage=_object(prompt_tokens=INTEGER, total_tokens=INTEGER),
    ),
}
ERRORS = {
    400: "Something in the request is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The API key is not for this.",
    404: "There is no such model, request, instance or path.",
    405: "The path has no such method.",
    408: "The request did not arrive in time.",
    409: "True of the world now; another state would allow it.",
    413: "The body is too long.",
    429: "Too many wait, or the key has asked too often; see `Retry-After`.",
    500: "A bug; the log of the node says more.",
    502: "The source of a model failed.",
    503: "The node can't now; see `Retry-After`.",
    504: "It took too long.",
}
HEADERS: list[dict[str, Any]] = [
    {
        "name": "X-Request-Timeout",
        "in": "header",
        "schema": {"type": "string", "pattern": r"^[1-9][0-9]{0,4}(\.[0-9]{1,3})?(ms|s|m)?$"},
        "description": "Time that the request may take, such as `30` (seconds) or `500ms`.",
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "schema": {"type": "string", "maxLength": 128},
        "description": "Taken over where it is 1 to 128 of `A-Za-z0-9._:-`; the answer has the id in any case.",
    },
]
LAST_EVENT_ID: dict[str, Any] = {
    "name": "Last-Event-ID",
    "in": "header",
    "schema": {"type": "string", "maxLength": 2048},
    "description": "The id of the last event that the client has; without it the stream begins anew.",
}
# (method, path): summary, body, status of a success, answer (none where `TEXTS` has its kind), statuses of errors
_NONE: tuple[int, ...] = ()
_ASKING = (400, 401, 403, 404, 408, 409, 413, 429, 500, 502, 503, 504)
_ADMIN = (400, 401, 403, 404, 429, 500, 503, 504)
_DEPLOY = (*_ADMIN, 408, 409, 413, 502)
OPERATIONS: dict[tuple[str, str], tuple[str, type | None, int, Any, tuple[int, ...]]] = {
    ("post", "/v1/chat/completions"): ("Answer a chat.", ChatRequest, 200, _ref("ChatCompletion"), _ASKING),
    ("post", "/v1/completions"): ("Go on with a text.", CompletionRequest, 200, _ref("Completion"), _ASKING),
    ("post", "/v1/embeddings"): ("Give vectors of texts.", EmbeddingRequest, 200, _ref("Embeddings"), _ASKING),
    ("get", "/v1/streams/{stream_id}"): (
        "Give the rest of a stream.", None, 200, None, (400, 401, 403, 404, 409, 429, 500, 503, 504),
    ),
    ("get", "/v1/models"): (
        "List the models.", None, 200, _object(object={"const": "list"}, data=_list(_ref("ModelCard"))), _ADMIN,
    ),
    ("get", "/v1/models/{name}"): ("Show a model.", None, 200, _ref("ModelCard"), _ADMIN),
    ("get", "/health"): ("Tell that the node lives.", None, 200, _object(status=STRING), _NONE),
    ("get", "/ready"): ("Tell whether it takes requests (503: it does not).", None, 200, _object(ready=ANY), (503,)),
    ("get", "/version"): ("Tell its version.", None, 200, _object(version=STRING), _NONE),
    ("get", "/metrics"): ("Metrics for Prometheus.", None, 200, None, (401, 500)),
    ("get", "/openapi.yaml"): ("This description.", None, 200, None, (401,)),
    ("get", "/admin/models"): ("List models and where each is.", None, 200, _object(models=_list(OBJECT)), _ADMIN),
    ("post", "/admin/models"): ("Register a model.", DeployRequest, 201, _object(model=OBJECT), _DEPLOY),
    ("post", "/admin/pull"): ("Register a model and fetch it.", DeployRequest, 200, None, _DEPLOY),
    ("delete", "/admin/models/{name}"): ("Forget a model.", None, 200, _object(removed=STRING), (*_ADMIN, 409)),
    ("post", "/admin/models/{name}/unload"): (
        "Stop its instances, and end its start.", None, 200, _object(stopped=INTEGER, ended_starts=INTEGER), _ADMIN,
    ),
    ("post", "/admin/models/{name}/pin"): (
        "Keep it in tiers.", TierRequest, 200, _object(pinned=STRING, tiers=_list(STRING)), (*_ADMIN, 408, 409, 413),
    ),
    ("post", "/admin/models/{name}/unpin"): (
        "Let it go again.", TierRequest, 200, _object(unpinned=STRING, tiers=_list(STRING)), (*_ADMIN, 408, 409, 413),
    ),
    ("post", "/admin/models/{name}/evict"): (
        "Give it up in tiers.", TierRequest, 200, _object(evicted=STRING, tiers=_list(STRING)),
        (*_ADMIN, 408, 409, 413),
    ),
    ("get", "/admin/tiers"): ("Show what each tier holds.", None, 200, OBJECT, _ADMIN),
    ("get", "/admin/runtime"): ("Show actors, links and the loop.", None, 200, OBJECT, _ADMIN),
    ("get", "/admin/events"): ("Watch: a snapshot, then what changes, as events.", None, 200, None, _ADMIN),
    ("get", "/admin/instances"): ("List instances.", None, 200, _object(instances=_list(OBJECT)), _ADMIN),
    ("get", "/admin/nodes"): ("List the nodes of the cluster.", None, 200, _object(nodes=_list(OBJECT)), _ADMIN),
    ("post", "/admin/nodes/{node}/cordon"): (
        "Let nothing be started on a node.", None, 200, _object(cordoned=STRING), _ADMIN,
    ),
    ("post", "/admin/nodes/{node}/uncordon"): (
        "Let models be started on a node again.", None, 200, _object(uncordoned=STRING), _ADMIN,
    ),
    ("post", "/admin/nodes/{node}/drain"): (
        "Cordon a node, and stop its instances.", None, 200, _object(drained=STRING, stopped=INTEGER), _ADMIN,
    ),
    ("post", "/admin/nodes/{node}/notice"): (
        "Say that a node will soon be gone: its answers go on elsewhere; answered when they do, or the time is over.",
        None, 200, _object(node=STRING, moved=INTEGER, stopped=INTEGER, left=INTEGER), _ADMIN,
    ),
    ("get", "/admin/migrations"): (
        "List the migrations that are under way.", None, 200, _object(migrations=_list(OBJECT)), _ADMIN,
    ),
    ("get", "/admin/requests"): ("List requests.", None, 200, _object(requests=_list(OBJECT)), _ADMIN),
    ("get", "/admin/requests/{request_id}"): ("Show a request's timeline.", None, 200, OBJECT, _ADMIN),
    ("get", "/admin/explain/{request_id}"): (
        "Tell how a request came to its instance, and why there.", None, 200, _ref("Explained"), _ADMIN,
    ),
    ("post", "/admin/requests/{request_id}/migrate"): (
        "Move a running request; answered when it goes on there.", MigrationRequest, 200,
        _object(
            request_id=STRING, node=STRING, instance_id=STRING, rounds=INTEGER, tokens=INTEGER, bytes_moved=INTEGER,
            recomputed_s=NUMBER,
        ),
        (*_ADMIN, 408, 409, 413),
    ),
}  # fmt: skip
TEXTS = {
    "/metrics": "text/plain",
    "/openapi.yaml": "application/yaml",
    "/admin/events": "text/event-stream",
    "/admin/pull": "application/x-ndjson",
    "/v1/streams/{stream_id}": "text/event-stream",
}
STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
OPEN = frozenset({"/health", "/ready", "/version"})


def describe() -> dict[str, Any]:
    """Give the description, as OpenAPI 3.1."""
    _, schemas = msgspec.json.schema_components(BODIES, ref_template=REF)
    for schema in schemas.values():
        _allow_null(schema)
    paths: dict[str, dict[str, Any]] = {}
    for method, path in OPERATIONS:
        paths.setdefault(path, {})[method] = _operation(method, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sllm_actor", "version": version("sllm_actor"), "license": {"name": "Apache-2.0"}},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas | ANSWERS,
        },
    }


def _allow_null(schema: dict[str, Any]) -> None:
    """A field that is null counts as absent, wherever it may be absent: say nothing more of those that may be null."""
    for field in schema.get("properties", {}).values():
        if field.get("default", ...) is None:
            del field["default"]


def _operation(method: str, path: str) -> dict[str, Any]:
    summary, body, status, answer, errors = OPERATIONS[method, path]
    if path in TEXTS:
        content: dict[str, Any] = {TEXTS[path]: {"schema": OBJECT if "yaml" in TEXTS[path] else STRING}}
    else:
        content = {"application/json": {"schema": answer}}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": _object(data=STRING)}
    responses: dict[str, Any] = {str(status): {"description": summary, "content": content}}
    for code in errors:
        failed = _object(ready=ANY) if path == "/ready" else _ref("Error")
        responses[str(code)] = {"description": ERRORS[code], "content": {"application/json": {"schema": failed}}}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in ("name", "request_id", "stream_id", "node")
        if f"{{{name}}}" in path
    ]
    operation: dict[str, Any] = {"summary": summary, "operationId": _name(method, path), "responses": responses}
    if "stream_id" in path:
        parameters += [LAST_EVENT_ID, HEADERS[0]]
    if path in STREAMS or path == "/v1/embeddings":
        parameters += HEADERS
    if path.endswith("/notice"):
        least, most = NOTICE_S
        seconds = {"type": "number", "minimum": least, "maximum": most}
        parameters.append({"name": "seconds", "in": "query", "required": True, "schema": seconds})
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body.__name__)}}}
    if path in OPEN:
        operation["security"] = []
    return operation


def _name(method: str, path: str) -> str:
    return "_".join([method, *path.replace("{", "").replace("}", "").replace(".", "/").strip("/").split("/")])
