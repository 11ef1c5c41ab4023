"""Checkpoints: what is read computes the recorded logits and returns whole."""

import contextlib
import functools
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers

from rspo_jax.models import families, hf_weights, published, transformer
from rspo_jax.tokenizer import build_word_tokenizer

MODELS = ("llada_tiny_A", "llada_tiny_gqa", "llada_tiny_bf16", "dream_tiny")

LLADA = {
  "model_type": "llada",
  "activation_type": "silu",
  "alibi": False,
  "attention_layer_norm": False,
  "attention_layer_norm_with_affine": True,
  "bias_for_layer_norm": False,
  "block_group_size": 1,
  "block_type": "llama",
  "d_model": 24,
  "embedding_size": 40,
  "eos_token_id": 31,
  "include_bias": False,
  "include_qkv_bias": False,
  "input_emb_norm": False,
  "layer_norm_type": "rms",
  "layer_norm_with_affine": True,
  "mask_token_id": 30,
  "max_sequence_length": 64,
  "mlp_hidden_size": 36,
  "mlp_ratio": 2,
  "multi_query_attention": None,
  "n_heads": 6,
  "n_kv_heads": 3,
  "n_layers": 3,
  "pad_token_id": 32,
  "rms_norm_eps": 1e-3,
  "rope": True,
  "rope_theta": 100.0,
  "scale_logits": False,
  "vocab_size": 33,
  "weight_tying": False,
}
DREAM = {
  "model_type": "Dream",
  "eos_token_id": 31,
  "hidden_act": "silu",
  "hidden_size": 24,
  "intermediate_size": 36,
  "mask_token_id": 30,
  "max_position_embeddings": 64,
  "num_attention_heads": 6,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "pad_token_id": 31,
  "rms_norm_eps": 1e-6,
  "rope_scaling": None,
  "rope_theta": 1e4,
  "tie_word_embeddings": False,
  "use_mrope": False,
  "use_sliding_window": False,
  "vocab_size": 40,
}


