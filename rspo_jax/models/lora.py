"""Low-rank adapters: a small difference added to frozen projections.

    y = x W + scale (x A) B,   A [in, r] random, B [r, out] zero at the start

1. `init` makes A and B for the projections that are named, stacked over
   layers like the kernels; the start is the base model exactly, since B = 0.
2. `attach` hangs them beside the kernels for a forward pass. Nothing of the
   base is copied: policy and reference share it, and the reference is the
   base with the initial adapter, or without one.
   `Adapted` carries base and adapter to the functions of the model.
3. `merge` adds the difference into the kernels, for export as full weights.

Source: LoRA, arXiv 2106.09685; scale alpha / r, or alpha / sqrt(r) with
`rslora` (arXiv 2312.03732). A starts as PEFT starts it: uniform within
+- 1 / sqrt(in). There is no dropout: scores of policy and reference are
compared, and dropout would make them differ before anything was learned.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from rspo_jax.models import layers, transformer
from rspo_jax.models.families import ModelConfig

# The projections of a layer by their parameter names; "head" is the last map.
PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
TARGETS = (*PROJECTIONS, "head")


@dataclasses.dataclass(frozen=True)
class LoraSettings:
  """Which projections are adapted and how; static under jit.

  Attributes:
    rank: r, columns of A.
    alpha: numerator of the scale.
    targets: names out of `TARGETS`.
    rslora: the scale is alpha / sqrt(r) instead of alpha / r.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = PROJECTIONS
  rslora: bool = False

  @property
  def scale(self) -> float:
    """Factor of (x A) B."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  def __post_init__(self):
    if type(self.rank) is not int or self.rank < 1:
      raise ValueError(f"lora.rank={self.rank!r} must be a positive number.")
    if not 0 < self.alpha < math.inf:
      raise ValueError(f"lora.alpha={self.alpha} must be positive and finite.")
    unknown = [t for t in self.targets if t not in TARGETS]
    if unknown or not self.targets:
      raise ValueError(
        f"lora.targets={self.targets} must name some of {TARGETS}"
        + (f"; {unknown[0]!r} is none of them." if unknown else ".")
      )
    if len(set(self.targets)) < len(self.targets):
      raise ValueError(f"lora.targets={self.targets} names one twice.")


@struct.dataclass
class Adapted:
  """Parameters of an adapted model, in parts.

  Attributes:
    base: the frozen parameters; several `Adapted` share them.
    adapter: as `init` makes it; None: the base alone.
    reference: adapter of the second stream, the reference's; None: the base.
    scale: `LoraSettings.scale` of both.
  """

  base: Any
  adapter: Any = None
  reference: Any = None
  scale: float = struct.field(pytree_node=False, default=1.0)


def weights(params):
  """What the model computes with: a tree as it is, `Adapted` attached."""
  if not isinstance(params, Adapted):
    return params
  tree = params.base
  for stream, adapter in (
    (layers.POLICY, params.adapter),
    (layers.REFERENCE, params.reference),
  ):
    if adapter is not None:
      tree = attach(tree, adapter, params.scale, stream)
  return tree


def kernel_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of the kernel of each target the model has, layers in front."""
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  found = {name: shapes["layers"][name]["kernel"].shape for name in PROJECTIONS}
  if "head" in shapes:
    found["head"] = shapes["head"]["kernel"].shape
  return found


def init(config: ModelConfig, settings: LoraSettings, key: jax.Array):
  """A new adapter, which changes nothing yet.

  Args:
    config: the model.
    settings: rank and targets.
    key: PRNG key; each target draws from its own fold, so that another target
      more or less leaves the draws of the others.

  Returns:
    {"layers": {target: {"a": f32 [N, in, r], "b": f32 [N, r, out]}}}, and
    "head" beside "layers", without the leading axis, where it is a target.

  Raises:
    ValueError: a head as target where the embedding is tied.
  """
  shapes = kernel_shapes(config)
  adapter = {}
  for target in settings.targets:
    if target not in shapes:
      raise ValueError(
        f"lora.targets has {target!r}, but the model's head is its embedding; "
        "leave it out."
      )
    *stack, inputs, outputs = shapes[target]
    bound = 1 / math.sqrt(inputs)
    pair = {
      "a": jax.random.uniform(
        jax.random.fold_in(key, TARGETS.index(target)),
        (*stack, inputs, settings.rank),
        minval=-bound,
        maxval=bound,
      ),
      "b": jnp.zeros((*stack, settings.rank, outputs)),
    }
    _group(adapter, target)[target] = pair
  return adapter


def boxed(config: ModelConfig, settings: LoraSettings, key: jax.Array):
  """`init` in Linen's boxes with the logical axis names, for shardings."""
  return jax.tree.map(
    nn.LogicallyPartitioned,
    init(config, settings, key),
    logical_axes(settings),
  )


def attach(params, adapter, scale: float, stream: str = layers.POLICY):
  """Parameters with the adapter beside the kernels it adds to.

  Args:
    params: the base, shared and not copied.
    adapter: as `init` makes it.
    scale: `LoraSettings.scale`; goes into B where it is multiplied, so that
      gradients with respect to the adapter carry it.
    stream: which stream of activations passes through it.

  Returns:
    A tree like params in which an adapted projection also holds "lora_a"
    [..., in, r], "lora_b" [..., r, out] and "lora_scale" f32 [...], or the
    three by the name of "reference".
  """

  def beside(kernel, pair):
    scales = jnp.full(kernel.shape[:-2], scale, jnp.float32)
    return {
      f"{stream}_a": pair["a"],
      f"{stream}_b": pair["b"],
      f"{stream}_scale": scales,
    }

  return _join(params, adapter, beside)


def merge(params, adapter, scale: float):
  """Full weights: kernel + scale A B, summed in float32.

  Args:
    params: the base; leaves without adapter are returned as they are.
    adapter: as `init` makes it.
    scale: `LoraSettings.scale`.

  Returns:
    A tree like params, each leaf in its dtype.
  """

  def added(kernel, pair):
    a, b = (pair[name].astype(jnp.float32) for name in ("a", "b"))
    delta = jnp.matmul(a, b, precision="highest") * scale
    return {"kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}

  return _join(params, adapter, added)


def logical_axes(settings: LoraSettings):
  """Logical axis names of an adapter's leaves, for shardings."""
  kernels = {
    "out": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "head": (None, "head_vocab"),
  }
  axes = {}
  for target in settings.targets:
    a, b = layers.adapter_axes(kernels.get(target, ("embed", "heads")))
    stack = () if target == "head" else ("layers",)
    _group(axes, target)[target] = {"a": (*stack, *a), "b": (*stack, *b)}
  return axes


def _group(tree, target: str):
  """The dict that holds a target's entry: "layers", or the tree itself."""
  return tree if target == "head" else tree.setdefault("layers", {})


def _join(params, adapter, combine):
  """Copies the dicts down to adapted projections and updates those."""
  result = {**params, "layers": dict(params["layers"])}
  for target in TARGETS:
    holder = adapter if target == "head" else adapter.get("layers", {})
    if target not in holder:
      continue
    pair = holder[target]
    group = _group(result, target)
    module = group[target]
    group[target] = {**module, **combine(module["kernel"], pair)}
  return result
