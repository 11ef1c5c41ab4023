"""A new, randomly initialised model in the format of LLaDA-8B.

For supervised training from scratch: config.json fields, tokenizer and
parameters are those that a checkpoint folder would hold, so that a new model
is saved, loaded and trained through the same code as LLaDA-8B.
"""

import dataclasses

import jax

from rspo_jax.config.schema import NewModel
from rspo_jax.models import families, transformer
from rspo_jax.models.checkpoints import Model
from rspo_jax.models.tokenizer import build_word_tokenizer

# Rows of the embedding are a multiple of this, so that meshes divide them.
VOCABULARY_MULTIPLE = 8
# Pieces that a list separated by spaces cannot hold themselves.
_NAMED = {r"\s": " ", r"\n": "\n"}


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
  sizes = dataclasses.asdict(shape)
  words, pattern = sizes.pop("vocabulary").split(), sizes.pop("pattern")
  tokenizer = build_word_tokenizer([_NAMED.get(w, w) for w in words], pattern)
  size = tokenizer.backend.get_vocab_size()
  config = families.ModelConfig(
    family="llada",
    vocab_size=-(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
    mask_id=tokenizer.mask_id,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
    **sizes,
  )
  source_config = families.to_hf(config) | {"vocab_size": size}
  return Model(
    # Read back, so that sizes which no checkpoint could have are refused.
    config=families.from_hf(source_config),
    params=transformer.init(config, key),
    tokenizer=tokenizer,
    source_config=source_config,
  )
