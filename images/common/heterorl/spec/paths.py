"""Which fields of a resolved spec name something on a disk: one list for the runner, the operator and `render`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PathField:
    """One path in the tree of a spec, which it can be replaced in."""

    field: str
    """Its own path, such as `data.train.path`."""
    holder: Any
    """The mapping or list that holds it."""
    key: str | int

    @property
    def value(self) -> str:
        """The path as it stands in the tree."""
        return str(self.holder[self.key])

    def set(self, value: object) -> None:
        """Put another path in its place."""
        self.holder[self.key] = str(value)


def input_paths(spec: dict[str, Any]) -> Iterator[PathField]:
    """The model's and the datasets' paths that are given in a resolved spec."""
    data = spec["data"]
    blocks = [("model", spec["model"]), ("data.train", data["train"])]
    blocks += [(f"data.train.mix.{dataset['label']}", dataset) for dataset in data["train"]["mix"]]
    blocks += [(f"data.evals.{dataset['label']}", dataset) for dataset in data["evals"]]
    for name, block in blocks:
        if block["path"]:
            yield PathField(f"{name}.path", block, "path")
        for index in range(len(block.get("paths", ()))):
            yield PathField(f"{name}.paths.{index}", block["paths"], index)
