"""Scoring groups: from tokens to texts, from texts to rewards, and what becomes of a group that a reward fails on.

`accuracy` and `task` are what the comparison of answers finds. Every other reward is a function (`rewards`), called in
a worker that can be killed. It fails when its function raises, exceeds its time or memory, ends its process, or gives
no number. The reward's `onError` says what then happens to the group: again and then left out (retry), 0 from this
reward (zero), left out (skipGroup), or the end of this sampler (fail). A reward that fails on `errorBudget` groups in a
row ends it too.
"""

from __future__ import annotations

import inspect
import logging
import re
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from heterorl.data.answers import AnswerChecker
from heterorl.data.reasoning_gym import Verifier
from heterorl.errors import HeteroRLError
from heterorl.exchange.rollout import Completion
from heterorl.spec.run import DatasetSpec, RewardSpec, RunSpec
from heterorl.worker import CallFailed, Worker
from heterorl_sampler.rewards import COMPARING, Group, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
CALL_LIMIT_S = 60.0
"""Time for one call of a reward that sets no `timeLimitSeconds`."""
ANSWER_LIMIT_S = 2.0
"""The same for comparing one answer."""
RETRY_S = 0.5
"""Pause before a call is repeated, doubled each time."""
TOLD_AGAIN_S = 600.0
"""How long the same failure is only counted, before its traceback is logged once more."""
FOUND: dict[str, Callable[[Group], Sequence[float | None]]] = {
    "accuracy": lambda group: group.correct,
    "task": lambda group: group.marks,
}
"""Rewards that need no function: what each is of a group whose answers were compared."""
_TAG = re.compile(r"<(/?)([A-Za-z_]+)>")
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_OUR_OWN = inspect.getfile(Group)
_STDLIB = sysconfig.get_path("stdlib")


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Decoder:
    """Decodes completions without the tokens that end, pad or steer, and with all that is written.

    Tags such as `<think>` and `</think>` stay where a tokenizer has them as special tokens: a special token is a tag
    when it has its counterpart, and is not the tokenizer's own for the beginning, the end or padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        tags = {content for content in special if _is_tag(content, special)} - set(
            tokenizer.special_tokens_map.values()
        )
        self._dropped = {*special.values(), *tokenizer.all_special_ids} - {special[content] for content in tags}

    def text(self, token_ids: Sequence[int]) -> str:
        """What these tokens of a completion say."""
        return self._plain([token for token in token_ids if token not in self._dropped])

    def opened(self, row: Mapping[str, Any]) -> str:
        r"""What a prepared row's prompt has written of the model's turn: `<think>\n`, a closed empty think, or nothing.

        A conversation may also end in the turn itself, which the model then continues.
        """
        prompt = row["prompt"]
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            return str(prompt[-1]["content"])
        found = _OPENED.search(self._plain(row["prompt_ids"]))
        return found.group() if found else ""

    def group(self, row: Row, completions: Sequence[Completion]) -> Group:
        """Completions of a prepared row as rewards see them."""
        texts, opened = [self.text(completion.token_ids) for completion in completions], self.opened(row)
        return Group(
            texts=texts,
            turns=[opened + text for text in texts],
            lengths=[len(completion.token_ids) for completion in completions],
            row={name: value for name, value in row.items() if name != "prompt_ids"},
            token_ids=[completion.token_ids for completion in completions],
        )

    def _plain(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _is_tag(content: str, special: dict[str, int]) -> bool:
    """Whether a special token is half of a pair `<name>`, `</name>`."""
    tag = _TAG.fullmatch(content)
    return tag is not None and (f"<{tag[2]}>" if tag[1] else f"</{tag[2]}>") in special


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class RewardFailed(HeteroRLError):
    """A reward cannot be imported, or fails so that, by its policy, this sampler cannot go on.

    `worked`: whether it has ever given values; None where that is not known here, but a published rollout would tell.
    """

    def __init__(self, message: str, worked: bool | None = None) -> None:
        super().__init__(message)
        self.worked = worked


@dataclass(frozen=True)
class Scored:
    """The rewards of one group."""

    rewards: Floats
    """[G] weighted sum of the terms."""
    terms: dict[str, Floats]
    """[G] each reward's own, unweighted values by its name; NaN where it does not apply."""


@dataclass(frozen=True)
class Scores:
    """What became of a batch: as many of its groups, in order, as were scored before it was told to stop or failed."""

    groups: list[Scored | None]
    """None for a group that is left out."""
    failure: RewardFailed | None = None


