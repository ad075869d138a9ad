"""The training thread: what blocks it, what a loss takes, and how fast a learner is."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil

from bench import reference
from bench.benchmark import CannotMeasure, Pair, Surroundings, at_least, at_most, benchmark, seconds
from bench.publication import blocked_by_a_publication
from builders import exchange_at, rollout_name, rollout_of, run_of, spec_of
from heterorl.exchange.exchange import Exchange
from models import save_character_tokenizer

# ── what blocks it ───────────────────────────────────────────────────────────────────────────────────────────────────
BLOCKING = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""44 M parameters."""


def save_random(shape: dict[str, Any], folder: Path) -> Path:
    """A Qwen3 with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)
    return folder


def prepared(at: Surroundings) -> tuple[Exchange, Any]:
    """A run with that model, and its engine after one update."""
    from heterorl_learner.engines.build import build_engine
    from heterorl_learner.engines.torch_ddp import Sequence, micro_batch

    exchange = exchange_at(at.folder / "run", run_of(model={"dtype": "float32"}))
    save_random(BLOCKING | ({"num_hidden_layers": 2} if at.quick else {}), exchange.model_dir)
    save_character_tokenizer(exchange.model_dir)
    exchange.data_file("train").parent.mkdir()
    exchange.data_file("train").write_text(json.dumps({"prompt_ids": [3, 4, 5]}) + "\n")
    exchange.begin_incarnation()
    engine = build_engine(exchange.model_dir, exchange.spec)
    ids = np.arange(5, 21, dtype=np.int32)
    one = micro_batch([Sequence(ids, ids, np.zeros(16, np.float32), group=0, advantage=1.0)])
    engine.forward_backward([one], lambda batch, logp: -logp.mean())
    engine.step(1e-3)
    return exchange, engine


@benchmark(
    "2",
    what="training blocked by a publication, the canary's log-probabilities included",
    peer="torch.save of the state dict in the step",
    target=at_most(0.2),
    gate="the published digest is the model's",
    limit="one copy of the weights",
    memory_gb=2.0,
    disk_gb=2.0,
    gross=at_most(2.0),  # of a tiny model: the thread that writes takes one of two cores
)
def publication(at: Surroundings) -> Iterator[Pair]:
    exchange, engine = prepared(at)
    yield from blocked_by_a_publication(exchange, engine, at.folder)


@benchmark(
    "2b",
    what="training blocked by a checkpoint",
    peer="torch.save of model and optimizer in the step",
    target=at_most(0.3),
    gate="what is resumed is bit by bit what was saved",
    limit="one copy of model and optimizer",
    memory_gb=3.0,
    disk_gb=5.0,
    gross=at_most(2.0),
)
def checkpoint(at: Surroundings) -> Iterator[Pair]:
    import torch

    from heterorl_learner.checkpoints import Checkpoints, TrainerState
    from heterorl_learner.engines.build import build_engine

    exchange, engine = prepared(at)
    steps = itertools.count(1)

    def state() -> dict[str, Any]:
        return {"policy": engine.policy.state_dict(), "optimizer": engine._optimizer.state_dict()}

    with Checkpoints(exchange, engine) as checkpoints:

        def save() -> None:
            checkpoints.save(TrainerState(step=next(steps)))

        def gate() -> None:
            save()
            checkpoints.wait()
            folder, _ = exchange.open_newest_checkpoint() or (at.folder, {})
            other = build_engine(exchange.model_dir, exchange.spec)
            other.load(folder)
            for name, tensor in engine.full_state_dict().items():
                assert torch.equal(tensor, other.full_state_dict()[name]), name
            resumed: Any = other
            mine, theirs = (e._optimizer.state_dict()["state"] for e in (engine, resumed))
            assert all(torch.equal(mine[p][key], theirs[p][key]) for p in mine for key in mine[p])

        yield Pair(
            seconds(save, before=checkpoints.wait),
            seconds(lambda: reference.save_in_the_step(state(), at.folder / "state.pt"), before=checkpoints.wait),
            gate,
        )
        checkpoints.wait()


STEPS_LOGGED = 36


@benchmark(
    "15",
    what="a learner's step of the quickstart's size with the log of completions, on one core",
    peer="without it",
    target=at_most(1.01),
    gate="as many groups of each step as the spec asks for are in the file",
    limit="1",
    gross=at_most(1.2),
    gate_warms=True,
)
def logged_steps(at: Surroundings) -> Iterator[Pair]:
    import torch

    from bench.shapes import qwen3, save_qwen3
    from heterorl_learner.completion_log import CompletionLog
    from heterorl_learner.engines.build import build_engine
    from heterorl_learner.rollout_feed import StepBatch
    from heterorl_learner.train_step import train_on

    run = run_of(
        model={"dtype": "float32"},
        algorithm={"groupSize": 8},
        learner={"steps": 10_000, "batch": {"groups": 32, "tokensPerMicroBatch": 512}},
        monitoring={"logCompletions": {"maxMegabytes": 10_000}},
    )
    exchange = exchange_at(at.folder / "run", run)
    save_qwen3(exchange.model_dir, qwen3(hidden=64, layers=2, vocabulary=256))
    engine = build_engine(exchange.model_dir, exchange.spec)
    random, rewards = np.random.default_rng(0), [1.0, 0.0] * 4
    rollouts = []
    for _ in range(32):
        rollout = rollout_of(rewards, random.integers(2, 9, 8).tolist(), terms={"accuracy": rewards})
        rollout.completion_ids[:] = random.integers(5, 60, len(rollout.completion_ids))
        rollouts.append(rollout)
    steps, names = itertools.count(), [rollout_name(i) for i in range(32)]

    def train(log: CompletionLog) -> float:
        batch = StepBatch(next(steps), names, rollouts, wait_s=0.0)
        started = time.perf_counter()
        train_on(engine, exchange.spec, batch, log.see)
        engine.step(1e-6)
        log.write(batch)
        while log._lines and log._lines._queue:  # what is not written yet is part of the cost
            time.sleep(1e-4)
        return time.perf_counter() - started

    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})  # of this thread and those that it starts: the log's
    torch.set_num_threads(1)
    logs = CompletionLog(exchange, 1), CompletionLog(exchange, 1, wanted=False)
    without: list[float] = []

    def both() -> float:
        """Steps with and without the log in turn, as a machine's speed changes within a second by more than it costs."""
        took = [[train(log) for log in logs] for _ in range(STEPS_LOGGED // 3 if at.quick else STEPS_LOGGED)]
        without.append(statistics.median(pair[1] for pair in took))
        return statistics.median(pair[0] for pair in took)

    def gate() -> None:
        both()
        logged = [json.loads(line)["step"] for line in exchange.completions_file.read_text().splitlines()]
        expected = exchange.spec.monitoring.log_completions.groups_per_step
        assert logged == [step for step in range(1, next(steps), 2) for _ in range(expected)], logged

    try:
        yield Pair(both, lambda: without[-1], gate)
    finally:  # the rows after it need both cores, whatever happens
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        logs[0].close()


# ── what a loss takes ────────────────────────────────────────────────────────────────────────────────────────────────
TOKENS, VOCABULARY, WIDTH, SEQUENCES = 4096, 151_936, 256, 16
taken: dict[str, list[float]] = defaultdict(list)
"""Seconds of the passes whose memory was measured, for the row after."""


class LossPass:
    """Forward and backward of a loss from the input of the head, by tiles or with all logits."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        import torch
        from torch import nn

        from heterorl_learner.engines.policy import Head
        from heterorl_learner.losses import LossInputs, Totals

        drawn = torch.Generator().manual_seed(0)
        self.head = Head(nn.Linear(WIDTH, vocabulary, bias=False))
        self.head.weight.data = 0.02 * torch.randn(vocabulary, WIDTH, generator=drawn)
        self.hidden = torch.randn(tokens, WIDTH, generator=drawn).requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,), generator=drawn)
        self.temperature = torch.ones(tokens)
        lengths = torch.full((SEQUENCES,), tokens // SEQUENCES)
        q = torch.full((SEQUENCES,), -float(np.log(vocabulary)))
        self.inputs = LossInputs(
            logp=torch.zeros(tokens),
            sampler_logp=q[0] + 0.1 * torch.randn(tokens, generator=drawn),
            seq_ids=torch.arange(SEQUENCES).repeat_interleave(lengths),
            group_ids=torch.arange(SEQUENCES) // 8,
            lengths=lengths.float(),
            advantages=torch.randn(SEQUENCES, generator=drawn),
            log_expected_q=q,
        )
        self.totals = Totals.of(lengths, max_length=tokens, alpha=0.75)

    def logp(self, *, tiled: bool) -> Any:
        from heterorl_learner.engines.policy import Afterwards, values_of

        if tiled:
            return self.head(self.hidden, self.targets, self.temperature, False, Afterwards())
        return values_of(self.head(self.hidden), self.targets, self.temperature)

    def run(self, loss: str, *, tiled: bool) -> list[Any]:
        """The gradients of hidden and head."""
        from dataclasses import replace

        from heterorl_learner.losses import policy_loss

        algorithm = spec_of(algorithm={"loss": {"type": loss}}).algorithm
        self.hidden.grad = self.head.weight.grad = None
        value, _ = policy_loss(algorithm, replace(self.inputs, logp=self.logp(tiled=tiled)), self.totals)
        value.backward()
        return [self.hidden.grad, self.head.weight.grad]

    def peak(self, *, tiled: bool) -> float:
        """Bytes that a pass takes beyond what there is; how long it took is noted."""
        self.hidden.grad = self.head.weight.grad = None
        # What an earlier pass has left to the allocator would be taken again, and show nothing.
        ctypes.CDLL(None).malloc_trim(0)
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        started = time.perf_counter()
        self.run("gepo", tiled=tiled)
        taken[f"{tiled}"].append(time.perf_counter() - started)
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before

    def timed(self, *, tiled: bool) -> float:
        """Seconds of a pass: one of those whose memory was measured, as long as there are any."""
        if taken[f"{tiled}"]:
            return taken[f"{tiled}"].pop(0)
        return seconds(lambda: self.run("gepo", tiled=tiled))()


def same_gradients() -> None:
    """Of every loss, at a size at which all fit many times; several tiles."""
    import torch

    from heterorl.spec.run import LossType
    from heterorl_learner.engines import policy

    small, tile = LossPass(64, 5000), policy.TILE
    policy.TILE = 64 * 900
    try:
        for loss in get_args(LossType):
            for mine, theirs in zip(small.run(loss, tiled=True), small.run(loss, tiled=False)):
                assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), loss
                assert theirs.abs().max() > 0, loss
                assert torch.isfinite(mine).all(), loss
    finally:
        policy.TILE = tile


def loss_pass(at: Surroundings) -> LossPass:
    return LossPass(512 if at.quick else TOKENS, VOCABULARY)


@benchmark(
    "10-mem",
    what=f"loss forward + backward from the head's input, {TOKENS:,} tokens x {VOCABULARY:,}: peak memory",
    peer="all logits",
    target=at_most(0.2),
    gate="gradients of every loss equal to 1e-5",
    limit="the gradient of W and a tile",
    unit="B",
    memory_gb=12.0,
)
def loss_memory(at: Surroundings) -> Iterator[Pair]:
    if not Path("/proc/self/clear_refs").exists():
        raise CannotMeasure("the peak of a process's memory is read from /proc, which is not there: take Linux")
    both = loss_pass(at)
    yield Pair(lambda: both.peak(tiled=True), lambda: both.peak(tiled=False), same_gradients)


@benchmark(
    "10-time",
    what="the same passes: time",
    peer="all logits",
    target=at_most(1.35),
    gate="gradients of every loss equal to 1e-5",
    limit="4/3 products of matrices, fewer passes over memory",
    memory_gb=12.0,
)
def loss_time(at: Surroundings) -> Iterator[Pair]:
    both = loss_pass(at)
    yield Pair(lambda: both.timed(tiled=True), lambda: both.timed(tiled=False), same_gradients)


# ── how fast it is ───────────────────────────────────────────────────────────────────────────────────────────────────
SPEED = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
ROWS, PROMPT, COMPLETION = 8, 64, 192
FILLED = (1.0, 0.6, 0.45, 0.35, 0.25, 0.2, 0.2, 0.15)
"""Lengths of prompts and completions, as shares of the longest: 0.4 on average, so 0.4 of the padded batch is tokens."""
OUR_BUDGETS = (256, 512, 1024, 2048)
THEIR_BUDGETS = (1, 2, 4, 8)


class Learners:
    """TRL's trainer and our engine on one batch of the same model and loss (gspo, which both have)."""

    def __init__(self, folder: Path, fill: float) -> None:
        from heterorl_learner.engines.build import build_engine

        save_random(SPEED, folder / "model")
        self.spec = spec_of(
            model={"dtype": "float32"},
            algorithm={"loss": {"type": "gspo"}, "groupSize": ROWS},
            generation={"maxPromptTokens": PROMPT, "maxCompletionTokens": COMPLETION, "temperature": 1.0},
        )
        self.engine = build_engine(folder / "model", self.spec)
        self.trainer = _trl_trainer(folder)
        draw = np.random.default_rng(0)
        shares = np.array(FILLED) if fill < 1 else np.ones(ROWS)
        self.lengths = np.round(shares * COMPLETION).astype(np.int32)
        prompts = np.round(draw.permutation(shares) * PROMPT).astype(np.int32)
        self.prompts = [draw.integers(2, 4096, length).astype(np.int32) for length in prompts]
        self.completions = [draw.integers(2, 4096, length).astype(np.int32) for length in self.lengths]
        self.advantages = draw.standard_normal(ROWS).astype(np.float32)
        self.logps = self._own_logps()
        self.tokens = int(prompts.sum() + self.lengths.sum())

    def _own_logps(self) -> list[Any]:
        """The model's, so that no ratio is clipped."""
        from heterorl_learner.engines.torch_ddp import Sequence, micro_batch

        found = []
        for prompt, completion in zip(self.prompts, self.completions):
            one = Sequence(prompt, completion, np.zeros(len(completion), np.float32), 0, 0.0)
            found.append(self.engine.score(micro_batch([one])).numpy())
        return found

    def ours(self, budget: int) -> tuple[float, Any]:
        """The loss, and the gradient of all weights."""
        import torch

        from heterorl_learner.engines.torch_ddp import Sequence
        from heterorl_learner.losses import Totals, policy_loss
        from heterorl_learner.train_step import loss_inputs, plan

        rows = zip(self.prompts, self.completions, self.logps, self.advantages)
        sequences = [Sequence(p, c, q, group=0, advantage=float(a), number=i) for i, (p, c, q, a) in enumerate(rows)]
        totals = Totals.of(torch.from_numpy(self.lengths), max_length=COMPLETION, alpha=0.75)
        self.engine.policy.zero_grad()
        loss = self.engine.forward_backward(
            plan(sequences, budget),
            lambda micro, logp: policy_loss(self.spec.algorithm, loss_inputs(micro, logp), totals)[0],
        )
        return loss, _gradient(self.engine.policy)

    def theirs(self, budget: int) -> tuple[float, Any]:
        """Likewise, so many rows at a time."""
        import torch

        batch = reference.padded(
            self.prompts,
            self.completions,
            self.logps,
            self.advantages,
            max_prompt=PROMPT,
            max_completion=int(self.lengths.max()),
        )
        batch["advantages"] = batch.pop("rewards")
        self.trainer.model.zero_grad()
        self.trainer.current_gradient_accumulation_steps = ROWS // budget
        total = 0.0
        for first in range(0, ROWS, budget):
            rows = {key: value[first : first + budget] for key, value in batch.items()}
            loss = self.trainer._compute_loss(
                self.trainer.model, rows | {"num_items_in_batch": torch.tensor(self.tokens)}
            )
            loss.backward()
            total += loss.item()
        return total, _gradient(self.trainer.model)

    def best(self, run: Callable[[int], Any], budgets: tuple[int, ...]) -> Callable[[], float]:
        """Tokens a second at the budget that is fastest here."""
        took = {budget: min(seconds(partial(run, budget))() for _ in range(3)) for budget in budgets}
        budget = min(took, key=took.__getitem__)
        timed = seconds(partial(run, budget))
        return lambda: self.tokens / timed()

    def gate(self) -> None:
        import torch

        (mine, own), (theirs, trl) = self.ours(OUR_BUDGETS[-1]), self.theirs(ROWS)
        assert abs(mine - theirs) <= 1e-5 * max(1.0, abs(theirs)), f"losses {mine} and {theirs}"
        assert trl.abs().max() > 1e-4
        assert torch.allclose(own, trl, rtol=1e-3, atol=1e-5 * trl.abs().max().item())


def _gradient(model: Any) -> Any:
    import torch

    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@cache
def _trl() -> tuple[Any, Any]:
    before, sys.modules["vllm"] = sys.modules.get("vllm"), None  # type: ignore[assignment]  # not needed for a loss
    try:
        trl: Any = import_module("trl")
    except ImportError as error:
        raise CannotMeasure(f"the peer is not installed ({error}): pip install trl==1.16.0") from error
    finally:
        sys.modules.pop("vllm") if before is None else sys.modules.update(vllm=before)
    return trl.GRPOConfig, trl.GRPOTrainer


def _trl_trainer(folder: Path) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config, trainer_class = _trl()
    save_character_tokenizer(folder / "tokenizer")
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        lambda completions, **_: [0.0] * len(completions),
        args=config(
            str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=ROWS,
            per_device_train_batch_size=ROWS,
            max_completion_length=COMPLETION,
            gradient_checkpointing=False,
            loss_type="grpo",
            importance_sampling_level="sequence",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1"] * ROWS}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )
    trainer.model.train()
    return trainer


def _speed(at: Surroundings, fill: float) -> Iterator[Pair]:
    both = Learners(at.folder, fill)
    yield Pair(both.best(both.ours, OUR_BUDGETS), both.best(both.theirs, THEIR_BUDGETS), both.gate)


@benchmark(
    "9-fill40",
    what=f"learner, real tokens a second, {ROWS} x ({PROMPT} + {COMPLETION}) of which 0.4 are tokens, best budget",
    peer="TRL 1.16 GRPOTrainer, best budget",
    target=at_least(2.0),
    gate="loss and gradients equal to 1e-5",
    limit="1/fill",
    unit="tokens/s",
    quick=False,
)
def speed_fill40(at: Surroundings) -> Iterator[Pair]:
    yield from _speed(at, 0.4)


@benchmark(
    "9-fill100",
    what="the same at fill 1",
    peer="TRL 1.16 GRPOTrainer, best budget",
    target=at_least(1.05),
    gate="loss and gradients equal to 1e-5",
    limit="1",
    unit="tokens/s",
    quick=False,
)
def speed_fill100(at: Surroundings) -> Iterator[Pair]:
    yield from _speed(at, 1.0)
