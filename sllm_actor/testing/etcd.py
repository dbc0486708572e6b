"""Real etcd on free ports of this machine alone: members that can be killed, held up and started again."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sllm_actor.errors import ConfigInvalid

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
LOOK_EVERY_S = 0.02
START_ATTEMPTS = 3
# Members on one machine hear each other at once; on a slow one an election may take a few attempts.
HEARTBEAT_MS, ELECTION_MS = 50, 500


def etcd_program(unpacked: Path) -> str:
    """Find etcd, as it is installed or as scripts/servers has unpacked it.

    Raises:
        ConfigInvalid: it is in neither place.
    """
    program = shutil.which("etcd") or str(unpacked.absolute() / "usr" / "bin" / "etcd")
    if not Path(program).exists():
        raise ConfigInvalid("etcd is not here: scripts/test brings it, and so does Debian's package etcd-server")
    return program


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in held]


class EtcdMember:
    """One process. Its data survive it, so that it can be started again."""

    def __init__(self, program: str, own: Path, name: str, ports: tuple[int, int], options: Sequence[str]) -> None:
        self.name = name
        self.port, self.peer_port = ports
        self.log = own / f"{name}.log"
        self._program = program
        self._data = own / name
        self._options = list(options)
        self._scheme = "https" if any(option.startswith("--cert-file") for option in options) else "http"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def peer_url(self) -> str:
        """Give where the other members find this one."""
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self, cluster: str) -> None:
        """Start the process; `cluster` has all members as etcd's option does. Returns before it serves."""
        client = f"{self._scheme}://127.0.0.1:{self.port}"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._program, f"--name={self.name}", f"--data-dir={self._data}", f"--initial-cluster={cluster}",
                    f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={self.peer_url}", f"--initial-advertise-peer-urls={self.peer_url}",
                    f"--heartbeat-interval={HEARTBEAT_MS}", f"--election-timeout={ELECTION_MS}", *self._options,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(),
            )  # fmt: skip

    def kill(self) -> None:
        """End the process as a lost machine does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def hold_up(self) -> None:
        """Stop the process in the middle of what it does."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a process that was held up go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.name} does not run"
        self._process.send_signal(number)

    @property
    def has_ended(self) -> bool:
        """Tell whether a process that was started has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def serves(self) -> bool:
        """Tell whether it listens and the cluster has a leader."""
        if self._scheme == "https":
            # It asks for certificates that only its clients have: that it listens must do.
            with socket.socket() as probe:
                probe.settimeout(1)
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        asking = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            asking.request("GET", "/health")
            return asking.getresponse().read().find(b'"true"') >= 0
        except OSError:
            return False
        finally:
            asking.close()


class EtcdCluster:
    """Some members; `member` is the first."""

    def __init__(self, members: Sequence[EtcdMember]) -> None:
        self.members = list(members)
        self._initial = ",".join(f"{member.name}={member.peer_url}" for member in members)

    @property
    def member(self) -> EtcdMember:
        """Give the first member, where there is one alone."""
        return self.members[0]

    def url(self, scheme: str = "etcd") -> str:
        """Give the address of all members."""
        return f"{scheme}://" + ",".join(f"127.0.0.1:{member.port}" for member in self.members)

    def start(self, *members: EtcdMember) -> None:
        """Start members, all by default, and wait until they serve.

        Raises:
            ConfigInvalid: one of them ends, or none serves in time.
        """
        chosen = members or tuple(self.members)
        for member in chosen:
            member.start(self._initial)
        self.wait_for(*chosen)

    def wait_for(self, *members: EtcdMember) -> None:
        """Wait until members serve.

        Raises:
            ConfigInvalid: one of them ends, or none serves in time.
        """
        pause = threading.Event()
        for member in members:
            for _ in range(int(START_TIMEOUT_S / LOOK_EVERY_S)):
                if member.has_ended:
                    raise ConfigInvalid(f"etcd has ended: {member.log.read_text()[-2000:]}")
                if member.serves():
                    break
                pause.wait(LOOK_EVERY_S)
            else:
                raise ConfigInvalid(f"etcd does not serve: {member.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End every process."""
        for member in self.members:
            member.kill()


@contextmanager
def running_etcd(own: Path, unpacked: Path, members: int = 1, options: Sequence[str] = ()) -> Iterator[EtcdCluster]:
    """Run a cluster whose files go to the folder `own`, with further options for each member.

    Where etcd is not installed, it is taken from `unpacked`, the root of unpacked packages.

    Raises:
        ConfigInvalid: it is in neither place, or does not start.
    """
    program = etcd_program(unpacked)
    for attempt in range(START_ATTEMPTS):
        ports = _free_ports(2 * members)
        folder = own / f"etcd-{attempt}"
        folder.mkdir(parents=True)
        pairs = list(zip(ports[::2], ports[1::2], strict=True))
        cluster = EtcdCluster([EtcdMember(program, folder, f"m{k}", pair, options) for k, pair in enumerate(pairs)])
        try:
            cluster.start()
        except ConfigInvalid:
            cluster.stop()
            # Somebody may have taken a port since it was found free.
            if attempt == START_ATTEMPTS - 1:
                raise
            continue
        try:
            yield cluster
        finally:
            cluster.stop()
        return


def _environment() -> dict[str, str]:
    """Give an environment without etcd's own options, which would come from there, too."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD")} | {
        # The gateway calls its own member, which must not go through anybody's proxy.
        "no_proxy": "127.0.0.1",
    }
