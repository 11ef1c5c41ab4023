"""Dream: row j of the logits predicts token j + 1."""

from typing import Any

from rspo_jax.models.families.config import Family, Fields, ModelConfig

# Keys that say what a field of ModelConfig says.
_PLAIN = {
  "hidden_size": "width", "num_hidden_layers": "layers",
  "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
  "intermediate_size": "mlp_width", "vocab_size": "vocab_size",
  "max_position_embeddings": "max_length",
  "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
# What this transformer computes, whatever else the original classes can do.
_COMPUTED = {
  "hidden_act": "silu",
  "use_sliding_window": False,
  "use_mrope": False,
}


def _read(fields: Fields) -> dict[str, Any]:
  """ModelConfig's values of a Dream config.json."""
  for key, value in _COMPUTED.items():
    fields.only(key, value)
  fields.get("rope_scaling")
  values = fields.plain(_PLAIN)
  head_dim = values["width"] // values["heads"]
  if fields.source.get("head_dim") not in (None, head_dim):
    raise fields.refuse("head_dim", f"only hidden_size / heads = {head_dim}")
  return values | {"qkv_bias": True, "logit_shift": True}


FAMILY = Family(
  model_type="Dream",
  read=_read,
  field_by_key=_PLAIN,
  fixed=_COMPUTED
  | {
    "architectures": ["DreamModel"],
    "auto_map": {
      "AutoConfig": "configuration_dream.DreamConfig",
      "AutoModel": "modeling_dream.DreamModel",
    },
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_cache": True,
  },
  modules={
    "model.embed_tokens": ("embed",),
    "model.norm": ("final_norm",),
    "lm_head": ("head",),
  }
  | {
    f"model.layers.{{layer}}.{name}": ("layers", ours)
    for name, ours in {
      "input_layernorm": "attention_norm",
      "post_attention_layernorm": "mlp_norm",
      "self_attn.q_proj": "query",
      "self_attn.k_proj": "key",
      "self_attn.v_proj": "value",
      "self_attn.o_proj": "out",
      "mlp.gate_proj": "gate",
      "mlp.up_proj": "up",
      "mlp.down_proj": "down",
    }.items()
  },
  mask_token="<|mask|>",
  published={
    # Dream-org/Dream-v0-Instruct-7B on the Hugging Face hub.
    "dream_7b": ModelConfig(
      family="dream",
      vocab_size=152064,
      width=3584,
      layers=28,
      heads=28,
      kv_heads=4,
      mlp_width=18944,
      rope_theta=1000000.0,
      norm_eps=1e-6,
      mask_id=151666,
      eos_id=151643,
      pad_id=151643,
      max_length=131072,
      qkv_bias=True,
      logit_shift=True,
    )
  },
)
