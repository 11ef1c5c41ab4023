"""The step: one gradient however it is cut, and a state that only it changes."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rspo_jax import likelihood, objectives, sharding, train_step
from rspo_jax.models import transformer
from rspo_jax.models.families import ModelConfig

PROMPTS, GROUP, PROMPT, LENGTH = 4, 4, 3, 5
N, SPAN = PROMPTS * GROUP, PROMPT + LENGTH
VOCABULARY, MASK_ID = 12, 11
MASKS = likelihood.LikelihoodSettings("complementary", 4)
CONFIG = ModelConfig(
  family="llada",
  vocab_size=VOCABULARY,
  width=16,
  layers=2,
  heads=4,
  kv_heads=4,
  mlp_width=24,
  rope_theta=1e4,
  norm_eps=1e-5,
  mask_id=MASK_ID,
  eos_id=10,
  pad_id=9,
  max_length=16,
)


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
  """Most of the time of these tests would go into optimising programs."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def tiny_logprob(params, tokens, token_mask, target, rows):
  """A model of two matrices: each row sees itself and the canvas's mean."""
  n, canvases, span = tokens.shape
  h = params["embed"]["embedding"][tokens]  # [n, C, S, D]
  seen = token_mask[:, None, :, None]
  mean = (h * seen).sum(2, keepdims=True) / jnp.maximum(seen.sum(2), 1)[:, None]
  h = jnp.tanh(h + mean + params["norm"]["scale"])
  h = jnp.take_along_axis(
    h.reshape(n, canvases * span, -1), rows[:, :, None], axis=1
  )
  logprob = jax.nn.log_softmax(h @ params["head"]["kernel"])
  return jnp.take_along_axis(logprob, target[:, :, None], axis=2)[:, :, 0]


def tiny_params(seed=0):
  """Random parameters of `tiny_logprob`."""
  a, b, c = jax.random.split(jax.random.key(seed), 3)
  return {
    "embed": {"embedding": jax.random.normal(a, (VOCABULARY, 6))},
    "norm": {"scale": jax.random.normal(b, (2, 3)).reshape(6)},
    "head": {"kernel": jax.random.normal(c, (6, VOCABULARY))},
  }


def transformer_params():
  """Parameters of CONFIG, larger than fresh ones; nothing is compiled."""
  shapes = jax.eval_shape(lambda: transformer.init(CONFIG, jax.random.key(0)))
  rng = np.random.default_rng(3)

  def one(path, leaf):
    values = rng.standard_normal(leaf.shape) * 0.2
    if path[-1].key == "scale":
      values += 1
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


