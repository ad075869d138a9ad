"""When a sampler may adopt new weights: distributions of the delay, seeded draws, and the policy that applies them.

A slot's n-th draw is a pure function of (run's seed + delay's seed, slot, n): nothing but a counter has to survive a
restart. Units: `delay.unit`; seconds are multiplied by the run's `time_scale`, steps are not. `docs/delay.md` says how
to choose and what each setting does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

from heterorl.exchange.version import Version
from heterorl.seeds import uniform
from heterorl.spec.run import DelaySpec


# ── distributions ────────────────────────────────────────────────────────────────────────────────────────────────────
class Distribution(Protocol):
    """A distribution of positive numbers, given by its quantile function."""

    def quantile(self, probability: float) -> float:
        """The value below which a draw falls with this probability (0 < probability < 1)."""
        ...


@dataclass(frozen=True)
class Lognormal:
    """ln T is normal with mean `mu` and standard deviation `sigma`."""

    mu: float
    sigma: float

    def quantile(self, probability: float) -> float:
        """The exponential of mu + sigma z, z the standard normal's quantile."""
        return math.exp(self.mu + self.sigma * NormalDist().inv_cdf(probability))

    @classmethod
    def fit(cls, lower: float, upper: float, confidence: float) -> Lognormal:
        """P(T > lower) = P(T < upper) = confidence; the median is then sqrt(lower * upper)."""
        z = NormalDist().inv_cdf(confidence)
        return cls(math.log(lower * upper) / 2, math.log(upper / lower) / (2 * z))


@dataclass(frozen=True)
class Weibull:
    """P(T > t) = exp(-(t / scale)^shape)."""

    shape: float
    scale: float

    def quantile(self, probability: float) -> float:
        """Solve P(T > t) = 1 - probability for t."""
        return float(self.scale * (-math.log1p(-probability)) ** (1 / self.shape))

    @classmethod
    def fit(cls, lower: float, upper: float, confidence: float) -> Weibull:
        """P(T > lower) = P(T < upper) = confidence, by dividing the two equations (t / scale)^shape = -ln P(T > t)."""
        shape = math.log(math.log(1 - confidence) / math.log(confidence)) / math.log(upper / lower)
        return cls(shape, upper / (-math.log(1 - confidence)) ** (1 / shape))


@dataclass(frozen=True)
class Exponential:
    """P(T > t) = exp(-t / mean)."""

    mean: float

    def quantile(self, probability: float) -> float:
        """Solve P(T > t) = 1 - probability for t."""
        return -self.mean * math.log1p(-probability)

    @classmethod
    def fit(cls, upper: float, confidence: float) -> Exponential:
        """P(T < upper) = confidence: one parameter fits one quantile, so the lower bound only clamps."""
        return cls(-upper / math.log(1 - confidence))


def fitted(delay: DelaySpec) -> Distribution:
    """The distribution fitted to the spec's quantiles, before `subtract` and clamping; ValueError if it has no fit."""
    match delay.distribution:
        case "lognormal":
            return Lognormal.fit(delay.lower, delay.upper, delay.confidence)
        case "weibull":
            return Weibull.fit(delay.lower, delay.upper, delay.confidence)
        case "exponential":
            return Exponential.fit(delay.upper, delay.confidence)
        case other:
            raise ValueError(f"distribution {other} is not fitted")


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def draw(delay: DelaySpec, n: int, *, seed: int, slot: str) -> float:
    """The slot's n-th delay in the delay's unit.

    Random delays: T - subtract, clamped to [lower, upper]. A constant and a trace are taken as they are written.
    """
    match delay.distribution:
        case "none":
            return 0.0
        case "constant":
            return delay.lower
        case "trace":
            return delay.trace.values[n % len(delay.trace.values)]
        case _:
            raw = fitted(delay).quantile(uniform("delay", seed + delay.seed, slot, n))
            return min(max(raw - delay.subtract, delay.lower), delay.upper)


def draws(delay: DelaySpec, *, seed: int, slot: str, start: int = 0) -> Iterator[float]:
    """The slot's endless sequence of delays, from the `start`-th on."""
    return (draw(delay, n, seed=seed, slot=slot) for n in itertools.count(start))


