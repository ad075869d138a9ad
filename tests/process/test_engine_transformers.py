"""The transformers engine against whole forward passes without cache or padding, and against formulas in NumPy."""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import architectures
from heterorl.errors import CorruptFile, ModelError, SiteError, UserError
from heterorl.exchange.rollout import Completion, Sampling
from heterorl.exchange.version import Version
from heterorl_sampler.engines.build import build_engine
from heterorl_sampler.engines.model_files import end_token_ids
from heterorl_sampler.engines.transformers import TransformersEngine

PROMPTS = [[5, 9, 2], [7, 3, 3, 12, 20, 4, 8], [11]]
END = 1


def engine_on(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, dtype="float32")


@functools.cache
def model_in(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits_of(folder: Path, text: list[int], dtype: torch.dtype = torch.float64) -> np.ndarray:
    """[S, V], from one forward of the whole text."""
    with torch.no_grad():
        return model_in(folder, dtype)(torch.tensor([text])).logits[0].numpy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scores_of(folder: Path, text: list[int], dtype: torch.dtype = torch.float64) -> np.ndarray:
    return log_softmax(logits_of(folder, text, dtype))[np.arange(len(text) - 1), text[1:]]


@pytest.mark.parametrize("tied", [True, False])
def test_behaviour_log_probs_are_those_of_a_whole_forward_at_that_temperature(tiny_model_dir, tied):
    folder = tiny_model_dir(tied=tied)
    groups = engine_on(folder).generate(PROMPTS, 3, Sampling(max_tokens=12, temperature=0.7), seed=1)
    assert [len(group) for group in groups] == [3, 3, 3]
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            logp = log_softmax(logits_of(folder, prompt + completion.token_ids) / 0.7)
            rows = np.arange(len(prompt) - 1, len(prompt) - 1 + len(completion.token_ids))
            np.testing.assert_allclose(completion.logp, logp[rows, completion.token_ids], atol=2e-5)


def test_completions_live_through_swaps_and_each_token_is_of_the_weights_it_is_marked_with(tiny_model_dir):
    folders = [tiny_model_dir(tied=True, seed=seed) for seed in range(3)]
    engine, sampling = engine_on(folders[0]), Sampling(max_tokens=30, temperature=0.7)

    def generate(swaps: dict[int, int]) -> dict[int, list[Completion]]:
        engine.load_weights(folders[0], Version(0, 1))
        places = {engine.add(prompt, 3, sampling, seed=i): i for i, prompt in enumerate(PROMPTS)}
        made: dict[int, list[Completion]] = {}
        for step in itertools.count(1):
            made |= {places[number]: group for number, group in engine.step()}
            if not engine.num_groups:
                return made
            if step in swaps:
                engine.load_weights(folders[swaps[step]], Version(swaps[step], 1))

    undisturbed, swapped = generate({}), generate({3: 1, 9: 2, 10: 1, 11: 2})
    assert {version.step for group in swapped.values() for c in group for version, _ in c.versions} == {0, 1, 2}
    for place, group in swapped.items():
        prompt = PROMPTS[place]
        for before, completion in zip(undisturbed[place], group):
            assert sum(count for _, count in completion.versions) == len(completion.token_ids)
            start = 0
            for version, count in completion.versions:
                logp = log_softmax(logits_of(folders[version.step], prompt + completion.token_ids) / 0.7)
                rows = np.arange(start, start + count)
                expected = logp[len(prompt) - 1 + rows, np.array(completion.token_ids)[rows]]
                np.testing.assert_allclose(np.array(completion.logp)[rows], expected, atol=2e-5)
                start += count
            kept = completion.versions[0][1]
            assert completion.token_ids[:kept] == before.token_ids[:kept]


def test_the_draws_of_a_group_do_not_depend_on_what_is_generated_beside_it(tiny_model_dir):
    engine, sampling = engine_on(tiny_model_dir()), Sampling(max_tokens=6, temperature=0.7)

    def generate(places: list[int]) -> dict[int, list[Completion]]:
        numbers = {engine.add(PROMPTS[place], 4, sampling, seed=100 + place): place for place in places}
        made: dict[int, list[Completion]] = {}
        while engine.num_groups:
            made |= {numbers[number]: group for number, group in engine.step()}
        return made

    together, reversed_, alone = generate([0, 1, 2]), generate([2, 1, 0]), generate([1])
    for place in range(3):
        assert [c.token_ids for c in together[place]] == [c.token_ids for c in reversed_[place]]
    assert [c.token_ids for c in alone[1]] == [c.token_ids for c in together[1]]


def test_no_more_completions_are_generated_at_a_time_than_the_engine_was_told(tiny_model_dir):
    engine = TransformersEngine(tiny_model_dir(), dtype="float32", max_running=4)
    numbers = [engine.add(PROMPTS[0], 2, Sampling(max_tokens=2), seed=i) for i in range(5)]
    finished = []
    while engine.num_groups:
        finished.append([number for number, _ in engine.step()])
    assert [number for step in finished for number in sorted(step)] == numbers
    assert max(map(len, finished)) == 2


def sampling_distribution(logits: np.ndarray, seen: list[int], sampling: Sampling) -> np.ndarray:
    """Log-probabilities after penalty, temperature, min_p, top_k, top_p; -inf where a token is dropped."""
    x = logits.copy()
    for token in set(seen):
        x[token] = x[token] * sampling.repetition_penalty if x[token] < 0 else x[token] / sampling.repetition_penalty
    x = x / sampling.temperature
    p = np.exp(log_softmax(x))
    x[p < sampling.min_p * p.max()] = -np.inf
    if sampling.top_k:
        x[np.argsort(-x)[sampling.top_k :]] = -np.inf
    p = np.exp(log_softmax(x))
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]  # mass of the more likely tokens; a token stays while that is below top_p
    x[order[before >= sampling.top_p]] = -np.inf
    return log_softmax(x)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=10, temperature=0.6, top_p=0.8),
        Sampling(max_tokens=10, top_k=3),
        Sampling(max_tokens=10, temperature=1.3, min_p=0.2),
        Sampling(max_tokens=10, repetition_penalty=1.5),
        Sampling(max_tokens=10, temperature=0.9, top_p=0.7, top_k=6, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_behaviour_log_probs_are_those_of_the_sampling_distribution(tiny_model_dir, sampling):
    folder = tiny_model_dir()
    for prompt, group in zip(PROMPTS, engine_on(folder).generate(PROMPTS, 2, sampling, seed=3)):
        for completion in group:
            logits = logits_of(folder, prompt + completion.token_ids)
            for i, token in enumerate(completion.token_ids):
                seen = prompt + completion.token_ids[:i]
                expected = sampling_distribution(logits[len(prompt) - 1 + i], seen, sampling)
                assert completion.logp[i] == pytest.approx(expected[token], abs=2e-5)


def test_first_tokens_are_drawn_with_the_models_probabilities(tiny_model_dir):
    folder, draws = tiny_model_dir(), 8000
    (group,) = engine_on(folder).generate([PROMPTS[1]], draws, Sampling(max_tokens=1), seed=0)
    found = np.bincount([c.token_ids[0] for c in group], minlength=24) / draws
    expected = np.exp(log_softmax(logits_of(folder, PROMPTS[1])[-1]))
    assert np.abs(found - expected).max() < 4 * 0.5 / draws**0.5  # four standard deviations at p = 1/2


def test_an_end_token_ends_and_belongs_to_a_completion(tiny_model_dir):
    groups = engine_on(tiny_model_dir()).generate(PROMPTS, 40, Sampling(max_tokens=8, temperature=2.0), seed=0)
    completions = [completion for group in groups for completion in group]
    ended = [c for c in completions if not c.truncated]
    assert 0 < len(ended) < len(completions)
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logp)
        assert END not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == END) != completion.truncated
        assert not completion.truncated or len(completion.token_ids) == 8


