"""Validates a manifest and reports every problem at once, each with what to write instead.

pydantic does not run rules across fields if a field is invalid. So an invalid field is recorded, then corrected as its
message proposes (or replaced by its default), and validation runs again; finally the rules across fields run on the
result, except those about a field that has already been reported.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from heterorl.spec.base import PATTERNS, RULES_LATER, Block, block_in
from heterorl.spec.run import API_VERSION, KIND, HeteroRLRun, RunSpec

Location = tuple[str | int, ...]

_MAX_REPAIRS = 8
# Placeholders for required fields that are missing or invalid, so that the rest can still be checked.
_PLACEHOLDERS: dict[str, Any] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": {"name": "unnamed"},
    "spec": {"samplers": [{"name": "unnamed"}]},
    "samplers": [{"name": "unnamed"}],
    "name": "unnamed",
    "label": "unnamed",
    "key": "unnamed",
    "mountPath": "/unnamed",
    "startSeconds": 0.0,
    "endSeconds": 1.0,
    "atSeconds": 0.0,
    "replicas": 0,
}
_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "invalid_key": "a string as key",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
    "too_short": ("min_length", "at least {}"),
    "too_long": ("max_length", "at most {}"),
    "string_too_short": ("min_length", "at least {} characters"),
    "string_too_long": ("max_length", "at most {} characters"),
}


@dataclass(frozen=True)
class SpecProblem:
    """An error in the manifest: where, and what to write instead."""

    location: Location
    message: str


def check(manifest: Any) -> tuple[HeteroRLRun | None, list[SpecProblem]]:
    """The run that a manifest describes, and every problem; the run is None if there are any."""
    problems: dict[Location, SpecProblem] = {}
    suspects: dict[Location, set[str]] = {}
    repaired = copy.deepcopy(manifest)
    run = None
    for _ in range(_MAX_REPAIRS):
        try:
            run = HeteroRLRun.model_validate(repaired, by_alias=True, by_name=False, context=RULES_LATER)
            break
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                location = tuple(key for key in detail["loc"] if key != "[key]")
                message, better = _explain(location, detail)
                problems.setdefault(location, SpecProblem(location, message))
                suspects.setdefault(location, set()).update({str(key) for key in (*location[-1:], better) if key})
                if isinstance(repaired, dict):
                    _repair(repaired, location, better, rename=detail["type"] == "extra_forbidden")
    if run is not None:
        for block, problem in _broken_rules(run, manifest):
            words = set(re.findall(r"\w+", f"{problem.location[-1]} {problem.message}"))
            known = (names for place, names in suspects.items() if place[: len(block)] == block)
            if not any(words & names for names in known):
                problems.setdefault(problem.location, problem)
    return (None if problems else run), list(problems.values())


def _broken_rules(block: Block, manifest: Any, location: Location = ()) -> Iterator[tuple[Location, SpecProblem]]:
    """Every rule broken in the block at that location and in those below it."""
    for path, message in block.broken_rules():
        yield location, SpecProblem(locate(manifest, [*map(str, location), *path.split(".")]), message)
    for name, info in type(block).model_fields.items():
        value, key = getattr(block, name), info.alias or name
        if isinstance(value, Block):
            yield from _broken_rules(value, manifest, (*location, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Block):
                    yield from _broken_rules(item, manifest, (*location, key, index))


# ── places in the manifest ───────────────────────────────────────────────────────────────────────────────────────────
def locate(manifest: Any, path: Iterable[str]) -> Location:
    """A dotted path as a location: in lists, an item's name, label or number becomes its index."""
    location: Location = ()
    for key in path:
        index = find_item(manifest, key) if isinstance(manifest, list) else None
        location = (*location, key if index is None else index)
        try:
            manifest = manifest[location[-1]]
        except (KeyError, IndexError, TypeError):
            manifest = None
    return location


def find_item(items: list[Any], key: str) -> int | None:
    """The index of the item with that name, label or number."""
    names = [_name(item) for item in items]
    if key in names:
        return names.index(key)
    return int(key) if key.isdecimal() and int(key) < len(items) else None


