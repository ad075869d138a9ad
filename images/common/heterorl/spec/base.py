"""What every block of the manifest is made of: bounded types, strictness, and rules across fields."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, model_validator
from pydantic.alias_generators import to_camel

RUN_NAME = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
POOL_NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$"
FUNCTION = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+$"
BOARD_PROJECT = r"^[^/\\#?%:]+$"
BOARD_ID = r"^[A-Za-z0-9_.-]+$"
PATTERNS = {
    RUN_NAME: "lower-case letters, digits and '-', starting with a letter and not ending with '-'",
    POOL_NAME: "lower-case letters and digits, separated by single '-'",
    QUANTITY: "a quantity such as 100Gi",
    FUNCTION: "the import path of a function, such as package.module.function",
    BOARD_PROJECT: "a name without any of / \\ # ? % :",
    BOARD_ID: "letters, digits, '_', '.' and '-'",
}
"""What a pattern requires, in words."""

RULES_LATER = "rules later"
"""Validation context: leave the rules across fields to the caller (`spec.validation`), which reports them all."""

# Every string and list has a bound: the API server rejects CEL rules over unbounded ones as too costly.
Text = Annotated[str, StringConstraints(max_length=4096)]
ShortText = Annotated[str, StringConstraints(max_length=253)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Path_ = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
RunName = Annotated[str, StringConstraints(pattern=RUN_NAME, max_length=40)]
PoolName = Annotated[str, StringConstraints(pattern=POOL_NAME, max_length=20)]
Quantity = Annotated[str, StringConstraints(pattern=QUANTITY, max_length=32)]
FunctionPath = Annotated[str, StringConstraints(pattern=FUNCTION, max_length=253)]
BoardProject = Annotated[str, StringConstraints(pattern=BOARD_PROJECT, max_length=128)]
BoardId = Annotated[str, StringConstraints(pattern=BOARD_ID, max_length=128)]
BoardText = Annotated[str, StringConstraints(min_length=1, max_length=128)]
BoardTag = Annotated[str, StringConstraints(min_length=1, max_length=64)]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=317)]
StringMap = Annotated[dict[LabelKey, Annotated[str, StringConstraints(max_length=1024)]], Field(max_length=32)]
FreeForm = dict[str, Any]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
BrokenRule = tuple[str, str]


class Block(BaseModel):
    """One mapping of the manifest: unknown keys are rejected and nothing is coerced, so "3" is not a number."""

    model_config = ConfigDict(
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        allow_inf_nan=False,
    )

    def broken_rules(self) -> Iterable[BrokenRule]:
        """What is wrong across this block's fields: (path of the field below it, what to write instead)."""
        return ()

    @model_validator(mode="after")
    def _obey_rules(self, info: ValidationInfo) -> Self:
        if info.context != RULES_LATER:
            problems = [f"{path}: {message}" for path, message in self.broken_rules()]
            if problems:
                raise ValueError("; ".join(problems))
        return self


def block_in(annotation: Any) -> type[Block] | None:
    """The block that a field's annotation names, alone or in a list; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    return next((found for argument in get_args(annotation) if (found := block_in(argument))), None)


def list_map(key: str) -> dict[str, Any]:
    """A list of type map, for a field's `json_schema_extra`: items are identified by a key that must be unique."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def duplicates(path: str, names: list[str]) -> Iterable[BrokenRule]:
    """A problem if a name is used more than once in the list at that path."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield path, f"{', '.join(repeated)} is used more than once; names must be unique"
