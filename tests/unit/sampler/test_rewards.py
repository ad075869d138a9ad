import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from heterorl.spec.run import RewardSpec
from heterorl_sampler.rewards import REWARDS, Group, custom, load, values

ROW = {"id": 7, "prompt": "2+2=", "answer": "4", "columns": {"problem": "2+2=", "answer": "It is 4", "level": 3}}


def group(texts: Sequence[str], lengths: Sequence[int] = (), opened: str = "", **given: object) -> Group:
    """Completions of one prompt; right are those that say 4 in a box."""
    return Group(
        **{
            "texts": list(texts),
            "turns": [opened + text for text in texts],
            "lengths": list(lengths or [10] * len(texts)),
            "row": ROW,
            "token_ids": [[1, 2, 3]] * len(texts),
            "correct": [r"\boxed{4}" in text for text in texts],
            **given,
        }
    )


def of(reward: RewardSpec, texts: Sequence[str], lengths: Sequence[int] = (), opened: str = "") -> list[float]:
    return REWARDS[reward.name](group(texts, lengths, opened), reward)


def test_boxed_wants_a_box_with_something_in_it() -> None:
    assert of(RewardSpec(name="boxed"), [r"\boxed{5}", r"\boxed{}", "5", r"\boxed{5"]) == [1, 0, 0, 0]


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
    assert of(RewardSpec(name="format"), [text]) == [expected]


def test_tag_count_gives_a_half_for_each_tag_that_stands_once() -> None:
    texts = ["<think>a</think>4", "<think>a", "a</think>", "<think><think>a</think>", "a"]
    assert of(RewardSpec(name="tag_count"), texts) == [1, 0.5, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("opened", "text", "format", "tags"),
    [
        ("<think>\n", "two and two</think>\n4", 1, 1),  # the chat template has opened it
        ("<think>\n", "two and two", 0, 0.5),
        ("<think>\n", "<think>two</think>4", 0, 0.5),  # and again, by the model
        ("<think>\n\n</think>\n\n", "4", 1, 1),  # thinking switched off
        ("<think>\n\n</think>\n\n", "", 0, 1),
        ("<think>\n\n</think>\n\n", "<think>two</think>4", 0, 0),
    ],
)
def test_rewards_of_the_form_see_the_turn_from_where_the_template_opened_it(
    opened: str, text: str, format: int, tags: float
) -> None:
    assert of(RewardSpec(name="format"), [text], opened=opened) == [format]
    assert of(RewardSpec(name="tag_count"), [text], opened=opened) == [tags]


def test_length_falls_with_the_length_and_never_praises_a_wrong_answer() -> None:
    right, wrong = r"\boxed{4}", r"\boxed{5}"
    # d = 1/2 - min(L, 100)/100: L = 0, 25, 100, 300 give 0.5, 0.25, -0.5, -0.5
    reward = RewardSpec(name="length", max_length=100)
    assert of(reward, [right] * 4, [0, 25, 100, 300]) == [0.5, 0.25, -0.5, -0.5]
    assert of(reward, [wrong] * 4, [0, 25, 100, 300]) == [0, 0, -0.5, -0.5]


def test_cosine_rises_from_wrong_and_falls_from_right() -> None:
    right, wrong = r"\boxed{4}", r"\boxed{5}"
    # half a cosine: at 0 the start, at M/2 the middle, from M on the end; at M/3, (1 + cos 60°)/2 = 3/4 of the way from the end
    reward = RewardSpec(name="cosine", max_length=90)
    assert of(reward, [right] * 5, [0, 30, 45, 90, 900]) == pytest.approx([1, 0.875, 0.75, 0.5, 0.5])
    assert of(reward, [wrong] * 5, [0, 30, 45, 90, 900]) == pytest.approx([-1, -0.875, -0.75, -0.5, -0.5])


def test_repetition_counts_distinct_word_sequences() -> None:
    reward = RewardSpec(name="repetition", ngram_size=2, max_penalty=-1.0)
    # "a b a b a": ab ba ab ba, 2 of 4 distinct; "a a a a a": 1 of 4 distinct; all differ; too short for a pair
    assert of(reward, ["a b A b a", "a a a a a", "a b c d", "a"]) == [-0.5, -0.75, 0, 0]
    assert of(reward.model_copy(update={"max_penalty": -2.0}), ["a b a b a"]) == [-1]


def test_language_is_the_share_of_letters_outside_formulas() -> None:
    english, chinese = RewardSpec(name="language"), RewardSpec(name="language", language="zh")
    texts = ["It is four", "答案是四", "ab答案", r"$x$ \frac{1}{2} 4"]
    assert of(english, texts) == [1, 0, 0.5, 1]
    assert of(chinese, [*texts[:3], r"答案 $x+y$ \(z\) \boxed{4}"]) == [0, 1, 0.5, 1]


