"""Checkpoints in the Hugging Face layout: read into params, written back.

Reading, in order:

1. config.json becomes a `ModelConfig` (`families.from_hf`), the tokenizer's
   files a `Tokenizer`.
2. One table per family pairs checkpoint names with parameter paths; with the
   shapes of `transformer.init` it says which tensors a checkpoint must hold.
   All headers are compared with that before a single weight is read, so that
   a checkpoint is loaded whole or not at all.
3. One stacked parameter at a time: its layers are read and cast into one host
   buffer, which is transposed from torch's [out, in] to [in, out] on its way
   to the devices, before the next one is begun. The host holds the checkpoint
   and one parameter, never two copies.

Writing goes the same way back under the same names, so that a checkpoint read
and saved in its own dtype is the same bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rspo_jax.models import families, hf_folder, transformer
from rspo_jax.models.families import (
  CheckpointError,
  ModelConfig,
  UnsupportedConfig,
)
from rspo_jax.models.hf_folder import CorruptFile
from rspo_jax.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # the hub's own limit for one file
HEADER_BYTES = 100 * 10**6  # the largest that the format allows
READ_BYTES = 2**20  # block that is cast at a time; it stays in the cache

DTYPE_BY_CODE = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}

# Name of a file of weights: letters, digits, dots, dashes.
_SHARD = r"(?a:[\w][\w.-]{0,200})"

# Small files that other programs want beside the weights.
_COMPANIONS = ("generation_config.json",)

# Checkpoint module <-> path of the parameters' module. Names under `layer`
# are repeated for every layer and stacked on a leading axis.
_MODULES = {
  "llada": {
    "layer": "model.transformer.blocks.{layer}.",
    "modules": {
      "model.transformer.wte": ("embed",),
      "model.transformer.ln_f": ("final_norm",),
      "model.transformer.ff_out": ("head",),
      "attn_norm": ("layers", "attention_norm"),
      "ff_norm": ("layers", "mlp_norm"),
      "q_proj": ("layers", "query"),
      "k_proj": ("layers", "key"),
      "v_proj": ("layers", "value"),
      "q_norm": ("layers", "query_norm"),
      "k_norm": ("layers", "key_norm"),
      "attn_out": ("layers", "out"),
      "ff_proj": ("layers", "gate"),
      "up_proj": ("layers", "up"),
      "ff_out": ("layers", "down"),
    },
  },
  "dream": {
    "layer": "model.layers.{layer}.",
    "modules": {
      "model.embed_tokens": ("embed",),
      "model.norm": ("final_norm",),
      "lm_head": ("head",),
      "input_layernorm": ("layers", "attention_norm"),
      "post_attention_layernorm": ("layers", "mlp_norm"),
      "self_attn.q_proj": ("layers", "query"),
      "self_attn.k_proj": ("layers", "key"),
      "self_attn.v_proj": ("layers", "value"),
      "self_attn.o_proj": ("layers", "out"),
      "mlp.gate_proj": ("layers", "gate"),
      "mlp.up_proj": ("layers", "up"),
      "mlp.down_proj": ("layers", "down"),
    },
  },
}


class MissingTensor(CheckpointError):
  """A tensor that the config calls for is in no file, or its file is gone."""


class UnexpectedTensor(CheckpointError):
  """A file holds a tensor that the config has no place for."""


class DuplicateTensor(CheckpointError):
  """The same tensor is stored twice."""


class WrongShape(CheckpointError):
  """A tensor has another shape than the config says."""


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded checkpoint.

  Attributes:
    config: shape and behaviour.
    params: the parameter tree of `transformer`, layers stacked.
    tokenizer: None if the folder has none.
    source_config: config.json as read, for writing back.
    source_files: other small files of the folder, written back unchanged.
  """

  config: ModelConfig
  params: Any
  tokenizer: Tokenizer | None = None
  source_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter and the checkpoint tensors that it is made of.

  Attributes:
    path: keys in the parameter tree.
    shape: of the parameter, layers in front where `stacked`.
    names: checkpoint names, one a layer (one in all where not stacked).
    stacked: the leading axis counts layers.
    transposed: the checkpoint stores the transposed matrix.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  names: tuple[str, ...]
  stacked: bool
  transposed: bool

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each tensor in the checkpoint."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor lies in a safetensors file."""

  file: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int


