"""Ask three nodes through all of them while a seeded fault hits one, round after round, and hold them to what they owe.

`python -m sllm_actor.testing.cluster_storm --rounds 50 [--seed S] [--only kill] [--moves N] [--folder F]`. Each request
whose own gateway was not hit is answered, rightly, once; whoever asked the one that was hit is answered rightly or sees
the connection end. With `--only` kinds of faults nobody asks the one that is hit; with `--moves` so many answers are
moved meanwhile, or nodes drained. After each round every node is a member again, one leads, no instance is on two
nodes, nothing is left of what was killed. A round is fixed by the seed as far as it is ours to fix: which fault, where,
when, what is asked and moved.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sllm_actor.runtime import fork_template
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.forking import ENVIRONMENT
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import NodeProcess, living
from sllm_actor.testing.questions import Question, count, is_right

NODES = ("n1", "n2", "n3")
MODELS = ("a", "b", "c", "d")
KNOBS = (
    "host_pool_bytes=64MiB", "chunk_bytes=1MiB", "engine_threads=1", "listen=tcp://127.0.0.1:0", "lease_ttl_s=2",
    "max_instances=2", "warm_engines=1", "keep_alive_s=5", "ask_timeout_s=60", "text_timeout_s=120",
    "drain_timeout_s=120",
)  # fmt: skip
PATIENCE_S = 120.0
REQUESTS = 8
DRAINS_ONE_IN = 4
CLOCK = SystemClock()
GONE = "the connection ended"


class Asked(NamedTuple):
    """A request and what became of it: its text, or the code of its error."""

    gateway: str
    model: str
    question: Question
    text: str
    error: str

    @property
    def is_right(self) -> bool:
        """Whether it was answered, and as it should be."""
        return not self.error and is_right(self.question, self.text)


class Wish(NamedTuple):
    """What an operator does after a while: move the `which`th of the answers under way, or drain the node."""

    after_s: float
    drains: bool
    node: str
    which: int


def pause(duration_s: float) -> None:
    """Let time pass: between a fault and the next one it is part of what happens."""
    threading.Event().wait(duration_s)


def eventually(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds; fail where it never does."""
    end_s = CLOCK.monotonic_s() + PATIENCE_S
    while not holds():
        assert CLOCK.monotonic_s() < end_s, f"it never came true that {what}"
        pause(0.02)


def ask(node: NodeProcess, gateway: str, model: str, question: Question) -> Asked:
    """Ask for a stream and read it to its end."""
    body = {"model": model, "messages": [{"role": "user", "content": question.prompt}], "stream": True}
    text, error, done = "", "", False
    connection = node.connect()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Asked(gateway, model, question, "", json.loads(response.read())["error"]["code"])
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                error = event["error"]["code"] if "error" in event else error
                text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            done = done or line.startswith(b"data: [DONE]")
    except (OSError, http.client.HTTPException, ValueError):
        return Asked(gateway, model, question, text, GONE)
    finally:
        connection.close()
    return Asked(gateway, model, question, text, error or ("" if done else GONE))


