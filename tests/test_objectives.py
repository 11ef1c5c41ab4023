"""Objectives: what the gap is, where it leads, and what it is related to."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax import likelihood, objectives, rollout
from rspo_jax.objectives import ObjectiveSettings, Terms
from rspo_jax.tasks import base

PROMPTS, GROUP, MASKS = 3, 4, 4
N = PROMPTS * GROUP


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
  """Most of the time of these tests would go into optimising programs."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def settings_of(**options):
  """Settings in nats per token, groups of four, unless said otherwise."""
  default = dict(lambda_=3.0, lambda_unit="token", group_size=GROUP)
  return ObjectiveSettings(**(default | options))


def terms_of(settings, n=N, masks=MASKS, seed=0, keep=None, **given):
  """Random terms; `given` replaces some. float32 arrays."""
  rng = np.random.default_rng(seed)
  values = dict(
    policy=rng.normal(-2, 0.5, (n, masks)),
    reference=rng.normal(-2, 0.5, (n, masks)),
    advantage=rng.normal(0, 1, n),
    length=rng.integers(1, 9, n),
    keep=np.ones(n) if keep is None else keep,
  ) | {k: v for k, v in given.items() if v is not None}
  values["target"] = objectives.targets(
    np.asarray(values["advantage"]), settings.lambda_
  )
  return Terms(**{k: jnp.asarray(v, jnp.float32) for k, v in values.items()})


@functools.partial(jax.jit, static_argnums=1)
def weights_of(terms, settings):
  """(objective, its gradient [N, K] in the policy's scores, metrics)."""

  def mean_loss(policy):
    loss, metrics = objectives.OBJECTIVES[settings.name].loss(
      terms.replace(policy=policy), settings
    )
    return (loss * terms.keep).sum() / terms.keep.sum(), metrics

  (value, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
    terms.policy
  )
  return value, gradient, metrics


def sets_of(settings, keep):
  """The kept members of every sequence's centring set, by definition."""
  n = len(keep)
  for i in range(n):
    if settings.centring == "none":
      yield []
    elif settings.centring == "batch":
      yield [j for j in range(n) if keep[j]]
    else:
      first = i // settings.group_size * settings.group_size
      yield [j for j in range(first, first + settings.group_size) if keep[j]]


def definition(terms, settings):
  """Objective and gap [N] as rspo.md defines them: loops, float64."""
  keep = np.asarray(terms.keep)
  d = np.asarray(terms.policy, np.float64).mean(1)
  if settings.subtract_reference:
    d = d - np.asarray(terms.reference, np.float64).mean(1)
  scale = np.ones(len(d))
  if settings.lambda_unit == "sequence":
    scale = np.asarray(terms.length, np.float64)
  gap, total = np.zeros(len(d)), 0.0
  for i, members in enumerate(sets_of(settings, keep)):
    if not keep[i]:
      continue
    mean = np.mean([d[j] for j in members]) if members else 0.0
    in_unit = scale[i] * d[i]
    if members:
      in_unit -= np.mean([scale[j] * d[j] for j in members])
    gap[i] = float(terms.advantage[i]) - settings.lambda_ * in_unit
    total -= gap[i] * (d[i] - mean)
  return total / keep.sum(), gap


VARIANTS = [
  settings_of(lambda_=lambda_, lambda_unit=unit, centring=centring)
  for lambda_ in (0.0, 3.0)
  for unit in objectives.LAMBDA_UNITS
  for centring in objectives.CENTRINGS
] + [settings_of(subtract_reference=False)]
NAMES = [
  f"{s.lambda_}-{s.lambda_unit}-{s.centring}-{s.subtract_reference}"
  for s in VARIANTS
]
DROPPED = np.repeat([1, 0, 1], GROUP)


