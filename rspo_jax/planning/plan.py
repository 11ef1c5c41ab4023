"""Answers, before anything is rented: will it fit, and how long is a step?

    python launch/plan.py --config=configs/countdown.py:llada_8b \\
        --topology=v5e:2x2 --sequences=64 --masks=2

1. The command line becomes a config and a slice; what cannot be is refused
   with the nearest setting that works, before anything is compiled.
2. State that is larger than the slice is refused by arithmetic.
3. Update, scores and rollout are compiled for the slice (planner.py) and
   printed with what fills the memory, what moves, and what to change.
4. `--search` does it from the smallest slice up until one holds everything.
   `--topology=gpu:GB` estimates one GPU, for which no compiler is asked.

Exit status: 0 fits, 1 does not fit, 2 mistake in the command.
"""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rspo_jax.config import load
from rspo_jax.planning import chips

FITS, DOES_NOT_FIT, MISTAKE = 0, 1, 2
HELP = """usage: python launch/plan.py --config=FILE[:ARG,...] --topology=SLICE [options]

  --config=configs/countdown.py:llada_8b   config file, as for a run
  --config.GROUP.KEY=VALUE                 override of one key
  --topology=v5e:2x2 | v6e:2x4 | v5p:2x2x1 | ...   the slice, or
  --topology=gpu:80                        one GPU with 80 GB: an estimate
  --search                                 the smallest slice that holds it, of
                                           the kind in --topology if given
  --sequences=64      completions of a step (rollout.prompts x group_size)
  --masks=2           likelihood.masks
  --prompt=256        data.prompt_length
  --completion=256    sampler.completion_length
  --micro_batches=4   parts in which a step's sequences are differentiated
  --quick             compiles without optimisation: memory, FLOPs and
                      collectives in a fifth of the time, no seconds
  --json              one JSON object on standard output
  --no_cache          compiles again what was compiled before

Nothing is run on hardware: the TPU compiler (pip install libtpu) says what
fits. Exit status: 0 fits, 1 does not fit, 2 mistake in the command."""
PROGRAMS = ("update", "scores", "rollout")
_COUNTS = ("sequences", "masks", "prompt", "completion", "micro_batches")