def test_stop_texts_and_tokens_end_a_completion_with_the_token_that_completes_them(tiny_model_dir):
    engine = engine_on(tiny_model_dir(tokenizer=True))
    characters = ["<pad>", "<eos>", *"0123456789+-*/=()[]{} \\?"][:24]
    texts, token = ("=", "1+", "/*("), 9  # a character, two, three; "7"
    free = Sampling(max_tokens=40, temperature=2.0)
    stopping = Sampling(max_tokens=40, temperature=2.0, stop=texts, stop_token_ids=(token,))
    plain = [c for group in engine.generate(PROMPTS, 30, free, seed=0) for c in group]
    stopped = [c for group in engine.generate(PROMPTS, 30, stopping, seed=0) for c in group]
    endings = set()
    for whole, cut in zip(plain, stopped):  # one seed: the same draws up to the stop
        ends = (END, token)
        said = ["".join(characters[t] for t in whole.token_ids[: i + 1]) for i in range(len(whole.token_ids))]
        last = next((i for i, t in enumerate(whole.token_ids) if t in ends or said[i].endswith(texts)), None)
        length = len(whole.token_ids) if last is None else last + 1
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.logp == whole.logp[:length]
        assert cut.truncated == (last is None)
        endings.add(cut.token_ids[-1] if cut.token_ids[-1] in ends else said[length - 1][-1])
    assert {token, END, "=", "+"} <= endings


