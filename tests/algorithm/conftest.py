"""What the tests of the algorithm share."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
  """Most of the time of these tests would go into optimising programs."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
