"""Scores: every scheme's law of masks, what is scored, recorded estimates."""

import dataclasses
import functools
import itertools
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.algorithm import likelihood
from rspo_jax.models import checkpoints, functions

PROMPT = 2  # P
LENGTH = 4  # L
MASK_ID = 9
SCHEMES = sorted(
  name for name, entry in likelihood.ESTIMATORS.items() if entry.elbo
)
TOKENS = np.array([3, 1, 4, 0, 5, 2, 6], np.int32)  # P + L and one more


def settings_of(scheme, draws=1):
  """Settings with so many independent draws of a scheme."""
  size = likelihood.ESTIMATORS[scheme].draw_size
  return likelihood.LikelihoodSettings(scheme, draws * size)


def prefix(lengths, length=LENGTH):
  """Completion masks bool [N, L] of the given lengths."""
  return jnp.arange(length) < jnp.asarray(lengths)[:, None]


@functools.cache
def drawing(scheme, draws, prompt_length=PROMPT):
  """Jitted draw_masks(key, scored) of a scheme."""
  settings = settings_of(scheme, draws)
  return jax.jit(
    lambda key, scored: likelihood.draw_masks(
      key, settings, scored, prompt_length
    )
  )


# Lengths of the batch whose masks most tests look at.
LENGTHS = np.tile(np.arange(LENGTH + 1), 1500)


@functools.cache
def drawn(scheme, seed=0):
  """Two draws for each of LENGTHS, as numpy: drawn once for all tests."""
  masks = drawing(scheme, 2)(jax.random.key(seed), prefix(LENGTHS))
  return jax.tree.map(np.asarray, masks)


def some(masks, rows):
  """The masks of some sequences."""
  return jax.tree.map(lambda x: x[rows], masks)


def codes_of(hidden):
  """Subsets bool [..., L] as numbers, bit j for position j."""
  return (hidden * (1 << np.arange(hidden.shape[-1]))).sum(-1)


def effective(masks):
  """bool [N, K, L]: the positions each of the K scores is an average over.

  Read from rows and weights; every row must lie where its canvas is hidden.
  """
  n, draws, canvases, span = masks.corrupt.shape
  i, u, c, r = np.nonzero(masks.weight)
  canvas, position = np.divmod(masks.rows[i, u, r], span)
  assert masks.corrupt[i, u, canvas, position].all()
  times = np.zeros((n, draws, canvases, span), int)
  np.add.at(times, (i, u, c, position), 1)
  assert times.max() == 1, "a token is scored twice"
  return times.reshape(n, draws * canvases, span)[:, :, PROMPT:] > 0


def table_logprob(table, tokens, token_mask, target, rows):
  """A model that is a table [2^L, L]: log-probs by hidden set and position.

  Visible positions and wrong targets give -1000, so that no average over
  them stays unnoticed.
  """
  span = tokens.shape[-1]
  hidden = tokens[:, :, PROMPT:] == MASK_ID  # [n, C, L]
  length = hidden.shape[-1]
  codes = (hidden * (1 << jnp.arange(length))).sum(-1)  # [n, C]
  canvas, position = rows // span, rows % span - PROMPT
  own = jnp.take_along_axis(codes, canvas, axis=1)
  values = table[own, position]
  values = jnp.where((own >> position) & 1 == 1, values, -1000.0)
  right = jnp.asarray(TOKENS)[rows % span] == target
  return jnp.where(right, values, -1000.0)