def tensors_of(config, seed=0, dtype=np.float32):
  """Random tensors under the names and shapes that a config calls for."""
  rng = np.random.default_rng(seed)
  return {
    name: (rng.standard_normal(leaf.tensor_shape) / 4).astype(dtype)
    for leaf in hf_weights.leaves(families.from_hf(config))
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
  (folder / hf_weights.INDEX).write_text(json.dumps(index))
  return folder


def read_folder(folder: pathlib.Path):
  """Every tensor of a folder with its dtype, read by `safetensors`."""
  result = {}
  for file in sorted(folder.glob("model*.safetensors")):
    with safetensors.safe_open(file, "numpy") as opened:
      for name in opened.keys():  # noqa: SIM118
        assert name not in result
        result[name] = opened.get_tensor(name)
  return result


def reference_logits(config, tensors, tokens):
  """The forward of LLaDA's block type "llama", naively, in float64.

  Args:
    config: a LLaDA config.json.
    tensors: by checkpoint name, torch's [out, in].
    tokens: i32 [S].

  Returns:
    f64 [S, embedding_size].
  """
  get = {k: v.astype(np.float64) for k, v in tensors.items()}
  width, heads = config["d_model"], config["n_heads"]
  dim = width // heads
  length = len(tokens)

  def linear(x, name):
    out = x @ get[f"{name}.weight"].T
    return out + get.get(f"{name}.bias", 0.0)

  def norm(x, name):
    scale = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
    return x / scale * get[f"{name}.weight"] + get.get(f"{name}.bias", 0.0)

  def rotate(x):  # [S, dim]
    out = np.empty_like(x)
    for place in range(length):
      for j in range(dim // 2):
        angle = place / config["rope_theta"] ** (2 * j / dim)
        a, b = x[place, j], x[place, j + dim // 2]
        out[place, j] = a * np.cos(angle) - b * np.sin(angle)
        out[place, j + dim // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out

  x = get["model.transformer.wte.weight"][tokens]
  if config["input_emb_norm"]:
    x = x * np.sqrt(width)
  for layer in range(config["n_layers"]):
    block = f"model.transformer.blocks.{layer}"
    h = norm(x, f"{block}.attn_norm")
    q, k, v = (linear(h, f"{block}.{n}_proj") for n in "qkv")
    if config["attention_layer_norm"]:
      q, k = norm(q, f"{block}.q_norm"), norm(k, f"{block}.k_norm")
    kv_heads = k.shape[1] // dim
    attended = []
    for head in range(heads):
      served = head // (heads // kv_heads)
      mine = slice(head * dim, head * dim + dim)
      theirs = slice(served * dim, served * dim + dim)
      scores = rotate(q[:, mine]) @ rotate(k[:, theirs]).T / np.sqrt(dim)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      attended.append(weights @ v[:, theirs])
    x = x + linear(np.concatenate(attended, -1), f"{block}.attn_out")
    h = norm(x, f"{block}.ff_norm")
    gate = linear(h, f"{block}.ff_proj")
    inner = gate / (1 + np.exp(-gate)) * linear(h, f"{block}.up_proj")
    x = x + linear(inner, f"{block}.ff_out")
  x = norm(x, "model.transformer.ln_f")
  if config["weight_tying"]:
    logits = x @ get["model.transformer.wte.weight"].T
  else:
    logits = linear(x, "model.transformer.ff_out")
  return logits / np.sqrt(width) if config["scale_logits"] else logits


@functools.partial(jax.jit, static_argnums=0)
def _raw_logits(config, params, tokens, mask):
  h = transformer.hidden(config, params, tokens, mask)
  return transformer.project(config, params, h)


def raw_logits(model, tokens, mask=None):
  """Unshifted logits of a loaded model."""
  return np.asarray(_raw_logits(model.config, model.params, tokens, mask))


# --- Parity with recorded logits ---------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_recorded_ones(shared, name):
  folder = shared / "fixtures" / "models" / name
  model = hf_weights.load_model(folder)
  recorded = np.load(folder / "reference_logits.npz")
  cases = sorted({key.split(".")[0] for key in recorded.files})
  assert len(cases) == 6
  for case in cases:
    tokens = recorded[f"{case}.input_ids"]
    mask = np.ones(tokens.shape, bool)
    if f"{case}.attention_mask" in recorded.files:
      mask = recorded[f"{case}.attention_mask"].astype(bool)
    n, length = tokens.shape
    if case != "plain":
      # One shape for all but one case: compiling is what takes the time here.
      pads = ((0, 3 - n), (64 - length, 0))
      tokens, padded = np.pad(tokens, pads), np.pad(mask, pads)
      logits = raw_logits(model, tokens, jnp.asarray(padded))[:n, -length:]
    else:
      logits = raw_logits(model, tokens)
    difference = np.abs(logits - recorded[f"{case}.logits"])[mask]
    assert difference.max() <= 1e-3, case


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_no_logits(shared, name):
  model = hf_weights.load_model(shared / "fixtures" / "models" / name)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 200, (2, 12)).astype(np.int32)
  pads = np.full((2, 7), model.config.pad_id, np.int32)
  mask = np.ones((2, 19), bool)
  mask[:, :7] = False
  plain = raw_logits(model, tokens)
  padded = raw_logits(
    model, np.concatenate([pads, tokens], axis=1), jnp.asarray(mask)
  )
  # Rounding alone: these random models have logits of size 10, and recorded
  # float32 logits of theirs lie 2e-5 to 9e-5 from the float64 ones.
  assert np.abs(padded[:, 7:] - plain).max() <= 4e-6 * np.abs(plain).max()


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"attention_layer_norm": True},
    {"attention_layer_norm": True, "bias_for_layer_norm": True},
    {"include_bias": True, "bias_for_layer_norm": None},
    {"include_bias": True, "bias_for_layer_norm": False},
    {"include_qkv_bias": True},
    {"bias_for_layer_norm": True},
    {"weight_tying": True, "scale_logits": True},
    {"input_emb_norm": True},
    {"n_kv_heads": None},
    {"n_kv_heads": None, "multi_query_attention": True},
    {"n_kv_heads": 1, "multi_query_attention": True},
    {"n_kv_heads": 6, "multi_query_attention": False},
    {"mlp_hidden_size": None},
    {"embedding_size": None},
    {"rms_norm_eps": 0.5, "rope_theta": 7.0},
  ],
  ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "plain",
)
def test_each_switch_of_the_config_does_what_the_original_does(
  tmp_path, changes
):
  config = LLADA | changes
  tensors = tensors_of(config)
  model = hf_weights.load_model(write_folder(tmp_path, config, tensors))
  tokens = np.random.default_rng(1).integers(0, 33, 9).astype(np.int32)
  expected = reference_logits(config, tensors, tokens)
  logits = raw_logits(model, tokens[None])[0]
  assert logits.shape == expected.shape
  assert np.abs(logits - expected).max() <= 1e-4


