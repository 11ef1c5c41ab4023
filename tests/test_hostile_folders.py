"""Every file of a checkpoint is data: it loads, or it is refused by name."""

import json
import os
import pathlib
import random
import struct
import time
import warnings

import pytest
from test_hf_weights import LLADA, tensors_of, write_folder
from test_lora import llada_modules, peft_folder
from tokenizers import decoders, normalizers

from rspo_jax import tokenizer as tokenizer_lib
from rspo_jax import workers
from rspo_jax.models import families, hf_adapters, hf_folder, hf_weights
from rspo_jax.models.families import CheckpointError
from rspo_jax.tokenizer import Tokenizer, build_word_tokenizer

TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}"
  "{% if not loop.last %}\n{% endif %}{% endfor %}"
)
TEXT = "25,56,11=92"


def word_folder(folder: pathlib.Path) -> pathlib.Path:
  """A tiny LLaDA in two shards with tokenizer.json and an adapter."""
  config = LLADA | {"mask_token_id": 12, "eos_token_id": 13, "pad_token_id": 13}
  write_folder(folder, config, tensors_of(config), shards=2)
  words = build_word_tokenizer([*"0123456789,="], r"[\s\S]")
  backend = words.backend
  backend.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(" ", ",")]
  )
  backend.decoder = decoders.Sequence(
    [decoders.Replace("_", " "), decoders.Fuse()]
  )
  words.save(folder)
  backend.save(str(folder / "tokenizer.json"))
  file = folder / "tokenizer_config.json"
  options = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
  options["additional_special_tokens"] = ["<|mdm_mask|>"]
  file.write_text(json.dumps(options))
  tokens = {"bos_token": {"content": "<|endoftext|>", "lstrip": False}}
  (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
  peft_folder(folder, tensors_of(LLADA), llada_modules(), exclude_modules=[])
  return folder


def byte_folder(folder: pathlib.Path) -> pathlib.Path:
  """A tokenizer in the older layout, for the tiny LLaDA's 40 rows."""
  folder.mkdir(parents=True)
  pieces = [*"0123456789,=", "25"]
  added = {"[M]": 13, "[E]": 14, "<a>": 15}
  config = LLADA | {"mask_token_id": 13, "eos_token_id": 14, "pad_token_id": 14}
  options = {
    "mask_token": "[M]",
    "eos_token": {"content": "[E]"},
    "pad_token": "[E]",
    "added_tokens_decoder": {
      "15": {"content": "<a>", "special": False, "lstrip": False},
      "16": {"content": "<b>"},
    },
    "chat_template": [{"name": "default", "template": TEMPLATE}],
  }
  for name, content in (
    ("config.json", config),
    ("vocab.json", {piece: i for i, piece in enumerate(pieces)}),
    ("added_tokens.json", added),
    ("tokenizer_config.json", options),
  ):
    (folder / name).write_text(json.dumps(content))
  (folder / "merges.txt").write_text("#version: 0.2\n2 5\n")
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  return folder


# --- Fuzzing -----------------------------------------------------------------

VALUES = (
  None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e-40, 1e300, float("inf"),
  float("nan"), 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, "", "x", "\0",
  "../x", "é\ud800", "(" * 50, "x" * 10**5, [], [[]], [None], [1, [2]], {},
  {"x": {}}, {"content": 3}, {"type": "Sequence"}, [{"name": 1}],
  "{% for %}", "{{ 1 / 0 }}", "{{ nothing.at.all }}",
)  # fmt: skip


def places(value, path=()):
  """Paths of all entries of a JSON value."""
  found = [path] if path else []
  items = ()
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  for key, child in items:
    found += places(child, (*path, key))
  return found


def damage_json(rng: random.Random, content: bytes) -> bytes:
  """A JSON file with one entry of another value, gone, or too many."""
  value = json.loads(content)
  *path, last = rng.choice(places(value))
  parent = value
  for key in path:
    parent = parent[key]
  kind = rng.randrange(8)
  if kind == 0 and isinstance(parent, dict):
    del parent[last]
  elif kind == 1 and isinstance(parent, dict):
    parent[rng.choice(["x", "", "rope_parameters", "bos_token"])] = rng.choice(
      VALUES
    )
  elif kind == 2:
    parent[last] = [parent[last]]
  elif kind == 3:
    parent[last] = "NESTED"
  else:
    parent[last] = rng.choice(VALUES)
  text = json.dumps(value)
  return text.replace('"NESTED"', "[" * 10**5 + "]" * 10**5).encode()


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
  """A file cut short, with other bytes, or of another kind altogether."""
  kind = rng.randrange(4)
  place = rng.randrange(len(content))
  if kind == 0:
    return content[:place]
  if kind == 1:
    return rng.choice([b"", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"{}"])
  other = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4])))
  return content[:place] + other + content[place + len(other) * (kind == 2) :]


