"""LoRA: adapters alone are trained, published and kept, and make the same policy wherever they are put in again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import architectures
from builders import exchange_at, put, rollout_name, rollout_of, run_of, spec_of
from heterorl.errors import ModelError
from heterorl.exchange.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_tensors, merge_into
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import ModelOrigin
from heterorl.exchange.version import Version
from heterorl.local.push import upload_of
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import RunSpec
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.torch_ddp import MicroBatch, Sequence, TrainingEngine, micro_batch, save_weights
from heterorl_learner.prepare import find_model
from heterorl_learner.train import Trainer
from heterorl_sampler.adapters import Merger, whole_model
from heterorl_sampler.engines.transformers import TransformersEngine
from heterorl_sampler.eval_command import main
from heterorl_sampler.weight_sync import Swap, WeightSync

pytestmark = pytest.mark.usefixtures("every_version_is_published")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def run_spec(dtype: str = "float32", learner: dict[str, Any] | None = None, **lora: Any) -> RunSpec:
    return spec_of(model={"dtype": dtype, "lora": {"rank": 4, **lora}}, learner=learner or {})


def sequences(number: int, vocabulary: int = 24) -> list[Sequence]:
    rng = np.random.default_rng(number)
    return [
        Sequence(
            rng.integers(vocabulary, size=5).astype(np.int32),
            rng.integers(vocabulary, size=length).astype(np.int32),
            np.zeros(length, np.float32),
            group=0,
            advantage=float(rng.normal()),
        )
        for length in (9, 14, 3, 21)[:number]
    ]


def policy_gradient(batch: MicroBatch, logp: Tensor) -> Tensor:
    return -(logp * batch.advantages[batch.seq_ids]).sum() / 10


def train(engine: TrainingEngine, steps: int = 3, rate: float = 1e-2) -> None:
    for _ in range(steps):
        engine.forward_backward([micro_batch(sequences(4))], policy_gradient)
        engine.step(rate)


def scores_of(model: Any, batch: list[Sequence]) -> Tensor:
    """Log-probabilities of the completions, by transformers' plain forward over each sequence alone."""
    found = []
    for s in batch:
        ids = torch.tensor(np.concatenate([s.prompt_ids, s.completion_ids]), dtype=torch.long)
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found.append(logp[len(s.prompt_ids) - 1 :])
    return torch.cat(found)


