"""The `sllm-node` command: every verb and its help."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sllm_actor.cli import checkpoints, completion, explain, keep, key_commands, nodes, simulate, top
from sllm_actor.cli.asking import Json, Key, Url, ask, fail, refusals
from sllm_actor.cli.client import DEFAULT_URL, NodeClient
from sllm_actor.cli.configuring import configure
from sllm_actor.cli.deploying import deploy_all, deploy_one, print_deployed, registration
from sllm_actor.cli.exit_codes import ExitCode
from sllm_actor.cli.fitting import Column
from sllm_actor.cli.pull import pull_model
from sllm_actor.cli.run import run_model
from sllm_actor.cli.show import duration, out, print_json, print_tiers, state, table
from sllm_actor.cli.sllm_config import read_deployment
from sllm_actor.domain import Backend
from sllm_actor.units import format_bytes, parse_bytes

T = TypeVar("T")
app = typer.Typer(
    name="sllm-node", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve many large language models from few machines: start a node, deploy models, ask them.",
)  # fmt: skip
app.add_typer(key_commands.app, name="keys")

ConfigFile = Annotated[Path | None, typer.Option("--config", envvar="SLLM_CONFIG", help="A TOML file of knobs.")]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Folder of the node's own state.")]
Host = Annotated[str | None, typer.Option("--host", help="Address to bind; off loopback needs --api-key-file.")]
Port = Annotated[int | None, typer.Option("--port", help="Port to bind; 0 takes a free one.")]
KeyFile = Annotated[str | None, typer.Option("--api-key-file", help="File with the API keys to ask of clients.")]
Listen = Annotated[
    str | None, typer.Option("--listen", help="Where other nodes connect, such as tcp://127.0.0.1:8401.")
]
SecretFile = Annotated[
    str | None,
    typer.Option("--cluster-secret-file", "--join-secret-file", help="File with the secret that all nodes share."),
]
NodeName = Annotated[str | None, typer.Option("--node-id", help="This node's name in the cluster.")]
Metadata = Annotated[
    str | None, typer.Option("--metadata", help="etcd of the cluster to join: etcd://HOST:PORT,HOST:PORT,…")
]
Roles = Annotated[
    str | None, typer.Option("--roles", help="What the node is there for: gateway,controller,worker, or fewer of them.")
]
Source = Annotated[
    str, typer.Argument(help="A checkpoint folder, builtin:demo, or hf://, https://, s3:// or sllm:// and where it is.")
]
Deployed = Annotated[
    str, typer.Argument(metavar="SOURCE", help="As of 'pull'; with --config: instead of the file's own.")
]
TheirConfig = Annotated[
    Path | None,
    typer.Option("--config", help="What 'sllm deploy --config' of ServerlessLLM takes; flags are above it."),
]
Name = Annotated[str, typer.Option("--name", help="Its name; the last part of the source by default.")]
KeepAlive = Annotated[str, typer.Option(help="Idle time before it is unloaded: 5m, 1h, forever.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace another model of this name.")]
Replicas = Annotated[int | None, typer.Option("--replicas", min=1, help="Run so many instances, always.")]
MinInstances = Annotated[int | None, typer.Option("--min-instances", min=0, help="Run so many also while nobody asks.")]
MaxInstances = Annotated[int | None, typer.Option("--max-instances", min=1, help="Run so many when many ask.")]
Target = Annotated[
    int | None,
    typer.Option("--target-concurrency", min=0, help="Running requests for one instance; 0: as many as it takes."),
]
Base = Annotated[str, typer.Option("--base", help="Of a LoRA adapter: the registered model that it is for.")]
BackendChoice = Annotated[
    Backend | None, typer.Option("--backend", help="Whose engine computes it: sllm (by default) or vllm.")
]
ModelName = Annotated[str, typer.Argument(help="Its name, as 'ls' shows it.", autocompletion=completion.models)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KNOB=VALUE", help="Any knob; 'doctor' lists them.")]

MODELS = (
    Column("NAME"), Column("STATE", 1), Column("SIZE", 2), Column("ARCHITECTURE", 4), Column("DTYPE", 6),
    Column("CONTEXT", 5), Column("KEEP ALIVE", 3),
)  # fmt: skip
INSTANCES = (
    Column("INSTANCE"), Column("MODEL", 6), Column("NODE", 1), Column("PID", 5), Column("REQUESTS", 3),
    Column("SIZE", 4), Column("UNLOADS IN", 2),
)  # fmt: skip


@app.command()
def start(
    config: ConfigFile = None, data_dir: DataDir = None, host: Host = None, port: Port = None,
    api_key_file: KeyFile = None, listen: Listen = None, cluster_secret_file: SecretFile = None,
    node_id: NodeName = None, metadata: Metadata = None, roles: Roles = None, set_: Set = None, as_json: Json = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:  # fmt: skip
    """Start a node and serve until SIGTERM or Ctrl-C; running answers are finished first.

    Example: sllm-node start --port 8400 --set host_pool_bytes=8GiB
    """
    from sllm_actor.cli.start import run

    if log_level not in ("debug", "info", "warning", "error"):
        fail(f"--log-level {log_level}: use debug, info, warning or error", ExitCode.USAGE, as_json=as_json)
    with refusals(as_json=as_json):
        resolved = configure(
            config, data_dir, set_, host=host, port=port, key_file=api_key_file, listen=listen,
            secret_file=cluster_secret_file, node_id=node_id, metadata=metadata, roles=roles,
        )  # fmt: skip
        run(resolved.config, as_json=as_json, log_level=log_level)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version.

    Example: sllm-node version
    """
    if as_json:
        print_json({"version": installed_version("sllm_actor")})
    else:
        out.print(f"sllm_actor {installed_version('sllm_actor')}")


