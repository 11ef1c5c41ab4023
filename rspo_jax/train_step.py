"""One optimisation step: masks, scores, objective, gradients, optax update.

1. Masks of the whole batch are drawn from one key and sliced, never drawn per
   micro-batch; policy and reference share them.
2. `estimate` (no gradient) scores sequences under given parameters: the
   reference's scores, and in the two-pass form the policy's too.
3. `update`, one pass: autodiff through the objective, micro-batch by
   micro-batch; exact where the centring set lies within a micro-batch.
   Two passes: the objective's gradient with respect to the scores of the whole
   batch gives one weight a mask, and the second pass accumulates
   weight * grad(score); exact for any micro-batch, memory flat in N and K.
   Both give the same gradient (rspo.md, "What is linear is cheap").
4. AdamW with global-norm clipping and a schedule, from optax.

Dropped sequences cost nothing: they come last in every shard, and the loop
over micro-batches ends (a traced bound, no recompilation) where no kept
sequence is left.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from rspo_jax import likelihood, objectives

# Streams of randomness: fold_in(fold_in(root, step), stream).
ROLLOUT, MASKS, EVAL = 0, 1, 2
PASSES = ("auto", "one", "two")
SCHEDULES = ("constant", "cosine", "linear")


def stream_key(seed: int, step, stream: int) -> jax.Array:
  """The PRNG key of a stream at a step: a function of (seed, step) alone."""
  return jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed), step), stream
  )


@struct.dataclass
class TrainState:
  """What a step changes: i32 [] step, parameters, optimizer state."""

  step: jax.Array
  params: object
  opt_state: object


@struct.dataclass
class RolloutBatch:
  """N = B * G completions with their rewards' verdict, on the device.

  Groups are contiguous. Within each of the batch's shards kept sequences come
  before dropped ones.

  Attributes:
    tokens: i32 [N, S], prompt (left-padded) and completion.
    token_mask: bool [N, S], what attention may see when scoring.
    completion_mask: bool [N, L], positions that are scored.
    advantage, target: f32 [N].
    keep: f32 [N], 0 for sequences that the step ignores.
    row: i32 [N], each sequence's place in the rollout; None: they are in the
      rollout's order. Masks go by it, so that neither the number of shards nor
      dropped groups change those of a sequence.
  """

  tokens: jax.Array
  token_mask: jax.Array
  completion_mask: jax.Array
  advantage: jax.Array
  target: jax.Array
  keep: jax.Array
  row: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW: peak rate, schedule over `total_steps`, clipping, decay."""

  learning_rate: float = 1e-4
  schedule: str = "constant"
  warmup_steps: int = 0
  total_steps: int = 1
  final_share: float = 0.0
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  moment_dtype: str = "float32"

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f"optimizer.schedule={self.schedule!r} must be one of {SCHEDULES}."
      )
    if not (np.isfinite(self.learning_rate) and self.learning_rate >= 0):
      raise ValueError(
        f"optimizer.learning_rate={self.learning_rate} must be a finite "
        "number >= 0."
      )
    if self.clip_norm <= 0:
      raise ValueError(
        f"optimizer.clip_norm={self.clip_norm} must be > 0; use a large "
        "number to switch clipping off."
      )


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """How a batch is cut.

  Attributes:
    micro_batch: sequences of one forward-backward, over all shards.
    passes: "one", "two", or "auto" (one where the centring set fits).
    shards: devices over which sequences are split.
  """

  micro_batch: int
  passes: str = "auto"
  shards: int = 1

  def __post_init__(self):
    if self.passes not in PASSES:
      raise ValueError(f"train.passes={self.passes!r} must be one of {PASSES}.")


def schedule(settings: OptimizerSettings) -> Callable:
  """Learning rate as a function of the step."""
  peak, final = settings.learning_rate, settings.final_share
  decay_steps = max(settings.total_steps - settings.warmup_steps, 1)
  if settings.schedule == "constant":
    body = optax.constant_schedule(peak)
  elif settings.schedule == "cosine":
    body = optax.cosine_decay_schedule(peak, decay_steps, alpha=final)
  else:
    body = optax.linear_schedule(peak, peak * final, decay_steps)
  if not settings.warmup_steps:
    return body
  warmup = optax.linear_schedule(0.0, peak, settings.warmup_steps)
  return optax.join_schedules([warmup, body], [settings.warmup_steps])


