"""Log-probabilities from the head's input, against all logits at once in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heterorl.spec.run import LossType
from heterorl_learner.engines import policy
from heterorl_learner.engines.policy import Afterwards, Head, values_of
from heterorl_learner.losses import policy_loss
from unit.learner.loss_batches import algorithm, flat, random_batch, totals_of

TOKENS, WIDTH, VOCABULARY = 11, 6, 37


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 tokens of the vocabulary for 11 tokens, so that the last one of eight has 2."""
    monkeypatch.setattr(policy, "TILE", 5 * TOKENS)


class Example:
    """A head, what it reads, and what is asked of it."""

    def __init__(self, tokens: int = TOKENS, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.head = Head(nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype))
        for p in self.head.parameters():
            p.data = torch.randn(p.shape, generator=drawn).to(dtype)
        self.hidden = (2 * torch.randn(tokens, WIDTH, generator=drawn)).to(dtype).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (tokens,), generator=drawn)
        self.targets[: min(tokens, 4)] = torch.tensor([0, 4, 5, 36])[:tokens]  # at the ends of tiles
        self.temperature = 0.5 + torch.rand(tokens, generator=drawn)

    def values(self, afterwards: Afterwards, *, entropy: bool = False) -> Tensor:
        return self.head(self.hidden, self.targets, self.temperature, entropy, afterwards)

    def plain(self, model: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The function of the log-softmax of all logits [T, V] in float64, and its gradients."""
        inputs = [t.detach().double().requires_grad_() for t in (self.hidden, *self.head.parameters())]
        logits = model(nn.functional.linear(*inputs)) / self.temperature.double()[:, None]
        value = function(logits.log_softmax(1))
        return [value.detach(), *torch.autograd.grad(value.sum(), inputs, allow_unused=True)]

    def logp(self, distribution: Tensor) -> Tensor:
        return distribution[torch.arange(len(self.targets)), self.targets]


MODELS: dict[str, tuple[Callable[[Tensor], Tensor], Afterwards]] = {
    "nothing": (lambda z: z, Afterwards()),
    "factor": (lambda z: z / 8, Afterwards(0.125)),
    "cap": (lambda z: torch.tanh(z / 3) * 3, Afterwards(1.0, 3.0)),
    "both": (lambda z: torch.tanh(0.5 * z / 3) * 3, Afterwards(0.5, 3.0)),
}


@pytest.mark.parametrize("tile", [5 * TOKENS, VOCABULARY * TOKENS])  # eight tiles, or one, which is kept
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_all_logits(
    name: str, bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "TILE", tile)
    model, afterwards = MODELS[name]
    example = Example(bias=bias)
    weights = torch.linspace(-1, 1, TOKENS)
    expected, *gradients = example.plain(model, lambda distribution: example.logp(distribution) * weights.double())
    found = example.values(afterwards)
    torch.testing.assert_close(found.double() * weights, expected, atol=1e-5, rtol=0)
    (found * weights).sum().backward()
    for leaf, gradient in zip((example.hidden, *example.head.parameters()), gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_entropy_is_that_of_all_logits_and_has_no_gradient(name: str) -> None:
    model, afterwards = MODELS[name]
    example = Example()
    expected, *_ = example.plain(model, lambda distribution: -(distribution.exp() * distribution).sum(1))
    found = example.values(afterwards, entropy=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    assert not found.requires_grad


@pytest.mark.parametrize("loss", get_args(LossType))
def test_every_loss_has_the_gradient_that_it_has_through_all_logits(loss: str) -> None:
    batch = random_batch(3)
    example = Example(sum(len(c.logp) for c in batch))
    own = example.values(Afterwards()).tolist()
    for c in batch:  # the sampler is as far from this learner as from the one of the batch
        c.sampler_logp[:] = [own.pop(0) + q - p for p, q in zip(c.logp, c.sampler_logp)]

    def share(logp: Tensor) -> Tensor:
        value, _ = policy_loss(algorithm(loss), replace(flat(batch, dtype=logp.dtype), logp=logp), totals_of(batch))
        return value

    expected, *gradients = example.plain(lambda z: z, lambda distribution: share(example.logp(distribution)))
    found = share(example.values(Afterwards()))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert max(gradient.abs().max().item() for gradient in gradients) > 1e-3
    for leaf, gradient in zip((example.hidden, *example.head.parameters()), gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_trained_gets_no_gradient_and_passes_it_on() -> None:
    example, frozen = Example(), Example()
    frozen.head.requires_grad_(False)
    for one in (example, frozen):
        one.values(Afterwards()).sum().backward()
    assert frozen.head.weight.grad is None
    assert torch.equal(frozen.hidden.grad, example.hidden.grad)


def test_no_tokens_give_no_values_and_gradients_of_zero() -> None:
    example = Example(0)
    found = example.values(Afterwards())
    assert found.shape == (0,)
    found.sum().backward()
    assert not example.head.weight.grad.any()
    assert example.hidden.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("how", ["autocast", "whole"])
def test_in_bfloat16_products_are_rounded_as_those_of_all_logits(how: str) -> None:
    dtype = torch.bfloat16 if how == "whole" else torch.float32
    example, other = Example(dtype=dtype), Example(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = example.values(Afterwards())
        expected = values_of(other.head(other.hidden), other.targets, other.temperature)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip((example.hidden, *example.head.parameters()), (other.hidden, *other.head.parameters())):
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad, theirs.grad, atol=0.05, rtol=0.02)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_nothing_as_large_as_tokens_times_vocabulary_is_made() -> None:
    example = Example()
    with Largest() as largest:
        example.values(Afterwards(1.0, 3.0)).sum().backward()
    assert largest.elements == VOCABULARY * WIDTH  # the gradient of the head, and of 11 * 37 logits 11 * 5 at a time


# ── what a model makes of its head's output ──────────────────────────────────────────────────────────────────────────
class Model(nn.Module):
    """Calls its head and makes something of what it gives."""

    def __init__(self, afterwards: Callable[[Tensor], Tensor], calls: int = 1) -> None:
        super().__init__()
        self.head = Head(nn.Linear(WIDTH, VOCABULARY))
        self._afterwards, self._calls = afterwards, calls

    def forward(self, hidden: Tensor) -> Any:
        for _ in range(self._calls):
            self.logits = self._afterwards(self.head(hidden))
        return self


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_asked_what_it_makes_of_its_heads_output(name: str) -> None:
    model = Model(MODELS[name][0])
    hidden = torch.ones(1, 3, WIDTH)
    scale, cap = MODELS[name][1]
    expected = (pytest.approx(scale, rel=1e-6), cap and pytest.approx(cap, rel=1e-6))
    assert tuple(model.head.ask(lambda: model(hidden))) == expected
    assert model(hidden).logits.shape == (1, 3, VOCABULARY)  # called as before again


@pytest.mark.parametrize("other", [lambda z: z + 1, lambda z: z.clamp(-30, 30), lambda z: z.abs().sqrt(), torch.relu_])
def test_what_is_neither_a_factor_nor_a_cap_is_refused(other: Callable[[Tensor], Tensor]) -> None:
    model = Model(other)
    if other is torch.relu_:  # as good as nothing for outputs above 0; the trial on texts sees it
        assert model.head.ask(lambda: model(torch.ones(1, WIDTH))) == Afterwards()
        return
    with pytest.raises(ValueError, match="no factor and no soft cap"):
        model.head.ask(lambda: model(torch.ones(1, WIDTH)))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_model_that_does_not_call_its_head_once_is_refused(calls: int) -> None:
    model = Model(lambda z: z, calls)
    model.logits = torch.zeros(1)
    with pytest.raises(ValueError, match=f"calls its head {calls} times"):
        model.head.input_of(lambda: model(torch.ones(1, WIDTH)))
