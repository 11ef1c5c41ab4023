"""Adapters add exactly B A to the kernels they name, in PEFT's layout."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_hf_weights import DREAM, LLADA, tensors_of, write_folder

from rspo_jax import program as program_lib
from rspo_jax.models import (
  families,
  hf_adapters,
  hf_weights,
  lora,
  transformer,
)
from rspo_jax.models.lora import LoraSettings

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SEVEN += ["gate_proj"]
BLOCK = "model.transformer.blocks.{}.{}"


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


def merged_by_hand(base_tensors, adapter_tensors, scale):
  """W + scale B A for each module, in the checkpoint's own layout."""
  result = dict(base_tensors)
  for name, a in adapter_tensors.items():
    if ".lora_A." in name:
      b = adapter_tensors[name.replace("lora_A", "lora_B")]
      module = name.removeprefix("base_model.model.").split(".lora_A")[0]
      weight = base_tensors[f"{module}.weight"].astype(np.float64)
      merged = weight + scale * (b.astype(np.float64) @ a)
      result[f"{module}.weight"] = merged.astype(np.float32)
  return result


# --- The adapter itself ------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_shaped_like_its_kernels():
  config = families.from_hf(LLADA)
  settings = LoraSettings(rank=4, alpha=8, targets=(*lora.PROJECTIONS, "head"))
  adapter = lora.init(config, settings, jax.random.key(0))
  assert adapter["layers"]["key"]["a"].shape == (3, 24, 4)
  assert adapter["layers"]["key"]["b"].shape == (3, 4, 12)
  assert adapter["layers"]["down"]["a"].shape == (3, 36, 4)
  assert adapter["head"]["b"].shape == (4, 40)
  params = {"layers": {}, "embed": {"embedding": np.ones((40, 24))}}
  for name, shape in lora.kernel_shapes(config).items():
    holder = params if name == "head" else params["layers"]
    holder[name] = {"kernel": np.ones(shape, np.float32)}
  merged = lora.merge(params, adapter, settings.scale)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), merged, params)
  )
  assert merged["embed"]["embedding"] is params["embed"]["embedding"]
  for target, group in adapter["layers"].items():
    inputs = lora.kernel_shapes(config)[target][1]
    bound = 1 / np.sqrt(inputs)
    assert np.abs(group["a"]).max() <= bound
    assert np.abs(np.std(group["a"]) - bound / np.sqrt(3)) < 0.1 * bound


def test_a_target_draws_the_same_whatever_else_is_adapted():
  config = families.from_hf(LLADA)
  draw = [
    lora.init(config, LoraSettings(2, 2.0, targets), jax.random.key(1))
    for targets in (("up",), ("query", "up"))
  ]
  first, second = (d["layers"]["up"]["a"] for d in draw)
  assert (first == second).all()


def test_attached_and_merged_adapters_compute_the_same_product():
  rng = np.random.default_rng(0)
  kernel, a, b = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((2, 6, 5), (2, 6, 3), (2, 3, 5))
  )
  params = {"layers": {"up": {"kernel": kernel, "bias": np.zeros((2, 5))}}}
  adapter = {"layers": {"up": {"a": a, "b": b}}}
  attached = lora.attach(params, adapter, 0.5)["layers"]["up"]
  merged = lora.merge(params, adapter, 0.5)["layers"]["up"]
  assert attached["kernel"] is kernel
  assert "lora_a" not in params["layers"]["up"]
  assert set(merged) == {"kernel", "bias"}
  x = rng.standard_normal((2, 4, 6))
  assert attached["lora_a"] is a and attached["lora_b"] is b
  scale = np.asarray(attached["lora_scale"])[:, None, None]
  beside = x @ kernel + x @ a @ (b * scale)
  assert np.abs(beside - x @ merged["kernel"]).max() < 1e-5