def leaves(config: ModelConfig) -> list[Leaf]:
  """The parameters of a model with their names in its family's checkpoints."""
  table = _MODULES[config.family]
  module_by_path = {path: name for name, path in table["modules"].items()}
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  result = []
  for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    path = tuple(key.key for key in keys)
    module = module_by_path.get(path[:-1])
    if module is None:
      raise UnsupportedConfig(
        f"{config.family} checkpoints have no tensor for the parameter "
        f"{'/'.join(path)}; the config asks for a module that this family "
        "does not have."
      )
    suffix = "bias" if path[-1] == "bias" else "weight"
    stacked = path[0] == "layers"
    if stacked:
      names = tuple(
        f"{table['layer'].format(layer=i)}{module}.{suffix}"
        for i in range(config.layers)
      )
    else:
      names = (f"{module}.{suffix}",)
    result.append(
      Leaf(path, tuple(leaf.shape), names, stacked, path[-1] == "kernel")
    )
  return result


def load_model(path, dtype="float32", shardings=None) -> Model:
  """Reads a LLaDA or Dream checkpoint.

  Args:
    path: folder (local or `gs://`), or a hub id `owner/name` when
      `huggingface_hub` is installed.
    dtype: of the parameters: "float32", "bfloat16" or "float16". With
      "bfloat16" the model also computes in it, otherwise in float32;
      `config.compute_dtype` can be replaced afterwards.
    shardings: tree of `jax.sharding.Sharding` like the parameters, or a
      function from the ModelConfig to such a tree; None puts everything on
      the default device.

  Returns:
    The model, with the tokenizer if the folder has one.

  Raises:
    MissingTensor, UnexpectedTensor, DuplicateTensor, WrongShape,
    UnsupportedConfig, CorruptFile: each names tensor or key, and file.
    CheckpointError: there is no checkpoint at this path.
  """
  dtype = _storage_dtype(dtype)
  folder = resolve_folder(path)
  described = load_config(folder)
  config = described.config
  wanted = leaves(config)
  stored = check_tensors(wanted, read_headers(folder), str(folder))
  if dtype == DTYPE_BY_CODE["BF16"]:
    config = dataclasses.replace(config, compute_dtype="bfloat16")
  if callable(shardings):
    shardings = shardings(config)
  params = {}
  with contextlib.ExitStack() as stack:
    reader = _Reader(folder, stack)
    for leaf in wanted:
      sharding = None if shardings is None else _get(shardings, leaf.path)
      buffer = _read_leaf(reader, leaf, stored, dtype)
      _set(params, leaf.path, _place(buffer, sharding))
      del buffer
      # The runtime drops its hold on a host buffer only when it is called
      # again; without this two parameters would be in host memory.
      jax.device_put(np.float32(0))
  return dataclasses.replace(
    described,
    config=config,
    params=params,
    source_files=_companions(folder),
  )


def load_config(path) -> Model:
  """Reads what a checkpoint is, but no weights: `params` is None.

  Raises:
    UnsupportedConfig, CorruptFile, CheckpointError: as `load_model`.
  """
  folder = resolve_folder(path)
  source_config = read_config(folder)
  tokenizer = Tokenizer.load(folder, source_config)
  ids = {}
  if tokenizer is not None:
    ids = {
      "mask_token_id": tokenizer.mask_id,
      "eos_token_id": tokenizer.eos_id,
      "pad_token_id": tokenizer.pad_id,
    }
  config = families.from_hf(source_config, ids)
  if tokenizer is not None:
    _check_rows(tokenizer, config.vocab_size, str(folder))
  return Model(
    config=config,
    params=None,
    tokenizer=tokenizer,
    source_config=source_config,
  )


