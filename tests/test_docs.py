"""The documents' code is run as it stands; their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sllm_actor.testing.node_process import NodeProcess

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_python(program: str) -> str:
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.usefixtures("cold_starts")
def test_the_embedding_example_runs_as_it_is_printed() -> None:
    program, _ = code_blocks(ROOT / "docs/embedding.md", "python")
    assert run_python(program).splitlines() == [
        "What is 47 + 35? 47 + 35 = 82 (1 right so far)",
        "Add 2 and 2. 2 + 2 = 4 (2 right so far)",
    ]


@pytest.mark.usefixtures("cold_starts")
def test_the_example_of_two_processes_runs_as_it_is_printed(tmp_path: Path) -> None:
    league = tmp_path / "league.py"
    league.write_text(code_blocks(ROOT / "docs/embedding.md", "python")[1])
    with subprocess.Popen([sys.executable, league, "serve"], stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        address = serving.stdout.readline().strip()
        played = subprocess.run(
            [sys.executable, league, "play", address], capture_output=True, text=True, timeout=60, check=False
        )
        serving.kill()
    assert played.stderr == ""
    assert sorted(played.stdout.splitlines()) == sorted(
        ["goal 1 for Reds!", "goal 2 for Reds!", "Reds scored 2", "again: goal 1", "again: goal 2"]
    )


@pytest.mark.usefixtures("cold_starts")
def test_the_loader_as_a_library_runs_as_it_is_printed() -> None:
    (program,) = code_blocks(ROOT / "docs/loading.md", "python")
    assert run_python(program) == "True\n"


def test_the_readmes_client_runs_as_it_is_printed(node: NodeProcess) -> None:
    (program,) = code_blocks(ROOT / "README.md", "python")
    assert "http://127.0.0.1:8400" in program
    assert run_python(program.replace("http://127.0.0.1:8400", node.url)) == ", ".join(map(str, range(87, 121)))


def test_the_client_that_goes_on_with_streams_runs_as_it_is_printed(node: NodeProcess) -> None:
    (program,) = code_blocks(ROOT / "docs/streams.md", "python")
    assert program.count('"127.0.0.1:8400"') == 2
    # The first of its gateways is not there.
    program = program.replace("127.0.0.1:8400", "127.0.0.1:1", 1).replace("127.0.0.1:8400", node.url[len("http://") :])
    assert run_python(program) == ", ".join(map(str, range(1, 10)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_documents_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_document_still_has_a_figure_to_fill_in() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r"\b[A-Z]+_[A-Z]+_[A-Z]+\b", text)
