"""Checkpoints: what is read computes the recorded logits and returns whole."""

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
from etils import epath
from tiny_folders import DREAM, LLADA, tensors_of, write_folder

from rspo_jax.models import (
  checkpoints,
  families,
  model_folder,
  safetensors_files,
  transformer,
)
from rspo_jax.models.families import UnsupportedConfig
from rspo_jax.models.model_folder import CorruptFile, DuplicateTensor
from rspo_jax.models.safetensors_files import MissingTensor
from rspo_jax.models.tokenizer import build_word_tokenizer

MODELS = ("llada_tiny_A", "llada_tiny_gqa", "llada_tiny_bf16", "dream_tiny")


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
  model = checkpoints.load_model(folder)
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
  model = checkpoints.load_model(shared / "fixtures" / "models" / name)
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
    {"include_qkv_bias": True}, {"bias_for_layer_norm": True},
    {"weight_tying": True, "scale_logits": True}, {"input_emb_norm": True},
    {"n_kv_heads": None}, {"n_kv_heads": None, "multi_query_attention": True},
    {"n_kv_heads": 1, "multi_query_attention": True},
    {"n_kv_heads": 6, "multi_query_attention": False},
    {"mlp_hidden_size": None}, {"embedding_size": None},
    {"rms_norm_eps": 0.5, "rope_theta": 7.0},
  ],
  ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "plain",
)  # fmt: skip
def test_each_switch_of_the_config_does_what_the_original_does(
  tmp_path, changes
):
  config = LLADA | changes
  tensors = tensors_of(config)
  model = checkpoints.load_model(write_folder(tmp_path, config, tensors))
  tokens = np.random.default_rng(1).integers(0, 33, 9).astype(np.int32)
  expected = reference_logits(config, tensors, tokens)
  logits = raw_logits(model, tokens[None])[0]
  assert logits.shape == expected.shape
  assert np.abs(logits - expected).max() <= 1e-4


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
  model = checkpoints.load_model(folder, dtype)
  monkeypatch.setattr(checkpoints, "SHARD_BYTES", 60_000)
  checkpoints.save_model(model, tmp_path)
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
  again = checkpoints.load_model(tmp_path, dtype)
  assert again.config == model.config


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_casts_round_as_numpy_does(tmp_path, monkeypatch, stored, wanted):
  # A block far smaller than a tensor, so that the seams are tested too.
  monkeypatch.setattr(safetensors_files, "READ_BYTES", 100)
  dtypes = {"bfloat16": ml_dtypes.bfloat16}
  tensors = tensors_of(DREAM, dtype=dtypes.get(stored, stored))
  folder = write_folder(tmp_path / "in", DREAM, tensors, shards=3)
  model = checkpoints.load_model(folder, wanted)
  checkpoints.save_model(model, tmp_path / "out")
  after = read_folder(tmp_path / "out")
  for key, value in tensors.items():
    cast = value.astype(dtypes.get(wanted, wanted))
    assert after[key].tobytes() == cast.tobytes(), key


def test_a_second_save_leaves_no_shards_of_the_first(tmp_path, monkeypatch):
  folder = write_folder(tmp_path / "in", LLADA, tensors_of(LLADA))
  loaded = checkpoints.load_model(folder)
  config, params = loaded.config, loaded.params
  model = checkpoints.Model(config, params)
  tmp_path = tmp_path / "out"
  monkeypatch.setattr(checkpoints, "SHARD_BYTES", 5_000)
  checkpoints.save_model(model, tmp_path)
  monkeypatch.undo()
  checkpoints.save_model(model, tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "config.json",
    "model.safetensors",
  ]
  again = checkpoints.load_model(tmp_path)
  equal = jax.tree.map(lambda a, b: (a == b).all(), params, again.params)
  assert jax.tree.all(equal)


def test_other_small_files_of_the_folder_come_along(tmp_path):
  folder = write_folder(tmp_path / "in", LLADA, tensors_of(LLADA))
  (folder / "modeling_llada.py").write_text("# code")
  (folder / "generation_config.json").write_text("{}")
  model = checkpoints.load_model(folder)
  checkpoints.save_model(model, tmp_path / "out")
  assert (tmp_path / "out" / "modeling_llada.py").read_text() == "# code"
  assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"


def test_saving_refuses_parameters_that_the_config_does_not_describe(tmp_path):
  folder = write_folder(tmp_path / "in", LLADA, tensors_of(LLADA))
  loaded = checkpoints.load_model(folder)
  config, params = loaded.config, loaded.params
  wider = LLADA | {"rope_theta": 5.0}
  with pytest.raises(ValueError, match=r"rope_theta=100\.0"):
    checkpoints.save_model(
      checkpoints.Model(config, params, source_config=wider), tmp_path / "a"
    )
  extra = {**params, "adapter": {"kernel": np.zeros(3)}}
  with pytest.raises(ValueError, match="adapter/kernel"):
    checkpoints.save_model(checkpoints.Model(config, extra), tmp_path / "b")
  assert not (tmp_path / "a").exists()


