"""Where arrays live: the mesh, the logical rules, host batch <-> global array.

Mesh axes: "data" replicates parameters, "fsdp" shards them, "tensor" shards
heads, mlp and the embedding's vocabulary; the batch is split over data and
fsdp. Where "tensor" reaches over processes they hold the same rows (`Split`). The head's vocabulary is split over fsdp and tensor: its rows are many and
its inputs few, so that hidden rows travel and the weight never does. One device
is a 1x1x1 mesh: there is no second code path. A dimension that its mesh axis
does not divide stays whole, so that tiny models run on any mesh.
"""

import dataclasses
import functools
import json
import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES = (
  ("batch", BATCH_AXES),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("head_vocab", ("fsdp", "tensor")),
  ("rank", "fsdp"),
  ("replica", "data"),
  ("norm", None),
  ("layers", None),
)


def mesh_shape(
  data: int, fsdp: int, tensor: int, devices: int
) -> tuple[int, int, int]:
  """Resolves a -1 among the axis sizes against the number of devices.

  Raises:
    ValueError: the product does not match; names a setting that does.
  """
  sizes = [data, fsdp, tensor]
  asked = ", ".join(
    f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True)
  )
  if any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"{asked}: sizes must be positive, or -1 for the rest.")
  if sizes.count(-1) > 1:
    raise ValueError(f"{asked}: only one axis may be -1.")
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if math.prod(sizes) != devices:
    raise ValueError(
      f"{asked} does not match the {devices} devices at hand; use mesh.data=1 "
      f"mesh.fsdp=-1 mesh.tensor={math.gcd(max(tensor, 1), devices)}."
    )
  return tuple(sizes)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None):
  """The device mesh; `Auto` axes, so that Linen's constraints apply."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(data, fsdp, tensor, len(devices))
  return Mesh(np.asarray(devices).reshape(shape), AXES)


def check_rollout_tensor(tensor: int, devices: int) -> None:
  """Refuses a `mesh.rollout_tensor` that does not divide the devices.

  Raises:
    ValueError: names a number that does.
  """
  if tensor and devices % tensor:
    raise ValueError(
      f"mesh.rollout_tensor={tensor} must divide the {devices} devices; use "
      f"{math.gcd(tensor, devices)}, or 0 to sample where training has the "
      "parameters."
    )


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
  """The mesh on which completions are sampled, of the same devices.

  Args:
    mesh: of training.
    tensor: devices over which one copy of the parameters is split; the others
      have copies of their own and share the sequences. 0: `mesh` itself.
  """
  if not tensor:
    return mesh
  # The order stays: one program may then use both meshes.
  return Mesh(mesh.devices.reshape(-1, 1, tensor), AXES)


def waypoints(mesh: Mesh, wanted: NamedSharding, shape) -> list[NamedSharding]:
  """Where an array stops between training's mesh and `rollout_mesh`.

  1. Split along the same dimension, neighbours among the parts on one place of
     the tensor axis: parts change places.
  2. The parts on one place joined: split in as many as the tensor axis has.

  From there to another dimension is one all-to-all. Without the stops the
  partitioner makes every weight whole on every device on the way.

  Args:
    mesh: `rollout_mesh`.
    wanted: the array's sharding in training.
    shape: of the array.
  """
  stops = []
  for axes in (("tensor", "data"), "tensor"):
    spec = PartitionSpec(
      *(axes if _names(entry) & {"fsdp"} else None for entry in wanted.spec)
    )
    stops.append(_that_divides(mesh, NamedSharding(mesh, spec), shape))
  return stops


def _names(entry) -> set[str]:
  """Mesh axes of one entry of a spec."""
  return {entry} if isinstance(entry, str) else set(entry or ())


def batch_shards(mesh: Mesh) -> int:
  """Number of devices over which sequences are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose first axis counts sequences or prompts."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, boxed):
  """Shardings of a tree with Linen's logical names.

  Args:
    mesh: the mesh.
    boxed: tree of abstract arrays in `nn.Partitioned`-like boxes, as
      `jax.eval_shape` of an initialiser gives.

  Returns:
    The tree without boxes, a NamedSharding for every leaf.
  """
  specs = nn.get_partition_spec(boxed)
  wanted = nn.logical_to_mesh_sharding(specs, mesh, list(RULES))
  return jax.tree.map(
    lambda sharding, leaf: _that_divides(mesh, sharding, leaf.shape),
    wanted,
    nn.meta.unbox(boxed),
  )


def _that_divides(mesh, sharding, shape):
  """Drops the axes of a spec that do not divide the shape."""
  entries = []
  spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
  for size, entry in zip(shape, spec, strict=True):
    names = (entry,) if isinstance(entry, str) else (entry or ())
    ways = math.prod(mesh.shape[name] for name in names)
    entries.append(entry if size % ways == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*entries))


def spec(mesh: Mesh, shape, axes) -> PartitionSpec:
  """Mesh axes of an array of a shape by logical names (None: whole)."""
  rules = dict(RULES)
  wanted = PartitionSpec(*(axis and rules[axis] for axis in axes))
  return _that_divides(mesh, NamedSharding(mesh, wanted), shape).spec


def constrain(mesh: Mesh | None, x, axes):
  """x laid out by logical axis names (None: whole along that axis).

  Without a mesh, or on one device, x as it is: nothing enters the program.
  """
  if mesh is None or mesh.size == 1:
    return x
  where = NamedSharding(mesh, spec(mesh, x.shape, axes))
  return jax.lax.with_sharding_constraint(x, where)