def damage(rng: random.Random, name: str, content: bytes) -> bytes:
  """A damaged file of a folder."""
  if name.endswith(".safetensors") and rng.randrange(6):
    length = int.from_bytes(content[:8], "little")
    header = damage_json(rng, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
  if name.endswith(".json") and rng.randrange(6):
    return damage_json(rng, content)
  return damage_bytes(rng, content)


def use(folder: pathlib.Path, name: str, wanted) -> None:
  """Loads what a file belongs to, as far as that file matters."""
  if name.startswith("adapter"):
    hf_adapters.load_adapter(folder, families.from_hf(LLADA))
    return
  if name.endswith((".safetensors", hf_weights.INDEX)):
    stored = hf_weights.read_headers(folder)
    hf_weights.check_tensors(wanted, stored, str(folder))
    return
  model = hf_weights.load_config(folder)
  if name == "config.json":
    hf_weights.leaves(model.config)
  tokenizer = model.tokenizer
  for call in (
    lambda: tokenizer.decode(tokenizer.encode(TEXT)),
    lambda: tokenizer.chat([{"role": "user", "content": TEXT}]),
    lambda: tokenizer.vocab_size,
  ):
    try:
      call()
    except ValueError:
      assert name not in ("config.json", "generation_config.json")


WORD_FILES = {
  "config.json": 90,
  "tokenizer.json": 100,
  "tokenizer_config.json": 40,
  "special_tokens_map.json": 20,
  "model-00001-of-00002.safetensors": 70,
  "model.safetensors.index.json": 30,
  "adapter_config.json": 50,
  "adapter_model.safetensors": 20,
}
BYTE_FILES = {
  "tokenizer_config.json": 40,
  "vocab.json": 15,
  "merges.txt": 10,
  "added_tokens.json": 20,
  "chat_template.jinja": 15,
}


@pytest.mark.parametrize(
  ("make", "name", "cases"),
  [
    *((word_folder, name, cases) for name, cases in WORD_FILES.items()),
    *((byte_folder, name, cases) for name, cases in BYTE_FILES.items()),
  ],
  ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_damaged_file_loads_or_is_refused_by_its_name(
  tmp_path, make, name, cases
):
  folder = make(tmp_path / "folder")
  sound = (folder / name).read_bytes()
  wanted = hf_weights.leaves(families.from_hf(LLADA))
  use(folder, name, wanted)
  rng = random.Random(f"{make.__name__} {name}")
  refused = 0
  for _ in range(cases):
    content = damage(rng, name, sound)
    (folder / name).write_bytes(content)
    begin = time.monotonic()
    try:
      use(folder, name, wanted)
    except CheckpointError as error:
      refused += 1
      named = [
        file.name for file in folder.iterdir() if file.name in str(error)
      ]
      assert named, (content[:300], str(error))
      assert len(str(error)) < 3000, str(error)[:300]
    except BaseException as error:
      error.add_note(f"{name}: {content[:2000]!r}")
      raise
    assert time.monotonic() - begin < 20, content[:300]
  assert refused > cases // 10


# --- Rules that explode ------------------------------------------------------


def change(folder: pathlib.Path, name: str, **entries) -> None:
  """Replaces entries of a JSON file."""
  file = folder / name
  file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def replace(pattern, content):
  return {"type": "Replace", "pattern": pattern, "content": content}


def split(expression):
  return {
    "type": "Split",
    "pattern": {"Regex": expression},
    "behavior": "Isolated",
    "invert": False,
  }


DOUBLING = [replace({"String": "z"}, "zz")] * 64  # no sample holds a z


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    (
      {"normalizer": {"type": "Sequence", "normalizers": DOUBLING}},
      "the normalizer .* could make a text 1.84e.19 times longer",
    ),
    (
      {"decoder": {"type": "Sequence", "decoders": DOUBLING}},
      "the decoder .* could make a text",
    ),
    (
      {"normalizer": replace({"Regex": "(?:)"}, "x" * 5000)},
      "the normalizer .* could make a text 5e.03 times longer",
    ),
    (
      {"normalizer": {"type": "Prepend", "prepend": "x" * 5000}},
      "the normalizer .* could make a text",
    ),
    (
      {
        "normalizer": {
          "type": "Sequence",
          "normalizers": [replace({"String": "a"}, "a" * 1000)] * 9,
        },
        # Added tokens are normalized as the file is read.
        "added_tokens": [
          {"id": 14, "content": "a", "normalized": True, "special": False}
          | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
      },
      "tokenizer.json.*cannot be used: .* fails .*(SIGABRT|SIGSEGV|SIGKILL|3 s)",
    ),
    (
      {"pre_tokenizer": split(r"(a+)+\$")},
      "tokenizer.json.*cannot be used: .* fails .*retry-limit",
    ),
  ],
)
def test_rules_that_explode_are_refused_and_end_no_run(
  tmp_path, monkeypatch, rules, message
):
  limits = workers.Limits(time_s=3.0, memory_bytes=1 << 30)
  monkeypatch.setattr(tokenizer_lib, "_TRIAL", limits)
  tokenizer_lib._worker.cache_clear()
  folder = word_folder(tmp_path / "folder")
  assert Tokenizer.load(folder) is not None
  change(folder, "tokenizer.json", **rules)
  with pytest.raises(CheckpointError, match=message):
    Tokenizer.load(folder)
  tokenizer_lib._worker.cache_clear()


def test_a_padding_rule_without_end_does_not_act(tmp_path):
  folder = word_folder(tmp_path / "folder")
  rule = {
    "strategy": {"Fixed": 10**15},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "0",
  }
  change(folder, "tokenizer.json", padding=rule)
  assert len(Tokenizer.load(folder).encode(TEXT)) == len(TEXT)


def test_an_expression_that_fails_on_one_text_is_an_error_of_that_text(
  tmp_path,
):
  folder = word_folder(tmp_path / "folder")
  change(folder, "tokenizer.json", pre_tokenizer=split(r"(9+)+\$"))
  loaded = Tokenizer.load(folder)
  with pytest.raises(ValueError, match=r"cannot encode '999.*retry-limit"):
    loaded.encode("9" * 500 + "=")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("n_layers", 10**9),
    ("d_model", 2**62),
    ("vocab_size", 10**400),
    ("embedding_size", 2**40),
    ("mlp_hidden_size", 10**12),
    ("max_sequence_length", 2**70),
    ("n_heads", 2**40),
    ("rope_theta", 10**400),
    ("rms_norm_eps", 1e-300),
    ("model_type", ["llada"]),
    ("model_type", {}),
  ],
)
def test_a_size_beyond_all_models_is_refused_at_once(key, value):
  begin = time.monotonic()
  with pytest.raises(CheckpointError, match=f"config.json: {key}="):
    families.from_hf(LLADA | {key: value})
  assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
  ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_opened(tmp_path, name, kind):
  folder = word_folder(tmp_path / "folder")
  (folder / name).unlink()
  if kind == "pipe":
    os.mkfifo(folder / name)
  elif kind == "folder":
    (folder / name).mkdir()
  else:
    (folder / name).symlink_to("/dev/zero")
  if kind == "device" and name == "special_tokens_map.json":
    with pytest.warns(UserWarning, match="link to /dev/zero"):
      hf_weights.load_config(folder)
    return
  with pytest.raises(CheckpointError, match=f"{name}|tokenizer.json"):
    use(folder, name, hf_weights.leaves(families.from_hf(LLADA)))


