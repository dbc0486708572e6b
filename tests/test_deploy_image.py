"""deploy/Dockerfile. No image is built here: what can be read of it is held to what it stands for elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from test_tidy import files

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")
KNOWN = {"FROM", "RUN", "COPY", "WORKDIR", "ARG", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


class Step(NamedTuple):
    """One instruction and what it is given, its lines joined."""

    name: str
    text: str


def stages() -> dict[str, list[Step]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[Step]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        step = Step(*line.split(maxsplit=1))
        assert step.name in KNOWN
        if step.name == "FROM":
            found[step.text.split(" AS ")[1]] = steps = []
        steps.append(step)
    return found


def given(stage: str, name: str) -> list[str]:
    return [step.text for step in stages()[stage] if step.name == name]


def pod_of(file: str) -> dict[str, Any]:
    """Give the pod of the StatefulSet in a file."""
    objects = yaml.safe_load_all((ROOT / "deploy/kubernetes/base" / file).read_text())
    (found,) = (made["spec"]["template"]["spec"] for made in objects if made["kind"] == "StatefulSet")
    assert isinstance(found, dict)
    return found


def test_a_node_is_installed_as_the_readme_says() -> None:
    command = re.search(r"`(pip install -c \S+ \.)`", (ROOT / "README.md").read_text())
    assert command is not None
    installs = [step for step in given("build", "RUN") if "pip install" in step]
    bare = [step.replace("/opt/sllm/bin/", "").replace(" --no-cache-dir", "") for step in installs]
    assert bare == [command.group(1)]


def test_its_python_is_one_that_the_project_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (first,) = given("build", "FROM")
    assert given("node", "FROM") == [first.replace(" AS build", " AS node")], "the copied environment needs its Python"
    version = re.match(r"python:(3\.\d+)-", first)
    assert version is not None
    assert f"Programming Language :: Python :: {version.group(1)}" in project["classifiers"]


def is_in_the_image(name: str) -> bool:
    """Tell what the ignore file says: the last line that fits a file decides."""
    kept = True
    for line in IGNORED.read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        ending = pattern.removeprefix("**/")
        fits = pattern == "*" or name == pattern or name.startswith(f"{pattern}/")
        if ending != pattern:
            fits = any(Path(part).match(ending) for part in name.split("/"))
        kept = line.startswith("!") if fits else kept
    return kept


def test_the_image_is_made_of_what_an_installation_needs_and_of_nothing_else() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in files()]
    taken = {name for name in names if is_in_the_image(name)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "scripts/constraints.txt", project["readme"], *project["license-files"]} <= taken
    for folder in ("sllm_actor/", "native/"):
        assert {name for name in names if name.startswith(folder)} <= taken
    assert {name.split("/")[0] for name in taken} == {
        "LICENSE", "README.md", "native", "pyproject.toml", "scripts", "sllm_actor",
    }  # fmt: skip


def test_keys_environments_and_builds_stay_out_of_the_image() -> None:
    for name in (
        "deploy/kubernetes/base/secrets/api-keys.toml", ".venv/bin/python", "sllm_actor/__pycache__/a.pyc",
        "sllm_actor/loader/libsllm_native.so", "build/x", ".git/config",
    ):  # fmt: skip
        assert not is_in_the_image(name)


def test_images_are_run_by_the_user_and_on_the_ports_that_the_manifests_have() -> None:
    for stage, file in (("node", "node.yaml"), ("etcd", "etcd.yaml")):
        pod = pod_of(file)
        context = pod["securityContext"]
        assert given(stage, "USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
        exposed = [int(port) for text in given(stage, "EXPOSE") for port in text.split()]
        (container,) = pod["containers"]
        assert exposed == [port["containerPort"] for port in container["ports"]]
    assert given("node", "ENTRYPOINT") == ['["sllm-node"]']


def test_the_commands_in_it_name_stages_that_it_has_and_images_that_the_manifests_run() -> None:
    built = re.findall(r"--target (\w+) -t (\S+)", DOCKERFILE.read_text())
    assert {target for target, _ in built} == stages().keys() - {"build"}
    run = set(
        re.findall(
            r"image: (\S+)", "".join(path.read_text() for path in sorted(ROOT.glob("deploy/kubernetes/base/*.yaml")))
        )
    )
    overlays = [
        yaml.safe_load(path.read_text()) for path in ROOT.glob("deploy/kubernetes/overlays/*/kustomization.yaml")
    ]
    renamed = {f"{entry['newName']}:{entry['newTag']}" for one in overlays for entry in one.get("images", ())}
    assert {image for _, image in built} == renamed | (run - {"sllm-node:0.1.0"})


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, "--no-color", path], capture_output=True, text=True, timeout=60)


def test_hadolint_finds_nothing_to_say() -> None:
    linted = lint(DOCKERFILE)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_hadolint_would_find_a_step_that_leaves_lists_behind(tmp_path: Path) -> None:
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace(" && rm -rf /var/lib/apt/lists/*", ""))
    linted = lint(worse)
    assert linted.returncode == 1 and "DL3009" in linted.stdout