def test_parameters_land_on_the_shardings_asked_for(tmp_path):
  folder = write_folder(tmp_path, LLADA, tensors_of(LLADA), shards=2)
  plain = checkpoints.load_model(folder)
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
    model = checkpoints.load_model(folder, shardings=given)
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
  leaves = checkpoints.leaves(families.from_hf(config))
  largest = max(4 * int(np.prod(leaf.shape)) for leaf in leaves)
  total = sum(4 * int(np.prod(leaf.shape)) for leaf in leaves)
  checkpoints.load_model(folder)  # one-time costs of tracing are not weights
  tracemalloc.start()
  try:
    model = checkpoints.load_model(folder)
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
  model = checkpoints.load_model(folder)
  checkpoints.save_model(model, "gs://bucket/out/model")
  assert any(name.endswith("model.safetensors") for name in bucket.store)
  again = checkpoints.load_model("gs://bucket/out/model")
  equal = jax.tree.map(lambda a, b: (a == b).all(), model.params, again.params)
  assert jax.tree.all(equal)
  assert again.tokenizer.encode("ab") == [0, 1]
  with pytest.raises(checkpoints.CheckpointError, match="does not exist"):
    checkpoints.load_model("gs://bucket/out/other")


def test_a_bucket_without_its_library_says_what_to_install(monkeypatch):
  backend = pytest.importorskip("etils.epath.backend")
  epath = pytest.importorskip("etils.epath")

  def missing(*_):
    raise ImportError("Please install gcsfs")

  monkeypatch.setattr(
    backend._FileSystemSpecBackend, "_get_filesystem", missing
  )
  with pytest.raises(checkpoints.CheckpointError, match=r"gcsfs.*\[gcs\]"):
    checkpoints.load_model("gs://bucket/model")
  with pytest.raises(checkpoints.CheckpointError, match=r"gcsfs.*\[gcs\]"):
    model_folder.make_folder(epath.Path("gs://bucket/model"))


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

  monkeypatch.setattr(checkpoints, "_read_leaf", refuse)


def reshaped(file, change):
  """A damage: one safetensors file with other tensors, the index as it is."""

  def damage(folder):
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file)

  return damage


def rewritten(file, change):
  """A damage: a file with other bytes."""

  def damage(folder):
    (folder / file).write_bytes(change((folder / file).read_bytes()))

  return damage


def elsewhere(shard):
  """A damage: the index says that a tensor is in another file."""

  def change(raw):
    index = json.loads(raw)
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    return json.dumps(index).encode()

  return rewritten(checkpoints.INDEX, change)


def doubled_name(raw):
  """A safetensors file whose header names its first tensor twice."""
  length = int.from_bytes(raw[:8], "little")
  header = raw[8 : 8 + length].decode().rstrip()
  entry = json.dumps(json.loads(header)[NAMES[0]])
  doubled = (header[:-1] + f',"{NAMES[0]}":{entry}}}').encode()
  return len(doubled).to_bytes(8, "little") + doubled + raw[8 + length :]


NAMES = list(tensors_of(LLADA))[::2]  # of the first file
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
EXTRA = np.zeros(3, np.float32)


