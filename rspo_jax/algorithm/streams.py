"""Random streams of a run: each key is a function of (seed, step) alone."""

import jax

# fold_in(fold_in(root, step), stream).
ROLLOUT, MASKS, EVAL = 0, 1, 2
# Folds beside those that `split` and counts give, so that no key is derived
# twice: of the MASKS key the bits of stochastic rounding of a step and of sums
# of gradients, and the masks of updates after the first; of the ROLLOUT key the
# completions of partial canvases.
_ROUNDING, _SUMMING, _UPDATES = 0x726F756E, 0x73756D6D, 0x75706474
_FINISHES = 0x66696E69


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


def rounding_key(masks_key: jax.Array) -> jax.Array:
  """Key of the bits that round what an update stores."""
  return jax.random.fold_in(masks_key, _ROUNDING)


def summing_key(masks_key: jax.Array) -> jax.Array:
  """Key of the bits that round sums of gradients over micro-batches."""
  return jax.random.fold_in(masks_key, _SUMMING)
