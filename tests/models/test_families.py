"""Families: config.json there and back, weight tables, and a new family."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_folders import DREAM, LLADA, tensors_of, write_folder

import rspo_jax
from rspo_jax.models import checkpoints, families
from rspo_jax.models.families import UnsupportedConfig


@pytest.mark.parametrize(
  ("name", "count"), [("llada_8b_instruct", 291), ("dream_v0_instruct_7b", 339)]
)
def test_every_released_name_is_consumed_and_none_left_over(
  shared, name, count
):
  folder = shared / "fixtures" / "hub_metadata"
  index = json.loads((folder / f"{name}_index.json").read_text())
  config = json.loads((folder / f"{name}_config.json").read_text())
  leaves = checkpoints.leaves(families.from_hf(config))
  names = [n for leaf in leaves for n in leaf.names]
  assert len(names) == count
  assert sorted(names) == sorted(index["weight_map"])
  stored_bytes = sum(
    2 * int(np.prod(leaf.tensor_shape)) * len(leaf.names) for leaf in leaves
  )
  assert stored_bytes == index["metadata"]["total_size"]


@pytest.mark.parametrize(
  ("key", "name"),
  [("llada_8b", "llada_8b_instruct"), ("dream_7b", "dream_v0_instruct_7b")],
)
def test_a_published_shape_is_what_the_released_config_says(shared, key, name):
  folder = shared / "fixtures" / "hub_metadata"
  config = json.loads((folder / f"{name}_config.json").read_text())
  assert families.PUBLISHED[key] == families.from_hf(config)


@pytest.mark.parametrize("source", [LLADA, DREAM], ids=["llada", "dream"])
def test_a_derived_config_reads_back_as_the_same_model(source):
  config = families.from_hf(source)
  assert families.from_hf(families.to_hf(config)) == config


# --- Configs that are refused by name ----------------------------------------

OPTIONAL = {"mlp_ratio", "attention_layer_norm_with_affine"}


def test_the_folder_of_a_run_is_told_from_that_of_its_model():
  from configs import base

  with pytest.raises(UnsupportedConfig, match="in the folder model/"):
    families.from_hf(base.get_config().to_dict())


@pytest.mark.parametrize("source", [LLADA, DREAM], ids=["llada", "dream"])
def test_no_missing_key_is_filled_with_a_default(source):
  for key in source.keys() - OPTIONAL:
    config = {k: v for k, v in source.items() if k != key}
    with pytest.raises(UnsupportedConfig, match=key):
      families.from_hf(config)
  used = {
    "mlp_ratio": {"mlp_hidden_size": None},
    "attention_layer_norm_with_affine": {"attention_layer_norm": True},
  }
  for key in OPTIONAL & source.keys():
    config = {k: v for k, v in source.items() if k != key} | used[key]
    with pytest.raises(UnsupportedConfig, match=key):
      families.from_hf(config)


@pytest.mark.parametrize(
  ("source", "key", "value"),
  [
    (LLADA, "model_type", "llama"), (LLADA, "activation_type", "swiglu"),
    (LLADA, "activation_type", "gelu"), (LLADA, "alibi", True),
    (LLADA, "rope", False), (LLADA, "block_type", "sequential"),
    (LLADA, "block_group_size", 2), (LLADA, "layer_norm_type", "default"),
    (LLADA, "layer_norm_type", "gemma_rms"),
    (LLADA, "layer_norm_with_affine", False), (LLADA, "embedding_size", 32),
    (LLADA, "n_kv_heads", 4), (LLADA, "multi_query_attention", True),
    (LLADA, "d_model", 25), (LLADA, "d_model", 24.0), (LLADA, "n_layers", 0),
    (LLADA, "rms_norm_eps", None), (LLADA, "rope_theta", -1.0),
    (LLADA, "weight_tying", None), (LLADA, "weight_tying", 1),
    (LLADA, "include_bias", None), (LLADA, "mask_token_id", 40),
    (LLADA, "eos_token_id", [1, 2]), (LLADA, "clip_qkv", 8.0),
    (LLADA, "residual_scale", 0.5), (LLADA, "quantization_config", {"bits": 4}),
    (DREAM, "hidden_act", "gelu"),
    (DREAM, "rope_scaling", {"type": "yarn", "factor": 4.0}),
    (DREAM, "use_sliding_window", True), (DREAM, "use_mrope", True),
    (DREAM, "num_key_value_heads", 5), (DREAM, "head_dim", 8),
  ],
)  # fmt: skip
def test_a_config_that_asks_for_something_else_is_refused(source, key, value):
  name = {"d_model": "d_model|width", "n_kv_heads": "kv_heads"}.get(key, key)
  name = name.replace("num_key_value_heads", "kv_heads")
  with pytest.raises(UnsupportedConfig, match=name):
    families.from_hf(source | {key: value})


def test_switches_that_change_nothing_pass():
  config = LLADA | {
    "clip_qkv": None,
    "attention_dropout": 0.1,
    "init_std": 3.0,
    "flash_attention": True,
    "tie_word_embeddings": True,  # transformers' own default, never read
  }
  assert families.from_hf(config) == families.from_hf(LLADA)


def test_ids_that_the_config_leaves_out_come_from_the_tokenizer():
  config = {k: v for k, v in LLADA.items() if k != "mask_token_id"}
  config["pad_token_id"] = None
  ids = {"mask_token_id": 7, "pad_token_id": 8, "eos_token_id": 9}
  model = families.from_hf(config, ids)
  assert (model.mask_id, model.pad_id, model.eos_id) == (7, 8, 31)


@pytest.mark.parametrize(
  ("source", "changes", "expected"),
  [
    (DREAM, {"rope_parameters": {"rope_theta": 1e4}}, 1e4),
    (
      DREAM,
      {"rope_parameters": {"rope_theta": 1e6}},
      "rope_parameters.*rope_theta=10000",
    ),
    (DREAM, {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e6}}, 1e6),
    (
      LLADA,
      {
        "rope_theta": ...,
        "rope_parameters": {"rope_type": "default", "rope_theta": 9},
      },
      9.0,
    ),
    (LLADA, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    (
      DREAM,
      {"rope_parameters": {"rope_type": "default", "factor": 4}},
      "rope_parameters",
    ),
    *(
      (source, {"rope_parameters": {"rope_type": kind, "factor": 4.0}}, kind)
      for source in (LLADA, DREAM)
      for kind in ("linear", "dynamic", "yarn", "longrope", "llama3")
    ),
    (DREAM, {"rope_parameters": {"full": {"rope_theta": 1e4}}}, "full"),
    (DREAM, {"rope_parameters": 3}, "rope_parameters=3"),
    (DREAM, {"rope_theta": ...}, "no rope_theta"),
    (DREAM, {"rope_parameters": {"rope_theta": None}}, "rope_theta=None"),
  ],
)
def test_the_rotation_of_either_generation_of_configs_is_honoured_or_refused(
  source, changes, expected
):
  config = {k: v for k, v in (source | changes).items() if v is not ...}
  if isinstance(expected, float):
    assert families.from_hf(config).rope_theta == expected
    return
  with pytest.raises(UnsupportedConfig, match=expected):
    families.from_hf(config)


# --- A family of one's own ---------------------------------------------------


def read_other(fields):
  """A reader for the family below: as Dream's files, and no shifted logits."""
  fields.only("activation", "silu")
  return fields.plain(OTHER_FIELDS) | {"qkv_bias": False}