@pytest.mark.parametrize(
  ("damage", "error", "message"),
  [
    (
      reshaped(FIRST, lambda t: t.pop(NAMES[0])),
      MissingTensor,
      f"{NAMES[0]}.*{FIRST}",
    ),
    (lambda f: (f / SECOND).unlink(), MissingTensor, f"{SECOND}.*Download"),
    (
      reshaped(SECOND, lambda t: t.update({"extra.bias": np.zeros(3)})),
      UnsupportedConfig,
      r"extra\.bias.*F64",
    ),
    (
      reshaped(SECOND, lambda t: t.update({"extra.bias": EXTRA})),
      checkpoints.UnexpectedTensor,
      rf"{SECOND} holds extra\.bias",
    ),
    (
      reshaped(SECOND, lambda t: t.update({NAMES[0]: EXTRA})),
      DuplicateTensor,
      f"{NAMES[0]}.*{FIRST}.*{SECOND}",
    ),
    (
      lambda f: safetensors.numpy.save_file(
        tensors_of(LLADA), f / "model.safetensors"
      ),
      DuplicateTensor,
      "keep one",
    ),
    (rewritten(FIRST, doubled_name), DuplicateTensor, f"{FIRST}.*{NAMES[0]}"),
    (
      rewritten("config.json", lambda c: c.replace(b": 36", b": 35")),
      checkpoints.WrongShape,
      r"blocks\.0\.\w+\.weight in model-0000\d.*\(.*36.*\).*\(.*35.*\)",
    ),
    *(
      (
        rewritten(SECOND, lambda raw, left=left: raw[:left]),
        CorruptFile,
        f"{SECOND} is truncated",
      )
      for left in (0, 5, 40, -1)
    ),
    (
      rewritten(SECOND, lambda raw: raw[:20] + b"\xff" + raw[21:]),
      CorruptFile,
      f"{SECOND} is damaged",
    ),
    (rewritten(SECOND, lambda raw: raw + b"tail"), CorruptFile, "too long"),
    *(
      (elsewhere(shard), CorruptFile, "not a file name")
      for shard in ("../../etc/passwd", "a\\b", 3)
    ),
    *(
      (
        rewritten(checkpoints.INDEX, lambda _, content=content: content),
        CorruptFile,
        r"index\.json is damaged",
      )
      for content in (b"{", b"[]", b'{"weight_map": {}}')
    ),
    (
      rewritten("config.json", lambda _: b'{"model_type": "lla'),
      CorruptFile,
      r"config\.json is damaged",
    ),
  ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong(
  folder, damage, error, message
):
  damage(folder)
  with pytest.raises(error, match=message):
    checkpoints.load_model(folder)


def test_a_tensor_missing_from_index_and_files_is_named(tmp_path):
  tensors = tensors_of(LLADA)
  tensors.pop("model.transformer.blocks.1.q_proj.weight")
  folder = write_folder(tmp_path, LLADA, tensors)
  message = r"blocks\.1\.q_proj\.weight \(shape \(24, 24\)\).*model.safetensors"
  with pytest.raises(MissingTensor, match=message):
    checkpoints.load_model(folder)


def test_a_head_beside_tied_embeddings_is_unexpected(tmp_path):
  config = LLADA | {"weight_tying": True}
  folder = write_folder(tmp_path, config, tensors_of(LLADA))
  with pytest.raises(
    checkpoints.UnexpectedTensor, match=r"model\.transformer\.ff_out\.weight"
  ):
    checkpoints.load_model(folder)


def test_a_model_is_not_written_over_a_file(tmp_path):
  source = write_folder(tmp_path / "source", LLADA, tensors_of(LLADA))
  model = checkpoints.load_model(source)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match="is a file; give the folder"):
    checkpoints.save_model(model, tmp_path / "file")
  assert (tmp_path / "file").read_text() == "mine"


def test_folders_that_are_no_checkpoint_say_what_they_are(folder):
  load, error = checkpoints.load_model, checkpoints.CheckpointError
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
  with pytest.raises(
    checkpoints.CheckpointError, match=r"hub failed.*no route"
  ):
    checkpoints.load_model("owner/name")
  # A mistyped local path must not go to the network.
  (tmp_path / "runs").mkdir()
  with pytest.raises(checkpoints.CheckpointError, match="does not exist"):
    checkpoints.load_model("runs/nmae")


def test_a_dtype_that_checkpoints_cannot_hold_is_refused(folder):
  for dtype in ("float64", "int8", "bf16", None):
    with pytest.raises(ValueError, match=r"dtype=.*float32"):
      checkpoints.load_model(folder, dtype)


def test_a_shard_that_shrinks_while_it_is_read_is_told(tmp_path):
  folder = epath.Path(write_folder(tmp_path, LLADA, tensors_of(LLADA)))
  stored = safetensors_files.read_headers(folder)
  last = max(stored.values(), key=lambda tensor: tensor.offset)
  rewritten("model.safetensors", lambda raw: raw[:-2])(folder)
  with (
    safetensors_files.Reader(folder) as reader,
    pytest.raises(CorruptFile, match="ended while"),
  ):
    reader.read(last, np.empty(last.shape, np.float32))


def test_ids_that_the_embedding_has_no_row_for_are_refused(tmp_path):
  tokenizer = build_word_tokenizer([*"0123456789"], r"[\s\S]")
  config = DREAM | {"mask_token_id": 10, "eos_token_id": 11}
  config |= {"pad_token_id": 11, "vocab_size": 13}
  write_folder(tmp_path, config, tensors_of(config))
  tokenizer.save(tmp_path)
  assert checkpoints.load_config(tmp_path).config.vocab_size == 13
  backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  backend.add_tokens(["<new>", "<newer>"])
  backend.save(str(tmp_path / "tokenizer.json"))
  message = "'<newer>' the id 13, but the embedding has 13 rows .1 tokens"
  with pytest.raises(UnsupportedConfig, match=message):
    checkpoints.load_config(tmp_path)


def test_unknown_files_beside_the_checkpoint_do_not_matter(tmp_path):
  folder = write_folder(tmp_path / "with", LLADA, tensors_of(LLADA))
  # Weights of the same names: read by mistake they would be taken.
  safetensors.numpy.save_file(
    {name: tensor + 1 for name, tensor in tensors_of(LLADA).items()},
    folder / "adapter_model.safetensors",
  )
  (folder / "README.md").write_text("hello")
  clean = write_folder(tmp_path / "clean", LLADA, tensors_of(LLADA))
  loaded, alone = (checkpoints.load_model(path) for path in (folder, clean))
  assert loaded.config == alone.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, alone.params)
