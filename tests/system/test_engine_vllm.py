"""Real vLLM (its CPU build) against transformers in float32, on a tied and an untied model."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import architectures
from heterorl.errors import CorruptFile, HeteroRLError, UserError
from heterorl.exchange.rollout import Completion, Sampling
from heterorl.exchange.version import Version
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and os.environ.get("HETERORL_REQUIRE") != "all",
        reason="vLLM is not installed",
    ),
]

TOLERANCE = 1e-4
BLOCK = 128  # tokens of a block of vLLM's CPU cache
LONG = [random.Random(0).randrange(2, 24) for _ in range(2 * BLOCK + 30)]
PROMPTS = [[5, 9, 2], LONG, [7, 3, 3, 12, 20, 4, 8]]
TEXTS = [[random.Random(i).randrange(2, 24) for _ in range(2 * BLOCK + 16)] for i in (1, 2)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def engine(tied, tiny_model_dir) -> Iterator[InferenceEngine]:
    engine = build_engine("vllm", tiny_model_dir(tied=tied, tokenizer=True), dtype="float32", max_model_len=400)
    yield engine
    engine.close()


@pytest.fixture
def weights(tied, tiny_model_dir):
    return lambda seed: tiny_model_dir(tied=tied, seed=seed)


@functools.cache
def logits_of(folder: Path, text: tuple[int, ...]) -> torch.Tensor:
    """[S, V], from one forward of transformers over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0]


def largest_difference(folder: Path, prompt: list[int], group: list[Completion], temperature: float = 1.0) -> float:
    """Between the engine's behaviour log-probabilities and those of transformers with the folder's weights."""
    worst = 0.0
    for completion in group:
        logp = (logits_of(folder, (*prompt, *completion.token_ids)) / temperature).log_softmax(-1)
        logp = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, (logp - torch.tensor(completion.logp)).abs().max().item())
    return worst


