"""The documents' code is run as it stands; their links lead somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import from_code
import pytest
from blocks import INLINE, Block, blocks, commands

from sllm_actor.loader.ssd_record import computed_id, parse_record
from sllm_actor.testing.node_process import NodeProcess

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

SHELL = blocks(PAGES, "bash", "sh")
VERBS = from_code.verbs()


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
    assert run_python(program.replace("http://127.0.0.1:8400", node.url)) == "2 + 2 = 4\n"


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


@pytest.mark.parametrize("block", [one for one in SHELL if not one.reason], ids=str)
def test_shell_blocks_run_as_they_are_printed(block: Block, node: NodeProcess, tmp_path: Path) -> None:
    program = block.text.replace("http://127.0.0.1:8400", node.url)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(tmp_path), "SLLM_URL": node.url}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", program],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_parse(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_names_are_there_with_their_flags(page: Path) -> None:
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    shell = [one.text for one in blocks([page], "bash", "sh")] + INLINE.findall(prose)
    for words in (words for one in shell for words in commands(one)):
        if words and not words[0].startswith("-") and words[0].islower():
            check_command(words)


def check_command(words: list[str]) -> None:
    """Hold one command to the program's own verbs and flags."""
    verb = next((verb for verb in (" ".join(words[:2]), words[0]) if verb in VERBS), None)
    assert verb or words == ["keys"], f"there is no verb sllm-node {' '.join(words)}"
    known = {"--help", "-h", *(name for one in (VERBS[verb].params if verb else ()) for name in one.opts)}
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert flags <= known, f"sllm-node {verb} has no {flags - known}"


def test_a_command_that_is_not_there_is_noticed() -> None:
    (words,) = commands("sllm-node deploy x --nmae y  # so")
    with pytest.raises(AssertionError, match="--nmae"):
        check_command(words)
    with pytest.raises(AssertionError, match="no verb"):
        check_command(["undeploy"])


@pytest.mark.parametrize("block", blocks(PAGES, "json", "toml"), ids=str)
def test_data_blocks_parse(block: Block) -> None:
    if block.language == "toml":
        assert tomllib.loads(block.text)
        return
    try:
        json.loads(block.text)
    except ValueError:
        assert all(json.loads(line) for line in block.text.splitlines())


def test_the_id_of_a_copy_on_the_ssd_is_computed_as_the_page_says() -> None:
    (program,) = code_blocks(ROOT / "docs/ssd_tier.md", "python")
    (path,) = (ROOT / "tests/golden/0.1.0/ssd/models").glob("*/.sllm-tier.json")
    told = run_python(f"import hashlib, json\ntext = {path.read_text()!r}\n{program}print(model_id)")
    assert told.strip() == computed_id(parse_record(path.read_bytes()))


def test_every_python_block_is_run_by_a_test_that_names_its_page() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for block in blocks(PAGES, "python"):
        ast.parse(block.text)
        assert f"{block.page.relative_to(ROOT)}" in tests, f"no test runs {block}"


def test_every_block_is_of_a_language_that_is_looked_at() -> None:
    looked_at = {"bash", "sh", "python", "json", "toml"}
    shown = {"", "text", "mermaid", "header", "hex", "root", "toctree", "eval-rst"}
    written = {"knobs", "metrics", "http", "commands", "errors", "printed"}
    for block in blocks(PAGES):
        assert block.language in looked_at | shown | written, str(block)
        assert "sllm-node" not in block.text or block.language not in shown, f"{block} has commands: write bash"