def batch_of(seed=0, keep=None, normalize=True):
  """A random batch; lengths 1 .. L, left-padded prompts."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 11, (N, SPAN))
  lengths = rng.integers(1, LENGTH + 1, N)
  scored = np.arange(LENGTH) < lengths[:, None]
  prompt = np.arange(PROMPT) >= rng.integers(0, PROMPT, N)[:, None]
  rewards = rng.random((PROMPTS, GROUP))
  advantage = objectives.group_advantages(rewards, normalize).reshape(-1)
  keep = np.ones(N) if keep is None else np.asarray(keep)
  return train_step.RolloutBatch(
    tokens=jnp.asarray(tokens, jnp.int32),
    token_mask=jnp.asarray(np.concatenate([prompt, scored], 1)),
    completion_mask=jnp.asarray(scored),
    advantage=jnp.asarray(advantage),
    target=jnp.asarray(advantage / 2.0),
    keep=jnp.asarray(keep, jnp.float32),
  )


def objective_of(**options):
  """RSPO with lambda 2 nats per token unless said otherwise."""
  default = dict(lambda_=2.0, lambda_unit="token", group_size=GROUP)
  return objectives.ObjectiveSettings(
    **(default | dict(draw_size=MASKS.draw_size) | options)
  )


# Compiles in a fraction of the default generator's time.
KEY = jax.random.key(7, impl="unsafe_rbg")


@functools.cache
def estimate_of(micro_batch=N):
  """Jitted estimate of the tiny model."""
  settings = train_step.StepSettings(micro_batch)
  return jax.jit(
    train_step.make_estimate(tiny_logprob, MASK_ID, settings, MASKS)
  )


@functools.cache
def update_of(objective, micro_batch=N, passes="auto", shards=1):
  """Jitted update; plain descent of rate 1, so that params move by -grad."""
  settings = train_step.StepSettings(micro_batch, passes, shards)
  optimizer = optax.sgd(1.0)
  update = train_step.make_update(
    tiny_logprob,
    MASK_ID,
    optimizer,
    optax.constant_schedule(1.0),
    settings,
    MASKS,
    objective,
  )
  return jax.jit(update), optimizer


def gradient_of(objective, batch, micro_batch=N, passes="auto", shards=1):
  """(gradient, metrics) of one update from other parameters than those of
  the reference."""
  update, optimizer = update_of(objective, micro_batch, passes, shards)
  params, estimate = tiny_params(), estimate_of()
  reference = estimate(tiny_params(1), batch, KEY)
  policy = estimate(params, batch, KEY)
  state = train_step.init_state(params, optimizer)
  after, metrics = update(state, batch, KEY, reference, policy)
  return jax.tree.map(lambda a, b: a - b, params, after.params), metrics


@jax.jit
def scores_and_gradients(params, reference, batch):
  """Scores [N, K] under both parameters; gradients [N, ...] of the mean over
  K under the first, sequence by sequence."""
  masks = likelihood.draw_masks(KEY, MASKS, batch.completion_mask, PROMPT)

  def score(params):
    return likelihood.score(
      tiny_logprob, params, batch.tokens, batch.token_mask, masks, MASK_ID
    )

  each = jax.jacrev(lambda params: score(params).mean(1))(params)
  return score(params), score(reference), each


def brute_force(objective, batch):
  """The gradient by definition: sum of gap times the gradient of the score.

  Gaps in float64 numpy; gradients of the N scores one by one.
  """
  policy, reference, each = jax.tree.map(
    lambda x: np.asarray(x, np.float64),
    scores_and_gradients(tiny_params(), tiny_params(1), batch),
  )
  keep = np.asarray(batch.keep) > 0
  d = policy.mean(1) - reference.mean(1)
  centre = np.zeros(N)
  if objective.centring == "batch":
    centre[:] = d[keep].mean()
  if objective.centring == "group":
    for g in range(PROMPTS):
      own = slice(g * GROUP, (g + 1) * GROUP)
      if keep[own].any():
        centre[own] = d[own][keep[own]].mean()
  gap = np.asarray(batch.advantage, np.float64)
  gap = gap - objective.lambda_ * (d - centre)
  weight = -np.where(keep, gap, 0.0) / keep.sum()
  return jax.tree.map(lambda g: np.tensordot(weight, g, 1), each)


def assert_close(a, b, tolerance=1e-6):
  """Trees agree within a share of the norm of the first."""
  squares = lambda tree: sum(  # noqa: E731
    np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)
  )
  difference = jax.tree.map(
    lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b
  )
  assert squares(difference) ** 0.5 <= tolerance * squares(a) ** 0.5


@pytest.mark.parametrize("centring", objectives.CENTRINGS)
def test_every_way_to_cut_a_batch_gives_the_gradient_of_the_definition(
  centring,
):
  objective, batch = objective_of(centring=centring), batch_of(normalize=False)
  wanted = brute_force(objective, batch)
  whole, metrics = gradient_of(objective, batch, N, "one")
  assert_close(wanted, whole, 3e-6)
  ways = {
    "group": [(GROUP, "one"), (2, "two")],
    "batch": [(2, "two")],
    "none": [(2, "one")],
  }[centring]
  for micro_batch, passes in ways:
    gradient, other = gradient_of(objective, batch, micro_batch, passes)
    assert_close(whole, gradient)
    for key in metrics:
      np.testing.assert_allclose(
        metrics[key], other[key], rtol=1e-5, atol=1e-6, err_msg=key
      )


def test_options_of_the_gap_survive_the_cut():
  objective = objective_of(gap_masks="leave_one_out", lambda_unit="sequence")
  batch = batch_of()
  whole, _ = gradient_of(objective, batch, GROUP, "one")
  assert_close(whole, gradient_of(objective, batch, 2, "two")[0])


def test_masks_of_a_sequence_may_come_one_draw_after_another():
  # One of every kind of value: scores, and log-probs of rows; dropped groups
  # end the loop early.
  for name, shards in (("rspo", 1), ("rspo", 2), ("spg", 1)):
    keep = np.repeat([1, 1, 1, 0] if shards == 1 else [1, 0, 1, 0], GROUP)
    batch = batch_of(keep=keep)
    objective = objective_of(name=name)
    masks = dataclasses.replace(
      MASKS, scheme="uniform" if name == "spg" else MASKS.scheme
    )
    per_token = objectives.OBJECTIVES[name].per_token
    found = []
    for step in (
      train_step.StepSettings(N),
      train_step.StepSettings(4, "two", shards, micro_masks=2),
    ):
      estimate = jax.jit(
        train_step.make_estimate(tiny_logprob, MASK_ID, step, masks, per_token)
      )
      update = train_step.make_update(
        tiny_logprob,
        MASK_ID,
        optax.sgd(1.0),
        optax.constant_schedule(1.0),
        step,
        masks,
        objective,
      )
      state = train_step.init_state(tiny_params(), optax.sgd(1.0))
      reference = estimate(tiny_params(1), batch, KEY)
      policy = estimate(tiny_params(), batch, KEY)
      after, metrics = jax.jit(update)(state, batch, KEY, reference, policy)
      found.append((after.params, metrics, reference, policy))
    (wanted, metrics, *scores), (params, other, *parts) = found
    moved = lambda tree: jax.tree.map(jnp.subtract, tree, tiny_params())  # noqa: E731
    assert_close(moved(wanted), moved(params))
    for whole, cut in zip(scores, parts, strict=True):
      # What is not kept may be left out of a cut estimate.
      rows = keep > 0
      np.testing.assert_allclose(whole[rows], cut[rows], rtol=1e-5, atol=1e-6)
    for key in metrics:
      np.testing.assert_allclose(
        metrics[key], other[key], rtol=1e-5, atol=1e-6, err_msg=key
      )


def test_one_pass_wants_all_masks_of_a_sequence_together():
  step = train_step.StepSettings(GROUP, micro_masks=2)
  assert train_step.resolve_passes(step, objective_of(), N) == "two"
  with pytest.raises(ValueError, match=r"train\.micro_masks=2.*'two'"):
    train_step.resolve_passes(
      dataclasses.replace(step, passes="one"), objective_of(), N
    )


def test_rejection_sampling_follows_the_rewarded_scores():
  # As advantage-weighted ELBO does: lambda 0, no centring.
  batch = batch_of()
  wanted = brute_force(objective_of(lambda_=0.0, centring="none"), batch)
  objective = objective_of(name="rft")
  assert_close(wanted, gradient_of(objective, batch, 2, "two")[0], 3e-6)


@pytest.mark.parametrize(
  ("name", "scheme", "masks"),
  [
    ("diffu_grpo", "mean_field", 2),
    ("spg", "uniform", 2),
    ("tracerl", "trace", 3),
  ],
)
def test_objectives_per_token_survive_the_cut(name, scheme, masks):
  # Batch means of tokens and canvases are those of the whole batch; the
  # values of two passes are log-probs of rows.
  when = np.random.default_rng(0).integers(0, 3, (N, LENGTH))
  keep = np.repeat([1, 1, 1, 0], GROUP)
  batch = batch_of(keep=keep).replace(commit_step=jnp.asarray(when))
  objective = objective_of(name=name, kl_weight=0.3, clip=0.1)
  chosen = likelihood.LikelihoodSettings(scheme, masks)
  one = objectives.OBJECTIVES[name]
  values = jax.jit(
    train_step.make_estimate(
      tiny_logprob, MASK_ID, train_step.StepSettings(N), chosen, one.per_token
    )
  )
  params, other = tiny_params(), tiny_params(1)
  policy, old = values(params, batch, KEY), values(other, batch, KEY)
  gradients = []
  for size, passes in ((N, "one"), (2, "one"), (2, "two")):
    step = train_step.StepSettings(size, passes, updates_per_rollout=2)
    optimizer = optax.sgd(1.0)
    update = train_step.make_update(
      tiny_logprob, MASK_ID, optimizer, optax.constant_schedule(1.0), step,
      chosen, objective,
    )  # fmt: skip
    state = train_step.init_state(params, optimizer)
    after, _ = jax.jit(update)(state, batch, KEY, old, policy, old)
    gradients.append(jax.tree.map(lambda a, b: a - b, params, after.params))
  assert_close(gradients[0], gradients[1], 3e-6)
  assert_close(gradients[0], gradients[2], 3e-6)


def test_old_terms_are_needed_where_a_rollout_serves_several_updates():
  objective = objective_of(name="espo")
  update = train_step.make_update(
    tiny_logprob,
    MASK_ID,
    optax.sgd(1.0),
    optax.constant_schedule(1.0),
    train_step.StepSettings(N, updates_per_rollout=4),
    MASKS,
    objective,
  )
  state = train_step.init_state(tiny_params(), optax.sgd(1.0))
  with pytest.raises(ValueError, match=r"old=None: .*'espo' weighs by a ratio"):
    update(state, batch_of(), KEY, None)


def test_dropped_groups_leave_the_gradient_of_the_others():
  # Kept ones come first in both shards; one micro-batch of four is idle.
  keep = np.repeat([1, 0, 1, 0], GROUP)
  objective = objective_of()
  batch = batch_of(keep=keep)
  wanted = brute_force(objective, batch)
  for micro_batch, passes, shards in (
    (GROUP, "one", 1),
    (2 * GROUP, "one", 2),
    (4, "two", 2),
  ):
    gradient, metrics = gradient_of(
      objective, batch, micro_batch, passes, shards
    )
    assert_close(wanted, gradient, 3e-6)
    assert metrics["update/kept_share"] == 0.5
  odd = batch.replace(
    tokens=jnp.where(keep[:, None] > 0, batch.tokens, 5),
    advantage=batch.advantage + 9 * (1 - keep),
    target=batch.target - 9 * (1 - keep),
  )
  first, metrics = gradient_of(objective, batch, GROUP, "one")
  second, other = gradient_of(objective, odd, GROUP, "one")
  jax.tree.map(np.testing.assert_array_equal, first, second)
  jax.tree.map(np.testing.assert_array_equal, metrics, other)


def test_dropped_sequences_are_not_computed():
  # Micro-batches without a kept sequence have score 0 and cost nothing.
  keep = np.repeat([1, 0, 0, 0], GROUP)
  batch = batch_of(keep=keep)
  scores = np.asarray(estimate_of(GROUP)(tiny_params(), batch, KEY))
  assert (scores[keep == 0] == 0).all()
  all_of_them = estimate_of(GROUP)(tiny_params(), batch_of(), KEY)
  np.testing.assert_array_equal(scores[keep == 1], all_of_them[keep == 1])
  # The bound is traced: neither batch had a program of its own.
  assert estimate_of(GROUP)._cache_size() == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_values_made_before_the_rewards_are_those_of_the_batch(shards):
  # Groups 0 and 3 are dropped, and every shard has its kept ones first.
  order = np.array([1, 2, 0, 3] if shards == 1 else [1, 0, 2, 3])
  rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
  keep = np.repeat([0, 1, 1, 0], GROUP)
  before = batch_of()
  moved = jax.tree.map(lambda x: x[rows], batch_of(keep=keep))
  moved = moved.replace(row=jnp.asarray(rows, jnp.int32))
  step = train_step.StepSettings(GROUP * shards, shards=shards)
  estimate = jax.jit(
    train_step.make_estimate(tiny_logprob, MASK_ID, step, MASKS)
  )
  early = estimate(tiny_params(), before, KEY)
  late = estimate(tiny_params(), moved, KEY)
  reordered = train_step.make_reorder(step)(early, moved)
  np.testing.assert_allclose(reordered, late, rtol=1e-6)
  assert (np.asarray(late) == 0).all(1).sum() == 2 * GROUP
  wide = jnp.stack([early, 2 * early], axis=1)
  both = train_step.make_reorder(step)(wide, moved)
  np.testing.assert_array_equal(both[:, 1], 2 * reordered)


def test_masks_go_with_the_sequence_and_not_with_its_place():
  batch = batch_of()
  order = np.random.default_rng(0).permutation(PROMPTS)
  rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
  moved = jax.tree.map(lambda x: x[rows], batch)
  moved = moved.replace(row=jnp.asarray(rows, jnp.int32))
  scores = estimate_of()(tiny_params(), batch, KEY)
  other = estimate_of()(tiny_params(), moved, KEY)
  np.testing.assert_allclose(scores[rows], other, rtol=1e-6)
  objective = objective_of()
  assert_close(
    gradient_of(objective, batch, GROUP, "one")[0],
    gradient_of(objective, moved, GROUP, "one")[0],
  )


@pytest.mark.parametrize("shards", (1, 2, 4))
def test_join_is_the_inverse_of_split_and_split_keeps_shards(shards):
  for size in (4, 8, 16):
    cut = train_step._Cut(16, train_step.StepSettings(size, shards=shards))
    x = np.arange(16 * 3).reshape(16, 3)
    pieces = cut.split({"x": x})["x"]
    assert pieces.shape == (16 // size, size, 3)
    np.testing.assert_array_equal(cut.join(pieces), x)
    # Row j of a piece belongs to the shard that holds row j of the batch.
    owner = np.arange(16) // (16 // shards)
    wanted = np.arange(size) // (size // shards)
    for piece in cut.split(owner):
      np.testing.assert_array_equal(piece, wanted)


def test_parts_of_a_sequences_masks_come_back_in_their_place():
  step = train_step.StepSettings(4, "two", shards=2, micro_masks=2)
  cut = train_step._Cut(8, step, draws=3, canvases=2)
  owner, values = np.arange(8), np.arange(8 * 6).reshape(8, 6)
  owners, pieces = cut.split(owner), cut.split_masks(values)
  assert owners.shape == (6, 4) and pieces.shape == (6, 4, 2)
  np.testing.assert_array_equal(owners, pieces[..., 0] // 6)
  np.testing.assert_array_equal(cut.join(pieces), values)
  for size in (1, 3, 4):
    with pytest.raises(ValueError, match=rf"train\.micro_masks={size} must"):
      train_step._Cut(
        8, train_step.StepSettings(4, micro_masks=size), draws=3, canvases=2
      )


def test_the_last_micro_batch_with_a_kept_sequence_is_the_last_one_run():
  cut = train_step._Cut(8, train_step.StepSettings(4, shards=2))
  for keep, active in (
    ([1, 1, 1, 1, 1, 1, 1, 1], 2),
    ([1, 1, 0, 0, 1, 1, 0, 0], 1),
    ([1, 1, 0, 0, 1, 1, 1, 0], 2),
    ([0, 0, 1, 0, 0, 0, 0, 0], 2),
    ([0, 0, 0, 0, 0, 0, 0, 0], 0),
  ):
    assert cut.active(jnp.asarray(keep, jnp.float32)) == active


def test_a_batch_that_cannot_be_cut_is_refused():
  for total, size, shards in ((12, 8, 1), (12, 6, 4)):
    with pytest.raises(ValueError, match=f"train.micro_batch={size} must"):
      train_step._Cut(total, train_step.StepSettings(size, shards=shards))


def test_one_pass_where_the_centring_set_fits():
  def resolve(centring, micro_batch, shards=1, passes="auto"):
    return train_step.resolve_passes(
      train_step.StepSettings(micro_batch, passes, shards),
      objective_of(centring=centring),
      16,
    )

  assert resolve("group", 4) == "one"
  assert resolve("group", 2) == "two"
  assert resolve("group", 8, shards=2) == "one"
  assert resolve("group", 4, shards=2) == "two"  # half a group a shard
  assert resolve("batch", 16) == "one"
  assert resolve("batch", 8) == "two"
  assert resolve("none", 1) == "one"
  assert resolve("none", 1, passes="two") == "two"
  with pytest.raises(ValueError, match=r"'one' is not exact .*multiple of 4"):
    resolve("group", 2, passes="one")
  with pytest.raises(ValueError, match=r"train\.passes='three'"):
    resolve("group", 4, passes="three")
  update, optimizer = update_of(objective_of(), 2, "two")
  state = train_step.init_state(tiny_params(), optimizer)
  with pytest.raises(ValueError, match="policy=None: two passes need"):
    update(state, batch_of(), KEY, jnp.zeros((N, 4)))


def test_relative_scores_are_zero_at_the_start():
  # Bit for bit from one compiled function; within 1e-6 inside the update.
  step = train_step.StepSettings(8)
  logprob_fn = transformer.make_logprob_fn(CONFIG)
  estimate = jax.jit(train_step.make_estimate(logprob_fn, MASK_ID, step, MASKS))
  params, batch, key = transformer_params(), batch_of(), KEY
  reference = estimate(params, batch, key)
  policy = estimate(jax.tree.map(jnp.copy, params), batch, key)
  np.testing.assert_array_equal(reference, policy)
  assert np.asarray(reference).std() > 0.1
  optimizer = optax.sgd(1.0)
  update = jax.jit(
    train_step.make_update(
      logprob_fn,
      MASK_ID,
      optimizer,
      optax.constant_schedule(1.0),
      step,
      MASKS,
      objective_of(centring="none"),
    )
  )
  _, metrics = update(
    train_step.init_state(params, optimizer), batch, key, reference
  )
  assert abs(float(metrics["score/relative_mean"])) <= 1e-6
  assert float(metrics["score/relative_std"]) <= 1e-6
  other = estimate(params, batch, jax.random.fold_in(KEY, 1))
  assert (np.asarray(other) != np.asarray(reference)).any()


@functools.cache
def adam_update():
  """Update with AdamW that donates its state, as the loop has it."""
  settings = train_step.OptimizerSettings(
    0.02, schedule="linear", total_steps=4, weight_decay=0.1
  )
  optimizer = train_step.make_optimizer(settings)
  update = train_step.make_update(
    tiny_logprob,
    MASK_ID,
    optimizer,
    train_step.schedule(settings),
    train_step.StepSettings(GROUP),
    MASKS,
    objective_of(),
  )
  return jax.jit(update, donate_argnums=0), optimizer


def test_three_donated_updates_leave_the_reference_as_it_was():
  update, optimizer = adam_update()
  params = tiny_params()
  before = jax.tree.map(lambda x: np.asarray(x).tobytes(), params)
  state = train_step.init_state(jax.tree.map(jnp.copy, params), optimizer)
  moved = []
  for step in range(3):
    batch = batch_of(step)
    key = jax.random.fold_in(KEY, step)
    reference = estimate_of()(params, batch, key)
    donated = jax.tree.leaves(state.params)
    state, metrics = update(state, batch, key, reference)
    assert all(leaf.is_deleted() for leaf in donated)
    moved.append(float(metrics["score/relative_std"]))
  after = jax.tree.map(lambda x: np.asarray(x).tobytes(), params)
  assert before == after
  assert moved[0] <= 1e-6 < moved[1] < moved[2]
  assert int(state.step) == 3


def descendants(key, count=32):
  """A key's words, its children's by `split` and small folds, and theirs."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  children = [fold(key, jnp.arange(count))]
  children += [jax.random.split(key, parts) for parts in (2, 3, 4, 5)]
  grandchildren = [fold(children[0][i], jnp.arange(count)) for i in range(4)]
  keys = jnp.concatenate([key[None], *children, *grandchildren])
  return {tuple(words) for words in jax.random.key_data(keys).tolist()}


