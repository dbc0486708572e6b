"""deploy/monitoring: every expression parses, and asks for what a running node shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sllm_actor.testing.node_process import NodeProcess

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "deploy" / "monitoring"
# What Prometheus adds to every series that it scrapes.
SCRAPED = {"instance", "job"}
# Labels of what a node shows only once something has happened, or with other nodes beside it.
RARE = {
    "sllm:starts_failed_total": {"reason"},
    "sllm:link_waiting_bytes": {"peer"},
    "sllm:migrations_total": {"outcome"},
    "sllm:num_requests_running": {"model_name"},
    "sllm:num_requests_waiting": {"model_name"},
    "sllm:requests_rejected_total": {"reason"},
}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    drawn = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + [text.replace("$__rate_interval", "5m") for text in drawn]


def parts(expression: Any) -> Iterator[Any]:
    """Give a parsed expression and all that is in it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(expression, name, None)
        if inner is not None:
            yield from parts(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from parts(inner)


def asked(text: str) -> dict[str, set[str]]:
    """Give the metrics of an expression, and for each the labels that the expression names anywhere."""
    found = list(parts(promql_parser.parse(text)))
    modifiers = [modifier for part in found if (modifier := getattr(part, "modifier", None)) is not None]
    modifiers = [getattr(modifier, "matching", modifier) for modifier in modifiers]
    named = {label for modifier in modifiers if modifier is not None for label in modifier.labels}
    selectors = [part for part in found if isinstance(part, promql_parser.VectorSelector)]
    assert selectors, text
    return {
        selector.name or "": named | {matcher.name for matcher in selector.matchers.matchers} for selector in selectors
    }


@pytest.fixture(scope="module")
def shown(node: NodeProcess) -> dict[str, set[str]]:
    """Each sample's name with its labels, as a node shows them that has answered, and refused, something."""
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    node.call("POST", "/v1/chat/completions", {"model": "demo", "messages": messages})
    node.request("GET", "/v1/models/none")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(node.request("GET", "/metrics").body.decode()):
        # What has no sample yet still says its name and kind.
        found.setdefault(family.name + ("_total" if family.type == "counter" else ""), set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("text", expressions())
def test_an_expression_asks_for_what_a_node_shows(shown: dict[str, set[str]], text: str) -> None:
    for name, labels in asked(text).items():
        assert name in shown, name
        assert labels <= shown[name] | RARE.get(name, set()) | SCRAPED, name


@pytest.mark.parametrize("text", ["sum(rate(sllm:nothing_total[5m]))", 'sllm:num_requests_running{color="red"}'])
def test_another_metric_or_label_is_noticed(shown: dict[str, set[str]], text: str) -> None:
    with pytest.raises(AssertionError):
        test_an_expression_asks_for_what_a_node_shows(shown, text)


def test_labels_are_found_wherever_they_stand() -> None:
    text = 'histogram_quantile(0.9, sum by (le) (rate(a_bucket{x="1"}[5m]))) > 3 and on (y) (-b offset 5m)'
    assert {name: labels >= {"le", "y"} for name, labels in asked(text).items()} == {"a_bucket": True, "b": True}
    assert "x" in asked(text)["a_bucket"]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_leads_to_what_is_to_be_done(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("page", "ticket")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}
    assert rule["alert"].lower() == anchor
    for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
        assert label == "instance" or label in set().union(*asked(rule["expr"]).values())


def test_every_heading_is_an_alerts() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "monitoring.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]


def test_panels_have_numbers_of_their_own_and_a_data_source_that_is_chosen() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert [variable["name"] for variable in dashboard()["templating"]["list"]] == ["datasource"]
