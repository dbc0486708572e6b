"""What the manual says of knobs, metrics, HTTP and commands, written from the program when the manual is built.

A page has a directive where a table is to be (`{knobs}`, `{metrics}`, `{http}`, `{commands}`, `{errors}`, `{printed}`),
or takes in a file from above this folder (`{root} README.md`). So page and program can't part.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import click
import msgspec
import typer
from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from sllm_actor.cli.main import app as commands
from sllm_actor.cli.printed import PRINTED, Failed
from sllm_actor.config.load import PREFIX, Knob, knobs
from sllm_actor.errors import SllmError
from sllm_actor.frontend import openapi
from sllm_actor.frontend.http_errors import status_of
from sllm_actor.frontend.metrics import Metrics
from sllm_actor.frontend.node_metrics import families
from sllm_actor.units import GIB, KIB, MIB

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES_OF_ROOT = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Languages of code blocks that nobody need colour.
PLAIN = ("mermaid", "header", "hex")


class Nothing(dict[str, Any]):
    """What a node has seen that has seen nothing: whatever is asked for is there, and empty."""

    def __missing__(self, _: str) -> Nothing:
        return Nothing()


# Its metrics have names, kinds and labels.
NOTHING_SEEN = Nothing(
    starts=Nothing(estimate_errors={"bounds": (), "tiers": {}}),
    system=SimpleNamespace(actors=(), links=(), dead_letters=0),
)


def cell(text: object) -> str:
    """Give what a cell of a table can hold: one line, no bar."""
    return re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|")


def table(heads: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def knob_table() -> str:
    """List every knob: name, value by default, kind, meaning."""
    rows = ((f"`{k.name}`", f"`{PREFIX}{k.name.upper()}`", shown(k), kind_of(k), k.description) for k in knobs())
    return table(("knob", "variable", "default", "kind", "what it is"), rows)


def kind_of(knob: Knob) -> str:
    kind = {bool: "true or false", int: "whole number", float: "number", str: "text"}[type(knob.default)]
    return f"{kind}, {knob.unit}" if knob.unit else kind


def shown(knob: Knob) -> str:
    """Write a default as it would be set; bytes with a unit where that is exact."""
    value = knob.default
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if knob.unit == "bytes" and value:
        for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
            if value % factor == 0:
                return f"`{value // factor}{unit}`"
    return "`forever`" if value == float("inf") else f"`{value}`"


def metric_rows() -> list[tuple[str, str, tuple[str, ...], str]]:
    """List every metric: name as Prometheus shows it, kind, labels, help."""
    of_requests = list(Metrics().registry._collector_to_names)
    found = [(one._name, one._type, one._labelnames, one._documentation) for one in of_requests]  # type: ignore[attr-defined]
    found += [(one.name, one.type, one._labelnames, one.documentation) for one in families(NOTHING_SEEN)]  # type: ignore[attr-defined]
    return [(f"{name}_total" if kind == "counter" else name, kind, labels, text) for name, kind, labels, text in found]


def metric_table() -> str:
    rows = (
        (f"`{name}`", kind, ", ".join(labels) or "none", text) for name, kind, labels, text in sorted(metric_rows())
    )
    return table(("name", "kind", "labels", "what it is"), rows)


def http_reference() -> str:
    """Describe every operation of the endpoint, then every body it takes."""
    described = openapi.describe()
    parts = [statuses() + "\n"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## {method.upper()} {path.replace('{', '').replace('}', '')}\n\n{operation['summary']}\n")
            parts.append(answers(operation) + "\n")
            if parameters := operation.get("parameters"):
                of_parameters = (
                    (f"`{p['name']}`", p["in"], f"{p.get('description', '')} {bounds(p['schema'])}") for p in parameters
                )
                parts.append(table(("parameter", "in", "is"), of_parameters) + "\n")
            if body := operation.get("requestBody"):
                name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                parts.append(f"Takes the body [{name}](#{name.lower()}).\n")
    bodies = {body.__name__ for body in openapi.BODIES}
    for name, schema in described["components"]["schemas"].items():
        if "enum" in schema:
            parts.append(f"## {name}\n\n{type_of(schema)}\n")
        if "properties" in schema:
            needed = schema.get("required", ())
            rows = (
                (f"`{field}`", "yes" if field in needed else "", type_of(what), bounds(what))
                for field, what in schema["properties"].items()
            )
            kind = "A body of a request." if name in bodies else "A part of a body, or an answer."
            parts.append(f"## {name}\n\n{kind}\n\n{table(('field', 'needed', 'is', 'within'), rows)}\n")
    return "\n".join(parts)


def answers(operation: dict[str, Any]) -> str:
    """Say what it is answered with, and with which statuses it fails."""
    well = {status: answer for status, answer in operation["responses"].items() if status < "300"}
    kinds = " or ".join(f"`{kind}`" for answer in well.values() for kind in answer["content"])
    failed = ", ".join(f"`{status}`" for status in operation["responses"] if status not in well)
    return f"Answered with `{', '.join(well)}` and {kinds}" + (f"; fails with {failed}." if failed else ".") + "\n"


def statuses() -> str:
    """List the statuses of failures, which mean the same everywhere."""
    return table(("status", "means"), ((f"`{status}`", text) for status, text in openapi.ERRORS.items()))


def type_of(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(type_of(one) for one in schema[several]))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_of(schema['additionalProperties'])} by name"
    kind = schema.get("type", "anything")
    if kind == "array" and isinstance(schema.get("items"), dict):
        return f"list of {type_of(schema['items'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def bounds(schema: dict[str, Any]) -> str:
    names = {
        "minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "minLength": "length ≥",
        "maxLength": "length ≤", "minItems": "items ≥", "maxItems": "items ≤",
    }  # fmt: skip
    several = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return ", ".join(
        dict.fromkeys(f"{sign} {one[name]}" for one in several for name, sign in names.items() if name in one)
    )


def json_reference() -> str:
    """Describe what each verb prints with `--json`, then the parts of that."""
    (failed, *printed), schemas = msgspec.json.schema_components([Failed, *PRINTED.values()], ref_template="#/{name}")
    rows = ((f"`{verb}`", type_of(shape)) for verb, shape in zip(PRINTED, printed, strict=True))
    parts = [f"Every verb, where it fails: {type_of(failed)}.\n", table(("verb", "prints"), rows) + "\n"]
    for name, schema in sorted(schemas.items()):
        needed = schema.get("required", ())
        fields = (
            (f"`{field}`", type_of(what), "" if field in needed else "not always")
            for field, what in schema["properties"].items()
        )
        text = inspect.cleandoc(schema.get("description", ""))
        parts.append(f"## {name}\n\n{text}\n\n{table(('field', 'is', 'there'), fields)}\n")
    return "\n".join(parts)


def command_reference() -> str:
    """Describe every verb of `sllm-node` with its arguments and flags."""
    return "\n".join(part for verb, command in sorted(verbs().items()) for part in describe_verb(verb, command))


def verbs() -> dict[str, click.Command]:
    """Give every verb, those of groups as `keys create`."""
    found: dict[str, click.Command] = {}

    def walk(prefix: str, group: Any) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(f"{prefix}{name} ", command)
            else:
                found[prefix + name] = command

    walk("", typer.main.get_command(commands))
    return found


def describe_verb(verb: str, command: click.Command) -> Iterator[str]:
    usage = " ".join(f"[{p.name}]" if not p.required else str(p.name) for p in arguments(command)).upper()
    yield f"## sllm-node {verb}\n"
    text = inspect.cleandoc(command.help or "")
    for paragraph in text.split("\n\n"):
        example = paragraph.removeprefix("Example: ")
        yield f"```bash\n{example}\n```\n" if example != paragraph else f"{paragraph}\n"
    yield f"    sllm-node {verb} {usage}\n".replace("  \n", "\n")
    rows = []
    for one in command.params:
        names = ", ".join(f"`{name}`" for name in one.opts + one.secondary_opts)
        names = names if one.param_type_name == "option" else f"`{str(one.name).upper()}`"
        default = one.default if isinstance(one.default, str | int | float) and one.default not in (False, "") else ""
        rows.append((names, default, getattr(one, "help", "") or ""))
    yield table(("argument or flag", "default", "is"), iter(rows)) + "\n"


def arguments(command: click.Command) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "argument"]


def error_table() -> str:
    """List every typed error: code, status by HTTP, and what it is a kind of."""

    def walk(kind: type[SllmError]) -> Iterator[tuple[object, ...]]:
        for child in kind.__subclasses__():
            yield f"`{child.code}`", status_of(child("")), f"`{child.__name__}`", f"`{kind.__name__}`"
            yield from walk(child)

    return table(("code", "HTTP", "class", "a kind of"), walk(SllmError))


def root_page(name: str) -> str:
    """Give a file from above the manual with its links turned to the manual's pages."""
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", (ROOT / name).read_text())
    text = re.sub(r'(src|srcset)="docs/', r'\1="', text)
    for file, page in PAGES_OF_ROOT.items():
        text = text.replace(f"]({file}", f"]({page}")
    # Folders and files that are no pages: their names are enough.
    return re.sub(r"\[([^\]]*)\]\((benchmarks|LICENSE)\)", r"\1", text)