def dotted(location: Location, manifest: Any) -> str:
    """A location as `--set` writes it: list items by name where they have one."""
    parts = []
    for key in location:
        try:
            manifest = manifest[key]
        except (KeyError, IndexError, TypeError):
            manifest = None
        parts.append(_name(manifest) or str(key) if isinstance(key, int) else key)
    return ".".join(parts) or "manifest"


def _name(item: Any) -> str | None:
    name = item.get("name", item.get("label")) if isinstance(item, dict) else None
    return name if isinstance(name, str) else None


def _fields(block: type[Block]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in block.model_fields.items()}


def _block_at(location: Location) -> type[Block]:
    block: type[Block] = HeteroRLRun
    for key in location:
        if isinstance(key, str) and (info := _fields(block).get(key)):
            block = block_in(info.annotation) or block
    return block


def _repair(manifest: dict[str, Any], location: Location, better: str | None, *, rename: bool) -> None:
    """Correct an invalid field in place: as proposed, else by a placeholder if it is required, else by its default."""
    *around, key = next(location[: i + 1] for i in reversed(range(len(location))) if isinstance(location[i], str))
    parent: Any = manifest
    for step in around:
        parent = parent[step]
    info = _fields(_block_at(tuple(around))).get(str(key))
    broken = parent.pop(key, None)
    if rename and better:
        parent.setdefault(better, broken)
    elif better:
        parent[key] = better
    elif info and info.is_required():
        parent[key] = copy.deepcopy(_PLACEHOLDERS[str(key)])


# ── sentences ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _explain(location: Location, error: Any) -> tuple[str, str | None]:
    """One of pydantic's errors as a sentence, and the name or value that it proposes."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is required but missing", None
    if kind == "extra_forbidden":
        return _explain_unknown(location)
    if kind == "literal_error":
        return _explain_choice(value, re.findall(r"'([^']*)'", context["expected"]))
    if kind in _TYPES:
        return _explain_type(kind, value), None
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        found = f"length {len(value)}" if kind in ("too_short", "too_long") else _found(value)
        return f"found {found}, expected {words.format(format(context[name], '.12g'))}", None
    if kind == "string_pattern_mismatch":
        return f"found {_found(value)}, expected {PATTERNS[context['pattern']]}", None
    return f"found {_found(value)}: {error['msg']}", None


def _explain_unknown(location: Location) -> tuple[str, str | None]:
    key, known = str(location[-1]), _fields(_block_at(location[:-1]))
    if near := nearest(key, known):
        return f"unknown field; did you mean {near}?", near
    name = to_camel(key)
    places = list(_places(name, RunSpec, "spec"))
    if 0 < len(places) <= 3:
        return f"unknown field; did you mean {' or '.join(f'{place}.{name}' for place in places)}?", None
    return f"unknown field; valid fields are {', '.join(sorted(known))}", None


def _places(key: str, block: type[Block], path: str) -> Iterator[str]:
    for name, info in _fields(block).items():
        if name == key:
            yield path
        if inner := block_in(info.annotation):
            yield from _places(key, inner, f"{path}.{name}")


def _explain_choice(value: Any, choices: list[str]) -> tuple[str, str | None]:
    if len(choices) == 1:
        return f"found {_found(value)}, expected {choices[0]}", choices[0]
    near = nearest(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean {near}?" if near else ""
    return f"found {_found(value)}, expected one of {', '.join(choices)}{hint}", near


def _explain_type(kind: str, value: Any) -> str:
    message = f"found {_found(value)}, expected {_TYPES[kind]}"
    if value is None:
        return f"{message}; set a value or remove the line"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f'{message}; put it in quotes: "{_found(value)}"'
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+", value):
        return f"{message}; remove the quotes: {value}"
    if kind == "bool_type" and str(value).lower() in ("yes", "on", "1", "no", "off", "0"):
        return f"{message}; use {'true' if str(value).lower() in ('yes', 'on', '1') else 'false'}"
    if kind == "list_type":
        return f"{message}; start each item with '- '"
    return message


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar known word, ignoring case and separators; None if none is similar."""
    folded = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in known}
    matches = difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", word.lower()), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def _found(value: Any) -> str:
    """What was found, shortened to fit on a line."""
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
