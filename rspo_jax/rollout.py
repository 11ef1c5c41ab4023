"""Prompts -> completions -> text -> rewards -> targets -> device batch.

The only place where device arrays become text.

1. `make_rollout` (jitted by the caller): repeats prompts G times, denoises.
2. `to_text`, `judge`: this host's own completions as text, and their verdicts.
3. `gather`: what was found of the completions of all hosts, on each of them.
4. `assemble`: advantages and targets from the rewards of the whole rollout,
   dropped groups moved to the end of their shard, arrays back on the device.

Every host computes 4 from the same numbers, so that what is selected and
weighed does not depend on how many there are.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rspo_jax import objectives, sampler, sharding
from rspo_jax.tasks import base
from rspo_jax.train_step import RolloutBatch


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
  settings: sampler.SamplerSettings,
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
    out = sampler.denoise(
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
      completion_mask=sampler.completion_mask(completion, eos_id),
      commit_step=out.commit_step,
      denoiser_calls=out.denoiser_calls,
      forwards=out.forwards,
    )

  return rollout


def make_finish(
  denoise_fn: Callable,
  settings: sampler.SamplerSettings,
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
    done = sampler.denoise(
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
      completion_mask=sampler.completion_mask(done.tokens[:, -length:], eos_id),
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


def scope_masks(completion_mask, token_mask, scope: str):
  """Which completion tokens are scored, and which of the canvas are seen.

  Args:
    completion_mask: bool [n, L], True through the first EOS; numpy or jax.
    token_mask: bool [n, S], False on left padding; of the same kind.
    scope: as in likelihood.LikelihoodSettings.

  Returns:
    (scored [n, L], seen [n, S]).
  """
  length = completion_mask.shape[1]
  if scope == "canvas":
    return completion_mask | True, token_mask
  if scope == "completion":
    xp = jnp if isinstance(token_mask, jax.Array) else np
    before, after = token_mask[:, :-length], token_mask[:, -length:]
    return completion_mask, xp.concatenate(
      [before, after & completion_mask], axis=1
    )
  return completion_mask, token_mask


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
    "reward/equal_groups": mean(objectives.equal_groups(outcomes.rewards)),
    "reward/correct": mean(outcomes.correct),
    "reward/no_verdict": mean(outcomes.unjudged),
    "rollout/length_mean": mean(outcomes.length),
    "rollout/eos_share": mean(outcomes.eos),
    "rollout/empty_share": mean(outcomes.empty),
    "rollout/distinct_share": mean(outcomes.distinct),
  }


def advantages_of(
  rewards: np.ndarray,
  correct: np.ndarray,
  objective: objectives.ObjectiveSettings,
  *,
  normalize: bool,
  skip_equal_groups: bool,
  keep_groups: int = 0,
  finished: np.ndarray | None = None,
) -> np.ndarray:
  """Advantages f32 [B, G] of a whole rollout.

  Args:
    rewards: f32 [B, G], of all hosts: some advantages are relative to all
      completions.
    correct: bool [B, G].
    objective: its advantage function and group size.
    normalize: divide advantages by the group's standard deviation.
    skip_equal_groups: groups whose advantages are all zero are dropped.
    keep_groups: groups that are kept at most; 0: all.
    finished: f32 [F, B, G], rewards of completions of partial canvases, for
      objectives that look at them.
  """

  def among(rewards, correct):
    entry = objectives.OBJECTIVES[objective.name]
    advantages = entry.advantages(rewards, correct, normalize)
    if objective.solved_advantage:
      advantages = objectives.solved_advantages(
        advantages, correct, objective.solved_advantage
      )
    return advantages

  advantages = among(rewards, correct)
  if keep_groups and skip_equal_groups:
    surplus = np.flatnonzero((advantages != 0).any(1))[keep_groups:]
    if len(surplus):
      # Anew: some advantages are relative to all completions that are kept.
      rest = np.setdiff1d(np.arange(len(rewards)), surplus)
      advantages = np.zeros_like(advantages)
      advantages[rest] = among(rewards[rest], correct[rest])
  if finished is not None:
    advantages = objectives.process_advantages(advantages, rewards, finished)
  return advantages


def assemble(
  tokens: np.ndarray,
  token_mask: np.ndarray,
  completion_mask: np.ndarray,
  advantages: np.ndarray,
  objective: objectives.ObjectiveSettings,
  split: sharding.Split,
  *,
  skip_equal_groups: bool,
  scope: str,
  commit_step: np.ndarray | None = None,
  lambda_: float | None = None,
) -> RolloutBatch:
  """Host arrays of a step: targets, what is kept, what is scored and seen.

  Args:
    tokens, token_mask: [n, S] that this host holds, groups contiguous.
    completion_mask: bool [n, L], through the first EOS.
    advantages: f32 [B, G] of the whole rollout.
    objective: its lambda and group size.
    split: of the B prompts.
    skip_equal_groups: drop groups whose advantages are all zero.
    scope: as in likelihood.LikelihoodSettings.
    commit_step: i32 [n, L], for mask schemes that follow the sampler.
    lambda_: of this step, where it follows a target share.

  Returns:
    `RolloutBatch` of n rows in numpy arrays, kept groups first in every shard;
    in the rollout's order where nothing can be dropped.
  """
  group = objective.group_size
  targets = objectives.targets(
    advantages, objective.lambda_ if lambda_ is None else lambda_
  )
  keep = np.ones(len(advantages), bool)
  order = np.arange(len(advantages))
  if skip_equal_groups:
    keep = (advantages != 0).any(1)
    for _, groups, shards in split.blocks:
      # A group moves among shards of the hosts that have it.
      order[groups] = groups[order_by_keep(keep[groups], shards)]
  taken = order[split.held]
  places = sharding.repeated(taken, group)  # in the whole rollout
  rows = sharding.repeated(np.searchsorted(split.held, taken), group)
  scored, seen = scope_masks(completion_mask, token_mask, scope)
  return RolloutBatch(
    tokens=tokens[rows],
    token_mask=seen[rows],
    completion_mask=scored[rows],
    advantage=advantages.reshape(-1)[places],
    target=targets.reshape(-1)[places],
    keep=np.repeat(keep, group).astype(np.float32)[places],
    row=places.astype(np.int32),
    commit_step=None if commit_step is None else commit_step[rows],
    lambda_=None
    if lambda_ is None
    else np.full(len(rows), lambda_, np.float32),
  )


def present(
  out: Completions, scope: str, with_trace: bool = False
) -> RolloutBatch:
  """Completions as a batch without rewards: what is scored and seen.

  The same masks as `assemble` gives, on the device and in the rollout's
  order, for scores that are computed before the rewards are known.
  """
  n = len(out.tokens)
  scored, seen = scope_masks(out.completion_mask, out.token_mask, scope)
  return RolloutBatch(
    tokens=out.tokens,
    token_mask=seen,
    completion_mask=scored,
    advantage=jnp.zeros(n),
    target=jnp.zeros(n),
    keep=jnp.ones(n),
    row=jnp.arange(n, dtype=jnp.int32),
    commit_step=out.commit_step if with_trace else None,
  )