class Rewards:
    """The run's rewards, ready to score batches; close it, or use it as a context manager.

    `failures` counts failed calls by reward and kind, as `judge/time`; kinds are error, time, memory and crash.
    """

    def __init__(
        self, rewards: Sequence[RewardSpec], *, boxed_only: bool, datasets: Sequence[DatasetSpec] = ()
    ) -> None:
        """`datasets`: those whose rows are scored, for `task`."""
        self.failures: Counter[str] = Counter()
        self.sources = ""
        """Fingerprint of the custom rewards' source, once they are loaded."""
        self._told = FailureLog()
        accuracy = next((params for params in rewards if params.name == "accuracy"), RewardSpec())
        self._checker = AnswerChecker(
            accuracy.time_limit_seconds or ANSWER_LIMIT_S,
            boxed_only=boxed_only,
            require_value=accuracy.require_value,
        )
        limits = {params.name: params.time_limit_seconds or ANSWER_LIMIT_S for params in rewards}
        self._compares = any(params.name in COMPARING for params in rewards)
        self._verifier = Verifier(datasets, self._checker, limits["task"]) if "task" in limits else None
        built_in = Worker("heterorl_sampler.rewards.values")
        judges = [self._judge(name, params, built_in) for name, params in zip(_term_names(rewards), rewards)]
        self._weights = {judge.name: np.float32(judge.params.weight) for judge in judges}
        self._workers = [built_in, *(judge.worker for judge in judges if judge.params.path)]
        built_ins = [judge for judge in judges if not judge.params.path]
        self._lanes = [lane for lane in (built_ins, *([judge] for judge in judges if judge.params.path)) if lane]
        self._threads = ThreadPoolExecutor(len(self._lanes), thread_name_prefix="reward")

    def _judge(self, name: str, params: RewardSpec, built_in: Worker) -> Judge:
        dumped = params.model_dump(mode="json")
        worker = built_in
        if params.path:
            load = ["heterorl_sampler.rewards.load", dumped]
            worker = Worker("heterorl_sampler.rewards.values", load=load, memory_bytes=params.memory_limit_bytes)
        return Judge(name, params, dumped, worker, self.failures, self._told)

    def load(self) -> None:
        """Start the workers and import custom rewards; RewardFailed, naming file and line, if one does not import."""
        sources = [self._threads.submit(judge.load) for lane in self._lanes for judge in lane]
        if self._compares:
            self._threads.submit(self._checker.load)
        if self._verifier:
            self._verifier.load()
        self.sources = "-".join(filter(None, (source.result() for source in sources)))

    def score(self, groups: Sequence[Group], stop: threading.Event) -> Scores:
        """The rewards of a batch; until `stop`, however long its judges take."""
        lanes = [self._threads.submit(self._run, lane, groups, stop) for lane in self._lanes]
        found = {judge.name: result for lane in lanes for judge, result in lane.result()}
        failure = next((result.failure for result in found.values() if result.failure), None)
        scored = min(len(result.values) for result in found.values())
        terms = ({name: result.values[i] for name, result in found.items()} for i in range(scored))
        return Scores([self._sum(group, of_group) for group, of_group in zip(groups, terms)], failure)

    def _run(self, lane: list[Judge], groups: Sequence[Group], stop: threading.Event) -> list[tuple[Judge, Values]]:
        """Let the rewards that share a worker score the batch, one after the other."""
        if not lane[0].params.path:
            groups = [self._compared(group, stop) for group in groups]
        return [(judge, judge.values(groups, stop)) for judge in lane]

    def _compared(self, group: Group, stop: threading.Event) -> Group:
        """The group with what only other workers can tell of its answers."""
        gold, strict = group.row["answer"], group.row.get("require_value", False)

        def is_right(text: str) -> bool:
            return not stop.is_set() and self._checker.check(gold, text, require_value=strict)

        def mark(text: str) -> float | None:
            return self._verifier.mark(group.row, text) if self._verifier and not stop.is_set() else 0.0

        return replace(
            group,
            correct=[is_right(text) for text in group.texts] if self._compares else [],
            marks=[mark(text) for text in group.texts] if self._verifier else [],
        )

    def _sum(self, group: Group, terms: dict[str, Floats | None]) -> Scored | None:
        known = {name: values for name, values in terms.items() if values is not None}
        if len(known) < len(terms):
            return None
        total = np.zeros(len(group.texts), np.float32)
        for name, values in known.items():
            total += self._weights[name] * np.nan_to_num(values)
        scorable = ~np.all([np.isnan(values) for values in known.values()], axis=0)
        if not scorable.any():
            self._told.tell("none", f"no reward applies to row {group.row['id']}; its group is left out", "")
            return None
        total[~scorable] = total[scorable].mean()  # no advantage, and no part in the others' baseline
        return Scored(total, known)

    def close(self) -> None:
        """End the processes, also in the midst of a call."""
        for worker in self._workers:
            worker.close()
        self._checker.close()
        if self._verifier:
            self._verifier.close()
        self._threads.shutdown(wait=False)
        self._told.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_rewards(spec: RunSpec) -> Rewards:
    """The rewards of a run; a completion without a box answers only under the template `raw`."""
    return Rewards(spec.rewards, boxed_only=spec.data.prompt_template != "raw", datasets=spec.data.train.sets)


# ── one reward ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Values:
    """One reward's values of a batch's first groups."""

    values: list[Floats | None]
    """[G] of each group; None where it is to be left out."""
    failure: RewardFailed | None = None


