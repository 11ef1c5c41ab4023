"""Plans a run for a TPU slice that is not there: compiles its own programs.

1. `describe` makes the run's Program (program.py) with an abstract model on a
   mesh of the slice's device descriptions, and the abstract, sharded arguments
   that the loop would give to each jitted function.
2. `compile_one` traces and compiles such a function with the TPU compiler,
   which is part of the package libtpu and needs no TPU. It refuses what does
   not fit.
3. What is reported comes from three places: memory from the compiler
   (reliable), FLOPs from the jaxpr (flops.py), seconds and traffic from the
   compiler's own estimates in the program text (hlo.py), of which nothing was
   ever compared with hardware. A figure that cannot be had is None.
4. `plan` does it for all programs of a step and keeps the result in a cache,
   whose key covers the config, the slice, the versions and our own source.

Nothing here runs on a TPU. GB are 1e9 bytes, everything is per chip unless it
says otherwise.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies

from rspo_jax import chips, flops, hlo, objectives, sharding, train_step
from rspo_jax import likelihood as likelihood_lib
from rspo_jax import program as program_lib
from rspo_jax import settings as settings_lib
from rspo_jax.models import families, fresh, hf_weights, lora, published

# How thoroughly the compiler works: "O1" is several times faster and gives
# memory within 2 %, but slower programs, so that their seconds say nothing.
LEVELS = {"quick": "O1", "full": None}
GB = 1e9


class CompilerMissing(ValueError):
  """The TPU compiler is not installed, or another process holds it."""


@dataclasses.dataclass(frozen=True)
class Resident:
  """What a run keeps in the memory of each chip from step to step.

  Attributes:
    bytes_by_name: of each tree, such as "moments".
  """

  bytes_by_name: dict[str, float]

  @property
  def total(self) -> float:
    """Bytes of all."""
    return sum(self.bytes_by_name.values())


@dataclasses.dataclass
class Described:
  """A program with the arguments of its functions.

  Attributes:
    program: the run's Program on the abstract mesh.
    functions: the jitted function of each program that a step calls.
    arguments: abstract arguments by program name.
    uses: names of the resident trees that each program is given.
    resident: what stays in memory.
    trips: turns of the loops whose bound is computed on the device.
    useful: FLOPs over the mesh that a program cannot do without.
    needed: of update and scores together; the policy's scores of two passes
      are the price of exactness and not in it.
    temporaries: bytes of what is known to be among a program's temporaries.
    runs: how often a step calls each program.
  """

  program: program_lib.Program
  functions: dict[str, Any]
  arguments: dict[str, tuple]
  uses: dict[str, tuple[str, ...]]
  resident: Resident
  trips: dict[str, int]
  useful: dict[str, float]
  needed: float
  temporaries: dict[str, dict[str, float]]
  runs: dict[str, int]


def chip_bytes(tree) -> float:
  """Bytes of a tree of abstract arrays on one chip."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


@contextlib.contextmanager
def on(mesh):
  """The context in which the loop calls jitted functions."""
  with mesh, nn.logical_axis_rules(sharding.RULES):
    yield


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


def model_config(settings: settings_lib.Settings) -> families.ModelConfig:
  """Shape of the model that a config names; reads no weights.

  Raises:
    ValueError: the config names none, or one that cannot be read.
  """
  model = settings.model
  if model["folder"]:
    return hf_weights.load_config(model["folder"]).config
  if model["published"]:
    return published.PUBLISHED[model["published"]]
  if not settings.supervised:
    raise ValueError(
      "model.path='' and model.published='' name no model to plan for; give "
      "--config.model.path=FOLDER, or --config.model.published="
      f"{next(iter(published.PUBLISHED))}."
    )
  return fresh.new_model(model["new"], jax.random.key(0)).config


def abstract_program(
  settings: settings_lib.Settings, config: families.ModelConfig, devices
) -> program_lib.Program:
  """The run's Program for devices that are described only."""
  mesh = sharding.make_mesh(**settings.mesh, devices=devices)
  model = program_lib.abstract_model(settings, config, mesh)
  return program_lib.assemble(settings, model, mesh)


