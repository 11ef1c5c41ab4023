"""What a masked-diffusion transformer is, and how a config.json is read.

A family differs from another in configuration data (ids, biases, kv heads,
rope theta, norm epsilon) and in one behaviour: whether row j of the logits
predicts token j (LLaDA) or token j + 1 (Dream). Both live in `ModelConfig`;
sampler, likelihood and objectives never mention a family. What else a family
is, the words of its files, is one `Family` in a file of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rspo_jax.config import keys

COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("einsum", "flash")

# Far beyond any model, and small enough that a config.json from elsewhere can
# neither overflow the sizes of arrays nor make a list of layers without end.
MAX_WIDTH = 2**20
MAX_ROWS = 2**24
_MOST = {"layers": 2**12, "vocab_size": MAX_ROWS, "max_length": 2**31 - 1}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and behaviour of one transformer; hashable, static under jit.

  Attributes:
    family: key of `families.FAMILIES`.
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
    attention: "einsum" or "flash" (models/attention.py).
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
    if self.width % self.heads:
      raise ValueError(
        f"width={self.width} must be a multiple of heads={self.heads}."
      )
    if self.head_dim % 2:
      raise ValueError(
        f"width={self.width} / heads={self.heads} must be even: positions turn "
        "pairs of a head's dimensions."
      )
    if self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}."
      )
    keys.one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
    keys.one_of("attention", self.attention, ATTENTIONS)
    for name in ("mask_id", "eos_id", "pad_id"):
      value = getattr(self, name)
      if not 0 <= value < self.vocab_size:
        raise ValueError(
          f"{name}={value} lies outside the vocabulary of {self.vocab_size}; "
          "correct it in the checkpoint's config.json."
        )


class CheckpointError(ValueError):
  """A checkpoint that cannot be read, and what to do about it."""


class UnsupportedConfig(CheckpointError):
  """A config.json that asks for what this transformer does not compute."""


class Fields:
  """Keys of a config.json, with errors that name key, value and remedy."""

  def __init__(self, config: Mapping[str, Any]):
    self.source = config

  def get(self, key: str):
    """The value of a key that must be there."""
    if key not in self.source:
      if {"objective", "rollout", "run"} <= self.source.keys():
        raise UnsupportedConfig(
          "config.json is that of a run of rspo_jax, not of a model; its model "
          "is in the folder model/ beside it, once the run is finished."
        )
      raise UnsupportedConfig(
        f"config.json has no {key}, which changes what the model computes; "
        "add it (defaults of the original code are not assumed)."
      )
    return self.source[key]

  def refuse(self, key: str, supported: str) -> UnsupportedConfig:
    """The error for a value that is not supported."""
    return UnsupportedConfig(
      f"config.json: {key}={self.source.get(key)!r:.120} is not supported; "
      f"{supported} can be computed here."
    )

  def count(self, key: str, most: int = MAX_WIDTH) -> int:
    """A positive whole number; beyond `most` the arithmetic of sizes ends."""
    value = self.get(key)
    if type(value) is not int or not 1 <= value <= most:
      raise self.refuse(key, f"only a whole number from 1 to {most}")
    return value

  def positive(self, key: str) -> float:
    """A positive number that float32 holds, and its square."""
    value = self.get(key)
    if type(value) not in (int, float) or not 1e-18 < value < 1e18:
      raise self.refuse(key, "only a positive number")
    return float(value)

  def switch(self, key: str, null: bool | None = None) -> bool:
    """True or false; null means `null` where that is given."""
    value = self.get(key)
    if value is None and null is not None:
      return null
    if type(value) is not bool:
      raise self.refuse(key, "only true or false")
    return value

  def plain(self, field_by_key: Mapping[str, str]) -> dict[str, Any]:
    """ModelConfig's values under keys that say the same in other words."""
    kinds = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    values = {}
    for key, field in field_by_key.items():
      if kinds[field] is int:
        values[field] = self.count(key, _MOST.get(field, MAX_WIDTH))
      elif kinds[field] is bool:
        values[field] = self.switch(key)
      else:
        values[field] = self.positive(key)
    return values

  def rotary_base(self) -> float:
    """The base of the rotation, from whichever keys give it.

    transformers 5 writes `rope_parameters` in place of `rope_theta` and
    `rope_scaling`, and reads it before them.
    """
    bases = {}
    for key in ("rope_parameters", "rope_scaling"):
      rules = self.source.get(key)
      if rules is None:
        continue
      plain = isinstance(rules, Mapping) and all(
        name == "rope_theta"
        or (name in ("rope_type", "type") and value == "default")
        for name, value in rules.items()
      )
      if not plain:
        raise self.refuse(
          key, "only rope_theta and the rope_type 'default' in it"
        )
      if "rope_theta" in rules:
        bases[f"{key}.rope_theta"] = Fields(rules).positive("rope_theta")
    if "rope_theta" in self.source or not bases:
      bases["rope_theta"] = self.positive("rope_theta")
    if len(set(bases.values())) > 1:
      told = " but ".join(f"{key}={value:g}" for key, value in bases.items())
      raise UnsupportedConfig(
        f"config.json: {told}; programs differ in which one they read, so keep "
        "the one that the model was trained with."
      )
    return next(iter(bases.values()))

  def only(self, key: str, supported) -> None:
    """Refuses all values but this one."""
    value = self.get(key)
    if value != supported or isinstance(value, bool) != isinstance(
      supported, bool
    ):
      raise self.refuse(key, f"only {supported!r}")


@dataclasses.dataclass(frozen=True)
class Family:
  """What checkpoints of a family say, and in which words.

  Attributes:
    model_type: of config.json.
    read: config.json -> ModelConfig's values; rotation, norm epsilon and ids are read
      for all families alike.
    field_by_key: what config.json says of a model, for writing it.
    fixed: its other keys and their values, the same for all models.
    modules: weight table: name of a module in the checkpoint -> path in the
      parameters. Each axis in braces, as in `blocks.{layer}.q_proj`, is a
      leading axis of the stacked parameter, in this order.
    mask_token: how the released tokenizers spell it.
    published: shapes of released checkpoints, for planning a run without
      their files; a run itself reads them from the folder.
  """

  model_type: str
  read: Callable[[Fields], dict[str, Any]]
  field_by_key: Mapping[str, str]
  fixed: Mapping[str, Any]
  modules: Mapping[str, tuple[str, ...]]
  mask_token: str
  published: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict)
