"""From completions to a batch: who is whose, what is kept, what is masked."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax import (
  likelihood,
  objectives,
  rollout,
  sampler,
  sharding,
  train_step,
)
from rspo_jax.tasks import base

EOS, MASK = 9, 8


def judged(rewards, correct=None):
  """Verdicts with these rewards."""
  correct = [reward > 0.5 for reward in rewards] if correct is None else correct
  return rollout.Judged(
    [str(i) for i in range(len(rewards))],
    [
      base.Verdict(float(reward), bool(right), {}, "")
      for reward, right in zip(rewards, correct, strict=True)
    ],
  )


def completions(n, prompt=2, length=3, seed=0):
  """Tokens [n, S], mask [n, S] and completion mask [n, L] of n sequences."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 8, (n, prompt + length)).astype(np.int32)
  mask = np.ones_like(tokens, bool)
  mask[::2, 0] = False  # left padding
  ended = np.arange(length) < rng.integers(1, length + 1, n)[:, None]
  return tokens, mask, ended


def assemble(rewards, group, **options):
  """`rollout.assemble` of n random completions with these rewards."""
  tokens, mask, ended = completions(len(rewards))
  settings = objectives.ObjectiveSettings(
    name=options.pop("name", "rspo"),
    lambda_=0.5,
    solved_advantage=options.pop("solved_advantage", 0.0),
    group_size=group,
  )
  one = judged(rewards)
  skip = options.pop("skip_equal_groups", False)
  advantages = rollout.advantages_of(
    one.rewards.reshape(-1, group),
    one.correct.reshape(-1, group),
    settings,
    normalize=False,
    skip_equal_groups=skip,
    keep_groups=options.pop("keep_groups", 0),
  )
  shards = options.pop("shards", 1)
  batch = rollout.assemble(
    tokens,
    mask,
    ended,
    advantages,
    settings,
    sharding.Split(len(advantages), ((0,),) * shards),
    skip_equal_groups=skip,
    **{"scope": "completion"} | options,
  )
  return batch, (tokens, mask, ended)


@pytest.mark.parametrize(
  ("scope", "all_scored", "end_seen"),
  [
    ("completion", False, False),
    ("masked_tail", False, True),
    ("canvas", True, True),
  ],
)
def test_scopes_score_and_show_what_they_say(scope, all_scored, end_seen):
  _, mask, ended = completions(12)
  for kind in (np.asarray, jnp.asarray):
    scored, seen = rollout.scope_masks(kind(ended), kind(mask), scope)
    length = ended.shape[1]
    np.testing.assert_array_equal(
      scored, np.ones_like(ended) if all_scored else ended
    )
    np.testing.assert_array_equal(seen[:, :-length], mask[:, :-length])
    np.testing.assert_array_equal(
      seen[:, -length:], np.ones_like(ended) if end_seen else ended
    )


# Rollout.


def fill_with(value):
  """A denoise_fn whose best token is `value` everywhere."""

  def denoise_fn(params, tokens, token_mask, cache, start, length):
    del params, token_mask, start
    logits = jnp.zeros((tokens.shape[0], length, 10)).at[..., value].set(9.0)
    return logits, cache

  return denoise_fn


def test_completions_of_a_prompt_stand_together_behind_it():
  settings = sampler.SamplerSettings(4, 4, 2)
  run = jax.jit(rollout.make_rollout(fill_with(5), settings, 3, MASK, EOS))
  prompts = jnp.array([[1, 2], [3, 4]], jnp.int32)
  mask = jnp.array([[False, True], [True, True]])
  out = run({}, prompts, mask, jax.random.key(0))
  assert out.tokens.shape == (6, 6) and out.completion_mask.shape == (6, 4)
  np.testing.assert_array_equal(out.tokens[:, :2], [[1, 2]] * 3 + [[3, 4]] * 3)
  np.testing.assert_array_equal(out.tokens[:, 2:], 5)
  np.testing.assert_array_equal(out.token_mask[:, 0], [False] * 3 + [True] * 3)
  assert out.token_mask[:, 1:].all() and out.completion_mask.all()
  assert int(out.denoiser_calls) == 2
  np.testing.assert_array_equal(
    np.sort(out.commit_step, axis=1), [[0, 0, 1, 1]] * 6
  )