@app.command()
def doctor(
    config: ConfigFile = None, data_dir: DataDir = None, host: Host = None, port: Port = None,
    api_key_file: KeyFile = None, listen: Listen = None, cluster_secret_file: SecretFile = None,
    node_id: NodeName = None, metadata: Metadata = None, roles: Roles = None, set_: Set = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Check this machine and print every knob with its value and where that came from.

    Ends with 0 where all is well, with 4 where there are warnings, with 1 where a node would not start.

    Example: sllm-node doctor --config node.toml --set host_pool_bytes=8GiB
    """
    from sllm_actor.cli.doctor import report

    with refusals(as_json=as_json):
        resolved = configure(
            config, data_dir, set_, host=host, port=port, key_file=api_key_file, listen=listen,
            secret_file=cluster_secret_file, node_id=node_id, metadata=metadata, roles=roles,
        )  # fmt: skip
    raise typer.Exit(report(resolved, as_json=as_json))


@app.command()
def calibrate(
    config: ConfigFile = None, data_dir: DataDir = None, set_: Set = None,
    size: Annotated[str, typer.Option(help="Bytes of each of the two scratch files.")] = "1GiB",
    seconds: Annotated[float, typer.Option(min=0.01, max=60, help="Shortest length of a measurement.")] = 1.0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the disk of the data folder; the node then reads with as many threads as are best.

    No node may run on that folder meanwhile. Needs room for two scratch files, and leaves none.

    Example: sllm-node calibrate --data-dir ~/.sllm --size 4GiB
    """
    try:
        size_bytes = parse_bytes(size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from None
    from sllm_actor.cli.calibrate import run

    with refusals(as_json=as_json):
        run(configure(config, data_dir, set_).config, size_bytes, seconds, as_json=as_json)


@app.command()
def deploy(
    source: Deployed = "", config: TheirConfig = None, name: Name = "", base: Base = "", keep_alive: KeepAlive = "",
    replace: Replace = False, replicas: Replicas = None, min_instances: MinInstances = None,
    max_instances: MaxInstances = None, target_concurrency: Target = None, backend: BackendChoice = None,
    url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Check a checkpoint or a LoRA adapter and register it; it is loaded when the first request for it comes.

    Deploying the same folder again takes over what has changed in it.

    Example: sllm-node deploy ./opt-125m --name opt

    Example: sllm-node deploy ./my-adapter --name sql --base opt

    Example: sllm-node deploy ./opt-125m --name opt --min-instances 1 --max-instances 4

    Example: sllm-node deploy --config serverlessllm.json
    """
    if replicas is not None and (min_instances is not None or max_instances is not None):
        raise typer.BadParameter("--replicas N stands for --min-instances N --max-instances N", param_hint="--replicas")
    if not source and config is None:
        raise typer.BadParameter("a checkpoint, or --config with a file of ServerlessLLM's", param_hint="SOURCE")
    scaling = {
        "min_instances": min_instances if replicas is None else replicas,
        "max_instances": max_instances if replicas is None else replicas,
        "target_concurrency": target_concurrency,
        "backend": backend,
    }
    said = {knob: value for knob, value in scaling.items() if value is not None}
    if config is None:
        body = registration(source, name, keep_alive, base=base, replace=replace) | said
        answer = ask(url, api_key, lambda client: deploy_one(client, body, as_json=as_json), as_json=as_json)
        print_json(answer) if as_json else print_deployed(answer["model"])
        return
    if base:
        raise typer.BadParameter("adapters are in the file, or are deployed by themselves", param_hint="--base")
    over = registration(source, name, keep_alive, base="", replace=replace) if source else {}
    over |= {"name": name} if name else {}
    over |= {"keep_alive": keep_alive} if keep_alive else {}
    with refusals(as_json=as_json):
        plan = read_deployment(config, over | said, named=bool(name))
    ask(url, api_key, lambda client: deploy_all(client, plan, replace=replace, as_json=as_json), as_json=as_json)


@app.command()
def pull(
    source: Source, name: Name = "", base: Base = "", keep_alive: KeepAlive = "", replace: Replace = False,
    url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Register a model and bring it to the node's SSD before anybody asks for it. Can be interrupted and gone on with.

    Example: sllm-node pull hf://Qwen/Qwen2.5-0.5B-Instruct --name qwen
    """
    body = registration(source, name, keep_alive, base=base, replace=replace)
    ask(url, api_key, lambda client: pull_model(client, body, as_json=as_json), as_json=as_json)


@app.command("ls")
def list_models(url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """List the registered models and where each is now.

    Example: sllm-node ls
    """
    answer = ask(url, api_key, lambda client: client.call("GET", "/admin/models"), as_json=as_json)
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            status["model"]["name"], state(status), format_bytes(status["model"]["size_bytes"]),
            (status["model"]["base"] and f"adapter of {status['model']['base']}") or status["model"]["architecture"],
            status["model"]["dtype"], str(status["model"]["context_tokens"]),
            duration(status["model"]["keep_alive_s"]),
        )
        for status in answer["models"]
    ]  # fmt: skip
    table(MODELS, rows)


@app.command("rm")
def remove(
    name: ModelName,
    purge: Annotated[bool, typer.Option("--purge", help="Also give up what memory and SSD have of it.")] = False,
    url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Stop a model and forget it; what the tiers have of it stays until room is needed, a folder's files for ever.

    Example: sllm-node rm opt --purge
    """

    async def work(client: NodeClient) -> dict[str, Any]:
        if purge:
            await client.call("POST", f"/admin/models/{name}/unload")
            await client.call("POST", f"/admin/models/{name}/evict", {"tier": "all"})
        return await client.call("DELETE", f"/admin/models/{name}")

    answer = ask(url, api_key, work, as_json=as_json, about=name)
    print_json(answer) if as_json else out.print(f"removed {answer['removed']}")


@app.command("ps")
def processes(url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """List the running instances, and what each tier of the node's storage holds.

    Example: sllm-node ps
    """

    async def look(client: NodeClient) -> dict[str, Any]:
        instances = await client.call("GET", "/admin/instances")
        return instances | {"tiers": await client.call("GET", "/admin/tiers")}

    answer = ask(url, api_key, look, as_json=as_json)
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            instance["instance_id"], instance["model"], instance["node"], str(instance["pid"]), str(instance["active"]),
            format_bytes(instance["size_bytes"]), "busy" if instance["active"] else duration(instance["expires_in_s"]),
        )
        for instance in answer["instances"]
    ]  # fmt: skip
    table(INSTANCES, rows)
    out.print()
    print_tiers(answer["tiers"])


@app.command()
def stop(name: ModelName, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """Unload a model's instances once their running answers are finished, and end its start; it stays registered.

    Example: sllm-node stop opt
    """
    answer = ask(
        url, api_key, lambda client: client.call("POST", f"/admin/models/{name}/unload"), as_json=as_json, about=name
    )
    if as_json:
        print_json(answer)
        return
    ended = " and ended its start" if answer["ended_starts"] else ""
    out.print(f"stopped {answer['stopped']} instance(s) of {name}{ended}")


@app.command()
def run(
    model: ModelName,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without one: a chat, or what is piped in.")] = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's own by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")] = None,
    timeline: Annotated[bool, typer.Option("--timeline", help="Show what the start was made of.")] = False,
    url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Ask a model, or chat with it at the terminal.

    Example: sllm-node run demo "What is 47 + 35?" --timeline
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt.strip():
            fail("there is no prompt: nothing was piped in", ExitCode.USAGE, as_json=as_json)
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}

    async def work(client: NodeClient) -> None:
        await run_model(client, model, prompt, system=system, options=given, timeline=timeline, as_json=as_json)

    ask(url, api_key, work, as_json=as_json, about=model)


@app.command()
def convert(
    source: checkpoints.Source, target: checkpoints.Target, partitions: checkpoints.Partitions = 1,
    tensor_parallel: checkpoints.TensorParallel = 1, replace: checkpoints.Replace = False,
    chunk_bytes: checkpoints.ChunkBytes = checkpoints.DEFAULT_CHUNK, as_json: Json = False,
) -> None:  # fmt: skip
    """Convert a checkpoint folder into one that is laid out for loading, with a digest for every chunk.

    The target appears when it is whole. Needs no node.

    Example: sllm-node convert ./opt-125m ./opt-125m-sllm --partitions 2
    """
    if partitions > 1 and tensor_parallel > 1:
        fail("--partitions and --tensor-parallel exclude each other", ExitCode.USAGE, as_json=as_json)
    size_bytes = checkpoints.chunk_size(chunk_bytes)
    with refusals(as_json=as_json):
        checkpoints.run_convert(
            source, target, partitions, tensor_parallel, size_bytes, replace=replace, as_json=as_json
        )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    as_json: Json = False,
) -> None:
    """Read every byte of a converted checkpoint and compare it with its digests.

    Of a folder that was not converted only headers and index can be checked. Needs no node.

    Example: sllm-node verify ./opt-125m-sllm
    """
    with refusals(as_json=as_json):
        checkpoints.run_verify(folder, as_json=as_json)


for verb in (
    keep.pin, keep.unpin, keep.evict, explain.explain, nodes.status, nodes.cordon, nodes.uncordon, nodes.drain,
    nodes.notice, nodes.migrate, top.top, simulate.simulate,
):  # fmt: skip
    app.command()(verb)


def main() -> None:
    """Run the command line."""
    app()