def check_mesh(
  settings: settings_lib.Settings, config: families.ModelConfig, devices: int
) -> None:
  """Refuses a mesh that does not divide the model.

  A tiny model may stay whole on such a mesh; one that is planned is to be
  sharded.

  Raises:
    ValueError: names the nearest setting that works.
  """
  shape = sharding.mesh_shape(**settings.mesh, devices=devices)
  tensor = shape[2]
  for name, size in (
    ("query heads", config.heads),
    ("key and value heads", config.kv_heads),
  ):
    if size % tensor:
      works = max(
        n
        for n in range(1, tensor + 1)
        if math.gcd(config.heads, config.kv_heads) % n == 0 and devices % n == 0
      )
      raise ValueError(
        f"mesh.tensor={tensor} must divide the model's {size} {name}; use "
        f"mesh.tensor={works}."
      )
  for name, size, axis in (
    ("width", config.width, 1),
    ("mlp_width", config.mlp_width, 2),
  ):
    if size % shape[axis]:
      ways = sharding.AXES[axis]
      works = max(n for n in range(1, shape[axis]) if size % n == 0)
      raise ValueError(
        f"mesh.{ways}={shape[axis]} must divide the model's {name}={size}; use "
        f"mesh.{ways}={works} and mesh.data for the rest."
      )


def describe(program: program_lib.Program) -> Described:
  """Arguments of the jitted functions as the loop gives them, and costs.

  Args:
    program: of an abstract model.
  """
  settings, config = program.settings, program.model.config
  mesh = program.mesh
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def place(tree, where):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )

  key = place(jax.eval_shape(lambda: jax.random.key(0)), whole)
  prompts = (settings.rollout.prompts, settings.prompt_length)
  prompts = place(
    (
      jax.ShapeDtypeStruct(prompts, jnp.int32),
      jax.ShapeDtypeStruct(prompts, jnp.bool_),
    ),
    rows,
  )
  state = program.state_template
  policy = program.policy(state.params)
  sampled = program.for_sampling(policy)
  with on(mesh):
    completions = jax.eval_shape(program.rollout_fn, sampled, *prompts, key)
    batch = place(jax.eval_shape(program.present_fn, completions), rows)
  sequences, length = batch.tokens.shape
  micro = settings.step.micro_batch
  two = (
    train_step.resolve_passes(settings.step, settings.objective, sequences)
    == "two"
  )
  objective = objectives.OBJECTIVES[settings.objective.name]
  referenced = objective.uses_reference(settings.objective)
  updates = settings.step.updates_per_rollout
  stale = settings.rollout.stale_steps
  ratio = objective.ratio and (updates > 1 or stale)
  older = ratio and stale  # values under the parameters of the step before
  functions = {"update": program.update_fn, "rollout": program.rollout_fn}
  # Adapted: policy and reference in one pass over the base they share.
  dual = program.pair_fn is not None
  inside = dual and not two
  # Those of older parameters are the policy's alone.
  pair = dual and not (inside and older)
  if pair:
    functions["scores"] = program.pair_fn
  else:
    functions["scores"] = program.estimate_fn
  scored = (policy if dual else program.params, batch, key)
  with on(mesh):
    scores = place(jax.eval_shape(functions["scores"], *scored), rows)
  values = scores[0] if pair else scores
  arguments = {
    "update": (
      state,
      batch,
      key,
      values if referenced and not inside else None,
      values if two else None,
      values if ratio else None,
      program.frozen,
    ),
    "scores": scored,
    "rollout": (sampled, *prompts, key),
  }
  spare = chip_bytes(state.reference)
  if program.lora is None:
    resident = {
      "weights": chip_bytes(state.params),
      "moments": chip_bytes(state.opt_state),
      "reference": chip_bytes(program.params),
    }
    seen, scoring = ("weights",), ("reference",)
  else:
    resident = {
      "frozen weights": chip_bytes(program.frozen),
      "adapter": chip_bytes(state.params),
      "moments": chip_bytes(state.opt_state),
    }
    seen = scoring = ("frozen weights", "adapter")
  sampling = seen
  if program.lay_out is not None:
    # A copy of its own; under an adapter that of the base stays.
    sampling = ()
    if program.lora is not None:
      sampling = ("frozen weights for sampling",)
      resident[sampling[0]] = chip_bytes(sampled.base)
  if spare:
    resident["refreshed reference"] = spare
  if stale:
    resident["rollout ahead"] = chip_bytes(program.ahead_template())
  # As the loop calls them (runs.Run.scores): where the update does not score
  # the reference itself, its scores; of two passes, and of ratios, the
  # policy's, which a pair gives along with them; those of older parameters
  # come before.
  calls = updates * (int(two or (ratio and not older)) + int(older))
  if not dual:
    calls += updates * int(referenced)
  runs = {
    "update": updates,
    "scores": calls,
    "rollout": int(not settings.supervised),
  }
  masks = settings.likelihood.masks
  together = settings.step.micro_masks or masks
  head_rows = _head_rows(settings, sequences)
  forward = flops.forward_flops(config, sequences * masks, length, head_rows)
  adapter = 0.0
  if program.lora is not None:
    shapes = lora.kernel_shapes(config)
    adapter = flops.adapter_flops(
      [shapes[target] for target in program.lora.targets],
      program.lora.rank,
      sequences * masks * length,
    )
  learned = flops.useful_update(
    config, sequences * masks, length, head_rows, adapter
  )
  in_update = forward if inside else 0.0
  sampler = settings.sampler
  gradients = state.params
  if sequences * masks > micro * together:
    gradients = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape,
        jnp.promote_types(x.dtype, settings.optimizer.moment_dtype),
        sharding=x.sharding,
      ),
      gradients,
    )
  kept = {"gradients": chip_bytes(gradients)}
  if config.remat:
    kept["layer inputs"] = (
      micro
      // settings.step.shards
      * together
      * length
      * config.width
      * jnp.dtype(config.compute_dtype).itemsize
      * config.layers
    )
  return Described(
    program=program,
    functions={name: functions[name] for name, count in runs.items() if count},
    arguments=arguments,
    uses={
      "update": (*seen, "moments", *(["refreshed reference"] if spare else ())),
      "scores": scoring,
      "rollout": sampling,
    },
    resident=Resident(resident),
    trips={
      "update": sequences * masks // (micro * together),
      "scores": sequences * masks // (micro * together),
      "rollout": sampler.block_steps,
    },
    useful={
      "update": learned + in_update,
      "scores": 2 * forward + adapter if pair else forward,
      "rollout": sampler.steps
      * flops.forward_flops(
        config, sequences, length, sequences * sampler.block_length
      ),
    },
    needed=updates * (learned + (forward if referenced else 0.0)),
    temporaries={"update": kept},
    runs=runs,
  )


