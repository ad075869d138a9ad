"""A sampler's engine, real vLLM on the CPU: swaps of weights, continuous feeding, behaviour log-probabilities."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import reference
from bench.benchmark import CannotMeasure, Pair, Surroundings, at_least, at_most, benchmark, seconds
from bench.shapes import qwen3, save_qwen3
from builders import exchange_at, run_of
from heterorl.exchange.canary import CANARY_TOKENS, Canary
from heterorl.exchange.rollout import Completion, Sampling
from heterorl.exchange.version import Version

GROUP = 8
AT_A_TIME = 4
"""Prompts in generation."""
WAVES = 5
TOKENS = 32
"""Of each completion of rows 7 and 13."""
LONG = 400
"""Tokens of completions that are not to end while something is measured."""
TOLERANCE = 1e-4
PUSHES = "torch.load, load_state_dict, tensors pushed one by one"


class Bench:
    """One engine for all rows, with two versions of its weights: as we publish them, and as the reference saves them."""

    def __init__(self, quick: bool) -> None:
        if find_spec("vllm") is None:
            raise CannotMeasure("vLLM is not installed: install heterorl[sampler-cpu]")
        import torch
        from transformers import AutoModelForCausalLM

        from heterorl_sampler.engines.vllm import VLLMEngine

        self.folder = Path(tempfile.mkdtemp(prefix="heterorl-bench-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        shape = {"hidden": 256, "layers": 4, "vocabulary": 4096} if quick else {"hidden": 512, "layers": 10}
        config = qwen3(**{"vocabulary": 16_384, **shape}, tied=False)
        for number in (0, 1):
            save_qwen3(self.folder / str(number), config)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.folder / "1", dtype=torch.float32)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)
        self.model.save_pretrained(self.folder / "1")
        draw = np.random.default_rng(0)
        self.texts = [draw.integers(2, config.vocab_size, CANARY_TOKENS).tolist() for _ in range(2)]
        self.prompts = [draw.integers(2, config.vocab_size, 32).tolist() for _ in range(WAVES * AT_A_TIME)]
        # As groups of one prompt: the longest in each wave of AT_A_TIME is the limit, and the mean 0.4 of it.
        longest = 40 if quick else 56
        shares = draw.permuted(np.tile([1.0, 0.3, 0.2, 0.1], (WAVES, 1)), axis=1).ravel()
        self.lengths = [max(1, int(share * longest)) for share in shares]
        self.exchange = exchange_at(self.folder / "run", run_of(model={"dtype": "float32"}))
        self.engine = VLLMEngine(
            self.folder / "0",
            dtype="float32",
            max_model_len=512,
            max_running=AT_A_TIME * GROUP,
            gpus=0,
            tensor_parallel=1,
            gpu_memory_utilization=0.9,
            kv_cache_bytes=512 * 2**20,
        )
        self._publish()

    def _publish(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        for number in (0, 1):
            model: Any = AutoModelForCausalLM.from_pretrained(self.folder / str(number), dtype=torch.float32)
            torch.save(model.state_dict(), self.folder / f"{number}.pt")
            ids = torch.tensor(self.texts)
            canary = Canary(self.texts, reference.second_forward(model, ids).tolist())
            version = Version(number, 1)
            staged = self.exchange.stage_weights(version)
            shutil.copy(self.folder / str(number) / "model.safetensors", staged / "model.safetensors")
            self.exchange.commit_weights(version, canary)
        self.numbers = itertools.cycle((1, 0))

    # ── swaps ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def fetch(self, number: int) -> Any:
        """As a sampler does it while it generates."""
        return self.exchange.fetch_weights(Version(number, 1), self.folder / f"fetched-{number}")

    def load(self, fetched: Any) -> None:
        """The swap itself, with the canary."""
        self.engine.load_weights(fetched.folder, fetched.version)
        fetched.canary.check(fetched.version, self.engine.score, TOLERANCE)

    def push(self, number: int) -> None:
        """The reference's swap; running requests are read anew as ours are, or their tokens would be of neither."""
        tensors: list[tuple[str, Any]] = []  # of one reload: vLLM packs a layer's tensors together
        reference.load_and_push(self.folder / f"{number}.pt", self.model, tensors.extend)
        vllm = self.engine._engine
        vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        vllm.reset_prefix_cache(reset_running_requests=True)

    def gate_of_swaps(self) -> None:
        """After either swap the engine computes what transformers does with these weights."""
        for number in (1, 0):
            fetched = self.fetch(number)
            self.load(fetched)
            self.load(self.fetch(1 - number))
            self.push(number)
            fetched.canary.check(fetched.version, self.engine.score, TOLERANCE)

    # ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────
    def add(self, place: int, tokens: int | None = None) -> int:
        """Queue a group."""
        sampling = Sampling(max_tokens=tokens or self.lengths[place % len(self.lengths)])
        return self.engine.add(self.prompts[place % len(self.prompts)], GROUP, sampling, seed=place << 16)

    def waves(self) -> dict[int, list[Completion]]:
        """All groups as the reference generates them."""

        def generate(places: list[int]) -> list[tuple[int, list[Completion]]]:
            made = {self.add(place): place for place in places}
            done = []
            while self.engine.num_groups:
                done += [(made[number], group) for number, group in self.engine.step()]
            return done

        return dict(reference.waves(list(range(len(self.prompts))), AT_A_TIME, generate))

    def continuously(self) -> dict[int, list[Completion]]:
        """All groups as a sampler does: twice as many in the engine as are generated at a time."""
        waiting, made, done = iter(range(len(self.prompts))), dict[int, int](), dict[int, list[Completion]]()
        while len(done) < len(self.prompts):
            for place in itertools.islice(waiting, 2 * AT_A_TIME - self.engine.num_groups):
                made[self.add(place)] = place
            done |= {made[number]: group for number, group in self.engine.step()}
        return done

    def busy(self) -> None:
        """Enough in generation for whatever is measured in its midst."""
        self.engine.drop()
        for place in range(2 * AT_A_TIME):
            self.add(place, tokens=LONG)
        for _ in range(10):
            self.engine.step()