def _decayed(params):
  """True for matrices. By name: layers are stacked, so a norm has 2 axes."""

  def one(path, _):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return not names or names[-1] not in ("scale", "bias")

  return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(settings: OptimizerSettings):
  """Clipping by global norm, then AdamW; matrices alone are decayed.

  Moments are float32 (the first one as `moment_dtype` says) whatever the
  parameters are stored in.
  """
  optimizer = optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.adamw(
      schedule(settings),
      b1=settings.b1,
      b2=settings.b2,
      eps=settings.eps,
      weight_decay=settings.weight_decay,
      mask=_decayed,
      mu_dtype=settings.moment_dtype,
    ),
  )

  def init(params):
    return optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))

  return optax.GradientTransformation(init, optimizer.update)


def _updates_applied(state: TrainState):
  """i32 []: updates that the schedule has seen; a skipped step is none."""
  return optax.tree_utils.tree_get(
    state.opt_state,
    "count",
    default=state.step,
    filtering=lambda path, _: any(
      getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path
    ),
  )


def init_state(params, optimizer) -> TrainState:
  """Step 0 with the given parameters."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
  )


class _Cut:
  """A batch [N, ...] as micro-batches [M, n, ...], each over all shards."""

  def __init__(self, total: int, settings: StepSettings):
    self.shards = settings.shards
    self.size = settings.micro_batch
    if total % self.size or self.size % self.shards:
      raise ValueError(
        f"train.micro_batch={self.size} must divide the batch of {total} "
        f"sequences and be a multiple of the {self.shards} devices that "
        "share it."
      )
    self.count = total // self.size

  def split(self, tree):
    """[N, ...] -> [M, n, ...] for every leaf."""

    def one(x):
      rows = self.size // self.shards
      x = x.reshape(self.shards, self.count, rows, *x.shape[1:])
      return jnp.swapaxes(x, 0, 1).reshape(self.count, self.size, *x.shape[3:])

    return jax.tree.map(one, tree)

  def join(self, x):
    """[M, n, ...] -> [N, ...], the inverse of `split`."""
    rows = self.size // self.shards
    x = x.reshape(self.count, self.shards, rows, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

  def active(self, keep):
    """Number of leading micro-batches with a kept sequence, i32 []."""
    used = self.split(keep).sum(-1) > 0
    return jnp.max(jnp.where(used, jnp.arange(1, self.count + 1), 0))


def draw_masks(
  key: jax.Array,
  settings: likelihood.LikelihoodSettings,
  batch: RolloutBatch,
) -> likelihood.Masks:
  """The masks of a batch: drawn in the rollout's order, put in the batch's."""
  scored = batch.completion_mask
  if batch.row is not None:
    scored = jnp.zeros_like(scored).at[batch.row].set(scored)
  masks = likelihood.draw_masks(
    key, settings, scored, batch.tokens.shape[1] - scored.shape[1]
  )
  if batch.row is not None:
    masks = jax.tree.map(lambda x: x[batch.row], masks)
  return masks


def resolve_passes(
  settings: StepSettings, objective: objectives.ObjectiveSettings, total: int
) -> str:
  """ "one" where the centring set lies within a micro-batch, else "two".

  Raises:
    ValueError: one pass was asked for and would not be exact.
  """
  per_shard = settings.micro_batch // settings.shards
  fits = {
    "none": True,
    "group": per_shard % objective.group_size == 0,
    "batch": settings.micro_batch == total,
  }[objective.centring]
  if settings.passes == "one" and not fits:
    raise ValueError(
      f"train.passes='one' is not exact with objective.centring="
      f"{objective.centring!r} and train.micro_batch={settings.micro_batch}: "
      f"use train.passes='two', or a multiple of {objective.group_size} "
      "sequences a device with objective.centring='group'."
    )
  if settings.passes == "auto":
    return "one" if fits else "two"
  return settings.passes


def make_estimate(
  logprob_fn: Callable,
  mask_id: int,
  settings: StepSettings,
  mask_settings: likelihood.LikelihoodSettings,
) -> Callable:
  """estimate(params, batch, key) -> f32 [N, K]; 0 for skipped sequences."""

  def estimate(params, batch: RolloutBatch, key):
    cut = _Cut(batch.completion_mask.shape[0], settings)
    masks = draw_masks(key, mask_settings, batch)
    pieces = cut.split((batch, masks))

    def body(index, scores):
      piece, mask = jax.tree.map(lambda x: x[index], pieces)
      values = likelihood.score(
        logprob_fn, params, piece.tokens, piece.token_mask, mask, mask_id
      )
      return scores.at[index].set(values)

    scores = jnp.zeros((cut.count, cut.size, mask_settings.masks), jnp.float32)
    return cut.join(jax.lax.fori_loop(0, cut.active(batch.keep), body, scores))

  return estimate


def make_update(
  logprob_fn: Callable,
  mask_id: int,
  optimizer,
  learning_rate: Callable,
  settings: StepSettings,
  mask_settings: likelihood.LikelihoodSettings,
  objective: objectives.ObjectiveSettings,
) -> Callable:
  """Builds update(state, batch, key, reference, policy=None).

  Args of the returned function: the state (donate it), the batch, the MASKS
  key of the step, the reference's scores f32 [N, K] from `estimate`, and in
  the two-pass form the policy's scores from the same function. Returns
  (state, metrics); a non-finite loss or gradient, or a batch without a kept
  sequence, leaves the state as it was, but for the step, and reports
  `update/applied` 0.
  """
  loss_fn = objectives.OBJECTIVES[objective.name].loss

  def terms_of(batch, policy, reference):
    return objectives.Terms(
      policy=policy,
      reference=reference,
      advantage=batch.advantage,
      target=batch.target,
      length=batch.completion_mask.sum(-1).astype(jnp.float32),
      keep=batch.keep,
    )

  def update(
    state: TrainState, batch: RolloutBatch, key, reference, policy=None
  ):
    total = batch.completion_mask.shape[0]
    cut = _Cut(total, settings)
    passes = resolve_passes(settings, objective, total)
    if passes == "two" and policy is None:
      raise ValueError(
        "policy=None: two passes need the policy's scores of the batch; give "
        "those of `estimate`, or use train.passes='one'."
      )
    masks = draw_masks(key, mask_settings, batch)
    kept = jnp.maximum(batch.keep.sum(), 1.0)

    def scores_of(params, piece, mask):
      return likelihood.score(
        logprob_fn, params, piece.tokens, piece.token_mask, mask, mask_id
      )

    if passes == "one":
      extra = reference

      def micro_loss(params, piece, mask, reference):
        policy = scores_of(params, piece, mask)
        loss, _ = loss_fn(terms_of(piece, policy, reference), objective)
        return (loss * piece.keep).sum() / kept, policy

    else:

      def whole_loss(policy):
        loss, _ = loss_fn(terms_of(batch, policy, reference), objective)
        return (loss * batch.keep).sum() / kept

      extra = jax.grad(whole_loss)(policy)  # [N, K]

      def micro_loss(params, piece, mask, weight):
        policy = scores_of(params, piece, mask)
        return (weight * policy).sum(), policy

    pieces = cut.split((batch, masks, extra))

    def body(index, carry):
      gradients, scores = carry
      piece = jax.tree.map(lambda x: x[index], pieces)
      (_, policy), gradient = jax.value_and_grad(micro_loss, has_aux=True)(
        state.params, *piece
      )
      gradients = jax.tree.map(jnp.add, gradients, gradient)
      return gradients, scores.at[index].set(policy)

    gradients = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), state.params
    )
    scores = jnp.zeros((cut.count, cut.size, mask_settings.masks), jnp.float32)
    gradients, scores = jax.lax.fori_loop(
      0, cut.active(batch.keep), body, (gradients, scores)
    )
    loss, metrics = loss_fn(
      terms_of(batch, cut.join(scores), reference), objective
    )
    loss = (loss * batch.keep).sum() / kept
    norm = optax.global_norm(gradients)
    # Without a kept sequence the gradient is 0, on which momentum would act.
    applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (batch.keep.sum() > 0)
    steps, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, steps)
    old = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(applied, new, old), (params, opt_state), old
    )
    metrics = metrics | {
      "loss": loss,
      "grad_norm": norm,
      "lr": learning_rate(_updates_applied(state)),
      "update/applied": applied.astype(jnp.float32),
      "update/kept_share": batch.keep.mean(),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return update