def _check_rows(tokenizer: Tokenizer, rows: int, where: str) -> None:
  """Refuses a tokenizer whose ids the embedding has no rows for."""
  id_by_token = tokenizer.backend.get_vocab()
  token = max(id_by_token, key=id_by_token.get)
  if id_by_token[token] >= rows:
    count = sum(id_ >= rows for id_ in id_by_token.values())
    raise UnsupportedConfig(
      f"{where}: the tokenizer gives {token!r:.80} the id {id_by_token[token]},"
      f" but the embedding has {rows} rows ({count} tokens have none); take the "
      "tokenizer that belongs to the weights, or add rows to them."
    )


def save_model(model: Model, path) -> None:
  """Writes a checkpoint folder that `load_model` reads back bit for bit.

  The dtype of each parameter decides its storage. Files appear under their
  names only when they are complete, config.json last.

  Args:
    model: what to write; its `source_config` is kept field by field, or
      derived from `config` where it is empty.
    path: folder, made if it is not there; weights of an earlier save in it
      are replaced.

  Raises:
    ValueError: the path is a file, config and source_config contradict each
      other, or parameters have other names, shapes or dtypes than the config
      says.
  """
  from etils import epath

  folder = epath.Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"path={path} is a file; give the folder of a checkpoint.")
  source_config = _config_to_write(model)
  wanted = leaves(model.config)
  by_path = {leaf.path: _get(model.params, leaf.path) for leaf in wanted}
  _check_params(wanted, by_path, model.params)
  shards = _plan_shards(wanted, by_path)
  # Every process takes part in gathering, the first one writes.
  writes = jax.process_index() == 0
  if writes:
    make_folder(folder)
  for name, shard in shards.items():
    _write_shard(folder / name, shard, by_path, writes)
  if not writes:
    return
  if len(shards) > 1:
    write_file(folder / INDEX, json_bytes(_index(shards, by_path)))
  keep = {*shards, INDEX} if len(shards) > 1 else set(shards)
  for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
    if old.name not in keep and old.exists():
      old.unlink()
  for name, content in model.source_files.items():
    write_file(folder / name, content)
  if model.tokenizer is not None:
    model.tokenizer.save(folder)
  write_file(folder / "config.json", json_bytes(source_config))