@cache
def bench(quick: bool) -> Bench:
    """The one of this process."""
    return Bench(quick)


def rate(generate: Callable[[], dict[int, list[Completion]]]) -> Callable[[], float]:
    """Tokens a second."""

    def measured() -> float:
        started = time.perf_counter()
        done = generate()
        tokens = sum(len(completion.token_ids) for group in done.values() for completion in group)
        return tokens / (time.perf_counter() - started)

    return measured


# ── swaps ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@benchmark(
    "3",
    what="a full swap, from the file on the volume to the engine: fetch, verify, load, canary",
    peer=PUSHES,
    target=at_most(0.5),
    gate="canary",
    limit="one read, one copy",
    missed="vLLM's reload alone is more than the target leaves. With 42 M parameters in float32 ours takes 0.16 s for the copy"
    " with its SHA-256, 0.13 s for the reload and 0.19 s for the canary, a forward of 544 tokens, and waits for the disk; the"
    " reference, which checks nothing, takes 0.10 s for torch.load and load_state_dict and 0.11 s for the reload. A forward of"
    " 544 tokens is a thousand operations a weight, a load is a few bytes: on a CPU the canary stays the greater part at any size",
    memory_gb=4.0,
    disk_gb=2.0,
    quick=False,
)
def swap(at: Surroundings) -> Iterator[Pair]:
    b = bench(at.quick)
    b.engine.drop()
    ours = seconds(lambda: b.load(b.fetch(next(b.numbers))))
    yield Pair(ours, seconds(lambda: b.push(next(b.numbers))), b.gate_of_swaps)


