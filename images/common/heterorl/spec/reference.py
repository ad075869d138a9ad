"""`docs/spec.md`: every field of the manifest, made from `heterorl.spec.run`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from heterorl.spec.base import PATTERNS, Block, block_in
from heterorl.spec.crd import schema_of
from heterorl.spec.mutability import IMMUTABLE, LIVE
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus

_INTRO = """# The manifest

<!-- Made by `heterorl docs` from heterorl/spec/run.py; do not edit. -->

A run is one YAML file. `heterorl validate FILE` checks it; `heterorl run FILE --set algorithm.loss.type=grpo` changes a
field for one run; paths are relative to `spec`, and list items are addressed by name (`samplers.far.replicas=4`). Every
field that is not marked **required** is optional. Relative paths start at the manifest's folder or, on Kubernetes, at
the root of the volume.

```yaml
apiVersion: heterorl.dev/v1alpha1
kind: HeteroRLRun
metadata:
  name: my-run
spec:
  samplers:
  - name: near
```
"""

_CHANGES = """## Changes to a running run

On Kubernetes the API server rejects changes that a run cannot follow.

- Never: {immutable}.
- At any time: {live}; sampler pools may be added and removed. `learner.steps` can only be
  increased. Kubernetes expands a claim and never shrinks one: a lower `exchange.volume.size` only takes back an
  expansion that was refused.
- All other fields: only while `suspend` is true.
- After the run has ended: only `ttlSecondsAfterFinished`. To resume a failed run in place, increase
  `failurePolicy.resumes`; set `suspend: true` in the same edit if other fields have to change first. Or create a new
  run with `resume: true` on the same claim.

Running pods follow an edit without a restart, about a minute later, when the kubelet has updated their file: the
learner trains the added steps with the learning rate schedule of the new total, and a sampler continues with its new
delay without repeating a draw. A slot keeps its shard of the data until its sampler restarts. `heterorl run --resume`
accepts the same changes.
"""


def spec_markdown() -> str:
    """The text of `docs/spec.md`."""
    changes = _CHANGES.format(immutable=_listed(IMMUTABLE), live=_listed(LIVE))
    parts = [_INTRO, *_sections(HeteroRLRun), changes, "## Status\n\nWritten by the operator.\n", *_sections(RunStatus)]
    return "\n".join(parts)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sections(root: type[Block]) -> Iterator[str]:
    """One section for each block reachable from the root, in the order of the manifest."""
    seen: set[type[Block]] = set()

    def visit(block: type[Block]) -> Iterator[str]:
        if block in seen:
            return
        seen.add(block)
        yield _section(block)
        for info in block.model_fields.values():
            if inner := block_in(info.annotation):
                yield from visit(inner)

    yield from visit(root)


def _section(block: type[Block]) -> str:
    properties = schema_of(block)["properties"]
    lines = [f"### {block.__name__}", "", " ".join((block.__doc__ or "").split()), ""]
    lines += ["| field | type | default | bounds | description |", "|---|---|---|---|---|"]
    for name, info in block.model_fields.items():
        key = info.alias or name
        cells = [f"`{key}`", _type(info, properties[key]), _default(info), _bounds(properties[key])]
        lines.append(" | ".join(["", *cells, _sentence(info.description or ""), ""]).strip())
    return "\n".join([*lines, ""])


def _type(info: FieldInfo, schema: dict[str, Any]) -> str:
    if inner := block_in(info.annotation):
        link = f"[{inner.__name__}](#{inner.__name__.lower()})"
        return f"list of {link}" if schema["type"] == "array" else link
    return _plain_type(schema)


def _plain_type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" if value else '`""`' for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_plain_type(schema['items'])}"
    if schema["type"] == "object":
        return "map of string" if "additionalProperties" in schema else "object"
    return str(schema["type"])


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is None or isinstance(value, Block) or value in ([], {}):
        return ""
    if isinstance(value, list) and isinstance(value[0], Block):
        return "one item of defaults"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _bounds(schema: dict[str, Any]) -> str:
    parts = []
    if "minimum" in schema:
        parts.append(f"{'>' if schema.get('exclusiveMinimum') else '≥'} {schema['minimum']:.12g}")
    if "maximum" in schema:
        parts.append(f"{'<' if schema.get('exclusiveMaximum') else '≤'} {schema['maximum']:.12g}")
    if "multipleOf" in schema:
        parts.append(f"multiple of {schema['multipleOf']}")
    if "minItems" in schema:
        parts.append(f"≥ {schema['minItems']} items")
    for key, unit in (("maxItems", "items"), ("maxProperties", "entries"), ("maxLength", "characters")):
        if key in schema:
            parts.append(f"≤ {schema[key]} {unit}")
    if "pattern" in schema:
        parts.append(PATTERNS[schema["pattern"]])
    return ", ".join(parts)


def _sentence(text: str) -> str:
    """A description for a table cell; a vertical bar would end the cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