def test_no_key_of_a_step_is_derived_twice():
  owner_of = {}
  # With completions of older parameters two steps are under way at a time.
  for step in (6, 7):
    rollout = train_step.stream_key(3, step, train_step.ROLLOUT)
    keys = {"rollout": rollout}
    for index, key in enumerate(train_step.finish_keys(rollout, 3)):
      keys[f"finish {index}"] = key
    for update in range(4):
      masks = keys[f"masks {update}"] = train_step.mask_key(3, step, update)
      for name in ("_ROUNDING", "_SUMMING"):
        fold = getattr(train_step, name)
        keys[f"{name} {update}"] = jax.random.fold_in(masks, fold)
    for name, key in keys.items():
      for words in descendants(key):
        owner = owner_of.setdefault(words, (step, name))
        assert owner == (step, name)
  # Those of the rollout and of the first update are the streams' own.
  first = train_step.stream_key(3, 7, train_step.MASKS)
  assert train_step.mask_key(3, 7) == first


@pytest.mark.parametrize("count", (1, 16, 256))
@pytest.mark.parametrize("sum_dtype", ("float32", "bfloat16"))
def test_gradients_of_bfloat16_parameters_sum_to_those_of_float64(
  sum_dtype, count
):
  # Sum over micro-batches of x_i, each as bfloat16 has it, beside numpy's.
  width = 512
  rng = np.random.default_rng(count)
  x = jnp.asarray(1 + rng.standard_normal((count, width)), jnp.bfloat16)
  objective = objectives.ObjectiveSettings("sft", group_size=1)

  def logprob(params, tokens, token_mask, target, rows):
    # What `likelihood.score` makes of it is linear: its weight is 1.
    mine = x[tokens[:, 0, 0]].astype(jnp.float32)
    value = mine @ params["kernel"].astype(jnp.float32)
    return jnp.repeat(value[:, None], rows.shape[1], axis=1)

  def taken(gradients, state, params=None):
    return jax.tree.map(jnp.zeros_like, gradients), gradients

  update = jax.jit(
    train_step.make_update(
      logprob,
      MASK_ID,
      optax.GradientTransformation(None, taken),
      lambda count: 0.0,
      train_step.StepSettings(1),
      likelihood.LikelihoodSettings("uniform", 1),
      objective,
      sum_dtype=sum_dtype,
    )
  )
  params = {"kernel": jnp.zeros(width, jnp.bfloat16)}
  moments = {"kernel": jnp.zeros(width)}
  state = train_step.TrainState(jnp.int32(0), params, moments)
  zeros = jnp.zeros(count)
  batch = train_step.RolloutBatch(
    tokens=jnp.broadcast_to(jnp.arange(count)[:, None], (count, 2)),
    token_mask=jnp.ones((count, 2), bool),
    completion_mask=jnp.ones((count, 1), bool),
    advantage=zeros,
    target=zeros,
    keep=zeros + 1,
  )
  state, _ = update(state, batch, KEY, None)
  exact = -np.asarray(x, np.float64).mean(0)
  found = np.asarray(state.opt_state["kernel"], np.float64)
  error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  along = found @ exact / (exact @ exact) - 1
  # Each summand is a bfloat16: off by up to 2**-9 of itself.
  assert error < 2.0**-8 + (sum_dtype == "bfloat16") * 0.002 * count**0.5
  assert abs(along) < 0.002


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_nothing_is_compiled_after_the_first_step(dtype):
  (update, optimizer), programs = adam_update(), 0
  params = jax.tree.map(lambda x: x.astype(dtype), tiny_params())
  state = train_step.init_state(params, optimizer)
  kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  # Moments are float32 whatever the parameters are stored in.
  for leaf in jax.tree.leaves(state.opt_state):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  for step in range(3):
    keep = np.repeat(np.arange(PROMPTS) <= step, GROUP)
    batch = batch_of(step, keep=keep)
    state, _ = update(
      state, batch, jax.random.fold_in(KEY, step), jnp.zeros((N, 4)) - 2.0
    )
    programs = programs or update._cache_size()
  assert update._cache_size() == programs
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == kinds


