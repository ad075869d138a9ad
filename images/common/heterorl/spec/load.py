"""Reads a manifest: YAML with line numbers, then `--set` overrides, then every check at once (`validation`).

Traces of delays, which a manifest may leave in CSV files, are written out by `inline_traces`.
"""

from __future__ import annotations

import copy
import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from heterorl.errors import DataError, SpecError
from heterorl.spec.base import Block
from heterorl.spec.run import DelaySpec, DelayTraceSpec, HeteroRLRun
from heterorl.spec.validation import Location, SpecProblem, check, dotted, find_item

MAX_TRACE_VALUES = 4096

# What the API server adds to an object, dropped here so that `kubectl get hrl NAME -o yaml` can be read back.
_SERVER_METADATA = {
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
}


def load_run(path: Path | str, sets: Sequence[str] = ()) -> HeteroRLRun:
    """The run of a manifest, with overrides such as `algorithm.loss.type=gepo` or `samplers.far.replicas=2`.

    The path of an override is relative to `spec` (`name=` is the name of the run); its value is YAML. Raises SpecError
    with every problem: the line, the path of the field, what was found and what to write instead.
    """
    written, node = _read(path)
    manifest = copy.deepcopy(written)
    changed = [_apply(manifest, change) for change in sets]
    run, problems = check(manifest)
    if run is None:
        in_file = [
            problem
            for problem in (check(written)[1] if sets else problems)
            if not any(problem.location[: len(location)] == location for location in changed)
        ]
        raise SpecError(str(path), _described(problems, manifest, node, in_file))
    return run


def warnings_for(run: HeteroRLRun) -> list[str]:
    """Warnings about settings that are valid but probably unintended."""
    return [*_biased_sampling(run), *_other_losses(run)]


def _biased_sampling(run: HeteroRLRun) -> list[str]:
    generation = run.spec.generation
    neutral = {"topP": (generation.top_p, 1), "topK": (generation.top_k, 0), "minP": (generation.min_p, 0)}
    neutral["repetitionPenalty"] = (generation.repetition_penalty, 1)
    if set_ := [f"{name} {value:g}" for name, (value, off) in neutral.items() if value != off]:
        return [
            f"spec.generation: {', '.join(set_)} change the sampling distribution, so importance ratios are biased; "
            f"{', '.join(f'{name}: {off}' for name, (_, off) in neutral.items())} avoid that"
        ]
    return []


def _other_losses(run: HeteroRLRun) -> list[str]:
    """Parameters of losses that are not trained with, where they are not the default (a run.json names them all)."""
    loss = run.spec.algorithm.loss
    return [
        f"spec.algorithm.loss.{name}.{field} is set, but loss.type is {loss.type}"
        for name, block in loss
        if isinstance(block, Block) and name != loss.type
        for field, value in block.model_dump(by_alias=True).items()
        if value != type(block)().model_dump(by_alias=True)[field]
    ]


# ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: 1e-6 is a number; yes, no, on, off, dates and 1:30 are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return (loader.construct_document(node) if node else None), node
    finally:
        loader.dispose()


