"""The tables of docs/evaluation.md: what they are made of can be simulated, and their cells say what came of it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.evaluation_tables import READINGS, SMALL, Job, Summary, markdown, number, run, tables, written

from sllm_actor.testing.world import SYSTEMS, Description, Models, World, changed

FAILED = {"failed": 4, "requests": 200}


def summary(**values: float) -> Summary:
    names = (
        "wait_place_s", "wait_load_s", "wait_slot_s", "wait_mean_s", "wait_p99_s", "over_least", "over_on_demand",
        "starts", "start_mean_s", "start_over_least", "least_s", "first_come_s", "on_demand_s",
    )  # fmt: skip
    return dict.fromkeys(names, 2.0) | {"failed": 0, "requests": 200} | values


def test_every_case_is_a_world_that_can_be() -> None:
    cases = {case for table in tables().values() for _, cells in table.rows for cell in cells for case in cell.cases}
    assert {case.reading for case in cases} == set(READINGS)
    for case in cases:
        served = (Models(shape=case.shape, count=case.models),)
        World(changed(Description(models=served), case.changes), SYSTEMS[case.system])


def test_a_cell_has_the_means_of_its_seeds_and_says_how_many_failed() -> None:
    readings = tables()["readings"]
    found = {case: [summary(), summary(wait_mean_s=3.0)] for _, cells in readings.rows for cell in cells
             for case in cell.cases}  # fmt: skip
    found[SMALL] = [summary(), summary(**FAILED)]
    lines = markdown(readings, found).splitlines()
    assert lines[0] == "| models, lengths | Poisson | 60 s | 300 s | one process |"
    assert lines[2] == "| 32 \N{MULTIPLICATION SIGN} OPT-6.7B, GSM8K | " + "2.5; 2.0, 2.0 | " * 3 + "2.0 (1 %) |"
    few = [summary(), summary(failed=1)]
    found[SMALL] = few
    assert markdown(readings, found).splitlines()[2].endswith("| 2.0 (<1 %); 2.0, 2.0 |")


def test_every_table_is_filled_from_the_runs_that_it_names() -> None:
    for name, table in tables().items():
        found = {case: [summary()] for _, cells in table.rows for cell in cells for case in cell.cases}
        lines = markdown(table, found).splitlines()
        assert len(lines) == 2 + len(table.rows), name
        assert {line.count(" | ") for line in lines} == {len(table.head) - 1}, name


def test_numbers_have_as_many_digits_as_say_something() -> None:
    assert [number(value) for value in (0.0444, 4.44, 44.44, 444.4)] == ["0.04", "4.4", "44.4", "444"]


def test_a_job_is_simulated_as_the_command_line_would(tmp_path: Path) -> None:
    path = tmp_path / "functions.csv"
    path.write_text("HashFunction,HashOwner,HashApp,minute_1,minute_2\nf,o,a,3,0\ng,o,a,1,2\n")
    ran = run(Job(SMALL._replace(models=2, rate=1.0), 1, path, 20.0))
    assert ran["requests"] > 0 == ran["failed"]
    assert 0 < ran["least_s"] <= ran["wait_mean_s"]


def test_runs_are_written_one_a_line_with_the_command_that_made_them() -> None:
    text = written(
        "scripts/evaluation_tables --seeds 1", [summary(wait_mean_s=1 / 3), summary(over_least=float("nan"))]
    )
    found = json.loads(text)
    assert found["command"] == "scripts/evaluation_tables --seeds 1" and text.count(b"\n") == 4
    assert [(run["wait_mean_s"], run["over_least"]) for run in found["runs"]] == [(0.3333, 2.0), (2.0, None)]