def test_a_completion_ends_at_its_first_eos():
  settings = sampler.SamplerSettings(4, 4, 4)
  run = rollout.make_rollout(fill_with(EOS), settings, 2, MASK, EOS)
  out = run({}, jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool), None)
  np.testing.assert_array_equal(
    out.completion_mask, [[True, False, False, False]] * 2
  )


# Text and verdicts.


class Letters:
  """A tokenizer whose ids are letters."""

  def decode(self, ids):
    return "".join("abcdefghij"[i] for i in ids)


def test_text_ends_with_the_mask():
  tokens = np.array([[0, 1, 2], [3, 4, 5]])
  mask = np.array([[True, True, False], [True, True, True]])
  assert rollout.to_text(Letters(), tokens, mask) == ["ab", "def"]


def test_each_text_is_judged_on_its_own_example():
  seen = []

  def verify(example, text, protocol="strict", weights=None):
    seen.append((example["i"], text, protocol, weights))
    return base.Verdict(example["i"], True, {}, "")

  task = base.Task("t", None, None, None, None, verify, {})
  found = rollout.judge(
    task, [{"i": 0}, {"i": 1}], ["a", "b", "c", "d"], "d1", {"x": 1.0}
  )
  assert seen == [
    (0, "a", "d1", {"x": 1.0}),
    (0, "b", "d1", {"x": 1.0}),
    (1, "c", "d1", {"x": 1.0}),
    (1, "d", "d1", {"x": 1.0}),
  ]
  np.testing.assert_array_equal(found.rewards, [0, 0, 1, 1])


# Assembly.


def test_advantages_and_targets_are_those_of_each_group():
  batch, (tokens, _, _) = assemble([1, 0, 0, 1, 1, 0.5], 3)
  # Means 1/3 and 5/6; targets are advantages over lambda = 1/2.
  expected = np.array([2 / 3, -1 / 3, -1 / 3, 1 / 6, 1 / 6, -1 / 3])
  np.testing.assert_allclose(batch.advantage, expected, atol=1e-6)
  np.testing.assert_allclose(batch.target, 2 * expected, atol=1e-6)
  np.testing.assert_array_equal(batch.tokens, tokens)
  np.testing.assert_array_equal(batch.keep, 1.0)
  np.testing.assert_array_equal(batch.row, np.arange(6))


def test_padding_and_what_follows_the_end_are_not_seen():
  batch, (_, mask, ended) = assemble([1, 0, 0, 1], 2)
  np.testing.assert_array_equal(batch.completion_mask, ended)
  np.testing.assert_array_equal(batch.token_mask[:, :2], mask[:, :2])
  np.testing.assert_array_equal(batch.token_mask[:, 2:], ended)
  batch, (_, mask, ended) = assemble([1, 0, 0, 1], 2, scope="canvas")
  assert batch.completion_mask.all()
  np.testing.assert_array_equal(batch.token_mask, mask)


def test_groups_with_equal_rewards_are_dropped_to_the_end():
  rewards = [1, 1, 0, 1, 0, 0, 1, 0]
  batch, (tokens, _, _) = assemble(rewards, 2, skip_equal_groups=True)
  np.testing.assert_array_equal(batch.keep, [1, 1, 1, 1, 0, 0, 0, 0])
  np.testing.assert_array_equal(batch.row, [2, 3, 6, 7, 0, 1, 4, 5])
  np.testing.assert_array_equal(batch.tokens, tokens[batch.row])
  np.testing.assert_allclose(batch.advantage[:4], [-0.5, 0.5, 0.5, -0.5])
  np.testing.assert_array_equal(batch.advantage[4:], 0)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_nothing_moves_where_nothing_is_dropped(shards):
  # The loop takes advantages from here and tokens from the device.
  batch, _ = assemble([1, 0, 0, 1, 1, 0, 0, 1], 2, shards=shards)
  np.testing.assert_array_equal(batch.row, np.arange(8))


