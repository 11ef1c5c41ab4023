"""Bfloat16 storage that loses nothing on average, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax import rounding, train_step


def test_a_value_goes_to_its_neighbours_with_its_own_value_as_mean():
  # 1 + 3/4 of the way to the next bfloat16, and mirrored; 2**-7 apart.
  gap = 2.0**-7
  x = jnp.tile(jnp.float32([1 + 0.75 * gap, -1 - 0.75 * gap]), (40_000, 1))
  out = np.asarray(rounding.stochastic(x, jax.random.key(3)), np.float64)
  assert set(np.unique(np.abs(out))) == {1.0, 1.0 + gap}
  up = (np.abs(out) > 1).mean(0)
  # 5 standard errors of a share of 0.75 over 40,000 draws.
  assert np.abs(up - 0.75).max() < 5 * (0.75 * 0.25 / 40_000) ** 0.5


def test_what_is_exact_or_not_finite_stays_as_it_is():
  x = jnp.float32([0.0, -0.0, 1.0, -3.5, 2.0**-133, jnp.inf, -jnp.inf, jnp.nan])
  out = rounding.stochastic(x, jax.random.key(0))
  np.testing.assert_array_equal(np.asarray(out, np.float32), x)


def test_a_thousand_steps_of_a_millionth_move_a_weight_by_a_thousandth():
  start = jnp.full((4096,), 0.02, jnp.bfloat16)

  @jax.jit
  def walk(weights, root):
    def one(index, weights):
      key = jax.random.fold_in(root, index)
      wide = rounding.widen(weights) + 1e-6
      return rounding.store(wide, weights, key)

    return jax.lax.fori_loop(0, 1000, one, weights)

  moved = np.asarray(walk(start, jax.random.key(1)), np.float64)
  moved -= np.float64(start[0])
  assert abs(moved.mean() - 1e-3) < 0.05e-3
  # Rounded to nearest, none of the thousand steps leaves a trace.
  assert (start + jnp.float32(1e-6)).astype(jnp.bfloat16)[0] == start[0]


def test_an_optimizer_with_bfloat16_state_takes_the_same_way_on_average():
  # AdamW of a constant gradient moves by its rate a step, whatever it stores.
  settings = train_step.OptimizerSettings(
    1e-6, clip_norm=1e9, moment_dtype="bfloat16"
  )
  optimizer = train_step.make_optimizer(settings)
  params = {"kernel": jnp.full((64, 64), 0.02, jnp.bfloat16)}
  state = optimizer.init(params)
  kinds = {str(x.dtype) for x in jax.tree.leaves(state)}
  assert kinds == {"bfloat16", "int32"}
  gradient = {"kernel": jnp.full((64, 64), 0.3)}

  @jax.jit
  def walk(params, state, root):
    def one(index, carry):
      wide, moments = rounding.widen(carry)
      steps, moments = optimizer.update(gradient, moments, wide)
      new = jax.tree.map(jnp.add, wide, steps), moments
      return rounding.store(new, carry, jax.random.fold_in(root, index))

    return jax.lax.fori_loop(0, 1000, one, (params, state))

  moved = walk(params, state, jax.random.key(2))[0]["kernel"]
  moved = np.asarray(moved, np.float64) - np.float64(params["kernel"][0, 0])
  assert abs(moved.mean() + 1e-3) < 0.05e-3


def test_sums_of_gradients_keep_what_bfloat16_alone_would_lose():
  # Rounded to nearest, a sum of equal numbers stops at 256 of them.
  for count in (16, 256, 1024):

    @jax.jit
    def summed(total, root, count=count):
      one = jnp.full(total.shape, 1 / count, jnp.bfloat16)
      body = lambda i, x: rounding.add(x, one, jax.random.fold_in(root, i))  # noqa: E731
      return jax.lax.fori_loop(0, count, body, total)

    key = jax.random.key(5)
    exact = np.asarray(summed(jnp.zeros(4096), key), np.float64)
    np.testing.assert_array_equal(exact, 1.0)
    rounded = np.asarray(summed(jnp.zeros(4096, jnp.bfloat16), key), np.float64)
    # A walk of `count` roundings, each of at most the distance of neighbours
    # below 2, 2**-7: 5 standard errors of its mean.
    assert abs(rounded.mean() - 1) < 5 * 2.0**-7 * (count / 4096) ** 0.5
    assert rounded.std() < 2.0**-8 * count**0.5