def test_a_step_that_is_not_finite_or_keeps_nothing_changes_nothing():
  update, optimizer = adam_update()
  reference = jnp.zeros((N, 4)) - 2.0
  state = train_step.init_state(tiny_params(), optimizer)
  state, _ = update(state, batch_of(), KEY, reference)
  before = jax.tree.map(np.array, state)
  bad = batch_of()
  bad = bad.replace(target=bad.target.at[5].set(jnp.inf))
  empty = batch_of(keep=np.zeros(N))
  for count, batch in enumerate((bad, empty)):
    state, metrics = update(state, batch, KEY, reference)
    assert metrics["update/applied"] == 0
    assert int(state.step) == before.step + count + 1
    jax.tree.map(
      np.testing.assert_array_equal,
      (state.params, state.opt_state),
      (before.params, before.opt_state),
    )
  assert np.isfinite(float(metrics["loss"]))
  # And then goes on as if they had not been.
  direct, _ = update(
    jax.tree.map(jnp.asarray, before), batch_of(1), KEY, reference
  )
  state, metrics = update(state, batch_of(1), KEY, reference)
  assert metrics["update/applied"] == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, direct.params)


def test_the_logged_rate_is_the_one_that_was_used():
  update, optimizer = adam_update()
  state = train_step.init_state(tiny_params(), optimizer)
  rates, reference = [], jnp.zeros((N, 4)) - 2.0
  for keep in (1, 0, 1):
    batch = batch_of(keep=np.full(N, keep))
    state, metrics = update(state, batch, KEY, reference)
    rates.append(float(metrics["lr"]))
  # The second step was skipped: the third takes the second rate.
  np.testing.assert_allclose(rates, [0.02, 0.015, 0.015], rtol=1e-6)