class Storm:
    """One cluster, and the chance that decides what happens to it."""

    def __init__(self, cluster: NodeCluster, chance: random.Random, only: Sequence[str] = (), moves: int = 0) -> None:
        self.cluster = cluster
        self.chance = chance
        self.seen: Counter[str] = Counter()
        faults: tuple[Callable[[str], None], ...] = (self.kill, self.hang, self.stop, self.drain, self.kill_etcd)
        self.faults = [fault for fault in faults if not only or fault.__name__ in only]
        self._spares_gateways = bool(only)
        self._moves = moves

    def kill(self, victim: str) -> None:
        """SIGKILL a node."""
        left = self.cluster.kill(victim)
        eventually("nothing is left of what was killed", lambda: not living(left))

    def hang(self, victim: str) -> None:
        """SIGSTOP a node for up to three lease times."""
        self.cluster.hold_up(victim)
        pause(self.chance.uniform(0.5, 6.0))
        self.cluster.go_on(victim)

    def stop(self, victim: str) -> None:
        """SIGTERM a node, which finishes what it answers."""
        assert self.cluster.stop_node(victim) == (0, []), "a node that is told to stop leaves in peace"

    def drain(self, victim: str) -> None:
        """Drain a node through another, and let it serve again."""
        other = next(self.cluster.nodes[name] for name in NODES if name != victim)
        other.call("POST", f"/admin/nodes/{victim}/drain")
        other.call("POST", f"/admin/nodes/{victim}/uncordon")

    def kill_etcd(self, _: str) -> None:
        """SIGKILL a member of etcd, and start it again."""
        member = self.chance.choice(self.cluster.etcd.members)
        member.kill()
        pause(self.chance.uniform(0.0, 3.0))
        self.cluster.etcd.start(member)

    def round(self, number: int) -> None:
        """Let one fault happen while requests are answered."""
        fault, victim = self.chance.choice(self.faults), self.chance.choice(NODES)
        delay_s = self.chance.uniform(0.0, 2.0)
        living = [name for name in NODES if name != victim]
        gateways = living if self._spares_gateways else NODES
        chosen = [
            (self.chance.choice(gateways), self.chance.choice(MODELS), count(1, self.chance.randrange(20, 400)))
            for _ in range(REQUESTS)
        ]
        wishes = [self._wish(living) for _ in range(self._moves)]
        where = f"round {number}, {fault.__name__} of {victim} after {delay_s:.2f} s"
        with ThreadPoolExecutor(REQUESTS + 1) as pool:
            asked = [pool.submit(ask, self.cluster.nodes[node], node, model, what) for node, model, what in chosen]
            operator = pool.submit(self._operate, wishes, living[0])
            pause(delay_s)
            fault(victim)
            answers = [one.result() for one in asked]
            operator.result()
        self.judge(answers, "" if fault in (self.drain, self.kill_etcd) else victim, where)
        self.heal(where)
        self.seen[fault.__name__] += 1

    def _wish(self, living: Sequence[str]) -> Wish:
        chance, drains = self.chance, self.chance.randrange(DRAINS_ONE_IN) == 0
        node = chance.choice(living if drains else NODES)
        return Wish(chance.uniform(0.0, 1.0), drains, node, chance.randrange(REQUESTS))

    def _operate(self, wishes: Sequence[Wish], asked: str) -> None:
        """Move answers and drain nodes; what can't be done is refused by a typed error, and does no harm."""
        for wish in wishes:
            pause(wish.after_s)
            node = self.cluster.nodes[asked]
            if wish.drains:
                reply = node.request("POST", f"/admin/nodes/{wish.node}/drain")
                node.call("POST", f"/admin/nodes/{wish.node}/uncordon")
                self.seen["drained" if reply.status == 200 else "not drained"] += 1
                continue
            shown = node.call("GET", "/admin/requests")["requests"]
            running = [one["request_id"] for one in shown if one["outcome"] == "running"]
            if running:
                path = f"/admin/requests/{running[wish.which % len(running)]}/migrate"
                reply = node.request("POST", path, {"to": wish.node})
                self.seen["moved" if reply.status == 200 else f"not moved: {reply.json()['error']['code']}"] += 1

    def judge(self, answers: Sequence[Asked], victim: str, where: str) -> None:
        """Compare what became of requests with what they are owed: what the model says where nothing happens to it."""
        for one in answers:
            excused = one.gateway == victim and one.error in (GONE, "draining")
            assert one.is_right or excused or self._errs_undisturbed(one), (
                f"{where}: {one.question.prompt!r} of {one.model} through {one.gateway}: "
                f"{one.error or one.text[-200:]!r}"
            )
            self.seen["excused" if excused else "right" if one.is_right else "as wrong as undisturbed"] += 1

    def _errs_undisturbed(self, one: Asked) -> bool:
        """Tell whether the model itself gives that wrong answer: it loses its place in a long count now and then."""
        gateway = next(name for name in NODES if name in self.cluster.nodes)
        undisturbed = ask(self.cluster.nodes[gateway], gateway, one.model, one.question)
        return not one.error and (undisturbed.text, undisturbed.error) == (one.text, "")

    def heal(self, where: str) -> None:
        """Have all nodes again, and look whether they agree."""
        missing = [name for name in NODES if name not in self.cluster.nodes]
        if missing:
            self.cluster.start(*missing)
        eventually(f"{where}: all know all", lambda: all(self._knows_all(name) for name in NODES))
        running = self.cluster.nodes["n1"].call("GET", "/admin/instances")["instances"]
        names = [one["instance_id"] for one in running]
        assert len(names) == len(set(names)), f"{where}: {names} have one twice"

    def _knows_all(self, asked: str) -> bool:
        shown = self.cluster.shown(asked)
        return (
            list(shown) == list(NODES)
            and all(node["reported"] for node in shown.values())
            and sum(node["leads"] for node in shown.values()) == 1
            and not any(node["active"] for node in shown.values())
        )


@contextmanager
def warm_starts() -> Iterator[None]:
    """From here on nodes get fork servers from a warm one: most of what a round takes, otherwise."""
    with fork_template.running_template("sllm_actor.node.children", ENVIRONMENT) as path:
        os.environ[fork_template.VARIABLE] = path
        yield
        del os.environ[fork_template.VARIABLE]


def run(rounds: int, seed: int, folder: Path, unpacked: Path, only: Sequence[str] = (), moves: int = 0) -> str:
    """Run so many rounds.

    Raises:
        AssertionError: something that was owed was not given; the message says in which round.
    """
    chance = random.Random(seed)
    with warm_starts(), running_cluster(folder, unpacked, NODES, KNOBS, members=3) as cluster:
        storm = Storm(cluster, chance, only, moves)
        for model in MODELS:
            cluster.nodes["n1"].deploy("builtin:demo", model)
        storm.heal("before the first round")
        for number in range(1, rounds + 1):
            storm.round(number)
            print(f"round {number}: {dict(storm.seen)}", flush=True)
        recovered = sum(node.call("GET", "/admin/runtime")["starts"]["recovered"] for node in cluster.nodes.values())
        return f"{rounds} rounds with seed {seed}: {dict(storm.seen)}, at least {recovered} answers went on elsewhere"


def main() -> None:
    """Run from the command line; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description="Hit nodes of a cluster while they are asked.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], choices=["kill", "hang", "stop", "drain", "kill_etcd"])
    parser.add_argument("--moves", type=int, default=0, help="in each round, so many answers moved or nodes drained")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--etcd", type=Path, default=Path(".servers"), help="where packages of etcd were unpacked")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sllm-cluster-storm-", dir=arguments.folder))
    try:
        print(run(arguments.rounds, arguments.seed, folder, arguments.etcd, arguments.only, arguments.moves))
    except AssertionError as wrong:
        sys.exit(f"seed {arguments.seed}: {wrong}; what is there is kept in {folder}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with suppress(OSError):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
