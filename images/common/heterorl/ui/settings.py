"""A run's manifest as rows: every field with its value, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from heterorl.spec.base import Block, block_in
from heterorl.spec.run import RunSpec

Row = dict[str, Any]


def settings_of(spec: RunSpec) -> list[Row]:
    """{path, value, default, differs, meaning} of every field; items of lists are called by their name."""
    return list(_rows(spec, None, ""))


def _rows(block: Block, usual: Any, path: str) -> Iterator[Row]:
    """`usual`: the block that stands there by default, if there is one of the same kind."""
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        default = getattr(usual, name) if type(usual) is type(block) else field.get_default(call_default_factory=True)
        place = f"{path}.{field.alias}" if path else str(field.alias)
        if isinstance(value, Block):
            yield from _rows(value, default, place)
        elif isinstance(value, list) and value and all(isinstance(item, Block) for item in value):
            for number, item in enumerate(value):
                yield from _rows(item, None, f"{place}.{_name_of(item, number)}")
        else:
            yield _row(place, value, default, field.description, is_block=block_in(field.annotation) is not None)


def _row(path: str, value: Any, default: Any, meaning: str | None, *, is_block: bool) -> Row:
    required = default is PydanticUndefined
    shown = None if required or is_block else _plain(default)
    return {
        "path": path,
        "value": _plain(value),
        "default": shown,
        "required": required,
        "differs": required or _plain(value) != _plain(default),
        "meaning": meaning or "",
    }


def _name_of(item: Block, number: int) -> str:
    return str(getattr(item, "name", None) or getattr(item, "label", None) or number)


def _plain(value: Any) -> Any:
    if isinstance(value, Block):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
