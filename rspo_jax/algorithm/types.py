"""What a step computes with: state, batch, and what an objective sees."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class TrainState:
  """What a step changes.

  Attributes:
    step: i32 [], updates so far, skipped ones included.
    params: parameters of the policy.
    opt_state: the optimizer's.
    reference: parameters of a reference that is refreshed from time to time;
      None: it is the model as it was loaded.
  """

  step: jax.Array
  params: object
  opt_state: object
  reference: object = None


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
    row: i32 [N], each sequence's place in the rollout. Masks go by it, so that
      neither the number of shards nor dropped groups change those of a
      sequence.
    commit_step: i32 [N, L], the forward that committed a position, for schemes
      that follow the sampler; else None.
  """

  tokens: jax.Array
  token_mask: jax.Array
  completion_mask: jax.Array
  advantage: jax.Array
  target: jax.Array
  keep: jax.Array
  row: jax.Array
  commit_step: jax.Array | None = None


@struct.dataclass
class Sizes:
  """Means over the kept sequences of the whole batch, f32 [].

  Attributes:
    length: scored tokens.
    rows: rows that score a token, over all masks.
    canvases: canvases that score a token.
  """

  length: jax.Array
  rows: jax.Array
  canvases: jax.Array


@struct.dataclass
class Terms:
  """What an objective sees of N = B * G sequences, groups contiguous.

  Values are scores f32 [N, K], a mask each, nats per token; or, for objectives
  per token, log-probs of rows f32 [N, U, R].

  Attributes:
    policy, reference: values under both; zeros where no reference is used.
    advantage, target: f32 [N].
    length: f32 [N], scored tokens L_i.
    keep: f32 [N], 1 for sequences that count, 0 for dropped groups.
    lambda_: f32 [], of this step.
    old: values under the parameters that sampled; None: they are the policy's.
    count: f32 [N, K], scored tokens of each canvas.
    weight: f32 [N, U, C, R], weight of each row in its canvas's score (objectives
      per token): positive where the row scores a token of the canvas.
    sizes: means over the batch that sequences are divided by.
  """

  policy: jax.Array
  reference: jax.Array
  advantage: jax.Array
  target: jax.Array
  length: jax.Array
  keep: jax.Array
  lambda_: jax.Array | float
  old: jax.Array | None = None
  count: jax.Array | None = None
  weight: jax.Array | None = None
  sizes: Sizes | None = None
