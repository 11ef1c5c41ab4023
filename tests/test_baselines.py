"""The other objectives: values and gradients of their equations, by loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax import baselines, objectives
from rspo_jax.objectives import ObjectiveSettings, Sizes, Terms

PROMPTS, GROUP, MASKS, LENGTH = 2, 3, 2, 4
N = PROMPTS * GROUP
OTHERS = sorted(set(objectives.OBJECTIVES) - {"rspo", "rft", "sft"})


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
  """Most of the time of these tests would go into optimising programs."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def settings_of(name, **options):
  default = dict(group_size=GROUP, clip=0.2, kl_weight=0.3, beta=0.7)
  return ObjectiveSettings(name=name, **(default | options))


def weights_of_masks(name, rng):
  """f64 weights [N, U, C, L] as the schemes of an objective give them."""
  if name in ("tracerl", "justgrpo"):
    canvas = rng.integers(0, MASKS, (N, LENGTH))
    canvas[:, 0] = 0  # the second canvas of a sequence may be idle
    own = canvas[:, None] == np.arange(MASKS)[:, None]
    own[0, :, -1] = False  # a token that is not scored
    return own[:, None] * MASKS / LENGTH
  hidden = rng.random((N, MASKS, 1, LENGTH)) < 0.6
  hidden[..., 0] = True
  hidden[1, :, :, -1] = False  # no mask of sequence 1 hides its last token
  return hidden / hidden.sum(-1, keepdims=True)


def terms_of(name, seed=0, keep=None, old=True, **given):
  """Random terms of an objective, float64 numpy."""
  rng = np.random.default_rng(seed)
  weight = weights_of_masks(name, rng)
  per_token = objectives.OBJECTIVES[name].per_token
  shape = (N, *weight.shape[1:2], LENGTH) if per_token else (N, MASKS)
  policy = rng.normal(-1.5, 0.4, shape)
  keep = np.ones(N) if keep is None else np.asarray(keep, float)
  counts = (weight > 0).sum(-1).reshape(N, -1)
  length = rng.integers(2, LENGTH + 1, N).astype(float)
  mean = lambda x: (x * keep).sum() / keep.sum()  # noqa: E731
  values = dict(
    policy=policy,
    reference=policy + rng.normal(0, 0.3, shape),
    old=policy + rng.normal(0, 0.3, shape) if old else None,
    advantage=rng.normal(0, 1, N),
    target=np.zeros(N),
    length=length,
    keep=keep,
    count=counts.astype(float),
    weight=weight if per_token else None,
    sizes=Sizes(
      length=mean(length),
      rows=mean((weight > 0).any(2).sum((1, 2))),
      canvases=mean((counts > 0).sum(1)),
    ),
  )
  return Terms(**(values | given))


@functools.partial(jax.jit, static_argnums=1)
def _value_and_gradient(terms, settings):
  def mean_loss(policy):
    loss, metrics = objectives.OBJECTIVES[settings.name].loss(
      terms.replace(policy=policy), settings
    )
    return (loss * terms.keep).sum() / terms.keep.sum(), metrics

  (value, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
    terms.policy
  )
  return value, gradient, metrics


def value_and_gradient(terms, settings):
  """(objective, gradient in the policy's values, metrics)."""
  f32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), terms)
  return _value_and_gradient(f32, settings)


# The equations of baselines.md, one sequence and token after another.


def surrogate(ratio, advantage, clip):
  kept = min(max(ratio, 1 - clip), 1 + clip)
  return min(ratio * advantage, kept * advantage)


def gap_kl(log_ratio):
  return math.exp(log_ratio) - 1 - log_ratio


def diffu_grpo(t, policy, s):
  total, tokens = 0.0, 0
  for i, u, j in np.argwhere((t.weight > 0).any(2)):
    if not t.keep[i]:
      continue
    lp, old, ref = policy[i, u, j], t.old[i, u, j], t.reference[i, u, j]
    total -= surrogate(math.exp(lp - old), t.advantage[i], s.clip)
    total += s.kl_weight * gap_kl(ref - lp)
    tokens += 1
  return total / tokens