def make_folder(folder) -> None:
  """Makes a folder to write into, or says what a bucket needs."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except ImportError as error:
    raise CheckpointError(_no_bucket(folder, error)) from error


def _no_bucket(path, error) -> str:
  """The message where the library that reaches buckets is not installed."""
  return (
    f"{path} lies in a bucket, and what reaches it is not installed ({error}); "
    "install the extra [gcs], or use a local folder."
  )


def read_config(folder) -> dict[str, Any]:
  """Reads config.json of a folder, or says why it is no checkpoint."""
  from etils import epath

  folder = epath.Path(folder)
  file = folder / "config.json"
  if not file.exists():
    names = sorted(entry.name for entry in folder.iterdir())
    hint = ""
    if "adapter_config.json" in names:
      hint = " It is a PEFT adapter: give the folder of its base model."
    raise CheckpointError(
      f"{folder} has no config.json, so it is not a checkpoint in the Hugging "
      f"Face layout; it holds {names[:8] or 'nothing'}.{hint}"
    )
  return parse_json(hf_folder.read_small(file), str(file))


def read_headers(folder) -> dict[str, Stored]:
  """Where each tensor of a folder lies; reads the files' headers only.

  Raises:
    MissingTensor, DuplicateTensor, CorruptFile, CheckpointError.
  """
  from etils import epath

  folder = epath.Path(folder)
  present = sorted(file.name for file in folder.glob("model*.safetensors"))
  weight_map = None
  if (folder / INDEX).exists():
    weight_map = _read_index(folder / INDEX)
    gone = sorted(set(weight_map.values()) - set(present))
    gone = [name for name in gone if not (folder / name).exists()]
    if gone:
      lost = [name for name, file in weight_map.items() if file in gone]
      raise MissingTensor(
        f"{folder}: {INDEX} names {gone}, which are not there; "
        f"{len(lost)} tensors are lost with them ({lost[0]} first). "
        "Download the missing files."
      )
    present = sorted({*present, *weight_map.values()})
  if not present:
    names = sorted(entry.name for entry in folder.iterdir())
    raise CheckpointError(
      f"{folder} has a config.json but no model.safetensors and no {INDEX}; "
      f"it holds {names[:8]}. Weights in other formats (.bin, .pth) have to "
      "be converted to safetensors first."
    )
  stored = {}
  for file in present:
    for name, tensor in read_header(folder / file).items():
      if name in stored:
        raise DuplicateTensor(
          f"{folder}: {name} is stored in {stored[name].file} and again in "
          f"{file}; keep one of the two files, or download both again."
        )
      stored[name] = tensor
  for name, file in (weight_map or {}).items():
    if name not in stored:
      raise MissingTensor(
        f"{folder}: {INDEX} says that {name} is in {file}, but it is in no "
        "file; download that file again."
      )
  return stored


def check_tensors(
  wanted: list[Leaf], stored: Mapping[str, Stored], where: str
) -> dict[str, Stored]:
  """Compares what the config calls for with what the files hold.

  Returns:
    `stored`, when every tensor is there once in its shape and none is left.

  Raises:
    MissingTensor, UnexpectedTensor, WrongShape, UnsupportedConfig.
  """
  shape_by_name = {
    name: leaf.tensor_shape for leaf in wanted for name in leaf.names
  }
  missing = [name for name in shape_by_name if name not in stored]
  files = sorted({tensor.file for tensor in stored.values()})
  if missing:
    raise MissingTensor(
      f"{where}: {missing[0]} (shape {shape_by_name[missing[0]]}) is in none "
      f"of {files}{_more(missing)}. The config calls for it; download the "
      "checkpoint again, or correct config.json."
    )
  left = [name for name in stored if name not in shape_by_name]
  if left:
    raise UnexpectedTensor(
      f"{where}: {stored[left[0]].file} holds {left[0]} (shape "
      f"{stored[left[0]].shape}), for which the config has no place"
      f"{_more(left)}. Config and weights are of different models; correct "
      "config.json, or remove the tensor."
    )
  for name, shape in shape_by_name.items():
    if stored[name].shape != shape:
      raise WrongShape(
        f"{where}: {name} in {stored[name].file} has shape "
        f"{stored[name].shape}, the config calls for {shape}; correct "
        "config.json or take the weights that belong to it."
      )
  return dict(stored)


def _more(names) -> str:
  """' and n more' for messages that name only the first."""
  return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _storage_dtype(dtype) -> np.dtype:
  """The numpy dtype of a name, if checkpoints can hold it."""
  try:
    result = np.dtype(dtype)
  except TypeError:
    result = None
  if dtype is None or result not in CODE_BY_DTYPE:
    raise ValueError(
      f"dtype={dtype!r} must be one of "
      f"{[str(d) for d in CODE_BY_DTYPE]} (parameters of the model)."
    )
  return result


def resolve_folder(path):
  """The folder of a path or hub id, downloaded where it must be."""
  from etils import epath

  folder = epath.Path(path).expanduser()
  try:
    if folder.is_dir():
      return folder
  except ImportError as error:
    raise CheckpointError(_no_bucket(path, error)) from error
  if folder.exists():
    raise CheckpointError(
      f"{path} is a file; give the folder that holds config.json and the "
      "safetensors files."
    )
  text = os.fspath(path)
  first = text.split("/")[0]
  is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)
  if not is_hub_id or epath.Path(first).exists():
    raise CheckpointError(
      f"{path} does not exist; give the folder of a checkpoint (config.json "
      "+ safetensors), a gs:// folder, or a hub id owner/name."
    )
  try:
    import huggingface_hub
  except ImportError as error:
    raise CheckpointError(
      f"{path} is no folder here. If it is a hub id, install "
      "huggingface_hub (pip install huggingface_hub) or download it and give "
      "the folder."
    ) from error
  try:
    return epath.Path(
      huggingface_hub.snapshot_download(
        text,
        allow_patterns=[
          "*.json", "*.safetensors", "*.txt", "*.jinja", "*.py",
        ],
        etag_timeout=4,
      )
    )  # fmt: skip
  except Exception as error:  # network, authorisation, unknown name
    raise CheckpointError(
      f"{path} is no folder here, and fetching it from the hub failed "
      f"({type(error).__name__}: {str(error)[:200]}); download it where there "
      "is a network and give the folder."
    ) from error


def _companions(folder) -> dict[str, bytes]:
  """Small files other than config, tokenizer and weights."""
  names = []
  for entry in folder.iterdir():
    code = entry.name.endswith(".py") and entry.name.startswith(
      ("modeling_", "configuration_", "tokenization_", "generation_")
    )
    if entry.name in _COMPANIONS or code:
      names.append(entry.name)
  contents, _ = hf_folder.read_companions(folder, sorted(names))
  return contents


def parse_json(content: bytes, where: str) -> dict[str, Any]:
  """Parses a JSON object; a key given twice is an error."""

  def unique(pairs):
    result = {}
    for key, value in pairs:
      if key in result:
        raise DuplicateTensor(f"{where}: {key:.120} is given twice.")
      result[key] = value
    return result

  try:
    value = json.loads(content, object_pairs_hook=unique)
  except DuplicateTensor:
    raise
  except (ValueError, RecursionError) as error:
    raise CorruptFile(
      f"{where} is damaged: not valid JSON ({error}); download it again."
    ) from error
  if not isinstance(value, dict):
    raise CorruptFile(f"{where} is damaged: a JSON object is expected.")
  return value


def _read_index(file) -> dict[str, str]:
  """File by tensor name, of a safetensors index."""
  weight_map = parse_json(hf_folder.read_small(file), str(file)).get(
    "weight_map"
  )
  if not isinstance(weight_map, dict) or not weight_map:
    raise CorruptFile(
      f"{file} is damaged: it has no weight_map; download it again."
    )
  for name, shard in weight_map.items():
    # A name with a folder in it could point anywhere on the machine.
    if not isinstance(shard, str) or not re.fullmatch(_SHARD, shard):
      raise CorruptFile(
        f"{file} is damaged: {name:.120} is said to be in {shard!r:.120}, which "
        "is not a file name."
      )
  return weight_map


def read_header(file) -> dict[str, Stored]:
  """Reads and checks the header of one safetensors file."""
  hf_folder.check_regular(file)
  size = file.stat().length
  with file.open("rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
      raise CorruptFile(
        f"{file} is truncated or no safetensors file: it has {size} bytes, "
        f"its header alone should have {length}; download it again."
      )
    if length > HEADER_BYTES:
      raise CorruptFile(
        f"{file} is damaged: its header of {length} bytes is longer than the "
        f"{HEADER_BYTES} that the format allows; download it again."
      )
    header = parse_json(stream.read(length), str(file))
  start = 8 + length
  stored, spans = {}, []
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    if not _is_entry(entry):
      raise CorruptFile(
        f"{file} is damaged: the header's entry of {name:.120} is "
        f"{entry!r:.120}; download it again."
      )
    code, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    count = math.prod(shape)
    dtype = DTYPE_BY_CODE.get(code)
    if dtype is None:
      raise UnsupportedConfig(
        f"{file}: {name} is stored as {code:.80}; only "
        f"{sorted(DTYPE_BY_CODE)} can be read. Convert or dequantise the "
        "checkpoint first."
      )
    if end - begin != count * dtype.itemsize:
      raise CorruptFile(
        f"{file} is damaged: {name} of shape {shape} in {code} needs "
        f"{count * dtype.itemsize} bytes, the header gives it {end - begin}; "
        "download it again."
      )
    spans.append((begin, end, name))
    stored[name] = Stored(file.name, dtype, shape, start + begin)
  place = 0
  for begin, end, name in sorted(spans):
    if begin != place:
      raise CorruptFile(
        f"{file} is damaged: {name} should begin at byte {place} of the data "
        f"but is said to begin at {begin}; download it again."
      )
    place = end
  if start + place != size:
    kind = "truncated" if size < start + place else "damaged (too long)"
    raise CorruptFile(
      f"{file} is {kind}: it has {size} bytes, its header describes "
      f"{start + place}; download it again."
    )
  return stored


def _is_entry(entry) -> bool:
  """Whether a header's entry is of the types that the format says."""
  if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
    return False
  shape, offsets = entry.get("shape"), entry.get("data_offsets")
  return (
    isinstance(shape, list)
    and isinstance(offsets, list)
    and len(shape) <= 8
    and len(offsets) == 2
    and all(type(x) is int and 0 <= x < 2**63 for x in [*shape, *offsets])
  )


