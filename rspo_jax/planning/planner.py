"""Plans a run for a slice that is not there: will it fit, how long is a step?

1. The workload becomes settings; what cannot be is refused with the nearest
   setting that works, before anything is compiled.
2. State that is larger than the slice is refused by arithmetic.
3. Update, scores and rollout (programs.py) are compiled for the slice
   (compiler.py) and priced (prices.py).
4. `search` does it from the smallest slice up until one holds everything;
   `estimate_gpu` estimates one GPU, for which no compiler is asked.

Nothing here runs on a TPU. GB are 1e9 bytes, everything is per chip unless it
says otherwise.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from rspo_jax.planning import chips, compiler, prices, programs, workload
from rspo_jax.planning.chips import GB
from rspo_jax.run import settings as settings_lib

PROGRAMS = ("update", "scores", "rollout")


def make_plan(
  options: workload.Options, topology: chips.Topology, names=PROGRAMS
) -> dict[str, Any]:
  """Plans the command line's run for one slice.

  Args:
    options: the command line.
    topology: the slice.
    names: programs that are compiled.

  Returns:
    The plan, as `--json` prints it.

  Raises:
    ValueError: the caller's mistake; nothing was compiled.
  """
  config, notes = workload.configure(options, topology.devices)
  described = _describe(
    config, topology.devices, lambda: compiler.topology_devices(topology)
  )
  level = "quick" if options.quick or options.search else "full"
  cache = None if options.no_cache else compiler.cache_folder()
  held = sum(described.resident.values())
  compiles = held <= topology.chip.memory_bytes
  if not compiles:
    notes.append(
      f"what stays in memory is {held / GB:.1f} GB a chip: nothing was compiled"
    )
  rows = {}
  for name in names:
    if name in described.calls:
      result = None
      if compiles:
        _say(options, f"compiling {name} for {topology.name}")
        result = compiler.measure(described, topology, name, level, cache)
      rows[name] = prices.price(described, topology, name, level, result)
  return _made(described, rows, notes, topology.name, level, topology)


def estimate_gpu(options: workload.Options) -> dict[str, Any]:
  """A plan for one GPU by arithmetic alone, labelled as an estimate.

  Raises:
    ValueError: no such memory size.
  """
  size = options.topology.partition(":")[2]
  try:
    capacity = float(size)
  except ValueError:
    capacity = 0.0
  if not 0 < capacity < 10000:
    raise ValueError(
      f"--topology={options.topology}: say how many GB the GPU has, such as "
      "gpu:80."
    )
  config, notes = workload.configure(options, 1)
  if config.model.compute_dtype == "auto":
    with config.unlocked():
      config.model.compute_dtype = "bfloat16"
  described = _describe(config, 1, lambda: jax.devices("cpu")[:1])
  rows = prices.estimate(described, capacity * GB)
  notes.append(
    "an estimate: weights, moments, gradients and live activations by "
    "arithmetic; no compiler was asked"
  )
  return _made(described, rows, notes, options.topology)


def _describe(config, count: int, devices: Callable) -> programs.Described:
  """The programs of a config, refused where they cannot be.

  Args:
    config: a ConfigDict.
    count: of devices.
    devices: asked for their descriptions when all else is known to be right.
  """
  settings = settings_lib.build(config, count, planning=True)
  model = programs.model_config(settings)
  programs.check_mesh(settings, model, count)
  program = programs.abstract_program(settings, model, devices())
  return programs.describe(program)


def _made(
  described: programs.Described, rows, notes, name, level=None, topology=None
) -> dict[str, Any]:
  """The plan of programs with their rows; level and topology: of a TPU."""
  settings, mesh = described.program.settings, described.program.mesh
  total = settings.rollout.prompts * settings.rollout.group_size
  seconds = [row["seconds"] for row in rows.values()]
  learned = [rows[name] for name in ("update", "scores") if name in rows]
  ratio = step_seconds = None
  if all(row["flops"] for row in learned):
    spent = sum(row["flops"] * row["runs"] for row in learned)
    ratio = spent * mesh.size / described.needed
  if None not in seconds:
    step_seconds = sum(row["seconds"] * row["runs"] for row in rows.values())
  plan = {
    "topology": name,
    "optimization": level,
    "estimate": topology is None,
    "peak_flops": topology and topology.chip.peak_flops,
    "fits": all(row["fits"] for row in rows.values()),
    "chips": mesh.size,
    "mesh": dict(mesh.shape),
    "sequences": total,
    "masks": settings.likelihood.masks,
    "prompt": settings.data.prompt_length,
    "completion": settings.sampler.completion_length,
    "micro_batches": total // settings.step.micro_batch,
    "micro_masks": settings.step.micro_masks or settings.likelihood.masks,
    "passes": "two" if settings.scores.two_passes else "one",
    "programs": rows,
    "resident_by_name_gb": {
      name: size / GB for name, size in described.resident.items()
    },
    "step_seconds": step_seconds,
    "executed_over_useful": ratio,
    "notes": notes,
  }
  return plan | {"advice": advice(plan, settings, topology)}


def advice(plan, settings, topology) -> list[str]:
  """What to change when a plan does not fit, the cheapest first."""
  if plan["fits"]:
    return []
  lines = []
  update = plan["programs"].get("update")
  total, shards = plan["sequences"], settings.step.shards
  state = sum(plan["resident_by_name_gb"].values())
  capacity = max(row["capacity_gb"] for row in plan["programs"].values())
  if state > capacity or (update and not update["fits"]):
    lines += _smaller_state(plan, settings)
  if update and not update["fits"] and state <= capacity:
    if not settings.model.remat:
      lines.append("model.remat=True: a layer's activations are recomputed")
    if settings.model.head_chunks == 1:
      lines.append("model.head_chunks=8: logits exist in eighths")
    each = total // shards
    more = [
      n for n in range(plan["micro_batches"] + 1, each + 1) if each % n == 0
    ]
    if more:
      lines.append(
        f"--micro_batches={more[0]} (train.micro_batch={total // more[0]}): "
        f"activations of {plan['micro_batches']}/{more[0]} the size"
      )
    elif settings.likelihood.masks > settings.likelihood.draw_size:
      size = settings.likelihood.draw_size
      if settings.step.micro_masks != size:
        lines.append(
          f"--config.train.micro_masks={size}: a sequence's masks one draw "
          "after another, in two passes"
        )
      lines.append(f"--masks={size}: fewer masks a sequence")
  rollout = plan["programs"].get("rollout")
  if rollout and not rollout["fits"] and update and update["fits"]:
    lines.append(
      f"--sequences={total // 2} (rollout.prompts="
      f"{max(settings.rollout.prompts // 2, 1)}): fewer completions at a time"
    )
  bigger = _large_enough(plan, topology)
  if bigger:
    lines.append(f"--topology={bigger}: more chips share the state")
  return lines


def _smaller_state(plan, settings) -> list[str]:
  """Settings under which less stays in memory."""
  held, lines = plan["resident_by_name_gb"], []
  adapted = "frozen weights" in held
  if not adapted and not settings.supervised:
    lines.append("lora.rank=64: an adapter alone has gradients and moments")
  if settings.model.param_dtype == "float32":
    weights = held["frozen weights" if adapted else "weights"]
    lines.append(
      f"model.param_dtype=bfloat16: {weights:.1f} GB of weights halve"
    )
  if settings.optimizer.moment_dtype == "float32":
    lines.append(
      f"optimizer.moment_dtype=bfloat16: less than {held['moments']:.1f} GB of "
      "moments"
    )
  return lines


def _large_enough(plan, topology) -> str | None:
  """The smallest larger slice whose share of everything should fit."""
  if topology is None:
    return None
  state = sum(plan["resident_by_name_gb"].values())
  needed = max(
    (row["hbm_gb"] or state) + row["resident_gb"]
    for row in plan["programs"].values()
  )
  capacity = topology.chip.memory_bytes / GB
  for other in chips.larger(topology):
    if needed * topology.devices / other.devices < 0.9 * capacity:
      return other.name
  return None


def search(options: workload.Options) -> dict[str, Any]:
  """The smallest slice that holds every program.

  Slices are tried by number of chips, then by memory; of each the state is
  weighed first, and then the configured micro-batch and the smallest one.

  Raises:
    ValueError: the caller's mistake on every slice.
  """
  if options.kind and options.kind not in chips.CHIPS:
    chips.parse(options.topology)  # which refuses it
  slices = sorted(
    chips.slices(options.kind), key=lambda t: (t.devices, t.chip.memory_bytes)
  )
  tried, plan, mistake = [], None, None
  for topology in slices:
    for variant in _micro_variants(options, topology):
      try:
        plan = make_plan(variant, topology)
      except ValueError as error:
        mistake = error
        continue
      tried.append(
        {
          "topology": topology.name,
          "micro_batches": plan["micro_batches"],
          "fits": plan["fits"],
        }
      )
      if plan["fits"]:
        return plan | {"tried": tried}
      if any(row["hbm_gb"] is None for row in plan["programs"].values()):
        break  # The state alone is too large.
  if plan is None:
    raise mistake
  return plan | {"tried": tried}


def _micro_variants(options: workload.Options, topology: chips.Topology):
  """The command line as given, and with one sequence a device at a time."""
  yield options
  if options.micro_batches:
    return
  try:
    config, _ = workload.configure(options, topology.devices)
  except ValueError:
    return
  total = config.rollout.prompts * config.rollout.group_size
  each = total // topology.devices
  if each and total // config.train.micro_batch < each:
    yield dataclasses.replace(options, micro_batches=each)


def _say(options: workload.Options, text: str) -> None:
  """Progress, on standard error."""
  if sys.stderr.isatty() or options.search:
    print(text, file=sys.stderr, flush=True)