def sum_scatter(x, axis: str, dimension: int):
  """Sum over a mesh axis of which each device keeps its part, in shard_map.

  From 16 devices on in two stages, which send as much as one. Of one stage over
  4 x 4 or 8 x 8 chips the TPU compiler makes an all-reduce, which sends twice
  that, and blocks. It takes a stage as it is where what is scattered is the
  outer part of the dimension, so that distant devices come first.

  Args:
    x: each device's summand.
    axis: of the mesh.
    dimension: of x; the axis's size divides it.
  """
  n = jax.lax.axis_size(axis)
  if n < 16:
    return jax.lax.psum_scatter(
      x, axis, scatter_dimension=dimension, tiled=True
    )
  outer = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
  inner = n // outer
  device = np.arange(n).reshape(outer, inner)
  for groups, ways in ((device.T, outer), (device, inner)):
    x = jax.lax.psum_scatter(
      x.reshape(*x.shape[:dimension], ways, -1, *x.shape[dimension + 1 :]),
      axis,
      scatter_dimension=dimension,
      axis_index_groups=groups.tolist(),
    )
  return x


@dataclasses.dataclass(frozen=True)
class Split:
  """Which process has which rows of a batch of B.

  Rows are counted in the batch's order, which is that of its shards. Those of
  one shard lie on all processes that have a device of it: each of them puts the
  same rows there, and they share what the host does with them (read, judge), so
  that every row is one process's `own`.

  Attributes:
    size: B, a multiple of the shards.
    holders: for each shard the processes that hold it, ascending.
    process: this one.
  """

  size: int
  holders: tuple[tuple[int, ...], ...]
  process: int = 0

  @functools.cached_property
  def blocks(self) -> list[tuple[tuple[int, ...], np.ndarray, int]]:
    """(processes, rows i64, shards) of the shards with the same holders."""
    by_shard = np.arange(self.size).reshape(len(self.holders), -1)
    blocks = []
    for processes in dict.fromkeys(self.holders):
      mine = [each == processes for each in self.holders]
      blocks.append((processes, by_shard[mine].reshape(-1), sum(mine)))
    return blocks

  @functools.cached_property
  def held(self) -> np.ndarray:
    """i64 [b]: rows on this process's devices, ascending."""
    parts = [rows for who, rows, _ in self.blocks if self.process in who]
    return np.sort(np.concatenate(parts))

  def own_of(self, process: int) -> np.ndarray:
    """i64 [c]: rows that a process reads and judges, ascending."""
    parts = [
      np.array_split(rows, len(who))[who.index(process)]
      for who, rows, _ in self.blocks
      if process in who
    ]
    return np.sort(np.concatenate(parts))

  @functools.cached_property
  def own(self) -> np.ndarray:
    """i64 [c]: `own_of` this process, as places among the rows it holds."""
    return np.searchsorted(self.held, self.own_of(self.process))

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Own rows [c, ...] of every process -> [B, ...], the same on all."""
    if jax.process_count() == 1:
      return rows
    parts = [self.own_of(index) for index in range(jax.process_count())]
    padded = np.zeros((max(map(len, parts)), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    whole = np.zeros((self.size, *rows.shape[1:]), rows.dtype)
    for part, found in zip(parts, everyone, strict=True):
      whole[part] = found[: len(part)]
    return whole


def split(mesh: Mesh, size: int) -> Split:
  """How a batch of `size` rows lies on the processes of a mesh."""
  by_shard = mesh.devices.reshape(batch_shards(mesh), -1)
  holders = tuple(
    tuple(sorted({device.process_index for device in devices}))
    for devices in by_shard
  )
  return Split(size, holders, jax.process_index())


def repeated(rows: np.ndarray, times: int) -> np.ndarray:
  """Places of prompts -> those of their `times` completions each."""
  return (rows[:, None] * times + np.arange(times)).reshape(-1)


def put_global(mesh: Mesh, tree):
  """Rows [b, ...] that each process holds (`Split`) -> global arrays [B, ...]."""
  sharding, shards = batch_sharding(mesh), batch_shards(mesh)
  held = split(mesh, shards).held.tolist()

  def one(x):
    x = np.asarray(x)
    rows = len(x) // len(held)
    parts = x.reshape(len(held), rows, *x.shape[1:])
    part_of = dict(zip(held, parts, strict=True))
    return jax.make_array_from_callback(
      (rows * shards, *x.shape[1:]),
      sharding,
      lambda index: part_of[(index[0].start or 0) // rows],
    )

  return jax.tree.map(one, tree)


def local_rows(x: jax.Array) -> np.ndarray:
  """Rows that this process holds of an array whose first axis is the batch."""
  if x.is_fully_addressable:
    return np.asarray(x)
  shards = {}
  for shard in x.addressable_shards:
    shards.setdefault(shard.index[0].start or 0, shard.data)
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def whole(x: jax.Array) -> np.ndarray:
  """A global array, the same on all processes."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """Rows [b, ...] of every process, as many each -> those of all, in order."""
  if jax.process_count() == 1:
    return rows
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def gather_json(rows: list) -> list:
  """The JSON-able rows of all processes, in the order of processes."""
  if jax.process_count() == 1:
    return rows
  mine = np.frombuffer(json.dumps(rows).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([mine.size], np.int32))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: mine.size] = mine
  everyone = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
  everyone = everyone.reshape(jax.process_count(), -1)
  parts = [
    json.loads(text[:size].tobytes())
    for text, size in zip(everyone, sizes.reshape(-1), strict=True)
  ]
  return [row for part in parts for row in part]
