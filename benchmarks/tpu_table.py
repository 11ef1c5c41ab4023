"""What LLaDA-8B needs on TPUs, by the TPU compiler, each with its bar.

    python benchmarks/tpu_table.py                # memory of the update
    python benchmarks/tpu_table.py --part=head    # the head by itself
    python benchmarks/tpu_table.py --part=scaling # 4 to 256 chips
    python benchmarks/tpu_table.py --part=masks   # K = 2 to 64, two passes
    python benchmarks/tpu_table.py --part=time    # modelled MFU on v5e:4x4
    python benchmarks/tpu_table.py --part=all

No TPU is needed and nothing runs on one (pip install libtpu). Prints Markdown;
a row takes 20 to 60 CPU seconds, one of `time` 2 to 5 minutes; `--only=TEXT`
keeps the memory rows whose label or slice has it. Exit status 1 where a bar is not
reached.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from rspo_jax.planning import chips, planner, workload  # noqa: E402

LORA, FULL = "llada_8b", "llada_8b,full"
F32_MOMENTS = {"optimizer.moment_dtype": "float32"}


@dataclasses.dataclass(frozen=True)
class Row:
  """One compilation of the update; sequences x masks x (256 + 256) tokens."""

  label: str
  arg: str
  topology: str
  micro_batches: int
  bar: float | None = None
  sequences: int = 64
  masks: int = 2
  tokens: int = 512
  overrides: dict[str, str] = dataclasses.field(default_factory=dict)


MEMORY = (
  Row("LoRA r64", LORA, "v5e:2x2", 4, 7.6),
  Row("LoRA r64", LORA, "v6e:1x1", 16, 22),
  Row(
    "LoRA r128, 1024 tokens",
    LORA,
    "v5e:2x2",
    4,
    10.9,
    tokens=1024,
    overrides={"lora.rank": "128"},
  ),
  Row("full, bf16 moments", FULL, "v5e:2x4", 8, 13.5),
  Row("full, bf16 moments", FULL, "v6e:2x2", 4, 27.5),
  Row("full, f32 moments", FULL, "v5e:4x4", 1, 9.7, overrides=F32_MOMENTS),
  Row(
    "full, bf16 moments, K=4, one pass",
    FULL,
    "v5e:4x4",
    2,
    7.9,
    masks=4,
    overrides={"train.passes": "one", "rollout.group_size": "2"},
  ),
)
# As many sequences a chip on every slice.
SCALING = tuple(
  Row("LoRA r64", LORA, name, 4, sequences=16 * chips.parse(name).devices)
  for name in ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
)
# A sequence a chip with a pair of masks at a time.
MASKS = tuple(
  Row(
    "LoRA r64, two passes",
    LORA,
    "v5e:2x2",
    16,
    masks=masks,
    overrides={"train.passes": "two", "train.micro_masks": "2"},
  )
  for masks in (2, 8, 64)
)
# Sequences of the head's rows: 256 rows each, as a complementary pair has them.
HEAD_TOPOLOGY, HEAD_SEQUENCES, HEAD_ROWS, HEAD_BAR = "v5e:4x4", 64, 256, 0.2
TIME = (Row("full, bf16 moments", FULL, "v5e:4x4", 1),)


def options_of(row: Row, config: str, quick: bool = True) -> workload.Options:
  """A row as a command line of launch/plan.py."""
  return workload.Options(
    config=f"{config}:{row.arg}",
    overrides=row.overrides,
    topology=row.topology,
    sequences=row.sequences,
    masks=row.masks,
    prompt=row.tokens // 2,
    completion=row.tokens // 2,
    micro_batches=row.micro_batches,
    quick=quick,
  )


def planned(row: Row, config: str, quick=True, names=("update",)):
  """The plan of a row."""
  topology = chips.parse(row.topology)
  return planner.make_plan(options_of(row, config, quick), topology, names)


def memory(options) -> bool:
  """Memory of the update against its bars."""
  print(
    "| update | slice | micro-batches | passes | HBM, GB | beside it (reference),"
    " GB | bar | reached |"
  )
  print("|---|---|---|---|---|---|---|---|")
  good = True
  for row in MEMORY:
    if options.only not in f"{row.label} {row.topology}":
      continue
    made = planned(row, options.config)
    used = made["programs"]["update"]["hbm_gb"]
    beside = made["programs"]["update"]["resident_gb"]
    reached = used <= row.bar and made["programs"]["update"]["fits"]
    good &= reached
    print(
      f"| {row.label} | {row.topology} | {row.micro_batches} | "
      f"{made['passes']} | {used:.2f} | {beside:.2f} | {row.bar} | "
      f"{'yes' if reached else 'NO'} |",
      flush=True,
    )
  return good


def gathered_by_hand(row: Row) -> float:
  """GB that a chip is sent of weights and of the head's rows, from the shapes.

  Every micro-batch gathers each layer's kernels twice, forward and backward,
  in bfloat16, and each chip receives all shards but its own; a policy and a
  reference that go through the layers together share a gather. The head's
  vocabulary stays where it lies: the hidden rows of all chips come to it, those
  of policy and reference, and the policy's once more to be differentiated.
  """
  from rspo_jax.models.families import PUBLISHED

  model = PUBLISHED["llada_8b"]
  layer = 4 * model.width**2 + 3 * model.width * model.mlp_width
  n = chips.parse(row.topology).devices
  weights = row.micro_batches * 2 * 2.0 * model.layers * layer
  # A pair of complementary masks hides each token of a completion once.
  rows = row.sequences * row.masks // 2 * row.tokens // 2
  return (weights + 3 * 2.0 * rows * model.width) * (n - 1) / n / 1e9


def scaling(options) -> bool:
  """FLOPs and wire of a chip from 4 to 256 chips."""
  print(
    "| chips | sequences | FLOPs a chip | HBM, GB | gathers, GB | by hand | "
    "all collectives, GB |"
  )
  print("|---|---|---|---|---|---|---|")
  counts, good = [], True
  for row in SCALING:
    made = planned(row, options.config)
    update = made["programs"]["update"]
    counts.append(update["flops"])
    gathers = update["collectives"]["all-gather"]["gb"]
    by_hand = gathered_by_hand(row)
    good &= abs(gathers / by_hand - 1) <= 0.1
    print(
      f"| {made['chips']} | {row.sequences} | {update['flops']:.4g} | "
      f"{update['hbm_gb']:.2f} | {gathers:.1f} | {by_hand:.1f} | "
      f"{update['collective_gb']:.1f} |",
      flush=True,
    )
  spread = max(counts) / min(counts) - 1
  print(f"\nFLOPs of a chip vary by {100 * spread:.2f} % (bar: 2 %).")
  return good and spread <= 0.02


def masks(options) -> bool:
  """Memory of the two-pass update as K grows at a fixed micro-batch."""
  print("| K | micro-batches | HBM, GB |")
  print("|---|---|---|")
  used = []
  for row in MASKS:
    made = planned(row, options.config)
    used.append(made["programs"]["update"]["hbm_gb"])
    print(f"| {row.masks} | {row.micro_batches} | {used[-1]:.3f} |", flush=True)
  growth = used[-1] / used[0] - 1
  print(f"\nMemory grows by {100 * growth:.1f} % (bar: 2 %).")
  return growth <= 0.02


def head(options) -> bool:
  """Temporaries of the head alone, forward and backward, and its seconds.

  Ours, in pieces on a vocabulary that stays split, beside the plain form: the
  weight split along the width and gathered, log_softmax, take.
  """
  del options
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from rspo_jax.devices import sharding
  from rspo_jax.models import functions
  from rspo_jax.models.families import PUBLISHED
  from rspo_jax.planning import compiler, hlo
  from rspo_jax.run import program

  topology = chips.parse(HEAD_TOPOLOGY)
  mesh = sharding.make_mesh(devices=compiler.topology_devices(topology))
  model = dataclasses.replace(
    PUBLISHED["llada_8b"], compute_dtype="bfloat16", head_chunks=8
  )

  def abstract(shape, dtype, *axes):
    where = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  rows = (HEAD_SEQUENCES, HEAD_ROWS)
  h = abstract((*rows, model.width), jnp.bfloat16, sharding.BATCH_AXES)
  target = abstract(rows, jnp.int32, sharding.BATCH_AXES)

  def ours(chunks):
    cut = dataclasses.replace(model, head_chunks=chunks)

    def loss(kernel, h, target):
      params = {"head": {"kernel": kernel}}
      return functions.target_logprobs(cut, params, h, target, mesh).sum()

    return loss

  def plain(kernel, h, target):
    logits = jnp.matmul(h, kernel, preferred_element_type=jnp.float32)
    logprobs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logprobs, target[..., None], axis=-1).sum()

  whole = (None, ("fsdp", "tensor"))
  forms = (
    ("plain, weight gathered", plain, ("fsdp", "tensor"), None),
    ("split vocabulary, 1 piece", ours(1), whole, None),
    ("split vocabulary, 8 pieces", ours(8), whole, HEAD_BAR),
  )
  print("| head | temporaries, GB | bar | seconds | wire, GB |")
  print("|---|---|---|---|---|")
  good = True
  for label, loss, axes, bar in forms:
    kernel = abstract((model.width, model.vocab_size), jnp.bfloat16, *axes)
    gradient = jax.jit(
      jax.value_and_grad(loss, (0, 1)),
      out_shardings=(None, (kernel.sharding, h.sharding)),
      compiler_options=program.compiler_options(mesh),
    )
    with sharding.active(mesh):
      traced = gradient.trace(kernel, h, target)
      compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    used = compiled.memory_analysis().temp_size_in_bytes / chips.GB
    measured = hlo.measure(compiled.as_text(), mesh.size, model.head_chunks)
    seconds = measured.cycles / topology.chip.clock_hz
    good &= bar is None or used <= bar
    print(
      f"| {label} | {used:.3f} | {bar or ''} | {seconds:.4f} | "
      f"{measured.wire_bytes / chips.GB:.2f} |",
      flush=True,
    )
  return good


def time_of(options) -> bool:
  """Modelled seconds and MFU, with the compiler's full optimisation."""
  print("| update | slice | executed / useful | reading | seconds | MFU |")
  print("|---|---|---|---|---|---|")
  good = True
  for row in TIME:
    made = planned(row, options.config, False, ("update", "scores"))
    good &= made["executed_over_useful"] <= 1.2
    rows = [made["programs"][n] for n in ("update", "scores")]
    if any(program.get("readings") is None for program in rows):
      print(f"| {row.label} | {row.topology} | - | - | - | - |")
      good = False
      continue
    for reading, bar in (("overlap", 0.55), ("sync", 0.48), ("serial", 0.0)):
      seconds = sum(
        program["readings"][reading]["seconds"] * program["runs"]
        for program in rows
      )
      flops = sum(p["flops"] * p["runs"] for p in rows)
      useful = flops / made["executed_over_useful"]
      mfu = useful / made["peak_flops"] / seconds
      good &= mfu >= bar
      print(
        f"| {row.label} | {row.topology} | {made['executed_over_useful']:.2f} "
        f"| {reading} | {seconds:.2f} | {mfu:.2f} |",
        flush=True,
      )
  return good


PARTS = {
  "memory": memory,
  "head": head,
  "scaling": scaling,
  "masks": masks,
  "time": time_of,
}


def main() -> int:
  """Prints the parts that were asked for."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--part", default="memory", choices=[*PARTS, "all"])
  parser.add_argument("--config", default=str(ROOT / "configs/countdown.py"))
  parser.add_argument("--only", default="", help="memory rows with it")
  options = parser.parse_args()
  parts = PARTS if options.part == "all" else [options.part]
  good = True
  for part in parts:
    print(f"\n## {part}\n", flush=True)
    good &= PARTS[part](options)
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
