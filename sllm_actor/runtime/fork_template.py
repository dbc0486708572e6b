"""A process that is warm already and forks fork servers: for many nodes on one machine, as in tests and benchmarks.

A fork server's imports take seconds of processor time. Where `SLLM_TEMPLATE` names the socket of a template, a
node sends the template one end of a socket pair, its environment and its output, and what is forked there serves the
node at once. It goes with its node's socket, as every fork server does, and outlives its template.

What a process can only have from its start can't be given to one that runs. So a node whose interpreter, module or
variables of `FIXED` are others is declined, and starts a fork server of its own. Of the template and not of the node
are: the limits on resources, the niceness, the session, the control group.

Run as `main([FD, MODULE])`, `FD` listening; it leaves when its standard input closes.
"""

from __future__ import annotations

import array
import contextlib
import importlib.util
import os
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from sllm_actor.runtime.forkserver import Declined, count_threads, import_path, name_process, preload, serve

VARIABLE = "SLLM_TEMPLATE"
# What the loader, the interpreter and the libraries read once, as they start.
FIXED = (
    "CUDA_", "GLIBC_", "GOMP_", "HF_", "KMP_", "LC_", "LANG", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON",
    "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_",
)  # fmt: skip
# One Python has several names in its folder.
INTERPRETER = f"{sys.prefix} {sys.version}"
MAX_REQUEST_BYTES = 128 * 1024
BACKLOG = 128
# Who asks sends in the same breath as it connects.
REQUEST_TIMEOUT_S = 1.0
FDS = 4
BOOT = "import sys; from sllm_actor.runtime.fork_template import main; main(sys.argv[1:])"


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for a fork server of `module`; beside it travel its socket, the current folder, and both outputs."""

    interpreter: str
    module: str
    module_file: str
    environment: dict[bytes, bytes]
    import_path: list[str]
    processors: list[int]


class Adopted:
    """A fork server that a template forked: no child of this process, so known by a descriptor of it."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it has ended; how is known to its template alone."""
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        ended.poll()
        os.close(self._pidfd)
        return 0


def ask(path: str, module: str, environment: Mapping[str, str], control: socket.socket) -> bool:
    """Ask the template at `path` for a fork server that serves `control`; False if none can be asked. Never waits."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return False
    if spec is None or spec.origin is None:
        return False
    request = Start(
        interpreter=INTERPRETER,
        module=module,
        module_file=spec.origin,
        environment={os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
        import_path=import_path(),
        processors=sorted(os.sched_getaffinity(0)),
    )
    data = msgspec.msgpack.encode(request)
    if len(data) > MAX_REQUEST_BYTES:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as template, _current_folder() as folder:
            template.setblocking(False)
            template.connect(path)
            if _user(template) != os.getuid():
                return False
            fds = array.array("i", [control.fileno(), folder, 1, 2])
            template.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    except OSError:
        return False
    return True


def _user(sock: socket.socket) -> int:
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", peer)[1]
    return user


@contextmanager
def _current_folder() -> Iterator[int]:
    fd = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


class _Template:
    def __init__(self, listening: socket.socket, module: str) -> None:
        self._listening = listening
        before = dict(os.environb)
        self._module = preload(module)
        self._began_with = _fixed(before)
        # Imports leave variables for later ones and for children.
        self._imports_set = dict(os.environb.items() - before.items())
        self._requests: msgspec.msgpack.Decoder[Start] = msgspec.msgpack.Decoder(Start)
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Fork for all who ask, until the standard input closes."""
        self._selector.register(0, selectors.EVENT_READ)
        self._selector.register(self._listening, selectors.EVENT_READ)
        while all(key.fileobj != 0 for key, _ in self._selector.select()):
            self._answer()

    def _answer(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            connection.settimeout(REQUEST_TIMEOUT_S)
            try:
                data, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, FDS)
            except OSError:
                return
            allowed = _user(connection) == os.getuid()
        try:
            if allowed and len(fds) == FDS:
                self._fork(self._requests.decode(data), fds)
        except msgspec.DecodeError as error:
            print(f"the template was asked for something else: {error}", file=sys.stderr, flush=True)
        finally:
            for fd in fds:
                os.close(fd)

    def _fork(self, request: Start, fds: Sequence[int]) -> None:
        reason, threads = self._why_not(request), count_threads()
        if reason is None:
            try:
                if os.fork() == 0:
                    self._become(request, fds, threads)
                return
            except OSError as error:
                reason = str(error)
        with socket.socket(fileno=os.dup(fds[0])) as control, contextlib.suppress(OSError):
            control.send(msgspec.msgpack.encode(Declined(reason=reason)))

    def _why_not(self, request: Start) -> str | None:
        if request.interpreter != INTERPRETER:
            return "another interpreter"
        if (request.module, request.module_file) != (self._module.__name__, self._module.__file__):
            return "another module"
        asked = _fixed(request.environment)
        others = sorted(name for name, _ in asked.items() ^ self._began_with.items())
        return f"another value of {others[0].decode()}" if others else None

    def _become(self, request: Start, fds: Sequence[int], threads: int) -> None:
        """Be a fork server in the new process. Never returns."""
        status = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._listening.close()
            self._selector.close()
            control, folder, output, errors = fds
            os.fchdir(folder)
            os.close(folder)
            null = os.open(os.devnull, os.O_RDONLY)
            for standard, fd in enumerate((null, output, errors)):
                os.dup2(fd, standard)
                os.close(fd)
            os.sched_setaffinity(0, request.processors)
            os.environb.clear()
            os.environb.update(request.environment | self._imports_set)
            sys.path[:] = request.import_path
            serve(socket.socket(fileno=control), self._module.ENTRIES, threads)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _fixed(environment: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Give what can't be changed later. The import path can: what is imported is compared instead."""
    prefixes = tuple(prefix.encode() for prefix in FIXED)
    return {name: environment[name] for name in environment if name.startswith(prefixes) and name != b"PYTHONPATH"}


def main(arguments: Sequence[str]) -> None:
    # Its owner decides when it leaves; and nobody here needs to know how a fork server ended.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_IGN)
    name_process("sllm-template")
    _Template(socket.socket(fileno=int(arguments[0])), arguments[1]).run()


@contextmanager
def running_template(module: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a template of `module` while the context lasts; gives its socket's path, which can be asked from now on.

    `environment` is what fork servers are given beside the caller's own (`forking.ENVIRONMENT`).
    """
    folder = Path(tempfile.mkdtemp(prefix="sllm-"))
    path = folder / "template"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(str(path))
            listening.listen(BACKLOG)
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, str(listening.fileno()), module],
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(import_path())},
            )
        try:
            yield str(path)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    finally:
        shutil.rmtree(folder)