def test_a_small_file_that_is_huge_is_not_read(tmp_path):
  folder = word_folder(tmp_path / "folder")
  with (folder / "config.json").open("r+b") as stream:
    stream.truncate(1 << 40)  # without a block on the disk
  with pytest.raises(CheckpointError, match=r"config.json has 1099511627776"):
    hf_weights.load_config(folder)


# --- Links -------------------------------------------------------------------


def test_links_that_leave_the_folder_are_neither_read_nor_exported(tmp_path):
  secret = tmp_path / "id_rsa"
  secret.write_text("PRIVATE KEY")
  folder = word_folder(tmp_path / "folder")
  (folder / "modeling_llada.py").symlink_to(secret)
  (folder / "configuration_llada.py").symlink_to("../id_rsa")
  (folder / "merges.txt").symlink_to(tmp_path / "linked")
  (tmp_path / "linked").symlink_to(secret)
  (folder / "generation_x.py").symlink_to("tokenizer.json")  # stays within
  (folder / "tokenization_x.py").symlink_to(tmp_path / "gone")
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("default")
    for _ in range(2):
      model = hf_weights.load_model(folder)
  assert sorted(model.source_files) == ["generation_x.py"]
  hf_weights.save_model(model, tmp_path / "export")
  for file in (tmp_path / "export").iterdir():
    assert b"PRIVATE" not in file.read_bytes(), file
    assert not file.is_symlink()
  texts = [str(warning.message) for warning in told]
  for name in ("modeling_llada.py", "configuration_llada.py", "merges.txt"):
    assert sum(f"{name} is a link to {secret}" in text for text in texts) == 1