@dataclasses.dataclass(frozen=True)
class Options:
  """The command line.

  Attributes:
    config: FILE[:ARG].
    overrides: text by config key.
    topology: as given; may be "" or a kind alone with `search`.
    sequences, masks, prompt, completion, micro_batches: None: the config's.
    search, quick, as_json, no_cache: switches.
  """

  config: str
  overrides: dict[str, str]
  topology: str
  sequences: int | None = None
  masks: int | None = None
  prompt: int | None = None
  completion: int | None = None
  micro_batches: int | None = None
  search: bool = False
  quick: bool = False
  as_json: bool = False
  no_cache: bool = False


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would end the process."""

  def error(self, message):
    raise ValueError(f"{message}; see --help.")


def parse(argv: Sequence[str]) -> Options:
  """Reads the command line.

  Raises:
    ValueError: one message with value and remedy.
  """
  parser = _Parser(add_help=False, allow_abbrev=False)
  parser.add_argument("--config", default="")
  parser.add_argument("--topology", default="")
  for name in _COUNTS:
    parser.add_argument(f"--{name}", default=None)
  for name in ("search", "quick", "json", "no_cache"):
    parser.add_argument(f"--{name}", action="store_true")
  known, rest = parser.parse_known_args(list(argv))
  overrides, words = {}, iter(rest)
  for word in words:
    name, equals, value = word.lstrip("-").partition("=")
    if not name.startswith("config.") or not word.startswith("--"):
      names = ("config", "topology", *_COUNTS, "search", "quick", "json")
      near = difflib.get_close_matches(name, names, 1)
      hint = f"; did you mean --{near[0]}?" if near else "; see --help."
      raise ValueError(f"{word} is not an option{hint}")
    overrides[name.removeprefix("config.")] = (
      value if equals else next(words, "")
    )
  if not known.config:
    raise ValueError(
      "--config is missing; try --config=configs/countdown.py:llada_8b."
    )
  if not known.topology and not known.search:
    raise ValueError(
      "--topology is missing; try --topology=v5e:2x2, or --search for the "
      "smallest slice."
    )
  counts = {}
  for name in _COUNTS:
    text = getattr(known, name)
    if text is not None and not (text.isdecimal() and int(text) >= 1):
      raise ValueError(f"--{name}={text} must be a whole number of at least 1.")
    counts[name] = None if text is None else int(text)
  return Options(
    known.config,
    overrides,
    known.topology,
    **counts,
    search=known.search,
    quick=known.quick,
    as_json=known.json,
    no_cache=known.no_cache,
  )


def configure(options: Options, devices: int):
  """The config with the workload of the command line.

  Args:
    options: the command line.
    devices: of the slice, to which the batch is fitted.

  Returns:
    (config, notes): what had to be changed to make the numbers fit is noted.

  Raises:
    ValueError: numbers that do not divide, with the nearest that do.
  """
  from rspo_jax.devices import sharding

  config = load.load_config(options.config)
  for key, text in options.overrides.items():
    load.override(config, key, text)
  notes = []
  if options.masks:
    config.likelihood.masks = options.masks
  if options.prompt:
    config.data.prompt_length = options.prompt
  if options.completion:
    _set_completion(config, options.completion, notes)
  sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
  mesh = sharding.mesh_shape(**sizes, devices=devices)
  shards = mesh[0] * mesh[1]
  if options.sequences:
    _set_sequences(config, options.sequences, shards, notes)
  total = config.rollout.prompts * config.rollout.group_size
  if options.micro_batches:
    _set_micro_batches(config, options.micro_batches, total, shards)
  elif options.sequences:
    _fit_micro_batch(config, total, shards, notes)
  # Evaluation is no part of a plan.
  config.eval.batch = -(-config.eval.batch // shards) * shards
  return config.lock(), notes


def _set_completion(config, length: int, notes) -> None:
  """Completions of another length, at as many tokens a denoising step."""
  sampler = config.sampler
  before = sampler.completion_length
  if length == before:
    return
  block = max(
    n
    for n in range(1, min(sampler.block_length, length) + 1)
    if length % n == 0
  )
  blocks = length // block
  steps = max(round(sampler.steps * length / before / blocks), 1) * blocks
  sampler.completion_length = length
  sampler.block_length, sampler.steps = block, steps
  notes.append(
    f"--completion={length}: planned with sampler.block_length={block} and "
    f"sampler.steps={steps}"
  )


def _set_sequences(config, total: int, shards: int, notes) -> None:
  """A batch of `total` sequences in whole groups, groups whole on a shard."""
  if config.objective.name == "sft":
    config.rollout.prompts = total
    return
  group = config.rollout.group_size
  possible = [
    size
    for size in range(2, total // shards + 1)
    if total % shards == 0 and total // shards % size == 0
  ]
  if not possible:
    near = max(round(total / (2 * shards)), 1) * 2 * shards
    raise ValueError(
      f"--sequences={total} leaves no group of 2 or more whole on each of the "
      f"{shards} devices that share the batch; use --sequences={near}."
    )
  size = min(possible, key=lambda size: (abs(size - group), size))
  if size != group:
    notes.append(
      f"{total} sequences on {shards} devices are no whole groups of "
      f"rollout.group_size={group}: planned with groups of {size}"
    )
  config.rollout.group_size = size
  config.rollout.prompts = total // size


def _set_micro_batches(config, count: int, total: int, shards: int) -> None:
  """`count` micro-batches of the step's sequences."""
  if total % (count * shards):
    each = total // shards
    near = min(
      (n for n in range(1, each + 1) if each % n == 0),
      key=lambda n: abs(n - count),
    )
    raise ValueError(
      f"--micro_batches={count} must divide the {each} sequences of each of the "
      f"{shards} devices that share the batch; use --micro_batches={near}."
      if each and total % shards == 0
      else f"{total} sequences must be a multiple of the {shards} devices that "
      f"share the batch; use --sequences={-(-total // shards) * shards}."
    )
  config.train.micro_batch = total // count


def _fit_micro_batch(config, total: int, shards: int, notes) -> None:
  """The micro-batch of the config, or the nearest that divides the batch."""
  wish = config.train.micro_batch
  each = total // shards
  sizes = [shards * n for n in range(1, each + 1) if each % n == 0]
  config.train.micro_batch = min(sizes, key=lambda size: abs(size - wish))
  if config.train.micro_batch != wish:
    notes.append(
      f"train.micro_batch={wish} does not divide {total} sequences on {shards} "
      f"devices: planned with {config.train.micro_batch}"
    )


