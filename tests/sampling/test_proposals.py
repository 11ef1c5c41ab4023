"""Draws, filters and confidences of one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.sampling import proposals
from rspo_jax.sampling.settings import SamplerSettings


def test_gumbel_argmax_draws_from_the_tempered_softmax():
  logits = np.array([1.0, 0.0, -1.0, 2.5], np.float32)
  temperature, draws = 0.7, 40_000
  uniform = jax.random.uniform(jax.random.key(0), (draws, 4))
  noise = proposals.gumbel(uniform)
  tokens = proposals.gumbel_argmax(jnp.asarray(logits), noise, temperature)
  share = np.bincount(tokens, minlength=4) / draws
  p = np.exp(logits / temperature)
  p /= p.sum()
  # Five standard errors of a share.
  assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_the_best_noise_of_a_large_vocabulary_lies_on_no_grid():
  # Of V tokens the best has an exponential e = exp(-noise) of about 1 / V; in
  # steps of 2**-23 the tail of a distribution would be drawn too seldom.
  vocab, rows = 126_464, np.arange(32)
  noise = proposals.drawn(
    proposals.gumbel_draw, jax.random.key(6), proposals.TOKENS, 0, rows,
    np.arange(4), vocab,
  )  # fmt: skip
  best = np.asarray(jax.lax.top_k(noise.reshape(-1, vocab), 2)[0], np.float64)
  e = np.exp(-best)
  # e_1 V is exponential, and so is its distance to e_2 V: 256 numbers.
  waits = np.diff(e * vocab, axis=1, prepend=0).reshape(-1)
  for uniform in (np.exp(-waits), e.reshape(-1) * 2**23 % 1):
    counts = np.histogram(uniform, bins=8, range=(0, 1))[0]
    expected = len(uniform) / 8
    # One in 10,000 of the chi-squares with 7 degrees of freedom is above 29.9.
    assert ((counts - expected) ** 2 / expected).sum() < 29.9, counts


def test_gumbel_argmax_survives_logits_whose_exponential_overflows():
  logits = jnp.array([500.0, 499.0, -500.0])
  uniform = jnp.array([[0.01, 0.99, 0.5], [0.0, 0.5, 0.5]])
  # 500 - log(4.6) against 499 - log(.01); u = 0 is as low as noise can be.
  tokens = proposals.gumbel_argmax(logits, proposals.gumbel(uniform), 1.0)
  np.testing.assert_array_equal(tokens, [1, 1])


@pytest.mark.parametrize("top_p,top_k", [(0.6, None), (None, 3), (0.9, 2)])
def test_filters_keep_the_nucleus_and_then_the_k_best(top_p, top_k):
  logits = np.random.default_rng(1).normal(size=(20, 9)).astype(np.float32)
  out = np.asarray(proposals.filter_logits(jnp.asarray(logits), top_p, top_k))
  for row, filtered in zip(logits, out, strict=True):
    order = sorted(range(9), key=lambda t: -row[t])
    if top_p is not None:
      p = np.exp(row.astype(np.float64))
      p /= p.sum()
      before = np.cumsum([0.0] + [p[t] for t in order[:-1]])
      order = [
        t for t, mass in zip(order, before, strict=True) if mass <= top_p
      ]
    order = order[:top_k]
    kept = set(np.flatnonzero(filtered > -1e30))
    assert kept == set(order)
    np.testing.assert_array_equal(filtered[order], row[order])


def test_drawn_orders_follow_their_softmax():
  # One of three positions with confidences 0, 1, 2 at temperature 0.8.
  confidence = np.tile(np.arange(3, dtype=np.float32), (30_000, 1))
  settings = SamplerSettings(
    12, 12, 5, algorithm="entropy", order_temperature=0.8
  )
  noise = jax.random.gumbel(jax.random.key(5), confidence.shape)
  draws = proposals.Draws(None, None, lambda: noise)
  drawn = proposals.drawn_order(jnp.asarray(confidence), settings, draws)
  share = np.bincount(np.argmax(drawn, axis=1), minlength=3) / len(confidence)
  p = np.exp(confidence[0] / 0.8)
  np.testing.assert_allclose(share, p / p.sum(), atol=0.015)
