"""House rules that linters can't say, over every file that is or could be committed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sllm_actor"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 70
MAX_FILE_BYTES = 1_000_000
MAX_DEMO_MODEL_BYTES = 4_000_000
DEMO_MODEL = "sllm_actor/models/demo/model.safetensors"
CLOCKS = {
    ("time", "time"), ("time", "time_ns"), ("time", "monotonic"), ("time", "monotonic_ns"), ("time", "perf_counter"),
    ("time", "perf_counter_ns"), ("time", "process_time"), ("time", "sleep"), ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"), ("date", "today"), ("loop", "time"),
}  # fmt: skip
CLOCK_CALLS = {name for _, name in CLOCKS if name not in ("time", "now", "today", "sleep")}
TASK_STARTERS = {"create_task", "ensure_future", "run_coroutine_threadsafe", "TaskGroup"}
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
# Put together, so that this file does not name what it looks for.
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"]) + r")\b")
DEVELOPER_PATHS = re.compile(r"(?<![\w.])/(?:" + "|".join(["wo" + "rk", "ro" + "ot"]) + r")/")
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager_impl"}


def files() -> list[Path]:
    """List what git tracks and what it would take in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in files():
        try:
            yield path, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def attributes(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Give every `owner.name` with the last part of its owner, and every `from owner import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            while isinstance(owner, ast.Call):
                owner = owner.func
            last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            yield (
                {"get_running_loop": "loop", "get_event_loop": "loop", "_loop": "loop"}.get(last, last),
                node.attr,
                node.lineno,
            )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield (node.module or "").split(".")[-1], alias.name, node.lineno


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "", node.lineno)


def test_the_rules_below_see_the_package_and_what_git_tracks() -> None:
    assert len(MODULES) > 50
    assert len(files()) > len(MODULES)
    assert PACKAGE / "runtime" / "clock.py" in MODULES


def test_no_module_is_longer_than_a_few_screens() -> None:
    long = {
        name_of(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > MAX_MODULE_LINES
    }
    assert not long


def test_no_function_is_longer_than_one_screen() -> None:
    long = {}
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert not long


def test_every_module_says_what_it_is() -> None:
    assert not [name_of(path) for path in MODULES if not (ast.get_docstring(tree_of(path)) or "").strip()]


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not [name_of(path) for path in MODULES if {path.stem, path.parent.name} & VAGUE_NAMES]


def test_tasks_are_started_in_one_module_only() -> None:
    found = [
        f"{name_of(path)}:{line} {name}"
        for path in MODULES
        if path != PACKAGE / "runtime" / "tasks.py"
        for _, name, line in attributes(tree_of(path))
        if name in TASK_STARTERS
    ]
    assert not found


def test_clocks_are_read_in_one_module_only() -> None:
    found = [
        f"{name_of(path)}:{line} {owner}.{name}"
        for path in MODULES
        if path != PACKAGE / "runtime" / "clock.py"
        for owner, name, line in attributes(tree_of(path))
        if (owner, name) in CLOCKS or name in CLOCK_CALLS
    ]
    assert not found


def test_the_native_library_is_loaded_in_one_module_only() -> None:
    """Others may ask ctypes for libc, which is `CDLL(None)`, and for nothing else."""
    found = []
    for path in MODULES:
        if path == PACKAGE / "loader" / "native.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loads = node.func.attr in ("LoadLibrary", "dlopen", "PyDLL")
                opens = node.func.attr == "CDLL" and not (
                    node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value is None
                )
                if loads or opens:
                    found.append(f"{name_of(path)}:{node.lineno}")
    assert not found


def test_the_native_library_is_called_in_two_modules_only() -> None:
    callers = {PACKAGE / "loader" / "native.py", PACKAGE / "loader" / "native_device.py"}
    found = {
        path
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Attribute) and node.attr.startswith("sllm_") and node.attr != "sllm_actor")
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sllm_device_"))
    }
    assert found == callers


def test_there_is_no_pickle() -> None:
    found = [
        f"{name_of(path)}:{line} {name}"
        for path in MODULES
        for name, line in imports(tree_of(path))
        if name.split(".")[0] in PICKLES
    ]
    found += [
        f"{name_of(path)}:{line} torch.load"
        for path in MODULES
        if path != PACKAGE / "checkpoint" / "pickle_child.py"
        for owner, name, line in attributes(tree_of(path))
        if (owner, name) == ("torch", "load")
    ]
    assert not found


def test_pickled_weights_are_read_in_a_child_process_without_code() -> None:
    child = PACKAGE / "checkpoint" / "pickle_child.py"
    calls = [
        node
        for node in ast.walk(tree_of(child))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"
        and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    ]  # fmt: skip
    assert len(calls) == 1
    (weights_only,) = [keyword.value for keyword in calls[0].keywords if keyword.arg == "weights_only"]
    assert isinstance(weights_only, ast.Constant) and weights_only.value is True
    loaded = "import sys, sllm_actor.checkpoint.convert, sllm_actor.checkpoint.verify; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_no_code_of_a_model_is_ever_run() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                refused = isinstance(node.value, ast.Constant) and node.value.value is False
                found += [] if refused else [f"{name_of(path)}:{node.value.lineno}"]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(f"{name_of(path)}:{node.lineno}")
    assert not found


def test_nothing_is_left_unfinished() -> None:
    assert not [name_of(path) for path, text in texts() if UNFINISHED.search(text)]


def test_no_path_of_a_developers_machine_is_written_down() -> None:
    assert not [name_of(path) for path, text in texts() if DEVELOPER_PATHS.search(text)]


def test_no_large_file_strays_in() -> None:
    limits = {DEMO_MODEL: MAX_DEMO_MODEL_BYTES}
    sizes = {name_of(path): path.stat().st_size for path in files()}
    assert not {name: size for name, size in sizes.items() if size > limits.get(name, MAX_FILE_BYTES)}


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import time\ntime.monotonic()", ("time", "monotonic")),
        ("from time import monotonic", ("time", "monotonic")),
        ("asyncio.get_running_loop().time()", ("loop", "time")),
        ("self._loop.time()", ("loop", "time")),
        ("datetime.datetime.now()", ("datetime", "now")),
        ("asyncio.create_task(x)", ("asyncio", "create_task")),
    ],
)
def test_the_search_itself_finds_what_it_is_for(source: str, seen: tuple[str, str]) -> None:
    found = [(owner, name) for owner, name, _ in attributes(ast.parse(source))]
    assert seen in found
    assert seen in CLOCKS or seen[1] in TASK_STARTERS