@pytest.mark.parametrize("keep", (None, DROPPED), ids=("all", "dropped"))
@pytest.mark.parametrize("settings", VARIANTS, ids=NAMES)
def test_the_objective_and_its_weights_are_those_of_the_definition(
  settings, keep
):
  terms = terms_of(settings, keep=keep)
  value, gradient, _ = weights_of(terms, settings)
  expected, gap = definition(terms, settings)
  np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
  # L is linear in the scores: -(1/N) sum of gap times the mean over masks.
  kept = np.asarray(terms.keep).sum()
  weight = -np.repeat(gap[:, None], MASKS, 1) / kept / MASKS
  np.testing.assert_allclose(gradient, weight, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("centring", objectives.CENTRINGS)
def test_the_gradient_is_lambda_times_that_of_least_squares(centring):
  settings = settings_of(lambda_=0.7, centring=centring)
  terms = terms_of(settings)
  _, gradient, _ = weights_of(terms, settings)
  d = np.asarray(terms.policy - terms.reference, np.float64).mean(1)
  mean = np.array(
    [d[m].mean() if m else 0.0 for m in sets_of(settings, np.ones(N))]
  )  # stopped: it stays where it is
  wanted = np.asarray(terms.advantage, np.float64) / settings.lambda_

  def squares(policy):
    d = (policy - np.asarray(terms.reference, np.float64)).mean(1)
    return 0.5 * np.mean((d - mean - wanted) ** 2)

  policy, step = np.asarray(terms.policy, np.float64), 1e-5
  for i, k in itertools.product(range(N), range(MASKS)):
    shift = np.zeros_like(policy)
    shift[i, k] = step
    slope = (squares(policy + shift) - squares(policy - shift)) / (2 * step)
    np.testing.assert_allclose(
      gradient[i, k], settings.lambda_ * slope, rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("unit", objectives.LAMBDA_UNITS)
def test_lambda_zero_is_advantage_weighted_elbo_and_divides_by_nothing(unit):
  settings = settings_of(lambda_=0.0, lambda_unit=unit)
  assert (objectives.targets(np.ones(3, np.float32), 0.0) == 0).all()
  terms = terms_of(settings)
  # What must not matter: the target, and the reference but for the value.
  odd = terms.replace(target=jnp.full(N, jnp.nan), reference=terms.policy + 7)
  for one in (terms, odd):
    _, gradient, _ = weights_of(one, settings)
    wanted = -np.asarray(one.advantage)[:, None] / N / MASKS
    np.testing.assert_allclose(gradient, np.tile(wanted, MASKS), rtol=1e-6)


def test_at_the_reference_the_weights_are_those_of_lambda_zero():
  for settings in VARIANTS[:-1]:
    terms = terms_of(settings)
    terms = terms.replace(reference=terms.policy)
    _, gradient, metrics = weights_of(terms, settings)
    wanted = -np.asarray(terms.advantage)[:, None] / N / MASKS
    np.testing.assert_allclose(gradient, np.tile(wanted, MASKS), rtol=1e-6)
    assert metrics["score/relative_mean"] == 0
    assert metrics["score/relative_std"] == 0


def test_the_reference_changes_the_gap_and_never_the_direction():
  # The direction is each sequence's own gradient of its score: equal weight
  # for each of its masks, nothing for other sequences.
  settings = settings_of()
  terms = terms_of(settings)

  def loss_of(policy, reference):
    loss, _ = objectives.rspo(
      terms.replace(policy=policy, reference=reference), settings
    )
    return loss

  by_policy = jax.jacrev(loss_of)(terms.policy, terms.reference)  # [N, N, K]
  by_reference = jax.jacrev(loss_of, 1)(terms.policy, terms.reference)
  assert (by_reference == 0).all()
  own = np.asarray(by_policy)[np.arange(N), np.arange(N)]
  assert (np.ptp(own, axis=1) <= 1e-6).all()
  others = np.array(by_policy)
  others[np.arange(N), np.arange(N)] = 0
  assert (others == 0).all(), "centring is by a stopped constant"


def test_units_agree_where_lengths_are_equal():
  length = 5.0
  token = settings_of(lambda_=2.0)
  sequence = settings_of(lambda_=2.0 / length, lambda_unit="sequence")
  terms = terms_of(token, length=np.full(N, length))
  other = terms_of(sequence, length=np.full(N, length))
  a, b = weights_of(terms, token)[1], weights_of(other, sequence)[1]
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_equal_rewards_leave_only_the_pull_towards_the_reference():
  rewards = np.array([[0.1] * 4, [0.0, 1.0, 0.0, 0.0], [1.0] * 4], np.float32)
  advantage = objectives.group_advantages(rewards).reshape(-1)
  settings = settings_of()
  equal = np.repeat([True, False, True], GROUP)
  assert (objectives.targets(advantage, 3.0)[equal] == 0).all()
  terms = terms_of(settings, advantage=advantage)
  start = terms.replace(reference=terms.policy)
  assert (np.asarray(weights_of(start, settings)[1])[equal] == 0).all()
  zero = settings_of(lambda_=0.0)
  free = np.asarray(weights_of(terms_of(zero, advantage=advantage), zero)[1])
  assert (free[equal] == 0).all()
  # Elsewhere they are pulled back: down where the relative score is high.
  pull = np.asarray(weights_of(terms, settings)[1]).sum(1)
  d = np.asarray(terms.policy - terms.reference).mean(1).reshape(-1, GROUP)
  above = (d - d.mean(1, keepdims=True)).reshape(-1)
  np.testing.assert_allclose(pull[equal], 3 * above[equal] / N, rtol=1e-4)


def test_the_order_within_a_group_does_not_matter():
  rng = np.random.default_rng(1)
  order = np.concatenate([g * 4 + rng.permutation(4) for g in range(3)])
  for settings in VARIANTS:
    terms = terms_of(settings)
    moved = jax.tree.map(lambda x: x[order], terms)
    value, gradient, _ = weights_of(terms, settings)
    value2, gradient2, _ = weights_of(moved, settings)
    np.testing.assert_allclose(value, value2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient[order], gradient2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ("rspo", "rft", "sft"))
@pytest.mark.parametrize("gap_masks", objectives.GAP_MASKS)
def test_dropped_groups_influence_nothing(name, gap_masks):
  for centring in objectives.CENTRINGS:
    settings = settings_of(name=name, gap_masks=gap_masks, centring=centring)
    terms = terms_of(settings, keep=DROPPED)
    noise = 100 * (1 - DROPPED)
    odd = terms.replace(
      policy=terms.policy - noise[:, None],
      reference=terms.reference + noise[:, None],
      advantage=terms.advantage + noise,
      target=terms.target - noise,
      length=terms.length + noise,
    )
    first, second = weights_of(terms, settings), weights_of(odd, settings)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert (np.asarray(first[1])[DROPPED == 0] == 0).all()
    rest = jax.tree.map(lambda x: x[DROPPED == 1], terms)
    alone = weights_of(rest, settings)
    np.testing.assert_allclose(first[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(
      first[1][DROPPED == 1], alone[1], rtol=1e-5, atol=1e-8
    )
    for key in alone[2]:
      np.testing.assert_allclose(
        first[2][key], alone[2][key], rtol=1e-4, atol=1e-6, err_msg=key
      )


# Where the objective leads, on spaces small enough to enumerate.

REWARDS = np.array([0.0, 0.3, 1.0])
REFERENCE = np.log(np.array([0.5, 0.3, 0.2]))


def tilt(strength):
  """Log-probabilities of pi_ref exp(strength r) / Z."""
  logits = REFERENCE + strength * REWARDS
  return logits - np.log(np.exp(logits).sum())


@functools.cache
def expected_gradient(centring, group, prompts):
  """theta -> E over on-policy batches of the gradient, exact scores.

  All batches of `prompts` groups over the three completions are enumerated;
  A = r - group mean, one token a completion.
  """
  n = group * prompts
  batches = np.array(list(itertools.product(range(3), repeat=n)))
  rewards = REWARDS[batches].reshape(-1, prompts, group)
  advantages = (rewards - rewards.mean(2, keepdims=True)).reshape(-1, n)
  settings = settings_of(lambda_=0.4, centring=centring, group_size=group)

  def loss_of(theta, batch, advantage):
    terms = Terms(
      policy=jax.nn.log_softmax(theta)[batch][:, None],
      reference=jnp.asarray(REFERENCE, jnp.float32)[batch][:, None],
      advantage=advantage,
      target=advantage / settings.lambda_,
      length=jnp.ones(n),
      keep=jnp.ones(n),
    )
    return objectives.rspo(terms, settings)[0].mean()

  @jax.jit
  def gradient(theta):
    probability = jnp.exp(jax.nn.log_softmax(theta)[batches].sum(1))
    each = jax.vmap(jax.grad(loss_of), (None, 0, 0))(
      theta, batches, jnp.asarray(advantages, jnp.float32)
    )
    return (probability[:, None] * each).sum(0)

  return lambda theta: np.asarray(gradient(jnp.asarray(theta, jnp.float32)))


@pytest.mark.parametrize("group, prompts", ((2, 2), (4, 1), (2, 3)))
def test_fixed_points_are_tilts_of_the_stated_strength(group, prompts):
  # A = r - group mean, lambda 0.4, on-policy, exact log-likelihoods.
  within, across = 1 - 1 / group, 1 - 1 / (group * prompts)
  strength = {
    "none": within / 0.4,
    "batch": within / across / 0.4,
    "group": 1 / 0.4,
  }
  for centring, own in strength.items():
    gradient = expected_gradient(centring, group, prompts)
    np.testing.assert_allclose(gradient(tilt(own)), 0, atol=3e-7)
    for other in {*strength.values(), 0.0} - {own}:
      assert abs(gradient(tilt(other))).max() > 1e-3, (centring, other)


def test_a_fixed_advantage_has_the_tilt_by_it_as_fixed_point():
  # A(x, y) given, not computed from the group: pi_ref exp(A / lambda) / Z.
  settings = settings_of(lambda_=0.4, centring="none")
  advantage = jnp.asarray(REWARDS - 0.2, jnp.float32)

  def expected_loss(theta):
    terms = Terms(
      policy=jax.nn.log_softmax(theta)[:, None],
      reference=jnp.asarray(REFERENCE, jnp.float32)[:, None],
      advantage=advantage,
      target=advantage / settings.lambda_,
      length=jnp.ones(3),
      keep=jnp.ones(3),
    )
    probability = jax.lax.stop_gradient(jax.nn.softmax(theta))
    return (probability * objectives.rspo(terms, settings)[0]).sum()

  gradient = jax.grad(expected_loss)
  at = lambda s: np.asarray(gradient(jnp.asarray(tilt(s), jnp.float32)))  # noqa: E731
  np.testing.assert_allclose(at(1 / 0.4), 0, atol=3e-7)
  assert abs(at(0.5 / 0.4)).max() > 1e-3


class MaskedModel:
  """Three masks (of unequal probability) with scores in two parameters."""

  law = np.array([0.2, 0.3, 0.5])

  def __init__(self, seed):
    rng = np.random.default_rng(seed)
    self.slope = rng.normal(size=(3, 2))
    self.bend = rng.normal(size=(3, 2)) / 2

  def relative(self, theta):
    """Relative scores [3] of the masks; 0 at theta = 0."""
    return self.slope @ theta + self.bend @ theta**2


def expected_by_enumeration(models, settings, theta, advantage, draws, pair):
  """E over all draws of all sequences of the objective's gradient.

  With `pair` a draw is two masks of which the second is always the first's
  successor.
  """
  n = len(models)
  picks = np.array(list(itertools.product(range(3), repeat=n * draws)))
  probability = MaskedModel.law[picks].prod(1)
  picks = picks.reshape(-1, n, draws)
  if pair:
    picks = np.stack([picks, (picks + 1) % 3], -1).reshape(len(picks), n, -1)
  slope = jnp.asarray([m.slope for m in models], jnp.float32)
  bend = jnp.asarray([m.bend for m in models], jnp.float32)

  @jax.jit
  @jax.vmap
  def gradient(pick):
    def loss(theta):
      relative = slope @ theta + bend @ theta**2  # [N, 3]
      policy = jnp.take_along_axis(relative, pick, axis=1)
      terms = Terms(
        policy=policy,
        reference=jnp.zeros_like(policy),
        advantage=advantage,
        target=advantage / settings.lambda_,
        length=jnp.ones(n),
        keep=jnp.ones(n),
      )
      return objectives.rspo(terms, settings)[0].mean()

    return jax.grad(loss)(jnp.asarray(theta, jnp.float32))

  return (probability[:, None] * np.asarray(gradient(picks), np.float64)).sum(0)


@pytest.mark.parametrize("pair", (False, True), ids=("single", "pair"))
@pytest.mark.parametrize("centring", ("none", "group"))
def test_leave_one_out_removes_the_penalty_on_mask_variance(centring, pair):
  # Two sequences of one group, two draws each: 81 outcomes. The stated
  # objective has E[d] in the gap; shared masks add lambda / 2 times the
  # gradient of the variance of d (and, of the centred part, 1 - 1/G of it).
  models = [MaskedModel(seed) for seed in range(2)]
  theta, advantage = np.array([0.6, -0.4]), np.array([0.8, -0.8])
  draws, lambda_ = 2, 0.7
  common = dict(lambda_=lambda_, centring=centring, group_size=2)
  common["draw_size"] = 2 if pair else 1

  def moments(theta):
    means, variances = [], []
    for model in models:
      values = model.relative(theta)
      if pair:
        values = (values + np.roll(values, -1)) / 2
      mean = model.law @ values
      means.append(mean)
      variances.append(model.law @ (values - mean) ** 2 / draws)
    return np.array(means), np.array(variances)

  def slope_of(function):
    step = 1e-6
    return np.stack(
      [
        (function(theta + e) - function(theta - e)) / (2 * step)
        for e in step * np.eye(2)
      ],
      -1,
    )

  mean, _ = moments(theta)
  d_mean = slope_of(lambda t: moments(t)[0])  # [N, 2]
  d_variance = slope_of(lambda t: moments(t)[1])
  centre = mean.mean() if centring == "group" else 0.0
  stated = -((advantage - lambda_ * (mean - centre)) @ d_mean) / 2
  share = 0.5 if centring == "group" else 1.0
  penalty = lambda_ * share * 0.5 * d_variance.sum(0) / 2
  given = (theta, jnp.asarray(advantage, jnp.float32), draws, pair)
  left_out = expected_by_enumeration(
    models, settings_of(gap_masks="leave_one_out", **common), *given
  )
  shared = expected_by_enumeration(models, settings_of(**common), *given)
  np.testing.assert_allclose(left_out, stated, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(shared, stated + penalty, rtol=1e-5, atol=1e-6)
  assert abs(penalty).max() > 1e-3


def test_leave_one_out_weighs_a_draw_by_a_gap_without_it():
  settings = settings_of(gap_masks="leave_one_out", lambda_unit="sequence")
  terms = terms_of(settings, keep=DROPPED)
  _, gradient, _ = weights_of(terms, settings)
  kept = DROPPED.sum()
  for k in range(MASKS):
    rest = [j for j in range(MASKS) if j != k]
    others = terms.replace(
      policy=terms.policy[:, rest], reference=terms.reference[:, rest]
    )
    shared = dataclasses.replace(settings, gap_masks="shared")
    _, gap = definition(others, shared)
    np.testing.assert_allclose(
      gradient[:, k], -gap / kept / MASKS, rtol=3e-5, atol=1e-7
    )


def test_leave_one_out_needs_two_independent_draws():
  settings = settings_of(gap_masks="leave_one_out", draw_size=2)
  with pytest.raises(ValueError, match=r"two independent draws.*masks=4"):
    objectives.rspo(terms_of(settings, masks=2), settings)
  # Joint draws count as one, whatever their number.
  joint = likelihood.LikelihoodSettings("stratified", 4).draw_size
  settings = settings_of(gap_masks="leave_one_out", draw_size=joint)
  with pytest.raises(ValueError, match="two independent draws"):
    objectives.rspo(terms_of(settings, masks=4), settings)


# Relatives: the same six numbers on both sides.

SIX = np.array([-1.2, -0.4, -2.0, -0.9, -1.6, -0.3])
SIX_REFERENCE = np.array([-1.0, -0.7, -1.9, -1.1, -1.0, -0.4])
SIX_REWARDS = np.array([1.0, 0.0, 0.2, 0.1, 0.9, 1.0], np.float32)


def six_terms(settings, advantage, length=1.0):
  """One mask a sequence, six sequences."""
  return terms_of(
    settings,
    n=6,
    policy=SIX[:, None],
    reference=SIX_REFERENCE[:, None],
    advantage=advantage,
    length=np.full(6, length),
  )


def ours(settings, advantage, length=1.0):
  """RSPO's gradient in the six scores."""
  return np.asarray(
    weights_of(six_terms(settings, advantage, length), settings)[1]
  )[:, 0]


def theirs(loss):
  """Another objective's gradient in the same six scores."""
  return np.asarray(jax.grad(loss)(jnp.asarray(SIX, jnp.float32)))


def centred_rewards(group):
  rewards = SIX_REWARDS.reshape(-1, group)
  return (rewards - rewards.mean(1, keepdims=True)).reshape(-1)


def test_espo_with_one_update_and_k2_is_rspo_without_centring():
  beta, length = 0.03, 16.0
  advantage = centred_rewards(3) * 3 / 2  # leave-one-out mean
  lambda_ = length * beta
  settings = settings_of(lambda_=lambda_, centring="none", group_size=3)

  def espo(score):
    elbo, reference = length * score, length * SIX_REFERENCE
    ratio = jnp.exp((elbo - jax.lax.stop_gradient(elbo)) / length)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    gain = jnp.minimum(ratio * advantage, clipped * advantage)
    k2 = 0.5 * jnp.square(elbo - reference) / length
    return (-gain + beta * k2).mean()

  np.testing.assert_allclose(
    ours(settings, advantage, length), theirs(espo), rtol=1e-5
  )


def test_diffu_grpo_at_one_update_is_lambda_zero_with_the_full_mask():
  # Two completions of three tokens: six log-probs under the full mask.
  advantage = np.array([0.5, -0.5], np.float32)
  settings = settings_of(lambda_=0.0, group_size=2)
  full = likelihood.Masks(
    corrupt=jnp.ones((2, 1, 1, 3), bool),
    rows=jnp.tile(jnp.arange(3), (2, 1, 1)),
    weight=jnp.full((2, 1, 1, 3), 1 / 3),
  )

  def rspo(logprob):
    scores = likelihood.score(
      lambda params, *_: params.reshape(2, 3),
      logprob,
      jnp.zeros((2, 3), jnp.int32),
      jnp.ones((2, 3), bool),
      full,
      1,
    )
    terms = terms_of(settings, n=2, masks=1, advantage=advantage)
    return objectives.rspo(terms.replace(policy=scores), settings)[0].mean()

  def diffu_grpo(logprob):
    logprob = logprob.reshape(2, 3)
    ratio = jnp.exp(logprob - jax.lax.stop_gradient(logprob))
    each = advantage[:, None]
    gain = jnp.minimum(ratio * each, jnp.clip(ratio, 0.5, 1.5) * each)
    return -gain.sum() / 6

  np.testing.assert_allclose(theirs(rspo), theirs(diffu_grpo), rtol=1e-6)


def test_pairs_with_group_centring_are_the_regression_of_rebel_and_ipo():
  lambda_ = 0.7
  settings = settings_of(lambda_=lambda_, group_size=2)

  def rebel(score):
    d = (score - SIX_REFERENCE).reshape(3, 2)
    rewards = SIX_REWARDS.reshape(3, 2)
    residual = lambda_ * (d[:, 0] - d[:, 1]) - (rewards[:, 0] - rewards[:, 1])
    return jnp.square(residual).mean() / (8 * lambda_)

  np.testing.assert_allclose(
    ours(settings, centred_rewards(2)), theirs(rebel), rtol=1e-5
  )
  # IPO: all pairs have the same reward difference 1; its target is 1 / lambda.
  prefers = np.tile([0.5, -0.5], 3).astype(np.float32)

  def ipo(score):
    d = (score - SIX_REFERENCE).reshape(3, 2)
    return jnp.square(d[:, 0] - d[:, 1] - 1 / lambda_).mean() * lambda_ / 8

  np.testing.assert_allclose(ours(settings, prefers), theirs(ipo), rtol=1e-5)


def test_trafl_at_the_group_optimum_of_its_normaliser_is_a_multiple():
  lambda_ = 0.7
  settings = settings_of(lambda_=lambda_, group_size=3)
  advantage = centred_rewards(3)
  residual = SIX - SIX_REFERENCE - advantage / lambda_
  grid = np.linspace(-5, 5, 200001)  # brute force, no formula for z
  normaliser = np.array(
    [
      grid[np.argmin(sum((r + grid) ** 2 for r in group))]
      for group in residual.reshape(2, 3)
    ]
  )

  def trafl(score):
    a = score - SIX_REFERENCE
    z = np.repeat(normaliser, 3)
    return jnp.square(a - advantage / lambda_ + z).mean()

  np.testing.assert_allclose(
    2 / lambda_ * ours(settings, advantage), theirs(trafl), rtol=1e-3, atol=2e-4
  )


def test_bgpo_at_one_update_is_lambda_zero():
  advantage = centred_rewards(6)[[0, 1]]
  settings = settings_of(lambda_=0.0, group_size=2)
  terms = terms_of(
    settings, n=2, masks=3, policy=SIX.reshape(2, 3), advantage=advantage
  )
  _, gradient, _ = weights_of(terms, settings)
  assert advantage[0] > 0 > advantage[1]

  def bgpo(score):
    delta = (score - jax.lax.stop_gradient(score)).reshape(2, 3)
    tangent, jensen = 1 + delta.mean(1), jnp.exp(delta).mean(1)
    bound = jnp.where(advantage >= 0, tangent, jensen)
    return -(advantage * bound).mean()

  np.testing.assert_allclose(
    np.asarray(gradient).reshape(-1), theirs(bgpo), rtol=1e-5
  )


def test_supervised_training_is_rspo_with_advantage_one_and_no_lambda():
  plain = settings_of(lambda_=0.0, centring="none", subtract_reference=False)
  supervised = settings_of(name="sft")
  terms = terms_of(plain, advantage=np.ones(N), keep=DROPPED)
  a, b = weights_of(terms, plain), weights_of(terms, supervised)
  np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
  np.testing.assert_allclose(a[1], b[1], rtol=1e-6)
  scores = np.asarray(terms.policy, np.float64).mean(1)
  np.testing.assert_allclose(b[0], -scores[DROPPED == 1].mean(), rtol=1e-6)


def assembled(correct, settings, **options):
  """`rollout.assemble` of completions of one token with these verdicts."""
  n = correct.size
  verdicts = [base.Verdict(float(x), bool(x), {}, "") for x in correct.flat]
  return rollout.assemble(
    np.zeros((n, 2), np.int32),
    np.ones((n, 2), bool),
    np.ones((n, 1), bool),
    rollout.Judged([""] * n, verdicts),
    settings,
    normalize=False,
    scope="completion",
    shards=1,
    **options,
  )


@pytest.mark.parametrize(
  "options",
  [
    {"skip_equal_groups": False},
    {"skip_equal_groups": True},
    {"skip_equal_groups": True, "keep_groups": 1},
  ],
)
@pytest.mark.parametrize("wrong_groups", [0, 1, 3])
def test_rejection_sampling_is_the_plain_mean_over_right_completions(
  options, wrong_groups
):
  correct = [[1, 0, 0, 1], *[[0, 0, 0, 0]] * wrong_groups, [0, 1, 1, 1]]
  correct = np.array(correct, bool)
  settings = settings_of(name="rft", group_size=4)
  batch = assembled(correct, settings, **options)
  assert batch.advantage.dtype == np.float32
  right = correct.reshape(-1)[batch.row]
  if "keep_groups" in options:
    right &= batch.row < 4
  assert ((batch.advantage != 0) == right).all()
  keep = batch.keep > 0
  n = len(right)
  terms = terms_of(settings, n=n, advantage=batch.advantage, keep=keep)
  value, gradient, metrics = weights_of(terms, settings)
  scores = np.asarray(terms.policy, np.float64).mean(1)
  np.testing.assert_allclose(value, -scores[right].mean(), rtol=1e-6)
  wanted = np.where(right, -1 / right.sum() / MASKS, 0)[:, None]
  np.testing.assert_allclose(gradient, np.tile(wanted, MASKS), rtol=1e-6)
  relative = scores - np.asarray(terms.reference, np.float64).mean(1)
  np.testing.assert_allclose(
    metrics["score/relative_mean"], relative[keep].mean(), rtol=1e-4
  )


@pytest.mark.parametrize("skip", [False, True])
def test_rejection_sampling_of_nothing_right_moves_nothing(skip):
  settings = settings_of(name="rft", group_size=3)
  batch = assembled(np.zeros((2, 3), bool), settings, skip_equal_groups=skip)
  assert (batch.advantage == 0).all()
  assert (batch.keep == (not skip)).all()


# Advantages and targets, on the host.


def test_advantages_are_those_of_the_definition():
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(5, 6)).astype(np.float32)
  ours = objectives.group_advantages(rewards)
  assert ours.dtype == np.float32
  for row, group in zip(ours, rewards.astype(np.float64), strict=True):
    mean = sum(group) / 6
    std = (sum((r - mean) ** 2 for r in group) / 5) ** 0.5
    np.testing.assert_allclose(
      row, [(r - mean) / (std + 1e-4) for r in group], rtol=1e-6
    )
  plain = objectives.group_advantages(rewards, normalize=False)
  mean = rewards.astype(np.float64).mean(1, keepdims=True)
  np.testing.assert_allclose(plain, rewards - mean, rtol=1e-5, atol=1e-7)
  # By hand: 0, 0, 0, 1 has mean 1/4 and standard deviation 1/2 (ddof 1).
  one = objectives.group_advantages(np.array([[0.0, 0.0, 0.0, 1.0]]))
  np.testing.assert_allclose(one, [[-0.4999, -0.4999, -0.4999, 1.4997]], 1e-4)


def test_equal_rewards_have_advantage_zero_exactly():
  values, sizes = (0.1, 1 / 3, 0.7, 1e-8, 1e6), (2, 3, 7, 64)
  for kind in (np.float32, np.float64):
    for value, size in itertools.product(values, sizes):
      rewards = np.full((1, size), value, kind)
      assert (objectives.group_advantages(rewards) == 0).all()
      assert (objectives.group_advantages(rewards, False) == 0).all()
      assert objectives.equal_groups(rewards).all()
    # The trap: the mean of seven 0.1's is another number.
    sevens = np.full(7, 0.1, kind)
    assert (sevens - sevens.mean() != 0).any()
  # Nearly equal is not equal.
  rewards = np.full((1, 4), 0.5, np.float32)
  rewards[0, 0] = np.nextafter(np.float32(0.5), np.float32(1))
  assert not objectives.equal_groups(rewards).any()
  assert (objectives.group_advantages(rewards) != 0).all()


def test_groups_of_one_and_numbers_that_are_none_are_refused():
  for shape in ((4, 1), (4,), (0,)):
    with pytest.raises(ValueError, match=r"rollout\.group_size must be"):
      objectives.group_advantages(np.zeros(shape))
  for bad in (np.nan, np.inf, -np.inf):
    rewards = np.zeros((3, 4))
    rewards[1, 2] = bad
    with pytest.raises(ValueError, match=f"completion 2 of prompt 1 is {bad}"):
      objectives.group_advantages(rewards)


def test_targets_are_advantages_over_lambda():
  advantages = np.array([[-1.5, 0.0, 2.0]], np.float32)
  ours = objectives.targets(advantages, 0.01)
  assert ours.dtype == np.float32 and ours.shape == (1, 3)
  np.testing.assert_allclose(ours, [[-150, 0, 200]], rtol=1e-6)
  assert (objectives.targets(advantages, 0.0) == 0).all()


@pytest.mark.parametrize(
  "options, message",
  (
    ({"name": "dpo"}, r"objective\.name='dpo' is unknown.*rft, rspo, sapo"),
    ({"lambda_": -1.0}, r"lambda_=-1\.0 must be a finite number >= 0"),
    ({"lambda_": np.inf}, r"lambda_=inf must be a finite number >= 0"),
    ({"lambda_unit": "nat"}, r"lambda_unit='nat' must be one of"),
    ({"centring": "all"}, r"centring='all' must be one of"),
    ({"gap_masks": "own"}, r"gap_masks='own' must be one of"),
  ),
)
def test_settings_refuse_what_cannot_be(options, message):
  with pytest.raises(ValueError, match=message):
    settings_of(**options)


# Metrics.


@pytest.mark.parametrize("settings", VARIANTS[:-1], ids=NAMES[:-1])
def test_metrics_say_whether_the_gap_is_alive_and_calibrated(settings):
  terms = terms_of(settings, keep=DROPPED)
  _, _, metrics = weights_of(terms, settings)
  kept = DROPPED == 1
  relative = np.asarray(terms.policy - terms.reference, np.float64)[kept]
  advantage = np.asarray(terms.advantage, np.float64)[kept]
  _, gap = definition(terms, settings)
  d = relative.mean(1)
  scale = 1.0
  if settings.lambda_unit == "sequence":
    scale = np.asarray(terms.length)[kept]

  def centred(x):
    if settings.centring == "group":
      return x - np.repeat(x.reshape(-1, GROUP).mean(1), GROUP)
    return x - x.mean() if settings.centring == "batch" else x

  x = centred(scale * d)
  wanted = {
    "score/policy_mean": np.asarray(terms.policy)[kept].mean(),
    "score/relative_mean": d.mean(),
    "score/relative_std": d.std(),
    "score/centred_std": centred(d).std(),  # per token, whatever lambda's unit
    "score/mask_variance": relative.var(1, ddof=1).mean(),
    "gap/lambda": settings.lambda_,
    "gap/std": gap[kept].std(),
    "gap/lambda_share": settings.lambda_ * x.std() / advantage.std(),
    "calibration/slope": np.polyfit(advantage, x, 1)[0],
    "calibration/correlation": np.corrcoef(advantage, x)[0, 1],
  }
  assert metrics.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key
    )


def test_metrics_stay_finite_where_no_advantage_differs():
  settings = settings_of()
  terms = terms_of(settings, advantage=np.zeros(N))
  _, _, metrics = weights_of(terms, settings)
  assert all(np.isfinite(value) for value in metrics.values())
  assert metrics["gap/lambda_share"] == 0
  assert metrics["calibration/correlation"] == 0
