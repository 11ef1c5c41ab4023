"""Files of the safetensors format: checked headers, streamed tensors.

A file is the length of its header in 8 bytes, the header as JSON (type, shape
and place of each tensor), and the tensors' bytes without gaps. Headers are
compared with the file's size before anything else is read; tensors are read
in blocks, cast on their way, and written one at a time.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from rspo_jax.models import model_folder
from rspo_jax.models.families import CheckpointError, UnsupportedConfig
from rspo_jax.models.model_folder import CorruptFile, DuplicateTensor
from rspo_jax.storage import files

INDEX = "model.safetensors.index.json"
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


class MissingTensor(CheckpointError):
  """A tensor that the config calls for is in no file, or its file is gone."""


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor lies in a safetensors file."""

  file: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int


def storage_dtype(dtype) -> np.dtype:
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


def read_headers(folder) -> dict[str, Stored]:
  """Where each tensor of a folder lies; reads the files' headers only.

  Raises:
    MissingTensor, DuplicateTensor, CorruptFile, CheckpointError.
  """
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


def _read_index(file) -> dict[str, str]:
  """File by tensor name, of a safetensors index."""
  weight_map = model_folder.parse_json(
    model_folder.read_small(file), str(file)
  ).get("weight_map")
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
  model_folder.check_regular(file)
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
    header = model_folder.parse_json(stream.read(length), str(file))
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
  tensors = {}
  with Reader(file.parent) as reader:
    for name, stored in read_header(file).items():
      tensors[name] = np.empty(stored.shape, dtype or stored.dtype)
      reader.read(stored, tensors[name])
  return tensors


class Reader(contextlib.ExitStack):
  """Open files of one folder, read at given places and closed together."""

  def __init__(self, folder):
    super().__init__()
    self._folder = folder
    self._streams = {}

  def read(self, tensor: Stored, target: np.ndarray) -> None:
    """Reads a tensor into contiguous memory, casting block by block.

    Raises:
      CorruptFile: the file has become shorter than its header says.
    """
    target = target.reshape(-1)
    if tensor.dtype == target.dtype:
      self._fill(target.view(np.uint8), tensor.file, tensor.offset)
      return
    size = tensor.dtype.itemsize
    block = np.empty(min(len(target), READ_BYTES // size), tensor.dtype)
    for first in range(0, len(target), max(len(block), 1)):
      part = block[: len(target) - first]
      place = tensor.offset + first * size
      self._fill(part.view(np.uint8), tensor.file, place)
      target[first : first + len(part)] = part

  def _fill(self, buffer: np.ndarray, file: str, offset: int) -> None:
    """Fills a u8 buffer from a place in a file."""
    if file not in self._streams:
      self._streams[file] = self.enter_context((self._folder / file).open("rb"))
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


def write(
  file,
  kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  tensors: Iterable[np.ndarray],
) -> None:
  """Writes a file, complete or not at all.

  Args:
    file: `epath.Path`.
    kinds: (dtype, shape) by the names of the tensors.
    tensors: in the same order, held one at a time.
  """
  header, place = {"__metadata__": {"format": "pt"}}, 0
  for name, (dtype, shape) in kinds.items():
    end = place + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": CODE_BY_DTYPE[dtype],
      "shape": list(shape),
      "data_offsets": [place, end],
    }
    place = end
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)
  with files.replacing(file) as stream:
    stream.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors:
      stream.write(np.ascontiguousarray(tensor).view(np.uint8).data)