def _head_rows(settings: settings_lib.Settings, sequences: int) -> int:
  """Rows of a batch at which the head is evaluated, from the scheme."""
  likelihood = settings.likelihood
  scored = jax.ShapeDtypeStruct(
    (1, settings.sampler.completion_length), jnp.bool_
  )
  masks = jax.eval_shape(
    lambda key, scored: likelihood_lib.draw_masks(
      key, likelihood, scored, settings.prompt_length
    ),
    jax.random.key(0),
    scored,
  )
  return sequences * math.prod(masks.rows.shape)


def compile_one(described: Described, name: str, level: str) -> dict[str, Any]:
  """Compiles one program for the mesh and measures it.

  Args:
    described: programs with their arguments.
    name: key of `described.functions`.
    level: key of `LEVELS`.

  Returns:
    {"memory": bytes by part or None where it does not fit, "needed_bytes",
    "flops": executed over the mesh, "measured": `hlo.Measured` as a dict or
    None, "compile_s"}.
  """
  program = described.program
  function = described.functions[name]
  trips = described.trips[name]
  start = time.process_time()
  with on(program.mesh):
    traced = function.trace(*described.arguments[name])
    lowered = traced.lower(lowering_platforms=("tpu",))
  executed = flops.executed(traced.jaxpr, trips)
  result = {
    "memory": None,
    "needed_bytes": None,
    "flops": executed,
    "measured": None,
    "no_text": "",
    "compile_s": None,
  }
  try:
    with _level(level):
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = out_of_memory(str(error))
    if needed is None:
      raise
    result["needed_bytes"] = needed
    result["compile_s"] = time.process_time() - start
    return result
  result["compile_s"] = time.process_time() - start
  stats = compiled.memory_analysis()
  result["memory"] = {
    part: getattr(stats, f"{field}_size_in_bytes")
    for part, field in (
      ("arguments", "argument"),
      ("temporaries", "temp"),
      ("outputs", "output"),
      ("aliased", "alias"),
      ("code", "generated_code"),
    )
  }
  memory = result["memory"]
  result["needed_bytes"] = (
    memory["arguments"]
    + memory["temporaries"]
    + memory["outputs"]
    - memory["aliased"]
    + memory["code"]
  )
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    # Of larger programs for v6e and v5p the compiler cannot print the text.
    result["no_text"] = " ".join(str(error).split())[:160]
    return result
  measured = hlo.measure(text, program.mesh.size, trips)
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
  described: Described,
  topology: chips.Topology,
  name: str,
  level: str,
  cache: pathlib.Path | None = None,
) -> dict[str, Any]:
  """`compile_one`, from the cache where the very same was compiled before.

  Args:
    described: programs with their arguments.
    topology: the slice.
    name: key of `described.functions`.
    level: key of `LEVELS`.
    cache: folder of the cache; None: none.
  """
  path = None
  if cache is not None:
    path = cache / f"{_digest(described, topology, name, level)}.json"
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
      pass
  result = compile_one(described, name, level)
  if path is not None:
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


