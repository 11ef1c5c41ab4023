"""Prompts -> completions -> text -> rewards -> findings -> batch.

The only place where device arrays become text.

1. `make_rollout` (jitted by the caller): repeats prompts G times, denoises.
2. `to_text`, `judge`: this host's own completions as text, and their verdicts.
3. `gather`: what was found of the completions of all hosts, on each of them.
4. `findings`: targets and what is kept, from the advantages of the whole
   rollout; dropped groups go to the end of their shard.
5. `make_batch` (jitted): what was sampled, in the order that was found.

Every host computes 4 from the same numbers, so that what is selected and
weighed does not depend on how many there are.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rspo_jax.algorithm import advantages, likelihood
from rspo_jax.algorithm.types import RolloutBatch
from rspo_jax.devices import sharding
from rspo_jax.sampling.denoise import completion_mask, denoise
from rspo_jax.sampling.settings import SamplerSettings
from rspo_jax.tasks import base


@struct.dataclass
class Completions:
  """N = B * G sampled sequences; groups contiguous.

  Attributes:
    tokens: i32 [N, S].
    token_mask: bool [N, S], False on left padding.
    completion_mask: bool [N, L], True through the first EOS.
    commit_step: i32 [N, L], the forward that committed a position.
    denoiser_calls: i32 [].
    forwards: f32 [], the same in forwards of a whole canvas.
  """

  tokens: jax.Array
  token_mask: jax.Array
  completion_mask: jax.Array
  commit_step: jax.Array
  denoiser_calls: jax.Array
  forwards: jax.Array | float = 0.0


@dataclasses.dataclass(frozen=True)
class Judged:
  """This host's own completions, read and judged.

  Attributes:
    texts: n completions as text.
    verdicts: one for each.
  """

  texts: list[str]
  verdicts: list[base.Verdict]

  @property
  def rewards(self) -> np.ndarray:
    """f32 [n]."""
    return np.asarray([v.reward for v in self.verdicts], np.float32)

  @property
  def correct(self) -> np.ndarray:
    """bool [n]."""
    return np.asarray([v.correct for v in self.verdicts], bool)

  @property
  def unjudged(self) -> np.ndarray:
    """bool [n], whose verifier hung, crashed or gave nothing usable."""
    reasons = [v.reason for v in self.verdicts]
    return np.asarray([base.NO_VERDICT in reason for reason in reasons], bool)


@dataclasses.dataclass(frozen=True)
class Outcomes:
  """What was found of the completions of all hosts, each [B, G].

  Attributes:
    rewards: f32.
    correct: bool.
    length: scored tokens, through the first EOS.
    eos: whether there is one.
    distinct: share of different texts in the completion's group.
    unjudged: as in `Judged`.
    empty: whether the text is blank.
  """

  rewards: np.ndarray
  correct: np.ndarray
  length: np.ndarray
  eos: np.ndarray
  distinct: np.ndarray
  unjudged: np.ndarray
  empty: np.ndarray


def make_rollout(
  denoise_fn: Callable,
  settings: SamplerSettings,
  group_size: int,
  mask_id: int,
  eos_id: int,
) -> Callable:
  """Builds rollout(params, prompts [B, P], prompt_mask [B, P], key).

  Returns a function of device arrays to `Completions` of N = B * G sequences;
  the caller jits it.
  """
  length = settings.completion_length

  def rollout(params, prompts, prompt_mask, key):
    prompts = jnp.repeat(prompts, group_size, axis=0)  # [N, P]
    mask = jnp.repeat(prompt_mask, group_size, axis=0)
    canvas = jnp.pad(prompts, ((0, 0), (0, length)), constant_values=mask_id)
    mask = jnp.pad(mask, ((0, 0), (0, length)), constant_values=True)
    out = denoise(
      denoise_fn,
      params,
      canvas,
      mask,
      key,
      settings,
      mask_id=mask_id,
      eos_id=eos_id,
    )
    completion = out.tokens[:, -length:]
    return Completions(
      tokens=out.tokens,
      token_mask=mask,
      completion_mask=completion_mask(completion, eos_id),
      commit_step=out.commit_step,
      denoiser_calls=out.denoiser_calls,
      forwards=out.forwards,
    )

  return rollout


def make_finish(
  denoise_fn: Callable,
  settings: SamplerSettings,
  mask_id: int,
  eos_id: int,
) -> Callable:
  """Builds finish(params, out, forward, key): completes partial canvases.

  Every completion goes back to how it stood before forward number `forward`
  of its rollout (i32 [], 0 <= forward < T) and is denoised from there on.
  Defined for fixed schedules, whose forwards number the steps of the blocks.
  """
  length = settings.completion_length

  def finish(params, out: Completions, forward, key):
    later = jnp.pad(
      out.commit_step >= forward,
      ((0, 0), (out.tokens.shape[1] - length, 0)),
    )
    done = denoise(
      denoise_fn,
      params,
      jnp.where(later, mask_id, out.tokens),
      out.token_mask,
      key,
      settings,
      mask_id=mask_id,
      eos_id=eos_id,
      first_block=forward // settings.block_steps,
      first_step=forward % settings.block_steps,
    )
    return out.replace(
      tokens=done.tokens,
      completion_mask=completion_mask(done.tokens[:, -length:], eos_id),
      denoiser_calls=done.denoiser_calls,
      forwards=done.forwards,
    )

  return finish


def to_text(tokenizer, tokens, completion_mask) -> list[str]:
  """Texts of completions i32 [n, L] up to their first EOS."""
  return [
    tokenizer.decode(row[mask].tolist())
    for row, mask in zip(tokens, completion_mask, strict=True)
  ]


def judge(
  task: base.Task,
  examples: Sequence[base.Example],
  texts: list[str],
  protocol: str,
  weights,
) -> Judged:
  """Verdicts of n texts on n / G examples, each with G texts in a row."""
  group_size = len(texts) // max(len(examples), 1)
  pairs = [(examples[i // group_size], text) for i, text in enumerate(texts)]
  verdicts = task.judge(pairs, protocol, weights)
  return Judged(texts=texts, verdicts=verdicts)


def verdict_row(verdict: base.Verdict) -> dict:
  """A verdict as fields of a row of samples/ and eval/."""
  return {
    "reward": float(verdict.reward),
    "correct": bool(verdict.correct),
    "verdict": {
      "reward": float(verdict.reward),
      "correct": bool(verdict.correct),
      "parts": {key: float(part) for key, part in verdict.parts.items()},
      "reason": verdict.reason,
    },
  }


def order_by_keep(keep: np.ndarray, shards: int) -> np.ndarray:
  """Order of groups [b] that puts kept ones first in each of the shards.

  Kept groups are dealt to the shards in turn, so that every shard has as many
  to do as the others.
  """
  kept = np.flatnonzero(keep)
  dropped = np.flatnonzero(~keep)
  size = len(keep) // shards
  piles = [list(kept[shard::shards]) for shard in range(shards)]
  rest = iter(dropped)
  for pile in piles:
    pile.extend(next(rest) for _ in range(size - len(pile)))
  return np.concatenate([np.asarray(pile, int) for pile in piles])


def gather(
  split: sharding.Split,
  judged: Judged,
  ended: np.ndarray,
  has_eos: np.ndarray,
  group: int,
) -> Outcomes:
  """What all hosts found, the same on each of them.

  Args:
    split: of the prompts.
    judged: this host's own n completions, groups contiguous.
    ended: bool [n, L], True through the first EOS.
    has_eos: bool [n], whether a completion has one.
    group: completions of a prompt, G.
  """
  distinct = [
    len(set(judged.texts[i : i + group])) / group
    for i in range(0, len(judged.texts), group)
  ]
  table = np.stack(
    [
      judged.rewards,
      judged.correct,
      ended.sum(1),
      has_eos,
      np.repeat(distinct, group),
      judged.unjudged,
      [not text.strip() for text in judged.texts],
    ],
    axis=1,
  ).astype(np.float32)
  shape = (len(split.own), group, table.shape[1])
  rewards, correct, *others = np.moveaxis(
    split.gather(table.reshape(shape)), -1, 0
  )
  return Outcomes(rewards, correct > 0, *others)


def gather_finished(
  split: sharding.Split, rewards: np.ndarray, group: int
) -> np.ndarray:
  """Rewards f32 [F, n] of this host's own completions -> [F, B, G] of all."""
  own = rewards.reshape(len(rewards), len(split.own), group)
  return np.moveaxis(split.gather(np.moveaxis(own, 0, -1)), -1, 0)


