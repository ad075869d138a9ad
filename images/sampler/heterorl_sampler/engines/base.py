"""What an inference engine does: groups of completions go in at any time and come out as each is finished.

Tokens in, tokens and behaviour log-probabilities out. Log-probabilities are those of the sampling distribution:
repetition penalty, temperature, min-p, top-k and top-p applied in that order and renormalized, as vLLM's
`processed_logprobs`. They come with the token, never from a second forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from heterorl.exchange.rollout import Completion, Sampling
from heterorl.exchange.version import Version

Finished = list[tuple[int, list[Completion]]]
"""Groups that are complete, by the number that `add` gave them."""


UNNAMED = Version(0, 0)
"""Weights of which no run tells the version, as those that an engine starts with."""


class InferenceEngine(ABC):
    """A model on this machine that generates and scores; not for use from several threads.

    Weights may be swapped while groups are in generation: what they have so far stays, and each further token is drawn
    from the new weights' distribution given the whole text, as caches of the old weights are computed anew.
    """

    version = UNNAMED
    """The weights that are served, as `load_weights` was told."""
    keeps_running = True
    """Whether weights may be swapped while groups are in generation."""

    @abstractmethod
    def add(self, prompt: Sequence[int], n: int, sampling: Sampling, seed: int) -> int:
        """Queue a group, `n` completions of a prompt; its number. The same seed and weights repeat it."""

    @abstractmethod
    def step(self) -> Finished:
        """Generate a token of every completion that is in generation; the groups that are complete by it."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """Groups that were added and are not complete."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the groups that are not complete."""

    @abstractmethod
    def load_weights(self, folder: Path, version: Version = UNNAMED) -> None:
        """Serve the weights in `folder` (safetensors in Hugging Face names, or adapters); forget every cached prefix.

        Raises CorruptFile, with the old weights still served, when names or shapes are not this model's.
        """

    @abstractmethod
    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities, at temperature 1, of each text's second and later tokens given those before.

        Right after `load_weights`, no group goes on meanwhile: whether the weights are right is known before they are
        used.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back memory and temporary files."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion] | None]:
        """`n` completions of each prompt, in the order of the prompts, where nothing else is in generation.

        `stop` is asked after every token; once it says yes, groups that are not complete come back as None.
        """
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64) >> np.uint64(2)
        numbers = [self.add(prompt, n, sampling, int(own)) for prompt, own in zip(prompts, seeds)]
        made: dict[int, list[Completion]] = {}
        try:
            while self.num_groups and not stop():
                made |= dict(self.step())
        finally:
            self.drop()
        return [made.get(number) for number in numbers]