# --- Names and shapes of the released checkpoints ----------------------------


@pytest.mark.parametrize(
  ("name", "count"), [("llada_8b_instruct", 291), ("dream_v0_instruct_7b", 339)]
)
def test_every_released_name_is_consumed_and_none_left_over(
  shared, name, count
):
  folder = shared / "fixtures" / "hub_metadata"
  index = json.loads((folder / f"{name}_index.json").read_text())
  config = json.loads((folder / f"{name}_config.json").read_text())
  leaves = hf_weights.leaves(families.from_hf(config))
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
  assert published.PUBLISHED[key] == families.from_hf(config)


# --- There and back ----------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("llada_tiny_A", "float32"),
    ("llada_tiny_gqa", "float32"),
    ("llada_tiny_bf16", "bfloat16"),
    ("dream_tiny", "float32"),
  ],
)
def test_saving_returns_the_checkpoint_bit_for_bit(
  shared, tmp_path, monkeypatch, name, dtype
):
  folder = shared / "fixtures" / "models" / name
  model = hf_weights.load_model(folder, dtype)
  monkeypatch.setattr(hf_weights, "SHARD_BYTES", 60_000)
  hf_weights.save_model(model, tmp_path)
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  before, after = read_folder(folder), read_folder(tmp_path)
  assert before.keys() == after.keys()
  for key in before:
    assert before[key].dtype == after[key].dtype
    assert before[key].shape == after[key].shape
    assert before[key].tobytes() == after[key].tobytes(), key
  written = json.loads((tmp_path / "config.json").read_text())
  read = json.loads((folder / "config.json").read_text())
  assert written == read
  again = hf_weights.load_model(tmp_path, dtype)
  assert again.config == model.config


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_casts_round_as_numpy_does(tmp_path, monkeypatch, stored, wanted):
  # A block far smaller than a tensor, so that the seams are tested too.
  monkeypatch.setattr(hf_weights, "READ_BYTES", 100)
  dtypes = {"bfloat16": ml_dtypes.bfloat16}
  tensors = tensors_of(DREAM, dtype=dtypes.get(stored, stored))
  folder = write_folder(tmp_path / "in", DREAM, tensors, shards=3)
  model = hf_weights.load_model(folder, wanted)
  hf_weights.save_model(model, tmp_path / "out")
  after = read_folder(tmp_path / "out")
  for key, value in tensors.items():
    cast = value.astype(dtypes.get(wanted, wanted))
    assert after[key].tobytes() == cast.tobytes(), key


def test_a_second_save_leaves_no_shards_of_the_first(tmp_path, monkeypatch):
  folder = write_folder(tmp_path / "in", LLADA, tensors_of(LLADA))
  loaded = hf_weights.load_model(folder)
  config, params = loaded.config, loaded.params
  model = hf_weights.Model(config, params)
  tmp_path = tmp_path / "out"
  monkeypatch.setattr(hf_weights, "SHARD_BYTES", 5_000)
  hf_weights.save_model(model, tmp_path)
  monkeypatch.undo()
  hf_weights.save_model(model, tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "config.json",
    "model.safetensors",
  ]
  again = hf_weights.load_model(tmp_path)
  equal = jax.tree.map(lambda a, b: (a == b).all(), params, again.params)
  assert jax.tree.all(equal)


