"""The manual's reference is the program's own, and what its pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import from_code
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sllm_actor.config.load import NOT_KNOBS, PREFIX, knobs
from sllm_actor.testing.node_process import NodeProcess

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Families of its own that Prometheus' client adds to each counter and histogram.
ADDED = "_created"


def test_every_knob_has_a_row_with_its_variable() -> None:
    rows = from_code.knob_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [knob.name for knob in knobs()]
    assert "| `host_pool_bytes` | `SLLM_HOST_POOL_BYTES` | `2GiB` | whole number, bytes |" in "\n".join(rows)


def test_the_metrics_of_a_node_are_those_of_the_manual(node: NodeProcess) -> None:
    told = {name.removesuffix("_total"): (kind, set(labels)) for name, kind, labels, _ in from_code.metric_rows()}
    shown = {
        family.name: family
        for family in text_string_to_metric_families(node.request("GET", "/metrics").body.decode())
        if not family.name.endswith(ADDED)
    }
    assert set(shown) == set(told)
    for name, family in shown.items():
        kind, labels = told[name]
        assert family.type == kind
        assert all(set(sample.labels) - {"le"} == labels for sample in family.samples)


def test_the_metrics_that_operators_are_told_of_are_there() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    table = page.partition("## Metrics")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert len(named) > 20
    assert named <= {name.removeprefix("sllm:") for name, *_ in from_code.metric_rows()}


def test_every_operation_and_every_verb_is_described() -> None:
    http = from_code.http_reference()
    assert "## POST /v1/chat/completions\n" in http
    assert "## GET /admin/explain/request_id\n" in http
    assert "| `max_completion_tokens` |" in http
    assert {"start", "deploy", "keys create"} <= set(from_code.verbs())
    assert "`--set`" in from_code.command_reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_variables_that_a_page_names_are_knobs_or_known(page: Path) -> None:
    known = {PREFIX + knob.name.upper() for knob in knobs()} | NOT_KNOBS
    named = set(re.findall(r"\bSLLM_[A-Z_]*[A-Z]\b", page.read_text()))
    assert named - {"SLLM_KNOB"} <= known
