"""How a batch is cut into micro-batches, each over all devices."""

import dataclasses

import jax
import jax.numpy as jnp

from rspo_jax.config import keys, schema

PASSES = ("auto", "one", "two")


@dataclasses.dataclass(frozen=True)
class StepSettings(schema.Train):
  """How a batch is cut, with the devices over which sequences are split.

  `passes` "auto" is one pass where the centring set fits a micro-batch.
  """

  shards: int = 1

  def __post_init__(self):
    keys.check(self, "train.")


class MicroBatches:
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
