"""Shapes of published checkpoints, for planning a run without their files.

Facts of the config.json and tokenizer of each; a run itself reads them from
the checkpoint's folder. Source: GSAI-ML/LLaDA-8B-Instruct and
Dream-org/Dream-v0-Instruct-7B on the Hugging Face hub.
"""

from rspo_jax.models.families import ModelConfig

PUBLISHED = {
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
  ),
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
  ),
}
