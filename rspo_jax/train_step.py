"""One optimisation step: masks, scores, objective, gradients, optax update.

1. Masks of the whole batch are drawn from one key and sliced, never drawn per
   micro-batch; policy and reference share them.
2. `estimate` (no gradient) scores sequences under given parameters: the
   reference's scores, and in the two-pass form the policy's too.
3. `update`, one pass: autodiff through the objective, micro-batch by
   micro-batch; exact where the centring set lies within a micro-batch.
   Two passes: the objective's gradient with respect to the scores of the whole
   batch gives one weight a mask, and the second pass accumulates
   weight * grad(score); exact for any micro-batch, and for a part of a
   sequence's masks at a time (`micro_masks`): memory flat in N and K.
   Both give the same gradient (rspo.md, "What is linear is cheap").
4. AdamW with global-norm clipping and a schedule, from optax, in float32;
   what is stored in bfloat16 is rounded stochastically (rounding.py).

What is trained may be a part of what is computed with: with an adapter the
state holds the adapter alone, and the frozen rest is an argument that every
step shares. Policy and reference are then two streams of one forward pass
(`pair_fn`), so that each frozen weight is read, and gathered, once for both.

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

from rspo_jax import likelihood, objectives, rounding

# Streams of randomness: fold_in(fold_in(root, step), stream).
ROLLOUT, MASKS, EVAL = 0, 1, 2
# Folds beside those that `split` and counts give, so that no key is derived
# twice: of the MASKS key the bits of stochastic rounding of a step and of sums
# of gradients, and the masks of updates after the first; of the ROLLOUT key the
# completions of partial canvases.
_ROUNDING, _SUMMING, _UPDATES = 0x726F756E, 0x73756D6D, 0x75706474
_FINISHES = 0x66696E69
PASSES = ("auto", "one", "two")
SCHEDULES = ("constant", "cosine", "linear")


def stream_key(seed: int, step, stream: int) -> jax.Array:
  """The PRNG key of a stream at a step: a function of (seed, step) alone."""
  return jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed), step), stream
  )


def mask_key(seed: int, step, update: int = 0) -> jax.Array:
  """Key of the masks of one of a step's updates."""
  key = stream_key(seed, step, MASKS)
  return jax.random.fold_in(key, _UPDATES + update) if update else key


def finish_keys(rollout_key: jax.Array, count: int) -> jax.Array:
  """Keys [count] for completions of a rollout's partial canvases."""
  return jax.random.split(jax.random.fold_in(rollout_key, _FINISHES), count)


@struct.dataclass
class TrainState:
  """What a step changes.

  Attributes:
    step: i32 [], updates so far, skipped ones included.
    params: parameters of the policy.
    opt_state: the optimizer's.
    reference: parameters of a reference that is refreshed from time to time;
      None: it is the model as it was loaded.
    ahead: in checkpoints alone, the rollout that waits for the next step
      (`Program.ahead_template`); else None.
  """

  step: jax.Array
  params: object
  opt_state: object
  reference: object = None
  ahead: object = None


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
    commit_step: i32 [N, L], the forward that committed a position, for schemes
      that follow the sampler; else None.
    lambda_: f32 [N], the lambda of this step where it follows a target share;
      else None and the settings' holds.
  """

  tokens: jax.Array
  token_mask: jax.Array
  completion_mask: jax.Array
  advantage: jax.Array
  target: jax.Array
  keep: jax.Array
  row: jax.Array | None = None
  commit_step: jax.Array | None = None
  lambda_: jax.Array | None = None


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
    updates_per_rollout: updates on the completions of one rollout, each with
      its own masks.
    micro_masks: masks of each of those sequences in one forward-backward, whole
      draws; then of two passes. 0: all of them.
  """

  micro_batch: int
  passes: str = "auto"
  shards: int = 1
  updates_per_rollout: int = 1
  micro_masks: int = 0

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

  Arithmetic is float32 whatever parameters and moments are stored in; `update`
  takes widened ones and `make_update` rounds what comes back (rounding.store).
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
    ),
  )

  def init(params):
    state = optimizer.init(rounding.widen(params))
    return jax.tree.map(
      lambda x: (
        x.astype(settings.moment_dtype) if x.dtype == jnp.float32 else x
      ),
      state,
    )

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