def test_gradients_reach_the_adapter_with_its_scale():
  dense = transformer.Dense(families.from_hf(LLADA), 2, ("embed", "mlp"))
  params = {"layers": {"up": {"kernel": jnp.ones((1, 2, 2))}}}
  a, b = jnp.ones((1, 2, 1)), jnp.zeros((1, 1, 2))

  def loss(adapter):
    module = lora.attach(params, adapter, 4.0)["layers"]["up"]
    layer = jax.tree.map(lambda x: x[0], module)
    return dense.apply({"params": layer}, jnp.ones((1, 2))).sum()

  grads = jax.grad(loss)({"layers": {"up": {"a": a, "b": b}}})["layers"]["up"]
  assert (grads["b"] == 8.0).all()  # 4 * the column sums of A
  assert (grads["a"] == 0.0).all()


def test_axes_have_the_shape_of_the_adapter():
  config = families.from_hf(LLADA)
  settings = LoraSettings(2, 2.0, targets=lora.TARGETS)
  adapter = lora.init(config, settings, jax.random.key(0))
  axes = lora.logical_axes(settings)
  found = jax.tree.map(lambda leaf: leaf.ndim, adapter)
  named = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
  assert found == named
  assert found["layers"]["up"]["a"] == 3 and found["head"]["b"] == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rank": 0}, "rank=0"),
    ({"rank": 2.0}, r"rank=2\.0"),
    ({"alpha": 0.0}, "alpha=0"),
    ({"targets": ()}, "must name some"),
    ({"targets": ("q_proj",)}, "'q_proj' is none of them"),
    ({"targets": ("up", "up")}, "twice"),
  ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    LoraSettings(**({"rank": 2, "alpha": 2.0} | changes))


def test_a_tied_head_is_no_target():
  config = families.from_hf(LLADA | {"weight_tying": True})
  settings = LoraSettings(2, 2.0, targets=("head",))
  with pytest.raises(ValueError, match="embedding"):
    lora.init(config, settings, jax.random.key(0))


# --- PEFT's folders ----------------------------------------------------------


@pytest.mark.parametrize(
  ("source", "modules", "changes", "scale"),
  [
    (LLADA, llada_modules(), {}, 3 / 2),
    (LLADA, llada_modules(), {"use_rslora": True}, 3 / np.sqrt(2)),
    (
      LLADA,
      [*llada_modules(("ff_out", "attn_out")), "model.transformer.ff_out"],
      {"target_modules": ["ff_out", "attn_out"]},
      3 / 2,
    ),
    (
      DREAM,
      [
        f"model.layers.{i}.{n}"
        for i in range(2)
        for n in (
          *(f"self_attn.{p}_proj" for p in "qkvo"),
          *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
      ],
      {},
      3 / 2,
    ),
  ],
  ids=["llada-four-of-seven", "rslora", "llada-with-head", "dream-seven"],
)
def test_a_merged_adapter_is_the_base_plus_its_products(
  tmp_path, source, modules, changes, scale
):
  base = tensors_of(source)
  model = hf_weights.load_model(write_folder(tmp_path / "base", source, base))
  added = peft_folder(tmp_path / "adapter", base, modules, **changes)
  settings, adapter, _ = hf_adapters.load_adapter(
    tmp_path / "adapter", model.config
  )
  assert settings.scale == pytest.approx(scale)
  merged = lora.merge(model.params, adapter, settings.scale)
  by_hand = write_folder(
    tmp_path / "merged", source, merged_by_hand(base, added, scale)
  )
  expected = hf_weights.load_model(by_hand).params
  difference = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), merged, expected
  )
  assert max(jax.tree.leaves(difference)) <= 1e-5