def test_a_tokenizer_that_only_links_elsewhere_is_refused(tmp_path):
  folder = word_folder(tmp_path / "folder")
  (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
  (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
  message = "'tokenizer.json'. are links that leave the folder.*copy"
  with (
    pytest.warns(UserWarning, match="neither read nor exported"),
    pytest.raises(CheckpointError, match=message),
  ):
    hf_weights.load_config(folder)


def test_a_folder_in_the_cache_of_the_hub_loads_through_its_links(tmp_path):
  plain = word_folder(tmp_path / "plain")
  (plain / "modeling_llada.py").write_text("# code")
  cache = tmp_path / "models--owner--name"
  snapshot = cache / "snapshots" / ("0" * 40)
  snapshot.mkdir(parents=True)
  (cache / "blobs").mkdir()
  for i, file in enumerate(sorted(plain.iterdir())):
    file.rename(cache / "blobs" / f"{i:064x}")
    (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
  (tmp_path / "id_rsa").write_text("PRIVATE KEY")
  (snapshot / "modeling_x.py").symlink_to("../../../id_rsa")
  (tmp_path / "short").symlink_to(snapshot)  # a link to the folder itself
  for folder in (snapshot, tmp_path / "short"):
    with pytest.warns(UserWarning, match=r"modeling_x\.py is a link"):
      model = hf_weights.load_model(folder)
    assert model.tokenizer.encode("25") == [2, 5]
    assert model.source_files == {"modeling_llada.py": b"# code"}


def test_weights_may_lie_elsewhere(tmp_path):
  """They are parsed, not copied, and a disk of their own is a common place."""
  folder = word_folder(tmp_path / "folder")
  for file in sorted(folder.glob("model-*.safetensors")):
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
  assert hf_weights.load_model(folder).params


def test_an_expression_of_an_adapter_that_goes_back_for_ever_is_refused(
  tmp_path, monkeypatch
):
  limits = workers.Limits(time_s=1.0, memory_bytes=512 << 20)
  monkeypatch.setattr(hf_folder, "_LIMITS", limits)
  folder = word_folder(tmp_path / "folder")
  change(folder, "adapter_config.json", target_modules="(.*.*)*x")
  with pytest.raises(CheckpointError, match=r"target_modules='\(.*longer than"):
    hf_adapters.load_adapter(folder, families.from_hf(LLADA))