# Several processes.

# For each shard of the batch the processes that hold it.
SPLITS = {
  "data": ((0,), (1,)),
  "data, two devices each": ((0,), (0,), (1,), (1,)),
  "tensor": ((0, 1),),
  "tensor over pairs of four": ((0, 1), (0, 1), (2, 3), (2, 3)),
  "devices of a process apart": ((0,), (1,), (0,), (1,)),
  "tensor over one and a half": ((0,), (0, 1), (1,), (2,)),
}


def on_processes(monkeypatch, holders, size, fn):
  """fn(split) of each process in a thread, with a gather between them."""
  count = 1 + max(map(max, holders))
  barrier, given, said = threading.Barrier(count, timeout=60), {}, {}
  here = threading.local()

  def gather(x):
    given[here.index] = x
    barrier.wait()
    out = np.stack([given[index] for index in range(count)])
    barrier.wait()
    return out

  def process(index):
    here.index = index
    try:
      said[index] = fn(sharding.Split(size, holders, index))
    except BaseException as error:
      barrier.abort()
      said[index] = error

  with monkeypatch.context() as patch:
    patch.setattr(jax, "process_count", lambda: count)
    patch.setattr(sharding.multihost_utils, "process_allgather", gather)
    threads = [
      threading.Thread(target=process, args=(index,)) for index in range(count)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  for outcome in said.values():
    if isinstance(outcome, BaseException):
      raise outcome
  return [said[index] for index in range(count)]


GROUPS, SIZE = 8, 3


def step_of(split, name, options):
  """(batch, metrics) of one process; of rewards 0, 1/2, 1 of one seed."""
  rng = np.random.default_rng(4)
  n = GROUPS * SIZE
  rewards = rng.integers(0, 3, n) / 2
  rewards[3:6] = 1  # a group that is all right, one all wrong
  rewards[12:15] = 0
  tokens, mask, ended = completions(n)
  finished = rng.integers(0, 3, (2, n)).astype(np.float32)
  when = rng.integers(0, 4, ended.shape)
  held = sharding.repeated(split.held, SIZE)
  own = held[sharding.repeated(split.own, SIZE)]
  settings = objectives.ObjectiveSettings(
    name=name,
    lambda_=0.5,
    group_size=SIZE,
    solved_advantage=options.get("solved_advantage", 0.0),
  )
  outcomes = rollout.gather(
    split, judged(rewards[own]), ended[own], ended[own].all(1), SIZE
  )
  extra = None
  if objectives.OBJECTIVES[name].finishes:
    extra = rollout.gather_finished(split, finished[:, own], SIZE)
  skip = options.get("skip_equal_groups", False)
  advantages = rollout.advantages_of(
    outcomes.rewards,
    outcomes.correct,
    settings,
    normalize=options.get("normalize", False),
    skip_equal_groups=skip,
    keep_groups=options.get("keep_groups", 0),
    finished=extra,
  )
  batch = rollout.assemble(
    tokens[held],
    mask[held],
    ended[held],
    advantages,
    settings,
    split,
    skip_equal_groups=skip,
    scope="completion",
    commit_step=when[held],
    lambda_=options.get("lambda_"),
  )
  return batch, rollout.metrics(outcomes)


@pytest.mark.parametrize("shape", SPLITS)
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"normalize": True},
    {"skip_equal_groups": True},
    {"skip_equal_groups": True, "keep_groups": 3},
    {"skip_equal_groups": True, "keep_groups": 4, "solved_advantage": 0.5},
    {"skip_equal_groups": True, "lambda_": 0.25},
  ],
  ids=str,
)
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_step_is_the_same_on_however_many_processes(
  monkeypatch, name, options, shape
):
  holders = SPLITS[shape]
  alone, metrics = step_of(sharding.Split(GROUPS, ((0,),)), name, options)
  order = np.argsort(alone.row)
  shards = {}
  for index, (batch, seen) in enumerate(
    on_processes(
      monkeypatch, holders, GROUPS, lambda s: step_of(s, name, options)
    )
  ):
    assert seen == metrics
    mine = [i for i, each in enumerate(holders) if index in each]
    assert len(batch.row) == len(mine) * GROUPS * SIZE // len(holders)
    # Every sequence is what it is on one process, wherever it was put.
    for field in vars(alone):
      whole, part = getattr(alone, field), getattr(batch, field)
      assert (whole is None) == (part is None)
      if whole is not None:
        np.testing.assert_array_equal(part, whole[order][batch.row])
    for shard, rows, keep in zip(
      mine,
      batch.row.reshape(len(mine), -1),
      batch.keep.reshape(len(mine), -1),
      strict=True,
    ):
      assert (np.diff(keep) <= 0).all()
      # Who has a shard has the same rows of it.
      assert shards.setdefault(shard, rows.tolist()) == rows.tolist()
  there = [row for rows in shards.values() for row in rows]
  assert sorted(there) == list(range(GROUPS * SIZE))


