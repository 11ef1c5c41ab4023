"""Asks the TPU compiler about programs of a slice that is not there.

1. `compile_call` traces and compiles a function with the TPU compiler, which
   is part of the package libtpu and needs no TPU. It refuses what does not fit.
2. What is known then comes from three places: memory from the compiler
   (reliable), FLOPs from the jaxpr (flops.py), cycles and traffic from the
   compiler's own estimates in the program text (hlo.py), of which nothing was
   ever compared with hardware. A figure that cannot be had is None.
3. `measure` keeps the answer in a cache, whose key covers the config, the
   slice, the versions and our own source.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from rspo_jax.devices import sharding
from rspo_jax.planning import chips, flops, hlo, programs

# How thoroughly the compiler works: "O1" is several times faster and gives
# memory within 2 %, but slower programs, so that their seconds say nothing.
LEVELS = {"quick": "O1", "full": None}


class CompilerMissing(ValueError):
  """The TPU compiler is not installed, or another process holds it."""


def topology_devices(topology: chips.Topology):
  """Descriptions of the devices of a slice.

  Raises:
    CompilerMissing: there is no libtpu, or it does not start.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    found = topologies.get_topology_desc(topology.name, platform="tpu")
  except Exception as error:
    raise CompilerMissing(
      f"the TPU compiler cannot be asked ({' '.join(str(error).split())[:200]})"
      "; pip install libtpu (it needs no TPU), or use --topology=gpu:GB for an "
      "estimate without it."
    ) from error
  return found.devices


def compile_call(mesh, call: programs.Call, level: str) -> dict[str, Any]:
  """Compiles one program for the mesh and measures it.

  Args:
    mesh: of the slice's devices.
    call: the program with its arguments.
    level: key of `LEVELS`.

  Returns:
    {"memory": bytes by part or None where it does not fit, "needed_bytes",
    "flops": executed over the mesh, "measured": `hlo.Measured` as a dict or
    None, "compile_s"}.
  """
  start = time.process_time()
  with sharding.active(mesh):
    traced = call.function.trace(*call.arguments)
    lowered = traced.lower(lowering_platforms=("tpu",))
  result = {
    "memory": None,
    "flops": flops.executed(traced.jaxpr, call.trips),
    "measured": None,
  }
  try:
    with _level(level):
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = out_of_memory(str(error))
    if needed is None:
      raise
    spent = time.process_time() - start
    return result | {"needed_bytes": needed, "compile_s": spent}
  result["compile_s"] = time.process_time() - start
  stats = compiled.memory_analysis()
  memory = {
    "arguments": stats.argument_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  result["memory"] = memory
  result["needed_bytes"] = sum(memory.values()) - 2 * memory["aliased"]
  # Of larger programs for v6e and v5p the compiler cannot print the text.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    measured = hlo.measure(compiled.as_text(), mesh.size, call.trips)
    result["measured"] = dataclasses.asdict(measured)
  return result


@contextlib.contextmanager
def _level(level: str):
  """The compiler's level of optimisation for a while."""
  before = jax.config.jax_optimization_level
  if LEVELS[level]:
    jax.config.update("jax_optimization_level", LEVELS[level])
  try:
    yield
  finally:
    jax.config.update("jax_optimization_level", before)


def out_of_memory(message: str) -> int | None:
  """Bytes that a program needs, from the compiler's refusal; else None."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", message)
  found = found or re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]", message)
  if not found:
    return None
  return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


def measure(
  described: programs.Described,
  topology: chips.Topology,
  name: str,
  level: str,
  cache: pathlib.Path | None = None,
) -> dict[str, Any]:
  """`compile_call`, from the cache where the very same was compiled before.

  Args:
    described: programs with their arguments.
    topology: the slice.
    name: key of `described.calls`.
    level: key of `LEVELS`.
    cache: folder of the cache; None: none.
  """
  if cache is not None:
    path = cache / f"{digest(described.program, topology, name, level)}.json"
    with contextlib.suppress(OSError, ValueError):
      return json.loads(path.read_text(encoding="utf-8"))
  result = compile_call(described.program.mesh, described.calls[name], level)
  if cache is not None:
    # A plan is as good without a cache that cannot be written.
    with contextlib.suppress(OSError):
      path.parent.mkdir(parents=True, exist_ok=True)
      part = path.with_suffix(f".{os.getpid()}")
      part.write_text(json.dumps(result), encoding="utf-8")
      part.replace(path)
  return result


def cache_folder() -> pathlib.Path:
  """Where results of compilations are kept."""
  root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(root) / "rspo_jax" / "plans"


def digest(program, topology: chips.Topology, name: str, level: str) -> str:
  """Names a compilation by all that it depends on."""
  # Task, data and what a run writes are no part of a program, but for the
  # length of its prompts.
  unseen = ("task", "reward", "data", "eval", "evaluations", "run")
  unseen += ("greedy", "sampled")
  parts = [
    repr(dataclasses.replace(program.settings, **dict.fromkeys(unseen))),
    str(program.settings.data.prompt_length),
    repr(program.model.config),
    repr(program.lora),
    topology.name,
    name,
    level,
    _source_digest(),
    *(importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")),
  ]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


@functools.cache
def _source_digest() -> str:
  """Digest of the package's own source."""
  folder = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(str(path.relative_to(folder)).encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()
