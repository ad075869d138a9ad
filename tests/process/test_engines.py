import errno
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import architectures
from builders import spec_of
from heterorl.errors import ModelError, NotFinite, SiteError, UserError
from heterorl.spec.run import LearnerSpec, RunSpec
from heterorl_learner.engines.build import build_engine, load_policy
from heterorl_learner.engines.torch_ddp import (
    MicroBatch,
    Sequence,
    TrainingEngine,
    build_optimizer,
    micro_batch,
    token_logps,
)
from heterorl_learner.train_step import learning_rate, plan, step_m2_limit

VOCABULARY = 24


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Callable[..., Path]) -> dict[str, Path]:
    return {"tied": tiny_model_dir(tied=True), "untied": tiny_model_dir(tied=False)}


def run_spec(**learner: object) -> RunSpec:
    dtype = learner.pop("dtype", "float32")
    return spec_of(model={"dtype": dtype}, learner=learner)


def drawn(number: int, seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(number):
        prompt, completion = rng.integers(1, 12), rng.integers(1, 20)
        found.append(
            Sequence(
                rng.integers(VOCABULARY, size=prompt).astype(np.int32),
                rng.integers(VOCABULARY, size=completion).astype(np.int32),
                np.zeros(completion, np.float32),
                group=i // 4,
                advantage=float(rng.normal()),
            )
        )
    return found


def policy_gradient(batch: MicroBatch, logp: torch.Tensor) -> torch.Tensor:
    return -(logp * batch.advantages[batch.seq_ids]).sum() / 100


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_packed_sequences_give_the_values_and_gradients_of_each_alone(folders: dict[str, Path]) -> None:
    sequences = [replace(s, temperature=(0.7, 1.0)[i % 2]) for i, s in enumerate(drawn(6))]
    policy = load_policy(folders["tied"], torch.float32, "sdpa")
    reference = AutoModelForCausalLM.from_pretrained(folders["tied"], dtype=torch.float32)
    batch = micro_batch(sequences)
    packed = token_logps(policy, batch)
    policy_gradient(batch, packed).backward()

    alone = []
    for s in sequences:  # the plain forward of transformers over the whole sequence, one at a time
        ids = torch.tensor(np.concatenate([s.prompt_ids, s.completion_ids]), dtype=torch.long)
        logp = torch.log_softmax(reference(ids[None]).logits[0] / s.temperature, dim=-1)
        alone.append(logp[torch.arange(len(ids) - 1), ids[1:]][len(s.prompt_ids) - 1 :])
    policy_gradient(batch, torch.cat(alone)).backward()

    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    for (name, mine), theirs in zip(policy.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_sequence_does_not_see_its_neighbour_in_the_pack(folders: dict[str, Path]) -> None:
    policy = load_policy(folders["tied"], torch.float32, "sdpa")
    first, second, other = drawn(3)
    with torch.no_grad():
        one = token_logps(policy, micro_batch([first, second]))[-len(second.completion_ids) :]
        two = token_logps(policy, micro_batch([other, second]))[-len(second.completion_ids) :]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_dropout_of_the_configuration_is_switched_off(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["tied"])
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, torch.float32, "sdpa")
    batch = micro_batch(drawn(2))
    with torch.no_grad():
        assert torch.equal(token_logps(policy, batch), token_logps(policy, batch))


def test_recomputing_activations_changes_no_gradient(folders: dict[str, Path]) -> None:
    batch = micro_batch(drawn(4))
    gradients = []
    for recompute in (False, True):
        policy = load_policy(folders["tied"], torch.float32, "sdpa", gradient_checkpointing=recompute)
        policy_gradient(batch, token_logps(policy, batch)).backward()
        gradients.append([p.grad for p in policy.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_policy(tmp_path, torch.float32, "sdpa")


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_is_scored_as_the_weights_were_that_were_copied(folders: dict[str, Path], kind: str, dtype: str) -> None:
    engine, batches = build_engine(folders[kind], run_spec(dtype=dtype)), [micro_batch([s]) for s in drawn(2)]
    train(engine, range(1))
    tensors = engine.full_state_dict()
    scores = engine.score_copy(tensors, batches)
    expected = [engine.score(batch) for batch in batches]
    train(engine, range(1, 3), learning_rate=0.1)  # training goes on before they are scored
    for found, right, after in zip(scores(), expected, map(engine.score, batches), strict=True):
        # in bfloat16 the copy is of rounded weights, as engines have them
        assert (torch.tensor(found) - right).abs().mean() < (1e-6 if dtype == "float32" else 0.03)
        assert (right - after).abs().max() > 0.1


def test_entropy_is_that_of_each_tokens_own_distribution(folders: dict[str, Path]) -> None:
    sequence = replace(drawn(1)[0], temperature=0.7)
    engine = build_engine(folders["tied"], run_spec())
    reference = AutoModelForCausalLM.from_pretrained(folders["tied"], dtype=torch.float32)
    ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.completion_ids]), dtype=torch.long)
    with torch.no_grad():
        p = torch.softmax(reference(ids[None]).logits[0, len(sequence.prompt_ids) - 1 : -1].double() / 0.7, dim=-1)
    expected = -(p * p.log()).sum(1)
    assert engine.entropy(micro_batch([sequence])).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