@pytest.mark.parametrize("merge_dtype", ["stored", "float32"])
def test_an_export_in_float32_computes_what_base_and_adapter_do(
  tmp_path, merge_dtype
):
  folder = write_folder(tmp_path / "base", LLADA, tensors_of(LLADA))
  model = hf_weights.load_model(folder, "bfloat16")
  settings = LoraSettings(4, 8.0)
  rng = np.random.default_rng(0)
  adapter = lora.init(model.config, settings, jax.random.key(0))
  for pair in adapter["layers"].values():
    pair["b"] = rng.normal(0, 0.01, pair["b"].shape).astype(np.float32)
  program = types.SimpleNamespace(
    lora=settings,
    settings=types.SimpleNamespace(lora={"merge_dtype": merge_dtype}),
    model=model,
    frozen=lora.Adapted(model.params),
  )
  hf_weights.save_model(
    program_lib.merged(program, adapter), tmp_path / "model"
  )
  exported = hf_weights.load_model(tmp_path / "model").params
  config = dataclasses.replace(model.config, compute_dtype="float32")
  tokens = jnp.asarray(rng.integers(0, 40, (3, 12)), jnp.int32)

  def logits(params):
    h = transformer.hidden(config, params, tokens)
    return np.asarray(transformer.project(config, params, h))

  apart = logits(lora.attach(model.params, adapter, settings.scale))
  change = np.abs(apart - logits(model.params)).max()
  error = np.abs(apart - logits(exported)).max()
  assert change > 1e-2
  if merge_dtype == "float32":
    assert error < 1e-5
  else:  # it rounds: with as little, the other option would be for nothing
    assert 1e-4 < error < change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_written_as_it_was_read(tmp_path, dtype):
  base = tensors_of(LLADA)
  config = families.from_hf(LLADA)
  tensors = peft_folder(tmp_path / "in", base, llada_modules())
  if dtype == "bfloat16":
    tensors = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
    file = tmp_path / "in" / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors, file)
  loaded = hf_adapters.load_adapter(tmp_path / "in", config, dtype)
  settings, adapter, source = loaded
  hf_adapters.save_adapter(
    tmp_path / "out", config, settings, adapter, source=source
  )
  after = safetensors.numpy.load_file(
    tmp_path / "out" / "adapter_model.safetensors"
  )
  assert after.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert after[name].dtype == tensor.dtype
    assert after[name].tobytes() == tensor.tobytes()
  written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  read = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
  assert written == read | {"use_rslora": False}


@pytest.mark.parametrize(
  ("source", "targets", "expected"),
  [
    (LLADA, ("query", "up"), ["q_proj", "up_proj"]),
    (
      DREAM,
      lora.PROJECTIONS,
      sorted(f"{n}_proj" for n in ["q", "k", "v", "o", "gate", "up", "down"]),
    ),
    (LLADA, ("down", "head"), ["ff_out"]),
    # A list with ff_out would adapt the head as well.
    (LLADA, ("down",), r"model\.transformer\.blocks\.\d+\.ff_out"),
  ],
)
def test_a_new_adapter_names_its_modules_and_no_others(
  tmp_path, source, targets, expected
):
  config = families.from_hf(source)
  settings = LoraSettings(2, 4.0, targets)
  adapter = lora.init(config, settings, jax.random.key(0))
  hf_adapters.save_adapter(tmp_path, config, settings, adapter, base="owner/m")
  written = json.loads((tmp_path / "adapter_config.json").read_text())
  assert written["target_modules"] == expected
  assert written["base_model_name_or_path"] == "owner/m"
  again, loaded, _ = hf_adapters.load_adapter(tmp_path, config)
  assert set(again.targets) == set(targets)
  assert again.scale == settings.scale
  equal = jax.tree.map(lambda a, b: bool((a == b).all()), loaded, adapter)
  assert jax.tree.all(equal)


@pytest.fixture
def adapter_folder(tmp_path):
  """A good LLaDA adapter folder, for tests to damage."""
  folder = tmp_path / "adapter"
  peft_folder(folder, tensors_of(LLADA), llada_modules())
  return folder


def change_weights(folder, change):
  """Rewrites the adapter's tensors."""
  file = folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


def load(folder):
  """Loads a folder for the tiny LLaDA."""
  return hf_adapters.load_adapter(folder, families.from_hf(LLADA))


NAME = "base_model.model." + BLOCK.format(1, "q_proj")