class FromCode(SphinxDirective):
    """Put in what a function of this module writes."""

    has_content = False
    write: ClassVar[Callable[[], str]]

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(type(self).write(), allow_section_headings=True)


class Root(SphinxDirective):
    """Put in a file from above the manual."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(ROOT / self.arguments[0]))
        return self.parse_text_to_nodes(root_page(self.arguments[0]), allow_section_headings=True)


def unplaced(index: str) -> str:
    """Give a list of the pages that the index does not name; empty where it has all."""
    placed = set(re.findall(r"^[\w/]+$", index, re.MULTILINE))
    pages = (path.relative_to(DOCS).with_suffix("").as_posix() for path in sorted(DOCS.rglob("*.md")))
    left = [
        page for page in pages if page not in placed | {"index"} and not page.startswith(("reference/", "decisions/"))
    ]
    return "\n```{toctree}\n:caption: More\n:maxdepth: 1\n\n" + "\n".join(left) + "\n```\n" if left else ""


def relinked(_: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to files above the manual to their pages in it, and the index to every page."""
    if page == "index":
        source[0] += unplaced(source[0])
    for file, of_root in PAGES_OF_ROOT.items():
        source[0] = re.sub(rf"\]\((?:\.\./)+{re.escape(file)}", f"](/{of_root}", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of all this."""
    written = {
        "knobs": knob_table, "metrics": metric_table, "http": http_reference, "commands": command_reference,
        "errors": error_table, "printed": json_reference,
    }  # fmt: skip
    for name, write in written.items():
        app.add_directive(name, type(name, (FromCode,), {"write": staticmethod(write)}))
    app.add_directive("root", Root)
    app.connect("source-read", relinked)
    for language in PLAIN:
        app.add_lexer(language, TextLexer)
    return {"parallel_read_safe": True}
