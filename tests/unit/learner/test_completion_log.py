"""The log of completions: what a line says of a group, and that the budget of bytes holds."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from builders import exchange_at, rollout_name, rollout_of, run_of
from heterorl.exchange.exchange import Exchange
from heterorl_learner.completion_log import CompletionLog, GroupLines, token_texts
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import plan, sequences


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes, in the order of their values where they are printable."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def make(root: Path, *, steps: int = 4, megabytes: float = 1.0, groups: int = 8, loss: str = "gepo") -> Exchange:
    run = run_of(
        learner={"steps": steps},
        algorithm={"groupSize": 2, "loss": {"type": loss}},
        monitoring={"logCompletions": {"maxMegabytes": megabytes, "groupsPerStep": groups}},
    )
    exchange = exchange_at(root, run)
    byte_tokenizer().save_pretrained(exchange.model_dir)
    return exchange


def batch_of(tokenizer: PreTrainedTokenizerFast, step: int, *texts: tuple[str, str], rewards=(1.0, 0.0)) -> StepBatch:
    """A group for each pair of texts, with logp -0.5 for every token."""
    rollouts = []
    for pair in texts:
        ids = [tokenizer.encode(text) for text in pair]
        rollout = rollout_of(rewards, [len(part) for part in ids], terms={"accuracy": rewards}, version=step)
        rollout.completion_ids[:] = np.concatenate(ids)
        rollout.prompt_ids[:] = tokenizer.encode("4+")
        rollout.meta.update(row_id=7, answer="ab")
        rollouts.append(rollout)
    return StepBatch(step, [rollout_name(i, step) for i in range(len(texts))], rollouts, wait_s=0.0)


def lines(exchange: Exchange) -> list[dict]:
    return [json.loads(line) for line in exchange.completions_file.read_text(encoding="utf-8").splitlines()]


def test_a_line_tells_all_of_a_group(tmp_path, tokenizer):
    exchange, batch = make(tmp_path), batch_of(tokenizer, 2, ("ab", "xyz"))
    log = CompletionLog(exchange, incarnation=3)
    for micro in plan(sequences(exchange.spec, batch.rollouts), 4):  # packs of one: the longer one goes first
        log.see(micro, micro.sampler_logp + torch.log(torch.tensor(2.0)) * (micro.lengths[0] == 2))
    log.write(batch)
    log.close()
    (line,) = lines(exchange)
    first, second = line.pop("completions")
    assert line == {
        "step": 3,
        "incarnation": 3,
        "rollout": "v00000002-i0001--far-0--s0000000000",
        "row": 7,
        "set": None,
        "prompt": "4+",
        "reference": "ab",
    }
    # gepo: reward - mean of the group, (1, 0) - 0.5
    assert first == {
        "text": "ab", "reward": 1.0, "parts": {"accuracy": 1.0}, "advantage": 0.5, "truncated": False,
        "tokens": [1, 1], "versions": [[2, 2]], "ratios": [2.0, 2.0],
    }  # fmt: skip
    assert (second["text"], second["advantage"], second["ratios"]) == ("xyz", -0.5, [1.0, 1.0, 1.0])


def test_ratios_of_a_completion_that_another_rank_trained_are_unknown(tmp_path, tokenizer):
    exchange, batch = make(tmp_path), batch_of(tokenizer, 0, ("ab", "xyz"))
    log = CompletionLog(exchange, incarnation=1)
    for micro in plan(sequences(exchange.spec, batch.rollouts), 4, rank=0, world_size=2):
        log.see(micro, micro.sampler_logp)
    log.write(batch)
    log.close()
    assert [c["ratios"] for c in lines(exchange)[0]["completions"]] == [None, [1.0, 1.0, 1.0]]


def test_a_step_that_is_tried_again_is_seen_once(tmp_path, tokenizer):
    exchange, batch = make(tmp_path), batch_of(tokenizer, 0, ("a", "b"))
    log = CompletionLog(exchange, incarnation=1)
    (micro,) = plan(sequences(exchange.spec, batch.rollouts), 100)
    log.see(micro, micro.sampler_logp * float("nan"))
    log.forget()
    log.see(micro, micro.sampler_logp)
    log.write(batch)
    log.close()
    assert [c["ratios"] for c in lines(exchange)[0]["completions"]] == [[1.0], [1.0]]


@pytest.mark.parametrize("megabytes", [0.002, 0.01])
def test_groups_are_sampled_evenly_and_never_exceed_the_budget(tmp_path, tokenizer, megabytes):
    exchange = make(tmp_path, steps=40, megabytes=megabytes)
    for incarnation, part in ((1, range(20)), (2, range(20, 40))):  # the second half by a learner that resumed
        sink = GroupLines(exchange.completions_file, exchange, incarnation)
        for step in part:
            sink.write({"batch": batch_of(tokenizer, step, *[("12345", "67890")] * 4), "seen": []})
        sink.close()
    size, steps = exchange.completions_file.stat().st_size, [line["step"] for line in lines(exchange)]
    assert megabytes * 1e6 * 0.75 < size <= megabytes * 1e6
    halves = sum(step <= 20 for step in steps), sum(step > 20 for step in steps)
    assert abs(halves[0] - halves[1]) <= 2, halves


def test_no_more_groups_of_a_step_are_logged_than_the_spec_says_and_others_in_each_step(tmp_path, tokenizer):
    exchange = make(tmp_path, steps=8, groups=3)
    log = CompletionLog(exchange, incarnation=1)
    for step in range(8):
        log.write(batch_of(tokenizer, step, *[("12", "34")] * 16))
    log.close()
    logged = lines(exchange)
    assert Counter(line["step"] for line in logged) == dict.fromkeys(range(1, 9), 3)
    assert len({line["rollout"].partition("--")[2] for line in logged}) > 6  # of the 16 places in a batch


def test_numbers_have_four_digits_and_what_is_not_finite_is_null(tmp_path, tokenizer):
    exchange = make(tmp_path)
    batch = batch_of(tokenizer, 0, ("a", "b"), rewards=(2 / 3, float("nan")))
    log = CompletionLog(exchange, incarnation=1)
    for micro in plan(sequences(exchange.spec, batch.rollouts), 4):
        log.see(micro, micro.sampler_logp + 1000.0 * micro.numbers)
    log.write(batch)
    log.close()
    first, second = lines(exchange)[0]["completions"]
    assert (first["reward"], first["parts"], first["ratios"]) == (0.6667, {"accuracy": 0.6667}, [1.0])
    assert (second["reward"], second["parts"], second["ratios"]) == (None, {"accuracy": None}, [None])


def test_which_groups_are_logged_depends_on_the_seed_alone(tmp_path, tokenizer):
    logged = []
    for folder in ("a", "b"):
        exchange = make(tmp_path / folder, steps=1, megabytes=0.0015)
        log = CompletionLog(exchange, incarnation=1)
        log.write(batch_of(tokenizer, 0, *[("12", "34")] * 16))
        log.close()
        logged.append([line["rollout"] for line in lines(exchange)])
    assert logged[0] == logged[1]
    assert 0 < len(logged[0]) < 16
    assert logged[0] != sorted(logged[0])  # not simply the first ones


def test_a_log_that_is_switched_off_writes_no_file(tmp_path, tokenizer):
    exchange = make(tmp_path, megabytes=0)
    log = CompletionLog(exchange, incarnation=1)
    log.write(batch_of(tokenizer, 0, ("a", "b")))
    log.close()
    assert not exchange.completions_file.exists()


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(tokenizer):
    ids = tokenizer.encode("aé€b")  # 1, 2, 3 and 1 bytes
    assert token_texts(tokenizer, ids) == ["a", "", "é", "", "", "€", "b"]


def test_a_character_that_was_cut_is_kept_as_it_is_decoded(tokenizer):
    ids = tokenizer.encode("a€")[:-1]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == 3
    assert "".join(pieces) == tokenizer.decode(ids)
