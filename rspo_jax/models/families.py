"""What a masked-diffusion transformer is, and what its families differ in.

A family differs from another in configuration data (ids, biases, kv heads,
rope theta, norm epsilon) and in one behaviour: whether row j of the logits
predicts token j (LLaDA) or token j + 1 (Dream). Both live here and in
`transformer.py`; sampler, likelihood and objectives never mention a family.
"""

import dataclasses

FAMILIES = ("llada", "dream")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("einsum", "flash")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and behaviour of one transformer; hashable, static under jit.

  Attributes:
    family: "llada" or "dream".
    vocab_size: rows of the embedding = columns of the logits, V.
    width: model width D; `heads * head_dim` may not differ from it.
    layers, heads, kv_heads, mlp_width: counts and the SwiGLU width.
    rope_theta, norm_eps: rotary base and RMSNorm epsilon.
    mask_id, eos_id, pad_id: ids of the checkpoint, never constants of ours.
    max_length: longest sequence the checkpoint was made for, tokens.
    qkv_bias, linear_bias, norm_bias: biases on q/k/v; on the other matrices;
      on the norms.
    qk_norm: RMSNorm over the projected queries and keys, before the heads
      are split.
    scale_logits: logits are divided by sqrt(D).
    scale_embedding: embeddings are multiplied by sqrt(D).
    tie_embeddings: the head is the transposed embedding.
    logit_shift: row j of the raw logits predicts token j + 1 (Dream).
    compute_dtype: dtype of matmul inputs; norms, rotary angles, attention
      weights and log-probs are float32 whatever it says.
    remat: recompute each layer's activations in the backward pass.
    attention: "einsum" or "flash".
    head_chunks: pieces in which the vocabulary-sized head is evaluated.
  """

  family: str
  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  mlp_width: int
  rope_theta: float
  norm_eps: float
  mask_id: int
  eos_id: int
  pad_id: int
  max_length: int
  qkv_bias: bool = False
  linear_bias: bool = False
  norm_bias: bool = False
  qk_norm: bool = False
  scale_logits: bool = False
  scale_embedding: bool = False
  tie_embeddings: bool = False
  logit_shift: bool = False
  compute_dtype: str = "float32"
  remat: bool = False
  attention: str = "einsum"
  head_chunks: int = 1

  @property
  def head_dim(self) -> int:
    """Width of one head."""
    return self.width // self.heads

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise ValueError(f"family={self.family!r} must be one of {FAMILIES}.")
    if self.width % self.heads:
      raise ValueError(
        f"width={self.width} must be a multiple of heads={self.heads}."
      )
    if self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}."
      )
    if self.compute_dtype not in COMPUTE_DTYPES:
      raise ValueError(
        f"compute_dtype={self.compute_dtype!r} must be one of {COMPUTE_DTYPES}."
      )
    if self.attention not in ATTENTIONS:
      raise ValueError(
        f"attention={self.attention!r} must be one of {ATTENTIONS}."
      )
    for name in ("mask_id", "eos_id", "pad_id"):
      value = getattr(self, name)
      if not 0 <= value < self.vocab_size:
        raise ValueError(
          f"{name}={value} lies outside the vocabulary of {self.vocab_size}; "
          "correct it in the checkpoint's config.json."
        )
