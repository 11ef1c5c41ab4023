"""Whether a run has the memory and the disk that it is going to need.

Estimates from shapes alone, before weights are read: what a run holds from its
first to its last step. Activations come on top, so a run that is let through
may still be too large; `launch/plan.py` compiles it and knows. One that is
refused here could not have started.
"""

import contextlib
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from rspo_jax import program as program_lib
from rspo_jax import settings as settings_lib
from rspo_jax import sharding
from rspo_jax.models import hf_weights

# Bytes held for one byte of a checkpoint's files, at most: 2 of the reference,
# 2 of the policy, 4 of its moments, 2 of its gradient (all float32, from a
# file in bfloat16). Models for which this fits are not looked at closer.
_AT_MOST = 10
_CGROUP = "/sys/fs/cgroup/memory.max"


def check_memory(settings: settings_lib.Settings) -> None:
  """Refuses a model whose state alone is larger than the devices' memory.

  Args:
    settings: the run; `model.path` names a local folder, or nothing is said.

  Raises:
    ValueError: names need, memory and remedies; in every process.
  """
  folder = settings.model["folder"]
  failure = None
  if folder and "://" not in folder and pathlib.Path(folder).is_dir():
    stored = sum(
      path.stat().st_size
      for path in pathlib.Path(folder).glob("model*.safetensors")
    )
    limit = device_bytes()
    if _AT_MOST * stored > limit:
      need = resident_bytes(_sketch(settings))
      if need > limit:
        failure = (
          f"model.path={settings.model['path']!r} needs {_gb(need)} a device "
          "for parameters, reference, moments and gradient, more than the "
          f"{_gb(limit)} that it has. Use more devices (mesh.fsdp), "
          "model.param_dtype='bfloat16' or a smaller model; launch/plan.py "
          "tells what fits where."
        )
  _agree(failure)


def check_disk(
  program: program_lib.Program, workdir: str | os.PathLike
) -> None:
  """Refuses a disk that the checkpoints of a run would fill.

  Args:
    program: of the run.
    workdir: the run's folder, which need not exist; nothing is said of a
      bucket.

  Raises:
    ValueError: names need, room and remedies; in every process.
  """
  settings, failure = program.settings, None
  if "://" not in str(workdir):
    one = tree_bytes(program.state_template)
    count = checkpoints_kept(settings.run) + 1  # one is being written
    need = count * one
    if settings.run.export:
      params = program.model.params
      exact = settings.lora["merge_dtype"] == "float32"
      if program.lora is not None and exact:
        params = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params
        )
      need += tree_bytes(params)
    there = pathlib.Path(workdir) / "checkpoints"
    room = free_bytes(workdir) + _folder_bytes(there)
    if need > room:
      failure = (
        f"--workdir={workdir} has room for {_gb(room)}, but the run needs "
        f"{_gb(need)}: {count} checkpoints of {_gb(one)}"
        f"{' and model/' if settings.run.export else ''}. Make room, choose "
        "another disk, or lower run.keep_checkpoints="
        f"{settings.run.keep_checkpoints}."
      )
  _agree(failure)


def checkpoints_kept(run: settings_lib.RunSettings) -> int:
  """Complete checkpoints that a run ends with, at most."""
  saves = -(-run.steps // run.checkpoint_every) + 1
  kept = min(run.keep_checkpoints, saves) + run.keep_best
  if run.keep_every:
    kept += run.steps // run.keep_every
  return kept


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree together."""
  return sum(
    int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def resident_bytes(program: program_lib.Program) -> int:
  """Bytes that one device holds from the first to the last step.

  The reference, the state (what is trained and its moments), and a float32
  gradient of what is trained.
  """
  gradient = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding),
    program.state_template.params,
  )
  held = (program.params, program.state_template, gradient)
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64))
    * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(held)
  )


def device_bytes() -> int:
  """Memory of one device: its own, or its share of the host's."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  # What a container may use of it, if there is one with a limit.
  with contextlib.suppress(OSError, ValueError):
    limit = min(limit, int(pathlib.Path(_CGROUP).read_text()))
  return limit // jax.local_device_count()


def free_bytes(folder: str | os.PathLike) -> int:
  """Free bytes of the disk on which a folder is or will be."""
  path = pathlib.Path(folder).absolute()
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free


def _folder_bytes(folder: pathlib.Path) -> int:
  """Bytes of the files of a folder: checkpoints that others will replace."""
  total = 0
  for path in folder.rglob("*"):
    try:
      total += path.stat().st_size
    except OSError:
      continue  # a run that is still going removed it
  return total


def _sketch(settings: settings_lib.Settings) -> program_lib.Program:
  """The program of a run without its weights."""
  mesh = sharding.make_mesh(**settings.mesh)
  config = hf_weights.load_config(settings.model["folder"]).config
  model = program_lib.abstract_model(settings, config, mesh)
  return program_lib.assemble(settings, model, mesh)


def _agree(failure: str | None) -> None:
  """Raises in every process if it failed in one.

  One that went on alone would hang in the next collective.
  """
  failed = sharding.gather_rows(np.array([failure is not None]))
  if failed.any():
    raise ValueError(
      failure or "Another process has not enough room; its message says what."
    )


def _gb(size: int) -> str:
  """A number of bytes in words."""
  return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