sapo = diffu_grpo  # but for the advantages


def wd1(t, policy, s):
  del s
  kept = [i for i in range(N) if t.keep[i]]
  return np.mean(
    [-t.advantage[i] * t.length[i] * policy[i].mean() for i in kept]
  )


def espo(t, policy, s):
  total, kept = 0.0, [i for i in range(N) if t.keep[i]]
  for i in kept:
    n = t.length[i]
    elbo, old = n * policy[i].mean(), n * t.old[i].mean()
    ref = n * t.reference[i].mean()
    total -= surrogate(math.exp((elbo - old) / n), t.advantage[i], s.clip)
    total += s.kl_weight / n * 0.5 * (elbo - ref) ** 2
  return total / len(kept)


def gdpo(t, policy, s):
  total, kept = 0.0, [i for i in range(N) if t.keep[i]]
  for i in kept:
    n = t.length[i]
    change = n * (policy[i].mean() - t.old[i].mean())
    away = n * (t.reference[i].mean() - policy[i].mean())
    if s.ratio_norm == "length":
      total -= surrogate(math.exp(change / n), t.advantage[i], s.clip)
      total += s.kl_weight * gap_kl(away / n)
    else:
      total -= surrogate(math.exp(change), t.advantage[i], s.clip) / n
      total += s.kl_weight * gap_kl(away)
  return total / len(kept)


def vrpo(t, policy, s):
  losses = []
  for g in range(PROMPTS):
    own = [i for i in range(g * GROUP, (g + 1) * GROUP) if t.keep[i]]
    if not own:
      continue
    pairs = [
      (w, x) for w in own for x in own if t.advantage[w] > t.advantage[x]
    ]
    if s.pairs == "extremes" and pairs:
      rank = sorted(own, key=lambda i: t.advantage[i])
      pairs = [(rank[-1], rank[0])]
    total = 0.0
    d = {i: t.length[i] * (policy[i] - t.reference[i]).mean() for i in own}
    for winner, loser in pairs:
      total += math.log1p(math.exp(-s.beta * (d[winner] - d[loser])))
      total -= s.sft_weight * policy[winner].mean()
    losses.append(total / max(len(pairs), 1))
  return np.mean(losses)


def spg(t, policy, s):
  total, tokens = 0.0, 0.0
  for i in range(N):
    if not t.keep[i]:
      continue
    inside, n = t.weight[i, :, 0] > 0, t.length[i]
    score = np.mean([policy[i, k][inside[k]].mean() for k in range(MASKS)])
    if t.advantage[i] <= 0:
      logs = []
      for j in range(LENGTH):
        e = 0.0
        for k in range(MASKS):
          if inside[k, j]:
            share = inside[k].sum() / n
            e += math.exp(policy[i, k, j]) ** s.bound_power / share / MASKS
        if e > 0:
          logs.append(math.log(e) / s.bound_power)
      upper, w = np.mean(logs), s.bound_mix
      score = {
        "mix": w * upper + (1 - w) * score,
        "eubo": upper,
        "elbo": score,
        "none": 0.0,
      }[s.negative_score]
    total -= n * t.advantage[i] * score
    tokens += n
  return total / tokens


def tracerl(t, policy, s):
  total, rows = 0.0, 0
  for i, v in np.argwhere((t.weight[:, 0] > 0).any(-1)):
    if not t.keep[i]:
      continue
    inside = np.flatnonzero(t.weight[i, 0, v])
    delta = policy[i, 0, inside] - t.old[i, 0, inside]
    gains = [surrogate(math.exp(x), t.advantage[i], s.clip) for x in delta]
    kl = [math.exp(-x) - 1 + x for x in delta]
    reduce = np.mean if s.kl_reduction == "mean" else np.sum
    total += -np.mean(gains) + s.kl_weight * reduce(kl)
    rows += 1
  return total / rows


