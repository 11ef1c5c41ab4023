"""Checkpoint folders as the hub has them, of random tensors."""

import json
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from rspo_jax.models import checkpoints, families

LLADA = {
  "model_type": "llada", "activation_type": "silu", "alibi": False,
  "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
  "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama",
  "d_model": 24, "embedding_size": 40, "eos_token_id": 31,
  "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False,
  "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 30,
  "max_sequence_length": 64, "mlp_hidden_size": 36, "mlp_ratio": 2,
  "multi_query_attention": None, "n_heads": 6, "n_kv_heads": 3, "n_layers": 3,
  "pad_token_id": 32, "rms_norm_eps": 1e-3, "rope": True, "rope_theta": 100.0,
  "scale_logits": False, "vocab_size": 33, "weight_tying": False,
}  # fmt: skip


DREAM = {
  "model_type": "Dream", "eos_token_id": 31, "hidden_act": "silu",
  "hidden_size": 24, "intermediate_size": 36, "mask_token_id": 30,
  "max_position_embeddings": 64, "num_attention_heads": 6,
  "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 31,
  "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e4,
  "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False,
  "vocab_size": 40,
}  # fmt: skip


def tensors_of(config, seed=0, dtype=np.float32):
  """Random tensors under the names and shapes that a config calls for."""
  rng = np.random.default_rng(seed)
  return {
    name: (rng.standard_normal(leaf.tensor_shape) / 4).astype(dtype)
    for leaf in checkpoints.leaves(families.from_hf(config))
    for name in leaf.names
  }


def write_folder(folder: pathlib.Path, config, tensors, shards=1):
  """A checkpoint folder as the hub has it, written by `safetensors`."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  if shards == 1:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    part = dict(list(tensors.items())[i::shards])
    safetensors.numpy.save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / checkpoints.INDEX).write_text(json.dumps(index))
  return folder


def peft_folder(folder, base_tensors, modules, rank=2, **changes):
  """An adapter folder as PEFT writes it, with random A and B."""
  rng = np.random.default_rng(5)
  tensors = {}
  for module in modules:
    outputs, inputs = base_tensors[f"{module}.weight"].shape
    for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
      matrix = rng.standard_normal(shape).astype(np.float32)
      tensors[f"base_model.model.{module}.lora_{letter}.weight"] = matrix
  config = {
    "peft_type": "LORA",
    "r": rank,
    "lora_alpha": 3,
    "lora_dropout": 0.05,
    "target_modules": SEVEN,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct",
  }
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(json.dumps(config | changes))
  return tensors


def llada_modules(names=("q_proj", "k_proj", "v_proj", "up_proj")):
  """Modules of every layer of the tiny LLaDA."""
  return [BLOCK.format(i, n) for i in range(LLADA["n_layers"]) for n in names]


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


BLOCK = "model.transformer.blocks.{}.{}"