@pytest.mark.parametrize("source", [LLADA, DREAM], ids=["llada", "dream"])
def test_a_derived_config_reads_back_as_the_same_model(source):
  config = families.from_hf(source)
  assert families.from_hf(families.to_hf(config)) == config


def test_other_small_files_of_the_folder_come_along(tmp_path):
  folder = write_folder(tmp_path / "in", LLADA, tensors_of(LLADA))
  (folder / "modeling_llada.py").write_text("# code")
  (folder / "generation_config.json").write_text("{}")
  model = hf_weights.load_model(folder)
  hf_weights.save_model(model, tmp_path / "out")
  assert (tmp_path / "out" / "modeling_llada.py").read_text() == "# code"
  assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"


def test_saving_refuses_parameters_that_the_config_does_not_describe(tmp_path):
  folder = write_folder(tmp_path / "in", LLADA, tensors_of(LLADA))
  loaded = hf_weights.load_model(folder)
  config, params = loaded.config, loaded.params
  wider = LLADA | {"rope_theta": 5.0}
  with pytest.raises(ValueError, match=r"rope_theta=100\.0"):
    hf_weights.save_model(
      hf_weights.Model(config, params, source_config=wider), tmp_path / "a"
    )
  extra = {**params, "adapter": {"kernel": np.zeros(3)}}
  with pytest.raises(ValueError, match="adapter/kernel"):
    hf_weights.save_model(hf_weights.Model(config, extra), tmp_path / "b")
  assert not (tmp_path / "a").exists()


def test_parameters_land_on_the_shardings_asked_for(tmp_path):
  folder = write_folder(tmp_path, LLADA, tensors_of(LLADA), shards=2)
  plain = hf_weights.load_model(folder)
  devices = np.array(jax.devices())
  mesh = jax.sharding.Mesh(devices, ("x",))
  ways = len(devices)

  def choose(leaf):
    axes = [None] * leaf.ndim
    if leaf.shape[-1] % ways == 0:
      axes[-1] = "x"
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.sharding.NamedSharding(mesh, spec)

  shardings = jax.tree.map(choose, plain.params)
  for given in (shardings, lambda config: shardings):
    model = hf_weights.load_model(folder, shardings=given)
    same = jax.tree.map(
      lambda a, b, s: bool((a == b).all()) and b.sharding == s,
      plain.params,
      model.params,
      shardings,
    )
    assert jax.tree.all(same)


def test_the_host_holds_one_parameter_at_a_time(tmp_path):
  config = LLADA | {
    "d_model": 192,
    "mlp_hidden_size": 576,
    "n_layers": 8,
    "embedding_size": 512,
  }
  folder = write_folder(tmp_path, config, tensors_of(config), shards=2)
  leaves = hf_weights.leaves(families.from_hf(config))
  largest = max(4 * int(np.prod(leaf.shape)) for leaf in leaves)
  total = sum(4 * int(np.prod(leaf.shape)) for leaf in leaves)
  hf_weights.load_model(folder)  # one-time costs of tracing are not weights
  tracemalloc.start()
  try:
    model = hf_weights.load_model(folder)
    # numpy reports its buffers here, the runtime's own are not counted.
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  del model
  assert total > 4 * largest
  assert peak < 1.15 * largest + 2**20


@pytest.fixture
def bucket(monkeypatch):
  """gs:// paths that lead to objects in memory, as epath's backend sees them."""
  memory = pytest.importorskip("fsspec.implementations.memory")
  backend = pytest.importorskip("etils.epath.backend")

  class Bucket(memory.MemoryFileSystem):
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(str(path).removeprefix("gs:/"))

  monkeypatch.setattr(
    backend._FileSystemSpecBackend, "_get_filesystem", lambda *_: Bucket()
  )
  return Bucket()


