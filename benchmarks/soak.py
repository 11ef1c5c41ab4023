"""Long runs: does anything grow, and what does saving cost?

    python benchmarks/soak.py

`soak`: `--steps` steps of a tiny run (tests/tiny_runs.py) in one process, with
evaluations, samples, TensorBoard and checkpoints at short intervals. Memory,
open files, threads and compiled programs are read at every step; growth is the
mean memory of the last tenth against that of the tenth after warm-up.

`saving`: the loop of configs/countdown.py with a save every few steps. A save
costs what the loop waits for it, and what the steps beside which it is written
take longer than the others; divided by `run.checkpoint_every` steps. Then the
checkpoint is restored, again and again.

One JSON line a part; status 1 if memory grows by more than 3 %, open files or
compiled programs at all, threads with every save, if saving costs more than 5 %
or restoring takes more than 5 s.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
for path in (ROOT, ROOT / "tests"):
  if str(path) not in sys.path:
    sys.path.insert(0, str(path))

import tiny_runs  # noqa: E402

PARTS = ("soak", "saving")
WARM_UP = 0.1  # share of the steps
SAVE_EVERY = 50
GROWTH, SAVING, RESTORE_S = 0.03, 0.05, 5.0


def now(program) -> dict[str, int]:
  """What this process holds."""
  with open("/proc/self/statm") as file:
    pages = int(file.read().split()[1])
  return {
    "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    "files": len(os.listdir("/proc/self/fd")),
    "threads": len(os.listdir("/proc/self/task")),
    "programs": sum(program.compilations().values()),
  }


def soak(folder: pathlib.Path, steps: int) -> tuple[dict, bool]:
  """Runs a tiny run for long; returns what came of it, and whether it is well.

  The save under way at a step may hold files and threads of its own: the least
  of a stretch is what stays.
  """
  from rspo_jax import main
  from rspo_jax.run import step as step_lib

  tiny_runs.save_checkpoint(folder / "checkpoint")
  tiny_runs.save_puzzles(folder / "puzzles.jsonl")
  argv = tiny_runs.command(
    folder / "run",
    folder / "checkpoint",
    folder / "puzzles.jsonl",
    "",
    run__steps=steps,
    run__checkpoint_every=SAVE_EVERY,
    run__samples_every=100,
    run__tensorboard=True,
    run__collapse_window=0,
    eval__every=100,
    optimizer__learning_rate=1e-4,
  )
  seen = []
  original = step_lib.train

  def watched(run, batches):
    values = original(run, batches)
    seen.append(now(run.program))
    return values

  step_lib.train = watched
  begun = time.monotonic()
  try:
    status = main.main(argv)
  finally:
    step_lib.train = original
  took_s = time.monotonic() - begun
  tenth = max(1, int(WARM_UP * steps))
  early, late = seen[tenth : 2 * tenth], seen[-tenth:]
  mean = {
    name: statistics.fmean(each["bytes"] for each in part)
    for name, part in (("early", early), ("late", late))
  }
  growth = mean["late"] / mean["early"] - 1
  least = {
    key: [min(each[key] for each in part) for part in (early, late)]
    for key in ("files", "threads", "programs")
  }
  result = {
    "steps": len(seen),
    "status": status,
    "took_s": round(took_s),
    "mb": [round(value / 1e6, 1) for value in mean.values()],
    "growth": round(growth, 4),
    **least,
  }
  well = status == 0 and growth <= GROWTH
  for key in ("files", "programs"):
    well &= least[key][1] <= least[key][0]
  # Pools fill up by and by; a leak would leave a thread at every save.
  saves = (steps - 2 * tenth) // SAVE_EVERY
  return result, well and least["threads"][1] - least["threads"][0] < saves


def saving(folder: pathlib.Path, steps: int) -> tuple[dict, bool]:
  """Measures saves and restores of the main job."""
  import jax

  from configs import base
  from rspo_jax import main
  from rspo_jax.config import load
  from rspo_jax.run import program as program_lib
  from rspo_jax.run import settings
  from rspo_jax.storage.checkpoint import Checkpointer

  every = 8
  argv = [
    "rspo_jax",
    f"--config={ROOT}/configs/countdown.py",
    f"--workdir={folder / 'saving'}",
    f"--config.run.steps={steps}",
    f"--config.run.checkpoint_every={every}",
    "--config.run.export=false",
    "--config.eval.prompts=64",
    "--config.eval.batch=64",
  ]
  waited_s, original = [], Checkpointer.save

  def timed(*args, **options):
    begun = time.perf_counter()
    original(*args, **options)
    waited_s.append(time.perf_counter() - begun)

  Checkpointer.save = timed
  try:
    status = main.main(argv)
  finally:
    Checkpointer.save = original
  step_s = {
    row["step"]: row["time/step_s"]
    for row in tiny_runs.rows(folder / "saving")
    if row["step"] > 2  # those before compile
  }
  beside = [s for step, s in step_s.items() if step % every == 1]
  alone = [s for step, s in step_s.items() if step % every != 1]
  usual_s = statistics.median(alone)
  # The first save makes folders and threads.
  one_s = statistics.median(waited_s[1:-1])
  one_s += max(0.0, statistics.median(beside) - usual_s)
  interval = base.get_config().run.checkpoint_every
  share = one_s / (interval * usual_s)
  program = program_lib.build(settings.build(load.parse(argv)[0], 1))
  restore_s = []
  for _ in range(5):
    begun = time.perf_counter()
    with Checkpointer(folder / "saving" / "checkpoints") as checkpointer:
      jax.block_until_ready(checkpointer.restore(program.state_template).state)
    restore_s.append(time.perf_counter() - begun)
  result = {
    "status": status,
    "saves": len(waited_s),
    "step_s": round(usual_s, 3),
    "save_s": round(one_s, 3),
    "share_at_default_interval": round(share, 4),
    "restore_s": round(max(restore_s), 3),
  }
  well = status == 0 and share <= SAVING and max(restore_s) <= RESTORE_S
  return result, well


def main() -> int:
  """Prints one JSON line a part; returns 1 if something is not as it should."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--parts", default=",".join(PARTS))
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--saving_steps", type=int, default=48)
  options = parser.parse_args()
  unknown = set(options.parts.split(",")) - set(PARTS)
  if unknown:
    parser.error(f"--parts: {unknown.pop()!r} is none of {', '.join(PARTS)}.")
  failed = False
  with tempfile.TemporaryDirectory() as folder:
    for part in options.parts.split(","):
      run, steps = {
        "soak": (soak, options.steps),
        "saving": (saving, options.saving_steps),
      }[part]
      result, well = run(pathlib.Path(folder), steps)
      failed |= not well
      print(json.dumps({"part": part} | result), flush=True)
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
