"""Intervals against their defining equation; evaluation batch by batch."""

import itertools
import math

import numpy as np
import pytest

from rspo_jax.algorithm import streams
from rspo_jax.devices import sharding
from rspo_jax.run import data, evaluate, rollout
from rspo_jax.tasks import base


def endpoints(successes, n, z=1.959964):
  """Ends of {p : |successes/n - p| <= z sqrt(p (1 - p) / n)}, by bisection."""
  share = successes / n

  def inside(p):
    return abs(share - p) <= z * math.sqrt(p * (1 - p) / n)

  def bisect(outside, within):
    for _ in range(100):
      middle = (outside + within) / 2
      outside, within = (
        (outside, middle) if inside(middle) else (middle, within)
      )
    return within

  # The interval holds the share itself, which at the ends is 0 or 1.
  return bisect(0.0, share) if share else 0.0, (
    bisect(1.0, share) if share < 1 else 1.0
  )


@pytest.mark.parametrize("n", [1, 2, 10, 97, 1024])
def test_wilson_interval_solves_its_equation(n):
  for successes in {0, 1, n // 3, n // 2, n - 1, n}:
    low, high = evaluate.wilson_interval(successes, n)
    expected = endpoints(successes, n)
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_interval_of_nothing_is_everything():
  assert evaluate.wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_meets_published_values():
  # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
  for successes, n, expected in (
    (81, 263, (0.2553, 0.3662)),
    (15, 148, (0.0624, 0.1605)),
    (0, 20, (0.0, 0.1611)),
    (1, 29, (0.0061, 0.1718)),
  ):
    found = evaluate.wilson_interval(successes, n)
    assert found == pytest.approx(expected, abs=5e-5)


class Echo:
  """A rollout that answers with the prompt and keeps its calls."""

  def __init__(self, called=False):
    self.calls, self.called = [], called

  def __call__(self, params, tokens, mask, key):
    import jax

    self.called = True
    self.calls.append(
      (params, np.asarray(tokens), jax.random.key_data(key).tolist())
    )
    whole = np.concatenate([tokens, tokens], axis=1)
    n, length = tokens.shape
    ended = np.arange(length) < 1 + np.asarray(tokens)[:, :1] % length
    import jax.numpy as jnp

    return rollout.Completions(
      tokens=jnp.asarray(whole),
      token_mask=jnp.ones(whole.shape, bool),
      completion_mask=jnp.asarray(ended),
      commit_step=jnp.zeros((n, length), jnp.int32),
      denoiser_calls=jnp.int32(3),
    )


def run(
  total,
  batch,
  seed=0,
  on_batch=lambda done, total: None,
  compiled=False,
  **options,
):
  """An evaluation of `total` prompts, prompt i being [i, i, i]."""
  tokens = np.repeat(np.arange(total)[:, None], 3, axis=1).astype(np.int32)
  prompts = data.PromptBatch(
    tokens,
    np.ones_like(tokens, bool),
    [{"i": i} for i in range(total)],
    np.zeros(total, bool),
  )

  def judge(examples, texts):
    verdicts = [
      base.Verdict(example["i"] / 10, example["i"] % 3 == 0, {"p": 1.0}, text)
      for example, text in zip(examples, texts, strict=True)
    ]
    return rollout.Judged(texts, verdicts)

  def to_text(tokens, mask):
    return [f"{row[0]}:{kept.sum()}" for row, kept in zip(tokens, mask)]  # noqa: B905

  echo = Echo(compiled)
  mesh = sharding.make_mesh()
  result = evaluate.decode(
    echo,
    "params",
    prompts,
    batch,
    mesh,
    seed,
    judge,
    to_text,
    on_batch,
    **options,
  )
  return result, echo.calls


@pytest.mark.parametrize(("total", "batch"), [(7, 3), (6, 3), (2, 8), (1, 1)])
def test_every_prompt_is_judged_once_on_its_own_completion(total, batch):
  result, calls = run(total, batch)
  assert len(calls) == -(-total // batch)
  assert all(tokens.shape == (batch, 3) for _, tokens, _ in calls)
  assert [row["index"] for row in result.rows] == list(range(total))
  for i, row in enumerate(result.rows):
    assert row["completion"] == f"{i}:{1 + i % 3}"
    assert row["length"] == 1 + i % 3
    assert row["reward"] == pytest.approx(i / 10)
    assert row["verdict"] == {
      "reward": row["reward"],
      "correct": i % 3 == 0,
      "parts": {"p": 1.0},
      "reason": row["completion"],
    }
  numbers = np.arange(total)[:, None]
  np.testing.assert_array_equal(result.correct, numbers % 3 == 0)
  np.testing.assert_array_equal(result.lengths, 1 + numbers % 3)
  assert result.accuracy == pytest.approx(-(-total // 3) / total)
  assert result.denoiser_calls == 3


def test_every_batch_has_a_key_of_its_own_and_each_time_the_same():
  keys = [key for _, _, key in run(9, 3, seed=4)[1]]
  assert len(set(map(str, keys))) == 3
  assert [key for _, _, key in run(9, 3, seed=4)[1]] == keys
  assert [key for _, _, key in run(9, 3, seed=5)[1]] != keys
  import jax

  training = [
    jax.random.key_data(streams.stream_key(4, step, stream)).tolist()
    for step in range(3)
    for stream in (streams.ROLLOUT, streams.MASKS)
  ]
  assert not {str(key) for key in keys} & {str(key) for key in training}


def test_progress_is_told_and_may_end_it():
  seen = []
  run(7, 3, on_batch=lambda done, total: seen.append((done, total)))
  assert seen == [(3, 7), (6, 7), (7, 7)]

  def stop(done, total):
    raise InterruptedError

  with pytest.raises(InterruptedError):
    run(7, 3, on_batch=stop)


def test_metrics_name_both_decodings_with_their_intervals():
  greedy, _ = run(9, 3)
  sampled, _ = run(4, 3)
  values = evaluate.metrics(greedy, sampled)
  assert values["eval/n"] == 9
  assert values["eval/accuracy"] == pytest.approx(3 / 9)
  assert values["eval/accuracy_sampled"] == pytest.approx(2 / 4)
  assert values["eval/reward"] == pytest.approx(0.4)
  interval = values["eval/ci_low"], values["eval/ci_high"]
  assert interval == pytest.approx(endpoints(3, 9), abs=1e-9)
  interval = values["eval/ci_low_sampled"], values["eval/ci_high_sampled"]
  assert interval == pytest.approx(endpoints(2, 4), abs=1e-9)
  assert values["eval/denoiser_calls"] == 3
  assert not any("pass_at" in key for key in values)


def test_a_speed_is_told_only_of_batches_that_had_nothing_to_compile():
  cold, _ = run(3, 3)
  assert cold.tokens_per_s is None
  assert not [k for k in evaluate.metrics(cold, cold) if k.endswith("per_s")]
  for result, _ in (run(4, 3), run(3, 3, compiled=True)):
    assert result.tokens_per_s > 0
    values = evaluate.metrics(cold, result)
    assert values["eval/tokens_sampled_per_s"] == result.tokens_per_s
    assert "eval/tokens_per_s" not in values


# Several samples of a prompt.


def test_several_samples_have_keys_of_their_own_and_begin_with_the_single_one():
  single, calls = run(7, 3)
  several, more = run(7, 3, samples=4)
  assert len(more) == 4 * len(calls)
  keys = [key for _, _, key in more]
  assert keys[: len(calls)] == [key for _, _, key in calls]
  assert len(set(map(str, keys))) == len(keys)
  assert several.correct.shape == (7, 4)
  np.testing.assert_array_equal(several.correct, single.correct.repeat(4, 1))
  assert [(row["index"], row["sample"]) for row in several.rows] == [
    (i, j) for i in range(7) for j in range(4)
  ]
  assert "sample" not in single.rows[0]


@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(m):
  correct = np.random.default_rng(m).random((6, m)) < 0.3
  for k in range(1, m + 1):
    subsets = list(itertools.combinations(range(m), k))
    share = np.mean([[row[list(s)].any() for s in subsets] for row in correct])
    assert evaluate.pass_at_k(correct, k) == pytest.approx(share, abs=1e-12)
  for k in (0, m + 1):
    with pytest.raises(ValueError, match=f"k={k}"):
      evaluate.pass_at_k(correct, k)


def test_pass_at_k_is_unbiased():
  # Every prompt is right with probability 0.3: of k tries, 1 - 0.7^k.
  rng = np.random.default_rng(0)
  correct = rng.random((40_000, 6)) < 0.3
  for k in (1, 2, 4):
    # A standard error is at most 0.0023.
    assert abs(evaluate.pass_at_k(correct, k) - (1 - 0.7**k)) < 0.01


def test_the_reported_k_are_powers_of_two_and_all():
  assert evaluate.ks_of(1) == [1]
  assert evaluate.ks_of(8) == [1, 2, 4, 8]
  assert evaluate.ks_of(6) == [1, 2, 4, 6]
  several, _ = run(7, 3, samples=6)
  values = evaluate.metrics(run(7, 3)[0], several)
  for k in (1, 2, 4, 6):  # a prompt's samples are all right or all wrong
    assert values[f"eval/pass_at_{k}"] == pytest.approx(3 / 7)
  assert values["eval/n"] == 7


def test_the_interval_of_several_samples_counts_prompts_that_are_alike():
  alike = (np.arange(50) % 3 == 0)[:, None].repeat(8, 1)
  assert evaluate.clustered_interval(alike) == pytest.approx(
    evaluate.wilson_interval(17, 50), abs=0.01
  )
  # Samples that do not depend on their prompt are as good as prompts.
  free = np.random.default_rng(0).random((500, 8)) < 0.4
  low, high = evaluate.clustered_interval(free)
  wide = np.diff(evaluate.wilson_interval(free.sum(), free.size))[0]
  assert wide <= (high - low) * (1 + 1e-9) < 1.2 * wide
  for certain in (np.zeros((5, 4), bool), np.ones((5, 4), bool)):
    expected = evaluate.wilson_interval(5 * certain[0, 0], 5)
    assert evaluate.clustered_interval(certain) == expected


def test_the_interval_of_several_samples_holds_the_truth_95_times_of_100():
  rng = np.random.default_rng(1)
  held = 0
  for _ in range(400):
    # Prompts differ: each is solved with its own probability, 0.3 on average.
    p = rng.beta(0.6, 1.4, (60, 1))
    low, high = evaluate.clustered_interval(rng.random((60, 4)) < p)
    held += low <= 0.3 <= high
  # A standard error is 1.1 points.
  assert held / 400 > 0.915


# Difficulty.


def test_accuracies_are_split_by_difficulty():
  greedy, _ = run(7, 3)
  sampled, _ = run(7, 3, samples=2)
  labels = ["10 empty", "9 empty", "9 empty", None, "10 empty", "9 empty", None]
  rows = evaluate.by_difficulty(labels, greedy, sampled)
  assert [row["difficulty"] for row in rows] == ["9 empty", "10 empty"]
  nine, ten = rows
  assert (nine["n"], nine["accuracy"]) == (3, 0.0)
  assert (ten["n"], ten["accuracy"]) == (2, 0.5)
  assert ten["accuracy_sampled"] == 0.5
  interval = ten["ci_low"], ten["ci_high"]
  assert interval == evaluate.wilson_interval(1, 2)
  assert evaluate.by_difficulty([None] * 7, greedy, sampled) == []
  assert evaluate.by_difficulty([], greedy, sampled) == []
