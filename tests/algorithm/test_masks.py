"""Mask schemes that are no plain ELBO: what they hide, and what they score."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.algorithm import likelihood, masks

PROMPT, LENGTH, N = 3, 6, 400


def drawn(scheme, count, lengths, length=LENGTH, commit_step=None, **options):
  """Masks of sequences of these lengths, as numpy."""
  settings = likelihood.LikelihoodSettings(scheme, count, **options)
  scored = jnp.arange(length) < jnp.asarray(lengths)[:, None]
  draw = jax.jit(
    lambda key: likelihood.draw_masks(
      key, settings, scored, PROMPT, commit_step
    )
  )
  out = jax.tree.map(np.asarray, draw(jax.random.key(0)))
  return out, np.asarray(scored)


def test_mean_field_hides_the_completion_and_some_of_the_prompt():
  lengths = np.arange(N) % LENGTH + 1
  out, scored = drawn("mean_field", 2, lengths)
  corrupt = out.corrupt[:, :, 0]  # [N, U, S]
  assert (corrupt[:, :, PROMPT:] == scored[:, None]).all()
  share = corrupt[:, :, :PROMPT].mean()
  assert abs(share - 0.15) < 4.5 * math.sqrt(0.15 * 0.85 / (N * 2 * PROMPT))
  assert (corrupt[:, 0, :PROMPT] != corrupt[:, 1, :PROMPT]).any()
  expected = scored[:, None, None] / lengths[:, None, None, None]
  np.testing.assert_allclose(
    out.weight, np.broadcast_to(expected, out.weight.shape), rtol=1e-6
  )
  none, _ = drawn("mean_field", 1, lengths, prompt_mask=0.0)
  assert not none.corrupt[..., :PROMPT].any()


def test_a_masked_tail_is_hidden_on_every_canvas_and_never_scored():
  lengths = np.arange(N) % LENGTH + 1
  for scheme, count in (("mean_field", 1), ("block_random", 2), ("uniform", 2)):
    plain, scored = drawn(scheme, count, lengths)
    out, _ = drawn(scheme, count, lengths, scope="masked_tail")
    hidden = out.corrupt[..., PROMPT:]
    tail = np.broadcast_to(~scored[:, None, None], hidden.shape)
    assert hidden[tail].all()
    assert (hidden[~tail] == plain.corrupt[..., PROMPT:][~tail]).all()
    np.testing.assert_array_equal(out.weight, plain.weight)
    assert (out.weight * ~scored[:, None, None] == 0).all()


def test_a_random_block_is_in_progress():
  size = 2
  lengths = np.arange(N) % LENGTH + 1
  out, scored = drawn("block_random", 3, lengths, block_length=size)
  seen = {}
  for i, length in enumerate(lengths):
    filled = -(-length // size)
    blocks = []
    for k in range(3):
      hidden = out.corrupt[i, k, 0, PROMPT:]
      assert not hidden[~scored[i]].any()
      # The block in progress: everything after it hidden, in it at least one.
      candidates = [
        b
        for b in range(filled)
        if hidden[(b + 1) * size : length].all()
        and hidden[b * size : (b + 1) * size].any()
      ]
      assert candidates
      blocks.append(candidates)
      weight = out.weight[i, k, 0]
      assert ((weight > 0) == hidden).all()
      np.testing.assert_allclose(weight.sum(), 1, rtol=1e-6)
      first = hidden[: min(size, length)].sum()
      if length <= size:
        seen.setdefault(length, []).append(first)
  # One block: m is uniform on 1 .. its size.
  counts = np.bincount(seen[2], minlength=3)
  assert counts[0] == 0
  assert abs(counts[1] / counts.sum() - 0.5) < 4.5 * 0.5 / counts.sum() ** 0.5


def test_blocks_of_a_full_completion_are_distinct():
  out, _ = drawn(
    "block_random", 3, np.full(N, LENGTH), block_length=2, prompt_mask=0.0
  )
  hidden = out.corrupt[:, :, 0, PROMPT:].reshape(N, 3, 3, 2)
  block = hidden.any(-1).argmax(-1)  # the first with anything hidden
  assert (np.sort(block, axis=1) == [0, 1, 2]).all()
  assert not out.corrupt[..., :PROMPT].any()


@pytest.mark.parametrize("shrink", (1, 2))
def test_a_trace_scores_every_token_where_the_sampler_chose_it(shrink):
  rng = np.random.default_rng(0)
  when = rng.integers(-1, 5, (40, LENGTH)).astype(np.int32)
  lengths = rng.integers(1, LENGTH + 1, 40)
  count = -(-5 // shrink)
  out, scored = drawn(
    "trace", count, lengths, commit_step=jnp.asarray(when), shrink=shrink
  )
  span = PROMPT + LENGTH
  for i in range(40):
    counted = [j for j in range(LENGTH) if scored[i, j] and when[i, j] >= 0]
    steps = sorted({when[i, j] for j in counted})
    canvas_of = {j: steps.index(when[i, j]) // shrink for j in counted}
    for v in range(count):
      hidden = np.zeros(span, bool)
      for j in counted:
        hidden[PROMPT + j] = canvas_of[j] >= v
      np.testing.assert_array_equal(out.corrupt[i, 0, v], hidden)
    for j in range(LENGTH):
      weight = out.weight[i, 0, :, j]
      if j not in canvas_of:
        assert (weight == 0).all()
        continue
      canvas, position = divmod(int(out.rows[i, 0, j]), span)
      assert (canvas, position) == (canvas_of[j], PROMPT + j)
      expected = np.zeros(count)
      expected[canvas] = count / len(counted)
      np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_a_trace_without_a_sampler_is_refused():
  with pytest.raises(ValueError, match="'trace' follows the sampler's steps"):
    drawn("trace", 2, [3])


def test_quadratures_hide_the_floor_of_their_nodes():
  nodes, weights = np.polynomial.legendre.leggauss(3)
  nodes, weights = (nodes + 1) / 2, weights / 2
  np.testing.assert_allclose(nodes, [0.1127, 0.5, 0.8873], atol=1e-4)
  for length, factor in ((16, 0.555), (256, 0.970)):
    exact, _ = drawn("gauss", 3, [length], length)
    floor, _ = drawn("gauss_floor", 3, [length], length)
    for out in (exact, floor):
      size = out.corrupt[0, :, 0].sum(-1)
      assert size.tolist() == [int(max(1, t * length)) for t in nodes]
    np.testing.assert_allclose(
      exact.weight[0, :, 0].sum(-1), 3 * weights, rtol=1e-5
    )
    # The published weight w / t is short of w n / |M|.
    ratio = floor.weight[0, 0].sum() / exact.weight[0, 0].sum()
    assert ratio == pytest.approx(factor, abs=1e-3)
  out, _ = drawn("simpson", 3, [10], 10)
  assert out.corrupt[0, :, 0].sum(-1).tolist() == [1, 5, 10]
  np.testing.assert_allclose(
    out.weight[0, :, 0].sum(-1), [0.5, 2, 0.5], rtol=1e-5
  )
  with pytest.raises(ValueError, match=r"masks=2 is not defined .* use 3"):
    drawn("simpson", 2, [4])


def test_a_quadrature_integrates_a_smooth_model():
  # Log-probs that fall linearly with the share of hidden tokens: the integral
  # over the ratio is that at one half, whatever positions are hidden.
  for scheme, tolerance in (("gauss", 0.03), ("simpson", 0.1)):
    out, _ = drawn(scheme, 3, np.full(1, 64), 64)
    ratio = out.corrupt[0, :, 0].sum(-1) / 64
    score = (out.weight[0, :, 0].sum(-1) * -(1 + ratio)).mean()
    assert score == pytest.approx(-1.5, abs=tolerance)


def test_coupled_pairs_have_the_expectation_of_the_count_uniform_elbo():
  # By enumeration of l on 0..L and of the subsets, for any table of log-probs.
  rng = np.random.default_rng(1)
  length = 4
  table = rng.normal(-2, 1, (2**length, length))

  def mean(members):
    code = sum(1 << j for j in members)
    return np.mean([table[code, j] for j in members]) if members else 0.0

  everyone = set(range(length))
  pair = elbo = 0.0
  for size in range(length + 1):
    subsets = list(itertools.combinations(range(length), size))
    for subset in subsets:
      rest = sorted(everyone - set(subset))
      scale = (length + 1) / length
      both = scale * (mean(subset) + mean(rest)) / 2
      pair += both / len(subsets) / (length + 1)
      if size:
        elbo += mean(subset) / len(subsets) / length
  assert pair == pytest.approx(elbo)
  # And the scheme draws exactly that.
  out, _ = drawn("coupled", 2, np.full(4000, length), length)
  first, second = out.corrupt[:, 0, 0, PROMPT:], out.corrupt[:, 0, 1, PROMPT:]
  assert (first ^ second).all()
  counts = np.bincount(first.sum(-1), minlength=length + 1) / 4000
  error = math.sqrt(0.2 * 0.8 / 4000)
  assert (abs(counts - 0.2) < 4.5 * error).all()
  for mask, weight in (
    (first, out.weight[:, 0, 0]),
    (second, out.weight[:, 0, 1]),
  ):
    size = np.maximum(mask.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(weight, 1.25 * mask / size, rtol=1e-6)


def test_every_scheme_says_how_many_canvases_it_draws():
  for name, entry in masks.ESTIMATORS.items():
    settings = likelihood.LikelihoodSettings(name, (entry.masks or (4,))[0])
    assert settings.masks % settings.draw_size == 0, name
    assert settings.needs_trace == (name == "trace")