def make_plan(
  options: Options, topology: chips.Topology, names=PROGRAMS
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
  from rspo_jax.planning import planner
  from rspo_jax.run import settings as settings_lib

  config, notes = configure(options, topology.devices)
  settings = settings_lib.build(config, topology.devices, planning=True)
  model = planner.model_config(settings)
  planner.check_mesh(settings, model, topology.devices)
  level = "quick" if options.quick or options.search else "full"
  devices = planner.topology_devices(topology)
  program = planner.abstract_program(settings, model, devices)
  described = planner.describe(program)
  names = [name for name in names if name in described.functions]
  cache = None if options.no_cache else planner.cache_folder()
  held = described.resident.total
  if held > topology.chip.memory_bytes:
    notes.append(
      f"what stays in memory is {held / planner.GB:.1f} GB a chip: nothing was "
      "compiled"
    )
    results = dict.fromkeys(names)
  else:
    results = {}
    for name in names:
      _say(options, f"compiling {name} for {topology.name}")
      results[name] = planner.measure(described, topology, name, level, cache)
  rows = {
    name: planner.price(described, topology, name, level, result)
    for name, result in results.items()
  }
  plan = _frame(settings, described, rows, notes)
  plan |= {
    "topology": topology.name,
    "optimization": level,
    "estimate": False,
    "peak_flops": topology.chip.peak_flops,
  }
  plan["advice"] = advice(plan, settings, topology)
  return plan


def _frame(settings, described, rows, notes) -> dict[str, Any]:
  """What plans of TPUs and GPUs have in common."""
  from rspo_jax.planning import planner

  total = settings.rollout.prompts * settings.rollout.group_size
  seconds = [row["seconds"] for row in rows.values()]
  learned = [rows[name] for name in ("update", "scores") if name in rows]
  ratio = None
  if all(row["flops"] for row in learned):
    spent = sum(row["flops"] * row["runs"] for row in learned)
    ratio = spent * described.program.mesh.size / described.needed
  return {
    "fits": all(row["fits"] for row in rows.values()),
    "chips": described.program.mesh.size,
    "mesh": dict(described.program.mesh.shape),
    "sequences": total,
    "masks": settings.likelihood.masks,
    "prompt": settings.data.prompt_length,
    "completion": settings.sampler.completion_length,
    "micro_batches": total // settings.step.micro_batch,
    "micro_masks": settings.step.micro_masks or settings.likelihood.masks,
    "passes": "two" if settings.scores.two_passes else "one",
    "programs": rows,
    "resident_by_name_gb": {
      name: size / planner.GB
      for name, size in described.resident.bytes_by_name.items()
    },
    "step_seconds": None
    if None in seconds
    else sum(row["seconds"] * row["runs"] for row in rows.values()),
    "executed_over_useful": ratio,
    "notes": notes,
  }


def estimate_gpu(options: Options) -> dict[str, Any]:
  """A plan for one GPU by arithmetic alone, labelled as an estimate.

  Raises:
    ValueError: no such memory size.
  """
  import jax

  from rspo_jax.planning import planner
  from rspo_jax.run import settings as settings_lib

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
  config, notes = configure(options, 1)
  if config.model.compute_dtype == "auto":
    with config.unlocked():
      config.model.compute_dtype = "bfloat16"
  settings = settings_lib.build(config, 1, planning=True)
  model = planner.model_config(settings)
  planner.check_mesh(settings, model, 1)
  program = planner.abstract_program(settings, model, jax.devices("cpu")[:1])
  described = planner.describe(program)
  rows = planner.estimate(described, capacity * planner.GB)
  plan = _frame(settings, described, rows, notes)
  plan["notes"].append(
    "an estimate: weights, moments, gradients and live activations by "
    "arithmetic; no compiler was asked"
  )
  plan |= {
    "topology": options.topology,
    "optimization": None,
    "estimate": True,
    "peak_flops": None,
  }
  plan["advice"] = advice(plan, settings, None)
  return plan


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
  held = plan["resident_by_name_gb"]
  lines = []
  if settings.adapter is None and not settings.supervised:
    lines.append("lora.rank=64: an adapter alone has gradients and moments")
  if settings.model.param_dtype == "float32":
    lines.append(
      f"model.param_dtype=bfloat16: {held['weights']:.1f} GB of weights halve"
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
  capacity = topology.chip.memory_bytes / 1e9
  for other in chips.larger(topology):
    if needed * topology.devices / other.devices < 0.9 * capacity:
      return other.name
  return None


def search(options: Options) -> dict[str, Any]:
  """The smallest slice that holds every program.

  Slices are tried by number of chips, then by memory; of each the state is
  weighed first, and then the configured micro-batch and the smallest one.

  Raises:
    ValueError: the caller's mistake on every slice.
  """
  kind = options.topology.partition(":")[0].lower()
  if kind and kind not in chips.CHIPS:
    chips.parse(options.topology)
  slices = [chips.parse(name) for name in chips.names(kind)]
  slices.sort(key=lambda t: (t.devices, t.chip.memory_bytes))
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


def _micro_variants(options: Options, topology: chips.Topology):
  """The command line as given, and with one sequence a device at a time."""
  yield options
  if options.micro_batches:
    return
  try:
    config, _ = configure(options, topology.devices)
  except ValueError:
    return
  total = config.rollout.prompts * config.rollout.group_size
  each = total // topology.devices
  if each and total // config.train.micro_batch < each:
    yield dataclasses.replace(options, micro_batches=each)


def _say(options: Options, text: str) -> None:
  """Progress, on standard error."""
  if sys.stderr.isatty() or options.search:
    print(text, file=sys.stderr, flush=True)


def render(plan: dict[str, Any]) -> str:
  """The plan as text."""
  verdict = "fits" if plan["fits"] else "does not fit"
  how = "estimated, no compiler" if plan["estimate"] else "compiles and fits"
  if not plan["estimate"] and not plan["fits"]:
    how = "the compiler's answer" if _compiled(plan) else "by its state alone"
  mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
  lines = [
    f"{plan['topology']}: {verdict} ({how}; nothing was run on hardware)",
    f"{plan['chips']} chips as {mesh}; {plan['sequences']} sequences x "
    f"{plan['masks']} masks x {plan['prompt']}+{plan['completion']} tokens, "
    f"{plan['micro_batches']} micro-batches"
    + (
      f" with {plan['micro_masks']} masks at a time"
      if plan["micro_masks"] < plan["masks"]
      else ""
    )
    + f", {plan['passes']} pass{'es' if plan['passes'] == 'two' else ''}",
    "",
  ]
  header = ("per chip", *plan["programs"])
  table = [header]
  for label, key, form in (
    ("memory of the program, GB", "hbm_gb", "{:.2f}"),
    ("resident beside it, GB", "resident_gb", "{:.2f}"),
    ("capacity, GB", "capacity_gb", "{:.2f}"),
    ("FLOPs executed", "flops", "{:.3g}"),
    ("FLOPs useful", "useful_flops", "{:.3g}"),
    ("memory traffic, GB", "moved_gb", "{:.3g}"),
    ("collectives, GB", "collective_gb", "{:.3g}"),
    ("seconds", "seconds", "{:.3g}"),
    ("MFU", "mfu", "{:.2f}"),
    ("fits", "fits", "{}"),
  ):
    cells = []
    for row in plan["programs"].values():
      value = row.get(key)
      if isinstance(value, bool):
        value = "yes" if value else "NO"
      cells.append("-" if value is None else form.format(value))
    table.append((label, *cells))
  lines += _columns(table)
  for name, row in plan["programs"].items():
    lines += _details(name, row)
  if plan["executed_over_useful"]:
    lines.append(
      f"executed over useful FLOPs of update and scores: "
      f"{plan['executed_over_useful']:.2f}"
    )
  if plan["step_seconds"]:
    lines.append(f"a step: {plan['step_seconds']:.3g} s")
  if any(row.get("readings") for row in plan["programs"].values()):
    lines.append(
      "Seconds are the compiler's own estimates, never compared with "
      'hardware; "sync" overlaps what the program overlaps. Expect any of '
      "the three readings, or worse."
    )
  lines += [f"note: {note}" for note in plan["notes"]]
  if plan["advice"]:
    lines += ["", "what would help:"]
    lines += [f"  {line}" for line in plan["advice"]]
  return "\n".join(lines)


def _compiled(plan) -> bool:
  """Whether any program was given to the compiler."""
  return any(row["hbm_gb"] for row in plan["programs"].values())


def _columns(table) -> list[str]:
  """Rows of cells as aligned lines: the first column left, others right."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return [
    "  ".join(
      cell.rjust(width) if index else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in table
  ] + [""]


def _details(name: str, row) -> list[str]:
  """What fills a program's memory, its collectives, its readings."""
  lines = []
  filled = row.get("filled_by_gb")
  if filled:
    parts = [
      f"{part} {size:.2f}"
      for part, size in sorted(filled.items(), key=lambda x: -x[1])
      if size >= 0.005
    ]
    lines.append(f"{name}: memory is {', '.join(parts) or '0.00'} GB")
  for kind, wire in (row.get("collectives") or {}).items():
    lines.append(
      f"{name}: {kind} {wire['gb']:.2f} GB, {wire['blocking_gb']:.2f} of it "
      f"blocking, {wire['count']:.0f} times"
    )
  readings = row.get("readings")
  if readings:
    text = ", ".join(
      f"{reading} {value['seconds']:.3g} s (MFU {value['mfu']:.2f})"
      for reading, value in readings.items()
    )
    lines.append(f"{name}: {text}")
  lines += [f"{name}: {note}" for note in row["notes"]]
  return lines


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if any(word in ("-h", "--help", "-help") for word in argv):
    print(HELP)
    return FITS
  try:
    options = parse(argv)
    kind = options.topology.partition(":")[0].lower()
    topology = None
    if not options.search and kind != "gpu":
      topology = chips.parse(options.topology)
    # The compiler is asked without a device; with libtpu installed JAX would
    # look for one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if kind == "gpu":
      plan = estimate_gpu(options)
    elif options.search:
      plan = search(options)
    else:
      plan = make_plan(options, topology)
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return MISTAKE
  print(json.dumps(plan) if options.as_json else render(plan))
  return FITS if plan["fits"] else DOES_NOT_FIT