@pytest.fixture(scope="module", params=["tied", "untied", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Any) -> Path:
    if request.param == "gpt2":  # its linear layers keep their weights as [in, out]
        return architectures.save("gpt2", tmp_path_factory.mktemp("gpt2"))
    return tiny_model_dir(tied=request.param == "tied")


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_only_adapters_are_trained_and_the_first_version_is_the_starting_model(folder: Path) -> None:
    engine = build_engine(folder, run_spec())
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = sequences(4)
    torch.testing.assert_close(engine.score(micro_batch(batch)), scores_of(start, batch), atol=1e-5, rtol=0)
    engine.forward_backward([micro_batch(batch)], policy_gradient)
    with_gradient = {name for name, p in engine.policy.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in engine.policy.named_parameters() if ".lora_" in name} != set()
    engine.step(1e-2)
    own = dict(start.named_parameters())
    for name, p in engine.policy.model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(p, own[name.replace(".base_layer", "")]), name


def test_merged_weights_and_peft_itself_score_as_the_adapters_do(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    engine = build_engine(folder, run_spec())
    train(engine)
    batch, published = sequences(4), tmp_path / "published"
    expected = engine.score(micro_batch(batch))
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (scores_of(start, batch) - expected).abs().max() > 0.01  # training moved it
    published.mkdir()
    save_weights(engine.full_state_dict(), engine.adapter_config, published)
    by_peft = PeftModel.from_pretrained(start, published)
    torch.testing.assert_close(scores_of(by_peft, batch), expected, atol=1e-5, rtol=0)

    merge_into(published, base_tensors(folder, "float32"))
    (published / "config.json").write_text((folder / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    torch.testing.assert_close(scores_of(merged, batch), expected, atol=1e-5, rtol=0)


def test_the_seed_is_the_adapters_own_and_the_runs(tiny_model_dir: Callable[..., Path]) -> None:
    def first(seed: int, lora_seed: int) -> Tensor:
        spec = run_spec(seed=lora_seed).model_copy(update={"seed": seed})
        return next(iter(build_engine(tiny_model_dir(), spec).full_state_dict().values()))

    assert torch.equal(first(0, 1), first(1, 0))
    assert not torch.equal(first(0, 0), first(0, 1))


def test_named_layers_alone_get_adapters(tiny_model_dir: Callable[..., Path]) -> None:
    engine = build_engine(tiny_model_dir(), run_spec(targetModules=["q_proj", "down_proj"]))
    assert {name.split(".")[-3] for name in engine.full_state_dict()} == {"q_proj", "down_proj"}
    shapes = {name.split(".", 5)[5]: tuple(t.shape) for name, t in engine.full_state_dict().items() if ".1." in name}
    assert shapes["mlp.down_proj.lora_A.weight"] == (4, 128)
    assert shapes["mlp.down_proj.lora_B.weight"] == (64, 4)


@pytest.mark.parametrize(
    ("tied", "name", "message"),
    [
        (True, "q_porj", "the model has no linear layer q_porj; it has down_proj, gate_proj"),
        (True, "embed_tokens", "no linear layer embed_tokens"),
        (True, "lm_head", "lm_head is the output head, which gets no adapter"),
        (False, "lm_head", "lm_head is the output head, which gets no adapter"),
    ],
)
def test_a_layer_that_cannot_have_an_adapter_is_refused_by_name(
    tiny_model_dir: Callable[..., Path], tied: bool, name: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_engine(tiny_model_dir(tied=tied), run_spec(targetModules=["q_proj", name]))


def test_experts_in_one_tensor_are_left_out_or_the_model_is_refused(tmp_path: Path) -> None:
    folder = architectures.save("qwen3_moe", tmp_path)
    with pytest.raises(ModelError, match=r"Qwen3MoeForCausalLM keeps the experts of a layer in one tensor"):
        build_engine(folder, run_spec())
    engine = build_engine(folder, run_spec(targetModules=ATTENTION))
    assert {name.split(".")[-3] for name in engine.full_state_dict()} == set(ATTENTION)


@pytest.mark.parametrize(("name", "layout"), [("llama", "packed"), ("opt", "padded"), ("qwen3_next", "padded")])
def test_a_step_does_not_depend_on_how_it_is_divided(name: str, layout: str, tmp_path: Path) -> None:
    batch = sequences(4, architectures.VOCABULARY)
    found = []
    for packs in ([batch], [[s] for s in batch]):
        layers = ATTENTION if name == "qwen3_next" else []
        engine = build_engine(architectures.save(name, tmp_path / name), run_spec(targetModules=layers))
        assert engine.layout == layout
        gradients = []
        for _ in range(2):  # in the first step B is 0 and A has no gradient
            engine.forward_backward([micro_batch(pack) for pack in packs], policy_gradient)
            gradients.append(torch.cat([p.grad.flatten() for p in engine.policy.parameters() if p.grad is not None]))
            engine.step(1e-2)
        found.append(gradients[1])
    assert torch.cosine_similarity(*found, dim=0) > 0.9999
    assert found[0].norm().item() == pytest.approx(found[1].norm().item(), rel=1e-3)


@pytest.mark.parametrize("learner", [{"strategy": "torch"}, {"strategy": "torch", "gradientCheckpointing": True}])
def test_a_resumed_learner_goes_on_to_the_bit_and_its_checkpoint_holds_no_frozen_weights(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, learner: dict[str, Any]
) -> None:
    first, second = (build_engine(tiny_model_dir(), run_spec(learner=learner)) for _ in range(2))
    train(first)
    first.save(tmp_path).write()
    second.load(tmp_path)
    train(first), train(second)
    assert same(first.full_state_dict(), second.full_state_dict())
    parameters = sum(t.numel() for t in first.full_state_dict().values())
    saved = torch.load(tmp_path / "engine.pt", weights_only=True)
    assert sum(t.numel() for t in saved["policy"].values()) == parameters
    assert all(state["exp_avg"].numel() < 1000 for state in saved["optimizer"]["state"].values())


def same(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def test_bfloat16_freezes_the_model_in_bfloat16_and_trains_adapters_in_float32(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model_dir(tokenizer=True)
    engine = build_engine(folder, run_spec("bfloat16"))
    kinds = {(".lora_" in name, p.dtype) for name, p in engine.policy.named_parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    train(engine)
    save_weights(engine.full_state_dict(), engine.adapter_config, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / ADAPTER_WEIGHTS).values()} == {torch.bfloat16}
    merge_into(tmp_path, base_tensors(folder, "bfloat16"))
    sampler = TransformersEngine(folder, dtype="bfloat16")
    sampler.load_weights(tmp_path)
    (s,) = sequences(1)
    found = sampler.score([[*s.prompt_ids.tolist(), *s.completion_ids.tolist()]])[0][len(s.prompt_ids) - 1 :]
    assert (torch.tensor(found) - engine.score(micro_batch([s]))).abs().mean() < 0.1


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def prepared_run(root: Path, model_dir: Path, output: str = "merged", steps: int = 2, **algorithm: Any) -> Exchange:
    run = run_of(
        model={"dtype": "float32", "lora": {"rank": 4, "output": output}},
        learner={"steps": steps, "batch": {"groups": 1}, "optimizer": {"learningRate": 1e-2}},
        algorithm={"groupSize": 2, **algorithm},
        exchange={"pollSeconds": 0.01, "retention": {"weights": 10}},
    )
    exchange = exchange_at(root, run)
    exchange.model_dir.symlink_to(model_dir)
    exchange.data_file("train").parent.mkdir()
    exchange.data_file("train").write_text(json.dumps({"prompt_ids": [3, 4, 5]}) + "\n")
    exchange.mark_prepared(ModelOrigin(source="tiny", digest="0123"))
    for seq in range(steps):
        put(exchange, {rollout_name(seq): rollout_of()})
    return exchange


class Watch:
    """Where the learner's metrics go."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records += [record] if "step" in record else []

    def close(self) -> None:
        """Nothing to let go."""


def trained(exchange: Exchange) -> tuple[TrainingEngine, list[dict[str, Any]]]:
    engine, watch = build_engine(exchange.model_dir, exchange.spec), Watch()
    assert Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    return engine, watch.records


def test_each_version_is_adapters_that_a_sampler_merges_and_whose_canary_holds(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    exchange = prepared_run(tmp_path / "run", tiny_model_dir(tokenizer=True))
    trained(exchange)
    sampler = TransformersEngine(exchange.model_dir, dtype="float32")
    merger = Merger(exchange.model_dir, "float32", tmp_path)
    whole = (exchange.model_dir / "model.safetensors").stat().st_size
    for step in (0, 1, 2):
        fetched = exchange.fetch_weights(Version(step, 1), tmp_path / str(step))
        assert (fetched.folder / ADAPTER_WEIGHTS).stat().st_size < whole / 4
        merger.merge_into(fetched.folder)
        before = fetched.canary.mean_abs_diff(sampler.score(fetched.canary.token_ids))
        sampler.load_weights(fetched.folder)
        assert fetched.canary.check(fetched.version, sampler.score, 1e-5) < 1e-5
        assert (before > 1e-4) == (step > 0)


def test_a_sampler_follows_adapters_and_refuses_those_of_another_model(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    exchange = prepared_run(tmp_path / "run", tiny_model_dir(tokenizer=True))
    trained(exchange)
    other = exchange.root / "weights" / str(Version(2, 1)) / "manifest.json"
    other.write_text(other.read_text().replace('"0123"', '"4567"'))
    sampler = TransformersEngine(exchange.model_dir, dtype="float32")
    weights = WeightSync(exchange, sampler, exchange.spec.slots[0], tmp_path)
    swaps: list[Swap] = []
    give_up = time.monotonic() + 300
    while not swaps and time.monotonic() < give_up:
        swaps += [swap] if (swap := weights.advance()) else []
        time.sleep(0.01)
    weights.close()
    (swap,) = swaps
    assert swap.version == Version(1, 1)
    assert swap.canary_mean_abs_diff < 1e-5
    assert list(weights.refused) == [str(Version(2, 1))]
    assert "belong to the model with digest 4567" in weights.refused[str(Version(2, 1))]


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_the_output_is_what_was_trained_and_can_be_evaluated_and_pushed(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], output: str
) -> None:
    from peft import PeftModel

    exchange = prepared_run(tmp_path / "run", tiny_model_dir(tokenizer=True), output)
    engine, _ = trained(exchange)
    pushed = {name for name, _ in upload_of(exchange.root).files}
    if output == "merged":
        model = AutoModelForCausalLM.from_pretrained(exchange.output_dir, dtype=torch.float32)
        assert {"config.json", "model.safetensors"} <= pushed
        assert ADAPTER_WEIGHTS not in pushed
    else:
        start = AutoModelForCausalLM.from_pretrained(exchange.model_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(start, exchange.output_dir)
        assert {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer.json"} <= pushed
        assert not {"config.json", "model.safetensors"} & pushed
    expected = engine.score(micro_batch(sequences(4)))
    torch.testing.assert_close(scores_of(model, sequences(4)), expected, atol=1e-5, rtol=0)
    with whole_model(exchange.output_dir) as folder:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(scores_of(whole, sequences(4)), expected, atol=1e-5, rtol=0)

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"problem": "1+1=", "answer": "2"}) + "\n")
    options = ["--data", str(data), "--engine", "transformers", "--max-tokens", "4"]
    assert main([str(exchange.root), *options, "--out", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert result["problems"] == 1


def test_a_checkpoints_model_is_adapters_which_a_run_does_not_start_from(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    exchange = prepared_run(tmp_path / "run", tiny_model_dir(tokenizer=True))
    trained(exchange)
    checkpoint = exchange.root / "checkpoints" / "step-00000002"
    assert ADAPTER_WEIGHTS in {name for name, _ in upload_of(exchange.root, step=2).files}
    with pytest.raises(ModelError, match=r"holds LoRA adapters, not a model; set it to the output/ of a run"):
        find_model(spec_of(model={"source": "path", "path": str(checkpoint)}).model)
    assert find_model(spec_of(model={"source": "path", "path": str(exchange.root)}).model) == exchange.output_dir


def test_the_reference_is_the_model_without_its_adapters(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(tokenizer=True)
    exchange = prepared_run(tmp_path / "run", folder, steps=3, klToReference={"weight": 0.1})
    engine, records = trained(exchange)
    assert engine.reference is None  # no second copy
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = engine.reference_logps(micro_batch(sequences(4)))
    torch.testing.assert_close(reference, scores_of(start, sequences(4)), atol=1e-5, rtol=0)
    kl = [record["reference_kl"] for record in records]
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert min(kl[1:]) > 1e-5
    assert (engine.score(micro_batch(sequences(4))) - reference).abs().max() > 0.01  # and the adapters are on again
