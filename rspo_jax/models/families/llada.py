"""LLaDA: row j of the logits predicts token j."""

from typing import Any

from rspo_jax.models.families.config import (
  MAX_ROWS,
  MAX_WIDTH,
  Family,
  Fields,
  ModelConfig,
)

# Keys that say what a field of ModelConfig says.
_PLAIN = {
  "d_model": "width", "n_layers": "layers", "n_heads": "heads",
  "max_sequence_length": "max_length", "include_bias": "linear_bias",
  "attention_layer_norm": "qk_norm", "scale_logits": "scale_logits",
  "input_emb_norm": "scale_embedding", "weight_tying": "tie_embeddings",
}  # fmt: skip
# Keys whose meaning depends on others.
_DERIVED = {
  "n_kv_heads": "kv_heads", "mlp_hidden_size": "mlp_width",
  "vocab_size": "vocab_size", "embedding_size": "vocab_size",
  "include_qkv_bias": "qkv_bias", "bias_for_layer_norm": "norm_bias",
}  # fmt: skip
# What this transformer computes, whatever else the original classes can do.
_COMPUTED = {
  "block_type": "llama", "block_group_size": 1, "activation_type": "silu",
  "layer_norm_type": "rms", "layer_norm_with_affine": True, "rope": True,
  "alibi": False,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
  """ModelConfig's values of a LLaDA config.json."""
  for key, value in _COMPUTED.items():
    fields.only(key, value)
  values = fields.plain(_PLAIN)
  if values["qk_norm"]:
    fields.only("attention_layer_norm_with_affine", True)
  rows = vocabulary = fields.count("vocab_size", MAX_ROWS)
  if fields.get("embedding_size") is not None:
    rows = fields.count("embedding_size", MAX_ROWS)
  if rows < vocabulary:
    raise fields.refuse(
      "embedding_size", f"only vocab_size={vocabulary} or more rows"
    )
  if fields.get("mlp_hidden_size") is None:
    mlp_width = fields.positive("mlp_ratio") * values["width"]
    if not mlp_width.is_integer() or not 1 <= mlp_width <= MAX_WIDTH:
      raise fields.refuse("mlp_ratio", "only a whole width of the MLP")
  else:
    mlp_width = fields.count("mlp_hidden_size")
  bias = values["linear_bias"]
  return values | {
    "vocab_size": rows,
    "kv_heads": _kv_heads(fields, values["heads"]),
    "mlp_width": int(mlp_width),
    # The projections have a bias when either switch is on.
    "qkv_bias": fields.switch("include_qkv_bias", null=bias) or bias,
    "norm_bias": fields.switch("bias_for_layer_norm", null=bias),
  }


def _kv_heads(fields: Fields, heads: int) -> int:
  """Key and value heads; two keys say it, and they must agree."""
  multi_query = fields.switch("multi_query_attention", null=False)
  implied = 1 if multi_query else heads
  if fields.get("n_kv_heads") is None:
    return implied
  kv_heads = fields.count("n_kv_heads")
  told = fields.get("multi_query_attention") is not None
  if told and kv_heads != implied:
    raise fields.refuse(
      "n_kv_heads",
      f"multi_query_attention={multi_query} means {implied}, so only that",
    )
  return kv_heads


FAMILY = Family(
  model_type="llada",
  read=_read,
  field_by_key=_PLAIN | _DERIVED,
  fixed=_COMPUTED
  | {
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
      "AutoConfig": "configuration_llada.LLaDAConfig",
      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
      "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "residual_dropout": 0.0,
    "rope_full_precision": True,
    "use_cache": False,
  },
  modules={
    "model.transformer.wte": ("embed",),
    "model.transformer.ln_f": ("final_norm",),
    "model.transformer.ff_out": ("head",),
  }
  | {
    f"model.transformer.blocks.{{layer}}.{name}": ("layers", ours)
    for name, ours in {
      "attn_norm": "attention_norm",
      "ff_norm": "mlp_norm",
      "q_proj": "query",
      "k_proj": "key",
      "v_proj": "value",
      "q_norm": "query_norm",
      "k_norm": "key_norm",
      "attn_out": "out",
      "ff_proj": "gate",
      "up_proj": "up",
      "ff_out": "down",
    }.items()
  },
  mask_token="<|mdm_mask|>",
  published={
    # GSAI-ML/LLaDA-8B-Instruct on the Hugging Face hub.
    "llada_8b": ModelConfig(
      family="llada",
      vocab_size=126464,
      width=4096,
      layers=32,
      heads=32,
      kv_heads=32,
      mlp_width=12288,
      rope_theta=500000.0,
      norm_eps=1e-5,
      mask_id=126336,
      eos_id=126081,
      pad_id=126081,
      max_length=4096,
    )
  },
)
