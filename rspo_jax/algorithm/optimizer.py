"""The optimizer: clipping, AdamW and a schedule, from optax, in float32."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rspo_jax.algorithm import rounding
from rspo_jax.algorithm.types import TrainState
from rspo_jax.config import keys, schema

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(schema.Optimizer):
  """AdamW, with the updates over which its schedule runs."""

  total_steps: int = 1

  def __post_init__(self):
    keys.check(self, "optimizer.")


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
  takes widened ones and `update` rounds what comes back (rounding.store).
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


def updates_applied(state: TrainState):
  """i32 []: updates that the schedule has seen; a skipped step is none."""
  return optax.tree_utils.tree_get(
    state.opt_state,
    "count",
    default=state.step,
    filtering=lambda path, _: any(
      getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path
    ),
  )
