"""Sequences of a micro-batch never see each other, whatever the model: tiny models of many architectures.

Which of them transformers reads wrongly when packed is known from its issues (#46093, #46859, #44867), ms-swift#9565
and slime#1686. `make models-table` does the same for all architectures, into docs/models.md.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import architectures
from bench.models_table import committed
from builders import rollout_of, spec_of
from heterorl.errors import ModelError
from heterorl.exchange.rollout import Rollout
from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.packing import Verdict, choose_reading
from heterorl_learner.engines.policy import Layout, Policy, Reading
from heterorl_learner.engines.torch_ddp import Sequence, TrainingEngine, micro_batch, token_logps
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import train_on

LAYOUTS = {
    **dict.fromkeys(("llama", "qwen3", "gemma2", "mistral", "phi3", "gpt2", "mixtral"), "packed"),
    **dict.fromkeys(("opt", "falcon", "llama4", "qwen3_next", "qwen3_5", "kimi_linear", "jamba", "rwkv"), "padded"),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda name: architectures.save(name, tmp_path_factory.mktemp(name)))


def run_spec(token_budget: int = 8192, **spec: object) -> RunSpec:
    model = {"dtype": spec.pop("dtype", "float32")}
    return spec_of(model=model, learner={"batch": {"tokensPerMicroBatch": token_budget}}, **spec)


# ── the same step, however it is divided ─────────────────────────────────────────────────────────────────────────────
def step_batch() -> StepBatch:
    rng = np.random.default_rng(0)
    lengths = (11, 30, 5)
    uniform = -np.log(architectures.VOCABULARY)  # about what models that know nothing yet give to a token
    return StepBatch(
        step=0,
        names=[],
        rollouts=[
            rollout_of((1.0, 0.0, 0.0), lengths, logp=list(uniform + 0.1 * rng.normal(size=sum(lengths))))
            for _ in range(3)
        ],
        wait_s=0.0,
    )


def step_of(folder: Path, token_budget: int, loss: str = "cispo") -> tuple[float, Tensor, TrainingEngine]:
    """The loss and the gradient of one step; that of cispo is never clipped away."""
    spec = run_spec(token_budget, algorithm={"loss": {"type": loss}, "groupSize": 3})
    engine = build_engine(folder, spec)
    metrics = train_on(engine, spec, step_batch())
    gradients = [p.grad.flatten() for p in engine.policy.parameters() if p.grad is not None]
    return metrics["loss"], torch.cat(gradients), engine


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_does_not_depend_on_how_it_is_divided(name: str, folder: Callable[[str], Path]) -> None:
    expected, gradient, engine = step_of(folder(name), 1)  # one sequence a pass: nothing to mix up
    assert engine.layout == LAYOUTS[name]
    for token_budget in (40, 100_000):
        loss, found, _ = step_of(folder(name), token_budget)
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert torch.cosine_similarity(found, gradient, dim=0) > 0.9999
        assert found.norm().item() == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_the_table_of_models_says_the_same() -> None:
    assert {name: committed()[name][1] for name in LAYOUTS} == LAYOUTS


def test_whole_groups_in_a_padded_model_give_the_step_that_one_pack_gives(folder: Callable[[str], Path]) -> None:
    expected, gradient, _ = step_of(folder("opt"), 1, "eqp")
    loss, found, _ = step_of(folder("opt"), 100_000, "eqp")
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert torch.cosine_similarity(found, gradient, dim=0) > 0.9999


class OneRowAtATime(LlamaForCausalLM):
    """As models are whose code was written for one text: it overlooks positions and takes no batch."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: object) -> object:
        if len(input_ids) > 1:
            raise ValueError("one row at a time")
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
def test_all_layouts_give_the_values_and_gradients_of_each_sequence_alone(layout: Layout) -> None:
    sequences = [s for r in step_batch().rollouts for s in drawn_from(r)]
    results = []
    for policy, batches in (
        (Policy(architectures.tiny_model("llama")), [micro_batch(sequences)]),
        (Policy(architectures.tiny_model("llama")), [micro_batch([s]) for s in sequences]),
    ):
        policy.reading = Reading(layout)
        logp = torch.cat([token_logps(policy, batch) for batch in batches])
        (logp * torch.arange(len(logp))).sum().backward()
        results.append(
            (logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        )
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    assert torch.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.999999


def drawn_from(rollout: Rollout) -> list[Sequence]:
    """Its completions as the learner takes them."""
    parts = np.split(rollout.completion_ids, np.cumsum(rollout.lengths)[:-1])
    return [Sequence(rollout.prompt_ids, part, np.zeros(len(part), np.float32), 0, 1.0) for part in parts]


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────
def layout_of(model: PreTrainedModel, dtype: str = "float32", *, autocast: bool = False) -> str:
    return choose_reading(Policy(model), run_spec(dtype=dtype), CPU, autocast=autocast).layout


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "opt", "llama4", "qwen3_next", "qwen3_5", "rwkv"])
@pytest.mark.parametrize(("how", "scale"), [("autocast", 0.2), ("whole", 1.0)])
def test_the_choice_is_the_same_in_bfloat16(name: str, how: str, scale: float) -> None:
    model = architectures.tiny_model(name)
    with torch.no_grad():  # narrow, as new models are: then all differences are small, those of leaks and of rounding
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    if how == "whole":
        model = model.bfloat16()
    assert layout_of(model, "bfloat16", autocast=how == "autocast") == LAYOUTS[name]


