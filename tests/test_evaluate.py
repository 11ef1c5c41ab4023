"""Intervals against their defining equation; evaluation batch by batch."""

import math

import numpy as np
import pytest

from rspo_jax import evaluate, rollout, sharding, train_step
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

  def __init__(self):
    self.calls = []

  def __call__(self, params, tokens, mask, key):
    import jax

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


def run(total, batch, seed=0, on_batch=lambda done, total: None):
  """An evaluation of `total` prompts, prompt i being [i, i, i]."""
  tokens = np.repeat(np.arange(total)[:, None], 3, axis=1).astype(np.int32)
  prompts = evaluate.Prompts(
    tokens, np.ones_like(tokens, bool), [{"i": i} for i in range(total)]
  )

  def judge(examples, texts):
    verdicts = [
      base.Verdict(example["i"] / 10, example["i"] % 3 == 0, {"p": 1.0}, text)
      for example, text in zip(examples, texts, strict=True)
    ]
    return rollout.Judged(texts, verdicts)

  def to_text(tokens, mask):
    return [f"{row[0]}:{kept.sum()}" for row, kept in zip(tokens, mask)]  # noqa: B905

  echo = Echo()
  mesh = sharding.make_mesh()
  result = evaluate.run(
    echo, "params", prompts, batch, mesh, seed, judge, to_text, on_batch
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
  np.testing.assert_array_equal(result.correct, np.arange(total) % 3 == 0)
  np.testing.assert_array_equal(result.lengths, 1 + np.arange(total) % 3)
  assert result.accuracy == pytest.approx(-(-total // 3) / total)
  assert result.denoiser_calls == 3


def test_every_batch_has_a_key_of_its_own_and_each_time_the_same():
  keys = [key for _, _, key in run(9, 3, seed=4)[1]]
  assert len(set(map(str, keys))) == 3
  assert [key for _, _, key in run(9, 3, seed=4)[1]] == keys
  assert [key for _, _, key in run(9, 3, seed=5)[1]] != keys
  import jax

  training = [
    jax.random.key_data(train_step.stream_key(4, step, stream)).tolist()
    for step in range(3)
    for stream in (train_step.ROLLOUT, train_step.MASKS)
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