def scores_of(folder: Path, text: list[int]) -> torch.Tensor:
    return logits_of(folder, tuple(text))[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def score_difference(folder: Path, engine: InferenceEngine) -> float:
    return max(
        (scores_of(folder, text) - torch.tensor(scores)).abs().max().item()
        for text, scores in zip(TEXTS, engine.score(TEXTS))
    )


def test_log_probs_are_those_of_transformers_before_and_after_swaps(engine, weights):
    for seed in (0, 1, 2, 1, 0):
        engine.load_weights(weights(seed))
        groups = engine.generate(PROMPTS, 3, Sampling(max_tokens=12, temperature=0.7), seed=seed)
        for prompt, group in zip(PROMPTS, groups):
            assert len(group) == 3
            assert largest_difference(weights(seed), prompt, group, 0.7) < TOLERANCE
            assert largest_difference(weights(seed + 1), prompt, group, 0.7) > 0.1
        assert score_difference(weights(seed), engine) < TOLERANCE
        assert score_difference(weights(seed + 1), engine) > 0.1


@pytest.mark.parametrize("name", ["gemma2", "gpt2"], ids=["no head in vLLM", "other names"])
def test_tied_models_whose_head_vllm_does_not_have_or_calls_otherwise_are_swapped(name, tmp_path):
    first, second = (architectures.save(name, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    engine = build_engine("vllm", first, dtype="float32", max_model_len=300)
    try:
        for folder, other in ((first, second), (second, first)):
            engine.load_weights(folder)
            assert score_difference(folder, engine) < TOLERANCE
            assert score_difference(other, engine) > 10 * TOLERANCE
    finally:
        engine.close()


def test_a_model_that_vllm_cannot_serve_or_swap_is_refused_with_what_to_do_instead(tmp_path):
    instead = "engine: transformers samples it without vLLM"
    with pytest.raises(UserError, match=f"vLLM does not start on .*: AttributeError: 'AfmoeConfig'.*; {instead}"):
        build_engine("vllm", architectures.save("afmoe", tmp_path / "afmoe"), dtype="float32", max_model_len=300)
    experts = architectures.save("qwen3_moe", tmp_path / "experts")
    engine = build_engine("vllm", experts, dtype="float32", max_model_len=300)
    try:
        with pytest.raises(UserError, match=f"takes no new weights for it: RuntimeError: .*; {instead}"):
            engine.load_weights(experts)
    finally:
        engine.close()


def test_a_swap_that_keeps_the_prefix_cache_is_an_error_and_would_poison(engine, weights, monkeypatch):
    engine.load_weights(weights(0))
    engine.generate([LONG], 1, Sampling(max_tokens=1), seed=0)  # its two full blocks are cached now
    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "reset_prefix_cache", lambda **_: False)
        with pytest.raises(HeteroRLError, match="kept its prefix cache"):
            engine.load_weights(weights(1))
    (poisoned,) = engine.generate([LONG], 2, Sampling(max_tokens=4), seed=0)
    assert largest_difference(weights(1), LONG, poisoned) > 0.1
    engine.load_weights(weights(1))
    (clean,) = engine.generate([LONG], 2, Sampling(max_tokens=4), seed=0)
    assert largest_difference(weights(1), LONG, clean) < TOLERANCE


@pytest.mark.parametrize("stop", [(), ("1+",)], ids=["", "with a stop text"])
def test_requests_live_through_swaps_and_each_token_is_of_the_weights_it_is_marked_with(engine, weights, stop):
    sampling = Sampling(max_tokens=40, temperature=0.7, stop=stop)

    def generate(swaps: dict[int, int]) -> dict[tuple[int, ...], list[Completion]]:
        """Groups by their prompts; `swaps`: after how many steps to load the weights of which seed."""
        engine.load_weights(weights(0), Version(0, 1))
        prompts = {engine.add(prompt, 3, sampling, seed=10 + i): prompt for i, prompt in enumerate(PROMPTS)}
        made = {}
        for step in itertools.count(1):
            made |= {tuple(prompts[number]): group for number, group in engine.step()}
            if not engine.num_groups:
                return made
            if step in swaps:
                engine.load_weights(weights(swaps[step]), Version(swaps[step], 1))
                assert score_difference(weights(swaps[step]), engine) < TOLERANCE  # and no group goes on meanwhile

    undisturbed, swapped = generate({}), generate({5: 1, 12: 2, 13: 9, 14: 2})
    assert {version.step for group in swapped.values() for c in group for version, _ in c.versions} == {0, 1, 2, 9}
    for prompt, group in swapped.items():
        for before, completion in zip(undisturbed[prompt], group):
            assert sum(count for _, count in completion.versions) == len(completion.token_ids)
            assert completion.truncated == (len(completion.token_ids) == 40 and completion.token_ids[-1] != 1)
            start = 0
            for version, count in completion.versions:
                tokens = slice(start, start + count)
                start += count
                for seed in (version.step, version.step + 1):
                    text = (*prompt, *completion.token_ids)
                    logp = (logits_of(weights(seed), text) / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
                    expected = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0][tokens]
                    difference = (expected - torch.tensor(completion.logp[tokens])).abs()
                    assert difference.max() < TOLERANCE if seed == version.step else difference.max() > 0.01
            kept = completion.versions[0][1]  # what was there at the first swap is not lost, nor drawn again
            assert completion.token_ids[:kept] == before.token_ids[:kept]


def test_no_token_is_of_weights_that_the_canary_refuses(engine, weights):
    engine.load_weights(weights(0), Version(0, 1))
    engine.add(PROMPTS[0], 4, Sampling(max_tokens=200, temperature=2.0), seed=0)
    for _ in range(5):
        assert engine.step() == []
    engine.load_weights(weights(1), Version(1, 1))
    engine.score(TEXTS)
    engine.load_weights(weights(0), Version(0, 1))
    engine.score(TEXTS)
    while not (finished := engine.step()):
        pass
    ((_, group),) = finished
    assert {version for completion in group for version, _ in completion.versions} == {Version(0, 1)}
    assert largest_difference(weights(0), PROMPTS[0], group, 2.0) < TOLERANCE


def test_damaged_weights_show_in_the_score_and_misfits_are_refused(engine, weights, tmp_path):
    engine.load_weights(weights(0))
    tensors = load_file(weights(0) / "model.safetensors")
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    for bad in (missing, {**tensors, "model.norm.weight": torch.ones(32)}, {**tensors, "more": torch.ones(1)}):
        save_file(bad, tmp_path / "model.safetensors")
        with pytest.raises(CorruptFile):
            engine.load_weights(tmp_path)
        assert score_difference(weights(0), engine) < TOLERANCE
    damaged = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, damaged: tensors[damaged] * 1.2}, tmp_path / "model.safetensors")
    engine.load_weights(tmp_path)
    assert score_difference(weights(0), engine) > 100 * TOLERANCE
    engine.load_weights(weights(0))
    assert score_difference(weights(0), engine) < TOLERANCE