def horizon(delay: DelaySpec, time_scale: float = 1.0) -> float:
    """How far back a sampler may have to reach, in the delay's unit (seconds scaled): what retention must keep.

    Holding always takes the newest version, so it needs nothing old.
    """
    if delay.model == "hold" or delay.distribution == "none":
        return 0.0
    longest = {"constant": delay.lower, "trace": max(delay.trace.values, default=0.0)}
    return longest.get(delay.distribution, delay.upper) * _scale(delay, time_scale)


def _scale(delay: DelaySpec, time_scale: float) -> float:
    return time_scale if delay.unit == "seconds" else 1.0


# ── adoption ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Adoption:
    """One slot's policy: which of the published versions to generate with now.

    hold:    after the n-th swap keep the version for T_n, then take the newest.
    transit: version k becomes visible T_k after its publication; take the newest visible one.
    The first weights are taken at once; where transit shows none yet, the oldest. After a restart with `state` the slot
    returns to the version it held. In steps the clock is the step of the newest published version. A transit trace in
    steps is read as the lag at each step: with the newest at step s, visible is what is `values[s % len]` steps back,
    even where that goes back to an older version; so a recorded column of lags repeats.
    """

    def __init__(
        self,
        delay: DelaySpec,
        *,
        slot: str,
        seed: int = 0,
        time_scale: float = 1.0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`slot` as `far-0`, `seed` the run's; `state` as `.state` gave it. ValueError for a trace not yet inlined."""
        self._slot, self._seed, self._time_scale = slot, seed, time_scale
        self.change(delay)
        state = state or {}
        self._swaps: int = state.get("swaps", 0)
        self._held: str | None = state.get("held")
        self._since: float = state.get("since", 0.0)

    def change(self, delay: DelaySpec) -> None:
        """Go on under another delay. The version held and the count of draws stay, so that no draw is repeated."""
        if delay.distribution == "trace" and not delay.trace.values:
            raise ValueError("the trace has no values; call inline_trace when the manifest is read")
        self._delay, self._scale = delay, _scale(delay, self._time_scale)

    @property
    def state(self) -> dict[str, Any]:
        """What a restarted slot must know, as JSON: swaps made, version held, clock (seconds or step) of its swap."""
        return {"swaps": self._swaps, "held": self._held, "since": self._since}

    def choose(
        self, published: Sequence[tuple[Version, float]], current: Version | None, now_s: float
    ) -> Version | None:
        """The version to adopt now, or None to go on with `current` (None: no weights are loaded yet).

        `published`: what is on the volume, each with its time of publication in seconds on the clock of `now_s`.
        """
        if not published:
            return None
        versions = sorted(version for version, _ in published)
        if self._delay.model == "hold":
            target, fallback = self._after_hold(versions, now_s), versions[-1]
        else:
            target, fallback = self._newest_visible(published, now_s), versions[0]
        if target is None and current is None:
            target = next((version for version in versions if str(version) == self._held), fallback)
        return None if target == current else target

    def adopted(self, version: Version, *, now_s: float, newest_step: int) -> None:
        """Note a swap that has succeeded; loading the held version again after a restart is none."""
        if str(version) == self._held:
            return
        self._held = str(version)
        self._since = now_s if self._delay.unit == "seconds" else newest_step
        self._swaps += 1

    def _draw(self, n: int) -> float:
        return draw(self._delay, n, seed=self._seed, slot=self._slot) * self._scale

    def _after_hold(self, versions: list[Version], now_s: float) -> Version | None:
        newest = versions[-1]
        clock = now_s if self._delay.unit == "seconds" else newest.step
        # A clock that went back is another one: the learner resumed from an earlier step, the slot moved elsewhere.
        holding = self._held is not None and 0 <= clock - self._since < self._draw(self._swaps - 1)
        return None if holding else newest

    def _newest_visible(self, published: Sequence[tuple[Version, float]], now_s: float) -> Version | None:
        newest_step = max(version.step for version, _ in published)
        lag_trace = self._delay.distribution == "trace" and self._delay.unit == "steps"

        def is_visible(version: Version, published_s: float) -> bool:
            age = now_s - published_s if self._delay.unit == "seconds" else newest_step - version.step
            return age >= self._draw(newest_step if lag_trace else version.step)

        return max((version for version, at in published if is_visible(version, at)), default=None)