@benchmark(
    "4",
    what="the engine without tokens during a swap, in the midst of generation",
    peer=PUSHES,
    target=at_most(0.25),
    gate="canary; every token's version is known",
    limit="copy into the packed layout",
    missed="both sides end in the same reload of vLLM, 0.12 s, as much as the target allows, and then read running requests"
    " anew until one has a token, 0.32 s. Ours saves torch.load and load_state_dict, 0.10 s, and adds the canary, 0.19 s,"
    " without which no token is trusted",
    memory_gb=4.0,
    disk_gb=2.0,
    quick=False,
)
def pause(at: Surroundings) -> Iterator[Pair]:
    b = bench(at.quick)
    fetched: list[Any] = []

    def before() -> None:
        b.busy()
        fetched[:] = [b.fetch(next(b.numbers))]  # on a thread of its own, in a sampler

    def until_a_token(swap: Callable[[], object]) -> None:
        swap()
        states = b.engine._engine.output_processor.request_states.values()
        had = sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer)
        while sum(s.detokenizer.num_output_tokens() for s in states if s.detokenizer) == had:
            b.engine.step()

    ours = seconds(lambda: until_a_token(lambda: b.load(fetched[0])), before=before)
    theirs = seconds(lambda: until_a_token(lambda: b.push(next(b.numbers))), before=before)

    def gate() -> None:
        b.engine.drop()
        b.gate_of_swaps()
        b.load(b.fetch(0))
        for place in range(AT_A_TIME):
            b.add(place, tokens=40)
        for _ in range(10):
            b.engine.step()
        b.load(b.fetch(1))
        done: list[Completion] = []
        while b.engine.num_groups:
            done += [completion for _, group in b.engine.step() for completion in group]
        assert all(sum(count for _, count in c.versions) == len(c.token_ids) for c in done), "a token of no version"
        assert any(len(c.versions) > 1 for c in done), "no completion lived through the swap"

    yield Pair(ours, theirs, gate)


@benchmark(
    "5",
    what="tokens a second with a swap every 20 times the swap's time",
    peer="ours without swaps",
    target=at_least(0.95),
    gate="canary",
    limit="1",
    missed="besides the swap itself, 0.05 of the time, each of the 32 running requests is read anew by the new weights, 0.1 of"
    " it: only then a token's log-probability is that of the weights it is marked with (docs/exchange.md). On a CPU reading a"
    " token costs as much as making one; where it is cheaper, as on a GPU, so is this",
    unit="tokens/s",
    memory_gb=4.0,
    disk_gb=2.0,
    quick=False,
)
def swapping(at: Surroundings) -> Iterator[Pair]:
    b = bench(at.quick)
    b.engine.drop()
    fetched = [b.fetch(0)]
    swap_s = min(seconds(lambda: b.load(fetched[0]))() for _ in range(3))

    def tokens() -> int:
        states = b.engine._engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer)

    def measured(swaps: bool) -> float:
        """One swap and what is generated until the next is due; groups are fed as they are finished.

        Without swaps a third of the time says as much.
        """
        lasts_s = (20 if swaps else 7) * swap_s
        b.busy()
        place, begun, finished, started = 100, tokens(), 0, time.perf_counter()
        if swaps:
            b.load(fetched[0])
        while time.perf_counter() - started < lasts_s:
            for _, group in b.engine.step():
                finished += sum(len(completion.token_ids) for completion in group)
                place += 1
                b.add(place, tokens=LONG)
        return (finished + tokens() - begun) / (time.perf_counter() - started)

    yield Pair(lambda: measured(True), lambda: measured(False), b.gate_of_swaps)


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def same_tokens(ours: dict[int, list[Completion]], theirs: dict[int, list[Completion]]) -> None:
    """The same seeds draw the same tokens; where two sums in float32 are rounded apart, a few may differ."""
    pairs = [(one, other) for place in theirs for one, other in zip(ours[place], theirs[place], strict=True)]
    same = sum(one.token_ids == other.token_ids for one, other in pairs)
    assert same >= 0.95 * len(pairs), f"{len(pairs) - same} of {len(pairs)} completions differ"


@benchmark(
    "6",
    what=f"rollout tokens a second at skewed lengths (mean/max 0.4), groups of {GROUP}",
    peer=f"reference waves of {AT_A_TIME} prompts",
    target=at_least(1.4),
    gate="same seeds, same tokens",
    limit="max/mean, 2.5, where a step takes as long for one sequence as for many",
    unit="tokens/s",
    memory_gb=4.0,
    disk_gb=2.0,
    quick=False,
    gate_warms=True,
)
def feeding(at: Surroundings) -> Iterator[Pair]:
    b = bench(at.quick)
    b.engine.drop()
    yield Pair(rate(b.continuously), rate(b.waves), lambda: same_tokens(b.continuously(), b.waves()))