def test_a_bucket_serves_as_a_folder(tmp_path, bucket):
  config = LLADA | {"mask_token_id": 2, "eos_token_id": 3, "pad_token_id": 3}
  folder = write_folder(tmp_path / "in", config, tensors_of(config), shards=2)
  build_word_tokenizer(["a", "b"], ".").save(folder)
  model = hf_weights.load_model(folder)
  hf_weights.save_model(model, "gs://bucket/out/model")
  assert any(name.endswith("model.safetensors") for name in bucket.store)
  again = hf_weights.load_model("gs://bucket/out/model")
  equal = jax.tree.map(lambda a, b: (a == b).all(), model.params, again.params)
  assert jax.tree.all(equal)
  assert again.tokenizer.encode("ab") == [0, 1]
  with pytest.raises(hf_weights.CheckpointError, match="does not exist"):
    hf_weights.load_model("gs://bucket/out/other")


def test_a_bucket_without_its_library_says_what_to_install(monkeypatch):
  backend = pytest.importorskip("etils.epath.backend")
  epath = pytest.importorskip("etils.epath")

  def missing(*_):
    raise ImportError("Please install gcsfs")

  monkeypatch.setattr(
    backend._FileSystemSpecBackend, "_get_filesystem", missing
  )
  with pytest.raises(hf_weights.CheckpointError, match=r"gcsfs.*\[gcs\]"):
    hf_weights.load_model("gs://bucket/model")
  with pytest.raises(hf_weights.CheckpointError, match=r"gcsfs.*\[gcs\]"):
    hf_weights.make_folder(epath.Path("gs://bucket/model"))


# --- Bad checkpoints ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  """A good checkpoint in two files, for tests to damage."""
  return write_folder(tmp_path / "m", LLADA, tensors_of(LLADA), shards=2)


@pytest.fixture(autouse=True)
def nothing_half_loaded(monkeypatch, request):
  """In tests of bad checkpoints no weight may be read before the error."""
  if "folder" not in request.fixturenames:
    return

  def refuse(*_):
    raise AssertionError("a weight was read from a bad checkpoint")

  monkeypatch.setattr(hf_weights, "_read_leaf", refuse)


def edit(folder, file, change):
  """Rewrites one safetensors file, the index left as it is."""
  tensors = safetensors.numpy.load_file(folder / file)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / file)


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def test_a_missing_tensor_is_named_with_its_file(folder):
  name = next(iter(safetensors.numpy.load_file(folder / FIRST)))
  edit(folder, FIRST, lambda t: t.pop(name))
  with pytest.raises(hf_weights.MissingTensor, match=f"{name}.*{FIRST}"):
    hf_weights.load_model(folder)


def test_a_tensor_missing_from_index_and_files_is_named(tmp_path):
  tensors = tensors_of(LLADA)
  tensors.pop("model.transformer.blocks.1.q_proj.weight")
  folder = write_folder(tmp_path, LLADA, tensors)
  with pytest.raises(
    hf_weights.MissingTensor,
    match=r"blocks\.1\.q_proj\.weight \(shape \(24, 24\)\).*model.safetensors",
  ):
    hf_weights.load_model(folder)


def test_a_missing_shard_is_named(folder):
  (folder / SECOND).unlink()
  with pytest.raises(hf_weights.MissingTensor, match=f"{SECOND}.*Download"):
    hf_weights.load_model(folder)


def test_an_unexpected_tensor_is_named_with_its_file(folder):
  edit(folder, SECOND, lambda t: t.update({"extra.bias": np.zeros(3)}))
  with pytest.raises(hf_weights.UnsupportedConfig, match=r"extra\.bias.*F64"):
    hf_weights.load_model(folder)
  edit(
    folder, SECOND, lambda t: t.update({"extra.bias": np.zeros(3, np.float32)})
  )
  with pytest.raises(
    hf_weights.UnexpectedTensor, match=rf"{SECOND} holds extra\.bias"
  ):
    hf_weights.load_model(folder)


