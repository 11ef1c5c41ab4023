"""What a masked-diffusion transformer is, and what its families differ in.

A family differs from another in configuration data (ids, biases, kv heads,
rope theta, norm epsilon) and in one behaviour: whether row j of the logits
predicts token j (LLaDA) or token j + 1 (Dream). Both live here and in
`transformer.py`; sampler, likelihood and objectives never mention a family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

FAMILIES = ("llada", "dream")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("einsum", "flash")

# Far beyond any model, and small enough that a config.json from elsewhere can
# neither overflow the sizes of arrays nor make a list of layers without end.
MAX_LAYERS = 2**12
MAX_WIDTH = 2**20
MAX_ROWS = 2**24
MAX_LENGTH = 2**31 - 1


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
    if self.family not in FAMILIES:
      raise ValueError(f"family={self.family!r} must be one of {FAMILIES}.")
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


class CheckpointError(ValueError):
  """A checkpoint that cannot be read, and what to do about it."""


class UnsupportedConfig(CheckpointError):
  """A config.json that asks for what this transformer does not compute."""


def from_hf(
  config: Mapping[str, Any], ids: Mapping[str, int] | None = None
) -> ModelConfig:
  """Translates a checkpoint's config.json.

  Every key that changes the computation is honoured or refused by name; one
  that is missing is an error, because the defaults of the original classes
  are those of other models. Dropout rates act in the original's training
  only and are passed over.

  Args:
    config: config.json as read.
    ids: `mask_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer,
      taken where config.json leaves them out or null.

  Raises:
    UnsupportedConfig: with key, value and remedy.
  """
  fields = _Fields(config)
  kind = fields.get("model_type")
  readers = {"llada": _from_llada, "Dream": _from_dream}
  if not isinstance(kind, str) or kind not in readers:
    raise UnsupportedConfig(
      f"config.json: model_type={kind!r:.80} is not known; supported are "
      f"{sorted(readers)}."
    )
  for key, neutral in _ONLY_NEUTRAL.items():
    if key in config and config[key] not in neutral:
      raise fields.refuse(key, f"only {' or '.join(map(repr, neutral))}")
  values = readers[kind](fields)
  for role in ("mask", "eos", "pad"):
    key = f"{role}_token_id"
    value = config.get(key)
    if value is None:
      value = (ids or {}).get(key)
    if value is None:
      raise UnsupportedConfig(
        f"config.json has no {key}, and no tokenizer says which token it is; "
        f"add {key} to config.json."
      )
    if type(value) is not int or not 0 <= value < values["vocab_size"]:
      raise fields.refuse(
        key, f"one id below the {values['vocab_size']} rows of the embedding"
      )
    values[f"{role}_id"] = value
  try:
    return ModelConfig(**values)
  except UnsupportedConfig:
    raise
  except ValueError as error:
    raise UnsupportedConfig(f"config.json: {error}") from error


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """The config.json that `from_hf` reads back as this model."""
  if config.family == "llada":
    return {
      **_LLADA_FIXED,
      "d_model": config.width,
      "n_layers": config.layers,
      "n_heads": config.heads,
      "n_kv_heads": config.kv_heads,
      "mlp_hidden_size": config.mlp_width,
      "vocab_size": config.vocab_size,
      "embedding_size": config.vocab_size,
      "max_sequence_length": config.max_length,
      "rope_theta": config.rope_theta,
      "rms_norm_eps": config.norm_eps,
      "include_bias": config.linear_bias,
      "include_qkv_bias": config.qkv_bias,
      "bias_for_layer_norm": config.norm_bias,
      "attention_layer_norm": config.qk_norm,
      "scale_logits": config.scale_logits,
      "input_emb_norm": config.scale_embedding,
      "weight_tying": config.tie_embeddings,
      "mask_token_id": config.mask_id,
      "eos_token_id": config.eos_id,
      "pad_token_id": config.pad_id,
    }
  return {
    **_DREAM_FIXED,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "intermediate_size": config.mlp_width,
    "vocab_size": config.vocab_size,
    "max_position_embeddings": config.max_length,
    "rope_theta": config.rope_theta,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "mask_token_id": config.mask_id,
    "eos_token_id": config.eos_id,
    "pad_token_id": config.pad_id,
  }


# What this transformer is, in the words of the two configs.
_LLADA_FIXED = {
  "model_type": "llada",
  "architectures": ["LLaDAModelLM"],
  "auto_map": {
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    "AutoModel": "modeling_llada.LLaDAModelLM",
  },
  "activation_type": "silu",
  "alibi": False,
  "attention_dropout": 0.0,
  "attention_layer_norm_with_affine": True,
  "block_group_size": 1,
  "block_type": "llama",
  "embedding_dropout": 0.0,
  "flash_attention": False,
  "layer_norm_type": "rms",
  "layer_norm_with_affine": True,
  "mlp_ratio": 4,
  "multi_query_attention": None,
  "residual_dropout": 0.0,
  "rope": True,
  "rope_full_precision": True,
  "use_cache": False,
}
_DREAM_FIXED = {
  "model_type": "Dream",
  "architectures": ["DreamModel"],
  "auto_map": {
    "AutoConfig": "configuration_dream.DreamConfig",
    "AutoModel": "modeling_dream.DreamModel",
  },
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "rope_scaling": None,
  "sliding_window": None,
  "use_cache": True,
  "use_mrope": False,
  "use_sliding_window": False,
}

# Keys of relatives of these models: absent from the two families' configs,
# and not computed here, so that only a value that switches them off passes.
_ONLY_NEUTRAL = {
  "clip_qkv": (None,),
  "norm_after": (None, False),
  "residual_scale": (None, 1, 1.0),
  "residual_multiplier": (None, 1, 1.0),
  "embedding_multiplier": (None, 1, 1.0),
  "attention_multiplier": (None,),
  "logits_scaling": (None, 1, 1.0),
  "logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "attn_logit_softcapping": (None,),
  "emb_init_std": (None,),
  "scale_emb_init": (None, False),
  "partial_rotary_factor": (None, 1, 1.0),
  "quantization_config": (None,),
  "num_experts": (None, 0),
}


class _Fields:
  """Keys of a config.json, with errors that name key, value and remedy."""

  def __init__(self, config: Mapping[str, Any]):
    self._config = config

  def get(self, key: str):
    """The value of a key that must be there."""
    if key not in self._config:
      if {"objective", "rollout", "run"} <= self._config.keys():
        raise UnsupportedConfig(
          "config.json is that of a run of rspo_jax, not of a model; its model "
          "is in the folder model/ beside it, once the run is finished."
        )
      raise UnsupportedConfig(
        f"config.json has no {key}, which changes what the model computes; "
        "add it (defaults of the original code are not assumed)."
      )
    return self._config[key]

  def refuse(self, key: str, supported: str) -> UnsupportedConfig:
    """The error for a value that is not supported."""
    return UnsupportedConfig(
      f"config.json: {key}={self._config.get(key)!r:.120} is not supported; "
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

  def rotary_base(self) -> float:
    """The base of the rotation, from whichever keys give it.

    transformers 5 writes `rope_parameters` in place of `rope_theta` and
    `rope_scaling`, and reads it before them.
    """
    bases = {}
    for key in ("rope_parameters", "rope_scaling"):
      rules = self._config.get(key)
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
        bases[f"{key}.rope_theta"] = _Fields(rules).positive("rope_theta")
    if "rope_theta" in self._config or not bases:
      bases["rope_theta"] = self.positive("rope_theta")
    if len(set(bases.values())) > 1:
      told = " but ".join(f"{key}={value:g}" for key, value in bases.items())
      raise UnsupportedConfig(
        f"config.json: {told}; programs differ in which one they read, so keep "
        "the one that the model was trained with."
      )
    return next(iter(bases.values()))

  def only(self, key: str, *supported) -> None:
    """Refuses all values but these."""
    value = self.get(key)
    if value not in supported or isinstance(value, bool) != isinstance(
      supported[0], bool
    ):
      raise self.refuse(key, "only " + " or ".join(map(repr, supported)))


def _from_llada(fields: _Fields) -> dict[str, Any]:
  """ModelConfig's values but for the ids, of a LLaDA config.json."""
  fields.only("block_type", "llama")
  fields.only("block_group_size", 1)
  fields.only("activation_type", "silu")
  fields.only("layer_norm_type", "rms")
  fields.only("layer_norm_with_affine", True)
  fields.only("rope", True)
  fields.only("alibi", False)
  qk_norm = fields.switch("attention_layer_norm")
  if qk_norm:
    fields.only("attention_layer_norm_with_affine", True)
  bias = fields.switch("include_bias")
  rows = vocabulary = fields.count("vocab_size", MAX_ROWS)
  if fields.get("embedding_size") is not None:
    rows = fields.count("embedding_size", MAX_ROWS)
  if rows < vocabulary:
    raise fields.refuse(
      "embedding_size", f"only vocab_size={vocabulary} or more rows"
    )
  if fields.get("mlp_hidden_size") is None:
    mlp_width = fields.positive("mlp_ratio") * fields.count("d_model")
    if not mlp_width.is_integer() or not 1 <= mlp_width <= MAX_WIDTH:
      raise fields.refuse("mlp_ratio", "only a whole width of the MLP")
  else:
    mlp_width = fields.count("mlp_hidden_size")
  return {
    "family": "llada",
    "vocab_size": rows,
    "width": fields.count("d_model"),
    "layers": fields.count("n_layers", MAX_LAYERS),
    "heads": fields.count("n_heads"),
    "kv_heads": _llada_kv_heads(fields),
    "mlp_width": int(mlp_width),
    "rope_theta": fields.rotary_base(),
    "norm_eps": fields.positive("rms_norm_eps"),
    "max_length": fields.count("max_sequence_length", MAX_LENGTH),
    # The projections have a bias when either switch is on.
    "qkv_bias": fields.switch("include_qkv_bias", null=bias) or bias,
    "linear_bias": bias,
    "norm_bias": fields.switch("bias_for_layer_norm", null=bias),
    "qk_norm": qk_norm,
    "scale_logits": fields.switch("scale_logits"),
    "scale_embedding": fields.switch("input_emb_norm"),
    "tie_embeddings": fields.switch("weight_tying"),
  }


def _llada_kv_heads(fields: _Fields) -> int:
  """Key and value heads; two keys say it, and they must agree."""
  heads = fields.count("n_heads")
  multi_query = fields.switch("multi_query_attention", null=False)
  if fields.get("n_kv_heads") is None:
    return 1 if multi_query else heads
  kv_heads = fields.count("n_kv_heads")
  if fields.get("multi_query_attention") is None:
    return kv_heads
  implied = 1 if multi_query else heads
  if kv_heads != implied:
    raise fields.refuse(
      "n_kv_heads",
      f"multi_query_attention={multi_query} means {implied}, so only that",
    )
  return kv_heads


def _from_dream(fields: _Fields) -> dict[str, Any]:
  """ModelConfig's values but for the ids, of a Dream config.json."""
  fields.only("hidden_act", "silu")
  fields.get("rope_scaling")
  fields.only("use_sliding_window", False)
  fields.only("use_mrope", False)
  width, heads = (
    fields.count("hidden_size"),
    fields.count("num_attention_heads"),
  )
  if fields._config.get("head_dim") not in (None, width // heads):
    raise fields.refuse(
      "head_dim", f"only hidden_size / heads = {width // heads}"
    )
  return {
    "family": "dream",
    "vocab_size": fields.count("vocab_size", MAX_ROWS),
    "width": width,
    "layers": fields.count("num_hidden_layers", MAX_LAYERS),
    "heads": heads,
    "kv_heads": fields.count("num_key_value_heads"),
    "mlp_width": fields.count("intermediate_size"),
    "rope_theta": fields.rotary_base(),
    "norm_eps": fields.positive("rms_norm_eps"),
    "max_length": fields.count("max_position_embeddings", MAX_LENGTH),
    "qkv_bias": True,
    "logit_shift": True,
    "tie_embeddings": fields.switch("tie_word_embeddings"),
  }
