"""Accuracy of a policy on a split, greedy and sampled, with intervals.

Always the same prompts, the first ones of the split, and an own random stream:
an evaluation neither depends on the training step nor disturbs it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rspo_jax import rollout, sharding, train_step


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Tokenised prompts of a split.

  Attributes:
    tokens: i32 [n, P], left-padded.
    mask: bool [n, P].
    examples: n examples.
  """

  tokens: np.ndarray
  mask: np.ndarray
  examples: Sequence[dict]


@dataclasses.dataclass(frozen=True)
class Result:
  """What one evaluation found.

  Attributes:
    correct: bool [n].
    rewards: f32 [n].
    lengths: i32 [n], completion tokens through the first EOS.
    rows: one dict a completion, for JSONL.
    denoiser_calls: forwards of a batch.
  """

  correct: np.ndarray
  rewards: np.ndarray
  lengths: np.ndarray
  rows: list[dict[str, Any]]
  denoiser_calls: int

  @property
  def accuracy(self) -> float:
    """Share of right completions."""
    return float(self.correct.mean())


def wilson_interval(
  successes: int, n: int, z: float = 1.959964
) -> tuple[float, float]:
  """Wilson score interval of a proportion (Wilson 1927, equation 1).

  Args:
    successes: number of successes.
    n: number of trials.
    z: quantile of the normal; the default gives 95 %.

  Returns:
    (low, high) in [0, 1]; (0, 1) for n = 0.
  """
  if n == 0:
    return 0.0, 1.0
  p = successes / n
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  # At the ends the interval touches them exactly; rounding must not undo it.
  low = 0.0 if successes == 0 else max(0.0, centre - half)
  high = 1.0 if successes == n else min(1.0, centre + half)
  return low, high


def run(
  rollout_fn: Callable,
  params,
  prompts: Prompts,
  batch: int,
  mesh,
  seed: int,
  judge: Callable,
  to_text: Callable,
  on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
  """Samples one completion a prompt and judges it.

  Args:
    rollout_fn: jitted (params, prompts [batch, P], mask, key) -> Completions
      with group size 1.
    params: parameters on the device.
    prompts: all prompts; each process decodes its rows of every batch.
    batch: prompts decoded together, over all devices; the last batch is
      filled up with its first prompt and cut.
    mesh: the device mesh.
    seed: of the run; the EVAL stream is folded with the batch's index.
    judge: (examples, texts) -> `rollout.Judged`.
    to_text: (tokens [n, L], mask [n, L]) -> texts.
    on_batch: called after each batch with (prompts done, prompts in all);
      may raise to give up.

  Returns:
    `Result` over all prompts, the same on every process.
  """
  import jax

  processes, process = jax.process_count(), jax.process_index()
  mine = batch // processes
  total = len(prompts.examples)
  rows = []
  calls = 0
  for index, start in enumerate(range(0, total, batch)):
    picked = np.arange(start + process * mine, start + (process + 1) * mine)
    real = picked < total
    picked = np.where(real, picked, start)
    tokens, mask = sharding.put_global(
      mesh, (prompts.tokens[picked], prompts.mask[picked])
    )
    key = train_step.stream_key(seed, index, train_step.EVAL)
    out = rollout_fn(params, tokens, mask, key)
    length = out.completion_mask.shape[1]
    completions = sharding.local_rows(out.tokens)[:, -length:]
    scored = sharding.local_rows(out.completion_mask)
    examples = [prompts.examples[i] for i in picked]
    judged = judge(examples, to_text(completions, scored))
    calls = int(out.denoiser_calls)
    lengths = scored.sum(1)
    for i in np.flatnonzero(real):
      rows.append(
        {
          "index": int(picked[i]),
          "completion": judged.texts[i],
          **rollout.verdict_row(judged.verdicts[i]),
          "length": int(lengths[i]),
        }
      )
    on_batch(min(start + batch, total), total)
  rows = sorted(sharding.gather_json(rows), key=lambda row: row["index"])
  return Result(
    correct=np.array([row["verdict"]["correct"] for row in rows], bool),
    rewards=np.array([row["verdict"]["reward"] for row in rows], np.float32),
    lengths=np.array([row["length"] for row in rows], np.int64),
    rows=rows,
    denoiser_calls=calls,
  )


def metrics(greedy: Result, sampled: Result) -> dict[str, float]:
  """The `eval/*` metrics of a greedy and a sampled evaluation.

  `eval/ci_low`, `eval/ci_high` are the 95 % Wilson interval of
  `eval/accuracy`; those of the sampled accuracy end in `_sampled`.
  """
  n = len(greedy.correct)
  low, high = wilson_interval(int(greedy.correct.sum()), n)
  low_sampled, high_sampled = wilson_interval(
    int(sampled.correct.sum()), len(sampled.correct)
  )
  return {
    "eval/accuracy": greedy.accuracy,
    "eval/accuracy_sampled": sampled.accuracy,
    "eval/reward": float(greedy.rewards.mean()),
    "eval/reward_sampled": float(sampled.rewards.mean()),
    "eval/n": n,
    "eval/ci_low": low,
    "eval/ci_high": high,
    "eval/ci_low_sampled": low_sampled,
    "eval/ci_high_sampled": high_sampled,
    "eval/length_mean": float(greedy.lengths.mean()),
  }