def test_a_head_beside_tied_embeddings_is_unexpected(tmp_path):
  config = LLADA | {"weight_tying": True}
  folder = write_folder(tmp_path, config, tensors_of(LLADA))
  with pytest.raises(
    hf_weights.UnexpectedTensor, match=r"model\.transformer\.ff_out\.weight"
  ):
    hf_weights.load_model(folder)


def test_a_tensor_in_two_files_is_a_duplicate(folder):
  first = safetensors.numpy.load_file(folder / FIRST)
  name = next(iter(first))
  edit(folder, SECOND, lambda t: t.update({name: first[name]}))
  with pytest.raises(
    hf_weights.DuplicateTensor, match=f"{name}.*{FIRST}.*{SECOND}"
  ):
    hf_weights.load_model(folder)


def test_a_whole_file_beside_its_shards_is_a_duplicate(folder):
  safetensors.numpy.save_file(tensors_of(LLADA), folder / "model.safetensors")
  with pytest.raises(hf_weights.DuplicateTensor, match="keep one"):
    hf_weights.load_model(folder)


def test_a_name_twice_in_one_header_is_a_duplicate(folder):
  raw = (folder / FIRST).read_bytes()
  length = int.from_bytes(raw[:8], "little")
  header = raw[8 : 8 + length].decode().rstrip()
  name = next(k for k in json.loads(header) if k != "__metadata__")
  entry = json.dumps(json.loads(header)[name])
  doubled = (header[:-1] + f',"{name}":{entry}}}').encode()
  (folder / FIRST).write_bytes(
    len(doubled).to_bytes(8, "little") + doubled + raw[8 + length :]
  )
  with pytest.raises(hf_weights.DuplicateTensor, match=f"{FIRST}.*{name}"):
    hf_weights.load_model(folder)


def test_a_wrong_shape_names_both_shapes_and_the_file(folder):
  config = LLADA | {"mlp_hidden_size": 35}
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    hf_weights.WrongShape,
    match=r"blocks\.0\.\w+\.weight in model-0000\d.*\(.*36.*\).*\(.*35.*\)",
  ):
    hf_weights.load_model(folder)


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_truncated_file_is_told_as_such(folder, left):
  raw = (folder / SECOND).read_bytes()
  (folder / SECOND).write_bytes(raw[:left])
  with pytest.raises(hf_weights.CorruptFile, match=f"{SECOND} is truncated"):
    hf_weights.load_model(folder)


def test_a_damaged_header_is_told_as_such(folder):
  raw = bytearray((folder / SECOND).read_bytes())
  raw[20] = 0xFF
  (folder / SECOND).write_bytes(raw)
  with pytest.raises(hf_weights.CorruptFile, match=f"{SECOND} is damaged"):
    hf_weights.load_model(folder)


def test_bytes_after_the_last_tensor_are_damage(folder):
  with (folder / SECOND).open("ab") as stream:
    stream.write(b"tail")
  with pytest.raises(hf_weights.CorruptFile, match="too long"):
    hf_weights.load_model(folder)


@pytest.mark.parametrize("shard", ["../../etc/passwd", "a\\b", 3])
def test_an_index_may_not_point_out_of_the_folder(folder, shard):
  index = json.loads((folder / hf_weights.INDEX).read_text())
  index["weight_map"][next(iter(index["weight_map"]))] = shard
  (folder / hf_weights.INDEX).write_text(json.dumps(index))
  with pytest.raises(hf_weights.CorruptFile, match="not a file name"):
    hf_weights.load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}'])
def test_a_damaged_index_is_told_as_such(folder, content):
  (folder / hf_weights.INDEX).write_text(content)
  with pytest.raises(hf_weights.CorruptFile, match=r"index\.json is damaged"):
    hf_weights.load_model(folder)