def test_damaged_adapters_name_the_tensor(adapter_folder):
  change_weights(adapter_folder, lambda t: t.pop(f"{NAME}.lora_B.weight"))
  with pytest.raises(hf_weights.MissingTensor, match="q_proj has lora_A but"):
    load(adapter_folder)
  change_weights(adapter_folder, lambda t: t.pop(f"{NAME}.lora_A.weight"))
  with pytest.raises(hf_weights.MissingTensor, match=r"1\.q_proj\.lora_A"):
    load(adapter_folder)


def test_tensors_that_are_no_plain_lora_are_unexpected(adapter_folder):
  vector = {f"{NAME}.lora_magnitude_vector": np.ones(24, np.float32)}
  change_weights(adapter_folder, lambda t: t.update(vector))
  with pytest.raises(hf_weights.UnexpectedTensor, match="magnitude_vector"):
    load(adapter_folder)


def test_an_adapter_of_another_model_is_told(adapter_folder):
  config = families.from_hf(DREAM)
  with pytest.raises(hf_weights.UnexpectedTensor, match="another model"):
    hf_adapters.load_adapter(adapter_folder, config)
  wider = families.from_hf(LLADA | {"d_model": 48})
  with pytest.raises(hf_weights.WrongShape, match=r"\(2, 24\).*\(2, 48\)"):
    hf_adapters.load_adapter(adapter_folder, wider)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("peft_type", "IA3"),
    ("use_dora", True),
    ("bias", "all"),
    ("modules_to_save", ["wte"]),
    ("rank_pattern", {"q_proj": 8}),
    ("alpha_pattern", {"q_proj": 8}),
    ("init_lora_weights", "pissa"),
    ("layers_to_transform", [0]),
    ("fan_in_fan_out", True),
    ("megatron_config", {"tensor_model_parallel_size": 2}),
    ("arrow_config", {"top_k": 2}),
    ("an_option_of_tomorrow", 0.5),
    ("use_rslora", "yes"),
    ("target_modules", "*q_proj"),
    ("target_modules", "(.*.*)*x"),
    ("target_modules", [3]),
    ("exclude_modules", "*q_proj"),
    ("exclude_modules", {"q_proj": 1}),
    ("r", None),
    ("lora_alpha", "16"),
  ],
)
def test_options_that_compute_something_else_are_refused(
  adapter_folder, key, value
):
  file = adapter_folder / "adapter_config.json"
  config = json.loads(file.read_text()) | {key: value}
  file.write_text(json.dumps(config))
  name = {"r": "rank", "lora_alpha": "adapter_config"}.get(key, key)
  with pytest.raises(hf_weights.UnsupportedConfig, match=name):
    load(adapter_folder)


def test_options_that_switch_nothing_on_pass(adapter_folder):
  file = adapter_folder / "adapter_config.json"
  config = json.loads(file.read_text())
  config |= {f"tomorrow_{i}": v for i, v in enumerate((None, False, [], {}))}
  # What PEFT 0.18 writes beside them.
  config |= {"peft_version": "0.18.0", "megatron_core": "megatron.core"}
  config |= {"qalora_group_size": 16, "loftq_config": {}, "revision": None}
  file.write_text(json.dumps(config))
  assert load(adapter_folder)[0].rank == config["r"]


@pytest.mark.parametrize(
  "excluded", [["model.transformer.ff_out"], r"model\.transformer\.ff_out"]
)
def test_a_module_that_is_excluded_needs_no_tensor(tmp_path, excluded):
  peft_folder(
    tmp_path,
    tensors_of(LLADA),
    llada_modules(("q_proj", "ff_out")),
    target_modules=["q_proj", "ff_out"],
    exclude_modules=excluded,
  )
  assert load(tmp_path)[0].targets == ("query", "down")


def test_folders_that_are_no_adapter_say_so(adapter_folder):
  (adapter_folder / "adapter_model.safetensors").unlink()
  with pytest.raises(hf_weights.CheckpointError, match="safetensors"):
    load(adapter_folder)
  (adapter_folder / "adapter_config.json").unlink()
  with pytest.raises(hf_weights.CheckpointError, match="no PEFT adapter"):
    load(adapter_folder)
