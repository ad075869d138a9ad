import numpy as np
import pytest
import torch

from heterorl_learner.engines.torch_ddp import MicroBatch, Sequence, micro_batch
from heterorl_learner.train_step import balance, pack, plan


def sequence(prompt: int, completion: int, group: int = 0, first: int = 0) -> Sequence:
    """Tokens count up from `first`, so that each can be told apart."""
    ids = np.arange(first, first + prompt + completion, dtype=np.int32)
    return Sequence(ids[:prompt], ids[prompt:], -ids[prompt:].astype(np.float32), group, advantage=float(group))


def drawn(number: int, seed: int = 0, group_size: int = 4) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [
        sequence(int(rng.integers(1, 20)), int(rng.integers(1, 60)), i // group_size, 100 * i) for i in range(number)
    ]


def completions(ranks: list[list[MicroBatch]]) -> list[tuple[int, ...]]:
    found = []
    for batch in (batch for batches in ranks for batch in batches):
        for i in range(len(batch.lengths)):
            found.append(tuple(batch.target_ids[batch.seq_ids == i].tolist()))
    return sorted(found)


def test_a_pack_is_laid_out_as_worked_by_hand() -> None:
    # prompt 10 11 12, completion 13 14; prompt 20, completion 21 22. The last token of each is no input.
    batch = micro_batch([sequence(3, 2, group=7, first=10), sequence(1, 2, group=5, first=20)])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.longest == 4
    assert batch.logit_index.tolist() == [2, 3, 4, 5]  # 13 is predicted at the position of 12, and so on
    assert batch.target_ids.tolist() == [13, 14, 21, 22]
    assert batch.sampler_logp.tolist() == [-13, -14, -21, -22]
    assert batch.seq_ids.tolist() == [0, 0, 1, 1]
    assert batch.group_ids.tolist() == [0, 1]
    assert batch.lengths.tolist() == [2, 2]
    assert batch.advantages.tolist() == [7, 5]


def test_an_empty_micro_batch_holds_one_token_and_nothing_for_the_loss() -> None:
    batch = micro_batch([])
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 1)
    for name in ("logit_index", "target_ids", "sampler_logp", "seq_ids", "group_ids", "lengths", "advantages"):
        assert getattr(batch, name).shape == (0,), name
    assert batch.logit_index.dtype == torch.long
    assert batch.cu_seqlens.tolist() == [0, 1]


def test_packs_take_the_longest_first_and_fill_gaps() -> None:
    # Input tokens 9, 6, 4, 3, 1 under a budget of 10: [9 1], [6 4], [3].
    sizes = [3, 9, 1, 6, 4]
    packs = pack([[sequence(1, size)] for size in sizes], token_budget=10)
    assert [[s.num_tokens for s in p] for p in packs] == [[9, 1], [6, 4], [3]]


def test_padded_packs_count_each_row_as_long_as_the_longest() -> None:
    # Rows of 9, 6, 4, 3, 1 under a budget of 12: 9 + 9 is too much, 6 + 6 is not, a third row of 6 is; then 3 + 3.
    sizes = [3, 9, 1, 6, 4]
    packs = pack([[sequence(1, size)] for size in sizes], token_budget=12, padded=True)
    assert [[s.num_tokens for s in p] for p in packs] == [[9], [6, 4], [3, 1]]


def test_a_sequence_above_the_budget_goes_alone() -> None:
    packs = pack([[sequence(1, 4)], [sequence(1, 50)], [sequence(1, 4)]], token_budget=10)
    assert [[s.num_tokens for s in p] for p in packs] == [[50], [4, 4]]


def test_balance_gives_the_longest_item_to_the_rank_with_the_fewest_tokens() -> None:
    # 8 | 7, 6 | 5 -> 8+5, 7+6 and then 2 to either: the first.
    shares = balance([[sequence(1, size)] for size in (2, 5, 6, 7, 8)], 2)
    assert [[item[0].num_tokens for item in share] for share in shares] == [[8, 5, 2], [7, 6]]


def plans(
    sequences: list[Sequence], budget: int, world_size: int, *, whole_groups: bool = False
) -> list[list[MicroBatch]]:
    """The plan of every rank."""
    return [
        plan(sequences, budget, rank=rank, world_size=world_size, whole_groups=whole_groups)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("whole_groups", [False, True])
def test_every_sequence_is_planned_once_on_ranks_in_step(world_size: int, whole_groups: bool) -> None:
    sequences = drawn(40)
    ranks = plans(sequences, 128, world_size, whole_groups=whole_groups)
    assert completions(ranks) == sorted(tuple(s.completion_ids.tolist()) for s in sequences)
    assert len({len(batches) for batches in ranks}) == 1
    if not whole_groups:
        assert max(batch.num_tokens for batches in ranks for batch in batches) <= 128


def test_more_ranks_than_sequences_leaves_empty_micro_batches() -> None:
    ranks = plans(drawn(2), 512, 3)
    assert [[len(batch.lengths) for batch in batches] for batches in ranks] == [[1], [1], [0]]


def test_whole_groups_are_never_split() -> None:
    ranks = plans(drawn(40, group_size=8), 64, 2, whole_groups=True)
    found = [a for batches in ranks for batch in batches for a in set(batch.advantages.tolist())]  # advantage = group
    assert sorted(found) == [0, 1, 2, 3, 4]


def test_the_same_sequences_give_the_same_plan() -> None:
    first, second = (plans(drawn(30), 100, 2) for _ in range(2))
    assert completions(first) == completions(second)
    for one, other in zip([b for r in first for b in r], [b for r in second for b in r], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_ranks_carry_about_the_same_number_of_tokens_and_packs_are_full() -> None:
    sequences = drawn(200)
    ranks = plans(sequences, 256, 2)
    loads = [sum(batch.num_tokens for batch in batches) for batches in ranks]
    assert abs(loads[0] - loads[1]) < 0.02 * sum(loads)
    assert sum(loads) > 0.95 * 256 * sum(len(batches) for batches in ranks)