def test_a_damaged_config_is_told_as_such(folder):
  (folder / "config.json").write_text('{"model_type": "lla')
  with pytest.raises(hf_weights.CorruptFile, match=r"config\.json is damaged"):
    hf_weights.load_model(folder)


def test_a_model_is_not_written_over_a_file(tmp_path):
  source = write_folder(tmp_path / "source", LLADA, tensors_of(LLADA))
  model = hf_weights.load_model(source)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match="is a file; give the folder"):
    hf_weights.save_model(model, tmp_path / "file")
  assert (tmp_path / "file").read_text() == "mine"


def test_folders_that_are_no_checkpoint_say_what_they_are(folder):
  load, error = hf_weights.load_model, hf_weights.CheckpointError
  with pytest.raises(error, match="is a file; give the folder"):
    load(folder / "config.json")
  with pytest.raises(error, match="does not exist"):
    load(folder / "nowhere" / "else")
  with pytest.raises(error, match=r"no config\.json.*\['m'\]"):
    load(folder.parent)
  (folder / "adapter").mkdir()
  (folder / "adapter" / "adapter_config.json").write_text("{}")
  with pytest.raises(error, match=r"PEFT adapter.*base model"):
    load(folder / "adapter")
  for file in folder.glob("*.safetensors*"):
    file.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(error, match=r"pytorch_model\.bin.*converted"):
    load(folder)