def random_table(length=LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(-2.0, 1.0, (2**length, length)).astype(np.float32)


def exact_score(table, length):
  """The count-uniform ELBO per token by enumeration, float64."""
  total = 0.0
  for size in range(1, length + 1):
    subsets = list(itertools.combinations(range(length), size))
    for subset in subsets:
      code = sum(1 << j for j in subset)
      mean = np.mean([float(table[code, j]) for j in subset])
      total += mean / (length * len(subsets))
  return total


# Uniform numbers and orders that one draw of a scheme takes, and the longest
# completion whose outcomes are still few enough to go through.
DRAWN = {
  "uniform": (1, 1, 5),
  "stratified": (1, 1, 5),
  "complementary": (2, 1, 5),
  "fixed_count": (1, 2, 4),
}


def outcomes_of(length, numbers, orders):
  """All outcomes of the uniform draws of a completion, equally likely.

  Numbers lie on the midpoints of the intervals at whose ends the laws of the
  schemes change; noises are all orders of the completion.

  Returns:
    (f32 [n, numbers], f32 [n, orders, 5]).
  """
  intervals = math.lcm(length, max(length - 1, 1))
  grid = (np.arange(intervals) + 0.5) / intervals
  order = np.array(list(itertools.permutations(range(length))))
  axes = [grid] * numbers + [np.arange(len(order))] * orders
  table = np.stack([x.reshape(-1) for x in np.meshgrid(*axes)], -1)
  noise = np.full((len(table), orders, 5), 0.99)
  index = table[:, numbers:].astype(int)
  noise[:, :, :length] = (order[index] + 0.5) / (length + 1)
  return table[:, :numbers], noise


@functools.cache
def enumerated(scheme, draws=1):
  """(length [N], masks) of every outcome of a scheme's draws, all lengths."""
  numbers, orders, longest = DRAWN[scheme]
  parts = [
    outcomes_of(length, numbers, orders) for length in range(1, longest + 1)
  ]
  lengths = np.repeat(np.arange(1, longest + 1), [len(p[0]) for p in parts])
  number = iter(np.concatenate([p[0] for p in parts]).T[:, :, None])
  noise = iter(np.concatenate([p[1] for p in parts]).swapaxes(0, 1))

  def uniform(key, shape):
    if len(shape) == 2:
      return jnp.asarray(next(number), jnp.float32)
    return jnp.broadcast_to(
      jnp.asarray(next(noise), jnp.float32)[:, None], shape
    )

  with mock.patch.object(jax.random, "uniform", uniform):
    masks = likelihood.draw_masks(
      jax.random.key(0), settings_of(scheme, draws), prefix(lengths, 5), PROMPT
    )
  return lengths, masks


@jax.jit
def table_scores(table, masks):
  """Scores f32 [N, K] of a table's log-probs."""
  n, span = masks.corrupt.shape[0], masks.corrupt.shape[-1]
  return likelihood.score(
    table_logprob,
    table,
    jnp.tile(jnp.asarray(TOKENS[:span]), (n, 1)),
    jnp.ones((n, span), bool),
    masks,
    MASK_ID,
  )


def mean_scores(scheme, table, draws=1):
  """Expectation f64 [K] of a scheme's scores, by length."""
  lengths, masks = enumerated(scheme, draws)
  scores = np.asarray(table_scores(jnp.asarray(table), masks), np.float64)
  return {n: scores[lengths == n].mean(0) for n in np.unique(lengths)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_expected_score_is_the_count_uniform_elbo(scheme):
  # Exactly: every outcome of the draws, every length.
  table = random_table(5)
  for length, means in mean_scores(scheme, table).items():
    # Each of the K scores, not only their mean.
    np.testing.assert_allclose(means, exact_score(table, length), rtol=2e-6)


def test_stratified_scores_are_unbiased_together():
  table = random_table(5)
  for length, means in mean_scores("stratified", table, draws=3).items():
    exact = exact_score(table, length)
    np.testing.assert_allclose(means.mean(), exact, rtol=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_subset_is_as_frequent_as_its_law_says(scheme):
  # Real keys. 4.5 standard errors: about one false alarm in 1,000 over all
  # cells, were the seed not fixed.
  sets = codes_of(effective(drawn(scheme)))  # [N, K]
  for length in range(1, LENGTH + 1):
    rows = sets[length == LENGTHS]
    if scheme == "stratified":  # the law is that of the K masks together
      rows = rows.reshape(-1, 1)
    for column in rows.T:
      share = np.bincount(column, minlength=2**LENGTH) / len(column)
      law = np.zeros(2**LENGTH)
      for code in range(1, 2**length):
        law[code] = 1 / (length * math.comb(length, code.bit_count()))
      error = np.sqrt(law * (1 - law) / len(column))
      assert (abs(share - law) <= 4.5 * error + 1e-12).all(), length


@pytest.mark.parametrize("scheme", ("uniform", "complementary", "fixed_count"))
def test_the_draws_of_a_sequence_are_independent(scheme):
  sets = codes_of(effective(drawn(scheme, seed=3))[LENGTHS == 2])
  size = likelihood.ESTIMATORS[scheme].draw_size
  joint = np.zeros((4, 4))
  np.add.at(joint, (sets[:, 0], sets[:, size]), 1 / len(sets))
  law = np.array([0, 0.25, 0.25, 0.5])
  law = np.outer(law, law)
  assert (abs(joint - law) <= 4.5 * np.sqrt(law / len(sets))).all()


def test_stratified_draws_take_one_count_from_every_stratum():
  counts = drawn("stratified").corrupt.sum((-1, -2))[LENGTHS == 4]  # [n, U]
  assert (np.sort((counts - 1) // 2, axis=1) == [0, 1]).all()
  assert set(np.unique(counts)) == {1, 2, 3, 4}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_score_is_the_plain_mean_over_its_mask(scheme):
  masks = drawn(scheme)
  n, size = len(LENGTHS), likelihood.ESTIMATORS[scheme].draw_size
  budget = LENGTH + 1 if scheme == "fixed_count" else LENGTH
  assert masks.corrupt.shape == (n, 2, size, PROMPT + LENGTH)
  assert masks.rows.shape == (n, 2, budget)
  assert masks.weight.shape == (n, 2, size, budget)
  sets = effective(masks)
  count = sets.sum(-1)  # [N, K]
  # Every scored mask is non-empty; nothing is scored of an empty one.
  assert ((count > 0) == (LENGTHS > 0)[:, None]).all()
  weight = masks.weight.reshape(n, 2 * size, budget)
  assert ((weight > 0).sum(-1) == count).all()
  wanted = np.where(weight > 0, 1 / np.maximum(count, 1)[..., None], 0)
  np.testing.assert_allclose(weight, wanted, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompts_and_unscored_positions_stay_visible(scheme):
  masks = drawn(scheme)
  visible = ~np.asarray(prefix(LENGTHS))
  assert not masks.corrupt[..., :PROMPT].any()
  assert not (masks.corrupt[..., PROMPT:] & visible[:, None, None]).any()
  assert (masks.rows >= 0).all()
  assert (masks.rows < (PROMPT + LENGTH) * masks.corrupt.shape[2]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scored_positions_need_not_be_a_prefix(scheme):
  scored = jnp.asarray([[False, True, False, True]] * len(LENGTHS))
  masks = drawing(scheme, 2)(jax.random.key(5), scored)
  sets = codes_of(effective(jax.tree.map(np.asarray, masks)))
  assert set(np.unique(sets)) == {0b0010, 0b1000, 0b1010}


def test_a_complementary_pair_scores_every_token_exactly_once():
  masks, scored = drawn("complementary"), np.asarray(prefix(LENGTHS))
  first, second = np.moveaxis(masks.corrupt[..., PROMPT:], 2, 0)  # [N, U, L]
  assert not (first & second).any()
  assert ((first | second) == scored[:, None]).all()
  canvas, position = np.divmod(masks.rows, PROMPT + LENGTH)
  assert (position == PROMPT + np.arange(LENGTH)).all()
  own = np.where(canvas == 0, first, second)
  assert (own == scored[:, None]).all()
  # (everything, nothing) counts as one mask: both scores are the full one's.
  alone = ~second.any(-1) & scored.any(-1)[:, None]
  assert alone.any() and not alone[LENGTHS > 1].all()
  weight = masks.weight[alone]  # [n, 2, L]
  np.testing.assert_array_equal(weight[:, 0], weight[:, 1])


def test_the_counts_of_a_fixed_pair_add_up_to_one_more_than_the_length():
  counts = drawn("fixed_count").corrupt.sum((-1, -2))  # [N, U]
  wanted = np.where(LENGTHS > 0, LENGTHS + 1, 0)
  assert (counts == wanted[:, None]).all()


def test_the_two_subsets_of_a_fixed_pair_are_independent():
  # L = 3 and both counts 2: nine pairs of subsets, all as likely.
  sets = codes_of(effective(drawn("fixed_count"))[LENGTHS == 3])  # [n, K]
  pairs = sets.reshape(-1, 2)
  two = np.isin(pairs, (0b011, 0b101, 0b110)).all(1)
  _, count = np.unique(pairs[two], axis=0, return_counts=True)
  assert len(count) == 9
  error = np.sqrt(8 / 81 / two.sum())
  assert (abs(count / two.sum() - 1 / 9) <= 4.5 * error).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_key_draws_the_same_masks_and_another_key_others(scheme):
  first, other = drawn(scheme), drawn(scheme, seed=3)
  again = drawing(scheme, 2)(jax.random.key(0), prefix(LENGTHS))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert (first.corrupt != other.corrupt).any()
  # Nor are the sequences of a batch, or the draws of a sequence, alike.
  full = first.corrupt[LENGTHS == LENGTH]
  assert (full[0] != full[1:]).any()
  assert (full[:, 0] != full[:, 1]).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_k_counts_the_canvases_of_all_draws(scheme):
  for draws in (1, 4):
    masks = jax.eval_shape(
      drawing(scheme, draws), jax.random.key(0), prefix((4, 4))
    )
    settings = settings_of(scheme, draws)
    canvases = masks.corrupt.shape[1] * masks.corrupt.shape[2]
    assert canvases == settings.masks


def test_scores_of_a_slice_are_a_slice_of_the_scores():
  masks, table = drawn("complementary"), jnp.asarray(random_table())
  whole = np.asarray(table_scores(table, some(masks, slice(0, 12))))
  parts = [table_scores(table, some(masks, slice(i, i + 4))) for i in (0, 4, 8)]
  np.testing.assert_array_equal(whole, np.concatenate(parts))
  empty = LENGTHS[:12] == 0
  assert (whole[empty] == 0).all() and (whole[~empty] != 0).all()


def test_a_true_token_that_is_the_mask_id_is_a_token():
  # Masks are carried: what is hidden and scored does not depend on tokens.
  tokens = jnp.asarray([[1, 2, MASK_ID, 3, MASK_ID, 4]] * 8)
  masks = some(drawn("complementary"), np.flatnonzero(LENGTHS == 4)[:8])
  calls = []

  def logprob_fn(params, canvas, token_mask, target, rows):
    calls.append((np.asarray(canvas), np.asarray(target), np.asarray(rows)))
    return jnp.ones(rows.shape)

  scores = likelihood.score(
    logprob_fn, None, tokens, jnp.ones((8, 6), bool), masks, MASK_ID
  )
  np.testing.assert_allclose(scores, 1.0, rtol=1e-6)
  canvas, target, rows = calls[0]
  hidden = masks.corrupt.reshape(16, 2, 6)
  wanted = np.where(hidden, MASK_ID, np.asarray(tokens)[0])
  np.testing.assert_array_equal(canvas, wanted)
  np.testing.assert_array_equal(target, np.asarray(tokens)[0][rows % 6])


def test_settings_refuse_what_cannot_be():
  make = likelihood.LikelihoodSettings
  with pytest.raises(ValueError, match=r"likelihood\.scheme='best'"):
    make("best")
  with pytest.raises(ValueError, match=r"masks=3 .*multiple of 2 .*use 2"):
    make("complementary", 3)
  for scheme in SCHEMES:
    with pytest.raises(ValueError, match=r"likelihood\.masks=0"):
      make(scheme, 0)
  with pytest.raises(ValueError, match=r"likelihood\.scope='all'"):
    make("uniform", 1, "all")


def test_draws_that_depend_on_each_other_are_one_draw():
  assert settings_of("uniform", 4).draw_size == 1
  assert settings_of("complementary", 2).draw_size == 2
  assert settings_of("stratified", 4).draw_size == 4


# Recorded estimates (fixtures/elbo).

MODEL_BY_CASE = {
  "elbo_llada_A": "llada_tiny_A",
  "elbo_llada_gqa": "llada_tiny_gqa",
  "elbo_dream": "dream_tiny",
}


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A recorded case, its model, and the jitted score of stored masks."""

  arrays: dict
  model: checkpoints.Model
  prompt: int
  score: object

  def masks(self, hidden, weight, rows=None):
    """Stored masks hidden [N, U, C, L], weight [N, U, C, R] as `Masks`."""
    length = hidden.shape[-1]
    if rows is None:
      rows = np.zeros((*hidden.shape[:2], 1), int)
      rows = rows + self.prompt + np.arange(length)
    before = [(0, 0)] * 3 + [(self.prompt, 0)]
    return likelihood.Masks(
      corrupt=jnp.asarray(np.pad(hidden.astype(bool), before)),
      rows=jnp.asarray(rows, jnp.int32),
      weight=jnp.asarray(weight, jnp.float32),
    )

  def coupled(self):
    """The stored masks of ESPO's coupled estimate, weighted per token."""
    hidden = self.arrays["c_mask"].astype(float)  # [N, K, L]
    length = hidden.shape[-1]
    count = hidden.sum(-1, keepdims=True)
    both = np.stack([hidden, 1 - hidden], axis=2)
    number = np.stack([count, length - count], axis=2)
    # (L + 1) / count over the mask, divided by L: nats per token.
    weight = both * (length + 1) / np.maximum(number, 1) / length
    canvas = np.where(hidden > 0, 0, 1)
    rows = canvas * (self.prompt + length) + self.prompt + np.arange(length)
    return self.masks(both, weight, rows)


@pytest.fixture(scope="module", params=sorted(MODEL_BY_CASE))
def recorded(request, shared):
  arrays = dict(np.load(shared / f"fixtures/elbo/{request.param}.npz"))
  folder = shared / "fixtures/models" / MODEL_BY_CASE[request.param]
  model = checkpoints.load_model(folder)
  logprob_fn = functions.make_logprob_fn(model.config)

  @jax.jit
  def score(params, tokens, masks):
    return likelihood.score(
      logprob_fn,
      params,
      tokens,
      jnp.ones_like(tokens, bool),
      masks,
      model.config.mask_id,
    )

  return Recorded(arrays, model, int(arrays["prompt_len"]), score)


def test_recorded_estimates_come_out_of_stored_masks(recorded):
  arrays = recorded.arrays
  tokens = jnp.asarray(arrays["seq"])
  masks = recorded.coupled()
  length = masks.corrupt.shape[-1] - recorded.prompt
  scores = recorded.score(recorded.model.params, tokens, masks)
  scores = np.asarray(scores, np.float64).reshape(*arrays["c_count"].shape, 2)
  per_mask = scores.mean(-1) * length  # the coupled halves, nats
  np.testing.assert_allclose(per_mask, arrays["c_per_mask"], rtol=1e-5)
  np.testing.assert_allclose(per_mask.mean(1), arrays["c_estimate"], rtol=1e-5)
  np.testing.assert_allclose(
    scores[:, :, 0].mean(1) * length,
    arrays["c_estimate_no_coupling"],
    rtol=1e-5,
  )
  if "b_mask" not in arrays:
    return
  hidden = arrays["b_mask"].astype(float)[:, :, None]
  masks = recorded.masks(hidden, hidden / hidden.sum(-1, keepdims=True))
  scores = recorded.score(recorded.model.params, tokens, masks)
  per_mask = np.asarray(scores, np.float64) * length
  np.testing.assert_allclose(per_mask, arrays["b_per_mask"], rtol=1e-5)
  np.testing.assert_allclose(per_mask.mean(1), arrays["b_estimate"], rtol=1e-5)


def test_the_recorded_exact_value_is_the_expectation_of_every_scheme(
  recorded,
):
  # The scores of all 31 masks of five tokens from the model; then the law of
  # our schemes over these masks, enumerated.
  arrays = recorded.arrays
  hidden = arrays["e_mask"].astype(bool)  # [31, 5]
  tokens = np.tile(arrays["e_seq"], (31, 1))
  prompt = tokens.shape[1] - 5
  length = hidden.shape[-1]
  case = dataclasses.replace(recorded, prompt=prompt)
  # Weight on one token at a time reads single log-probs from the model.
  each = np.zeros((31, 1, 1, length))
  table = np.full((32, length), -1000.0, np.float32)
  for j in range(length):
    weight = each.copy()
    weight[:, 0, 0, j] = hidden[:, j]
    masks = case.masks(hidden[:, None, None], weight)
    scores = recorded.score(recorded.model.params, jnp.asarray(tokens), masks)
    table[codes_of(hidden), j] = np.asarray(scores)[:, 0]
  shown = hidden * table[codes_of(hidden)]
  np.testing.assert_allclose(shown, arrays["e_logp"] * hidden, atol=1e-3)
  exact = float(arrays["e_exact_elbo"])
  mean = exact_score(table, length) * length
  np.testing.assert_allclose(mean, exact, rtol=1e-5)

  for scheme in DRAWN:
    means = mean_scores(scheme, table)
    if 5 in means:
      np.testing.assert_allclose(means[5].mean() * 5, exact, rtol=1e-5)


def test_recorded_one_step_log_probs(recorded):
  # d1: the whole completion hidden, prompt tokens hidden at random.
  arrays = recorded.arrays
  if "d_input" not in arrays:
    pytest.skip("recorded for LLaDA only")
  model = recorded.model
  logprob_fn = jax.jit(functions.make_logprob_fn(model.config))
  inputs = arrays["d_input"]  # [2, N, P + L]
  n, span = inputs.shape[1:]
  rows = recorded.prompt + np.arange(span - recorded.prompt)
  target = jnp.asarray(arrays["seq"][:, recorded.prompt :])
  logprob = logprob_fn(
    model.params,
    jnp.asarray(inputs.reshape(2 * n, 1, span)),
    jnp.ones((2 * n, span), bool),
    jnp.tile(target, (2, 1)),
    jnp.tile(jnp.asarray(rows), (2 * n, 1)),
  )
  np.testing.assert_allclose(
    np.asarray(logprob).reshape(2, n, -1),
    arrays["d_per_token_logps"],
    atol=1e-3,
  )


def test_recorded_gradients_of_the_coupled_estimate(recorded, shared, request):
  name = request.node.callspec.params["recorded"]
  path = shared / f"fixtures/elbo/grad_{name}.npz"
  if not path.exists():
    pytest.skip(f"no gradients were recorded for {name}")
  wanted = dict(np.load(path))
  norms = json.loads(path.with_suffix(".json").read_text())
  model, masks = recorded.model, recorded.coupled()
  tokens = jnp.asarray(recorded.arrays["seq"])
  loss, gradient = jax.jit(
    jax.value_and_grad(
      lambda params: -recorded.score(params, tokens, masks).mean()
    )
  )(model.params)
  np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
  gradient = dict(named(model.config, jax.tree.map(np.asarray, gradient)))
  total = np.sqrt(sum(np.square(g).sum() for g in gradient.values()))
  np.testing.assert_allclose(total, wanted["grad_global_norm"], rtol=1e-3)
  for key, value in wanted.items():
    kind, _, parameter = key.partition("::")
    if kind == "grad":
      own = gradient[parameter]
    elif kind == "grad_rows":
      own = gradient[parameter][wanted["rows"]]
    else:
      continue
    assert np.linalg.norm(own - value) <= 1e-3 * np.linalg.norm(value), key
  for parameter, norm in norms["norms"].items():
    own = np.linalg.norm(gradient[parameter])
    np.testing.assert_allclose(own, norm, rtol=1e-3, atol=1e-7)


def named(config, params):
  """(checkpoint name, value as the checkpoint has it) of every parameter."""
  for leaf in checkpoints.leaves(config):
    value = functools.reduce(lambda tree, key: tree[key], leaf.path, params)
    values = value if leaf.axes else value[None]
    for name, one in zip(leaf.names, values, strict=True):
      yield name, one.T if leaf.transposed else one