def justgrpo(t, policy, s):
  total, kept = 0.0, [i for i in range(N) if t.keep[i]]
  for i in kept:
    for j in np.flatnonzero(t.weight[i, 0].any(0)):
      ratio = math.exp(policy[i, 0, j] - t.old[i, 0, j])
      total -= surrogate(ratio, t.advantage[i], s.clip) / LENGTH
  return total / len(kept)


def trafl(t, policy, s):
  total, kept = 0.0, [i for i in range(N) if t.keep[i]]
  for g in range(PROMPTS):
    own = [i for i in kept if i // GROUP == g]
    if not own:
      continue
    error = [
      (policy[i] - t.reference[i]).mean()
      - s.beta / t.count[i].mean() * t.advantage[i]
      for i in own
    ]
    total += sum((e - np.mean(error)) ** 2 for e in error)
  return total / len(kept)


VARIANTS = [
  *((name, {}) for name in OTHERS),
  ("espo", {"clip": 0.0}),
  ("gdpo", {"ratio_norm": "length"}),
  ("vrpo", {"pairs": "extremes", "sft_weight": 0.4}),
  ("spg", {"negative_score": "eubo", "bound_power": 2.0}),
  ("spg", {"negative_score": "elbo"}),
  ("spg", {"negative_score": "none"}),
  ("tracerl", {"kl_reduction": "sum"}),
]
DROPPED = np.repeat([1, 0], GROUP)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_value_and_gradient_are_those_of_the_equation(name, options):
  settings = settings_of(name, **options)
  for keep in (None, DROPPED):
    terms = terms_of(name, keep=keep)
    value, gradient, _ = value_and_gradient(terms, settings)
    equation = functools.partial(globals()[name], terms, s=settings)
    np.testing.assert_allclose(
      value, equation(policy=terms.policy), rtol=2e-5, atol=1e-6
    )
    step = 1e-6
    for index in np.ndindex(terms.policy.shape):
      shift = np.zeros_like(terms.policy)
      shift[index] = step
      slope = equation(policy=terms.policy + shift)
      slope -= equation(policy=terms.policy - shift)
      np.testing.assert_allclose(
        gradient[index], slope / (2 * step), rtol=1e-4, atol=2e-6
      )


@pytest.mark.parametrize("name", OTHERS)
def test_the_order_within_a_group_and_what_is_dropped_do_not_matter(name):
  settings = settings_of(name)
  terms = terms_of(name)
  value, gradient, _ = value_and_gradient(terms, settings)
  order = np.array([2, 0, 1, 4, 5, 3])
  moved = jax.tree.map(lambda x: x[order] if np.ndim(x) else x, terms)
  other, other_gradient, _ = value_and_gradient(moved, settings)
  np.testing.assert_allclose(value, other, rtol=1e-5)
  np.testing.assert_allclose(gradient[order], other_gradient, rtol=1e-4)
  dropped = terms_of(name, keep=DROPPED)
  odd = dropped.replace(
    policy=np.where(DROPPED.reshape(-1, *(1,) * (dropped.policy.ndim - 1)), dropped.policy, -3.0),
    advantage=np.where(DROPPED, dropped.advantage, 5.0),
  )  # fmt: skip
  first, second = (value_and_gradient(t, settings) for t in (dropped, odd))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert (np.asarray(first[1])[DROPPED == 0] == 0).all()


@pytest.mark.parametrize("name", OTHERS)
def test_equal_rewards_at_the_start_move_nothing(name):
  # At theta = theta_ref = theta_old only a reward can move the policy.
  rewards = np.tile(np.float32([[0.1], [1.0]]), GROUP)
  entry = objectives.OBJECTIVES[name]
  for normalize in (True, False):
    advantage = entry.advantages(rewards, rewards > 0.5, normalize)
    assert (advantage == 0).all()
  terms = terms_of(name, old=False, advantage=advantage.reshape(-1))
  terms = terms.replace(reference=terms.policy)
  _, gradient, metrics = value_and_gradient(terms, settings_of(name))
  np.testing.assert_allclose(gradient, 0, atol=1e-7)
  assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("name", OTHERS)
def test_without_old_terms_the_ratio_is_one(name):
  entry = objectives.OBJECTIVES[name]
  if not entry.ratio:
    pytest.skip("has no ratio")
  terms = terms_of(name, old=False)
  value, gradient, metrics = value_and_gradient(terms, settings_of(name))
  assert float(metrics["ratio/mean"]) == pytest.approx(1, abs=1e-6)
  given = value_and_gradient(terms.replace(old=terms.policy), settings_of(name))
  np.testing.assert_allclose(value, given[0], rtol=1e-6)
  np.testing.assert_allclose(gradient, given[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("clip", [0.0, 1e-9, 0.2])
@pytest.mark.parametrize("name", OTHERS)
def test_at_ratio_one_the_gradient_is_unclipped_whatever_the_width(name, clip):
  if not objectives.OBJECTIVES[name].ratio:
    pytest.skip("has no ratio")
  terms = terms_of(name, old=False)
  narrow = value_and_gradient(terms, settings_of(name, clip=clip))
  wide = value_and_gradient(terms, settings_of(name, clip=1e3))
  np.testing.assert_allclose(narrow[0], wide[0], rtol=1e-6)
  np.testing.assert_allclose(narrow[1], wide[1], rtol=1e-5, atol=1e-8)


# Advantages, by their definitions.


def test_advantages_of_the_others_are_those_of_their_definitions():
  rewards = np.random.default_rng(0).random((3, 4)).astype(np.float32)
  for b in range(3):
    r = rewards[b].astype(float)
    others = [r[i] - np.delete(r, i).mean() for i in range(4)]
    found = objectives.others_advantages(rewards, False)[b]
    np.testing.assert_allclose(found, others, rtol=1e-5)
    scores = (r - r.mean()) / r.std()
    found = objectives.population_advantages(rewards)[b]
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    up, down = np.exp(r - r.mean()), np.exp(r.mean() - r)
    weights = up / up.sum() - down / down.sum()
    found = objectives.softmax_advantages(rewards, False)[b]
    np.testing.assert_allclose(found, 4 * weights, rtol=1e-4)


def test_sapo_adds_what_partial_canvases_earn_to_positive_advantages():
  rewards = np.float32([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
  advantages = rewards - rewards.mean(1, keepdims=True)
  finished = np.float32([[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]]])
  found = objectives.process_advantages(advantages, rewards, finished)
  # The second completion alone is better than its group; it earns 1/2 - 1/2.
  np.testing.assert_allclose(found, [[-0.5, 0.5, 0.0], [0.0] * 3], atol=1e-6)
  finished[:, 0, 1] = 1
  found = objectives.process_advantages(advantages, rewards, finished)
  np.testing.assert_allclose(found[0], [-0.5, 1.0, 0.0], atol=1e-6)


REFUSED = [
  ({"objective.name": "spg"}, "likelihood.scheme='complementary' cannot serve"),
  ({"objective.name": "diffu_grpo"}, "use 'mean_field'"),
  ({"objective.name": "vrpo", "objective.skip_equal_groups": False}, "pair"),
  (
    {"objective.name": "tracerl", "likelihood.scheme": "trace"},
    r"likelihood\.masks=4 must be 8, or 0",
  ),
  ({"objective.lambda_share": 0.5, "objective.lambda_": 0.0}, "lambda_=1"),
  (
    {"objective.name": "wd1", "objective.reference_every": 5},
    "does not use; use 0",
  ),
  (
    {"rollout.keep_groups": 4, "objective.skip_equal_groups": False},
    "chooses among groups",
  ),
  (
    {
      "objective.name": "sapo",
      "likelihood.scheme": "mean_field",
      "sampler.cache": "dual",
    },
    "fixed schedule",
  ),
  (
    {"objective.name": "rft", "objective.solved_advantage": 1.0},
    "belongs to objective.name='rspo'; use 0",
  ),
  ({"objective.solved_advantage": -1.0}, "solved_advantage"),
  ({"rollout.stale_steps": 2}, r"stale_steps=2 must lie in \[0, 1\]"),
  (
    {"rollout.stale_steps": 1, "objective.lambda_": 0.0},
    r"stale_steps=1 .*lambda_=0 is a gradient .*lambda_ > 0\. Otherwise",
  ),
  (
    {"rollout.stale_steps": 1, "objective.centring": "batch"},
    "centring='batch' leaves .* use objective.centring='group'",
  ),
  (
    {
      "rollout.stale_steps": 1,
      "objective.name": "spg",
      "likelihood.scheme": "uniform",
    },
    "'spg' is a gradient .*'diffu_grpo', 'espo'.*use rollout.stale_steps=0",
  ),
  (
    {
      "rollout.stale_steps": 1,
      "objective.name": "sapo",
      "likelihood.scheme": "mean_field",
    },
    "'sapo' finishes their canvases .* choose 'diffu_grpo'",
  ),
  (
    {
      "rollout.stale_steps": 1,
      "objective.name": "sft",
      "rollout.group_size": 1,
      "train.micro_batch": 16,
    },
    "'sft' has no rollouts. Otherwise use rollout.stale_steps=0",
  ),
  ({"objective.clip": -0.1}, r"objective\.clip=-0\.1"),
  ({"objective.beta": 0.0}, r"objective\.beta=0\.0"),
  ({"objective.pairs": "some"}, r"objective\.pairs='some'"),
  ({"rollout.group_size": 1}, "nothing to compare"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_an_objective_cannot_use_is_refused(changes, message):
  from configs import countdown
  from rspo_jax import settings

  config = countdown.get_config()
  for key, value in changes.items():
    group, _, field = key.partition(".")
    config[group][field] = value
  with pytest.raises(ValueError, match=message):
    settings.build(config, 1)


@pytest.mark.parametrize(
  "name", ["rspo", "rft", *(n for n in OTHERS if n not in ("spg", "sapo"))]
)
def test_older_completions_serve_what_corrects_or_does_not_mind_them(name):
  from configs import countdown
  from rspo_jax import settings

  config = countdown.get_config("" if name == "rspo" else name)
  config.rollout.stale_steps = 1
  assert settings.build(config, 1).rollout.stale_steps == 1


def test_lambda_follows_its_share_by_a_tenth_a_step_and_stays_in_range():
  settings = settings_of("rspo", lambda_=2.0, lambda_share=0.5)
  follow = lambda x, share: objectives.follow_share(x, share, settings)  # noqa: E731
  assert follow(2.0, 0.5) == pytest.approx(2.0)
  assert follow(2.0, 0.0) == pytest.approx(2.0 * math.exp(0.1))
  assert follow(2.0, 50.0) == pytest.approx(2.0 * math.exp(-0.1))
  near = follow(2.0, 0.45)
  assert near == pytest.approx(2.0 * (0.5 / 0.45) ** 0.1)
  assert follow(2e4, 0.0) == pytest.approx(2e4)


# Relatives.


def test_gdpo_by_length_is_espo_without_a_pull():
  terms = terms_of("espo")
  one = value_and_gradient(terms, settings_of("espo", kl_weight=0.0))
  other = value_and_gradient(
    terms, settings_of("gdpo", kl_weight=0.0, ratio_norm="length")
  )
  np.testing.assert_allclose(one[1], other[1], rtol=1e-6)


def test_trafl_is_a_multiple_of_rspo_centred_by_group():
  lambda_, terms = 2.0, terms_of("trafl")
  advantage = terms.advantage.reshape(PROMPTS, GROUP)
  advantage = (advantage - advantage.mean(1, keepdims=True)).reshape(-1)
  terms = terms.replace(
    advantage=advantage,
    target=advantage / lambda_,
    count=np.full((N, MASKS), 3.0),
  )
  rspo = settings_of("rspo", lambda_=lambda_, lambda_unit="token")
  trafl = settings_of("trafl", beta=3.0 / lambda_)
  np.testing.assert_allclose(
    value_and_gradient(terms, trafl)[1],
    2 / lambda_ * value_and_gradient(terms, rspo)[1],
    rtol=1e-4,
    atol=1e-6,
  )


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_espo_on_policy_is_rspo_without_centring_at_lambda_length_beta(clip):
  beta, length = 0.3, 4.0
  terms = terms_of("espo", old=False, length=np.full(N, length))
  terms = terms.replace(target=terms.advantage / (length * beta))
  rspo = settings_of(
    "rspo", lambda_=length * beta, lambda_unit="token", centring="none"
  )
  espo = settings_of("espo", kl_weight=beta, clip=clip)
  np.testing.assert_allclose(
    value_and_gradient(terms, espo)[1],
    value_and_gradient(terms, rspo)[1],
    rtol=1e-4,
    atol=1e-6,
  )


def test_pairs_of_equal_advantage_do_not_exist():
  advantage = jnp.asarray([1.0, 1.0, -1.0, 0.0, 0.0, 0.0])
  for kind, count in (("all", 2), ("extremes", 1)):
    pairs = baselines.group_pairs(
      advantage, jnp.ones(N), settings_of("vrpo", pairs=kind)
    )
    assert pairs.sum((1, 2)).tolist() == [count, 0]


def test_pairs_are_of_a_better_and_a_worse_reward_also_among_wrong_ones():
  graded = np.float32([[1.0, 0.4, 0.1], [0.2, 0.0, 0.2]])  # one is right
  for rewards in (graded, np.float32(graded == 1)):
    correct = graded == 1
    advantage = objectives.OBJECTIVES["vrpo"].advantages(
      rewards, correct, False
    )
    settings = settings_of("vrpo", pairs="all")
    keep = jnp.ones(N)
    pairs = baselines.group_pairs(jnp.asarray(advantage), keep, settings)
    better = rewards[:, :, None] > rewards[:, None, :]
    np.testing.assert_array_equal(pairs, better)
    settings = settings_of("vrpo", pairs="extremes")
    extremes = baselines.group_pairs(jnp.asarray(advantage), keep, settings)
    for group, own in zip(rewards, extremes, strict=True):
      wanted = [[group.argmax(), group.argmin()]] if np.ptp(group) else []
      assert np.argwhere(own).tolist() == wanted
  # Rewards of 1 and 0, the last of the two: right against wrong.
  right_wrong = correct[:, :, None] & ~correct[:, None, :]
  np.testing.assert_array_equal(pairs, right_wrong)


# Adding one.


def test_an_objective_is_added_by_a_function_and_an_entry(monkeypatch):
  import test_train_step as small

  from configs import countdown
  from rspo_jax import settings, train_step

  def cubic(terms, settings):
    del settings
    s = terms.policy.mean(-1)
    return -terms.advantage * s**3, {"score/policy_mean": s.mean()}

  monkeypatch.setitem(
    objectives.OBJECTIVES,
    "cubic",
    objectives.Objective(
      cubic,
      lambda rewards, correct, norm: objectives.group_advantages(rewards, norm),
      reference="never",
    ),
  )
  config = countdown.get_config()
  config.objective.name = "cubic"
  assert settings.build(config, 1).objective.name == "cubic"
  batch = small.batch_of()
  one = small.gradient_of(small.objective_of(name="cubic"), batch, 2, "one")
  two = small.gradient_of(small.objective_of(name="cubic"), batch, 4, "two")
  small.assert_close(one[0], two[0])
  assert train_step.resolve_passes(
    train_step.StepSettings(2), small.objective_of(name="cubic"), small.N
  ) == "one"  # fmt: skip
