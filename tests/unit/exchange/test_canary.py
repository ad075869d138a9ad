"""The canary: its texts, its statistic and its one check."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from heterorl.data.tokenizer import load_tokenizer
from heterorl.errors import CanaryMismatch
from heterorl.exchange.canary import CANARY_TOKENS, Canary, canary_texts
from heterorl.exchange.version import Version
from heterorl_learner.tiny import build_tokenizer

CANARY = Canary([[1, 2, 3], [4, 5]], [[-0.5, -0.25], [-1.0]])


def test_the_statistic_is_the_mean_absolute_difference_over_the_tokens_of_all_texts() -> None:
    # |-0.5 + 0.4|, |-0.25 + 0.25| and |-1.0 + 1.2|: 0.1 + 0 + 0.2 over three tokens
    assert CANARY.mean_abs_diff([[-0.4, -0.25], [-1.2]]) == pytest.approx(0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_fails_every_tolerance(value: float) -> None:
    scores = [[-0.5, value], [-1.0]]
    assert CANARY.mean_abs_diff(scores) == math.inf
    with pytest.raises(CanaryMismatch, match="inf"):
        CANARY.check(Version(3, 1), lambda texts: scores, 100.0)


def test_one_token_that_rounding_moved_far_passes_and_a_shift_of_all_does_not() -> None:
    texts = [list(range(CANARY_TOKENS)), list(range(CANARY_TOKENS))]
    logp = [[-2.0] * (CANARY_TOKENS - 1)] * 2
    canary = Canary(texts, logp)
    far = [[-2.9, *[-2.0] * (CANARY_TOKENS - 2)], logp[1]]
    assert canary.check(Version(3, 1), lambda _: far, 0.1) == pytest.approx(0.9 / 542)
    with pytest.raises(CanaryMismatch, match=r"v00000003-i0001.* 0\.2 on average.*at most 0\.1"):
        canary.check(Version(3, 1), lambda _: [[-2.2] * (CANARY_TOKENS - 1)] * 2, 0.1)


def test_a_tokenizer_that_spells_prose_gets_two_different_texts_of_prose(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()  # one token a byte
    first, second = canary_texts(tokenizer, [[5, 6, 7]])
    assert tokenizer.decode(first).startswith("The ferry left the harbour a few minutes after six")
    assert tokenizer.decode(second).startswith("A loaf of bread needs four things")
    assert (len(first), len(second)) == (CANARY_TOKENS, CANARY_TOKENS)


def test_a_tokenizer_without_letters_gets_the_prompts_of_the_run(tiny_model_dir: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tiny_model_dir(tokenizer=True))
    first, second = canary_texts(tokenizer, [[5, 6, 7]])
    assert first[:6] == [5, 6, 7, 5, 6, 7]
    assert first != second
    assert (len(first), len(second)) == (CANARY_TOKENS, CANARY_TOKENS)