@pytest.mark.parametrize(
    ("name", "fields", "afterwards"),
    [
        ("llama", {}, (1.0, None)),
        ("cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
        ("gemma2", {"final_logit_softcapping": 5.0}, (1.0, 5.0)),
    ],
)
def test_what_a_model_makes_of_its_heads_output_is_what_its_configuration_says(
    name: str, fields: dict[str, Any], afterwards: tuple[float, float | None]
) -> None:
    model = architectures.tiny_model(name, **fields)
    found = choose_reading(Policy(model), run_spec(), CPU, autocast=False).afterwards
    assert found == afterwards


class AddsToItsLogits(LlamaForCausalLM):
    """As models are that make something of their logits that is neither a factor nor a soft cap."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 9, output.logits.shape[-1])
        return output


def test_logits_that_do_not_come_from_the_head_alone_are_made_by_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = AddsToItsLogits(architectures.tiny_config("llama"))  # type: ignore[no-untyped-call]
    policy = Policy(model)
    policy.reading = choose_reading(policy, run_spec(), CPU, autocast=False)
    assert policy.reading == Reading("packed", None)
    assert caplog.messages[0].startswith(
        "AddsToItsLogits: the logits of all tokens of a micro-batch are kept in memory;"
    )
    sequence = drawn_from(step_batch().rollouts[0])[0]
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids])).long()
    expected = (
        model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[len(sequence.prompt_ids) - 1 :, 0]
    )
    torch.testing.assert_close(token_logps(policy, micro_batch([sequence])), expected, atol=1e-5, rtol=0)


def test_one_line_says_what_is_wrong_and_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    layout_of(architectures.tiny_model("llama"))
    assert caplog.messages == []
    layout_of(architectures.tiny_model("opt"))
    (message,) = caplog.messages
    assert message.startswith("OPTForCausalLM reads packs wrongly, so the learner pads each sequence to the longest")
    assert "packed: beside other neighbours" in message
    assert caplog.records[0].levelno == logging.WARNING


def test_a_model_that_takes_one_row_without_positions_reads_sequences_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OneRowAtATime(architectures.tiny_config("llama"))  # type: ignore[no-untyped-call]
    assert layout_of(model) == "alone"


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = architectures.tiny_model("bert", is_decoder=False)
    with pytest.raises(
        ModelError, match="BertLMHeadModel cannot be trained as a causal language model: before other tokens"
    ):
        layout_of(model)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = architectures.tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be trained"):
        layout_of(model)


def test_a_model_that_knows_nothing_is_as_good_as_any() -> None:
    model = architectures.tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)  # all log-probabilities are equal
    assert layout_of(model) == "packed"


def test_a_window_is_crossed_where_the_runs_packs_can_cross_it() -> None:
    # Chunks of 200 tokens are counted in the pack; all texts of the check together are shorter.
    model = architectures.tiny_model("llama4", attention_chunk_size=200)
    assert layout_of(model) == "padded"


def test_all_ranks_take_the_most_careful_layout_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, Verdict("padded", "packed: rounds otherwise"), mine])
    assert layout_of(architectures.tiny_model("llama")) == "padded"
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, Verdict(None, "out of its mind")])
    with pytest.raises(ModelError, match="out of its mind"):
        layout_of(architectures.tiny_model("llama"))
