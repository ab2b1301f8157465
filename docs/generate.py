"""Writes the pages that follow from the code: job-file.md from the JSON Schema, metrics.md from the registry, events.md
from the classes of events, command-line.md from the commands.

    python docs/generate.py      # after a change of orchestrator/spec, metrics, protocol/events or cli

`tests/unit/docs/test_generated.py` fails while a page is older than the code.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from orchestrator.cli.main import app
from orchestrator.cli.terminal.answers import (
    AdoptedRun,
    ChangedPriority,
    EvaluatedModel,
    ExportedModel,
    GeneratedText,
    KilledWorker,
    ListedCheckpoint,
    NamedCheckpoint,
    NamedRun,
    NumberedExperts,
    PlacedExperts,
    PreparedStore,
    RemovedRun,
    ReplayedSteps,
    RequestedState,
    TeacherLogits,
)
from orchestrator.cli.terminal.exit_codes import EXIT_CODES
from orchestrator.cluster.doctor import Finding
from orchestrator.cluster.local import ClusterRecord
from orchestrator.metrics.metric import Metric
from orchestrator.metrics.registry import DECLARED
from orchestrator.policy.estimate.job_plan import JobPlan
from orchestrator.policy.report.report import RunReport
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.reading import MODULES, event_types
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_logs import LogLine
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.spec.job import JobSpec

DIRECTORY = Path(__file__).parent
Schema = Mapping[str, Any]

JOB_FILE_HEAD = """\
# The job file

*Written by `python docs/generate.py` from `orchestrator job schema`; change the code, not this page.*

A job file is strict YAML. Only `schema` and `name` are required:

```yaml
schema: v1
name: my-run
```

`orchestrator job validate JOB.yaml` reports every mistake at once, with line, column, key and rule, and exits with 2.
Refused are unknown keys, duplicate keys, anchors, aliases, tags, a second document, the words yes, no, on and off
without quotes, and files over 1 MiB. `orchestrator job schema` prints the JSON Schema, which editors can check against.

`--set KEY=VALUE` of `run` and `submit` replaces the value of one key, as in `--set train.max_steps=200`; below a short
form, such as `workers: 2`, it adds to what that means. VALUE is YAML, or the text itself where a key's value is text.
"""

METRICS_HEAD = """\
# Metrics

*Written by `python docs/generate.py` from `orchestrator/metrics/registry.py`; change the code, not this page.*

