import numpy as np
import pytest

from heterorl.errors import UserError
from heterorl.spec.run import RewardSpec
from heterorl_sampler.rewards import Rewards

ROW = {"id": 7, "prompt": "2+2=", "answer": "4", "columns": {"problem": "2+2=", "answer": "It is 4", "level": 3}}


def values(reward: RewardSpec, texts: list[str], lengths: list[int] | None = None) -> list[float]:
    with Rewards([reward], boxed_only=True) as rewards:
        _, terms = rewards.score(texts, lengths or [10] * len(texts), [False] * len(texts), ROW)
    (term,) = terms.values()
    assert term.dtype == np.float32
    return term.tolist()


def test_accuracy_is_one_where_the_box_holds_the_answer() -> None:
    assert values(RewardSpec(name="accuracy"), [r"\boxed{4}", r"\boxed{5}", "4", r"\boxed{2} \boxed{4}"]) == [
        1,
        0,
        0,
        1,
    ]


def test_boxed_wants_a_box_with_something_in_it() -> None:
    assert values(RewardSpec(name="boxed"), [r"\boxed{5}", r"\boxed{}", "5", r"\boxed{5"]) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>two and two</think>4", 1),
        ("\n<think>\n\n</think>\n\n4", 1),  # Qwen3 without thinking
        ("<think>two and two</think>  ", 0),
        ("<think>two and two", 0),
        ("two and two</think>4", 0),
        ("So: <think>two and two</think>4", 0),
        ("<think><think>a</think>4", 0),
        ("<think>a</think><think>b</think>4", 0),
        ("4", 0),
    ],
)
def test_format_is_a_thought_and_then_an_answer(text: str, expected: int) -> None:
    assert values(RewardSpec(name="format"), [text]) == [expected]


def test_tag_count_gives_a_half_for_each_tag_that_stands_once() -> None:
    texts = ["<think>a</think>4", "<think>a", "a</think>", "<think><think>a</think>", "a"]
    assert values(RewardSpec(name="tag_count"), texts) == [1, 0.5, 0.5, 0.5, 0]


def test_length_falls_with_the_length_and_never_praises_a_wrong_answer() -> None:
    right, wrong = r"\boxed{4}", r"\boxed{5}"
    # d = 1/2 - min(L, 100)/100: L = 0, 25, 100, 300 give 0.5, 0.25, -0.5, -0.5
    reward = RewardSpec(name="length", max_length=100)
    assert values(reward, [right] * 4, [0, 25, 100, 300]) == [0.5, 0.25, -0.5, -0.5]
    assert values(reward, [wrong] * 4, [0, 25, 100, 300]) == [0, 0, -0.5, -0.5]


def test_cosine_rises_from_wrong_and_falls_from_right() -> None:
    right, wrong = r"\boxed{4}", r"\boxed{5}"
    # half a cosine: at 0 the start, at M/2 the middle, from M on the end; at M/3, (1 + cos 60°)/2 = 3/4 of the way from the end
    reward = RewardSpec(name="cosine", max_length=90)
    assert values(reward, [right] * 5, [0, 30, 45, 90, 900]) == pytest.approx([1, 0.875, 0.75, 0.5, 0.5])
    assert values(reward, [wrong] * 5, [0, 30, 45, 90, 900]) == pytest.approx([-1, -0.875, -0.75, -0.5, -0.5])


def test_repetition_counts_distinct_word_sequences() -> None:
    reward = RewardSpec(name="repetition", ngram_size=2, max_penalty=-1.0)
    # "a b a b a": ab ba ab ba, 2 of 4 distinct; "a a a a a": 1 of 4 distinct; all differ; too short for a pair
    assert values(reward, ["a b A b a", "a a a a a", "a b c d", "a"]) == [-0.5, -0.75, 0, 0]
    assert values(reward.model_copy(update={"max_penalty": -2.0}), ["a b a b a"]) == [-1]


