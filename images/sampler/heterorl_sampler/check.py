"""The sampler's part of `heterorl check`: the rewards, loaded as a run would, on a right and on a wrong answer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable

from heterorl.errors import UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Completion
from heterorl_sampler.rewards import Group, Row
from heterorl_sampler.sample import load_rewards
from heterorl_sampler.scoring import Decoder, Rewards, Scored, build_rewards

ROWS_READ = 100
_THOUGHT = "Let me think about it."


def check(exchange: Exchange) -> None:
    """Score two answers to the first problem and print their rewards. Raises UserError for rewards that fail.

    The tokenizer and the training problems are those that the learner's part has left.
    """
    rows = list(itertools.islice(exchange.rows("train"), ROWS_READ))
    row, tokenizer = rows[0], exchange.tokenizer()
    decoder = Decoder(tokenizer)
    thinks = exchange.spec.data.prompt_template == "think"
    boxes = exchange.spec.data.prompt_template != "raw"
    answers = (row["answer"], another_answer(row, rows))
    texts = [completion(answer, decoder.opened(row), thinks=thinks, boxes=boxes) for answer in answers]
    token_ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    group = decoder.group(row, [Completion(ids, [], truncated=False) for ids in token_ids])
    with build_rewards(exchange.spec) as rewards:
        load_rewards(exchange, rewards)
        scored = _score(rewards, group)
    for place, kind in enumerate(("right", "wrong")):
        each = ", ".join(f"{name} {values[place]:g}" for name, values in scored.terms.items())
        print(f"reward    row {row['id']}: {kind} answer {texts[place]!r} scores {scored.rewards[place]:g} ({each})")
    if scored.rewards[0] <= scored.rewards[1]:
        print("warning: the right answer scores no more than the wrong one; look at the answers, or at the rewards")


def _score(rewards: Rewards, group: Group) -> Scored:
    scores = rewards.score([group], threading.Event())
    if scores.failure or scores.groups[0] is None:
        raise UserError(f"{scores.failure or 'the rewards leave this group out'}; the row was {group.row['id']}")
    return scores.groups[0]


def another_answer(row: Row, rows: Iterable[Row]) -> str:
    """An answer of another row that reads otherwise; 0, or 1, where there is none."""
    others = (other["answer"] for other in rows if other["answer"].strip() not in ("", row["answer"].strip()))
    return next(others, "1" if row["answer"].strip() == "0" else "0")


def completion(answer: str, opened: str, *, thinks: bool, boxes: bool) -> str:
    r"""What a model might write that gives this answer, after what the chat template has `opened` for it."""
    text = f"\\boxed{{{answer}}}" if boxes else answer
    if "</think>" in opened:
        return text
    if "<think>" in opened:
        return f"{_THOUGHT}\n</think>\n\n{text}"
    return f"<think>\n{_THOUGHT}\n</think>\n\n{text}" if thinks else text