A run has one MLflow run for its whole life, and one process that writes to it. Each metric has one value per step;
nothing is published before its step is committed, or finished where no second worker holds it
([operating.md](operating.md#protection-snapshots-in-memory)). A gauge's values stand alone, a counter only grows within
a run, an amount is that of one step, so those of several add up.

Prometheus has the newest value of each, under the name in the third column, with the label `run`; of an amount it has
the sum since the start of the run's controller ([operating.md](operating.md#prometheus-and-grafana)).
"""

EVENTS_HEAD = """\
# Events

*Written by `python docs/generate.py` from `orchestrator/protocol/events`; change the code, not this page.*

What happens to a run is in its journal. `orchestrator events RUN` prints it, `-o json` as JSON objects, and
`OrchestratorClient.events` yields these objects. Each has `kind`, `seq` (counts all events of the run), `term` (of the
controller that wrote it), `time` (`time.time()` seconds), and the fields of its kind. Fields marked with ? may be null.
"""

COMMAND_LINE_HEAD = """\
# The command line

*Written by `python docs/generate.py` from `orchestrator/cli`; change the code, not this page.*

Every verb shows its arguments and options with `--help`. Data goes to stdout, messages and errors to stderr.
Ctrl-C, SIGTERM and a closed terminal end every verb and what it has started, except that `run` leaves a run that it has
submitted, and `demo` one in a cluster that was up before. [operating.md](operating.md) has the manual.
"""

JSON_HEAD = """\
## `-o json`

What a verb prints: one object, a list of them, or lines of one object each. Types are listed below, with the schema of
each; `time` and keys that end in `_time` are in `time.time()` seconds, `bytes` in bytes.
"""

LIVE_HEAD = """\
## Of the moment

These belong to no step. Only Prometheus has them, from the beginning of a run's controller to its end.
"""


def job_file() -> str:
    """Every key of a job file: a table of the top level, then one per section in the order of the file."""
    schema = JobSpec.model_json_schema(by_alias=True)
    parts = [JOB_FILE_HEAD, _key_table(schema)]
    for path, section in _sections(schema, schema["$defs"], ""):
        parts += [f"## {path}\n", f"{section['description']}\n", _key_table(section)]
    return "\n".join(parts)


def metrics() -> str:
    """Every declared metric: those of steps, then those of the moment."""
    of_steps, live = ([m for m in DECLARED if m.live is wanted] for wanted in (False, True))
    return "\n".join([METRICS_HEAD, _metric_table(of_steps), LIVE_HEAD, _metric_table(live)])


def _metric_table(declared: Sequence[Metric]) -> str:
    rows = [(f"`{m.name}`", m.unit, _prometheus_name(m), m.kind.value, m.meaning) for m in declared]
    return _table(("metric", "unit", "in Prometheus", "kind", "meaning"), rows)


def _prometheus_name(declared: Metric) -> str:
    return f"`ray_{declared.prometheus}`" + (f" {{{declared.label}}}" if declared.label else "")


def events() -> str:
    """Every kind of event that users see, by the module of its class."""
    parts = [EVENTS_HEAD]
    for module in MODULES:
        kinds = [cls for cls in event_types() if cls.__module__ == module.__name__ and not cls.is_internal]
        rows = [(f"`{cls.kind}`", _fields(cls), _meaning(cls)) for cls in kinds]
        parts += [f"## {str(module.__doc__).strip().removeprefix('Events of ').rstrip('.').capitalize()}\n"]
        parts += [_table(("kind", "fields", "meaning"), rows)]
    return "\n".join(parts)


def _fields(cls: type[Event]) -> str:
    optional = {name for name, hint in get_type_hints(cls).items() if type(None) in get_args(hint)}
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return ", ".join(f"`{name}`" + "?" * (name in optional) for name in names)


def _meaning(cls: type[Event]) -> str:
    """The first paragraph of the docstring."""
    return " ".join(str(cls.__doc__).split("\n\n")[0].split())


@dataclasses.dataclass(frozen=True)
class JsonOutput:
    """What a verb prints with `-o json`. Every verb with that option has one in OUTPUTS.

    Args:
        type: of the value, or of each one of several.
        form: how they are printed: one value, a list, or lines of one value each.
        also: form under other options.
    """

    type: Any
    form: str = "object"
    also: str = ""


OUTPUTS = {
    "demo": JsonOutput(RunStatus),
    "doctor": JsonOutput(Finding, "list"),
    "run": JsonOutput(RunStatus, "object", "-d: a `NamedRun`"),
    "submit": JsonOutput(NamedRun),
    "ls": JsonOutput(RunStatus, "list", "--watch: a line per change"),
    "status": JsonOutput(RunStatus, "object", "--watch: a line per change"),
    "wait": JsonOutput(RunStatus),
    "logs": JsonOutput(LogLine, "lines"),
    "events": JsonOutput(dict, "list", "-f: a line per event"),
    "report": JsonOutput(RunReport, "object", "of two runs a list"),
    "scale": JsonOutput(RequestedState),
    "pause": JsonOutput(RequestedState),
    "resume": JsonOutput(NamedRun),
    "stop": JsonOutput(RequestedState),
    "rm": JsonOutput(RemovedRun),
    "set": JsonOutput(ChangedPriority),
    "job validate": JsonOutput(JobSpec),
    "job plan": JsonOutput(JobPlan),
    "checkpoint ls": JsonOutput(ListedCheckpoint, "list"),
    "checkpoint now": JsonOutput(NamedCheckpoint),
    "checkpoint verify": JsonOutput(NamedCheckpoint),
    "checkpoint adopt": JsonOutput(AdoptedRun),
    "checkpoint rm": JsonOutput(NamedCheckpoint),
    "experts rebalance": JsonOutput(PlacedExperts),
    "experts set": JsonOutput(NumberedExperts),
    "model export": JsonOutput(ExportedModel),
    "model eval": JsonOutput(EvaluatedModel),
    "model generate": JsonOutput(GeneratedText),
    "data prepare": JsonOutput(PreparedStore),
    "data teach": JsonOutput(TeacherLogits),
    "check data": JsonOutput(AuditResult),
    "check replay": JsonOutput(ReplayedSteps),
    "fault kill-worker": JsonOutput(KilledWorker),
    "curriculum set": JsonOutput(RequestedState),
    "cluster up": JsonOutput(ClusterRecord),
    "cluster status": JsonOutput(ClusterRecord),
}


def command_line() -> str:
    """Every verb by its panel in --help, exit codes, and what `-o json` prints."""
    panels: dict[str, list[tuple[str, TyperCommand]]] = {}
    for panel, verb, command in _verbs():
        panels.setdefault(panel, []).append((verb, command))
    parts = [COMMAND_LINE_HEAD]
    for panel, found in panels.items():
        rows = [(f"`{verb}{_arguments(command)}`", _options(command), _help(command)) for verb, command in found]
        parts += [f"## {panel}\n", _table(("verb", "options", "meaning"), rows)]
    parts += ["## Exit codes\n", _table(("code", "meaning"), [(str(code), text) for code, text in EXIT_CODES.items()])]
    rows = [(f"`{verb}`", _form(output), output.also) for verb, output in OUTPUTS.items()]
    parts += [JSON_HEAD, _table(("verb", "prints", "otherwise"), rows), *_json_types()]
    return "\n".join(parts)


def _verbs() -> Iterator[tuple[str, str, TyperCommand]]:
    """(panel, verb, command), in the order of --help."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        inner = command.commands.items() if isinstance(command, TyperGroup) else [("", command)]
        for verb, found in inner:
            if isinstance(found, TyperCommand) and not found.hidden:
                yield str(getattr(command, "rich_help_panel", None)), f"{name} {verb}".strip(), found


def _arguments(command: TyperCommand) -> str:
    names = [str(parameter.metavar) for parameter in command.params if parameter.param_type_name == "argument"]
    return "".join(f" {name}" for name in names)


def _options(command: TyperCommand) -> str:
    found = [parameter for parameter in command.params if isinstance(parameter, TyperOption)]
    return " ".join(f"`{option.opts[0]}`" for option in found)


def _help(command: TyperCommand) -> str:
    return " ".join(str(command.help).split("\n\n")[0].split())


def _form(output: JsonOutput) -> str:
    name = "JSON object" if output.type is dict else output.type.__name__
    return {"object": f"`{name}`", "list": f"list of `{name}`", "lines": f"lines of `{name}`"}[output.form]


def _json_types() -> Iterator[str]:
    """A table of the keys of each type that commands print, and of the types that these contain."""
    defs: dict[str, Schema] = {}
    for output in OUTPUTS.values():
        if output.type not in (dict, JobSpec):  # job-file.md has the keys of a job, events.md those of events
            schema = TypeAdapter(output.type).json_schema(mode="serialization")
            defs |= schema.get("$defs", {})
            defs[schema["title"]] = schema
    for name, schema in sorted(defs.items()):
        if "enum" in schema:
            yield f"### {name}\n\n{_first_paragraph(schema)}\n{_json_type(schema)}\n"
        elif "properties" in schema:
            rows = [(f"`{key}`", _json_type(field)) for key, field in schema["properties"].items()]
            yield f"### {name}\n\n{_first_paragraph(schema)}"
            yield _table(("key", "value"), rows)


def _first_paragraph(schema: Schema) -> str:
    text = " ".join(str(schema.get("description", "")).split("\n\n")[0].split())
    return text + "\n" if text else ""


def _json_type(field: Schema) -> str:
    if "anyOf" in field:
        return " or ".join(_json_type(form) for form in field["anyOf"])
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    if "enum" in field:
        return "One of " + ", ".join(f"`{value}`" for value in field["enum"]) + "."
    kind = str(field.get("type", "any value"))
    if kind == "array":
        items = field.get("prefixItems") or [field.get("items", {})]
        return "list of " + ", ".join(_json_type(item) for item in items)
    inner = field.get("additionalProperties")
    return f"object of {_json_type(inner)}" if isinstance(inner, dict) and inner else kind


PAGES: Mapping[str, Callable[[], str]] = {
    "job-file.md": job_file,
    "metrics.md": metrics,
    "events.md": events,
    "command-line.md": command_line,
}


def _sections(schema: Schema, defs: Mapping[str, Schema], path: str) -> Iterator[tuple[str, Schema]]:
    """The sections below `schema` with their dotted paths; a list's path ends in []."""
    for key, field in schema["properties"].items():
        is_list = "$ref" in field.get("items", {})
        ref = next((form["$ref"] for form in (*_forms(field), field.get("items", {})) if "$ref" in form), None)
        if ref is not None:
            inner = defs[ref.rpartition("/")[2]]
            here = (f"{path}.{key}" if path else key) + ("[]" if is_list else "")
            yield here, inner
            yield from _sections(inner, defs, here)


def _key_table(section: Schema) -> str:
    required = section.get("required", ())
    rows = []
    for key, field in section["properties"].items():
        default = "required" if key in required else _default(field)
        rows.append((f"`{key}`", " or ".join(_values(form) for form in _forms(field)), default, field["description"]))
    return _table(("key", "values", "default", "meaning"), rows)


def _forms(field: Schema) -> Sequence[Schema]:
    forms: Sequence[Schema] = field.get("anyOf", (field,))
    return forms


def _default(field: Schema) -> str:
    """Empty where the default follows from other keys, as the meaning then says; sections have their own tables."""
    is_section = any("$ref" in form for form in _forms(field))
    return "" if is_section or "default" not in field else f"`{json.dumps(field['default'])}`"


def _values(form: Schema) -> str:
    """What a key may hold, in a few words."""
    if "$ref" in form:
        return "mapping"
    if "const" in form:
        return f"`{form['const']}`"
    if "enum" in form:
        return ", ".join(f"`{value}`" for value in form["enum"])
    if form["type"] == "array":
        inner = form["prefixItems"][0] if "prefixItems" in form else form["items"]
        least = form.get("minItems", 0)
        count = f"{least} of " if least and least == form.get("maxItems") else "list of "
        return count + _values(inner)
    if form["type"] == "object":
        return "mapping of texts" if form["additionalProperties"] == {"type": "string"} else "mapping"
    names = {"integer": "whole number", "string": "text", "boolean": "true, false"}
    return " ".join([names.get(str(form["type"]), str(form["type"])), *_bounds(form)])


def _bounds(form: Schema) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_short(form[name])}" for name, sign in signs.items() if name in form]
    if found:
        yield ", ".join(found)


def _short(number: float) -> str:
    return "2^63" if number == 2**63 else f"{number:g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DIRECTORY / name).write_text(page(), encoding="utf-8")