@given(st.data())
def test_every_shard_gets_its_share_of_kept_groups(data):
  shards = data.draw(st.sampled_from([1, 2, 3, 4]))
  size = data.draw(st.integers(1, 5))
  keep = np.array(
    data.draw(
      st.lists(st.booleans(), min_size=shards * size, max_size=shards * size)
    )
  )
  order = rollout.order_by_keep(keep, shards)
  assert sorted(order) == list(range(len(keep)))
  by_shard = keep[order].reshape(shards, size)
  counts = by_shard.sum(1)
  assert counts.max() - counts.min() <= 1
  for row, count in zip(by_shard, counts, strict=True):
    assert row[:count].all() and not row[count:].any()


@pytest.mark.parametrize("scope", ["completion", "canvas"])
def test_scores_that_do_not_wait_see_what_the_others_see(scope):
  tokens, mask, ended = completions(4)
  out = rollout.Completions(
    jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(ended), None, None
  )
  early = rollout.present(out, scope)
  late, _ = assemble([1, 0, 0, 1], 2, scope=scope)
  for name in ("tokens", "token_mask", "completion_mask", "keep", "row"):
    np.testing.assert_array_equal(getattr(early, name), getattr(late, name))


@pytest.mark.parametrize("scheme", sorted(likelihood.ESTIMATORS))
def test_a_sequence_keeps_its_masks_wherever_it_is_put(scheme):
  allowed = likelihood.ESTIMATORS[scheme].masks or (4,)
  settings = likelihood.LikelihoodSettings(scheme, allowed[0])
  key = jax.random.key(3)
  rewards = [1, 1, 0, 1, 0, 0, 1, 0, 0.5, 0, 1, 1]
  draw = jax.jit(train_step.draw_masks, static_argnums=1)
  when = np.random.default_rng(0).integers(
    0, 4, completions(12)[2].shape, np.int32
  )
  trace = dict(commit_step=when)
  plain, _ = assemble(rewards, 2, **trace)
  expected = draw(key, settings, plain)
  for shards in (1, 2, 3):
    moved, _ = assemble(
      rewards, 2, skip_equal_groups=True, shards=shards, **trace
    )
    assert (np.asarray(moved.row) != np.arange(12)).any()
    masks = draw(key, settings, moved)
    jax.tree.map(
      lambda a, b, row=moved.row: np.testing.assert_array_equal(a, b[row]),
      masks,
      expected,
    )


