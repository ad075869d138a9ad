"""Tasks of the package reasoning-gym: problems from its generators, and its verifiers as the reward `task`.

The package is imported in a worker (`heterorl.worker`) and nowhere else: nine of the verifiers of 0.1.25 never return
from an answer such as `9**9**9**9`, others raise, a generator may loop under an odd configuration, and three draw from
Python's sets, whose order only the worker fixes. A problem is a pure function of (task, seed, index).

    tasks ──draw──▶ rows, each with its task and its entry ──Verifier.score(row, answer)──▶ a number, usually 0 to 1
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import heapq
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from heterorl.data.answers import AnswerChecker
from heterorl.errors import DataError, UserError
from heterorl.seeds import derive_seed
from heterorl.spec.run import DatasetSpec, ReasoningGymSpec, ReasoningTaskSpec
from heterorl.worker import CallFailed, Worker

log = logging.getLogger(__name__)

COLUMN = "reasoningGym"
"""Column of a row with what its verifier needs: `task`, as in the manifest, and `entry`, the package's, a literal."""
CHUNK = 32
CHUNK_LIMIT_S = 600.0
"""Time limit of drawing a chunk: the slowest task of 0.1.25, knight_swap, takes a second a problem."""
SEED_AND_SIZE = ("seed", "size")