def test_a_stop_text_said_with_the_last_token_that_is_allowed_is_no_truncation(tiny_model_dir):
    engine = engine_on(tiny_model_dir(tokenizer=True))
    (group,) = engine.generate(PROMPTS[:1], 200, Sampling(max_tokens=1, temperature=2.0, stop=("=",)), seed=0)
    equals = [c for c in group if c.token_ids == [16]]  # "="
    assert equals
    assert all(c.truncated == (c.token_ids not in ([16], [END])) for c in group)


def test_stopping_keeps_the_groups_that_are_complete(tiny_model_dir):
    sampling = Sampling(max_tokens=300, temperature=2.0)
    asked = iter([False] * 5 + [True])
    groups = engine_on(tiny_model_dir()).generate([PROMPTS[0]] * 40, 1, sampling, seed=0, stop=lambda: next(asked))
    assert 0 < sum(group is None for group in groups) < len(groups)
    assert all(group[0].token_ids[-1] == END and len(group[0].token_ids) <= 6 for group in groups if group)


def test_a_seed_repeats_completions_and_another_does_not(tiny_model_dir):
    engine = engine_on(tiny_model_dir())
    sampling = Sampling(max_tokens=8)
    torch.manual_seed(0)
    first = engine.generate(PROMPTS, 2, sampling, seed=5)
    assert engine.generate(PROMPTS, 2, sampling, seed=5) == first
    assert engine.generate(PROMPTS, 2, sampling, seed=6) != first


def test_temperature_zero_takes_the_most_likely_token(tiny_model_dir):
    folder = tiny_model_dir()
    for prompt, (completion,) in zip(
        PROMPTS, engine_on(folder).generate(PROMPTS, 1, Sampling(max_tokens=6, temperature=0), seed=0)
    ):
        likeliest = logits_of(folder, prompt + completion.token_ids).argmax(-1)
        assert completion.token_ids == likeliest[len(prompt) - 1 : -1].tolist()
        assert sum(completion.logp) < 0


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_weights_are_served_and_stay_tied(tiny_model_dir, tied):
    engine = engine_on(tiny_model_dir(tied=tied))
    for seed in (1, 0):
        engine.load_weights(tiny_model_dir(tied=tied, seed=seed))
        for text, scores in zip(PROMPTS[:2], engine.score(PROMPTS[:2])):
            np.testing.assert_allclose(scores, scores_of(tiny_model_dir(tied=tied, seed=seed), text), atol=2e-5)


