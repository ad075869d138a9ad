"""Delay distributions, draws and the adoption policy, against scipy and against lists worked by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from heterorl.errors import DataError
from heterorl.exchange.version import Version
from heterorl.heterogeneity.delay import Adoption, draw, draws, fitted, horizon
from heterorl.seeds import uniform
from heterorl.spec.load import inline_trace
from heterorl.spec.run import DelaySpec

PAPER = {"lower": 60.0, "upper": 1920.0, "confidence": 0.995}
LAG_COLUMN = "[paper]GEPO_diff32 - train/step_diff"


def v(step: int, incarnation: int = 1) -> Version:
    return Version(step, incarnation)


def scipy_distribution(delay: DelaySpec):
    ours = fitted(delay)
    match delay.distribution:
        case "lognormal":
            return stats.lognorm(s=ours.sigma, scale=np.exp(ours.mu))
        case "weibull":
            return stats.weibull_min(c=ours.shape, scale=ours.scale)
        case "exponential":
            return stats.expon(scale=ours.mean)


def run_adoption(adoption, events, published_every=1.0):
    """Feed a clock of whole seconds with one version published each second; returns the step held at each second."""
    current, held = None, []
    for now in events:
        published = [(v(k), k * published_every) for k in range(int(now / published_every) + 1)]
        chosen = adoption.choose(published, current, now)
        if chosen is not None:
            current = chosen
            adoption.adopted(chosen, now_s=now, newest_step=published[-1][0].step)
        held.append(current.step)
    return held


# ── distributions ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("distribution", ["lognormal", "weibull"])
def test_fitted_distribution_has_the_quantiles_of_the_spec(distribution):
    reference = scipy_distribution(DelaySpec(distribution=distribution, **PAPER))
    assert reference.cdf(1920.0) == pytest.approx(0.995, abs=1e-12)
    assert reference.sf(60.0) == pytest.approx(0.995, abs=1e-12)


def test_exponential_fits_the_upper_quantile():
    assert scipy_distribution(DelaySpec(distribution="exponential", **PAPER)).cdf(1920.0) == pytest.approx(
        0.995, abs=1e-12
    )


@pytest.mark.parametrize("distribution", ["lognormal", "weibull", "exponential"])
def test_quantile_function_agrees_with_scipy(distribution):
    delay = DelaySpec(distribution=distribution, **PAPER)
    for probability in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-9):
        assert fitted(delay).quantile(probability) == pytest.approx(
            scipy_distribution(delay).ppf(probability), rel=1e-9
        )


def test_median_of_the_papers_lognormal_is_339_seconds():
    assert fitted(DelaySpec(distribution="lognormal", **PAPER)).quantile(0.5) == pytest.approx(339.4, abs=0.05)


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_uniform_numbers_are_uniform_and_never_touch_the_ends():
    numbers = np.array([uniform("key", n) for n in range(20_000)])
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert 0 < numbers.min() < numbers.max() < 1


@pytest.mark.parametrize("distribution", ["lognormal", "weibull", "exponential"])
def test_draws_follow_the_distribution_between_its_bounds(distribution):
    delay = DelaySpec(distribution=distribution, **PAPER)
    numbers = np.array(list(itertools.islice(draws(delay, seed=0, slot="far-0"), 5000)))
    # An exponential is fitted at its upper end alone, so its lower tail is an atom at the bound; compare above it.
    inside = numbers[(numbers > 60) & (numbers < 1920)]
    reference = scipy_distribution(delay)
    below, above = reference.cdf(60), reference.cdf(1920)
    assert stats.kstest(inside, lambda t: (reference.cdf(t) - below) / (above - below)).pvalue > 0.01
    assert numbers.min() >= 60
    assert numbers.max() <= 1920


def test_subtracting_clamps_a_share_of_the_draws_to_the_lower_bound():
    # P(T - 400 <= 60) = P(T <= 460) of the paper's 1L2S distribution: 0.67 by scipy; 4000 draws, standard error 0.0074.
    delay = DelaySpec(distribution="lognormal", subtract=400.0, **PAPER)
    numbers = np.array(list(itertools.islice(draws(delay, seed=1, slot="far-0"), 4000)))
    assert (numbers == 60.0).mean() == pytest.approx(scipy_distribution(delay).cdf(460.0), abs=0.03)
    assert np.median(numbers) == 60.0


def test_a_sequence_of_draws_continues_where_it_stopped():
    delay = DelaySpec(distribution="weibull", **PAPER)
    whole = list(itertools.islice(draws(delay, seed=7, slot="far-1"), 20))
    assert list(itertools.islice(draws(delay, seed=7, slot="far-1", start=12), 8)) == whole[12:]


def test_slots_and_seeds_draw_differently_and_the_same_seed_alike():
    def first(slot="far-0", seed=0, own=0):
        return draw(DelaySpec(distribution="lognormal", seed=own), 0, seed=seed, slot=slot)

    assert len({first(), first(slot="far-1"), first(slot="near-0"), first(seed=1)}) == 4
    assert first(seed=3) == first(own=3) == first(seed=1, own=2)  # the run's seed is added to every other


def test_draws_never_change_between_releases():
    # Regression anchor: a changed derivation would silently alter every recorded experiment.
    delay = DelaySpec(distribution="lognormal", **PAPER)
    assert [round(d, 3) for d in itertools.islice(draws(delay, seed=0, slot="far-0"), 3)] == [256.929, 422.385, 374.515]


def test_constant_is_the_lower_bound_and_none_is_zero():
    assert draw(DelaySpec(distribution="constant", lower=32), 5, seed=0, slot="a-0") == 32
    assert draw(DelaySpec(), 5, seed=0, slot="a-0") == 0


# ── traces ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def csv_delay(path, column="lag"):
    return DelaySpec(distribution="trace", model="transit", unit="steps", trace={"path": str(path), "column": column})


def test_trace_repeats_its_column_from_the_start(tmp_path):
    (tmp_path / "lags.csv").write_text("step,lag\n1,4\n2,\n3,0.5\n")
    delay = inline_trace(csv_delay("lags.csv"), tmp_path)
    assert list(itertools.islice(draws(delay, seed=0, slot="a-0"), 5)) == [4, 0.5, 4, 0.5, 4]
    assert delay.trace.path is None


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (None, "lag", "cannot read the delay trace"),
        ("step,lag\n1,2\n", "lags", "no column 'lags'.*one of: step, lag"),
        ("step,lag\n1,2\n2,soon\n", "lag", "line 3: 'soon' is not a valid delay"),
        ("step,lag\n1,-2\n", "lag", "line 2: '-2' is not a valid delay"),
        ("step,lag\n1,nan\n", "lag", "'nan' is not a valid delay"),
        ("step,lag\n", "lag", "holds 0 numbers"),
        ("", "lag", "no column 'lag'"),
    ],
)
def test_unusable_trace_names_the_file_and_the_way_out(tmp_path, text, column, message):
    path = tmp_path / "lags.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=rf"lags\.csv.*{message}|{message}"):
        inline_trace(csv_delay(path, column), Path("/"))


def test_trace_that_was_not_inlined_is_refused():
    with pytest.raises(ValueError, match="inline_trace"):
        Adoption(csv_delay("lags.csv"), slot="a-0")


# ── adoption ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_without_delay_each_new_version_is_adopted():
    assert run_adoption(Adoption(DelaySpec(), slot="a-0"), range(6)) == [0, 1, 2, 3, 4, 5]


def test_holding_gives_a_sawtooth_of_lags():
    delay = DelaySpec(distribution="constant", lower=3, model="hold")
    held = run_adoption(Adoption(delay, slot="a-0"), range(10))
    assert held == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_holding_draws_anew_after_each_swap():
    delay = DelaySpec(distribution="trace", trace={"values": [1, 3, 2]})
    assert run_adoption(Adoption(delay, slot="a-0"), range(9)) == [0, 1, 1, 1, 4, 4, 6, 7, 7]


def test_holding_in_steps_counts_published_versions_not_time():
    delay = DelaySpec(distribution="constant", lower=2, unit="steps")
    adoption = Adoption(delay, slot="a-0")
    held = run_adoption(adoption, range(0, 60, 10), published_every=10.0)
    assert held == [0, 0, 2, 2, 4, 4]


def test_transit_shows_a_version_a_delay_after_its_publication():
    delay = DelaySpec(distribution="constant", lower=3, model="transit")
    assert run_adoption(Adoption(delay, slot="a-0"), range(8)) == [0, 0, 0, 0, 1, 2, 3, 4]


def test_transit_takes_the_newest_visible_where_versions_overtake():
    # version: 0 1 2 3, published at 0 1 2 3, transit 0 5 1 9: visible from 0, 6, 3, 12
    delay = DelaySpec(distribution="trace", model="transit", trace={"values": [0, 5, 1, 9]})
    adoption = Adoption(delay, slot="a-0")
    published = [(v(k), float(k)) for k in range(4)]
    assert adoption.choose(published, v(0), 2.9) is None
    assert adoption.choose(published, v(0), 3.0) == v(2)
    assert adoption.choose(published, v(2), 6.5) is None  # version 1 arrives late and is of no use
    assert adoption.choose(published, v(2), 12.0) == v(3)


def test_thirty_two_steps_late_is_transit_constant_steps():
    delay = DelaySpec(distribution="constant", model="transit", unit="steps", lower=32)
    held = run_adoption(Adoption(delay, slot="far-0"), range(100))
    assert held[:33] == [0] * 33
    assert held[33:] == list(range(1, 68))


def test_first_weights_are_adopted_at_once():
    late = DelaySpec(distribution="constant", model="transit", lower=500)
    published = [(v(7), 0.0), (v(8), 1.0)]
    assert Adoption(late, slot="a-0").choose(published, None, 2.0) == v(7)
    assert Adoption(DelaySpec(distribution="constant", lower=500), slot="a-0").choose(published, None, 2.0) == v(8)
    assert Adoption(late, slot="a-0").choose([], None, 2.0) is None


def test_time_scale_shortens_seconds_but_not_steps():
    seconds = DelaySpec(distribution="constant", lower=300)
    steps = DelaySpec(distribution="constant", lower=3, unit="steps")
    assert run_adoption(Adoption(seconds, slot="a-0", time_scale=0.01), range(7)) == [0, 0, 0, 3, 3, 3, 6]
    assert run_adoption(Adoption(steps, slot="a-0", time_scale=0.01), range(7)) == [0, 0, 0, 3, 3, 3, 6]


@pytest.mark.parametrize("model", ["hold", "transit"])
@pytest.mark.parametrize("stop_at", [1, 7, 40])
def test_restarted_slot_swaps_as_if_it_had_never_stopped(model, stop_at):
    delay = DelaySpec(distribution="lognormal", model=model, lower=2, upper=20)
    whole = run_adoption(Adoption(delay, slot="far-0", seed=5), range(80))
    before = Adoption(delay, slot="far-0", seed=5)
    first = run_adoption(before, range(stop_at))
    after = Adoption(delay, slot="far-0", seed=5, state=json.loads(json.dumps(before.state)))
    assert first + run_adoption(after, range(stop_at, 80)) == whole
    assert len(set(whole)) > 4


def test_restarted_slot_takes_the_newest_when_its_version_is_gone():
    delay = DelaySpec(distribution="constant", lower=100)
    before = Adoption(delay, slot="a-0")
    before.adopted(v(3), now_s=50.0, newest_step=3)
    after = Adoption(delay, slot="a-0", state=before.state)
    assert after.choose([(v(5), 60.0), (v(6), 61.0)], None, 62.0) == v(6)


def test_failed_swap_is_tried_again_and_draws_nothing():
    delay = DelaySpec(distribution="constant", lower=3)
    adoption = Adoption(delay, slot="a-0")
    published = [(v(0), 0.0), (v(1), 1.0)]
    adoption.adopted(v(0), now_s=0.0, newest_step=0)
    state = adoption.state
    assert adoption.choose(published, v(0), 4.0) == v(1)  # the caller's fetch fails, so adopted() is not called
    assert adoption.state == state
    assert adoption.choose(published, v(0), 5.0) == v(1)


def test_an_edited_delay_goes_on_with_the_version_held_and_repeats_no_draw():
    adoption = Adoption(DelaySpec(distribution="trace", trace={"values": [1, 3, 2, 9]}), slot="a-0")
    assert run_adoption(adoption, range(6)) == [0, 1, 1, 1, 4, 4]  # held for 1, then 3, then for 2
    state = adoption.state
    adoption.change(DelaySpec(distribution="trace", trace={"values": [7, 7, 7, 1]}))
    assert adoption.state == state
    # The third value is in force since the third swap, at 4: held until 11; then the fourth.
    published = [(v(k), float(k)) for k in range(13)]
    assert adoption.choose(published, v(4), 10.5) is None
    assert adoption.choose(published, v(4), 11.0) == v(12)
    adoption.adopted(v(12), now_s=11.0, newest_step=12)
    assert adoption.choose([*published, (v(13), 12.0)], v(12), 11.5) is None
    assert adoption.choose([*published, (v(13), 12.0)], v(12), 12.0) == v(13)


def test_a_delay_edited_from_seconds_to_steps_and_back_does_not_hold_for_ever():
    adoption = Adoption(DelaySpec(distribution="constant", lower=100), slot="a-0")
    adoption.adopted(v(3), now_s=1.8e9, newest_step=3)
    adoption.change(DelaySpec(distribution="constant", lower=100, unit="steps"))
    assert adoption.choose([(v(3), 1.8e9), (v(4), 1.8e9)], v(3), 1.8e9) == v(4)
    adoption.adopted(v(4), now_s=1.8e9, newest_step=4)
    adoption.change(DelaySpec(distribution="constant", lower=100))
    assert adoption.choose([(v(4), 1.8e9), (v(5), 1.8e9)], v(4), 1.8e9 + 1) == v(5)


# ── the authors' recorded run ────────────────────────────────────────────────────────────────────────────────────────
def test_recorded_lags_of_the_paper_replay_exactly(shared_data):
    delay = inline_trace(csv_delay("wandb_DelayStep.csv", LAG_COLUMN), shared_data / "paper")
    recorded = delay.trace.values
    assert len(recorded) == 1295
    assert max(recorded) == 57
    adoption, current, lags = Adoption(delay, slot="far-0"), None, []
    kept = int(horizon(delay)) + 1  # what retention keeps is enough
    for step in range(1295):
        published = [(v(k), 0.0) for k in range(max(0, step + 1 - kept), step + 1)]
        chosen = adoption.choose(published, current, 0.0)
        if chosen is not None:
            current = chosen
            adoption.adopted(chosen, now_s=0.0, newest_step=step)
        lags.append(step - current.step)
    assert lags == recorded


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"distribution": "none", "model": "transit"}, 0),
        ({"distribution": "lognormal", "model": "hold"}, 0),
        ({"distribution": "constant", "model": "transit", "unit": "steps", "lower": 32}, 32),
        ({"distribution": "constant", "model": "transit", "lower": 1800}, 18),
        ({"distribution": "weibull", "model": "transit"}, 19.2),
        ({"distribution": "trace", "model": "transit", "unit": "steps", "trace": {"values": [3, 57, 2]}}, 57),
    ],
)
def test_horizon_is_the_longest_possible_delay(settings, expected):
    assert horizon(DelaySpec(**settings), time_scale=0.01) == pytest.approx(expected)
