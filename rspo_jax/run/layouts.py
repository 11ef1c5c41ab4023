"""Where the parameters lie while completions are sampled, if elsewhere."""

import dataclasses
import functools
import math
from typing import Any

import jax

from rspo_jax.devices import sharding
from rspo_jax.models import families, lora
from rspo_jax.run import loading
from rspo_jax.run.compiled import compiler_options


@dataclasses.dataclass(frozen=True)
class Layout:
  """Brings arrays where they are wanted, abstract ones too.

  Attributes:
    shardings: where, leaf by leaf.
    fn: jitted, tree -> tree.
  """

  shardings: Any
  fn: Any

  def __call__(self, tree):
    """The tree in its new places."""
    if isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct):
      return loading.placed(tree, self.shardings)
    return self.fn(tree)


def layouts(settings, config, mesh, lora_settings) -> dict[str, Layout]:
  """What lays parameters out for sampling, where that differs."""
  rollout_mesh = sharding.rollout_mesh(mesh, settings.mesh.rollout_tensor)
  if rollout_mesh is mesh:
    return {}
  _check_heads(config, settings.mesh.rollout_tensor)

  def layout(places):
    before, after = places(mesh), places(rollout_mesh)
    moved = functools.partial(_laid_out, rollout_mesh, before)
    jitted = jax.jit(
      moved, out_shardings=after, compiler_options=compiler_options(mesh)
    )
    return Layout(after, jitted)

  found = {"lay_out": layout(lambda mesh: loading.shardings(mesh, config))}
  if lora_settings is not None:
    boxed = jax.eval_shape(
      functools.partial(lora.boxed, config, lora_settings), jax.random.key(0)
    )
    found["lay_out_adapter"] = layout(
      lambda mesh: sharding.shardings(mesh, boxed)
    )
  return found


def _laid_out(mesh, shardings, tree):
  """The tree on its way from training's shardings to those of `mesh`."""

  def moved(leaf, where):
    for stop in sharding.waypoints(mesh, where, leaf.shape):
      leaf = jax.lax.with_sharding_constraint(leaf, stop)
    return leaf

  return jax.tree.map(moved, tree, shardings)


def _check_heads(config: families.ModelConfig, tensor: int) -> None:
  """Refuses to split what does not divide, which would stay whole unasked."""
  if config.kv_heads % tensor:
    raise ValueError(
      f"mesh.rollout_tensor={tensor} must divide the {config.kv_heads} heads "
      f"of keys and values; use {math.gcd(tensor, config.kv_heads)}."
    )
