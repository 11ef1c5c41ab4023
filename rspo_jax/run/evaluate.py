"""Accuracy of a policy on a split, greedy and sampled, with intervals.

Always the same prompts, the first ones of the split, and an own random stream:
an evaluation neither depends on the training step nor disturbs it.

1. `decode` samples one completion of each prompt, or several, and judges them.
2. `metrics` are the numbers of a greedy and a sampled evaluation: shares of
   right completions with 95 % intervals, pass@k, forwards and speed.
3. `by_difficulty` splits them by what the task calls difficulty.
4. `evaluate` does it for a run, and keeps what it finds.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rspo_jax.algorithm import streams
from rspo_jax.devices import sharding
from rspo_jax.reporting import tables, transcripts
from rspo_jax.run import data, rollout
from rspo_jax.run.data import PromptBatch
from rspo_jax.run.program import Program
from rspo_jax.run.runs import Run
from rspo_jax.run.settings import Evaluation


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


def decode(
  rollout_fn: Callable,
  params,
  prompts: PromptBatch,
  batch: int,
  mesh,
  seed: int,
  judge: Callable,
  to_text: Callable,
  on_batch: Callable[[int, int], None] = lambda done, total: None,
  *,
  samples: int = 1,
  denoising: Callable = lambda tokens, scored, commit_step: None,
) -> Result:
  """Samples completions of every prompt and judges them.

  Args:
    rollout_fn: `Compiled` (params, prompts [batch, P], mask, key) ->
      Completions with group size 1.
    params: parameters on the device.
    prompts: all n; each process reads its own rows of every batch.
    batch: prompts decoded together, over all devices; the last batch is
      filled up with its first prompt and cut.
    mesh: of the devices.
    seed: of the run.
    judge: (examples, texts) -> `rollout.Judged`.
    to_text: (tokens [n, L], mask [n, L]) -> texts.
    on_batch: called with (completions done, all of them) after each batch.
    samples: completions of a prompt, m.
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
    places = start + split.held
    real = places < total
    picked = np.where(real, places, start)
    tokens, mask = sharding.put_global(
      mesh, (prompts.tokens[picked], prompts.mask[picked])
    )
    key = streams.stream_key(seed, sample * len(starts) + index, streams.EVAL)
    # A first batch compiles, and tells nothing of the speed.
    warm, before = rollout_fn.called, time.perf_counter()
    out = rollout_fn(params, tokens, mask, key)
    length = out.completion_mask.shape[1]
    completions = sharding.local_rows(out.tokens)[split.own, -length:]
    scored = sharding.local_rows(out.completion_mask)[split.own]
    real, picked = real[split.own], picked[split.own]
    calls.append(int(out.denoiser_calls))
    if warm:
      seconds += time.perf_counter() - before
      decoded += int(scored[real].sum())
    judged = judge(
      [prompts.examples[i] for i in picked], to_text(completions, scored)
    )
    played = denoising(
      completions, scored, sharding.local_rows(out.commit_step)[split.own]
    )
    found = _rows(picked, judged, scored, played)
    numbered = {"sample": sample} if samples > 1 else {}
    rows += [found[i] | numbered for i in np.flatnonzero(real)]
    on_batch(sample * total + min(start + batch, total), samples * total)
  rows = sharding.gather_json(rows)
  rows.sort(key=lambda row: (row["index"], row.get("sample", 0)))
  decoded = sum(sharding.gather_json([decoded]))
  speed = decoded / seconds if seconds else None
  return _result(rows, (total, samples), float(np.mean(calls)), speed)


def _rows(index, judged, scored, played) -> list[dict[str, Any]]:
  """Completions with their verdicts, as files have them."""
  return [
    {
      "index": int(index[i]),
      "completion": text,
      **rollout.verdict_row(judged.verdicts[i]),
      "length": int(scored[i].sum()),
      **(played[i] if played else {}),
    }
    for i, text in enumerate(judged.texts)
  ]


def _result(rows, shape, calls: float, tokens_per_s: float | None) -> Result:
  """The result of rows in their order, of n prompts with m samples each."""

  def table(values, dtype):
    return np.array(list(values), dtype).reshape(shape)

  return Result(
    correct=table((row["verdict"]["correct"] for row in rows), bool),
    rewards=table((row["verdict"]["reward"] for row in rows), np.float32),
    lengths=table((row["length"] for row in rows), np.int64),
    rows=rows,
    denoiser_calls=calls,
    tokens_per_s=tokens_per_s,
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
  for label in sorted({label for label in labels if label}, key=tables.natural):
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


def prompts_of(program: Program, split: str, count: int) -> PromptBatch:
  """The first `count` prompts of a split (0: all), tokenised."""
  examples = data.load_examples(program.task, split, program.settings.data)
  if count:
    examples = examples[:count]
  return program.prompts(examples).batch(np.arange(len(examples)))


def evaluate(
  run: Run, stem: pathlib.Path, evaluation: Evaluation | None = None
) -> tuple[dict[str, float], Result]:
  """Greedy and sampled evaluation; completions go to STEM-<kind>.jsonl.

  Args:
    run: what is evaluated; keeps the metrics.
    stem: folder and beginning of the files' names.
    evaluation: one of --mode=eval; None: as during training.

  Returns:
    (metrics, the greedy decoding).

  Raises:
    Interrupted: a signal came.
  """
  settings, state = run.settings, run.state
  label, seed, samplers = "", settings.run.seed, settings
  if evaluation is not None:
    label = f"{tables.sampler_name(evaluation.greedy)}, "
    label += f"{evaluation.greedy.completion_length} tokens, "
    seed, samplers = evaluation.seed, evaluation
  greedy, sampled = (
    _decoded(run, stem, kind, label, getattr(samplers, kind), seed, samples)
    for kind, samples in (("greedy", 1), ("sampled", settings.eval.samples))
  )
  values = metrics(greedy, sampled)
  if settings.data.long_prompts == "keep_tail":
    values["eval/cut_prompts"] = int(run.eval_prompts.cut.sum())
  state.first_eval = state.first_eval or values
  state.last_eval = values
  difficulty = run.program.task.difficulty
  labels = [difficulty(e) for e in run.eval_prompts.examples if difficulty]
  state.by_difficulty = by_difficulty(labels, greedy, sampled)
  run.writer.table(
    tables.decodings(values),
    title=f"{settings.eval.split} at step {state.step}, n = {values['eval/n']}",
  )
  run.writer.table(tables.passes(values))
  # Not between the steps of a run, which has other things to say.
  if evaluation is not None or state.step == settings.run.steps:
    run.writer.table(tables.difficulties(state.by_difficulty))
  return values, greedy


def _decoded(run, stem, kind, label, sampler, seed, samples) -> Result:
  """One of an evaluation's decodings, written to its file."""
  program = run.program
  result = decode(
    program.evaluation_fn(sampler, f"{label}{kind} evaluation"),
    program.for_sampling(run.policy),
    run.eval_prompts,
    run.settings.eval.batch,
    program.mesh,
    seed,
    program.judge,
    program.to_text,
    run.stop_if_asked,
    samples=samples,
    denoising=functools.partial(transcripts.denoising_rows, program.pieces),
  )
  run.write_rows(
    stem.with_name(f"{stem.name}-{kind}.jsonl"),
    ({"prompt": run.prompt_text(row["index"])} | row for row in result.rows),
  )
  return result
