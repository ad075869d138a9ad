"""Value and gradient equal to TRL's, whose real trainer runs its own loss on a tiny model: one micro-batch, one rank.

TRL pads and masks, ours is flat. Both start from the same model, so what is compared is the gradient of every weight.
"""

import sys
from typing import Any

import pytest
import torch

from heterorl.spec.run import AlgorithmSpec, CorrectionSpec, KlToReferenceSpec, LossSpec, SapoSpec, WeightSpec
from heterorl_learner.losses import LossInputs, Totals, summarise
from unit.learner.loss_batches import corrected_loss

LENGTHS = [5, 3, 1, 4]  # completion lengths of two prompts' two completions, padded by TRL to 5
MAX_LENGTH = 6


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's GRPOTrainer around a one-layer Qwen3 with ten words."""
    with pytest.MonkeyPatch.context() as patch:
        # TRL would import vLLM, which takes half a minute and is not needed for a loss.
        patch.setitem(sys.modules, "vllm", None)
        from trl import GRPOConfig, GRPOTrainer
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = WordLevel({word: i for i, word in enumerate("_.abcdefgh")}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="_", eos_token=".")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=10, num_attention_heads=1, num_key_value_heads=1, **shape))
    trainer = GRPOTrainer(
        model.double(),
        lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=2,
            per_device_train_batch_size=len(LENGTHS),
            max_completion_length=MAX_LENGTH,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(LENGTHS)}),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture
def batch(trainer: Any) -> dict[str, torch.Tensor]:
    """TRL's padded inputs: the old policy is the model's own log-probs, moved by up to about one."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    prompts = torch.randint(2, 10, (len(LENGTHS), 2), generator=generator)
    completions = torch.randint(2, 10, mask.shape, generator=generator) * mask
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.tensor([1.5, -0.5, -1.0, 0.7], dtype=torch.float64),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        logp = model_logp(trainer, inputs)
    shift = 0.4 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return inputs | {"old_per_token_logps": logp + shift}


def model_logp(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's log-probs of the completions, padded, by TRL's own forward (float32 even of a float64 model)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, max(LENGTHS))[0]


def weight_gradients(trainer: Any, loss: torch.Tensor) -> torch.Tensor:
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def ours(
    trainer: Any, spec: AlgorithmSpec, inputs: dict[str, torch.Tensor], reference: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    mask = inputs["completion_mask"].bool()
    lengths = mask.sum(1)
    x = LossInputs(
        logp=model_logp(trainer, inputs)[mask].double(),
        sampler_logp=inputs["old_per_token_logps"][mask],
        seq_ids=torch.arange(len(lengths))[:, None].expand_as(mask)[mask],
        group_ids=torch.arange(len(lengths)) // 2,
        lengths=lengths.double(),
        advantages=inputs["advantages"],
        log_expected_q=torch.zeros(len(lengths), dtype=torch.float64),
        reference_logp=None if reference is None else reference[mask],
    )
    loss, metrics = corrected_loss(spec, x, Totals.of(lengths, max_length=MAX_LENGTH, alpha=0.75))
    return loss, summarise(metrics)


def theirs(trainer: Any, spec: AlgorithmSpec, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    kind = spec.loss.type
    params = getattr(spec.loss, kind)
    trainer.loss_type = "grpo" if kind == "gspo" else kind
    trainer.importance_sampling_level = "sequence" if kind == "gspo" else "token"
    trainer.epsilon_low, trainer.epsilon_high = (
        (0.0, params.cap) if kind == "cispo" else (getattr(params, "low", 0.0), getattr(params, "high", 0.0))
    )
    trainer.args.delta = getattr(params, "delta", None)
    if kind == "sapo":
        trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg = params.tau_pos, params.tau_neg
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


EXACT = SapoSpec(tau_neg=1.25)
"""SAPO's default 1.05 is a float32 in TRL."""
CASES = [
    *((loss, {}) for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "vespo")),
    *((loss, {"low": 0.1, "high": 0.3, "delta": 1.2}) for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "gspo")),
    ("cispo", {"cap": 1.1}),
    ("sapo", EXACT.model_dump()),
    ("sapo", {"tau_pos": 0.5, "tau_neg": 2.0}),
]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "one truncated"])
@pytest.mark.parametrize(("loss", "params"), CASES)
def test_value_and_gradient_equal_trl(
    trainer: Any, batch: dict[str, torch.Tensor], loss: str, params: dict[str, float], masked: bool
):
    if masked:  # as TRL's mask_truncated_completions does
        batch["completion_mask"][3] = 0
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
    spec = AlgorithmSpec(loss=LossSpec(**{"type": loss, loss: params}))
    our_loss, our_metrics = ours(trainer, spec, batch)
    our_gradients = weight_gradients(trainer, our_loss)
    trl_loss, trl_metrics = theirs(trainer, spec, batch)
    trl_gradients = weight_gradients(trainer, trl_loss)

    assert our_loss.item() == pytest.approx(trl_loss.item(), rel=1e-10)
    assert trl_gradients.abs().max() > 1e-3
    assert torch.allclose(our_gradients, trl_gradients, rtol=1e-8, atol=1e-12)
    if loss not in ("cispo", "sapo", "vespo") and not (
        loss == "gspo" and masked
    ):  # TRL counts a masked sequence as unclipped
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert our_metrics[name] == pytest.approx(trl_metrics[name], rel=1e-6)


