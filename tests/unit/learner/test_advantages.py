from typing import get_args

import numpy as np
import pytest
from scipy import stats

from heterorl.errors import UserError
from heterorl.spec.run import LossType
from heterorl_learner.train_step import AUTO, beta_weights, resolve_scale, step_advantages


def group(*rewards: float) -> np.ndarray:
    return np.array(rewards, dtype=np.float32)


def test_every_loss_has_a_scale_of_its_own():
    assert set(AUTO) == set(get_args(LossType))


def test_auto_follows_the_authors_and_an_explicit_scale_stands():
    assert [resolve_scale(loss, "auto") for loss in ("gepo", "gspo", "bnpo")] == ["none", "group", "beta"]
    assert resolve_scale("gepo", "batch") == "batch"


def test_scale_none_subtracts_the_mean_of_the_group():
    # mean (1+0+0+1+1)/5 = 0.6
    assert step_advantages([group(1, 0, 0, 1, 1)], "none")[0] == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])


def test_scale_group_divides_by_the_sample_deviation():
    # mean 0.5, squares 4 * 0.25 = 1, sample variance 1/3, deviation 0.5773503; 0.5 / 0.5774503 = 0.8658755
    expected = 0.8658755
    assert step_advantages([group(1, 0, 1, 0)], "group")[0] == pytest.approx([expected, -expected] * 2, rel=1e-6)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "beta"])
def test_a_group_of_equal_rewards_gives_no_advantage(scale):
    advantages = step_advantages([group(1, 1, 1), group(0, 0, 0), group(0, 1, 0), group(0.1, 0.1, 0.1)], scale)
    for i in (0, 1, 3):
        assert advantages[i] == pytest.approx(np.zeros(3), abs=1e-9)
    assert advantages[2].dtype == np.float32
    assert advantages[2][1] > 0


def test_scale_batch_divides_every_group_by_the_deviation_of_all_rewards():
    # all rewards 0 2 4 4: mean 2.5, squares 6.25+0.25+2.25+2.25 = 11, sample deviation sqrt(11/3) = 1.9148542
    # first group: mean 1, so ∓1 / 1.9149542 = ∓0.5222057; second: mean 4, so 0
    first, second = step_advantages([group(0, 2), group(4, 4)], "batch")
    assert first == pytest.approx([-0.5222057, 0.5222057], rel=1e-6)
    assert second == pytest.approx([0, 0])


def test_scale_none_and_group_are_the_same_alone_and_in_a_step():
    groups = [group(0, 1, 1), group(0.5, 0.25, 0)]
    for scale in ("none", "group"):
        for together, alone in zip(step_advantages(groups, scale), groups):
            assert np.array_equal(together, step_advantages([alone], scale)[0])


def test_beta_weights_are_the_inverse_density_of_the_fitted_distribution():
    # means 0.25 0.5 0.75: mean 0.5, variance (0.0625+0+0.0625)/3 = 1/24, a + b = 0.25 * 24 - 1 = 5, a = b = 2.5,
    # so Beta(1 + 2.5/3, 1 + 2.5/3); scipy gives its density
    fitted = stats.beta(1 + 2.5 / 3, 1 + 2.5 / 3)
    assert beta_weights(np.array([0.25, 0.5, 0.75])) == pytest.approx(1 / fitted.pdf([0.25, 0.5, 0.75]))


def test_beta_weights_of_a_skewed_batch_agree_with_scipy():
    means = np.array([0.125, 0.125, 0.25, 0.5, 0.875])
    size = means.mean() * (1 - means.mean()) / means.var() - 1
    fitted = stats.beta(1 + size * means.mean() / 3, 1 + size * (1 - means.mean()) / 3)
    assert beta_weights(means) == pytest.approx(1 / fitted.pdf(means))


def test_scale_beta_multiplies_the_centred_rewards_by_the_weight():
    # means 0.25 and 0.75: variance 0.0625, a + b = 0.25/0.0625 - 1 = 3, a = b = 1.5, Beta(1.5, 1.5);
    # its density at 0.25 is 8/π sqrt(0.25 * 0.75) = 1.1026578, the weight 0.9068997
    low, high = step_advantages([group(1, 0, 0, 0), group(0, 1, 1, 1)], "beta")
    assert low == pytest.approx(0.9068997 * np.array([0.75, -0.25, -0.25, -0.25]), rel=1e-6)
    assert high == pytest.approx(0.9068997 * np.array([-0.75, 0.25, 0.25, 0.25]), rel=1e-6)


@pytest.mark.parametrize("means", [[0.5, 0.5], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0, 0.5], [1.0, 1.0, 0.999]])
def test_beta_weights_are_finite_and_capped_at_the_border(means):
    weights = beta_weights(np.array(means))
    assert np.all((weights > 0) & (weights <= 1e6 * (1 + 1e-12)))


def test_beta_refuses_rewards_outside_the_unit_interval():
    with pytest.raises(UserError, match=r"from -1 to 1, .*change the weights of the rewards"):
        step_advantages([group(0, 1), group(-1, 0)], "beta")
