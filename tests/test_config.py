"""Configuration: layers, where values come from, and what is refused."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.config import Config, resolve
from sllm_actor.config.load import MAX_FILE_BYTES, knobs
from sllm_actor.errors import ConfigInvalid
from sllm_actor.units import GIB, MIB


def toml(folder: Path, text: str) -> Path:
    path = folder / "sllm.toml"
    path.write_text(text)
    return path


def test_without_layers_every_knob_has_its_default() -> None:
    resolved = resolve()
    assert resolved.config == Config()
    assert set(resolved.origin.values()) == {"default"}
    assert list(resolved.origin) == [field.name for field in msgspec.structs.fields(Config)]


def test_flags_win_over_variables_over_the_file_over_defaults_and_each_origin_is_told(tmp_path: Path) -> None:
    file = toml(tmp_path, 'port = 1\nhost = "a"\nnode_id = "x"\nhost_pool_bytes = "1GiB"\nlock_host_pool = false\n')
    resolved = resolve(
        file,
        {"SLLM_PORT": "2", "SLLM_HOST": "b", "PATH": "/bin", "SLLM_URL": "http://x", "SLLM_CONFIG": "y"},
        {"port": 3},
    )
    config = resolved.config
    assert (config.port, config.host, config.node_id, config.host_pool_bytes) == (3, "b", "x", GIB)
    assert config.lock_host_pool is False
    origins = [resolved.origin[name] for name in ("port", "host", "node_id", "chunk_bytes")]
    assert origins == ["flag", "SLLM_HOST", str(file), "default"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("host_pool_bytes", "4GiB", 4 * GIB),
        ("chunk_bytes", "1 MiB", MIB),
        ("keep_alive_s", "5m", 300.0),
        ("keep_alive_s", "forever", math.inf),
        ("keep_alive_s", "inf", math.inf),
        ("engine_refill_delay_s", "250ms", 0.25),
        ("port", "0", 0),
        ("lock_host_pool", "OFF", False),
        ("lock_host_pool", "yes", True),
        ("data_dir", "4GiB", "4GiB"),
    ],
)
def test_text_is_read_as_the_knob_needs_it(name: str, text: str, value: Any) -> None:
    assert getattr(resolve(environment={f"SLLM_{name.upper()}": text}).config, name) == value
    assert getattr(resolve(flags={name: text}).config, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1), ("port", 65536), ("port", "x"), ("port", ""), ("port", "1.5"), ("port", True), ("port", 10**30),
        ("port", "9" * 5000),
        ("host", 5), ("data_dir", "x" * 5000), ("lock_host_pool", "maybe"), ("lock_host_pool", 1),
        ("host_pool_bytes", "4 apples"), ("host_pool_bytes", "-4GiB"), ("host_pool_bytes", 1),
        ("chunk_bytes", 3 * MIB), ("chunk_bytes", "1"),
        ("keep_alive_s", -1), ("keep_alive_s", math.nan), ("keep_alive_s", "nan"), ("keep_alive_s", 10**400),
        ("keep_alive_s", "-5m"),
        ("drain_timeout_s", math.inf), ("drain_timeout_s", math.nan), ("mailbox_messages", 0), ("warm_engines", 0),
        ("stream_credit", 0),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_or_out_of_bounds_is_refused_naming_the_knob(name: str, value: Any) -> None:
    with pytest.raises(ConfigInvalid, match=f"flag: {name}: ") as caught:
        resolve(flags={name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "changes",
    [{"port": -1}, {"mailbox_messages": 0}, {"keep_alive_s": math.nan}, {"chunk_bytes": 3 * MIB}, {"host": 5}],
)
def test_an_embedding_program_gets_no_config_out_of_bounds_either(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        Config(**changes)
    assert caught.value.param in changes
    with pytest.raises(ConfigInvalid):
        msgspec.structs.replace(Config(), **changes)


def test_knobs_that_are_right_alone_and_wrong_together_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"flag: host_pool_bytes: .* less than one chunk"):
        resolve(environment={"SLLM_CHUNK_BYTES": "32MiB"}, flags={"host_pool_bytes": "16MiB"})
    assert resolve(flags={"chunk_bytes": "16MiB", "host_pool_bytes": "16MiB"}).config.chunk_bytes == 16 * MIB


def test_a_value_out_of_bounds_is_told_with_its_bound() -> None:
    with pytest.raises(ConfigInvalid, match=r"flag: host_pool_bytes: .* >= 16777216, not 1$"):
        resolve(flags={"host_pool_bytes": "1"})


def test_an_unknown_knob_that_is_nearly_one_is_guessed() -> None:
    with pytest.raises(ConfigInvalid, match="no knob 'ssd_quota'; did you mean ssd_quota_bytes"):
        resolve(flags={"ssd_quota": "10GiB"})


def test_a_quota_that_is_not_worth_its_name_is_refused_and_none_is_allowed() -> None:
    with pytest.raises(ConfigInvalid, match="flag: ssd_quota_bytes: 10 bytes is less than 16 MiB; write a unit"):
        resolve(flags={"ssd_quota_bytes": "10"})
    assert resolve(flags={"ssd_quota_bytes": "0"}).config.ssd_quota_bytes == 0
    assert resolve(flags={"ssd_quota_bytes": "16MiB"}).config.ssd_quota_bytes == 16 * MIB


def test_an_unknown_knob_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    file = toml(tmp_path, "prot = 1")
    with pytest.raises(ConfigInvalid, match=re.escape(f"{file}: there is no knob 'prot'")):
        resolve(file)
    with pytest.raises(ConfigInvalid, match="SLLM_PROT: there is no knob 'prot'"):
        resolve(environment={"SLLM_PROT": "1"})
    with pytest.raises(ConfigInvalid, match="flag: there is no knob 'prot'"):
        resolve(flags={"prot": 1})


@pytest.mark.parametrize(
    "text",
    [
        "port",
        "port = ",
        "port = 1\nport = 2",
        "[port]\nx = 1",
        "port = [1]",
        "port = 1979-05-27",
        "port = " + "9" * 5000,
        "port = " + "[" * 10_000,
        "keep_alive_s = nan",
        "keep_alive_s = -inf",
        'host = "\\ud800"',
    ],
)
def test_a_file_that_is_no_configuration_is_refused_naming_it(tmp_path: Path, text: str) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(ConfigInvalid, match=re.escape(str(file))):
        resolve(file)


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    for name in ("absent", ".", "pipe", "binary", "huge", "a\0b"):
        with pytest.raises(ConfigInvalid):
            resolve(tmp_path / name)
    with pytest.raises(ConfigInvalid):
        resolve(Path("/dev/zero"))


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    text = "port = 5\n#"
    assert resolve(toml(tmp_path, text + "x" * (MAX_FILE_BYTES - len(text)))).config.port == 5


def test_every_knob_has_a_description_and_numbers_have_a_unit() -> None:
    for knob in knobs():
        assert knob.description, knob.name
        if isinstance(knob.default, float):
            assert knob.unit == "s"
            assert knob.name.endswith("_s")
        if knob.unit == "bytes":
            assert knob.name.endswith("_bytes")
        assert isinstance(knob.default, bool) or knob.unit, knob.name


@given(st.sampled_from([knob.name for knob in knobs()]), st.text(max_size=12))
def test_any_text_for_any_knob_gives_a_checked_config_or_a_refusal(name: str, text: str) -> None:
    refused: ConfigInvalid | None = None
    config = Config()
    try:
        config = resolve(environment={f"SLLM_{name.upper()}": text}).config
    except ConfigInvalid as error:
        refused = error
    assert refused is None or refused.param == name
    assert Config(**msgspec.structs.asdict(config)) == config
