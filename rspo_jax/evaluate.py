"""Accuracy of a policy on a split, greedy and sampled, with intervals.

Always the same prompts, the first ones of the split, and an own random stream:
an evaluation neither depends on the training step nor disturbs it.

1. `run` samples one completion of each prompt, or several, and judges them.
2. `metrics` are the numbers of a greedy and a sampled evaluation: shares of
   right completions with 95 % intervals, pass@k, forwards and speed.
3. `by_difficulty` splits them by what the task calls difficulty.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rspo_jax import rollout, scores, sharding, train_step


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Tokenised prompts of a split.

  Attributes:
    tokens: i32 [n, P], left-padded.
    mask: bool [n, P].
    examples: n examples.
    cut: prompts of which only the tail is there.
  """

  tokens: np.ndarray
  mask: np.ndarray
  examples: Sequence[dict]
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
  """What one evaluation found, m completions of each of n prompts.

  Attributes:
    correct: bool [n, m].
    rewards: f32 [n, m].
    lengths: i32 [n, m], completion tokens through the first EOS.
    rows: one dict a completion, for JSONL, samples of a prompt together.
    denoiser_calls: forwards of a batch, their mean over batches.
    tokens_per_s: completion tokens through the first EOS a second of decoding,
      over batches that had nothing to compile; None without one.
  """

  correct: np.ndarray
  rewards: np.ndarray
  lengths: np.ndarray
  rows: list[dict[str, Any]]
  denoiser_calls: float
  tokens_per_s: float | None = None

  @property
  def accuracy(self) -> float:
    """Share of right completions."""
    return float(self.correct.mean())

  @property
  def interval(self) -> tuple[float, float]:
    """95 % interval of the accuracy."""
    return clustered_interval(self.correct)


def wilson_interval(
  successes: float, n: float, z: float = 1.959964
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


def clustered_interval(correct: np.ndarray) -> tuple[float, float]:
  """Wilson interval of the share of right completions of given prompts.

  Samples of one prompt are alike, so n prompts with m samples tell less than
  n * m independent ones. The interval is Wilson's at the effective number of
  trials, p (1 - p) / (variance of the mean over prompts), kept within
  n .. n * m (Korn and Graubard 1998). For m = 1 it is Wilson's.

  Args:
    correct: bool [n, m].

  Returns:
    (low, high) in [0, 1].
  """
  n, m = correct.shape
  successes = int(correct.sum())
  if m == 1 or n < 2:
    return wilson_interval(successes, n * m)
  p = successes / (n * m)
  variance = float(correct.mean(1).var(ddof=1)) / n
  trials = p * (1 - p) / variance if variance > 0 else float(n)
  trials = min(max(trials, float(n)), float(n * m))
  return wilson_interval(p * trials, trials)


def pass_at_k(correct: np.ndarray, k: int) -> float:
  """Probability that one of k samples of a prompt is right, unbiased.

  The mean over prompts of 1 - C(m - c, k) / C(m, k), c of m samples being
  right (Chen et al. 2021, arXiv 2107.03374, equation 1).

  Args:
    correct: bool [n, m].
    k: 1..m.
  """
  m = correct.shape[1]
  if not 1 <= k <= m:
    raise ValueError(f"k={k} must lie in 1..{m}, the samples of a prompt.")
  missed = [math.comb(m - int(c), k) / math.comb(m, k) for c in correct.sum(1)]
  return 1.0 - math.fsum(missed) / len(missed)


def ks_of(samples: int) -> list[int]:
  """The k of pass@k: powers of 2 below the number of samples, and that."""
  return [1 << i for i in range((samples - 1).bit_length())] + [samples]


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
  *,
  samples: int = 1,
  warm: bool = False,
  denoising: Callable = lambda tokens, scored, commit_step: None,
) -> Result:
  """Samples completions of every prompt and judges them.

  Args:
    rollout_fn: jitted (params, prompts [batch, P], mask, key) -> Completions
      with group size 1.
    params: parameters on the device.
    prompts: all prompts; each process reads its own rows of every batch.
    batch: prompts decoded together, over all devices; the last batch is
      filled up with its first prompt and cut.
    mesh: the device mesh.
    seed: of the run; the EVAL stream is folded with the batch's index.
    judge: (examples, texts) -> `rollout.Judged`.
    to_text: (tokens [n, L], mask [n, L]) -> texts.
    on_batch: called after each batch with (completions done, in all); may
      raise to give up.
    samples: m, completions of a prompt; the first of them are those of an
      evaluation with fewer.
    warm: whether `rollout_fn` is compiled, so that its first batch tells its
      speed too.
    denoising: (tokens [n, L], mask [n, L], commit_step [n, L]) -> a dict for
      each row of the result, or None.

  Returns:
    `Result` over all prompts, the same on every process.
  """

  split = sharding.split(mesh, batch)
  total = len(prompts.examples)
  starts = range(0, total, batch)
  rows, calls = [], []
  seconds, decoded = 0.0, 0
  for sample, (index, start) in itertools.product(
    range(samples), enumerate(starts)
  ):
    picked = start + split.held
    picked = np.where(picked < total, picked, start)
    tokens, mask = sharding.put_global(
      mesh, (prompts.tokens[picked], prompts.mask[picked])
    )
    key = train_step.stream_key(
      seed, sample * len(starts) + index, train_step.EVAL
    )
    before = time.perf_counter()
    out = rollout_fn(params, tokens, mask, key)
    length = out.completion_mask.shape[1]
    completions = sharding.local_rows(out.tokens)[split.own, -length:]
    scored = sharding.local_rows(out.completion_mask)[split.own]
    real = start + split.held[split.own] < total
    picked = picked[split.own]
    calls.append(int(out.denoiser_calls))
    if warm:
      seconds += time.perf_counter() - before
      decoded += int(scored[real].sum())
    warm = True
    examples = [prompts.examples[i] for i in picked]
    judged = judge(examples, to_text(completions, scored))
    lengths = scored.sum(1)
    played = denoising(
      completions, scored, sharding.local_rows(out.commit_step)[split.own]
    )
    for i in np.flatnonzero(real):
      rows.append(
        {
          "index": int(picked[i]),
          **({"sample": sample} if samples > 1 else {}),
          "completion": judged.texts[i],
          **rollout.verdict_row(judged.verdicts[i]),
          "length": int(lengths[i]),
          **(played[i] if played else {}),
        }
      )
    on_batch(sample * total + min(start + batch, total), samples * total)
  rows = sorted(
    sharding.gather_json(rows),
    key=lambda row: (row["index"], row.get("sample", 0)),
  )
  decoded = sum(sharding.gather_json([decoded]))
  verdicts = [row["verdict"] for row in rows]

  def table(values, dtype):
    return np.array(values, dtype).reshape(total, samples)

  return Result(
    correct=table([verdict["correct"] for verdict in verdicts], bool),
    rewards=table([verdict["reward"] for verdict in verdicts], np.float32),
    lengths=table([row["length"] for row in rows], np.int64),
    rows=rows,
    denoiser_calls=float(np.mean(calls)),
    tokens_per_s=decoded / seconds if seconds else None,
  )


