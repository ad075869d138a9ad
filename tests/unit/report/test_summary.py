"""The summary and its ledger, on run folders written by the real exchange and the real metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import exchange_at, put, rollout_name, rollout_of, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, JournalEntry, LearnerHeartbeat
from heterorl.exchange.version import Version
from heterorl.monitoring.json_lines import JsonLines
from heterorl.report.summary import in_words, summarise, write_summary
from heterorl.spec.run import Slot

SLOT = Slot("far", 0)


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    exchange = exchange_at(tmp_path / "demo", run_of("demo", learner={"steps": 20}))
    exchange.metrics_dir.mkdir()
    exchange.mark_prepared()
    return exchange


def names(*seqs: int) -> list[str]:
    return [str(rollout_name(seq)) for seq in seqs]


def publish(exchange: Exchange, *seqs: int) -> None:
    for seq in seqs:
        put(exchange, {rollout_name(seq): rollout_of([1.0])})


def record(exchange: Exchange, process: str, *records: dict[str, Any]) -> None:
    lines = JsonLines(exchange.metrics_dir / f"{process}.jsonl")
    for line in records:
        lines.write(line)
    lines.close()


def test_a_rollout_found_nowhere_is_lost_and_every_other_is_accounted_for(exchange):
    record(exchange, "sampler-far-0", {"names": names(0, 1, 2)}, {"names": names(3, 4, 5)})
    # 0 and 1 are trained (1 is not deleted yet), 2 too old, 3 damaged, 4 waits; 5 is in none of these places
    publish(exchange, 1, 3, 4)
    exchange.quarantine_rollout(rollout_name(3), "damaged")
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=names(0)))
    exchange.append_journal(JournalEntry(step=1, incarnation=1, names=names(1), dropped=names(2)))
    result = summarise(exchange.root)
    counts = {
        key: result[f"rollouts_{key}"] for key in ("published", "trained", "dropped", "pending", "quarantined", "lost")
    }
    assert counts == {"published": 6, "trained": 2, "dropped": 1, "pending": 1, "quarantined": 1, "lost": 1}
    assert result["rollouts"] == {"far-0": 6}
    assert result["rollouts_trained_twice"] == 0


def test_groups_that_a_reward_failed_on_are_counted_over_all_samplers(exchange):
    record(exchange, "sampler-far-0", {"names": names(0), "unrewarded": 2}, {"names": [], "unrewarded": 3})
    record(exchange, "sampler-near-0", {"names": [], "unrewarded": 1}, {"event": "swap"})
    assert summarise(exchange.root)["groups_unrewarded"] == 6


def test_the_closing_line_says_what_was_dropped_of_what_was_made(exchange):
    record(exchange, "sampler-far-0", {"names": names(0, 1, 2, 3, 4, 5)})
    exchange.append_journal(JournalEntry(step=1, incarnation=1, names=names(0, 1, 3, 4, 5)))
    assert "dropped" not in in_words(summarise(exchange.root))
    exchange.append_journal(JournalEntry(step=2, incarnation=1, names=[], dropped=names(2)))
    assert in_words(summarise(exchange.root)).endswith(", 1 of 6 rollouts dropped (16.7%)")


def test_a_rollout_in_two_steps_of_the_journal_is_trained_twice(exchange):
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=names(0, 1)))
    exchange.append_journal(JournalEntry(step=1, incarnation=1, names=names(1, 2)))
    assert summarise(exchange.root)["rollouts_trained_twice"] == 1


def test_a_step_selected_again_after_a_crash_counts_once(exchange):
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=names(0)))
    exchange.append_journal(JournalEntry(step=0, incarnation=2, names=names(0)))
    assert summarise(exchange.root)["rollouts_trained_twice"] == 0


def test_a_rollout_published_before_its_sampler_was_killed_is_pending_not_lost(exchange):
    publish(exchange, 0)  # killed before it wrote its metrics
    result = summarise(exchange.root)
    assert (result["rollouts_pending"], result["rollouts_lost"]) == (1, 0)


def test_rewards_are_compared_over_tenths_of_the_steps_and_lag_over_all(exchange):
    steps = [{"step": s, "reward": 0.1 * s, "lag/mean": float(s % 4), "lag/max": float(s % 7)} for s in range(1, 21)]
    record(exchange, "learner", *steps)
    exchange.write_learner(LearnerHeartbeat(step=20, finished=True))
    result = summarise(exchange.root)
    assert result["reward_first_tenth"] == pytest.approx((0.1 + 0.2) / 2)  # 2 of 20 steps
    assert result["reward_last_tenth"] == pytest.approx((1.9 + 2.0) / 2)
    assert result["lag_mean"] == pytest.approx(1.5)  # 0, 1, 2, 3 five times each
    assert result["lag_max"] == 6
    assert result["steps"] == 20


def test_steps_repeated_after_a_crash_count_as_they_were_trained_last(exchange):
    first = [{"step": step, "reward": 0.0} for step in (1, 2, 3)]
    again = [{"step": step, "reward": 1.0} for step in (2, 3)]
    record(exchange, "learner", *first, *again)
    assert summarise(exchange.root)["reward_last_tenth"] == 1.0
    assert summarise(exchange.root)["reward_first_tenth"] == 0.0


def test_swaps_are_counted_and_the_largest_canary_difference_kept(exchange):
    swaps = [
        {"event": "swap", "version_step": s, "canary/mean_abs_diff": d} for s, d in ((0, 1e-6), (4, 3e-6), (8, 2e-6))
    ]
    record(exchange, "sampler-far-0", *swaps)
    result = summarise(exchange.root)
    assert result["swaps"] == {"far-0": 3}
    assert result["canary_mean_abs_diff"] == 3e-6


def test_evaluations_give_best_last_and_the_gap(exchange):
    for step, mean in ((0, 0.2), (10, 0.6), (20, 0.5)):
        exchange.write_eval(Version(step, 1), Evaluation(average=mean, sets={"sums": {"mean": mean}}))
    assert summarise(exchange.root)["evaluations"] == {"sums": {"best": 0.6, "last": 0.5, "gap": pytest.approx(0.1)}}


def test_several_evaluation_sets_have_an_average_with_a_gap_of_its_own(exchange):
    for step, (amc, aime) in {0: (0.4, 0.2), 5: (0.6, 0.2), 9: (0.5, 0.1)}.items():
        sets = {"amc": {"mean": amc}, "aime": {"mean": aime}}
        exchange.write_eval(Version(step, 1), Evaluation(sets=sets, average=(amc + aime) / 2))
    # averages 0.3, 0.4, 0.3: best at step 5, where amc is best as well; aime fell by 0.1 since
    evaluations = summarise(exchange.root)["evaluations"]
    assert evaluations["average"] == {"best": 0.4, "last": pytest.approx(0.3), "gap": pytest.approx(0.1)}
    assert evaluations["aime"]["gap"] == pytest.approx(0.1)


def test_a_run_without_a_step_has_a_summary_without_numbers(exchange):
    result = write_summary(exchange.root)
    assert json.loads(exchange.summary_file.read_text()) == result
    assert result["reward_first_tenth"] is None
    assert result["lag_max"] is None
    assert in_words(result) == "demo: 0 of 20 steps in 0 min 0 s"
