"""`heterorl init`: a commented manifest to start from, for a model and a data file, that passes `heterorl check`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterorl.data.datasets import column_names, value_at
from heterorl.data.files import read_files
from heterorl.errors import DataError, ModelError, UserError
from heterorl.local.preflight import gpu_devices

ROWS_READ = 200
PROMPT_COLUMNS = ("problem", "question", "prompt", "query", "instruction", "input", "text")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "gold", "reward_model.ground_truth", "solution", "target")
INSTRUCTION = r"{problem} Reason step by step, and put the final answer within \boxed{}."

_MANIFEST = """\
# {command}
# Check it with `heterorl check {file}`, start it with `heterorl run {file}`; docs/spec.md describes every field.
apiVersion: heterorl.dev/v1alpha1
kind: HeteroRLRun
metadata:
  name: {name} # of the run, and of its folder under runs/
spec:
  model:
{model}
    dtype: {dtype}
  data:
    train:
{data}
      columns:
        prompt: {prompt} # text, or a list of messages
        answer: {answer} # the reference; an inner column by its path, such as reward_model.ground_truth
{pattern}      onBadRow: skip # rows that cannot be used are left out and counted; refuse: none may be in the data
    promptTemplate: {template} # chat: the model's chat template; think, noThink: it asks for a box; raw: the text alone
{instruction}  rewards:
  - name: accuracy # 1 if the answer equals the reference; docs/rewards.md lists others, and how to write your own
  algorithm:
    loss: {{type: gepo}} # docs/losses.md
    groupSize: 8 # completions of each prompt, compared with each other
  generation:
    maxPromptTokens: {prompt_tokens} # longer prompts are left out
    maxCompletionTokens: {completion_tokens} # longer completions are cut
  learner:
    steps: 100
    batch: {{groups: 8, tokensPerMicroBatch: {budget}}} # prompts a step; tokens of a forward pass
    optimizer: {{learningRate: 1e-6}}
    checkpoint: {{everySteps: 50}}
    gpus: {learner_gpus}
  samplers: # pools; one that is far away gets a delay, docs/delay.md
  - name: near
    engine: {engine}
    gpus: {sampler_gpus}
    promptsPerBatch: 8
  exchange:
    maxPendingGroups: 16 # groups that wait for the learner before a sampler pauses
{local}"""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    prompt: str
    answer: str
    pattern: str | None
    conversational: bool


def write_starter(file: Path, model: str, data: str, prompt: str | None = None, answer: str | None = None) -> None:
    """Write the manifest to `file`, which must not exist; paths are taken from the current folder.

    Raises UserError for a file that exists, DataError and ModelError for data and model that cannot be read.
    """
    if file.exists():
        raise UserError(f"{file} exists and is not overwritten; name another file, or remove it")
    base = file.resolve().parent
    source, columns = _data(data, base, prompt, answer)
    text = _manifest(file, model, data, base, source, columns)
    base.mkdir(parents=True, exist_ok=True)
    with file.open("x", encoding="utf-8") as out:
        out.write(text)


def _manifest(file: Path, model: str, data: str, base: Path, source: dict[str, str], columns: Columns) -> str:
    devices = len(gpu_devices())
    model_source, has_chat, positions = _model(model, base)
    chat = has_chat or columns.conversational
    room = min(1024, positions // 2)
    own_text = chat and not columns.conversational
    return _MANIFEST.format(
        command=f"heterorl init {file} --model {model} --data {data}",
        file=file,
        name=_run_name(file.stem),
        model=_lines(model_source, 4),
        dtype="bfloat16" if devices else "float32",
        data=_lines(source, 6),
        prompt=_yaml(columns.prompt),
        answer=_yaml(columns.answer),
        pattern=f"        answerPattern: {_yaml(columns.pattern)} # the answer within the column\n"
        if columns.pattern
        else "",
        template="chat" if chat else "raw",
        instruction=f"    instruction: {_yaml(INSTRUCTION)} # the user's turn\n" if own_text else "",
        prompt_tokens=room,
        completion_tokens=room,
        budget=max(2 * room, 4096 if devices else 2 * room),
        learner_gpus=min(1, devices),
        sampler_gpus=min(1, devices),
        engine="vllm" if importlib.util.find_spec("vllm") else "transformers",
        local="  local:\n    shareGpus: true # learner and sampler share the one GPU\n" if devices == 1 else "",
    )


# ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _model(model: str, base: Path) -> tuple[dict[str, str], bool, int]:
    """The source in the manifest, whether it is made to chat, and how many tokens it reads, as far as is known."""
    folder = Path(model).expanduser()
    if model == "tiny":
        return {"source": "tiny"}, False, 2048
    if folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{model}: config.json cannot be read ({error}); name a Hugging Face model folder"
            ) from error
        positions = config.get("max_position_embeddings", 2048)
        return {"source": "path", "path": _relative(folder, base)}, _has_chat_template(folder), positions
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return {"source": "hub", "name": model}, "base" not in model.lower(), 2048
    raise ModelError(f"{model}: neither a folder nor a name on the Hub such as Qwen/Qwen3-1.7B; `tiny` is built in")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _data(data: str, base: Path, prompt: str | None, answer: str | None) -> tuple[dict[str, str], Columns]:
    """The source in the manifest and its columns, by the names and contents of the first rows."""
    on_disk = Path(data).expanduser().exists() or any(sign in data for sign in "*?[")
    if not on_disk and re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not Path(data).suffix:
        return {"source": "hub", "name": data}, Columns(prompt or "problem", answer or "answer", None, False)
    first = itertools.islice(read_files([data], Path(), "train"), ROWS_READ)
    rows = [row.content for row in first if isinstance(row.content, dict)]
    if not rows:
        raise DataError(f"{data}: no rows found; use a file with at least one")
    names = list(dict.fromkeys(name for row in rows for name in column_names(row)))
    columns = (
        _chosen(data, "problem", "--prompt-column", prompt, PROMPT_COLUMNS, names, rows),
        _chosen(data, "answer", "--answer-column", answer, ANSWER_COLUMNS, names, rows),
    )
    source = {"source": "file", "path": _relative(Path(data).expanduser(), base)}
    return source, Columns(*columns, _pattern(rows, columns[1]), any(_are_messages(row, columns[0]) for row in rows))


def _chosen(
    data: str, what: str, option: str, wanted: str | None, usual: tuple[str, ...], names: list[str], rows: list[Any]
) -> str:
    """The column asked for, or the first of the usual ones that some row fills."""
    filled = (name for name in ([wanted] if wanted else usual) if any(_values(rows, name)))
    found = next(filled, None)
    if found is None:
        lacks = f"`{wanted}`" if wanted else f"that usually holds the {what}"
        raise DataError(f"{data}: no column {lacks}; found: {', '.join(names)}; name it by {option}")
    return found


def _values(rows: list[Any], column: str) -> Iterator[bool]:
    return (value is not None for row in rows for value in value_at(row, column))


def _pattern(rows: list[Any], answer: str) -> str | None:
    """GSM8K's mark before the answer, where most answers have it."""
    marked = sum("#### " in str(value) for row in rows for value in value_at(row, answer))
    return "#### (.+)" if marked > len(rows) / 2 else None


def _are_messages(row: Any, prompt: str) -> bool:
    return any(isinstance(value, list) for value in value_at(row, prompt))


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _run_name(stem: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-")
    return name if name[:1].isalpha() else f"run-{name}"[:40].strip("-")


def _relative(path: Path, base: Path) -> str:
    """From the manifest's folder, as paths in a manifest are read."""
    return str(path) if path.is_absolute() else os.path.relpath(path.absolute(), base)


def _lines(fields: dict[str, str], indent: int) -> str:
    return "\n".join(f"{' ' * indent}{name}: {_yaml(value)}" for name, value in fields.items())


def _yaml(text: str) -> str:
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
