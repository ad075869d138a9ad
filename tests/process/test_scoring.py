"""Rewards in their workers: what they give, and what becomes of groups that they fail on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from heterorl.spec.run import RewardSpec
from heterorl_sampler.rewards import Group
from heterorl_sampler.scoring import FailureLog, RewardFailed, Rewards, Scored, Scores

JUDGES = """
import os, time
calls = []

def act(completions, **columns):
    calls.append(len(completions))
    return [{"one": 1.0, "none": None}.get(c, 0.0) if c not in ACTS else ACTS[c]() for c in completions]

def raises(): raise ConnectionError("no verdict")
def once():
    path = os.environ["ONCE"]
    if os.path.exists(path): return 7.0
    open(path, "w").close(); raises()
def tell():
    open(os.environ["HUNG"], "w").close(); time.sleep(1000)
ACTS = {
    "hang after telling": tell,
    "raise": raises,
    "hang": lambda: time.sleep(1000),
    "eat": lambda: bytearray(64 << 30),
    "crash": lambda: os._exit(3),
    "once": once,
    "calls": lambda: len(calls),
}
def other(completions, **columns): return [float(len(c)) for c in completions]
"""
BROKEN = {
    "syntax_error": "def f(:\n",
    "top_level": "import os\nKEY = os.environ['NO_SUCH_KEY_HERE']\ndef f(**_): return []\n",
    "leaves": "import sys\nsys.exit(3)\n",
    "crashes": "import os\nos.abort()\n",
    "lacks": "import no_such_dependency\ndef f(**_): return []\n",
}


@pytest.fixture(scope="module", autouse=True)
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("judges")
    (folder / "judges.py").write_text(JUDGES)
    for name, text in BROKEN.items():
        (folder / f"broken_{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def judge(**params: object) -> RewardSpec:
    return RewardSpec(**{"name": "custom", "path": "judges.act", "time_limit_seconds": 30.0, **params})


def group(*texts: str, number: int = 7) -> Group:
    row = {"id": number, "prompt": "2+2=", "answer": "4", "columns": {"level": 3}}
    return Group(list(texts), list(texts), [len(text) for text in texts], row, [[1]] * len(texts))


def score(rewards: Rewards, *groups: Group) -> Scores:
    return rewards.score(groups, threading.Event())


def totals(scores: Scores) -> list[list[float] | None]:
    return [None if each is None else each.rewards.tolist() for each in scores.groups]


def test_weights_apply_to_the_sum_alone() -> None:
    spec = [RewardSpec(name="accuracy", weight=2.0), RewardSpec(name="boxed", weight=-0.5)]
    with Rewards(spec, boxed_only=True) as rewards:
        (scored,) = score(rewards, group(r"\boxed{4}", r"\boxed{\frac{5}{2}}", "4")).groups
    assert isinstance(scored, Scored)
    assert scored.rewards.tolist() == [1.5, -0.5, 0]
    assert scored.rewards.dtype == np.float32
    assert {name: term.tolist() for name, term in scored.terms.items()} == {"accuracy": [1, 0, 0], "boxed": [1, 1, 0]}


@pytest.mark.parametrize(
    ("require_value", "of_sums", "of_others"),
    [(None, [1, 0], [1, 1]), (True, [1, 0], [1, 0]), (False, [1, 1], [1, 1])],
)
def test_a_computation_is_no_answer_where_the_row_or_the_reward_wants_a_value(
    require_value: bool | None, of_sums: list[int], of_others: list[int]
) -> None:
    sums, others = group(r"\boxed{4.0}", r"\boxed{2+2}"), group(r"\boxed{4.0}", r"\boxed{2+2}")
    sums.row["require_value"] = True
    spec = [RewardSpec(name="accuracy", require_value=require_value, time_limit_seconds=20.0)]
    with Rewards(spec, boxed_only=True) as rewards:
        assert totals(score(rewards, sums, others)) == [of_sums, of_others]


def test_rewards_of_one_name_get_terms_of_their_own() -> None:
    spec = [
        RewardSpec(name="repetition", ngram_size=1),
        RewardSpec(name="repetition", ngram_size=2),
        judge(),
    ]
    with Rewards(spec, boxed_only=True) as rewards:
        (scored,) = score(rewards, group("a a b")).groups
    assert isinstance(scored, Scored)
    assert list(scored.terms) == ["repetition", "repetition_2", "act"]
    assert scored.terms["repetition"] == pytest.approx(-1 / 3)
    assert scored.terms["repetition_2"] == 0


def test_a_reward_that_does_not_apply_counts_in_no_sum() -> None:
    with Rewards([judge(weight=10.0), judge(path="judges.other")], boxed_only=True) as rewards:
        (scored,) = score(rewards, group("none", "one")).groups
    assert isinstance(scored, Scored)
    assert scored.rewards.tolist() == [4, 13]  # 4 letters; 10 x 1 and 3 letters
    assert np.isnan(scored.terms["act"]).tolist() == [True, False]


def test_a_completion_to_which_no_reward_applies_has_no_advantage() -> None:
    with Rewards([judge()], boxed_only=True) as rewards:
        scores = score(rewards, group("none", "one", "zero"), group("none", "none"))
    # The mean of the others, 1 and 0; a group to none of which a reward applies is left out.
    assert totals(scores) == [[0.5, 1, 0], None]


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("act", "kind"), [("raise", "error"), ("eat", "memory"), ("crash", "crash"), ("hang", "time")])
def test_a_failing_call_is_counted_and_costs_its_group_only(act: str, kind: str) -> None:
    reward = judge(on_error="skipGroup", time_limit_seconds=1.0 if act == "hang" else 30.0)
    with Rewards([reward, RewardSpec(name="boxed")], boxed_only=True) as rewards:
        scores = score(rewards, group("one"), group("one", act), group("one"))
        assert totals(scores) == [[1], None, [1]]
        assert rewards.failures == {f"act/{kind}": 1}


def test_a_failed_call_is_repeated_and_then_its_group_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heterorl_sampler.scoring.RETRY_S", 0.01)
    with Rewards([judge(retries=3)], boxed_only=True) as rewards:
        assert totals(score(rewards, group("raise"), group("one"))) == [None, [1]]
        assert rewards.failures == {"act/error": 4}


def test_a_repeated_call_may_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    with Rewards([judge()], boxed_only=True) as rewards:
        assert totals(score(rewards, group("once"))) == [[7]]
        assert rewards.failures == {"act/error": 1}


def test_a_failed_reward_may_count_as_zero() -> None:
    with Rewards([judge(on_error="zero"), judge(path="judges.other")], boxed_only=True) as rewards:
        (scored,) = score(rewards, group("raise", "one")).groups
    assert isinstance(scored, Scored)
    assert scored.rewards.tolist() == [5, 3]
    assert scored.terms["act"].tolist() == [0, 0]


def test_a_reward_whose_policy_is_to_fail_ends_at_its_first_failure_and_keeps_what_was_scored() -> None:
    with Rewards([judge(on_error="fail")], boxed_only=True) as rewards:
        scores = score(rewards, group("one"), group("raise", number=8), group("one"))
        assert totals(scores) == [[1]]
        assert isinstance(scores.failure, RewardFailed)
        assert "reward act failed on row 8: ConnectionError: no verdict" in str(scores.failure)
        assert "judges.py, line" in str(scores.failure)


@pytest.mark.parametrize("policy", ["skipGroup", "zero"])
def test_a_reward_that_fails_on_many_groups_in_a_row_ends_it_and_a_success_forgives(policy: str) -> None:
    with Rewards([judge(on_error=policy, error_budget=3)], boxed_only=True) as rewards:
        bad, good = group("raise"), group("one")
        assert score(rewards, bad, bad, good, bad, bad).failure is None
        scores = score(rewards, bad, good)
        assert scores.groups == []
        assert "3 groups in a row" in str(scores.failure)


def test_a_batched_reward_is_called_once_and_after_a_failure_group_by_group() -> None:
    with Rewards([judge(batched=True, on_error="skipGroup")], boxed_only=True) as rewards:
        assert totals(score(rewards, group("one"), group("calls", "zero"))) == [[1], [1, 0]]
        assert totals(score(rewards, group("one"), group("raise"), group("calls"))) == [[1], None, [5]]
        assert rewards.failures == {"act/error": 2}  # of the batch, and of the group alone


# ── in time ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_scored_before_a_stop_is_kept_and_a_hanging_call_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = tmp_path / "hung"
    monkeypatch.setenv("HUNG", str(hung))
    stop, scores = threading.Event(), []
    with Rewards([judge(time_limit_seconds=900.0)], boxed_only=True) as rewards:
        groups = [group("one"), group("hang after telling"), group("one")]
        scorer = threading.Thread(target=lambda: scores.append(rewards.score(groups, stop)))
        scorer.start()
        while not hung.exists():
            time.sleep(0.01)
        stop.set()
        rewards.close()
        scorer.join(60)
    assert [totals(each) for each in scores] == [[[1]]]
    assert rewards.failures == {}


# ── what is said of it ───────────────────────────────────────────────────────────────────────────────────────────────
def test_the_log_has_the_traceback_of_the_users_function_once(caplog: pytest.LogCaptureFixture) -> None:
    with Rewards([judge(on_error="skipGroup")], boxed_only=True) as rewards:
        score(rewards, group("raise", number=1), group("raise", number=2), group("raise", number=3))
        score(rewards, group("crash"))
    line = next(n for n, text in enumerate(JUDGES.splitlines(), 1) if text.startswith("def raises"))
    assert f'judges.py", line {line}, in raises' in caplog.text
    assert caplog.text.count("Traceback") == 1
    assert "2 more failures like the one above" in caplog.text
    assert "the process exited with code 3" in caplog.text


def test_a_failure_is_told_again_after_a_while_with_the_number_of_those_before(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = FailureLog()
    told.tell("kind", "first", "trace")
    told.tell("kind", "second", "trace")
    told.tell("another", "other", "")
    monkeypatch.setattr("heterorl_sampler.scoring.TOLD_AGAIN_S", 0.0)
    told.tell("kind", "third", "trace")
    told.close()
    assert [record.getMessage() for record in caplog.records] == [
        "first\ntrace",
        "other",
        "third (and 1 like it before)\ntrace",
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("broken_syntax_error.f", r"SyntaxError.*broken_syntax_error.py, line 1"),
        ("broken_top_level.f", r"KeyError: 'NO_SUCH_KEY_HERE' \(.*broken_top_level.py, line 2\)"),
        ("broken_leaves.f", "SystemExit: 3"),
        ("broken_crashes.f", "SIGABRT"),
        ("broken_lacks.f", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("no_such_module.f", "No module named 'no_such_module'"),
        ("judges.calls", "judges.calls is a list, not a function"),
        ("judges.nothing", "no attribute 'nothing'"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_told_in_one_line(path: str, message: str) -> None:
    with (
        Rewards([RewardSpec(name="accuracy"), judge(path=path)], boxed_only=True) as rewards,
        pytest.raises(RewardFailed, match=f"custom reward {path} cannot be imported: .*{message}") as caught,
    ):
        rewards.load()
    assert "\n" not in str(caught.value)


def test_rewards_that_can_be_imported_are_loaded_without_a_call() -> None:
    with Rewards([RewardSpec(name="accuracy"), judge()], boxed_only=True) as rewards:
        rewards.load()