_EVALUATING = ("binary_matrix", "spiral_matrix", "string_insertion", "n_queens")
"""Tasks whose verifier evaluates the answer as Python code to read a list from it."""


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def draw(spec: ReasoningGymSpec, *, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a spec, the first `limit` of them: `id`, `prompt`, `answer`, `columns`.

    Tasks alternate in proportion to their weights. `answer` is the package's reference, empty for the few tasks that
    have none. `seed` is added to the spec's. Raises `DataError` for a task or a configuration that the package refuses,
    `UserError` where it is not installed.
    """
    _require_package()
    order = _order([task.weight for task in spec.tasks], min(spec.rows, limit or spec.rows))
    with Worker(f"{__name__}.generate") as worker:
        made = [
            iter(_problems(worker, task, derive_seed(COLUMN, spec.seed + seed, place), order.count(place)))
            for place, task in enumerate(spec.tasks)
        ]
    return [{"id": row, **next(made[place])} for row, place in enumerate(order)]


def _order(weights: Sequence[float], rows: int) -> list[int]:
    """Which task each row is of: every beginning of the list holds the tasks in proportion to their weights.

    Sainte-Laguë's method: the task comes next whose (given + 1/2) / weight is smallest.
    """
    due = [(0.5 / weight, place) for place, weight in enumerate(weights)]
    heapq.heapify(due)
    order = []
    for _ in range(rows):
        turn, place = due[0]
        order.append(place)
        heapq.heapreplace(due, (turn + 1 / weights[place], place))
    return order


def _problems(worker: Worker, task: ReasoningTaskSpec, seed: int, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for start in range(0, max(1, count), CHUNK):  # a task of weight too small for a row is checked all the same
        try:
            made = worker.call(_as_json(task), seed, start, min(CHUNK, count - start), time_limit_s=CHUNK_LIMIT_S)
        except CallFailed as error:
            raise DataError(
                f"reasoningGym.tasks: {task.name} gave no problem with configuration {json.dumps(task.config)}: {error}"
            ) from error
        if refused := made.get("refused"):
            raise DataError(f"reasoningGym.tasks: {refused}")
        rows += made["rows"]
    log.info("reasoning-gym: %d problems of %s", count, task.name)
    return rows


def _as_json(task: ReasoningTaskSpec) -> dict[str, Any]:
    return task.model_dump(mode="json", include={"name", "level", "config"})


def _require_package() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "source: reasoningGym needs the package reasoning-gym, which is not installed:"
            " pip install 'heterorl[reasoning]'"
        )


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Verifier:
    """Scores answers by their task's verifier in a worker, at most `time_limit_s` seconds each; usable from any thread.

    Close it, or use it as a context manager. `cut_off` counts the answers on which a verifier gave no number: it took
    too long, raised, or wanted too much memory. They score 0.
    """

    def __init__(self, datasets: Iterable[DatasetSpec], checker: AnswerChecker, time_limit_s: float = 2.0) -> None:
        """`datasets`: those whose rows will be scored; what their tasks read from disk is read once, in advance.

        `checker` finds the answer in a completion. Raises `UserError` when reasoning-gym is not installed.
        """
        _require_package()
        tasks = [_as_json(task) for dataset in datasets for task in dataset.reasoning_gym.tasks]
        self.cut_off = 0
        self._checker = checker
        self._time_limit_s = time_limit_s
        self._worker = Worker(f"{__name__}.scores", warm_up=[[(task, None, "") for task in tasks]])

    def load(self) -> None:
        """Start the worker and read what tasks need."""
        self._worker.load()

    def mark(self, row: dict[str, Any], completion: str) -> float | None:
        """The score of a completion's answer, None for a row that is not of reasoning-gym.

        The answer stands between the last `<answer>` and `</answer>`, as the package asks for it, otherwise where all
        answers stand.
        """
        if COLUMN not in row["columns"]:
            return None
        before, closing, _ = completion.rpartition("</answer>")
        _, opening, tagged = before.rpartition("<answer>")
        return self.score(row, tagged.strip() if closing and opening else self._checker.answer(completion))

    def score(self, row: dict[str, Any], answer: str | None) -> float:
        """The package's score of an answer to a row, 1 for a right one; 0 without an answer."""
        if answer is None:
            return 0.0
        about = row["columns"][COLUMN]
        try:
            (value,) = self._worker.call([(about["task"], about["entry"], answer)], time_limit_s=self._time_limit_s)
        except CallFailed as error:
            self.cut_off += 1
            log.debug("the verifier of %s gave no score: %s", about["task"]["name"], error)
            return 0.0
        return float(value)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ── in the worker ────────────────────────────────────────────────────────────────────────────────────────────────────
def generate(task: dict[str, Any], seed: int, start: int, count: int) -> dict[str, Any]:
    """`rows` of a task (prompt, answer, columns), or `refused`: why the package does not make any."""
    try:
        dataset = _dataset(json.dumps({**task, "seed": seed, "size": start + count}))
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # codeio runs programs that write files
            entries = [dataset[index] for index in range(start, start + count)]
    except _Refused as error:
        return {"refused": str(error)}
    except Exception as error:
        found = f"level {task['level']}, " if task["level"] is not None else ""
        found += f"configuration {json.dumps(task['config'])}"
        return {"refused": f"{task['name']} refuses {found}: {str(error).strip() or type(error).__name__}"}
    return {
        "rows": [
            {
                "prompt": entry["question"],
                "answer": entry["answer"] or "",
                "columns": {"task": task["name"], COLUMN: {"task": task, "entry": repr(_plain(entry))}},
            }
            for entry in entries
        ]
    }


def scores(questions: Sequence[tuple[dict[str, Any], str | None, str]]) -> list[float]:
    """The scores of (task, entry, answer) in turn; without an entry, only what the task needs is loaded."""
    datasets = (_dataset(json.dumps({**task, "seed": 0, "size": 1})) for task, _, _ in questions)
    return [_score(dataset, entry, answer) for dataset, (_, entry, answer) in zip(datasets, questions)]


def _score(dataset: Any, literal: str | None, answer: str) -> float:
    entry = None if literal is None else ast.literal_eval(literal)
    if entry is None or _fools_the_verifier(answer, entry):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stands in an answer
        value = float(dataset.score_answer(answer, entry))
    return value if math.isfinite(value) else 0.0


def _fools_the_verifier(answer: str, entry: dict[str, Any]) -> bool:
    """Whether it is one of the wrong answers to which a verifier of 0.1.25 gives full marks."""
    metadata = entry["metadata"]
    match metadata["source_dataset"]:
        case "game_of_life_halting":  # any text
            return bool(answer.strip() != entry["answer"])
        case "complex_arithmetic":  # not a number
            return "nan" in answer.lower()
        case "puzzle24":  # other numbers than the given ones
            return sorted(map(int, re.findall(r"\d{1,9}", answer))) != sorted(metadata["numbers"])
    return False


class _Refused(Exception):
    """The package knows no such task, level or option; the message says what it knows."""


@functools.lru_cache(256)
def _dataset(task: str) -> Any:
    """The package's dataset of a task: JSON of name, level, config, seed, size."""
    wanted = json.loads(task)
    name, level = wanted["name"], wanted["level"]
    kind, config_class = _known_tasks().get(name) or _refuse_name(name)
    options = [option for option in config_class.__dataclass_fields__ if option not in SEED_AND_SIZE]
    for option in wanted["config"]:
        if option not in options:
            raise _Refused(f"{name} has no option {option}; {_near(option, options)}")
    given = {**wanted["config"], **{key: wanted[key] for key in SEED_AND_SIZE}}
    config = config_class(**given) if level is None else _at_level(name, level, given)
    return kind(config=config)


def _at_level(name: str, level: int, given: dict[str, Any]) -> Any:
    from reasoning_gym import factory

    if not factory.has_curriculum(name):
        raise _Refused(f"{name} has no curriculum, so remove its level")
    curriculum = factory.create_curriculum(name)
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if level > highest:
        raise _Refused(f"{name} has levels 0 to {highest}, not {level}")
    curriculum.set_global_level(level)
    config = curriculum.generate_configuration()
    for option, value in given.items():
        setattr(config, option, value)
    return config


def _refuse_name(name: str) -> Any:
    version = importlib.metadata.version("reasoning-gym")
    raise _Refused(f"reasoning-gym {version} has no task {name}; {_near(name, _known_tasks())}")


def _near(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names)}"


@functools.cache
def _known_tasks() -> dict[str, Any]:
    """Every task of the package: its dataset's class and that of its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib, when it is compiled
        from reasoning_gym.factory import DATASETS
    tasks = {name: classes for name, classes in DATASETS.items() if name != "composite"}
    for name in _EVALUATING:  # the model's text is data: read as a literal, never run
        vars(importlib.import_module(tasks[name][0].__module__))["eval"] = ast.literal_eval
    return tasks


def _plain(value: Any) -> Any:
    """The same of Python's own types, whose `repr` can be read again: numpy's scalars become those, others their text.

    A literal keeps tuples and numbers as keys, which verifiers compare, where JSON would not.
    """
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    if isinstance(value, np.generic):
        value = value.item()
    readable = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    return value if readable else str(value)