class Judge:
    """One reward and its policy."""

    def __init__(
        self,
        name: str,
        params: RewardSpec,
        dumped: dict[str, Any],
        worker: Worker,
        failures: Counter[str],
        told: FailureLog,
    ) -> None:
        self.name, self.params, self.worker = name, params, worker
        self._dumped, self._failures, self._told = dumped, failures, told
        self._found = FOUND.get(params.name)
        self._failed_in_a_row, self._has_worked, self._last_failure = 0, False, ""

    def load(self) -> str | None:
        """Start the worker and import the function; the SHA-256 of a custom one's source."""
        if self._found:
            return None
        try:
            source: str | None = self.worker.load()
        except CallFailed as failure:
            log.error("custom reward %s cannot be imported:\n%s", self.params.path, failure.trace or failure)
            raise RewardFailed(
                f"custom reward {self.params.path} cannot be imported: {failure}{_place(failure)}; write path:"
                " package.module.function, and start the run where that package can be imported (PYTHONPATH)"
            ) from failure
        return source

    def values(self, groups: Sequence[Group], stop: threading.Event) -> Values:
        """Score groups in order until `stop`, or until the policy says to end."""
        if self.params.batched and len(groups) > 1 and (together := self._attempt(groups, stop)):
            return Values([*together])
        found: list[Floats | None] = []
        for group in groups:
            if stop.is_set():
                break
            try:
                values = self._patiently(group, stop)
            except RewardFailed as failure:
                return Values(found, failure)
            if values is None and stop.is_set():  # that a call fails whose worker is closed says nothing
                break
            found.append(values)
        return Values(found)

    def _patiently(self, group: Group, stop: threading.Event) -> Floats | None:
        """[G] values, or None for a group to be left out. Raises RewardFailed."""
        retries = self.params.retries if self.params.on_error == "retry" else 0
        for attempt in range(retries + 1):
            if attempt and stop.wait(RETRY_S * 2 ** (attempt - 1)):
                return None
            if values := self._attempt([group], stop):
                self._failed_in_a_row, self._has_worked = 0, True
                return values[0]
        if stop.is_set():
            return None
        self._failed_in_a_row += 1
        if self.params.on_error == "fail" or self._failed_in_a_row >= self.params.error_budget:
            what = f"{self._last_failure}; it has failed on {self._failed_in_a_row} groups in a row"
            unknown = None if self.params.on_error != "zero" else False  # rollouts are published without it
            raise RewardFailed(what, worked=self._has_worked or unknown)
        return np.zeros(len(group.texts), np.float32) if self.params.on_error == "zero" else None

    def _attempt(self, groups: Sequence[Group], stop: threading.Event) -> list[Floats] | None:
        """One call: [G] values of each group, or None when it failed."""
        if self._found:
            return [_floats(self._found(group)) for group in groups]
        seen = groups if self.params.path else [replace(group, token_ids=[]) for group in groups]
        limit_s = self.params.time_limit_seconds or CALL_LIMIT_S
        try:
            values = self.worker.call(self._dumped, [asdict(group) for group in seen], time_limit_s=limit_s)
        except CallFailed as failure:
            if not stop.is_set():
                self._note(failure, groups)
            return None
        return np.split(_floats(values), np.cumsum([len(group.texts) for group in groups])[:-1])

    def _note(self, failure: CallFailed, groups: Sequence[Group]) -> None:
        self._failures[f"{self.name}/{failure.reason}"] += 1
        rows = ", ".join(str(group.row["id"]) for group in groups)
        self._last_failure = f"reward {self.name} failed on row {rows}: {failure}{_place(failure)}"
        self._told.tell(f"{self.name} {failure.reason} {_place(failure)}", self._last_failure, failure.trace)


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _place(failure: CallFailed) -> str:
    """Where the innermost line is, best one that is neither Python's nor an installed package's, in a few words."""
    found = re.findall(r'^ *File "([^<].*)", line (\d+)', failure.trace, re.MULTILINE)
    theirs = [(file, line) for file, line in found if file != _OUR_OWN and not file.startswith(_STDLIB)]
    own = [(file, line) for file, line in theirs if "site-packages" not in file]
    return next((f" ({file}, line {line})" for file, line in reversed(own or theirs)), "")


class FailureLog:
    """Logs each failure with its traceback once, then counts those like it and logs it again after a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told_at: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def tell(self, kind: str, message: str, trace: str) -> None:
        """`kind`: what makes two failures alike."""
        with self._lock:
            now = time.monotonic()
            if now - self._told_at.get(kind, -np.inf) < TOLD_AGAIN_S:
                self._untold[kind] += 1
                return
            self._told_at[kind] = now
            more = self._untold.pop(kind, 0)
        log.error("%s%s%s", message, f" (and {more} like it before)" if more else "", f"\n{trace}" if trace else "")

    def close(self) -> None:
        """Say what was only counted."""
        for kind, more in self._untold.items():
            log.error("%s: %d more failures like the one above", kind.strip(), more)


def _term_names(rewards: Sequence[RewardSpec]) -> list[str]:
    """One name a reward: its own, for a custom one its function's; a second one of that name gets `_2`."""
    names: list[str] = []
    for params in rewards:
        name = params.path.rpartition(".")[2] if params.path else params.name
        names.append(next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in names))
    return names
