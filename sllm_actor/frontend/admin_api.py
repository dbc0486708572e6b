"""`/admin/…`: models, instances, requests; and what a load balancer asks."""

from __future__ import annotations

from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from sllm_actor.domain import Model, NodeId, RequestId, Scaling, check_model_name, check_node_id
from sllm_actor.domain.roles import Role
from sllm_actor.errors import InvalidRequest, SllmError
from sllm_actor.frontend.gateway import GATEWAY, Gateway, encode_json, json_response, known_name
from sllm_actor.frontend.http_errors import body_of
from sllm_actor.frontend.node_metrics import render
from sllm_actor.frontend.openapi import SHIPPED
from sllm_actor.frontend.schema import NOTICE_S, DeployRequest, MigrationRequest, TierRequest, keep_alive_s
from sllm_actor.frontend.sse import write_on
from sllm_actor.messages.explanation import ExplainRequest
from sllm_actor.messages.generation import GetTimeline, ListRequests
from sllm_actor.messages.instances import EndStart, ListInstances, StopInstances
from sllm_actor.messages.migration import HandedOver, MigrateRequest
from sllm_actor.messages.models import (
    EvictModel,
    ListModels,
    ListTiers,
    PinModel,
    PullModel,
    RegisterModel,
    RemoveModel,
    TiersChanged,
    UnpinModel,
)
from sllm_actor.messages.operations import Cordon, Drain, ListMigrations, Notice, NoticeTaken, ShowNodes
from sllm_actor.runtime.threads import on_thread

DESCRIPTION = SHIPPED.read_bytes()
routes = web.RouteTableDef()


@routes.get("/health")
async def health(_: web.Request) -> web.Response:
    return json_response({"status": "ok"})


