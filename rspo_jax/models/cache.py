"""Keys and values that later forwards read instead of computing.

The sampler drives any cache in the same way, and does not know which it has:

1. `begin` gives what a block starts with.
2. A forward of positions [first, first + `width`) is the model's business
   (`functions.make_denoise_fn`). It attends to what `read` offers beside the
   window itself; one of the whole canvas reads nothing and leaves its keys and
   values to `commit`.

Keys are stored after the rotation: it depends on the position alone, and
positions do not move, so rotating before or after storing is the same. While a
block is filled they are frozen. Source: Fast-dLLM, arXiv 2505.22618.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Uncached:
  """Every forward computes the whole canvas, and none reads another's."""

  reuses: ClassVar[bool] = False  # whether forwards read earlier ones
  static_start: ClassVar[bool] = False  # whether `first` may not be traced
  whole: ClassVar[bool] = True  # whether the next forward is of all positions

  def begin(self):
    """What a block starts with."""
    return self

  def width(self, first, length: int, total: int) -> int:
    """Positions from `first` on that a forward computes for `length` rows."""
    del first, length
    return total


@struct.dataclass
class Dual:
  """Each block reads, of its first forward, all but the block's positions.

  Attributes:
    key, value: [N, n * M, S, Dh], stacked over layers, in the layout that the
      batched matmuls read, so that a step copies nothing; None: the block's
      first forward is still to come.
  """

  key: jax.Array | None = None
  value: jax.Array | None = None

  reuses: ClassVar[bool] = True
  static_start: ClassVar[bool] = False

  @property
  def whole(self) -> bool:
    """Whether the next forward is of all positions."""
    return self.key is None

  def begin(self):
    """What a block starts with: nothing."""
    return type(self)()

  def width(self, first, length: int, total: int) -> int:
    """Positions from `first` on that a forward computes for `length` rows."""
    del first
    return total if self.whole else length

  def commit(self, key, value):
    """The cache after a forward with these keys and values."""
    return type(self)(key, value)

  def read(self, first, width: int):
    """What a window of positions [first, first + width) may attend to.

    Returns:
      ((keys, values) [N, n * M, Sc, Dh] of the positions 0 .. Sc, bool [Sc],
      which of them are the cache's to offer).
    """
    stored = jnp.arange(self.key.shape[2])
    outside = (stored < first) | (stored >= first + width)
    return (self.key, self.value), outside


@struct.dataclass
class Prefix(Dual):
  """Each block reads what lies before it, and computes all that follows."""

  static_start: ClassVar[bool] = True

  def width(self, first, length: int, total: int) -> int:
    """Positions from `first` on that a forward computes for `length` rows."""
    return super().width(first, total - first, total)

  def read(self, first, width: int):
    """As `Dual.read`, of the positions before the window only."""
    del width
    before = (self.key[:, :, :first], self.value[:, :, :first])
    return before, jnp.ones(first, bool)


CACHES = {"none": Uncached, "prefix": Prefix, "dual": Dual}
