"""A new, randomly initialised model in the format of LLaDA-8B.

For supervised training from scratch: config.json fields, tokenizer and
parameters are those that a checkpoint folder would hold, so that a new model
is saved, loaded and trained through the same code as LLaDA-8B.
"""

from typing import Any

import jax

from rspo_jax.config.schema import NewModel
from rspo_jax.models import families, transformer
from rspo_jax.models.checkpoints import Model
from rspo_jax.models.tokenizer import build_word_tokenizer

# Rows of the embedding are a multiple of this, so that meshes divide them.
VOCABULARY_MULTIPLE = 8
# Pieces that a list separated by spaces cannot hold themselves.
_NAMED = {r"\s": " ", r"\n": "\n"}


def source_config(shape: NewModel, tokenizer) -> dict[str, Any]:
  """The config.json of a LLaDA model of this shape.

  Args:
    shape: sizes.
    tokenizer: whose ids and size it takes.
  """
  size = tokenizer.backend.get_vocab_size()
  rows = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
  return {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": shape.width,
    "embedding_size": rows,
    "eos_token_id": tokenizer.eos_id,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": tokenizer.mask_id,
    "max_sequence_length": shape.max_length,
    "mlp_hidden_size": shape.mlp_width,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": shape.heads,
    "n_kv_heads": shape.kv_heads,
    "n_layers": shape.layers,
    "pad_token_id": tokenizer.pad_id,
    "rms_norm_eps": shape.norm_eps,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": shape.rope_theta,
    "scale_logits": False,
    "vocab_size": size,
    "weight_tying": False,
  }


def new_model(shape: NewModel, key: jax.Array) -> Model:
  """Makes a model with random parameters, float32, on the default device.

  Args:
    shape: model.new of the config: sizes, `vocabulary` (the pieces, separated
      by spaces; `\\s` is a space, `\\n` a new line) and `pattern` (what a piece
      looks like).
    key: PRNG key of the parameters.

  Raises:
    ValueError: sizes that do not fit together, or a vocabulary that the
      pattern cannot cut.
  """
  pieces = [_NAMED.get(piece, piece) for piece in shape.vocabulary.split()]
  tokenizer = build_word_tokenizer(pieces, shape.pattern)
  config_json = source_config(shape, tokenizer)
  config = families.from_hf(config_json)
  return Model(
    config=config,
    params=transformer.init(config, key),
    tokenizer=tokenizer,
    source_config=config_json,
  )