def _digest(described, topology, name, level) -> str:
  """Names a compilation by all that it depends on."""
  settings = described.program.settings
  # Task, data and what a run writes are no part of a program.
  unseen = {
    field: None
    for field in ("task", "data", "eval", "run", "greedy", "sampled")
  }
  settings = dataclasses.replace(settings, **unseen)
  parts = [
    repr(settings),
    repr(described.program.model.config),
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
  folder = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(str(path.relative_to(folder)).encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


def price(
  described: Described,
  topology: chips.Topology,
  name: str,
  level: str,
  result: dict[str, Any] | None,
) -> dict[str, Any]:
  """What a plan says of one program: bytes as GB, seconds, MFU, verdict.

  Args:
    described: programs with their arguments.
    topology: the slice.
    name: key of `described.functions`.
    level: key of `LEVELS`; without optimisation seconds mean nothing.
    result: of `measure`; None where nothing was compiled.
  """
  chip, devices = topology.chip, described.program.mesh.size
  beside = sum(
    size
    for tree, size in described.resident.bytes_by_name.items()
    if tree not in described.uses[name]
  )
  row = dict.fromkeys(
    (
      "hbm_gb",
      "resident_gb",
      "capacity_gb",
      "flops",
      "useful_flops",
      "collective_gb",
      "moved_gb",
      "seconds",
      "mfu",
    )
  )
  row |= {
    "resident_gb": beside / GB,
    "capacity_gb": chip.memory_bytes / GB,
    "useful_flops": described.useful[name] / devices,
    "runs": described.runs[name],
    "fits": False,
    "notes": [],
  }
  if result is None:
    return row
  row["hbm_gb"] = result["needed_bytes"] / GB
  row["fits"] = result["needed_bytes"] + beside <= chip.memory_bytes
  row["flops"] = result["flops"] / devices
  row["compile_s"] = result["compile_s"]
  if result["memory"] is None:
    row["fits"] = False
    row["notes"].append("refused by the compiler: it does not fit")
    return row
  row["memory_gb"] = {k: v / GB for k, v in result["memory"].items()}
  row["filled_by_gb"] = _filled_by(described, name, result["memory"])
  if result["measured"] is None:
    row["notes"].append(
      f"the compiler cannot print this program for {chip.kind}: no seconds, no "
      "traffic"
    )
    return row
  _price_time(row, chip, level, result["measured"])
  return row


def _filled_by(described, name, memory) -> dict[str, float]:
  """GB of a program's own memory by what it is; temporaries are estimates."""
  sizes = described.resident.bytes_by_name
  filled = {tree: sizes[tree] for tree in described.uses[name]}
  filled["batch"] = max(memory["arguments"] - sum(filled.values()), 0)
  rest = memory["temporaries"]
  for part, size in described.temporaries.get(name, {}).items():
    filled[part] = min(size, rest)
    rest -= filled[part]
  filled["working space"] = rest
  filled["outputs"] = memory["outputs"] - memory["aliased"]
  filled["code"] = memory["code"]
  return {part: size / GB for part, size in filled.items()}


def _price_time(row, chip, level, measured) -> None:
  """Traffic, and seconds in three readings, from the program's text."""
  wires = measured["wire_by_kind"]
  wire = sum(w["bytes"] for w in wires.values())
  blocking = sum(w["blocking_bytes"] for w in wires.values())
  row["collective_gb"] = wire / GB
  row["collectives"] = {
    kind: {
      "gb": w["bytes"] / GB,
      "blocking_gb": w["blocking_bytes"] / GB,
      "count": w["count"],
    }
    for kind, w in wires.items()
  }
  row["moved_gb"] = measured["moved_bytes"] / GB
  if LEVELS[level]:
    row["notes"].append(
      "compiled without optimisation: memory, FLOPs and collectives only"
    )
    return
  if measured["unpriced"]:
    row["notes"].append(
      "the compiler has no estimate for hand-written kernels: no seconds"
    )
    return
  compute_s = measured["cycles"] / chip.clock_hz
  if compute_s < row["flops"] / chip.peak_flops:
    row["notes"].append(
      "the program's text names fewer cycles than its matmuls need at peak: no "
      "seconds"
    )
    return
  wire_s = wire / chip.wire_bytes_per_s
  blocking_s = blocking / chip.wire_bytes_per_s
  readings = {
    "overlap": max(compute_s, wire_s),
    "sync": max(compute_s, wire_s - blocking_s) + blocking_s,
    "serial": compute_s + wire_s,
  }
  row["readings"] = {
    name: {
      "seconds": seconds,
      "mfu": row["useful_flops"] / chip.peak_flops / seconds,
    }
    for name, seconds in readings.items()
  }
  row |= row["readings"]["sync"]


def estimate(described: Described, capacity_bytes: float) -> dict[str, Any]:
  """Rows of a plan by arithmetic, for a device without a compiler at hand.

  Counts what must be there: trees, gradients, layer inputs, one layer's
  activations with their cotangents, logits of one piece of the head. What a
  compiler adds on top (layouts, fragmentation) is not in it.

  Args:
    described: programs on one device.
    capacity_bytes: of that device.
  """
  program = described.program
  settings, config = program.settings, program.model.config
  length = settings.prompt_length + settings.sampler.completion_length
  total = settings.rollout.prompts * settings.rollout.group_size
  micro = settings.step.micro_batch
  width = jnp.dtype(config.compute_dtype).itemsize

  def layer(canvases):
    """Activations of one layer, forward."""
    kv_width = config.kv_heads * config.head_dim
    row = 3 * config.width + 2 * kv_width + 3 * config.mlp_width
    weights = 0 if config.attention == "flash" else config.heads * length
    # Attention weights exist in float32 and in the compute dtype.
    return canvases * length * (row * width + weights * (4 + width))

  masks = settings.likelihood.masks
  together = settings.step.micro_masks or masks
  canvases = micro * together
  logits = 4.0 * config.vocab_size
  head = _head_rows(settings, micro) * together / masks
  head *= logits / config.head_chunks
  block = total * settings.sampler.block_length * logits
  working = {
    "update": {
      **described.temporaries["update"],
      "one layer": 2 * layer(canvases),
      "logits": 2 * head,
    },
    "scores": {"one layer": layer(canvases), "logits": head},
    # Logits, uniforms and the sum of both.
    "rollout": {"one layer": layer(total), "logits": 3 * block},
  }
  if not config.remat:
    working["update"]["saved activations"] = config.layers * layer(canvases)
  sizes = described.resident.bytes_by_name
  rows = {}
  for name, function in described.functions.items():
    filled = {tree: sizes[tree] for tree in described.uses[name]}
    filled |= working[name]
    needed = sum(filled.values())
    beside = described.resident.total - sum(
      sizes[tree] for tree in described.uses[name]
    )
    with on(program.mesh):
      traced = function.trace(*described.arguments[name])
    rows[name] = {
      "hbm_gb": needed / GB,
      "resident_gb": beside / GB,
      "capacity_gb": capacity_bytes / GB,
      "flops": flops.executed(traced.jaxpr, described.trips[name]),
      "useful_flops": described.useful[name],
      "runs": described.runs[name],
      "collective_gb": None,
      "moved_gb": None,
      "seconds": None,
      "mfu": None,
      "fits": needed + beside <= capacity_bytes,
      "filled_by_gb": {part: size / GB for part, size in filled.items()},
      "notes": [],
    }
  return rows
