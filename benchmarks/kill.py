"""Kills runs at random moments and looks for a difference afterwards.

    python benchmarks/kill.py

| part | what is done to a tiny run | what must hold |
|---|---|---|
| kills | SIGKILL at `--kills` random moments | same metrics, samples, state |
| pairs | the same with two processes, one of them killed | the same |
| shard | a bit flips in a shard of a checkpoint of two processes | the same |
| devices | goes on with 8, 4, 2, 1 devices where others stopped | 1e-5, 3 steps |
| signals | SIGTERM amid each phase | status 75 within 10 s, then the same |

Half of the moments are uniform in the life of a process, half follow the first
step it shows, where saves are always under way. A run that gets to its end is
compared, and another one is begun. One JSON line a part; status 1 if anything
differs. `--parts=kills --kills=2` is what the tests do.
"""

import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
for path in (ROOT, TESTS):
  if str(path) not in sys.path:
    sys.path.insert(0, str(path))

import tiny_runs  # noqa: E402

PARTS = ("kills", "pairs", "shard", "devices", "signals")
PHASES = (
  "compiling",
  "rollout",
  "reward",
  "scores",
  "update",
  "save",
  "evaluation",
)
LIMIT_S = 10.0  # from SIGTERM to the end
TOLERANCE = 1e-5
# A run with a save in flight at nearly every moment.
STEPS = 8
OVERRIDES = {
  "run__steps": STEPS,
  "run__checkpoint_every": 1,
  "run__keep_checkpoints": 20,
}

# Says which phase it is in.
ANNOUNCING = """
import sys
from rspo_jax import main
from rspo_jax.run import program
from rspo_jax.run.compiled import Compiled
from rspo_jax.storage import checkpoint
def announce(owner, method, phase):
  original = getattr(owner, method)
  def wrapped(self, *args, **options):
    name = phase(self, args)
    if name:
      print("phase", name, flush=True)
    return original(self, *args, **options)
  setattr(owner, method, wrapped)
def of_call(compiled, args):
  evaluates = "evaluation" in compiled.name
  if not compiled.called:
    return None if evaluates else "compiling"
  return "evaluation" if evaluates else compiled.name
announce(Compiled, "__call__", of_call)
announce(program.Program, "judge", lambda self, args: "reward")
announce(checkpoint.Checkpointer, "save", lambda self, args: "save")
sys.exit(main.main())
"""


