"""Jitted functions of a run, called where its mesh and rules are known."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rspo_jax.devices import sharding


@dataclasses.dataclass
class Hook:
  """What a run does around first calls, which compile.

  Attributes:
    around: name -> context of the first call.
  """

  around: Callable[[str], Any] = contextlib.nullcontext


@dataclasses.dataclass
class Compiled:
  """A jitted function with the name that people are shown.

  Attributes:
    name: on the terminal; no two of a program share one.
    fn: jitted.
    mesh: on which it computes.
    hook: of the program.
    called: whether its first call is over, which compiles.
  """

  name: str
  fn: Any
  mesh: jax.sharding.Mesh
  hook: Hook
  called: bool = False

  def __call__(self, *arguments):
    """Its results; those of the first call are waited for."""
    with sharding.active(self.mesh):
      if self.called:
        return self.fn(*arguments)
      with self.hook.around(self.name):
        out = jax.block_until_ready(self.fn(*arguments))
      self.called = True
      return out

  def shapes(self, *arguments):
    """Abstract results, of arguments that may be abstract."""
    with sharding.active(self.mesh):
      return jax.eval_shape(self.fn, *arguments)

  def trace(self, *arguments):
    """The function traced, to be lowered; arguments may be abstract."""
    with sharding.active(self.mesh):
      return self.fn.trace(*arguments)

  @property
  def compilations(self) -> int:
    """How often it was compiled so far."""
    return self.fn._cache_size()


def compiler_options(mesh) -> dict[str, str]:
  """What the compiler of the mesh's devices is told.

  On TPUs it would split the products with gathered weights into pieces that
  travel while they are multiplied; with the split on the contracting axis each
  piece adds to a partial sum, and the modelled step is a third longer.
  """
  if mesh.devices.flat[0].platform != "tpu":
    return {}
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