def metrics(outcomes: Outcomes) -> dict[str, float]:
  """Metrics of a rollout, over the completions of all processes."""

  def mean(values):
    return float(values.reshape(-1).astype(np.float64).mean())

  return {
    "reward/mean": mean(outcomes.rewards),
    "reward/std": float(outcomes.rewards.reshape(-1).astype(np.float64).std()),
    "reward/equal_groups": mean(advantages.equal_groups(outcomes.rewards)),
    "reward/correct": mean(outcomes.correct),
    "reward/no_verdict": mean(outcomes.unjudged),
    "rollout/length_mean": mean(outcomes.length),
    "rollout/eos_share": mean(outcomes.eos),
    "rollout/empty_share": mean(outcomes.empty),
    "rollout/distinct_share": mean(outcomes.distinct),
  }


@struct.dataclass
class Findings:
  """What the host found of a rollout's B groups of G, in the rollout's order.

  Attributes:
    order: i32 [B], the groups as the batch has them: in each of its shards
      kept ones before dropped ones.
    keep: f32 [B], 0 for groups that the step ignores.
    advantage, target: f32 [B, G].
  """

  order: np.ndarray
  keep: np.ndarray
  advantage: np.ndarray
  target: np.ndarray


def findings(
  found: np.ndarray, lambda_: float, shards: int, *, drop: bool
) -> Findings:
  """Targets, what is kept, and where in the batch it lies.

  Args:
    found: f32 [B, G], advantages of the whole rollout.
    lambda_: of this step.
    shards: devices that share the batch; they divide B.
    drop: whether groups whose advantages are all zero are dropped.
  """
  keep, order = np.ones(len(found), bool), np.arange(len(found))
  if drop:
    keep = (found != 0).any(1)
    order = order_by_keep(keep, shards)
  return Findings(
    order.astype(np.int32),
    keep.astype(np.float32),
    found,
    advantages.targets(found, lambda_),
  )


def before_rewards(prompts: int, group: int) -> Findings:
  """Findings of B groups of G of which nothing is known yet."""
  return findings(np.zeros((prompts, group), np.float32), 0.0, 1, drop=False)


def make_batch(
  out: Completions, found: Findings, scope: str, with_trace: bool = False
) -> RolloutBatch:
  """The batch of a step, from what was sampled and what was found of it.

  On the device, where completions stay from sampling on; every process gives
  the same findings.

  Args:
    out: N = B * G completions.
    found: of them.
    scope: as in likelihood.LikelihoodSettings.
    with_trace: keep `commit_step`, for schemes that follow the sampler.
  """
  group = found.advantage.shape[1]
  row = (found.order[:, None] * group + jnp.arange(group)).reshape(-1)
  scored, seen = likelihood.scope_masks(
    out.completion_mask, out.token_mask, scope
  )
  return RolloutBatch(
    tokens=out.tokens[row],
    token_mask=seen[row],
    completion_mask=scored[row],
    advantage=found.advantage[found.order].reshape(-1),
    target=found.target[found.order].reshape(-1),
    keep=jnp.repeat(found.keep[found.order], group),
    row=row,
    commit_step=out.commit_step[row] if with_trace else None,
  )
