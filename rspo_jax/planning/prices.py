"""What a plan says of each program: GB, FLOPs, seconds, and whether it fits.

`price` reads it from the compiler's answer, `estimate` counts what must be
there where no compiler can be asked. All figures are of one chip; what is not
known is None.
"""

from typing import Any

import jax.numpy as jnp

from rspo_jax.planning import chips, compiler, flops, programs
from rspo_jax.planning.chips import GB


def _row(
  described: programs.Described, name: str, capacity_bytes: float
) -> dict[str, Any]:
  """What is known of a program before it is compiled."""
  call = described.calls[name]
  unknown = ("hbm_gb", "flops", "collective_gb", "moved_gb", "seconds", "mfu")
  return dict.fromkeys(unknown) | {
    "resident_gb": described.beside(name) / GB,
    "capacity_gb": capacity_bytes / GB,
    "useful_flops": call.useful / described.program.mesh.size,
    "runs": call.runs,
    "fits": False,
    "notes": [],
  }


def price(
  described: programs.Described,
  topology: chips.Topology,
  name: str,
  level: str,
  result: dict[str, Any] | None,
) -> dict[str, Any]:
  """The row of one program in a plan.

  Args:
    described: programs with their arguments.
    topology: the slice.
    name: key of `described.calls`.
    level: key of `compiler.LEVELS`; without optimisation seconds mean nothing.
    result: of `compiler.measure`; None where nothing was compiled.
  """
  chip = topology.chip
  row = _row(described, name, chip.memory_bytes)
  if result is None:
    return row
  row["hbm_gb"] = result["needed_bytes"] / GB
  row["flops"] = result["flops"] / described.program.mesh.size
  row["compile_s"] = result["compile_s"]
  if result["memory"] is None:
    row["notes"].append("refused by the compiler: it does not fit")
    return row
  needed = result["needed_bytes"] + described.beside(name)
  row["fits"] = needed <= chip.memory_bytes
  row["memory_gb"] = {k: v / GB for k, v in result["memory"].items()}
  row["filled_by_gb"] = _filled_by(described, name, result["memory"])
  if result["measured"] is None:
    row["notes"].append(
      f"the compiler cannot print this program for {chip.kind}: no seconds, no "
      "traffic"
    )
    return row
  _price_wire(row, result["measured"])
  why = _no_seconds(row, chip, level, result["measured"])
  if why:
    row["notes"].append(why)
  else:
    _price_time(row, chip, result["measured"])
  return row


def _filled_by(described, name, memory) -> dict[str, float]:
  """GB of a program's own memory by what it is; temporaries are estimates."""
  filled = described.given(name)
  filled["batch"] = max(memory["arguments"] - sum(filled.values()), 0)
  rest = memory["temporaries"]
  for part, size in described.calls[name].temporaries.items():
    filled[part] = min(size, rest)
    rest -= filled[part]
  filled["working space"] = rest
  filled["outputs"] = memory["outputs"] - memory["aliased"]
  filled["code"] = memory["code"]
  return {part: size / GB for part, size in filled.items()}


def _price_wire(row, measured) -> None:
  """Traffic from the program's text."""
  row["collectives"] = {
    kind: {
      "gb": wire["bytes"] / GB,
      "blocking_gb": wire["blocking_bytes"] / GB,
      "count": wire["count"],
    }
    for kind, wire in measured["wire_by_kind"].items()
  }
  row["collective_gb"] = sum(w["gb"] for w in row["collectives"].values())
  row["moved_gb"] = measured["moved_bytes"] / GB


def _no_seconds(row, chip: chips.Chip, level: str, measured) -> str:
  """Why the compiler's estimates give no seconds; "" where they do."""
  if compiler.LEVELS[level]:
    return "compiled without optimisation: memory, FLOPs and collectives only"
  if measured["unpriced"]:
    return "the compiler has no estimate for hand-written kernels: no seconds"
  if measured["cycles"] / chip.clock_hz < row["flops"] / chip.peak_flops:
    return (
      "the program's text names fewer cycles than its matmuls need at peak: no "
      "seconds"
    )
  return ""


def _price_time(row, chip: chips.Chip, measured) -> None:
  """Seconds and MFU in three readings of what overlaps."""
  compute_s = measured["cycles"] / chip.clock_hz
  wires = measured["wire_by_kind"].values()
  wire_s, blocking_s = (
    sum(wire[part] for wire in wires) / chip.wire_bytes_per_s
    for part in ("bytes", "blocking_bytes")
  )
  readings = {
    "overlap": max(compute_s, wire_s),
    "sync": max(compute_s, wire_s - blocking_s) + blocking_s,
    "serial": compute_s + wire_s,
  }
  needed_s = row["useful_flops"] / chip.peak_flops
  row["readings"] = {
    name: {"seconds": seconds, "mfu": needed_s / seconds}
    for name, seconds in readings.items()
  }
  row |= row["readings"]["sync"]


def estimate(
  described: programs.Described, capacity_bytes: float
) -> dict[str, Any]:
  """Rows of a plan by arithmetic, for a device without a compiler at hand.

  Counts what must be there: trees, gradients, layer inputs, one layer's
  activations with their cotangents, logits of one piece of the head. What a
  compiler adds on top (layouts, fragmentation) is not in it.

  Args:
    described: programs on one device.
    capacity_bytes: of that device.
  """
  rows, working = {}, _working(described.program)
  for name, call in described.calls.items():
    filled = described.given(name) | call.temporaries | working[name]
    needed = sum(filled.values())
    traced = call.function.trace(*call.arguments)
    rows[name] = _row(described, name, capacity_bytes) | {
      "hbm_gb": needed / GB,
      "flops": flops.executed(traced.jaxpr, call.trips),
      "fits": needed + described.beside(name) <= capacity_bytes,
      "filled_by_gb": {part: size / GB for part, size in filled.items()},
    }
  return rows


def _working(program) -> dict[str, dict[str, float]]:
  """Bytes of activations that are alive at a time, by program."""
  settings, config = program.settings, program.model.config
  length = settings.data.prompt_length + settings.sampler.completion_length
  total = settings.rollout.prompts * settings.rollout.group_size
  width = jnp.dtype(config.compute_dtype).itemsize

  def layer(canvases):
    """Activations of one layer, forward."""
    kv_width = config.kv_heads * config.head_dim
    row = 3 * config.width + 2 * kv_width + 3 * config.mlp_width
    weights = 0 if config.attention == "flash" else config.heads * length
    # Attention weights exist in float32 and in the compute dtype.
    return canvases * length * (row * width + weights * (4 + width))

  masks, micro = settings.likelihood.masks, settings.step.micro_batch
  together = settings.step.micro_masks or masks
  canvases = micro * together
  logits = 4.0 * config.vocab_size
  head = programs.head_rows(settings, micro) * together / masks
  head *= logits / config.head_chunks
  block = total * settings.sampler.block_length * logits
  working = {
    "update": {"one layer": 2 * layer(canvases), "logits": 2 * head},
    "scores": {"one layer": layer(canvases), "logits": head},
    # Logits, uniforms and the sum of both.
    "rollout": {"one layer": layer(total), "logits": 3 * block},
  }
  if not config.remat:
    working["update"]["saved activations"] = config.layers * layer(canvases)
  return working