def test_weights_of_another_shape_are_refused_and_the_old_ones_stay(tiny_model_dir, tmp_path):
    engine = engine_on(tiny_model_dir())
    before = engine.score(PROMPTS[:2])
    tensors = load_file(tiny_model_dir(seed=1) / "model.safetensors")
    changed = {**tensors, "model.norm.weight": torch.ones(32)}
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    for bad in (changed, missing, {**tensors, "model.extra.weight": torch.ones(1)}):
        save_file(bad, tmp_path / "model.safetensors")
        with pytest.raises(CorruptFile, match=r"model\.(norm|extra)\.weight"):
            engine.load_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(CorruptFile):
        engine.load_weights(tmp_path)
    assert engine.score(PROMPTS[:2]) == before


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_neox", "camembert"])
def test_weights_are_read_by_the_names_of_their_files_where_modules_have_others(name, tmp_path):
    start, other = (architectures.save(name, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    engine, text = engine_on(start), [5, 9, 12, 20, 4]
    expected = scores_of(other, text, torch.float32)  # experts have no kernel for float64
    engine.load_weights(other)
    np.testing.assert_allclose(engine.score([text])[0], expected, atol=2e-5)
    tensors = load_file(other / "model.safetensors")
    last = max(tensors)
    for bad in ({n: t for n, t in tensors.items() if n != last}, {**tensors, last: tensors[last][:-1]}):
        save_file(bad, tmp_path / "model.safetensors")
        with pytest.raises(CorruptFile, match="weights: "):
            engine.load_weights(tmp_path)
    np.testing.assert_allclose(engine.score([text])[0], expected, atol=2e-5)


def test_other_files_beside_the_weights_are_left_alone(tiny_model_dir, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tiny_model_dir(seed=1) / "model.safetensors")
    save_file({"logp": torch.zeros(3)}, tmp_path / "canary.safetensors")
    engine = engine_on(tiny_model_dir())
    engine.load_weights(tmp_path)
    np.testing.assert_allclose(engine.score([PROMPTS[0]])[0], scores_of(tiny_model_dir(seed=1), PROMPTS[0]), atol=2e-5)


def test_missing_parts_are_said_in_one_sentence(tiny_model_dir, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"no config\.json"):
        build_engine("transformers", tmp_path, dtype="float32", max_model_len=16)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        end_token_ids(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "heterorl_sampler.engines.vllm", raising=False)
    with pytest.raises(UserError, match=r"vLLM is not installed; install heterorl\[sampler\]"):
        build_engine("vllm", tiny_model_dir(), dtype="float32", max_model_len=16)
    with pytest.raises(ModelError, match=r"may take 2000 tokens, the model's context holds 1024"):
        build_engine("transformers", tiny_model_dir(), dtype="float32", max_model_len=2000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SiteError, match="gpus: 1, but torch finds no GPU on this node"):
        build_engine("transformers", tiny_model_dir(), dtype="float32", max_model_len=16, gpus=1)


# ── other architectures ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("name", "reading"),
    # Recurrent states cannot be repeated for the rows of a prompt; Mamba's cache has another name and is not used.
    [("llama", "together"), ("opt", "together"), ("qwen3_next", "each prompt"), ("mamba", "uncached")],
)
def test_behaviour_log_probs_are_right_whatever_padding_and_caches_do(tmp_path, name, reading):
    folder = architectures.save(name, tmp_path)
    engine = engine_on(folder)
    assert engine.reading == reading
    model = AutoModelForCausalLM.from_pretrained(folder)  # experts are not computed in float64
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, 2, Sampling(max_tokens=9), seed=3)):
        for completion in group:
            text = torch.tensor(prompt + completion.token_ids)
            with torch.no_grad():
                logp = model(text[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            expected = logp.gather(1, text[1:, None])[len(prompt) - 1 :, 0]
            np.testing.assert_allclose(completion.logp, expected, atol=1e-5)


def test_one_line_says_how_an_engine_reads_that_cannot_pad(tmp_path, caplog):
    engine_on(architectures.save("qwen3_next", tmp_path))
    (message,) = caplog.messages
    assert message.startswith("with Qwen3NextForCausalLM the engine generates for one prompt at a time")
    assert "; together: " in message


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    with pytest.raises(ModelError, match="BertLMHeadModel cannot be sampled"):
        engine_on(architectures.save("bert", tmp_path, is_decoder=False))