def metrics(greedy: Result, sampled: Result) -> dict[str, float]:
  """The `eval/*` metrics of a greedy and a sampled evaluation.

  `eval/ci_low`, `eval/ci_high` are the 95 % Wilson interval of
  `eval/accuracy`; those of the sampled accuracy end in `_sampled`.
  `eval/pass_at_K` is there where prompts have several samples.
  """
  low, high = greedy.interval
  low_sampled, high_sampled = sampled.interval
  values = {
    "eval/accuracy": greedy.accuracy,
    "eval/accuracy_sampled": sampled.accuracy,
    "eval/reward": float(greedy.rewards.mean()),
    "eval/reward_sampled": float(sampled.rewards.mean()),
    "eval/n": len(greedy.correct),
    "eval/ci_low": low,
    "eval/ci_high": high,
    "eval/ci_low_sampled": low_sampled,
    "eval/ci_high_sampled": high_sampled,
    "eval/length_mean": float(greedy.lengths.mean()),
    "eval/denoiser_calls": greedy.denoiser_calls,
    "eval/denoiser_calls_sampled": sampled.denoiser_calls,
  }
  samples = sampled.correct.shape[1]
  if samples > 1:
    for k in ks_of(samples):
      values[f"eval/pass_at_{k}"] = pass_at_k(sampled.correct, k)
  for name, result in (("", greedy), ("_sampled", sampled)):
    if result.tokens_per_s is not None:
      values[f"eval/tokens{name}_per_s"] = result.tokens_per_s
  return values


def by_difficulty(
  labels: Sequence[str | None], greedy: Result, sampled: Result
) -> list[dict[str, Any]]:
  """Accuracies of prompts of one difficulty, the easiest first.

  Args:
    labels: difficulty of each of the n prompts, None where it has none.
    greedy, sampled: evaluations of those prompts.

  Returns:
    dicts with difficulty, n, accuracy, ci_low, ci_high, accuracy_sampled;
    empty where no prompt has a difficulty.
  """
  rows = []
  for label in sorted({label for label in labels if label}, key=scores.natural):
    mine = np.array([found == label for found in labels])
    part = dataclasses.replace(greedy, correct=greedy.correct[mine])
    low, high = part.interval
    rows.append(
      {
        "difficulty": label,
        "n": int(mine.sum()),
        "accuracy": part.accuracy,
        "ci_low": low,
        "ci_high": high,
        "accuracy_sampled": float(sampled.correct[mine].mean()),
      }
    )
  return rows
