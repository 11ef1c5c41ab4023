"""LLaDA's forward pass and block-wise decoding in plain PyTorch.

What a reader of the papers would write: one module, full float32 forward
passes of the whole canvas, no cache, no Python where a tensor operation does.
Only for comparison (benchmarks/sampler.py); `torch` is no requirement.
"""

import torch
from torch.nn import functional

from rspo_jax.models.families import ModelConfig


class Llada:
  """A LLaDA model on the weights of our parameter tree.

  Args:
    config: without biases, norms of queries or tied embeddings.
    params: the tree of `rspo_jax.models.transformer`.
  """

  def __init__(self, config: ModelConfig, params):
    self.config = config
    as_tensor = torch.tensor
    layers = params["layers"]
    self.embedding = as_tensor(params["embed"]["embedding"])
    self.head = as_tensor(params["head"]["kernel"].T.copy())
    self.norm = as_tensor(params["final_norm"]["scale"])
    self.layers = [
      {
        # [out, in], as torch's own layers store them.
        name: as_tensor(next(iter(module.values()))[i].T.copy())
        for name, module in layers.items()
      }
      for i in range(config.layers)
    ]

  def _normed(self, x, scale):
    return functional.rms_norm(x, (x.shape[-1],), scale, self.config.norm_eps)

  def _rope(self, length: int):
    half = self.config.head_dim // 2
    rates = self.config.rope_theta ** (-torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * rates
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()

  def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [n, S, V] of tokens [n, S]."""
    config = self.config
    n, length = tokens.shape
    cos, sin = self._rope(length)

    def heads(x, count):
      return x.view(n, length, count, config.head_dim).transpose(1, 2)

    def rotated(x):
      first, second = x.chunk(2, -1)
      return x * cos + torch.cat([-second, first], -1) * sin

    x = functional.embedding(tokens, self.embedding)
    for layer in self.layers:
      h = self._normed(x, layer["attention_norm"])
      q = rotated(heads(functional.linear(h, layer["query"]), config.heads))
      k = rotated(heads(functional.linear(h, layer["key"]), config.kv_heads))
      v = heads(functional.linear(h, layer["value"]), config.kv_heads)
      out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
      out = out.transpose(1, 2).reshape(n, length, config.width)
      x = x + functional.linear(out, layer["out"])
      h = self._normed(x, layer["mlp_norm"])
      gate = functional.silu(functional.linear(h, layer["gate"]))
      up = functional.linear(h, layer["up"])
      x = x + functional.linear(gate * up, layer["down"])
    return functional.linear(self._normed(x, self.norm), self.head)


@torch.inference_mode()
def generate(
  model: Llada,
  prompts: torch.Tensor,
  gen_length: int,
  steps: int,
  block_length: int,
) -> torch.Tensor:
  """Completes prompts greedily, the most confident positions first.

  Args:
    model: the network.
    prompts: i64 [n, P].
    gen_length, steps, block_length: as in `rspo_jax.generate`; the steps of a
      block divide its length here.

  Returns:
    i64 [n, P + gen_length].
  """
  n, prompt_length = prompts.shape
  mask_id = model.config.mask_id
  blank = prompts.new_full((n, gen_length), mask_id)
  x = torch.cat([prompts, blank], 1)
  blocks = gen_length // block_length
  count = block_length // (steps // blocks)
  for block in range(blocks):
    end = prompt_length + (block + 1) * block_length
    for _ in range(steps // blocks):
      logits = model(x)
      token = logits.argmax(-1)
      p = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
      p = p.masked_fill(x != mask_id, -torch.inf)
      p[:, end:] = -torch.inf
      chosen = p.topk(count, 1).indices
      x.scatter_(1, chosen, token.gather(1, chosen))
  return x
