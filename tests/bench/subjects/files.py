"""Rollout files: their size, and the time to make and read one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from bench import reference
from bench.benchmark import Pair, Surroundings, at_most, benchmark, seconds
from builders import spec_of
from heterorl.exchange.rollout import Provenance, Rollout
from heterorl.exchange.version import Version

GROUP, PROMPT, COMPLETION = 8, 512, 1024
FILL = 0.4
VOCABULARY = 151_936
FILES = 16


@cache
def rollouts() -> list[Rollout]:
    """Groups with a prompt of the full length, and completions of 0.4 of theirs on average.

    Tokens are drawn by Zipf's law, as those of text, and numbered at random; log-probabilities have its skew: most
    tokens are nearly certain.
    """
    draw = np.random.default_rng(0)
    number = draw.permutation(VOCABULARY).astype(np.int32)
    provenance = Provenance.of(spec_of(), "0" * 64)

    def tokens(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        ranks = VOCABULARY ** draw.random(count)  # Zipf's law with exponent 1: log-uniform ranks
        return number[ranks.astype(np.int64) % VOCABULARY]

    made = []
    for row in range(FILES):
        lengths = np.ceil(draw.beta(1.2, 1.8, GROUP) * COMPLETION).astype(np.int32)  # mean 0.4
        count = int(lengths.sum())
        made.append(
            Rollout(
                prompt_ids=tokens(PROMPT),
                completion_ids=tokens(count),
                lengths=lengths,
                logp=-draw.gamma(0.3, 1.0, count).astype(np.float32),
                versions=((Version(12, 1), count),),
                rewards=draw.integers(0, 2, GROUP).astype(np.float32),
                truncated=lengths == COMPLETION,
                provenance=provenance,
                lease_epoch=1,
                reward_terms={"math": draw.integers(0, 2, GROUP).astype(np.float32)},
                meta={"row_id": row},
            )
        )
    return made


def as_batch(rollout: Rollout) -> dict[str, object]:
    """The same group as the reference has it."""
    cuts = np.cumsum(rollout.lengths)[:-1]
    return reference.padded(
        [rollout.prompt_ids] * GROUP,
        np.split(rollout.completion_ids, cuts),
        np.split(rollout.logp, cuts),
        rollout.rewards,
        max_prompt=PROMPT,
        max_completion=COMPLETION,
    )


def gate() -> None:
    """Every array of every rollout comes back as it was, bit by bit, and the reference's holds the same tokens."""
    for rollout in rollouts():
        back = Rollout.from_bytes(rollout.to_bytes())
        for name in ("prompt_ids", "completion_ids", "lengths", "logp", "rewards", "truncated"):
            ours, theirs = getattr(rollout, name), getattr(back, name)
            assert ours.dtype == theirs.dtype, f"{name} is {theirs.dtype}"
            assert ours.tobytes() == theirs.tobytes(), f"{name} is not what was written"
        assert back.reward_terms.keys() == rollout.reward_terms.keys(), "other reward terms"
        ours, theirs = ((r.provenance, r.meta, r.versions) for r in (rollout, back))
        assert ours == theirs, "another header"
        batch = reference.unpickled(reference.pickled(as_batch(rollout)))
        kept = batch["completion_mask"].bool()
        np.testing.assert_array_equal(batch["completion_ids"][kept].numpy(), rollout.completion_ids)
        np.testing.assert_array_equal(batch["old_per_token_logps"][kept].numpy(), rollout.logp)


@benchmark(
    "8-bytes",
    what=f"rollout file of {GROUP} x ({PROMPT} + {COMPLETION}), mean/max {FILL}: bytes",
    peer="padded, pickled (torch.save)",
    target=at_most(0.12),
    gate="round trip exact",
    limit="6-8 B a token",
    unit="B",
)
def rollout_bytes(at: Surroundings) -> Iterator[Pair]:
    batches = [as_batch(rollout) for rollout in rollouts()]
    yield Pair(
        lambda: sum(len(rollout.to_bytes()) for rollout in rollouts()) / FILES,
        lambda: sum(len(reference.pickled(batch)) for batch in batches) / FILES,
        gate,
    )


@benchmark(
    "8-time",
    what="the same file: encode and decode, checks included",
    peer="padded, pickled (torch.save, torch.load)",
    target=at_most(0.5),
    gate="round trip exact",
    limit="one pass over the bytes",
)
def rollout_time(at: Surroundings) -> Iterator[Pair]:
    batches = [as_batch(rollout) for rollout in rollouts()]
    yield Pair(
        seconds(lambda: [Rollout.from_bytes(rollout.to_bytes()) for rollout in rollouts()]),
        seconds(lambda: [reference.unpickled(reference.pickled(batch)) for batch in batches]),
        gate,
    )