def test_a_row_shows_reward_and_verdict():
  verdict = base.Verdict(0.5, True, {"a": 1}, "because")
  assert rollout.verdict_row(verdict) == {
    "reward": 0.5,
    "correct": True,
    "verdict": {
      "reward": 0.5,
      "correct": True,
      "parts": {"a": 1.0},
      "reason": "because",
    },
  }


def test_no_more_groups_than_asked_for_are_kept():
  # Groups 0, 2 and 3 differ within themselves.
  rewards = [0, 1, 1, 1, 1, 0, 0, 1]
  options = dict(skip_equal_groups=True, keep_groups=2)
  batch, _ = assemble(rewards, 2, **options)
  kept = sorted(set(batch.row[batch.keep > 0] // 2))
  assert kept == [0, 2]
  # Rejection sampling: a plain mean over the right completions of those.
  batch, _ = assemble(rewards, 2, name="rft", **options)
  kept = batch.keep > 0
  assert sorted(set(batch.row[kept] // 2)) == [0, 1]
  np.testing.assert_allclose(batch.advantage[kept].mean(), 1.0, rtol=1e-6)


def test_groups_that_are_all_right_push_where_asked():
  rewards = [1, 1, 1, 0, 0, 0, 1, 1]
  options = dict(skip_equal_groups=True)
  plain, _ = assemble(rewards, 2, **options)
  assert sorted(set(plain.row[plain.keep > 0] // 2)) == [1]
  batch, _ = assemble(rewards, 2, solved_advantage=0.5, **options)
  kept = batch.keep > 0
  assert sorted(set(batch.row[kept] // 2)) == [0, 1, 3]
  of_row = dict(zip(batch.row, batch.advantage, strict=True))
  before = dict(zip(plain.row, plain.advantage, strict=True))
  assert [of_row[row] for row in (0, 1, 6, 7)] == [0.5] * 4
  # The other groups are what they were; the all-wrong one stays dropped.
  assert [of_row[row] for row in (2, 3, 4, 5)] == [
    before[row] for row in (2, 3, 4, 5)
  ]
  np.testing.assert_allclose(batch.target, batch.advantage / 0.5)
  # Right completions that differ in reward are told apart by it.
  shaped = [0.9, 0.7, 1, 1]
  batch, _ = assemble(shaped, 2, solved_advantage=0.5, **options)
  of_row = dict(zip(batch.row, batch.advantage, strict=True))
  np.testing.assert_allclose(
    [of_row[row] for row in range(4)], [0.1, -0.1, 0.5, 0.5], atol=1e-6
  )
  # A limit on groups counts them, too.
  batch, _ = assemble(
    rewards, 2, solved_advantage=0.5, keep_groups=2, **options
  )
  assert sorted(set(batch.row[batch.keep > 0] // 2)) == [0, 1]


def test_partial_canvases_are_finished_from_where_they_stood():
  settings = sampler.SamplerSettings(4, 2, 4)
  finish = rollout.make_finish(fill_with(7), settings, 9, 5)
  out = rollout.Completions(
    tokens=jnp.asarray([[1, 2, 3, 4, 6, 8]]),
    token_mask=jnp.ones((1, 6), bool),
    completion_mask=jnp.ones((1, 4), bool),
    commit_step=jnp.asarray([[1, 0, 2, 3]]),
    denoiser_calls=jnp.int32(4),
  )
  for forward, tokens in (
    (1, [1, 2, 7, 4, 7, 7]),
    (2, [1, 2, 3, 4, 7, 7]),
    (3, [1, 2, 3, 4, 6, 7]),
  ):
    done = jax.jit(finish)(None, out, jnp.int32(forward), jax.random.key(0))
    assert done.tokens[0].tolist() == tokens
    assert done.denoiser_calls == 4 - forward
    assert done.forwards == 4 - forward
