"""deploy/systemd: a unit that systemd takes without a word, and a configuration that a node takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from systemd_program import environment, systemd_analyze

from sllm_actor.config import Config, resolve
from sllm_actor.domain import check_node_id
from sllm_actor.errors import ConfigInvalid
from sllm_actor.metadata.etcd_address import parse_endpoints
from sllm_actor.runtime.network import Endpoint
from sllm_actor.testing.node_process import CLI
from sllm_actor.units import parse_duration_s

SYSTEMD = Path(__file__).parent.parent / "deploy" / "systemd"
UNIT = SYSTEMD / "sllm-node.service"
PROGRAM = "/opt/sllm/bin/sllm-node"
# What the manual of systemd.exec says that these stand for in a unit of the system.
SPECIFIERS = {"%d": "/run/credentials/sllm-node.service", "%S": "/var/lib"}
# Of ten. What is left: it has a network, and sees how much memory the machine has.
MAX_EXPOSURE = 2.0


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [systemd_analyze(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())


def verified(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Verify a unit whose program is one that is here."""
    unit = folder / UNIT.name
    unit.write_text(text.replace(PROGRAM, str(CLI)))
    return analyze("verify", "--man=no", str(unit))


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def setting(name: str) -> str:
    (value,) = settings(name)
    return value


def variables() -> dict[str, str]:
    pairs = (text.partition("=") for text in settings("Environment"))
    return {name: re.sub("%.", lambda found: SPECIFIERS[found.group()], value) for name, _, value in pairs}


@pytest.fixture
def config() -> Config:
    return resolve(SYSTEMD / "node.toml", variables()).config


def test_systemd_takes_the_unit_without_a_warning(tmp_path: Path) -> None:
    ran = verified(tmp_path, UNIT.read_text())
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("LimitMEMLOCK=", "LimitMEMLOK=", "Unknown key"),
        ("Restart=on-failure", "Restart=on-failures", "Failed to parse"),
        ("SystemCallFilter=@system-service", "SystemCallFilter=@system-services", "@system-services"),
        (PROGRAM, "/opt/elsewhere/sllm-node", "is not executable"),
    ],
)
def test_the_verification_itself_sees_what_is_wrong(tmp_path: Path, right: str, wrong: str, told: str) -> None:
    assert UNIT.read_text().count(right) == 1
    assert told in verified(tmp_path, UNIT.read_text().replace(right, wrong)).stderr


def test_the_service_is_exposed_to_little(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    shutil.copy(UNIT, unit)
    told = analyze("security", "--offline=yes", "--no-pager", str(unit))
    (exposure,) = re.findall(r"Overall exposure level for sllm-node.service: ([\d.]+)", told.stdout)
    assert float(exposure) <= MAX_EXPOSURE, told.stdout


def test_the_example_is_a_configuration_of_a_node_that_others_reach(config: Config) -> None:
    assert check_node_id(config.node_id)
    listens, tells = Endpoint.parse(config.listen), Endpoint.parse(config.advertise)
    assert (listens.is_local, tells.is_local, listens.port) == (False, False, tells.port)
    assert tells.host != listens.host
    assert all(url.scheme == "https" for url in parse_endpoints(config.metadata))
    assert config.api_key_file and config.cluster_secret_file, "without them a node binds to no other address"


def test_a_knob_that_is_none_is_refused_in_the_example(tmp_path: Path) -> None:
    wrong = tmp_path / "node.toml"
    wrong.write_text((SYSTEMD / "node.toml").read_text() + "\ndrain_time_s = 1\n")
    with pytest.raises(ConfigInvalid, match="there is no knob 'drain_time_s'"):
        resolve(wrong, variables())


def test_the_unit_starts_a_node_with_the_example_where_the_example_says_that_it_lies() -> None:
    first, *_ = (SYSTEMD / "node.toml").read_text().splitlines()
    assert setting("ExecStart").split() == [PROGRAM, "start", "--config", "/etc/sllm/node.toml"]
    assert "/etc/sllm/node.toml" in first
    assert setting("Type") == "exec", "the node sends no word of its readiness to systemd"


def test_secrets_are_credentials_and_the_state_lies_in_the_units_own_folder(config: Config) -> None:
    loaded = dict(text.split(":") for text in settings("LoadCredential"))
    folder = Path(SPECIFIERS["%d"])
    assert {Path(config.api_key_file), Path(config.cluster_secret_file)} == {folder / name for name in loaded}
    assert all(path.startswith("/etc/sllm/") for path in loaded.values())
    assert config.data_dir == f"/var/lib/{setting('StateDirectory')}"


def test_a_stop_has_the_time_that_the_node_takes_to_finish_answers(config: Config) -> None:
    assert parse_duration_s(setting("TimeoutStopSec")) >= config.drain_timeout_s + config.engine_stop_timeout_s + 10


def test_the_pool_can_be_locked_and_an_engine_that_is_killed_leaves_the_node_running(config: Config) -> None:
    assert config.lock_host_pool
    assert setting("LimitMEMLOCK") == "infinity"
    assert setting("OOMPolicy") == "continue"


def test_the_user_of_the_unit_is_the_one_that_is_made_for_it() -> None:
    (line,) = (line for line in (SYSTEMD / "sllm.conf").read_text().splitlines() if not line.startswith("#"))
    kind, name, *_, home = line.split()
    assert (kind, name, home) == ("u", setting("User"), f"/var/lib/{setting('StateDirectory')}")
