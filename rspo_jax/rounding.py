"""Float32 values in bfloat16 storage, rounded so that none is lost on average.

A step of 1e-6 on a weight of 0.02 is a hundredth of the distance to the next
bfloat16: rounded to nearest it disappears, every time. Rounded up with a
probability of one in a hundred it arrives on average:

    P(up) = (x - below) / (above - below),   E[rounded] = x

1. A float32 is a bfloat16 with 16 more bits of mantissa. Adding 16 random bits
   to them and cutting them off carries into the bits above with exactly that
   probability, whatever sign and exponent are.
2. The bits of an element are a function of key, leaf and its index in the whole
   array: neither the mesh nor the number of processes changes them.

Source: stochastic rounding, Gupta et al., arXiv 1502.02551, section 3.
"""

import jax
import jax.numpy as jnp


def stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds f32 [...] to a neighbouring bfloat16 [...], without bias.

  What is not finite, and what a bfloat16 holds already, stays as it is.
  """
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  rounded = jax.lax.bitcast_convert_type(
    (bits >> 16).astype(jnp.uint16), jnp.bfloat16
  )
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def widen(tree):
  """Floating leaves in float32; others as they are."""
  return jax.tree.map(
    lambda x: (
      x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    ),
    tree,
  )


def add(total, new, key: jax.Array):
  """Sum of two trees in the dtypes of the first; what is lost is made up for.

  In bfloat16 the sum is rounded stochastically: a summand of less than half of
  the distance to the next number arrives on average.

  Args:
    total: tree of floating leaves.
    new: tree of the same shapes.
    key: of this addition alone.
  """
  sums = jax.tree.map(jnp.add, widen(total), widen(new))
  return store(sums, total, key)


def store(values, like, key: jax.Array):
  """Values in the dtypes of a tree of the same structure.

  Args:
    values: tree; floating leaves in float32.
    like: tree whose dtypes are wanted: float32 as it is, bfloat16 rounded
      stochastically.
    key: a function of (seed, step).
  """
  leaves, structure = jax.tree.flatten(values)
  stored = [
    stochastic(x, jax.random.fold_in(key, index))
    if old.dtype == jnp.bfloat16 and x.dtype == jnp.float32
    else x.astype(old.dtype)
    for index, (x, old) in enumerate(
      zip(leaves, jax.tree.leaves(like), strict=True)
    )
  ]
  return structure.unflatten(stored)