# Corrections: TRL recomputes the log-probs of its old policy, so with one step a batch that is the model itself.
WEIGHTS = [
    {"type": kind, "level": level, "low": low, "high": high}
    for kind in ("truncate", "mask")
    for level in ("token", "sequence")
    for low, high in ((0.0, 1.3), (0.8, 1.3))
]


def trl_weight(logp: torch.Tensor, batch: dict[str, torch.Tensor], weight: dict[str, Any]) -> torch.Tensor:
    """As `GRPOTrainer._generate_and_score_completions` makes importance_sampling_ratio, for a sampler's log-probs."""
    difference = (logp - batch["old_per_token_logps"]) * batch["completion_mask"]
    if weight["level"] == "sequence":
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if weight["type"] == "truncate":
        return ratio.clamp(min=weight["low"], max=weight["high"])
    return ratio.masked_fill((ratio < weight["low"]) | (ratio > weight["high"]), 0.0)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_a_weighted_loss_equals_trl_with_its_correction_of_the_sampler(
    trainer: Any, batch: dict[str, torch.Tensor], loss: str, weight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    spec = AlgorithmSpec(loss=LossSpec(type=loss, sapo=EXACT), correction=CorrectionSpec(weight=WeightSpec(**weight)))
    our_loss, _ = ours(trainer, spec, batch)
    our_gradients = weight_gradients(trainer, our_loss)
    with torch.no_grad():
        logp = model_logp(trainer, batch)
    monkeypatch.setattr(trainer, "use_vllm", True)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", True)
    ratio = trl_weight(logp, batch, weight)
    trl_loss, _ = theirs(trainer, spec, batch | {"old_per_token_logps": logp, "importance_sampling_ratio": ratio})
    trl_gradients = weight_gradients(trainer, trl_loss)

    assert our_loss.item() == pytest.approx(trl_loss.item(), rel=1e-6, abs=1e-8)  # TRL's log-probs are float32
    assert trl_gradients.abs().max() > 1e-3
    assert torch.allclose(our_gradients, trl_gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("moved", [[0], [0, 1], [0, 1, 2, 3]])  # of these 1 and 2 have a negative advantage
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "vespo"])
def test_opsm_equals_trls_mask_of_off_policy_sequences(
    trainer: Any, batch: dict[str, torch.Tensor], loss: str, moved: list[int], monkeypatch: pytest.MonkeyPatch
):
    batch["old_per_token_logps"][moved] += 3
    spec = AlgorithmSpec(loss=LossSpec(type=loss, sapo=EXACT), correction=CorrectionSpec(opsm_delta=1.5))
    our_loss, our_metrics = ours(trainer, spec, batch)
    our_gradients = weight_gradients(trainer, our_loss)
    monkeypatch.setattr(trainer, "off_policy_mask_threshold", 1.5)
    trl_loss, _ = theirs(trainer, spec, batch)
    trl_gradients = weight_gradients(trainer, trl_loss)

    assert our_loss.item() == pytest.approx(trl_loss.item(), rel=1e-10)
    assert torch.allclose(our_gradients, trl_gradients, rtol=1e-8, atol=1e-12)
    assert our_metrics["correction/opsm"] == len({1, 2} & set(moved)) / 4


def test_the_penalty_to_the_reference_equals_trls(
    trainer: Any, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    reference = batch["old_per_token_logps"].roll(1, 0)
    spec = AlgorithmSpec(loss=LossSpec(type="dapo"), kl_to_reference=KlToReferenceSpec(weight=0.3))
    our_loss, _ = ours(trainer, spec, batch, reference)
    our_gradients = weight_gradients(trainer, our_loss)
    monkeypatch.setattr(trainer, "beta", 0.3)
    assert trainer.args.use_bias_correction_kl
    trl_loss, _ = theirs(trainer, spec, batch | {"ref_per_token_logps": reference})
    assert our_loss.item() == pytest.approx(trl_loss.item(), rel=1e-10)
    # several paths meet in TRL's log-probs, which are float32
    assert torch.allclose(our_gradients, weight_gradients(trainer, trl_loss), rtol=1e-5, atol=1e-7)


def test_the_test_sees_a_gradient_of_the_wrong_sign(trainer: Any, batch: dict[str, torch.Tensor]):
    spec = AlgorithmSpec(loss=LossSpec(type="grpo"))
    ours_flipped = weight_gradients(trainer, -ours(trainer, spec, batch)[0])
    assert not torch.allclose(ours_flipped, weight_gradients(trainer, theirs(trainer, spec, batch)[0]), rtol=1e-2)