def test_the_optimizer_is_adamw_after_clipping_by_hand():
  settings = train_step.OptimizerSettings(
    learning_rate=0.1,
    schedule="linear",
    warmup_steps=2,
    total_steps=6,
    final_share=0.5,
    b1=0.8,
    b2=0.95,
    eps=1e-3,
    weight_decay=0.3,
    clip_norm=0.5,
  )
  optimizer = train_step.make_optimizer(settings)
  rng = np.random.default_rng(0)
  # Layers are stacked: norms and biases have two axes, and are not decayed.
  shapes = {
    "embed": {"embedding": (4, 3)},
    "layers": {
      "mlp_norm": {"scale": (2, 3), "bias": (2, 3)},
      "up": {"kernel": (2, 3, 4), "bias": (2, 4)},
    },
  }
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  params = jax.tree.map(
    lambda shape: rng.standard_normal(shape), shapes, is_leaf=is_shape
  )
  ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = optimizer.init(ours)
  first = jax.tree.map(np.zeros_like, params)
  second = jax.tree.map(np.zeros_like, params)
  decay = {
    "embed": {"embedding": 0.3},
    "layers": {
      "mlp_norm": {"scale": 0.0, "bias": 0.0},
      "up": {"kernel": 0.3, "bias": 0.0},
    },
  }
  rates = [0.0, 0.05, 0.1, 0.0875]  # warm-up 0, 1/2; then 1 -> 1/2 in 4
  for step, rate in enumerate(rates):
    size = 10.0 if step % 2 else 0.01  # clipped every other time
    gradient = jax.tree.map(
      lambda x: rng.standard_normal(x.shape) * size,  # noqa: B023
      params,
    )
    steps, state = optimizer.update(
      jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient),
      state,
      ours,
    )
    ours = optax.apply_updates(ours, steps)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(
      lambda g: g * min(1.0, 0.5 / norm),  # noqa: B023
      gradient,
    )
    first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, gradient)
    second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, gradient)

    def move(p, m, v, wd):
      m = m / (1 - 0.8 ** (step + 1))  # noqa: B023
      v = v / (1 - 0.95 ** (step + 1))  # noqa: B023
      return p - rate * (m / (np.sqrt(v) + 1e-3) + wd * p)  # noqa: B023

    params = jax.tree.map(move, params, first, second, decay)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
      ours,
      params,
    )