# ── the engine, plain torch in one process ───────────────────────────────────────────────────────────────────────────
def train(engine: TrainingEngine, steps: range, learning_rate: float = 3e-4) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step on batches drawn for it."""
    return [
        (engine.forward_backward(plan(drawn(8, seed=step), 64), policy_gradient), engine.step(learning_rate))
        for step in steps
    ]


def test_micro_batches_add_up_to_the_whole_batch(folders: dict[str, Path]) -> None:
    results = []
    for budget in (1, 64, 10_000):  # one sequence a pass, a few, all
        engine = build_engine(folders["tied"], run_spec())
        loss = engine.forward_backward(plan(drawn(8), budget), policy_gradient)
        results.append((loss, engine.step(3e-4)))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_the_limit_of_m2po_is_that_of_all_tokens_of_the_step_however_they_are_packed(folders: dict[str, Path]) -> None:
    sequences, engine = drawn(8), build_engine(folders["tied"], run_spec())
    sampler = np.random.default_rng(1)
    for s in sequences:
        s.sampler_logp[:] = engine.score(micro_batch([s])).numpy() + 0.3 * sampler.standard_normal(len(s.sampler_logp))
    moments = [(engine.score(micro_batch([s])).numpy() - s.sampler_logp).astype(np.float64) ** 2 for s in sequences]
    ordered = np.sort(np.concatenate(moments))
    kept = ordered[np.cumsum(ordered) / np.arange(1, len(ordered) + 1) <= 0.04]
    assert 10 < len(kept) < len(ordered)
    for budget in (1, 64, 10_000):
        assert step_m2_limit(engine, 0.04, plan(sequences, budget)) == pytest.approx(kept[-1], rel=1e-3)
    assert step_m2_limit(engine, None, []) is None


def test_an_update_is_adamw_with_the_gradient_clipped(folders: dict[str, Path]) -> None:
    spec = run_spec(optimizer={"maxGradNorm": 0.01, "weightDecay": 0.1, "eps": 1e-3})
    engine = build_engine(folders["untied"], spec)
    reference = load_policy(folders["untied"], torch.float32, "sdpa")
    batch = micro_batch(drawn(4))
    before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}

    policy_gradient(batch, token_logps(reference, batch)).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in reference.parameters()))
    engine.forward_backward([batch], policy_gradient)
    assert engine.step(3e-4) == pytest.approx(norm, rel=1e-5)
    assert norm > 0.01

    after = engine.full_state_dict()
    for name, p in reference.model.named_parameters():
        # First step of Adam: both moments are bias-corrected to g and g^2. Only matrices decay, by lr * 0.1.
        g = p.grad * 0.01 / norm
        decay = 1 - 3e-4 * (0.1 if p.ndim == 2 else 0)
        torch.testing.assert_close(after[name], before[name] * decay - 3e-4 * g / (g.abs() + 1e-3), atol=1e-7, rtol=0)


def test_resume_is_exact_to_the_bit_in_one_thread(folders: dict[str, Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        through = build_engine(folders["tied"], run_spec())
        whole = train(through, range(6))
        first = build_engine(folders["tied"], run_spec())
        train(first, range(3))
        saving = first.save(tmp_path)
        train(first, range(3, 5))  # which goes on while it is written
        saving.write()
        second = build_engine(folders["tied"], run_spec())
        second.load(tmp_path)
        assert train(second, range(3, 6)) == whole[3:]
        for name, tensor in through.full_state_dict().items():
            assert torch.equal(tensor, second.full_state_dict()[name]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("own_process_group")
@pytest.mark.parametrize("strategy", ["torch", "zero2"])
def test_a_checkpoint_is_written_and_read_again_after_an_error_that_passes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    def once(call: Callable[..., object]) -> Callable[..., object]:
        errors: list[OSError] = [OSError(errno.ESTALE, "Stale file handle", str(tmp_path))]

        def broken(*args: object, **kwargs: object) -> object:
            if errors:
                raise errors.pop()
            return call(*args, **kwargs)

        return broken

    engine = build_engine(folders["tied"], run_spec(strategy=strategy))
    train(engine, range(1))
    monkeypatch.setattr(torch, "save", once(torch.save))
    engine.save(tmp_path).write()
    monkeypatch.setattr(torch, "load", once(torch.load))
    other = build_engine(folders["tied"], run_spec(strategy=strategy))
    other.load(tmp_path)
    for name, tensor in engine.full_state_dict().items():
        assert torch.equal(tensor, other.full_state_dict()[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_has_the_weights_that_would_be_published(
    folders: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    engine = build_engine(folders["tied"], run_spec(dtype=dtype))
    train(engine, range(1))
    expected, saving = engine.full_state_dict(), engine.save(tmp_path)
    train(engine, range(1))
    found = saving.weights()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_tensors_are_those_of_the_folder(folders: dict[str, Path], kind: str, dtype: str) -> None:
    engine = build_engine(folders[kind], run_spec(dtype=dtype))
    exported = engine.full_state_dict()
    model = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=getattr(torch, dtype))
    assert set(exported) == {name for name, _ in model.named_parameters()}  # tied: without lm_head.weight
    for name, p in model.named_parameters():
        assert torch.equal(exported[name], p), name
    exported["model.norm.weight"].zero_()  # a copy: publication may go on while training does
    assert not torch.equal(engine.full_state_dict()["model.norm.weight"], exported["model.norm.weight"])
    again = engine.full_state_dict(exported)
    for name, p in model.named_parameters():
        assert torch.equal(again[name], p), name
        assert again[name] is exported[name], name  # the memory that it was given


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_second_checkpoint_has_what_has_changed_since_the_first(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    engine, other = build_engine(folders[kind], run_spec()), build_engine(folders[kind], run_spec())
    for name in ("first", "second"):  # the second is made in the memory of the first
        train(engine, range(1))
        (tmp_path / name).mkdir()
        engine.save(tmp_path / name).write()
        other.load(tmp_path / name)
        loaded = other.full_state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in engine.full_state_dict().items())
    assert train(engine, range(1, 3)) == train(other, range(1, 3))  # by the same moments of Adam


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_neox", "granitemoe", "jamba"])
def test_exported_tensors_have_the_names_of_the_folder_where_modules_have_others(name: str, tmp_path: Path) -> None:
    folder = architectures.save(name, tmp_path)
    modules = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = load_file(folder / "model.safetensors")
    assert set(expected) != set(modules)
    exported = build_engine(folder, run_spec()).full_state_dict()
    assert set(exported) == set(expected)
    for tensor_name, tensor in expected.items():
        assert torch.equal(exported[tensor_name], tensor), tensor_name


def test_bfloat16_keeps_updates_that_its_own_precision_would_lose(folders: dict[str, Path]) -> None:
    engine = build_engine(folders["tied"], run_spec(dtype="bfloat16"))
    # Norm weights start at 1; the bfloat16 numbers below and above are 2^-8 and 2^-7 away, and an update of 1.5e-3
    # rounds back to 1; two of them in the same direction pass half of 2^-8.
    name = "model.norm.weight"
    ones = torch.ones(64, dtype=torch.bfloat16)
    for update in range(2):
        engine.forward_backward([micro_batch(drawn(2))], policy_gradient)
        engine.step(1.5e-3)
        assert torch.equal(engine.full_state_dict()[name], ones) == (update == 0)


def test_a_micro_batch_without_sequences_adds_nothing(folders: dict[str, Path]) -> None:
    results = []
    for padding in ([], [micro_batch([])]):
        engine = build_engine(folders["tied"], run_spec())
        loss = engine.forward_backward([micro_batch(drawn(4)), *padding], policy_gradient)
        results.append((loss, engine.step(3e-4)))
    assert results[0] == results[1]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_leaves_no_trace(folders: dict[str, Path], broken: str) -> None:
    engine = build_engine(folders["tied"], run_spec())
    first = train(engine, range(1))
    before = engine.full_state_dict()

    def loss(batch: MicroBatch, logp: torch.Tensor) -> torch.Tensor:
        if broken == "loss":
            return logp.sum() * math.nan
        return (logp - logp.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    engine.forward_backward([micro_batch(drawn(4))], loss)
    with pytest.raises(NotFinite, match="gradient norm of nan"):
        engine.step(3e-4)
    for name, tensor in engine.full_state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # The next step is that of a run in which it never happened: no gradient and no moment is left of it.
    assert first + train(engine, range(1, 3)) == train(build_engine(folders["tied"], run_spec()), range(3))


def test_a_loss_that_is_not_finite_is_refused_also_where_its_gradient_would_be(folders: dict[str, Path]) -> None:
    engine = build_engine(folders["tied"], run_spec())
    engine.forward_backward([micro_batch(drawn(4))], lambda batch, logp: logp.sum() + math.inf)
    with pytest.raises(NotFinite, match="a loss of inf on rank 0"):
        engine.step(3e-4)


def test_scoring_leaves_no_gradient(folders: dict[str, Path]) -> None:
    engine = build_engine(folders["tied"], run_spec())
    scores = engine.score(micro_batch(drawn(4)))
    assert not scores.requires_grad
    assert train(engine, range(1)) == train(build_engine(folders["tied"], run_spec()), range(1))


def test_a_gpu_that_is_not_there_is_its_nodes_failure_and_named(folders: dict[str, Path]) -> None:
    if torch.cuda.device_count():
        pytest.skip("this machine has GPUs")
    with pytest.raises(SiteError, match=r"learner\.gpus is 1"):
        build_engine(folders["tied"], run_spec(gpus=1))


@pytest.mark.usefixtures("own_process_group")
@pytest.mark.parametrize("strategy", ["torch", "zero2"])
def test_the_fused_optimizer_makes_the_same_updates(folders: dict[str, Path], strategy: str) -> None:
    states = []
    for kind in ("adamw", "adamw_fused"):
        spec = run_spec(strategy=strategy, optimizer={"type": kind, "weightDecay": 0.1})
        engine = build_engine(folders["untied"], spec)
        train(engine, range(3), learning_rate=1e-2)
        states.append(engine.full_state_dict())
    assert set(states[0]) == set(states[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_an_optimizer_whose_package_is_missing_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    learner = LearnerSpec.model_validate({"optimizer": {"type": "adamw_8bit"}, "gpus": 1})
    with pytest.raises(UserError, match=r"adamw_8bit, which needs the package bitsandbytes .*heterorl\[bitsandbytes\]"):
        build_optimizer(load_policy(folders["tied"], torch.float32, "sdpa"), learner)


def test_moments_in_8_bits_take_nearly_the_same_steps() -> None:
    """Its kernels for a CPU do what those for GPUs do; a run on a CPU is not offered them."""
    drawn = torch.Generator().manual_seed(0)
    start = nn.init.normal_(torch.empty(128, 128), generator=drawn)
    layers = [nn.Linear(128, 128, bias=False) for _ in range(2)]
    optimizers = []
    for layer, kind in zip(layers, ("adamw", "adamw_8bit")):
        layer.weight.data = start.clone()
        learner = LearnerSpec.model_validate({"optimizer": {"type": kind, "learningRate": 1e-3}, "gpus": 1})
        optimizers.append(build_optimizer(layer, learner))
    for _ in range(10):
        gradient = 0.05 + 0.1 * torch.randn(128, 128, generator=drawn)
        for layer, optimizer in zip(layers, optimizers):
            layer.weight.grad = gradient.clone()
            optimizer.step()
    moved, moved_too = (layer.weight.data - start for layer in layers)
    assert 0 < (moved - moved_too).norm() < 0.03 * moved.norm()
    assert optimizers[1].state[layers[1].weight]["state1"].dtype == torch.uint8


# ── the schedule ─────────────────────────────────────────────────────────────────────────────────────────────────────
def rates(kind: str, steps: int = 10, warmup_ratio: float = 0.15) -> list[float]:
    learner = LearnerSpec.model_validate(
        {
            "steps": steps,
            "optimizer": {"learningRate": 0.8},
            "schedule": {"type": kind, "warmupRatio": warmup_ratio},
        }
    )
    return [learning_rate(learner, step) for step in range(steps)]


def test_learning_rates_are_those_worked_by_hand() -> None:
    # ceil(0.15 * 10) = 2 updates of warm-up: 1/2 and 2/2 of the peak; then 8 updates.
    assert rates("constant") == pytest.approx([0.4, 0.8, *[0.8] * 8])
    assert rates("linear") == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    # 0.4 * (1 + cos(pi k / 8)): k = 4 halves it, k = 2 gives 0.4 * (1 + 0.70711).
    assert rates("cosine")[2:7:2] == pytest.approx([0.8, 0.682843, 0.4])
    assert rates("constant", warmup_ratio=0.0) == [0.8] * 10


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.07, 100, 7), (0.07, 101, 8), (0.29, 100, 29), (1e-05, 1, 1)])
def test_the_warm_up_is_the_ratio_as_it_is_written_times_the_steps(ratio: float, steps: int, warmup: int) -> None:
    # in floating point 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996
    assert rates("constant", steps, ratio)[:warmup] == pytest.approx([0.8 * (k + 1) / warmup for k in range(warmup)])