def init_state(params, optimizer, own_reference=False) -> TrainState:
  """Step 0 with the given parameters, and a copy of them as reference."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    reference=jax.tree.map(jnp.copy, params) if own_reference else None,
  )


def refresh_reference(state: TrainState) -> TrainState:
  """The policy as it stands becomes the reference."""
  return state.replace(reference=jax.tree.map(jnp.copy, state.params))


class _Cut:
  """A batch [N, ...] as micro-batches [M, n, ...], each over all shards.

  With `micro_masks` a sequence comes in several parts, one behind the other,
  each with masks of its own: M grows with their number.
  """

  def __init__(
    self, total: int, settings: StepSettings, draws: int = 1, canvases: int = 1
  ):
    self.shards = settings.shards
    self.size = settings.micro_batch
    if total % self.size or self.size % self.shards:
      raise ValueError(
        f"train.micro_batch={self.size} must divide the batch of {total} "
        f"sequences and be a multiple of the {self.shards} devices that "
        "share it."
      )
    together = settings.micro_masks or draws * canvases
    self.parts = draws * canvases // together
    if together % canvases or self.parts * together != draws * canvases:
      raise ValueError(
        f"train.micro_masks={together} must divide the {draws * canvases} "
        f"masks of a sequence and be a multiple of the {canvases} of a draw."
      )
    self.count = total * self.parts // self.size

  def split(self, tree):
    """[N, ...] -> [M, n, ...] for every leaf, the same to all parts."""
    if self.parts > 1:
      tree = jax.tree.map(lambda x: jnp.repeat(x, self.parts, axis=0), tree)
    return jax.tree.map(self._piled, tree)

  def split_masks(self, tree):
    """[N, U, ...] -> [M, n, U / parts, ...]: masks, or values of theirs."""

    def one(x):
      inner = x.shape[1] // self.parts
      return self._piled(x.reshape(-1, inner, *x.shape[2:]))

    return jax.tree.map(one, tree)

  def _piled(self, x):
    """[N * parts, ...] -> [M, n, ...]."""
    rows = self.size // self.shards
    x = x.reshape(self.shards, self.count, rows, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1).reshape(self.count, self.size, *x.shape[3:])

  def join(self, x):
    """[M, n, K / parts, ...] -> [N, K, ...], inverse of `split_masks`."""
    rows = self.size // self.shards
    x = x.reshape(self.count, self.shards, rows, *x.shape[2:])
    x = jnp.swapaxes(x, 0, 1)
    inner = self.parts * x.shape[3]
    return x.reshape(-1, inner, *x.shape[4:])

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
  scored, when = batch.completion_mask, batch.commit_step
  if batch.row is not None:
    ordered = lambda x: jnp.zeros_like(x).at[batch.row].set(x)  # noqa: E731
    scored, when = jax.tree.map(ordered, (scored, when))
  masks = likelihood.draw_masks(
    key, settings, scored, batch.tokens.shape[1] - scored.shape[1], when
  )
  if batch.row is not None:
    masks = jax.tree.map(lambda x: x[batch.row], masks)
  return masks


def resolve_passes(
  settings: StepSettings, objective: objectives.ObjectiveSettings, total: int
) -> str:
  """ "one" where the centring set lies within a micro-batch, else "two".

  A sequence whose masks come one part after another is no whole set either.

  Raises:
    ValueError: one pass was asked for and would not be exact.
  """
  per_shard = settings.micro_batch // settings.shards
  span = objectives.OBJECTIVES[objective.name].span
  fits = {
    "none": True,
    "group": per_shard % objective.group_size == 0,
    "batch": settings.micro_batch == total,
  }[objective.centring if span == "centring" else span]
  if settings.micro_masks:
    if settings.passes == "one":
      raise ValueError(
        "train.passes='one' differentiates all masks of a sequence together, "
        f"but train.micro_masks={settings.micro_masks}; use "
        "train.passes='two', or train.micro_masks=0."
      )
    return "two"
  if settings.passes == "one" and not fits:
    what = f"objective.centring={objective.centring!r}"
    if span != "centring":
      what = f"objective.name={objective.name!r}, which compares whole groups,"
    raise ValueError(
      f"train.passes='one' is not exact with {what} and train.micro_batch="
      f"{settings.micro_batch}: use train.passes='two', or a multiple of "
      f"{objective.group_size} sequences a device with groups alone centred."
    )
  if settings.passes == "auto":
    return "one" if fits else "two"
  return settings.passes


def _values_fn(logprob_fn, mask_id, per_token):
  """values(params, batch, masks): what an objective sees of sequences.

  Scores f32 [n, K], or row log-probs f32 [n, U, R] `per_token`.
  """
  fn = likelihood.logprobs if per_token else likelihood.score

  def values(params, batch, masks):
    return fn(
      logprob_fn, params, batch.tokens, batch.token_mask, masks, mask_id
    )

  return values


def _no_values(cut, masks: likelihood.Masks, per_token: bool):
  """Zeros to write values into, micro-batch by micro-batch."""
  draws, canvases = masks.corrupt.shape[1:3]
  shape = masks.rows.shape[1:] if per_token else (draws * canvases,)
  shape = (shape[0] // cut.parts, *shape[1:])
  return jnp.zeros((cut.count, cut.size, *shape), jnp.float32)


def make_estimate(
  logprob_fn: Callable,
  mask_id: int,
  settings: StepSettings,
  mask_settings: likelihood.LikelihoodSettings,
  per_token: bool = False,
) -> Callable:
  """estimate(params, batch, key) -> f32 [N, K]; 0 for skipped sequences.

  Row log-probs f32 [N, U, R] instead for objectives `per_token`; a pair where
  `logprob_fn` scores policy and reference in one pass.
  """
  values = _values_fn(logprob_fn, mask_id, per_token)

  def estimate(params, batch: RolloutBatch, key):
    masks = draw_masks(key, mask_settings, batch)
    cut = _Cut(len(batch.keep), settings, *masks.corrupt.shape[1:3])
    pieces = (cut.split(batch), cut.split_masks(masks))

    def one(index):
      piece, mask = jax.tree.map(lambda x: x[index], pieces)
      return values(params, piece, mask)

    def body(index, scores):
      return jax.tree.map(
        lambda all_, new: all_.at[index].set(new), scores, one(index)
      )

    scores = jax.tree.map(
      lambda x: jnp.zeros((cut.count, *x.shape), jnp.float32),
      jax.eval_shape(one, 0),
    )
    scores = jax.lax.fori_loop(0, cut.active(batch.keep), body, scores)
    return jax.tree.map(cut.join, scores)

  return estimate


def make_reorder(settings: StepSettings) -> Callable:
  """reorder(values [N, ...], batch): as `estimate` would give them for it.

  The values are those of the rollout's completions in its order, before the
  rewards were known and groups dropped.
  """

  whole = dataclasses.replace(settings, micro_masks=0)

  def reorder(values, batch: RolloutBatch):
    cut = _Cut(len(values), whole)
    pieces = cut.split(values[batch.row])
    used = jnp.arange(cut.count) < cut.active(batch.keep)
    used = used.reshape(-1, *(1,) * (pieces.ndim - 1))
    return cut.join(jnp.where(used, pieces, 0.0))

  return reorder


def _terms(batch, masks, policy, reference, old, sizes, per_token):
  """What the objective sees; `sizes` are those of the whole batch."""
  return objectives.Terms(
    policy=policy,
    reference=reference,
    old=old,
    advantage=batch.advantage,
    target=batch.target,
    lambda_=batch.lambda_,
    length=batch.completion_mask.sum(-1).astype(jnp.float32),
    keep=batch.keep,
    count=_counts(masks),
    weight=masks.weight if per_token else None,
    sizes=sizes,
  )


def _counts(masks):
  """Scored tokens of each canvas, f32 [n, K]."""
  counts = (masks.weight > 0).sum(-1).astype(jnp.float32)
  return counts.reshape(len(counts), -1)


def _sizes(batch, masks) -> objectives.Sizes:
  """Means over the kept sequences of the whole batch."""
  kept = jnp.maximum(batch.keep.sum(), 1.0)
  counts = _counts(masks)
  rows = (masks.weight > 0).any(2).sum((1, 2))
  mean = lambda x: (x * batch.keep).sum() / kept  # noqa: E731
  return objectives.Sizes(
    length=mean(batch.completion_mask.sum(-1)),
    rows=mean(rows),
    canvases=mean((counts > 0).sum(-1)),
  )


def make_update(
  logprob_fn: Callable,
  mask_id: int,
  optimizer,
  learning_rate: Callable,
  settings: StepSettings,
  mask_settings: likelihood.LikelihoodSettings,
  objective: objectives.ObjectiveSettings,
  join: Callable | None = None,
  pair_fn: Callable | None = None,
  sum_dtype: str = "float32",
) -> Callable:
  """Builds update(state, batch, key, reference, policy=None, old=None,
  frozen=None).

  Args:
    logprob_fn: scores the policy (likelihood.score).
    mask_id: the id that hides a token.
    optimizer: of `make_optimizer`.
    learning_rate: of `schedule`, for the metrics.
    settings, mask_settings, objective: of the step.
    join: (state.params, frozen, state.reference) -> what `logprob_fn` takes;
      None: state.params.
    pair_fn: a `logprob_fn` that scores policy and reference in one pass; one
      pass then needs no reference from outside.
    sum_dtype: of gradients summed over micro-batches; those of float32
      parameters are float32. "bfloat16" takes half the memory and rounds
      stochastically: an error that grows as M^(1/2) and averages out.

  Args of the returned function: the state (donate it), the batch, the MASKS
  key of the update, and values of the batch from `estimate` with that key: the
  reference's, in the two-pass form the policy's, and, where a rollout serves
  several updates and the objective has a ratio, those of the parameters that
  sampled it. Values are scores f32 [N, K], or f32 [N, U, R] for objectives per
  token. `frozen` is what `join` wants. Returns (state, metrics); a loss,
  gradient or score that is not finite, or a batch without a kept sequence,
  leaves the state as it was, but for the step, and reports `update/applied` 0.
  """
  entry = objectives.OBJECTIVES[objective.name]
  loss_fn, per_token = entry.loss, entry.per_token
  policy_of = _values_fn(logprob_fn, mask_id, per_token)
  both_of = _values_fn(pair_fn, mask_id, per_token)

  def update(
    state: TrainState,
    batch: RolloutBatch,
    key,
    reference,
    policy=None,
    old=None,
    frozen=None,
  ):
    total = batch.completion_mask.shape[0]
    passes = resolve_passes(settings, objective, total)
    if passes == "two" and policy is None:
      raise ValueError(
        "policy=None: two passes need the policy's scores of the batch; give "
        "those of `estimate`, or use train.passes='one'."
      )
    if entry.ratio and settings.updates_per_rollout > 1 and old is None:
      raise ValueError(
        f"old=None: objective.name={objective.name!r} weighs by a ratio to the "
        "parameters of the rollout, whose values train.updates_per_rollout="
        f"{settings.updates_per_rollout} needs; give those of `estimate`."
      )
    masks = draw_masks(key, mask_settings, batch)
    cut = _Cut(total, settings, *masks.corrupt.shape[1:3])
    kept = jnp.maximum(batch.keep.sum(), 1.0)
    sizes = _sizes(batch, masks)

    def total_loss(batch, masks, policy, reference, old):
      terms = _terms(batch, masks, policy, reference, old, sizes, per_token)
      loss, metrics = loss_fn(terms, objective)
      return (loss * batch.keep).sum() / kept, metrics

    def joined(params):
      return params if join is None else join(params, frozen, state.reference)

    # Each: (params, piece, mask, extra) -> (loss, values of the piece).
    dual = passes == "one" and pair_fn is not None
    if dual:
      extra = old

      def micro_loss(params, piece, mask, old):
        policy, reference = both_of(joined(params), piece, mask)
        reference = jax.lax.stop_gradient(reference)
        loss, _ = total_loss(piece, mask, policy, reference, old)
        return loss, (policy, reference)

    elif passes == "one":
      extra = (reference, old)

      def micro_loss(params, piece, mask, extra):
        policy = policy_of(joined(params), piece, mask)
        return total_loss(piece, mask, policy, *extra)[0], (policy,)

    else:

      def whole_loss(policy):
        return total_loss(batch, masks, policy, reference, old)[0]

      extra = jax.grad(whole_loss)(policy)  # like the values

      def micro_loss(params, piece, mask, weight):
        policy = policy_of(joined(params), piece, mask)
        return (weight * policy).sum(), (policy,)

    pieces = (cut.split(batch), *cut.split_masks((masks, extra)))

    def micro_gradient(index):
      piece = jax.tree.map(lambda x: x[index], pieces)
      (_, values), gradient = jax.value_and_grad(micro_loss, has_aux=True)(
        state.params, *piece
      )
      return gradient, values

    if cut.count == 1:
      # No second copy of the gradients.
      gradients, values = micro_gradient(0)
      values = jax.tree.map(lambda x: x[None], values)
    else:

      def body(index, carry):
        gradient, new = micro_gradient(index)
        gradients, values = carry
        bits = jax.random.fold_in(sums_key, index)
        return rounding.add(gradients, gradient, bits), jax.tree.map(
          lambda all_, x: all_.at[index].set(x), values, new
        )

      sums_key = jax.random.fold_in(key, _SUMMING)
      start = jax.tree.map(
        lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, sum_dtype)),
        state.params,
      )
      empty = (_no_values(cut, masks, per_token),) * (2 if dual else 1)
      gradients, values = jax.lax.fori_loop(
        0, cut.active(batch.keep), body, (start, empty)
      )
    policy, *inside = map(cut.join, values)
    reference = inside[0] if dual else reference
    loss, metrics = total_loss(batch, masks, policy, reference, old)
    gradients = rounding.widen(gradients)
    norm = optax.global_norm(gradients)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm)
    # A score that is not finite could cancel out of both.
    for scores in (policy, reference):
      if scores is not None:
        applied &= jnp.isfinite(scores).all()
    # Without a kept sequence the gradient is 0, on which momentum would act.
    applied &= batch.keep.sum() > 0
    before = (state.params, state.opt_state)
    wide_params, wide_moments = rounding.widen(before)
    steps, moments = optimizer.update(gradients, wide_moments, wide_params)
    after = rounding.store(
      (optax.apply_updates(wide_params, steps), moments),
      before,
      jax.random.fold_in(key, _ROUNDING),
    )
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(applied, new, old), after, before
    )
    metrics = metrics | {
      "loss": loss,
      "grad_norm": norm,
      "lr": learning_rate(_updates_applied(state)),
      "update/applied": applied.astype(jnp.float32),
      "update/kept_share": batch.keep.mean(),
    }
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics

  return update