def test_schedules_by_hand():
  def values(kind, steps, **options):
    rate = train_step.schedule(
      train_step.OptimizerSettings(2.0, schedule=kind, **options)
    )
    return [float(rate(step)) for step in steps]

  np.testing.assert_allclose(values("constant", (0, 9)), [2, 2])
  np.testing.assert_allclose(
    values("linear", (0, 5, 10, 20), total_steps=10, final_share=0.1),
    [2, 1.1, 0.2, 0.2],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    values("cosine", (0, 5, 10, 20), total_steps=10, final_share=0.1),
    [2, 1.1, 0.2, 0.2],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    values("cosine", (0, 1, 2, 4, 6), total_steps=6, warmup_steps=2),
    [0, 1, 2, 1, 0],
    atol=1e-6,
  )


@pytest.mark.parametrize(
  "options, message",
  (
    ({"schedule": "step"}, r"optimizer\.schedule='step' must be one of"),
    ({"learning_rate": np.nan}, r"optimizer\.learning_rate=nan must be"),
    ({"learning_rate": -1e-3}, r"optimizer\.learning_rate=-0\.001 must be"),
    ({"clip_norm": 0.0}, r"optimizer\.clip_norm=0\.0 must be > 0"),
  ),
)
def test_optimizer_settings_refuse_what_cannot_be(options, message):
  with pytest.raises(ValueError, match=message):
    train_step.OptimizerSettings(**options)