def test_an_end_token_ends_and_belongs_to_a_completion(engine):
    groups = engine.generate(PROMPTS, 40, Sampling(max_tokens=8, temperature=2.0), seed=0)
    completions = [completion for group in groups for completion in group]
    assert 0 < sum(c.truncated for c in completions) < len(completions)
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logp)
        assert 1 not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == 1) != completion.truncated
        assert not completion.truncated or len(completion.token_ids) == 8


def test_a_seed_repeats_completions_and_no_two_prompts_share_one(engine):
    sampling = Sampling(max_tokens=8)
    first = engine.generate([PROMPTS[0]] * 2, 4, sampling, seed=5)
    again = engine.generate([PROMPTS[0]] * 2, 4, sampling, seed=5)
    assert [[c.token_ids for c in g] for g in again] == [[c.token_ids for c in g] for g in first]
    assert len({tuple(c.token_ids) for group in first for c in group}) == 8
    other = engine.generate([PROMPTS[0]], 4, sampling, seed=6)
    assert {tuple(c.token_ids) for c in other[0]}.isdisjoint(tuple(c.token_ids) for c in first[0])


def test_many_long_prompts_are_sampled_with_seeds(engine, weights):
    engine.load_weights(weights(0))
    prompts = [[*LONG, token] for token in range(2, 14)]  # 3444 tokens: more than vLLM schedules in one go
    for prompt, group in zip(prompts, engine.generate(prompts, 2, Sampling(max_tokens=3), seed=0)):
        assert largest_difference(weights(0), prompt, group) < TOLERANCE


def test_stopping_keeps_the_groups_that_are_complete_and_leaves_no_request(engine, weights):
    engine.load_weights(weights(0))
    asked = iter([False] * 4 + [True] * 9)
    many = [PROMPTS[0]] * 40
    groups = engine.generate(many, 1, Sampling(max_tokens=500, temperature=2.0), seed=0, stop=lambda: next(asked))
    assert 0 < sum(group is None for group in groups) < len(groups)
    assert all(group[0].token_ids[-1] == 1 for group in groups if group)
    assert not engine._engine.has_unfinished_requests()
    engine.load_weights(weights(1))
    assert score_difference(weights(1), engine) < TOLERANCE


def test_log_probs_are_those_of_the_sampling_distribution(engine, weights):
    engine.load_weights(weights(0))
    (group,) = engine.generate([PROMPTS[2]], 8, Sampling(max_tokens=1, top_k=3), seed=0)
    three = logits_of(weights(0), tuple(PROMPTS[2]))[-1].topk(3)
    expected = dict(zip(three.indices.tolist(), three.values.log_softmax(-1).tolist()))
    for completion in group:
        assert completion.logp[0] == pytest.approx(expected[completion.token_ids[0]], abs=TOLERANCE)
    assert {c.token_ids[0] for c in group} <= set(expected)


def test_a_gpu_is_not_promised_by_the_cpu_build(tiny_model_dir):
    with pytest.raises(UserError, match="this vLLM is the CPU build"):
        build_engine("vllm", tiny_model_dir(), dtype="float32", max_model_len=64, gpus=1)


def test_stop_texts_and_tokens_end_a_completion_and_leave_no_request_behind(engine, weights):
    characters = ["<pad>", "<eos>", *"0123456789+-*/=()[]{} \\?"][:24]
    texts, end, token = ("=", "1+", "/*("), 1, 9  # a character, two, three; "7"
    free = Sampling(max_tokens=40, temperature=2.0)
    stopping = Sampling(max_tokens=40, temperature=2.0, stop=texts, stop_token_ids=(token,))
    plain = [c for group in engine.generate(PROMPTS, 20, free, seed=0) for c in group]
    stopped = [c for group in engine.generate(PROMPTS, 20, stopping, seed=0) for c in group]
    endings = set()
    for whole, cut in zip(plain, stopped):  # one seed: the same draws up to the stop
        said = ["".join(characters[t] for t in whole.token_ids[: i + 1]) for i in range(len(whole.token_ids))]
        last = next((i for i, t in enumerate(whole.token_ids) if t in (end, token) or said[i].endswith(texts)), None)
        length = len(whole.token_ids) if last is None else last + 1
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.logp == pytest.approx(whole.logp[:length], abs=TOLERANCE)
        assert cut.truncated == (last is None)
        endings.add(cut.token_ids[-1])
    assert {token, end, characters.index("="), characters.index("+")} <= endings
    assert not engine._engine.has_unfinished_requests()