def start(argv, code=None, **environment) -> subprocess.Popen:
  """Starts a process of a run."""
  what = ["-c", code] if code else ["-m", "rspo_jax.main"]
  return subprocess.Popen(
    [sys.executable, *what, *argv[1:]],
    cwd=ROOT,
    env=tiny_runs.environment(**environment),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


class Setting:
  """The tiny model and its puzzles in a folder, and how to run them."""

  def __init__(self, folder: pathlib.Path):
    """Makes model and puzzles."""
    self.folder = folder
    with tiny_runs.quick():
      tiny_runs.save_checkpoint(folder / "checkpoint")
    tiny_runs.save_puzzles(folder / "puzzles.jsonl")

  def argv(self, name: str, **overrides) -> list[str]:
    """The command of a run; one device and one process share compilations."""
    return tiny_runs.command(
      self.folder / name,
      self.folder / "checkpoint",
      self.folder / "puzzles.jsonl",
      **{"cache": self.folder / "compiled"} | OVERRIDES | overrides,
    )


def start_pair(argv) -> list[subprocess.Popen]:
  """Starts a run of two processes."""
  port = tiny_runs.free_port()
  return [
    start(
      argv,
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]


def finish(process: subprocess.Popen) -> None:
  """Waits for a run that must arrive."""
  out, _ = process.communicate()
  if process.returncode:
    raise SystemExit(f"A run ended with {process.returncode}:\n{out}")


def difference(folder, whole, program) -> str:
  """What two runs do not have in common; empty if they are the same."""
  try:
    tiny_runs.assert_same_run(folder, whole, program)
  except AssertionError as error:
    return f"{folder.name}: {' '.join(str(error).split())[:300]}"
  return ""


class Killer:
  """Kills a process at a random moment of its life."""

  def __init__(self, rng: random.Random, life_s: float):
    self.rng = rng
    self.life_s = life_s

  def __call__(self, processes: list[subprocess.Popen]) -> bool:
    """Kills one of the processes; False if all had arrived before."""
    victim = self.rng.choice(processes)
    reader = threading.Thread(
      target=self._drain, args=(processes[0],), daemon=True
    )
    self._stepping = threading.Event()
    reader.start()
    if self.rng.random() < 0.5:
      delay_s = self.rng.uniform(0, self.life_s)
    else:
      self._stepping.wait(timeout=10 * self.life_s)
      delay_s = self.rng.uniform(0, 0.3 * self.life_s)
    try:
      victim.wait(timeout=delay_s)
    except subprocess.TimeoutExpired:
      victim.kill()
    victim.wait()
    reader.join(timeout=0 if len(processes) > 1 else None)
    return victim.returncode == -9

  def _drain(self, process):
    for line in process.stdout:
      if line.startswith(("step ", "Going on")):
        self._stepping.set()
    self._stepping.set()


def uninterrupted(setting: Setting, name: str, begin) -> float:
  """Makes the run to compare with, twice; returns how long one takes warm."""
  finish_all(begin(setting.argv(name)))
  begun = time.monotonic()
  finish_all(begin(setting.argv(f"{name}-again")))
  return time.monotonic() - begun


def finish_all(processes: list[subprocess.Popen]) -> None:
  """Waits for all processes of a run."""
  readers = [
    threading.Thread(target=process.communicate) for process in processes[1:]
  ]
  for reader in readers:
    reader.start()
  finish(processes[0])
  for reader in readers:
    reader.join()


def kill_runs(begin, folder, whole, program, count: int, killer) -> dict:
  """Kills runs until there were `count` kills, and lets them arrive.

  Args:
    begin: name of a run -> its processes, started.
    folder: where the runs are.
    whole: folder of the run that nothing disturbed.
    program: what its checkpoints belong to.
    count: of kills.
    killer: a `Killer`.

  Returns:
    "kills", "runs", "different": one line for each run that is not `whole`,
    and how long the partners of killed processes stayed.
  """
  done, runs, survivors_s, different = 0, 0, [], []
  while done < count:
    name = f"{whole.name}-killed-{runs}"
    arrived = False
    while not arrived and done < count:
      processes = begin(name)
      if killer(processes):
        done += 1
        for other in processes:
          survivors_s += _end_of(other) if other.returncode is None else []
      else:
        arrived = all(p.wait(timeout=600) == 0 for p in processes)
        if not arrived:
          raise SystemExit(f"Run {name} ended by itself, not with 0.")
    if not arrived:
      finish_all(begin(name))
    runs += 1
    found = difference(folder / name, whole, program)
    different += [found] if found else []
  result = {"kills": done, "runs": runs, "different": different}
  if survivors_s:
    result["survivors_ended_after_s"] = [round(s, 1) for s in survivors_s]
  return result


def kills(setting: Setting, count: int, seed: int, pair: bool = False) -> dict:
  """`kill_runs` of one process, or of two of which one is killed."""
  program = tiny_runs.program_of(setting.argv("unused"))
  name = "pair" if pair else "whole"

  def begin(argv):
    return start_pair(argv) if pair else [start(argv)]

  life_s = uninterrupted(setting, name, begin)
  return kill_runs(
    lambda name: begin(setting.argv(name)),
    setting.folder,
    setting.folder / name,
    program,
    count,
    Killer(random.Random(seed), life_s),
  )


def _end_of(process: subprocess.Popen, patience_s: float = 30.0) -> list[float]:
  """Seconds until a process without its partner ends; else ends it."""
  begun = time.monotonic()
  try:
    process.wait(timeout=patience_s)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  return [time.monotonic() - begun]


def rewind(source, target, step: int) -> None:
  """Copies a finished run as it was after the checkpoint of a step."""
  shutil.copytree(source, target)
  (target / "summary.json").unlink()
  for path in (target / "checkpoints").iterdir():
    if int(path.name.removeprefix("step_").split(".")[0]) > step:
      shutil.rmtree(path)


def shard(setting: Setting) -> dict:
  """Flips a bit in a shard that the second of two processes wrote."""
  program = tiny_runs.program_of(setting.argv("unused"))
  whole = setting.folder / "pair"
  if not whole.exists():
    uninterrupted(setting, "pair", start_pair)
  different = []
  folder = setting.folder / "pair-damaged"
  rewind(whole, folder, 5)
  newest = folder / "checkpoints" / "step_00000005"
  path = max(
    newest.glob("state/ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size
  )
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  first, second = start_pair(setting.argv(folder.name))
  drained = threading.Thread(target=second.communicate)
  drained.start()
  out, _ = first.communicate()
  drained.join()
  if f"{newest} is damaged" not in out or first.returncode:
    different.append(f"status {first.returncode}: {out[-300:]}")
  else:
    found = difference(folder, whole, program)
    different += [found] if found else []
  return {"damaged": str(path.relative_to(folder)), "different": different}


def devices(setting: Setting) -> dict:
  """Goes on with other numbers of devices than a run had before.

  With a trained model: under random weights nearly every choice of a token is
  a near-tie, which the rounding of another reduction order decides otherwise.
  """

  def begin(count, name):
    flags = f"--xla_force_host_platform_device_count={count}"
    argv = setting.argv(
      name,
      cache=setting.folder / f"compiled-{count}",
      model__path="embedded:sudoku",
    )
    return start(argv, XLA_FLAGS=flags)

  for count in (8, 1):
    finish(begin(count, f"devices-{count}"))
  worst, resumes, different = 0.0, [], []
  for before, after, step in (
    (8, 4, 2),
    (8, 1, 3),
    (8, 2, 4),
    (8, 4, 5),
    (1, 8, 2),
    (1, 4, 3),
    (1, 2, 5),
  ):
    whole = setting.folder / f"devices-{before}"
    folder = setting.folder / f"devices-{before}-{after}-{step}"
    rewind(whole, folder, step)
    finish(begin(after, folder.name))
    rows = zip(
      tiny_runs.rows(folder)[step + 1 : step + 4],
      tiny_runs.rows(whole)[step + 1 : step + 4],
      strict=True,
    )
    # A gap loss is a difference of scores of order 1.
    error = max(
      abs(one["loss"] - other["loss"]) / max(1.0, abs(other["loss"]))
      for one, other in rows
    )
    worst = max(worst, error)
    name = f"{before} to {after} after step {step}"
    resumes.append([name, error])
    if error > TOLERANCE:
      different.append(f"{name}: losses differ by {error:.1e}")
    prompts = [
      _prompts(run / "samples" / f"train-{number:06d}.jsonl")
      for run in (folder, whole)
      for number in range(step + 1, step + 4)
    ]
    if prompts[:3] != prompts[3:]:
      different.append(f"{name}: other prompts")
  return {"resumes": resumes, "worst": worst, "different": different}


def _prompts(path) -> list[str]:
  """Prompts of a file of samples, in order."""
  return [json.loads(line)["prompt"] for line in path.open()]


def signals(setting: Setting) -> dict:
  """Sends SIGTERM amid each phase and waits for the end."""
  program = tiny_runs.program_of(setting.argv("unused"))
  whole = setting.folder / "whole"
  if not whole.exists():
    finish(start(setting.argv("whole")))
  seconds, different = {}, []
  for phase in PHASES:
    folder = setting.folder / f"signal-{phase}"
    # Compilations from scratch, as on a new machine.
    argv = setting.argv(folder.name, cache="")
    process = start(argv, code=ANNOUNCING)
    sent = 0.0
    lines = []
    for line in process.stdout:
      lines.append(line)
      if line == f"phase {phase}\n" and not sent:
        time.sleep(0.01)
        process.terminate()
        sent = time.monotonic()
    process.wait()
    seconds[phase] = round(time.monotonic() - sent, 2) if sent else None
    if process.returncode != 75 or not sent or seconds[phase] > LIMIT_S:
      different.append(
        f"{phase}: status {process.returncode}, {seconds[phase]} s: "
        + "".join(lines)[-300:]
      )
      continue
    finish(start(setting.argv(folder.name)))
    found = difference(folder, whole, program)
    different += [found] if found else []
  return {"seconds": seconds, "different": different}


def main() -> int:
  """Prints one JSON line a part; returns 1 if anything differs."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--parts", default=",".join(PARTS))
  parser.add_argument("--kills", type=int, default=24)
  parser.add_argument("--pairs", type=int, default=8)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  unknown = set(options.parts.split(",")) - set(PARTS)
  if unknown:
    parser.error(f"--parts: {unknown.pop()!r} is none of {', '.join(PARTS)}.")
  failed = False
  with tempfile.TemporaryDirectory() as folder:
    setting = Setting(pathlib.Path(folder))
    for part in options.parts.split(","):
      begun = time.monotonic()
      result = {
        "kills": lambda: kills(setting, options.kills, options.seed),
        "pairs": lambda: kills(setting, options.pairs, options.seed, True),
        "shard": lambda: shard(setting),
        "devices": lambda: devices(setting),
        "signals": lambda: signals(setting),
      }[part]()
      result["took_s"] = round(time.monotonic() - begun)
      failed |= bool(result["different"])
      print(json.dumps({"part": part} | result), flush=True)
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
