"""The description of the endpoint is true: it says what the structs say, has every route, and the node keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import yaml
from aiohttp import web
from conftest import SMALL
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sllm_actor.frontend import admin_api, events_api, openai_api
from sllm_actor.frontend.openapi import OPERATIONS, SHIPPED, describe
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# A source that is made up may name anything, also what lies on the network; who watches is not told when that is over.
LEFT_OUT = {("post", "/admin/models"), ("post", "/admin/pull"), ("get", "/admin/events")}
TRIED = [operation for operation in OPERATIONS if operation not in LEFT_OUT]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that others do not see: what is made up may remove its models."""
    with running_node(tmp_path_factory.mktemp("node"), *SMALL) as node:
        node.deploy("builtin:demo", "demo")
        yield node


@pytest.fixture(scope="module")
def schema(described: NodeProcess) -> Any:
    return schemathesis.openapi.from_url(f"{described.url}/openapi.yaml")


def test_what_is_shipped_is_what_the_structs_say() -> None:
    assert yaml.safe_load(SHIPPED.read_text()) == describe(), "run scripts/openapi"


def test_every_route_is_described_and_nothing_else() -> None:
    routes = {
        (route.method.lower(), route.path.replace(":.+}", "}"))
        for table in (openai_api.routes, admin_api.routes, events_api.routes)
        for route in table
        if isinstance(route, web.RouteDef)
    }
    assert routes == set(OPERATIONS)


@pytest.mark.parametrize("operation", TRIED, ids=lambda operation: " ".join(operation))
def test_the_node_keeps_to_its_description(described: NodeProcess, schema: Any, operation: tuple[str, str]) -> None:
    method, path = operation
    body = OPERATIONS[operation][1] is not None

    @seed(20)
    @settings(
        max_examples=25 if body else 5, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path][method.upper()].as_strategy())
    def run(case: Any) -> None:
        if path.startswith("/v1/") and isinstance(case.body, dict):
            # Made-up names are of no model, and what may be long is not waited for.
            case.body["model"] = "demo"
            case.headers["X-Request-Timeout"] = "1s"
        response = case.call(base_url=described.url)
        # 504 and 503 are described, and no server's fault.
        if response.status_code in (503, 504):
            case.validate_response(response, checks=CHECKS[1:])
        else:
            case.validate_response(response, checks=CHECKS)

    run()


def test_the_description_is_valid_openapi(schema: Any) -> None:
    schema.validate()
