"""What runs of a simulation came to, for people: one HTML file with its figures inside, readable without a network.

The figures are matplotlib's (the extra `simulate`), as SVG, so that a browser needs nothing else.
"""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from sllm_actor.errors import InvalidInput
from sllm_actor.testing.evaluation import Run

COLUMNS = {
    "requests": "requests", "failed": "failed", "wait_mean_s": "first token, mean", "over_least": "mean / oracle",
    "over_first_come": "mean / first come", "over_on_demand": "mean / on demand", "wait_p50_s": "p50",
    "wait_p95_s": "p95", "wait_p99_s": "p99",
    "end_mean_s": "whole, mean", "end_p99_s": "whole, p99", "warm": "warm", "starts": "starts", "migrations": "moves",
    "devices_held": "devices held", "devices_busy": "devices busy",
}  # fmt: skip
TIMES = ("over_least", "over_first_come", "over_on_demand")
SHARES = ("warm", "devices_held", "devices_busy")
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; background: #fff; border-radius: .5rem; padding: .5rem; }
figcaption { color: #333; }
svg { width: 100%; height: auto; }
pre { overflow-x: auto; background: #8882; padding: .7rem; border-radius: .5rem; }
"""


def rows(runs: Mapping[str, Run]) -> list[tuple[str, ...]]:
    """Give a table's rows, each with its name and the columns of `COLUMNS`."""
    return [(name, *(_shown(key, run.summary()[key]) for key in COLUMNS)) for name, run in runs.items()]


def _shown(key: str, value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    if value != value:
        return "-"
    if key in TIMES:
        return f"{value:.3g} x"
    return f"{value:.0%}" if key in SHARES else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def page(title: str, command: str, described: Any, runs: Mapping[str, Run]) -> str:
    """Make the page; needs what `check_figures` looks for."""
    figures = [
        ("From a request's arrival to its first token: the share of requests that took at most so long",
         _svg(lambda axes: _cdf(axes, {name: run.waits_s() for name, run in runs.items()}))),
        ("From a request's arrival to its end", _svg(
            lambda axes: _cdf(axes, {name: run.times_s() for name, run in runs.items()}))),
        ("By which tier the models of requests came; many wait for the start that another has asked for",
         _svg(lambda axes: _tiers(axes, runs))),
        ("What the devices did: held by an instance, and computing", _svg(lambda axes: _devices(axes, runs))),
    ]  # fmt: skip
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("system", *COLUMNS.values()))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(runs))
    shown = "".join(f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>" for text, svg in figures)
    world = msgspec.json.format(msgspec.json.encode(described), indent=2).decode()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><pre>{html.escape(command)}</pre>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{shown}"
        f"<h2>The cluster</h2><pre>{html.escape(world)}</pre></html>\n"
    )


def check_figures() -> None:
    """See that figures can be made.

    Raises:
        InvalidInput: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput("figures need matplotlib: pip install 'sllm_actor[simulate]'")


def _svg(draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # The same runs give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "sllm_actor", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _cdf(axes: Any, series: Mapping[str, Sequence[float]]) -> None:
    for name, values in series.items():
        if values:
            shares = [(place + 1) / len(values) for place in range(len(values))]
            axes.step([max(value, 1e-3) for value in values], shares, where="post", label=name)
    axes.set(xscale="log", xlabel="seconds", ylabel="share of requests", ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend()


def _tiers(axes: Any, runs: Mapping[str, Run]) -> None:
    names = sorted({tier for run in runs.values() for tier in run.tiers()})
    left = [0.0] * len(runs)
    for name in names:
        shares = [run.tiers()[name] / max(1, sum(run.tiers().values())) for run in runs.values()]
        axes.barh(list(runs), shares, left=left, label=name)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axes.set(xlabel="share of requests", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend()


def _devices(axes: Any, runs: Mapping[str, Run]) -> None:
    summaries = [run.summary() for run in runs.values()]
    axes.barh(list(runs), [one["devices_held"] for one in summaries], label="held", alpha=0.5)
    axes.barh(list(runs), [one["devices_busy"] for one in summaries], label="computing")
    axes.set(xlabel="share of all devices' time", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend()