@routes.get("/ready")
async def ready(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    is_ready = gateway.ready and not gateway.draining
    return json_response({"ready": is_ready}, status=200 if is_ready else 503)


@routes.get("/version")
async def get_version(_: web.Request) -> web.Response:
    return json_response({"version": version("sllm_actor")})


@routes.get("/metrics")
async def metrics(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    # What is shown is of one moment; writing it takes a while.
    text = await on_thread(render, gateway.metrics.registry, gateway.see())
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


@routes.get("/openapi.yaml")
async def get_description(_: web.Request) -> web.Response:
    return web.Response(body=DESCRIPTION, content_type="application/yaml")


@routes.get("/admin/models")
async def list_models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    statuses = await gateway.manager.ask(ListModels(), timeout_s=gateway.limits.ask_timeout_s)
    return json_response({"models": statuses})


@routes.post("/admin/models")
async def deploy(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    return json_response({"model": await _register(gateway, await gateway.read(request, DeployRequest))}, status=201)


async def _register(gateway: Gateway, body: DeployRequest) -> Model:
    # A model is tried by an engine before it is taken, and its tokenizer by a text process.
    gateway.check_role(Role.GATEWAY, Role.WORKER)
    message = RegisterModel(
        name=check_model_name(body.name),
        source=body.source,
        keep_alive_s=keep_alive_s(body.keep_alive),
        replace=body.replace,
        base=body.base,
        scaling=_scaling(body),
        backend=body.backend,
    )
    model: Model = await gateway.manager.ask(message, timeout_s=gateway.limits.deploy_timeout_s)
    return model


@routes.post("/admin/pull")
async def pull(request: web.Request) -> web.StreamResponse:
    """Register a model and bring it to this node's SSD: one JSON object a line, the last one `success` or an error.

    Who leaves ends the pull; what has arrived is kept for the next one.
    """
    gateway = request.app[GATEWAY]
    model = await _register(gateway, await gateway.read(request, DeployRequest))
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    await response.prepare(request)

    async def write_line(content: Any) -> None:
        await write_on(request, response, encode_json(content) + b"\n")

    await write_line({"status": "registered", "model": model})
    try:
        async with gateway.until_stop(), aclosing(gateway.manager.stream(PullModel(name=model.name))) as progress:
            async for step in progress:
                line = {"status": "pulling", "completed": step.done_bytes, "total": step.total_bytes}
                await write_line(line)
        await write_line({"status": "success"})
    except SllmError as error:
        await write_line(body_of(error))
    await response.write_eof()
    return response


@routes.get("/admin/tiers")
async def tiers(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    return json_response(await gateway.manager.ask(ListTiers(), timeout_s=gateway.limits.ask_timeout_s))


def _scaling(body: DeployRequest) -> Scaling:
    least, most = body.min_instances, body.max_instances
    if most is not None and most < least:
        raise InvalidRequest(f"max_instances: {most} is less than min_instances, {least}", param="max_instances")
    return Scaling(
        min_instances=least,
        max_instances=max(1, least) if most is None else most,
        target_concurrency=body.target_concurrency,
    )


@routes.delete("/admin/models/{name:.+}")
async def remove(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    model = await gateway.model(request.match_info["name"])
    await gateway.manager.ask(RemoveModel(name=model.name), timeout_s=gateway.limits.deploy_timeout_s)
    await _end_start(gateway, model, "removed")
    return json_response({"removed": model.name})


@routes.post("/admin/models/{name:.+}/unload")
async def unload(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    model = await gateway.model(request.match_info["name"])
    ended = await _end_start(gateway, model, "stopped")
    stopped = await gateway.nodes.ask(StopInstances(model=model.name), timeout_s=gateway.limits.deploy_timeout_s)
    return json_response({"stopped": stopped, "ended_starts": int(ended)})


async def _end_start(gateway: Gateway, model: Model, why: str) -> bool:
    message = EndStart(model=model.name, why=why)
    ended: bool = await gateway.router.ask(message, timeout_s=gateway.limits.ask_timeout_s)
    return ended


@routes.post("/admin/models/{name:.+}/pin")
async def pin(request: web.Request) -> web.Response:
    return json_response({"pinned": request.match_info["name"], "tiers": await _change(request, PinModel)})


@routes.post("/admin/models/{name:.+}/unpin")
async def unpin(request: web.Request) -> web.Response:
    return json_response({"unpinned": request.match_info["name"], "tiers": await _change(request, UnpinModel)})


@routes.post("/admin/models/{name:.+}/evict")
async def evict(request: web.Request) -> web.Response:
    return json_response({"evicted": request.match_info["name"], "tiers": await _change(request, EvictModel)})


async def _change(request: web.Request, kind: type[PinModel | UnpinModel | EvictModel]) -> tuple[str, ...]:
    """Ask for a change in the tiers that the body names, in all where there is no body; tell in which there was one."""
    gateway, name = request.app[GATEWAY], known_name(request.match_info["name"])
    body = await gateway.read(request, TierRequest) if request.can_read_body else TierRequest()
    changed: TiersChanged = await gateway.manager.ask(
        kind(name=name, tier=body.tier), timeout_s=gateway.limits.deploy_timeout_s
    )
    return changed.tiers


@routes.get("/admin/runtime")
async def runtime(request: web.Request) -> web.Response:
    return json_response(request.app[GATEWAY].see())


@routes.get("/admin/instances")
async def instances(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    running = await gateway.nodes.ask(ListInstances(), timeout_s=gateway.limits.ask_timeout_s)
    return json_response({"instances": running})


@routes.get("/admin/nodes")
async def nodes(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    return json_response({"nodes": await gateway.nodes.ask(ShowNodes(), timeout_s=gateway.limits.deploy_timeout_s)})


@routes.post("/admin/nodes/{node}/cordon")
async def cordon(request: web.Request) -> web.Response:
    node = check_node_id(request.match_info["node"])
    await _ask_nodes(request, Cordon(node=node, cordoned=True))
    return json_response({"cordoned": node})


@routes.post("/admin/nodes/{node}/uncordon")
async def uncordon(request: web.Request) -> web.Response:
    node = check_node_id(request.match_info["node"])
    await _ask_nodes(request, Cordon(node=node, cordoned=False))
    return json_response({"uncordoned": node})


@routes.post("/admin/nodes/{node}/drain")
async def drain(request: web.Request) -> web.Response:
    node = check_node_id(request.match_info["node"])
    return json_response({"drained": node, "stopped": await _ask_nodes(request, Drain(node=node))})


@routes.post("/admin/nodes/{node}/notice")
async def notice(request: web.Request) -> web.Response:
    node, gateway = check_node_id(request.match_info["node"]), request.app[GATEWAY]
    seconds = _seconds(request.query.get("seconds"))
    timeout_s = seconds + 2 * gateway.limits.ask_timeout_s
    taken: NoticeTaken = await gateway.nodes.ask(Notice(node=node, seconds=seconds), timeout_s=timeout_s)
    answer = {"node": node, "moved": taken.moved, "stopped": taken.stopped, "left": taken.left}
    return json_response(answer)


def _seconds(given: str | None) -> float:
    """Read how long a notice is."""
    least, most = NOTICE_S
    try:
        seconds = float(given or "")
    except ValueError:
        seconds = 0.0
    if not least <= seconds <= most:
        raise InvalidRequest(f"seconds: a notice has {least:g} to {most:g} of them", param="seconds")
    return seconds


async def _ask_nodes(request: web.Request, message: Cordon | Drain) -> Any:
    gateway = request.app[GATEWAY]
    return await gateway.nodes.ask(message, timeout_s=gateway.limits.deploy_timeout_s)


@routes.get("/admin/migrations")
async def migrations(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    running = await gateway.nodes.ask(ListMigrations(), timeout_s=gateway.limits.ask_timeout_s)
    return json_response({"migrations": running})


@routes.get("/admin/requests")
async def requests(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    timelines = await gateway.router.ask(ListRequests(), timeout_s=gateway.limits.ask_timeout_s)
    return json_response({"requests": timelines})


@routes.get("/admin/requests/{request_id}")
async def timeline(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    question = GetTimeline(request_id=RequestId(request.match_info["request_id"]))
    return json_response(await gateway.router.ask(question, timeout_s=gateway.limits.ask_timeout_s))


@routes.get("/admin/explain/{request_id}")
async def explain(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    question = ExplainRequest(request_id=RequestId(request.match_info["request_id"]))
    return json_response(await gateway.router.ask(question, timeout_s=gateway.limits.ask_timeout_s))


@routes.post("/admin/requests/{request_id}/migrate")
async def migrate(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    body = await gateway.read(request, MigrationRequest)
    to = check_node_id(body.to) if body.to else NodeId("")
    message = MigrateRequest(request_id=RequestId(request.match_info["request_id"]), to=to)
    moved: HandedOver = await gateway.coordinator.ask(message, timeout_s=gateway.limits.migration_timeout_s)
    return json_response(
        {
            "request_id": message.request_id,
            "node": moved.node,
            "instance_id": moved.instance_id,
            "rounds": moved.rounds,
            "tokens": moved.tokens,
            "bytes_moved": moved.bytes_moved,
            "recomputed_s": moved.recomputed_s,
        }
    )
