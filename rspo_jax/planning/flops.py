"""FLOPs: what a program executes, and what a step needs.

1. `executed` walks a jaxpr and counts two FLOPs a multiply-add of every
   matmul, loops as often as they run. Elementwise work and hand-written
   kernels without a matmul in the jaxpr are not counted.
2. `forward_flops`, `adapter_flops` and `useful_update` count by hand what a
   step cannot do without: recomputation, padding and idle rows are not in it.

XLA's own count is of no use here: it counts the body of a loop once.
"""

import math

import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval


def executed(jaxpr, unknown_trips: int = 1) -> float:
  """FLOPs of all matmuls of a jaxpr, over the whole mesh.

  Args:
    jaxpr: closed or open, as `jax.jit(f).trace(...).jaxpr` gives it.
    unknown_trips: how often a loop runs whose bound is computed on the device.

  Returns:
    FLOPs of one call; of a branch, the dearest. What no result depends on is
    not counted, since no compiler leaves it in.
  """
  if hasattr(jaxpr, "jaxpr"):
    jaxpr = jaxpr.jaxpr
  # A rule for derivatives computes those of frozen weights, too.
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return sum(_of_equation(eqn, unknown_trips) for eqn in jaxpr.eqns)


def _of_equation(eqn, unknown_trips: int) -> float:
  """FLOPs of one equation with all that it calls."""
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return _matmul(eqn)
  if name == "scan":
    return params["length"] * executed(params["jaxpr"], unknown_trips)
  if name == "while":
    trips = _trips(params["cond_jaxpr"].jaxpr)
    trips = unknown_trips if trips is None else trips
    # An inner loop of unknown length runs within the outer one's turns.
    return trips * executed(params["body_jaxpr"], unknown_trips)
  if name == "cond":
    return max(executed(branch, unknown_trips) for branch in params["branches"])
  inside = sum(executed(inner, unknown_trips) for inner in _inner(params))
  if name == "shard_map":
    # Its shapes are those of one device.
    inside *= math.prod(params["mesh"].shape.values())
  if name == "pallas_call":
    cost = params.get("cost_estimate")
    if cost is not None:
      return float(cost.flops)
    # Its body is that of one place of the grid.
    return inside * math.prod(params["grid_mapping"].grid)
  return inside


def _inner(params):
  """Jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
        yield item


def _matmul(eqn) -> float:
  """2 x batch x rows x columns x contracted."""
  left = eqn.invars[0].aval.shape
  out = eqn.outvars[0].aval.shape
  (contract, _), _ = eqn.params["dimension_numbers"]
  return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contract)


def _trips(condition) -> int | None:
  """Turns of a loop whose condition compares its counter with a literal.

  The counter is taken to start at 0 and to go up by 1; of several conditions
  joined by "and" the comparison bounds the others. None: the bound is not in
  the condition.
  """
  bounds = [
    int(np.asarray(var.val))
    for eqn in condition.eqns
    if eqn.primitive.name == "lt"
    for var in eqn.invars[1:]
    if isinstance(var, core.Literal)
  ]
  return bounds[0] if bounds else None


def forward_flops(config, sequences: int, length: int, head_rows: int) -> float:
  """FLOPs of one forward pass: projections, attention, head.

  Args:
    config: `ModelConfig`.
    sequences, length: n and S.
    head_rows: rows of all sequences together at which the head is evaluated.
  """
  kv_width = config.kv_heads * config.head_dim
  layer = 2 * config.width * (config.width + kv_width)
  layer += 3 * config.width * config.mlp_width
  attention = 2 * length * config.width
  per_token = config.layers * (layer + attention)
  head = config.width * config.vocab_size
  return 2.0 * (sequences * length * per_token + head_rows * head)


def adapter_flops(kernels, rank: int, tokens: int) -> float:
  """FLOPs of a forward pass through low-rank adapters.

  Args:
    kernels: shapes [..., in, out] of the adapted kernels, layers in front.
    rank: r.
    tokens: rows that pass through each.
  """
  per_token = sum(
    math.prod(shape[:-2]) * rank * (shape[-2] + shape[-1]) for shape in kernels
  )
  return 2.0 * tokens * per_token


def useful_update(
  config, sequences: int, length: int, head_rows: int, adapter: float = 0.0
) -> float:
  """FLOPs that the gradient of a batch needs, without recomputation.

  All parameters: a forward pass and twice as much backward, one half for the
  activations and one for the weights. Adapters: the frozen weights have no
  gradient of their own, so the base costs a forward pass and as much backward,
  and the adapters three times theirs.

  Args:
    config: `ModelConfig`.
    sequences: forward passes of the batch, N x K.
    length: S.
    head_rows: as in `forward_flops`.
    adapter: FLOPs of the adapters' forward pass, 0 where all is trained.
  """
  forward = forward_flops(config, sequences, length, head_rows)
  if not adapter:
    return 3.0 * forward
  # Attention has no weights to be frozen: both its backward halves remain.
  attention = 4.0 * config.layers * sequences * length**2 * config.width
  return 2.0 * forward + attention + 3.0 * adapter
