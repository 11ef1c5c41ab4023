"""How many completions a second the verifiers judge.

    python benchmarks/verifiers.py
    python benchmarks/verifiers.py --recordings=FOLDER

1. Completions: compact answers of generated Countdown and Sudoku problems, and
   replies in d1's format around right and wrong answers for all four tasks; with
   `--recordings`, the rows of FOLDER/<task>.jsonl, which have `completion` and
   the fields of an example.
2. Every linear verifier judges them on one core, `--repeats` times; the best
   round counts, in processor time, so that a busy machine does not.
3. MATH runs in two worker processes; theirs is added up and halved.
4. A megabyte of garbage of several kinds, the slowest of them, in milliseconds.

One JSON line a task and protocol, with the bar that it is held to.
"""

import argparse
import json
import os
import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BARS = {"countdown": 20_000, "sudoku": 20_000, "gsm8k": 10_000, "math500": 150}
GARBAGE_MS = 50.0
GARBAGE = (
  "(",
  "\\boxed{",
  "<answer>",
  "</answer>",
  "1=2",
  "```",
  "1 ",
  "{}",
  "é",
)
_REPLY = """\
<reasoning>
{prose} So 12 + 30 = 42 and 42 / 6 = 7, then {prose}
</reasoning>
<answer>
{answer}
</answer><|eot_id|><|endoftext|>"""
_LATEX = (
  ("\\frac{1}{2}", "\\frac{2}{4}"),
  ("2\\sqrt{3}", "\\sqrt{12}"),
  ("x^2-1", "(x-1)(x+1)"),
  ("[-2,7]", "[-2, 7)"),
  ("(3,\\frac{\\pi}{2})", "\\left(3, \\frac{\\pi}{3}\\right)"),
  ("5", "x=5"),
  ("\\text{Evelyn}", "Evelyn"),
  ("90^\\circ", "90"),
)


def made_up(task: str, count: int) -> list[tuple[dict, str]]:
  """(example, completion) pairs of a task, about half of them right."""
  import numpy as np

  from rspo_jax.datasets import countdown, sudoku
  from rspo_jax.tasks import TASKS, base
  from rspo_jax.tasks import countdown as countdown_task
  from rspo_jax.tasks import sudoku as sudoku_task

  draw, rng = random.Random(task), np.random.default_rng(0)
  prose = "we look at every number that is left and try it. " * 8
  if task == "countdown":
    examples = base.Examples(
      countdown.generate(0, "train", count).columns(), countdown_task.example_of
    )
  elif task == "sudoku":
    examples = base.Examples(
      sudoku.generate(0, "train", count).columns(), sudoku_task.example_of
    )
  elif task == "gsm8k":
    examples = [
      {"answer_string": str(i), "ground_truth": i} for i in range(count)
    ]
  else:
    examples = [
      {"ground_truth": _LATEX[i % len(_LATEX)][0]} for i in range(count)
    ]
  pairs = []
  for i, example in enumerate(examples):
    right = draw.random() < 0.5
    if task in ("countdown", "sudoku"):
      own = TASKS[task]
      answer = (
        own.demonstration(example) if right else own.corrupt(example, rng)
      )
      if i % 2:
        pairs.append((example, answer))
        continue
    elif task == "gsm8k":
      answer = f"${i:,}.00" if right else f"\\boxed{{{i + 1} apples}}"
    else:
      answer = f"\\boxed{{{_LATEX[i % len(_LATEX)][1]}}}"
    pairs.append((example, _REPLY.format(prose=prose, answer=answer)))
  return pairs


def recorded(folder: str, task: str) -> list[tuple[dict, str]]:
  """(example, completion) pairs of a file of recordings."""
  with open(pathlib.Path(folder) / f"{task}.jsonl", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  return [(row, row["completion"]) for row in rows]


def worker_seconds(pool) -> dict[int, float]:
  """Processor time of each process of a pool so far, from /proc."""
  seconds = {}
  for worker in pool._slots:
    if worker is not None:
      stat = pathlib.Path(f"/proc/{worker.process.pid}/stat").read_text()
      fields = stat.rpartition(")")[2].split()
      ticks = int(fields[11]) + int(fields[12])
      seconds[worker.process.pid] = ticks / os.sysconf("SC_CLK_TCK")
  return seconds


def rate(task, pairs, protocol: str, repeats: int) -> float:
  """Completions a second: of one core, or of two workers.

  nan where a worker was replaced in every round, so that none can be counted.
  """
  from rspo_jax.tasks import math500

  pool = None
  if task.name == "math500" and protocol == "strict":
    pool = math500._pool()
    pool.start()
    task.judge(pairs[:50], protocol)
  best = float("nan")
  for _ in range(repeats):
    before = worker_seconds(pool) if pool else {}
    start = time.process_time()
    task.judge(pairs, protocol)
    spent = time.process_time() - start
    if pool:
      after = worker_seconds(pool)
      if after.keys() != before.keys():
        continue
      spent = (spent + sum(after.values()) - sum(before.values())) / 2
    best = max(len(pairs) / spent, best if best == best else 0.0)
  return best


def slowest_garbage_ms(task, example: dict, protocol: str) -> float:
  """Milliseconds of processor time of the slowest megabyte."""
  slowest = 0.0
  for unit in GARBAGE:
    text = unit * (1_000_000 // len(unit))
    for garbage in (text, f"<answer>{text}</answer>"):
      best = float("inf")
      for _ in range(3):
        start = time.process_time()
        task.verify(example, garbage, protocol)
        best = min(best, time.process_time() - start)
      slowest = max(slowest, best)
  return 1e3 * slowest


def main() -> int:
  """Prints the lines; the exit status says whether every bar is met."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--recordings", default="", help="folder of <task>.jsonl")
  parser.add_argument("--completions", type=int, default=1000)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()

  from rspo_jax.tasks import TASKS, base

  missed = 0
  for name, task in TASKS.items():
    if options.recordings:
      pairs = recorded(options.recordings, name)
    else:
      pairs = made_up(name, options.completions)
    for protocol in base.PROTOCOLS:
      found = rate(task, pairs, protocol, options.repeats)
      garbage = slowest_garbage_ms(task, pairs[0][0], protocol)
      missed += not found >= BARS[name] or garbage > GARBAGE_MS
      line = {
        "task": name,
        "protocol": protocol,
        "completions": len(pairs),
        "per_s": round(found) if found == found else None,
        "bar_per_s": BARS[name],
        "garbage_ms": round(garbage, 2),
        "bar_garbage_ms": GARBAGE_MS,
      }
      print(json.dumps(line), flush=True)
  return int(missed > 0)


if __name__ == "__main__":
  sys.exit(main())