def read_tensors(file, dtype=None) -> dict[str, np.ndarray]:
  """Reads a whole safetensors file of moderate size.

  Args:
    file: `epath.Path`.
    dtype: cast to this; None keeps what is stored.
  """
  stored = read_header(file)
  tensors = {}
  with contextlib.ExitStack() as stack:
    reader = _Reader(file.parent, stack)
    for name, tensor in stored.items():
      tensors[name] = np.empty(tensor.shape, dtype or tensor.dtype)
      _read_tensor(reader, tensor, tensors[name])
  return tensors


class _Reader:
  """Open files of one folder, read at given places."""

  def __init__(self, folder, stack: contextlib.ExitStack):
    self._folder = folder
    self._stack = stack
    self._streams = {}

  def read_into(self, buffer: np.ndarray, file: str, offset: int) -> None:
    """Fills a u8 buffer from a place in a file."""
    if file not in self._streams:
      self._streams[file] = self._stack.enter_context(
        (self._folder / file).open("rb")
      )
    stream = self._streams[file]
    stream.seek(offset)
    view = memoryview(buffer)
    done = 0
    while done < len(view):
      count = stream.readinto(view[done:])
      if not count:
        raise CorruptFile(
          f"{self._folder / file} ended while it was read; it is truncated "
          "or was replaced meanwhile. Download it again."
        )
      done += count