def test_keys_differ_by_seed_step_and_stream_and_by_nothing_else():
  streams = (train_step.ROLLOUT, train_step.MASKS, train_step.EVAL)
  places = [
    (seed, step, stream)
    for seed in (0, 1)
    for step in (0, 1, 2, 1000)
    for stream in streams
  ]
  data = {
    tuple(jax.random.key_data(train_step.stream_key(*p)).tolist())
    for p in places
  }
  assert len(data) == len(places)
  again = train_step.stream_key(1, jnp.int32(2), train_step.EVAL)
  assert again == train_step.stream_key(1, 2, train_step.EVAL)


# One device and eight.

MESHES = ((1, 8, 1), (2, 2, 2))


def three_steps(shape, devices):
  """Loss, norm and final parameters of three steps on a mesh, as the loop
  places them."""
  mesh = sharding.make_mesh(*shape, devices=devices)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  settings = train_step.OptimizerSettings(1e-3, weight_decay=0.1)
  optimizer = train_step.make_optimizer(settings)
  boxed = jax.eval_shape(
    lambda key: train_step.init_state(
      transformer.init(CONFIG, key, boxed=True), optimizer
    ),
    jax.random.key(0),
  )
  places = sharding.shardings(mesh, boxed)
  state = jax.device_put(
    train_step.init_state(transformer_params(), optimizer), places
  )
  params = jax.device_put(transformer_params(), places.params)
  shards = sharding.batch_shards(mesh)
  step = train_step.StepSettings(2 * N, "one", shards=shards)
  logprob_fn = transformer.make_logprob_fn(CONFIG)
  estimate = jax.jit(
    train_step.make_estimate(logprob_fn, MASK_ID, step, MASKS),
    out_shardings=rows,
  )
  update = jax.jit(
    train_step.make_update(
      logprob_fn,
      MASK_ID,
      optimizer,
      train_step.schedule(settings),
      step,
      MASKS,
      objective_of(),
    ),
    donate_argnums=0,
    out_shardings=(places, whole),
  )
  out = []
  for index in range(3):
    halves = [batch_of(2 * index), batch_of(2 * index + 1)]
    batch = sharding.put_global(
      mesh, jax.tree.map(lambda *x: np.concatenate(x * 2), *halves)
    )
    key = train_step.stream_key(0, index, train_step.MASKS)
    reference = estimate(params, batch, key)
    state, metrics = update(state, batch, key, reference)
    out += [metrics["loss"], metrics["grad_norm"]]
  assert update._cache_size() == 1
  return np.array(out, np.float64), jax.device_get(state.params)


def agree():
  """Compares every mesh with one device; run with eight devices."""
  jax.config.update("jax_disable_most_optimizations", True)
  devices = jax.devices()
  assert len(devices) == 8
  numbers, params = three_steps((1, 1, 1), devices[:1])
  size = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(params)))
  for shape in MESHES:
    other_numbers, other = three_steps(shape, devices)
    np.testing.assert_allclose(other_numbers, numbers, rtol=1e-5, atol=1e-6)
    for a, b in zip(
      jax.tree.leaves(params), jax.tree.leaves(other), strict=True
    ):
      assert np.linalg.norm(a - b) <= 1e-5 * size, shape
  print("agree")


def test_one_device_and_eight_agree_over_three_steps():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": str(pathlib.Path(__file__).resolve().parent.parent),
  }
  done = subprocess.run(
    [sys.executable, __file__],
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert done.stdout.strip() == "agree"


if __name__ == "__main__":
  agree()