def test_language_is_the_share_of_letters_outside_formulas() -> None:
    english, chinese = RewardSpec(name="language"), RewardSpec(name="language", language="zh")
    texts = ["It is four", "答案是四", "ab答案", r"$x$ \frac{1}{2} 4"]
    assert values(english, texts) == [1, 0, 0.5, 1]
    assert values(chinese, [*texts[:3], r"答案 $x+y$ \(z\) \boxed{4}"]) == [0, 1, 0.5, 1]


def test_reasoning_steps_are_full_at_three() -> None:
    texts = ["Step 1: a\nStep 2: b\nStep 3: c", "1. a\n2) b", "First, a. Finally, b", "- a\n- b\n- c\n- d", "a, then b"]
    assert values(RewardSpec(name="reasoning_steps"), texts) == pytest.approx([1, 2 / 3, 2 / 3, 1, 0])


# ── the sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_weights_apply_to_the_sum_alone() -> None:
    spec = [RewardSpec(name="accuracy", weight=2.0), RewardSpec(name="boxed", weight=-0.5)]
    with Rewards(spec, boxed_only=True) as rewards:
        total, terms = rewards.score([r"\boxed{4}", r"\boxed{5}", "4"], [3, 3, 1], [False] * 3, ROW)
    assert total.tolist() == [1.5, -0.5, 0]
    assert total.dtype == np.float32
    assert {name: term.tolist() for name, term in terms.items()} == {"accuracy": [1, 0, 0], "boxed": [1, 1, 0]}


def test_rewards_of_one_name_get_terms_of_their_own() -> None:
    spec = [
        RewardSpec(name="repetition", ngram_size=1),
        RewardSpec(name="repetition", ngram_size=2),
        RewardSpec(name="boxed"),
    ]
    with Rewards(spec, boxed_only=True) as rewards:
        _, terms = rewards.score(["a a b"], [3], [False], ROW)
    assert list(terms) == ["repetition", "repetition_2", "boxed"]
    assert terms["repetition"] == pytest.approx(-1 / 3)
    assert terms["repetition_2"] == 0


# ── custom ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def my_rewards(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def answer_in_text(completions, answer, prompts, level, **columns):\n"
        "    return [float(a in c) + level[0] for a, c in zip(answer, completions)]\n"
        "def one_too_few(completions, **columns): return [0.0] * (len(completions) - 1)\n"
        "def nothing(completions, **columns): return [None for c in completions]\n"
        "def not_a_number(completions, **columns): return [float('nan') for c in completions]\n"
        "def fails(completions, **columns): return columns['colour']\n"
        "CONSTANT = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_rewards")
def test_a_custom_reward_sees_completions_and_columns_as_lists() -> None:
    reward = RewardSpec(name="custom", path="my_rewards.answer_in_text")
    assert values(reward, ["it is 4", "it is 5"]) == [4, 3]  # level 3, plus 1 for the answer, which is the reference
    with Rewards([reward], boxed_only=True) as rewards:
        assert list(rewards.score(["4"], [1], [False], ROW)[1]) == ["answer_in_text"]


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards.one_too_few", "1 values for 2 completions"),
        ("my_rewards.nothing", "must be a finite number"),
        ("my_rewards.not_a_number", "must be a finite number"),
        ("my_rewards.fails", r"failed on row 7: KeyError: 'colour'"),
    ],
)
def test_a_custom_reward_that_gives_no_number_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        values(RewardSpec(name="custom", path=path), ["a", "b"])


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize("path", ["no_such_module.f", "my_rewards.no_such_function", "my_rewards.CONSTANT", "f"])
def test_a_custom_path_that_leads_nowhere_is_refused_before_the_run(path: str) -> None:
    with pytest.raises(UserError, match=f"custom reward {path} "):
        Rewards([RewardSpec(name="custom", path=path)], boxed_only=True)