def _read(path: Path | str) -> tuple[dict[str, Any], yaml.Node]:
    """The manifest's contents and its YAML tree, which knows the lines."""
    try:
        manifest, node = _parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(str(path), ["no such file"]) from None
    except OSError as error:
        raise SpecError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SpecError(str(path), ["is not UTF-8 text; a manifest is a YAML file"]) from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SpecError(str(path), [f"{line}not valid YAML: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise SpecError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(manifest, dict) or node is None:
        raise SpecError(str(path), ["not a HeteroRLRun; a manifest starts with apiVersion: heterorl.dev/v1alpha1"])
    if repeated := list(_repeated_keys(node)):
        raise SpecError(str(path), repeated)
    manifest.pop("status", None)
    if isinstance(metadata := manifest.get("metadata"), dict):
        manifest["metadata"] = {key: value for key, value in metadata.items() if key not in _SERVER_METADATA}
    return manifest, node


def _repeated_keys(node: yaml.Node, path: str = "") -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                yield f"line {line}: {path}{key.value}: duplicate key, first on line {lines[key.value]}; keep one"
            lines.setdefault(key.value, line)
            yield from _repeated_keys(value, f"{path}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}{index}.")


def _line(node: yaml.Node, location: Location) -> int:
    """The line of that field, or of the innermost enclosing block that is in the file."""
    line = node.start_mark.line + 1
    for key in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            start, node = node.value[key], node.value[key]
        elif isinstance(node, yaml.MappingNode) and (pairs := [pair for pair in node.value if pair[0].value == key]):
            start, node = pairs[0]
        else:
            break
        line = start.start_mark.line + 1
    return line


def _described(
    problems: list[SpecProblem], manifest: dict[str, Any], node: yaml.Node, in_file: list[SpecProblem]
) -> list[str]:
    """Problems as lines of text, in the order of the file; those caused by --set come last."""
    placed = []
    for problem in problems:
        by_set = problem not in in_file
        line = 0 if by_set else _line(node, problem.location)
        where = "--set" if by_set else f"line {line}"
        placed.append((by_set, line, f"{where}: {dotted(problem.location, manifest)}: {problem.message}"))
    return [text for _, _, text in sorted(placed)]


# ── --set ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _apply(manifest: dict[str, Any], change: str) -> Location:
    """Write one `path=value` into the manifest; returns where."""
    path, equals, text = change.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise SpecError(f"--set {change}", ["expected path=value, such as algorithm.loss.type=gepo"])
    if parts == ["name"]:
        parts = ["metadata", "name"]
    if parts[0] not in ("metadata", "spec"):
        parts = ["spec", *parts]
    try:
        value = _parse(text)[0]
    except yaml.YAMLError:
        raise SpecError(f"--set {change}", [f"the value {text!r} is not valid YAML; put it in quotes"]) from None
    target: Any = manifest
    location: Location = ()
    for position, part in enumerate(parts):
        where = ".".join(parts[:position])
        if not isinstance(target, dict | list):
            raise SpecError(f"--set {change}", [f"{where} is {target!r}, so it has no {part}; correct the path"])
        key: Any = find_item(target, part) if isinstance(target, list) else part
        if key is None:
            raise SpecError(f"--set {change}", [f"{where} has no item {part}; use an item's name, or its index from 0"])
        location = (*location, key)
        if position == len(parts) - 1:
            target[key] = value
        elif isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
        target = target[key]
    return location


# ── traces ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def inline_trace(delay: DelaySpec, folder: Path) -> DelaySpec:
    """The same delay with a trace's CSV column written out as values, so that the spec stands on its own.

    `folder` is where the manifest lies. Raises DataError when file, column or numbers are not what the spec says.
    """
    if delay.distribution != "trace" or delay.trace.path is None:
        return delay
    values = _read_column(folder / delay.trace.path, str(delay.trace.column))
    return delay.model_copy(update={"trace": DelayTraceSpec(values=values)})


def inline_traces(run: HeteroRLRun, folder: Path) -> HeteroRLRun:
    """The same run with the traces of all its sampler pools written out; raises as `inline_trace`."""
    samplers = [pool.model_copy(update={"delay": inline_trace(pool.delay, folder)}) for pool in run.spec.samplers]
    return run.model_copy(update={"spec": run.spec.model_copy(update={"samplers": samplers})})


def _read_column(path: Path, column: str) -> list[float]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if column not in columns:
                raise DataError(f"{path}: no column {column!r}; set delay.trace.column to one of: {', '.join(columns)}")
            cells = [(rows.line_num, row[column]) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read the delay trace ({error}); set delay.trace.path to a CSV file") from error
    # Logs of several runs leave cells empty where a run had ended or wrote nothing.
    values = [_delay_value(path, line, cell) for line, cell in cells if cell and cell.strip()]
    if not 1 <= len(values) <= MAX_TRACE_VALUES:
        raise DataError(f"{path}: column {column!r} holds {len(values)} numbers; a trace has 1 to {MAX_TRACE_VALUES}")
    return values


def _delay_value(path: Path, line: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise DataError(f"{path}, line {line}: {cell!r} is not a valid delay; expected a number of at least 0")
    return value