def test_reasoning_steps_are_full_at_three() -> None:
    texts = ["Step 1: a\nStep 2: b\nStep 3: c", "1. a\n2) b", "First, a. Finally, b", "- a\n- b\n- c\n- d", "a, then b"]
    assert of(RewardSpec(name="reasoning_steps"), texts) == pytest.approx([1, 2 / 3, 2 / 3, 1, 0])


# ── custom ───────────────────────────────────────────────────────────────────────────────────────────────────────────
MODULE = """
import numpy as np
def answer_in_text(completions, answer, prompts, level, **columns):
    return [float(a in c) + level[0] for a, c in zip(answer, completions)]
def everything(**arguments): return [len(v) for v in arguments.values()][: len(arguments["completions"])]
def seen(**arguments): seen.last = arguments; return [0.0 for _ in arguments["completions"]]
def only_two(completions, level): return [level[0] + len(c) for c in completions]
def wants_more(completions, colour): return [0.0 for _ in completions]
async def later(completions, **columns): return [1.0 for _ in completions]
class Judge:
    async def __call__(self, completions, **columns): return [2.0 for _ in completions]
judge = Judge()
def arrays(completions, **columns): return np.arange(len(completions), dtype=np.float32)
def some(completions, **columns): return [None if c == "skip" else True for c in completions]
def one_too_few(completions, **columns): return [0.0] * (len(completions) - 1)
def not_a_number(completions, **columns): return [float("nan") for c in completions]
def words(completions, **columns): return ["1.0" for c in completions]
def nothing(completions, **columns): return None
CONSTANT = 3
"""


@pytest.fixture(scope="module", autouse=True)
def my_rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "given_rewards.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield folder / "given_rewards.py"
    sys.path.remove(str(folder))


def found(function: str, *groups: Group) -> list[float | None]:
    reward = RewardSpec(name="custom", path=f"given_rewards.{function}")
    return values(reward.model_dump(mode="json"), [asdict(each) for each in groups])


def test_a_custom_reward_sees_completions_and_columns_as_lists() -> None:
    # level 3, plus 1 for the answer, which is the reference and not the column of that name
    assert found("answer_in_text", group(["it is 4", "it is 5"])) == [4, 3]


def test_a_batched_reward_sees_the_completions_of_all_groups_one_after_the_other() -> None:
    other = {"id": 8, "prompt": "3+3=", "answer": "6", "columns": {"level": 5, "hint": "six"}}
    custom([group(["a", "b"]), group(["c"], row=other)], "given_rewards.seen")
    import given_rewards

    seen = given_rewards.seen.last
    assert seen["completions"] == ["a", "b", "c"]
    assert seen["prompts"] == ["2+2=", "2+2=", "3+3="]
    assert seen["answer"] == ["4", "4", "6"]
    assert seen["level"] == [3, 3, 5]
    assert seen["hint"] == [None, None, "six"]  # a column that only some rows have
    assert seen["completion_ids"] == [[1, 2, 3]] * 3


def test_completions_of_a_conversation_are_messages_and_turns_are_texts() -> None:
    asked = [{"role": "user", "content": "2+2="}]
    custom([group(["4"], opened="<think>\n", row={**ROW, "prompt": asked})], "given_rewards.seen")
    import given_rewards

    seen = given_rewards.seen.last
    assert seen["prompts"] == [asked]
    assert seen["completions"] == [[{"role": "assistant", "content": "4"}]]
    assert seen["turns"] == ["<think>\n4"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("only_two", [4, 5]),  # no **columns: it gets what it names
        ("later", [1, 1]),
        ("judge", [2, 2]),
        ("arrays", [0, 1]),
    ],
)
def test_functions_of_every_kind_are_called(function: str, expected: list[float]) -> None:
    assert found(function, group(["a", "bb"])) == expected


def test_none_is_kept_for_does_not_apply_and_truth_is_a_number() -> None:
    assert found("some", group(["skip", "b"])) == [None, 1.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one_too_few", "1 values for 2 completions"),
        ("not_a_number", "must be a finite number"),
        ("words", "must be a finite number"),
        ("nothing", "not iterable"),
        ("wants_more", "missing a required argument: 'colour'; a custom reward is called with .*level.*completions"),
    ],
)
def test_what_is_no_number_for_each_completion_is_refused(function: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        found(function, group(["a", "b"]))


@pytest.mark.parametrize("path", ["no_such_module.f", "given_rewards.no_such_function", "given_rewards.CONSTANT"])
def test_a_path_that_leads_nowhere_does_not_load(path: str) -> None:
    with pytest.raises((ImportError, AttributeError, TypeError)):
        load(RewardSpec(name="custom", path=path).model_dump(mode="json"))


def test_the_fingerprint_of_a_custom_reward_is_that_of_its_source(my_rewards: Path) -> None:
    reward = RewardSpec(name="custom", path="given_rewards.seen").model_dump(mode="json")
    before = load(reward)
    assert load(reward) == before
    my_rewards.write_text(MODULE + "# changed\n")
    assert load(reward) != before