@benchmark(
    "7",
    what="behaviour log-probabilities: what they add to generation",
    peer="a second forward over the finished rollouts",
    target=at_most(0.1),
    gate="difference under 1e-3 in float32",
    limit="0",
    memory_gb=4.0,
    disk_gb=2.0,
    quick=False,
)
def log_probabilities(at: Surroundings) -> Iterator[Pair]:
    import torch
    from transformers import AutoModelForCausalLM

    b = bench(at.quick)
    b.engine.drop()
    b.load(b.fetch(0))
    model: Any = AutoModelForCausalLM.from_pretrained(b.folder / "0", dtype=torch.float32)
    prompts = b.prompts[:AT_A_TIME]
    made = b.engine.generate(prompts, GROUP, Sampling(max_tokens=TOKENS), seed=0)
    texts = [[*p, *c.token_ids] for p, group in zip(prompts, made, strict=True) for c in group or ()]
    logps = [c.logp for group in made for c in group or ()]

    def forward() -> list[Any]:
        return [reference.second_forward(model, torch.tensor([text]))[0] for text in texts]

    def gate() -> None:
        for logp, found in zip(logps, forward(), strict=True):
            assert np.abs(found[-len(logp) :].numpy() - np.array(logp)).max() < 1e-3, "log-probabilities differ"

    def added() -> float:
        without, with_them = (min(bare(b, prompts, TOKENS, wanted)[0] for _ in range(2)) for wanted in (None, 0))
        return max(0.0, with_them - without)

    yield Pair(added, seconds(forward), gate)


def bare(b: Bench, prompts: list[list[int]], tokens: int, logprobs: int | None) -> tuple[float, list[list[int]]]:
    """The seconds and tokens of a plain loop over vLLM's own engine."""
    from vllm import RequestOutput, SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    engine, done = b.engine._engine, dict[str, list[list[int]]]()
    started = time.perf_counter()
    for place, prompt in enumerate(prompts):
        params = SamplingParams(
            n=GROUP,
            max_tokens=tokens,
            seed=place << 16,
            logprobs=logprobs,
            stop_token_ids=[1],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(f"bare-{place}", tokens_input(prompt), params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            done[output.request_id] = [list(completion.token_ids) for completion in output.outputs]
    elapsed = time.perf_counter() - started
    return elapsed, [ids for place in range(len(prompts)) for ids in done[f"bare-{place}"]]


@benchmark(
    "13",
    what="tokens a second of our wrapper, steady state",
    peer="vLLM's own engine in a bare loop, on the same prompts",
    target=at_least(0.97),
    gate="same tokens at the same seeds",
    limit="1",
    unit="tokens/s",
    memory_gb=4.0,
    disk_gb=2.0,
    quick=False,
    gate_warms=True,
)
def wrapper(at: Surroundings) -> Iterator[Pair]:
    b = bench(at.quick)
    b.engine.drop()
    b.load(b.fetch(0))
    prompts = b.prompts[: 2 * AT_A_TIME]

    def ours() -> dict[int, list[Completion]]:
        made = {b.add(place, TOKENS): place for place in range(len(prompts))}
        done: dict[int, list[Completion]] = {}
        while b.engine.num_groups:
            done |= {made[number]: group for number, group in b.engine.step()}
        return done

    def theirs() -> float:
        elapsed, ids = bare(b, prompts, TOKENS, 0)
        return sum(map(len, ids)) / elapsed

    def gate() -> None:
        mine = [completion.token_ids for _, group in sorted(ours().items()) for completion in group]
        bares = bare(b, prompts, TOKENS, 0)[1]
        same = sum(one == other for one, other in zip(mine, bares, strict=True))
        assert same >= 0.95 * len(bares), f"{len(bares) - same} of {len(bares)} completions differ"

    yield Pair(rate(ours), theirs, gate)