def test_a_hub_id_without_a_network_says_so(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip("huggingface_hub")

  def offline(*_, **__):
    raise OSError("no route")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(hf_weights.CheckpointError, match=r"hub failed.*no route"):
    hf_weights.load_model("owner/name")
  # A mistyped local path must not go to the network.
  (tmp_path / "runs").mkdir()
  with pytest.raises(hf_weights.CheckpointError, match="does not exist"):
    hf_weights.load_model("runs/nmae")


def test_a_dtype_that_checkpoints_cannot_hold_is_refused(folder):
  for dtype in ("float64", "int8", "bf16", None):
    with pytest.raises(ValueError, match=r"dtype=.*float32"):
      hf_weights.load_model(folder, dtype)


def test_a_shard_that_shrinks_while_it_is_read_is_told(tmp_path):
  folder = write_folder(tmp_path, LLADA, tensors_of(LLADA))
  stored = hf_weights.read_headers(folder)
  name = max(stored, key=lambda n: stored[n].offset)
  raw = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(raw[:-2])
  leaf = next(
    leaf
    for leaf in hf_weights.leaves(families.from_hf(LLADA))
    if name in leaf.names
  )
  with contextlib.ExitStack() as stack:
    reader = hf_weights._Reader(folder, stack)
    with pytest.raises(hf_weights.CorruptFile, match="ended while"):
      hf_weights._read_leaf(reader, leaf, stored, np.dtype(np.float32))


# --- Configs that are refused by name ----------------------------------------

OPTIONAL = {"mlp_ratio", "attention_layer_norm_with_affine"}


def test_the_folder_of_a_run_is_told_from_that_of_its_model():
  from configs import base

  with pytest.raises(
    hf_weights.UnsupportedConfig, match="in the folder model/"
  ):
    families.from_hf(base.get_config().to_dict())


@pytest.mark.parametrize("source", [LLADA, DREAM], ids=["llada", "dream"])
def test_no_missing_key_is_filled_with_a_default(source):
  for key in source.keys() - OPTIONAL:
    config = {k: v for k, v in source.items() if k != key}
    with pytest.raises(hf_weights.UnsupportedConfig, match=key):
      families.from_hf(config)
  used = {
    "mlp_ratio": {"mlp_hidden_size": None},
    "attention_layer_norm_with_affine": {"attention_layer_norm": True},
  }
  for key in OPTIONAL & source.keys():
    config = {k: v for k, v in source.items() if k != key} | used[key]
    with pytest.raises(hf_weights.UnsupportedConfig, match=key):
      families.from_hf(config)


@pytest.mark.parametrize(
  ("source", "key", "value"),
  [
    (LLADA, "model_type", "llama"),
    (LLADA, "activation_type", "swiglu"),
    (LLADA, "activation_type", "gelu"),
    (LLADA, "alibi", True),
    (LLADA, "rope", False),
    (LLADA, "block_type", "sequential"),
    (LLADA, "block_group_size", 2),
    (LLADA, "layer_norm_type", "default"),
    (LLADA, "layer_norm_type", "gemma_rms"),
    (LLADA, "layer_norm_with_affine", False),
    (LLADA, "embedding_size", 32),
    (LLADA, "n_kv_heads", 4),
    (LLADA, "multi_query_attention", True),
    (LLADA, "d_model", 25),
    (LLADA, "d_model", 24.0),
    (LLADA, "n_layers", 0),
    (LLADA, "rms_norm_eps", None),
    (LLADA, "rope_theta", -1.0),
    (LLADA, "weight_tying", None),
    (LLADA, "weight_tying", 1),
    (LLADA, "include_bias", None),
    (LLADA, "mask_token_id", 40),
    (LLADA, "eos_token_id", [1, 2]),
    (LLADA, "clip_qkv", 8.0),
    (LLADA, "residual_scale", 0.5),
    (LLADA, "quantization_config", {"bits": 4}),
    (DREAM, "hidden_act", "gelu"),
    (DREAM, "rope_scaling", {"type": "yarn", "factor": 4.0}),
    (DREAM, "use_sliding_window", True),
    (DREAM, "use_mrope", True),
    (DREAM, "num_key_value_heads", 5),
    (DREAM, "head_dim", 8),
  ],
)
def test_a_config_that_asks_for_something_else_is_refused(source, key, value):
  name = {"d_model": "d_model|width", "n_kv_heads": "kv_heads"}.get(key, key)
  name = {
    "num_key_value_heads": "kv_heads",
    "multi_query_attention": "multi_query_attention",
  }.get(key, name)
  with pytest.raises(hf_weights.UnsupportedConfig, match=name):
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


def test_ids_that_the_embedding_has_no_row_for_are_refused(tmp_path):
  tokenizer = build_word_tokenizer([*"0123456789"], r"[\s\S]")
  config = DREAM | {"mask_token_id": 10, "eos_token_id": 11}
  config |= {"pad_token_id": 11, "vocab_size": 13}
  write_folder(tmp_path, config, tensors_of(config))
  tokenizer.save(tmp_path)
  assert hf_weights.load_config(tmp_path).config.vocab_size == 13
  backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  backend.add_tokens(["<new>", "<newer>"])
  backend.save(str(tmp_path / "tokenizer.json"))
  message = "'<newer>' the id 13, but the embedding has 13 rows .1 tokens"
  with pytest.raises(hf_weights.UnsupportedConfig, match=message):
    hf_weights.load_config(tmp_path)


@pytest.mark.parametrize(
  ("source", "changes", "expected"),
  [
    (DREAM, {"rope_parameters": {"rope_theta": 1e4}}, 1e4),
    (
      DREAM,
      {"rope_parameters": {"rope_theta": 1e6}},
      "rope_parameters.*rope_theta=10000",
    ),
    (
      DREAM,
      {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e6}},
      1e6,
    ),
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
  with pytest.raises(families.UnsupportedConfig, match=expected):
    families.from_hf(config)


def test_unknown_files_beside_the_checkpoint_do_not_matter(tmp_path):
  folder = write_folder(tmp_path / "with", LLADA, tensors_of(LLADA))
  # Weights of the same names: read by mistake they would be taken.
  safetensors.numpy.save_file(
    {name: tensor + 1 for name, tensor in tensors_of(LLADA).items()},
    folder / "adapter_model.safetensors",
  )
  (folder / "README.md").write_text("hello")
  clean = write_folder(tmp_path / "clean", LLADA, tensors_of(LLADA))
  loaded, alone = (hf_weights.load_model(path) for path in (folder, clean))
  assert loaded.config == alone.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, alone.params)