OTHER_FIELDS = {
  "dim": "width", "depth": "layers", "heads": "heads", "groups": "kv_heads",
  "hidden": "mlp_width", "rows": "vocab_size", "context": "max_length",
}  # fmt: skip
OTHER_NAMES = {
  "block.{layer}.norm_a": "attention_norm", "block.{layer}.norm_b": "mlp_norm",
  "block.{layer}.wq": "query", "block.{layer}.wk": "key",
  "block.{layer}.wv": "value", "block.{layer}.wo": "out",
  "block.{layer}.w1": "gate", "block.{layer}.w2": "up",
  "block.{layer}.w3": "down",
}  # fmt: skip
OTHER = families.Family(
  model_type="other",
  read=read_other,
  field_by_key=OTHER_FIELDS,
  fixed={"activation": "silu"},
  modules={
    "tokens": ("embed",),
    "norm": ("final_norm",),
    "out": ("head",),
    **{name: ("layers", ours) for name, ours in OTHER_NAMES.items()},
  },
  mask_token="<mask>",
)


def test_a_family_is_added_by_what_its_files_say(monkeypatch, tmp_path):
  """The same tensors under other names make the same logits."""
  monkeypatch.setitem(families.FAMILIES, "other", OTHER)
  plain = LLADA | {"embedding_size": None, "vocab_size": 40}
  llada = families.from_hf(plain)
  config = families.to_hf(dataclasses.replace(llada, family="other"))
  assert config["model_type"] == "other" and config["depth"] == 3
  tensors = tensors_of(plain)
  by_path = {leaf.path: leaf.names for leaf in checkpoints.leaves(llada)}
  renamed = {
    name: tensors[old]
    for leaf in checkpoints.leaves(families.from_hf(config))
    for name, old in zip(leaf.names, by_path[leaf.path], strict=True)
  }
  assert "block.2.w3.weight" in renamed
  folders = (
    write_folder(tmp_path / "llada", plain, tensors),
    write_folder(tmp_path / "other", config, renamed),
  )
  one, other = (checkpoints.load_model(folder) for folder in folders)
  assert other.config.family == "other"
  tokens = np.arange(9, dtype=np.int32)[None]
  np.testing.assert_array_equal(
    rspo_jax.logits(other, tokens), rspo_jax.logits(one, tokens)
  )
  checkpoints.save_model(other, tmp_path / "saved")
  again = checkpoints.load_model(tmp_path / "saved")
  assert again.config == other.config
  with pytest.raises(UnsupportedConfig, match="activation='gelu'"):
    families.from_hf(config | {"activation": "gelu"})


def test_a_weight_table_may_stack_more_axes_than_layers(monkeypatch):
  """(layer, expert): one name for each place, the first axis slowest."""
  table = OTHER.modules | {"block.{layer}.wq.{half}": ("layers", "query")}
  del table["block.{layer}.wq"]
  family = dataclasses.replace(OTHER, modules=table)
  monkeypatch.setitem(families.FAMILIES, "other", family)
  # As the parameters lie here, [layer, in, out], `half` counts inputs.
  config = dataclasses.replace(families.from_hf(LLADA), family="other")
  (leaf,) = [
    leaf for leaf in checkpoints.leaves(config) if leaf.path[1:2] == ("query",)
  ]
  assert leaf.axes == ("layer", "half") and len(leaf.names) == 3 * 24
  assert leaf.names[:2] == ("block.0.wq.0.weight", "block.0.wq.1.weight")
  assert leaf.names[24] == "block.1.wq.0.weight"


def test_a_model_of_no_family_is_refused():
  config = dataclasses.replace(families.from_hf(LLADA), family="none")
  for use in (checkpoints.leaves, families.to_hf):
    with pytest.raises(
      ValueError, match=r"family='none' is not known; .*llada"
    ):
      use(config)
