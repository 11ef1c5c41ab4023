"""How many positions a step commits, and which."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.sampling import proposals, schedules
from rspo_jax.sampling.settings import SamplerSettings


def settings_of(length=12, block=4, steps=6, **options):
  return SamplerSettings(length, block, steps, **options)


def test_ranks_give_ties_to_the_lowest_index():
  confidence = jnp.array([[0.5, 0.9, 0.5, 0.9, -jnp.inf, -jnp.inf]])
  every = jnp.ones((1, 6), bool)
  found = schedules.ranks(confidence, every)
  np.testing.assert_array_equal(found, [[2, 0, 3, 1, 4, 5]])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
def test_quotas_are_even_with_the_remainder_first(steps):
  settings = settings_of(16, 16, steps)
  for masks in range(17):
    remaining = jnp.array([masks])
    spent = []
    for step in range(steps):
      quota = schedules.even_quota(remaining, step, None, settings)
      spent.append(int(quota[0]))
      remaining = remaining - quota
    base, rest = divmod(masks, steps)
    assert spent == [base + 1] * rest + [base] * (steps - rest)


def test_threshold_takes_all_that_reach_it_and_always_the_best():
  confidence = jnp.array([[0.9, 0.8, 0.3, 0.99], [0.1, 0.3, 0.2, 0.9]])
  eligible = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0]], bool)
  settings = settings_of(threshold=0.8)
  chosen = schedules.select_by_threshold(confidence, eligible, None, settings)
  want = [[True, True, False, False], [False, True, False, False]]
  np.testing.assert_array_equal(chosen, want)


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7])
def test_factor_scans_ranks_until_the_first_that_fails(factor):
  rng = np.random.default_rng(2)
  confidence = rng.uniform(0.3, 1, (200, 6)).astype(np.float32)
  eligible = rng.uniform(size=(200, 6)) < 0.7
  settings = settings_of(factor=factor)
  chosen = np.asarray(
    schedules.select_by_factor(
      jnp.asarray(confidence), jnp.asarray(eligible), None, settings
    )
  )
  for row in range(200):
    order = sorted(
      np.flatnonzero(eligible[row]), key=lambda p: -confidence[row, p]
    )
    count = min(1, len(order))
    while 0 < count < len(order) and confidence[
      row, order[count]
    ] >= 1 - factor / (count + 2):
      count += 1
    if count == len(order) - 1:
      count += 1  # the scan's last rank is taken whether it passes or not
    assert set(np.flatnonzero(chosen[row])) == set(order[:count])


@pytest.mark.parametrize("steps", [1, 7, 16, 100])
def test_dream_shares_reveal_everything_on_average(steps):
  shares = schedules.dream_shares(steps, 1e-3)
  assert shares.dtype == np.float32 and shares[-1] == 1
  times = np.linspace(1, 1e-3, steps + 1)
  want = 1 - times[1:] / times[:-1]
  np.testing.assert_allclose(shares[:-1], want[:-1], rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 5, 12, 30])
def test_dream_quotas_of_rows_alike_are_those_of_the_batch_mean(steps):
  # The reference: floor(masks of the batch / rows * share), in float32.
  settings = settings_of(12, 12, steps, algorithm="entropy")
  shares = schedules.dream_shares(steps, settings.time_epsilon)
  for masks, step in itertools.product(range(13), range(steps)):
    eligible = np.tile(np.arange(12) < masks, (7, 1))
    mean = np.float32(eligible.sum()) / np.float32(7)
    want = np.floor(mean * shares[step])
    quota = schedules.ALGORITHMS["entropy"].quota(
      None, step, eligible, settings
    )
    np.testing.assert_array_equal(quota, np.full(7, want))


@pytest.mark.parametrize("order_temperature", [0.5, 1e-3])
def test_a_draw_of_nought_ranks_no_masked_position_behind_a_full_one(
  order_temperature,
):
  settings = settings_of(
    12, 12, 5, algorithm="entropy", order_temperature=order_temperature
  )
  draws = proposals.Draws(
    None, None, lambda: proposals.gumbel(jnp.zeros((2, 6)))
  )
  drawn = proposals.drawn_order(jnp.ones((2, 6)), settings, draws)
  assert np.isfinite(drawn).all()
  eligible = np.array([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1]], bool)
  for confidence in (drawn, jnp.full((2, 6), -jnp.inf)):
    chosen = schedules.select_by_quota(
      confidence, eligible, np.array([2, 1]), settings
    )
    want = [[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(chosen, np.array(want, bool))
