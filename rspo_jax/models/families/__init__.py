"""The families of models, and a config.json there and back.

Adding one is a file beside these, with its `Family`, and a line in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from rspo_jax.config import keys
from rspo_jax.models.families import dream, llada
from rspo_jax.models.families.config import (
  CheckpointError,
  Family,
  Fields,
  ModelConfig,
  UnsupportedConfig,
)

__all__ = [
  "FAMILIES", "PUBLISHED", "CheckpointError", "Family", "Fields", "ModelConfig",
  "UnsupportedConfig", "family_of", "from_hf", "to_hf",
]  # fmt: skip

FAMILIES: dict[str, Family] = {"llada": llada.FAMILY, "dream": dream.FAMILY}

PUBLISHED: dict[str, ModelConfig] = {
  name: shape
  for family in FAMILIES.values()
  for name, shape in family.published.items()
}

# What all families say in the same words; the rotation is read apart.
_SHARED = {
  "rope_theta": "rope_theta",
  "rms_norm_eps": "norm_eps",
  "mask_token_id": "mask_id",
  "eos_token_id": "eos_id",
  "pad_token_id": "pad_id",
}

# Keys of relatives of these models: absent from the two families' configs,
# and not computed here, so that only a value that switches them off passes.
_ONLY_NEUTRAL = {
  "clip_qkv": (None,), "norm_after": (None, False),
  "residual_scale": (None, 1, 1.0), "residual_multiplier": (None, 1, 1.0),
  "embedding_multiplier": (None, 1, 1.0), "attention_multiplier": (None,),
  "logits_scaling": (None, 1, 1.0), "logit_softcapping": (None,),
  "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,),
  "emb_init_std": (None,), "scale_emb_init": (None, False),
  "partial_rotary_factor": (None, 1, 1.0), "quantization_config": (None,),
  "num_experts": (None, 0),
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
  """The family of a model.

  Raises:
    ValueError: there is none of this name.
  """
  keys.one_of("family", config.family, FAMILIES)
  return FAMILIES[config.family]


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
  fields = Fields(config)
  kind = fields.get("model_type")
  name_by_type = {family.model_type: name for name, family in FAMILIES.items()}
  if not isinstance(kind, str) or kind not in name_by_type:
    raise UnsupportedConfig(
      f"config.json: model_type={kind!r:.80} is not known; supported are "
      f"{sorted(name_by_type)}."
    )
  for key, neutral in _ONLY_NEUTRAL.items():
    if key in config and config[key] not in neutral:
      raise fields.refuse(key, f"only {' or '.join(map(repr, neutral))}")
  name = name_by_type[kind]
  values = FAMILIES[name].read(fields) | {
    "family": name,
    "rope_theta": fields.rotary_base(),
    "norm_eps": fields.positive("rms_norm_eps"),
  }
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
  except ValueError as error:
    raise UnsupportedConfig(f"config.json: {error}") from error


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """The config.json that `from_hf` reads back as this model."""
  family = family_of(config)
  field_by_key = family.field_by_key | _SHARED
  return {
    "model_type": family.model_type,
    **family.fixed,
    **{key: getattr(config, field) for key, field in field_by_key.items()},
  }
