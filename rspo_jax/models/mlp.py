"""What follows attention in a layer: (x [rows, D], stream) -> [rows, D].

A module here shares the scope of its `Block`: its parameters are named as if
they were the layer's own.
"""

import functools

import flax.linen as nn
from jax.sharding import Mesh

from rspo_jax.models.families import ModelConfig
from rspo_jax.models.layers import POLICY, Dense


class DenseMLP(nn.Module):
  """D(silu(G x) * U x), the same for every token."""

  config: ModelConfig
  mesh: Mesh | None = None

  def setup(self):
    config = self.config
    dense = functools.partial(
      Dense, config, use_bias=config.linear_bias, mesh=self.mesh
    )
    self.gate = dense(config.mlp_width, ("embed", "mlp"))
    self.up = dense(config.mlp_width, ("embed", "mlp"))
    self.down = dense(config.width, ("mlp", "embed"))

  def __call__(self, x, stream: str = POLICY):
    gate, up = self.gate(x, stream), self.up(x, stream)
    return self.down(nn.silu(gate) * up, stream)


MLPS = {"dense": DenseMLP}