def _read_leaf(reader, leaf: Leaf, stored, dtype: np.dtype) -> np.ndarray:
  """Reads one parameter into a new host buffer; returns it in its shape."""
  shape = (len(leaf.names), *leaf.tensor_shape)
  buffer = np.empty(shape, dtype)
  for layer, name in enumerate(leaf.names):
    _read_tensor(reader, stored[name], buffer[layer])
  if leaf.transposed:
    # A view: the runtime transposes tile by tile as it copies to the device,
    # five times faster than numpy does.
    buffer = buffer.swapaxes(-1, -2)
  return buffer if leaf.stacked else buffer[0]


def _read_tensor(reader, tensor: Stored, target: np.ndarray) -> None:
  """Reads a tensor into contiguous memory, casting block by block."""
  target = target.reshape(-1)
  if tensor.dtype == target.dtype:
    reader.read_into(target.view(np.uint8), tensor.file, tensor.offset)
    return
  size = tensor.dtype.itemsize
  block = np.empty(min(len(target), READ_BYTES // size), tensor.dtype)
  for first in range(0, len(target), max(len(block), 1)):
    part = block[: len(target) - first]
    place = tensor.offset + first * size
    reader.read_into(part.view(np.uint8), tensor.file, place)
    target[first : first + len(part)] = part


def _place(buffer: np.ndarray, sharding):
  """Puts a host buffer on its devices and waits for it."""
  if sharding is None:
    array = jax.device_put(buffer)
  else:
    array = jax.make_array_from_callback(
      buffer.shape, sharding, lambda index: buffer[index]
    )
  return jax.block_until_ready(array)


def _get(tree, path):
  """The entry of a nested dict at a path."""
  for key in path:
    tree = tree[key]
  return tree


def _set(tree, path, value):
  """Puts a value into a nested dict, making the dicts on the way."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _config_to_write(model: Model) -> dict[str, Any]:
  """config.json of a model, checked against its ModelConfig."""
  if not model.source_config:
    config = families.to_hf(model.config)
  else:
    config = dict(model.source_config)
    ids = {
      "mask_token_id": model.config.mask_id,
      "eos_token_id": model.config.eos_id,
      "pad_token_id": model.config.pad_id,
    }
    told = families.to_hf(families.from_hf(config, ids))
    ours = families.to_hf(model.config)
    for key, value in ours.items():
      if told[key] != value:
        raise ValueError(
          f"the model's config says {key}={value!r} but its source_config "
          f"{told[key]!r}; give source_config={{}} to have it derived."
        )
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
  if len(dtypes) == 1:
    for key in ("torch_dtype", "dtype"):
      if key in config:
        config[key] = next(iter(dtypes))
  return config


def _check_params(wanted, by_path, params) -> None:
  """Refuses parameters that the config's checkpoint could not hold."""
  count = len(jax.tree.leaves(params))
  if count != len(wanted):
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {leaf.path for leaf in wanted}
    extra = [
      "/".join(str(key.key) for key in keys)
      for keys, _ in paths
      if tuple(key.key for key in keys) not in known
    ]
    raise ValueError(f"the config has no place for the parameters {extra}.")
  for leaf in wanted:
    array = by_path[leaf.path]
    if tuple(array.shape) != leaf.shape:
      raise ValueError(
        f"{'/'.join(leaf.path)} has shape {tuple(array.shape)}, the config "
        f"calls for {leaf.shape}."
      )
    _storage_dtype(array.dtype)


def _plan_shards(wanted, by_path) -> dict[str, list[tuple[Leaf, int]]]:
  """File name -> its tensors as (leaf, layer), within SHARD_BYTES each."""
  shards, used = [[]], 0
  for leaf in wanted:
    size = math.prod(leaf.tensor_shape) * by_path[leaf.path].dtype.itemsize
    for layer in range(len(leaf.names)):
      if shards[-1] and used + size > SHARD_BYTES:
        shards.append([])
        used = 0
      shards[-1].append((leaf, layer))
      used += size
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  total = len(shards)
  return {
    f"model-{i + 1:05d}-of-{total:05d}.safetensors": shard
    for i, shard in enumerate(shards)
  }


def _index(shards, by_path) -> dict[str, Any]:
  """The index of several shards."""
  total = sum(array.size * array.dtype.itemsize for array in by_path.values())
  weight_map = {
    leaf.names[layer]: file
    for file, shard in shards.items()
    for leaf, layer in shard
  }
  return {
    "metadata": {"total_size": total},
    "weight_map": dict(sorted(weight_map.items())),
  }


def _write_shard(file, shard, by_path, writes: bool) -> None:
  """Writes one safetensors file, one parameter in host memory at a time."""
  header, place = {"__metadata__": {"format": "pt"}}, 0
  for leaf, layer in shard:
    dtype = np.dtype(by_path[leaf.path].dtype)
    size = math.prod(leaf.tensor_shape) * dtype.itemsize
    header[leaf.names[layer]] = {
      "dtype": CODE_BY_DTYPE[dtype],
      "shape": list(leaf.tensor_shape),
      "data_offsets": [place, place + size],
    }
    place += size
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)
  with contextlib.ExitStack() as stack:
    if writes:
      stream = stack.enter_context(complete_or_nothing(file))
      stream.write(len(encoded).to_bytes(8, "little") + encoded)
    held = None
    for leaf, layer in shard:
      if held != leaf.path:
        host = to_host(by_path[leaf.path])
        held = leaf.path
      if not writes:
        continue
      tensor = host[layer] if leaf.stacked else host
      tensor = np.ascontiguousarray(tensor.T if leaf.transposed else tensor)
      stream.write(tensor.view(np.uint8).data)


def to_host(array) -> np.ndarray:
  """A parameter as numpy, gathered from other processes where needed."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


@contextlib.contextmanager
def complete_or_nothing(file):
  """A stream whose file appears under its name only when it is complete."""
  if "://" in os.fspath(file):  # objects appear when closed
    with file.open("wb") as stream:
      yield stream
    return
  partial = file.parent / f"{file.name}.partial"
  try:
    with partial.open("wb") as stream:
      yield stream
    partial.replace(file)
  finally:
    partial.unlink(missing_ok=True)


def write_file(file, content: bytes) -> None:
  """Writes a small file, complete or not at all."""
  with complete_or_nothing(file) as stream:
    stream.write(content)


def json_bytes(value) -> bytes:
  """JSON as the hub writes it."""
  return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
