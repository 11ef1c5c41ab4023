"""Runs small enough for a test: a tiny checkpoint, its puzzles, a command.

The model has random weights. On sudoku even those earn unequal rewards (some
cells are right by luck), so that every step has a gradient.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import time

import numpy as np

from rspo_jax.datasets import sudoku

SHAPE = {
  "width": 16,
  "layers": 2,
  "heads": 2,
  "kv_heads": 2,
  "mlp_width": 32,
  "rope_theta": 10000.0,
  "norm_eps": 1e-5,
  "max_length": 64,
  "vocabulary": "0 1 2 3 4",
  "pattern": ".",
}

# 32 sequences a step in two micro-batches, two passes; 8 devices divide it.
SMALL = {
  "rollout.prompts": 8,
  "rollout.group_size": 4,
  "train.micro_batch": 16,
  "sampler.steps": 4,
  "eval.prompts": 12,
  "eval.batch": 8,
  "eval.every": 2,
  "run.steps": 5,
  "run.checkpoint_every": 2,
  "run.keep_checkpoints": 3,
  "run.samples_every": 1,
  "run.tensorboard": False,
  "optimizer.learning_rate": 4e-3,
  # Adam divides a gradient by its own size: where that is rounding error, other
  # devices would step the other way.
  "optimizer.eps": 1e-4,
}

SUPERVISED = {
  "objective.name": "sft",
  "objective.lambda_": 0.0,
  "rollout.prompts": 32,
  "rollout.group_size": 1,
  "likelihood.scheme": "uniform",
  "likelihood.masks": 1,
}


_PROGRAMS: list = []


@contextlib.contextmanager
def quick():
  """Compiles fast, and once for all runs with the same settings."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  from rspo_jax import program as program_lib

  build = program_lib.build
  before = jax.config.read("jax_disable_most_optimizations")

  def shared_build(settings):
    # What `run` and this switch say is no part of any program.
    key = dataclasses.replace(
      settings,
      run=None,
      skip_equal_groups=None,
      optimizer=dataclasses.replace(
        settings.optimizer,
        total_steps=settings.optimizer.total_steps
        if settings.optimizer.schedule != "constant"
        else 1,
      ),
    )
    for known, program in _PROGRAMS:
      if known == key:
        return dataclasses.replace(program, settings=settings)
    _PROGRAMS.append((key, build(settings)))
    return _PROGRAMS[-1][1]

  jax.config.update("jax_disable_most_optimizations", True)
  program_lib.build = shared_build
  try:
    yield
  finally:
    program_lib.build = build
    jax.config.update("jax_disable_most_optimizations", before)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def lenient(judge):
  """A judge to whom a right cell is enough: the model solves no puzzle."""

  def judging(self, examples, texts):
    judged = judge(self, examples, texts)
    verdicts = [
      dataclasses.replace(verdict, correct=verdict.reward > 0)
      for verdict in judged.verdicts
    ]
    return dataclasses.replace(judged, verdicts=verdicts)

  return judging


def save_checkpoint(folder: pathlib.Path) -> None:
  """Saves the tiny model as a checkpoint.

  Its logits are spread as a trained model's: where all positions are about
  equally sure, which is filled first is a matter of rounding, and runs on
  other numbers of devices part.
  """
  import jax

  from rspo_jax.models import fresh, hf_weights

  model = fresh.new_model(SHAPE, jax.random.key(5))
  head = jax.tree.map(lambda x: 10 * x, model.params["head"])
  model = dataclasses.replace(model, params=model.params | {"head": head})
  hf_weights.save_model(model, folder)


def save_puzzles(path: pathlib.Path, count: int = 400) -> None:
  """Writes puzzles with their solutions as JSON lines."""
  columns = sudoku.generate(0, "train", count).columns()
  with open(path, "w") as file:
    for puzzle, solution in zip(
      np.asarray(columns["puzzle"]), columns["solution"], strict=True
    ):
      row = {"puzzle": text(puzzle), "solution": text(solution)}
      file.write(json.dumps(row) + "\n")


def text(value) -> str:
  """A text column's entry as str."""
  return value.decode() if isinstance(value, bytes) else str(value)


def command(workdir, checkpoint, puzzles, cache, **overrides) -> list[str]:
  """argv of a run; keys of `overrides` as in a config, `__` for the dot."""
  values = SMALL | {
    "model.path": str(checkpoint),
    "data.source": str(puzzles),
    "run.compilation_cache": str(cache),
  }
  values |= {key.replace("__", "."): v for key, v in overrides.items()}
  root = pathlib.Path(__file__).resolve().parent.parent
  return [
    "rspo_jax",
    f"--config={root}/configs/sudoku.py",
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in values.items()),
  ]


def program_of(argv: list[str]):
  """The program that a command builds; inside `quick`, the shared one."""
  from rspo_jax import main, settings
  from rspo_jax import program as program_lib

  return program_lib.build(settings.build(main.parse(argv)[0], 1))


def rows(folder: pathlib.Path) -> list[dict]:
  """Rows of a run's metrics.jsonl."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def repeatable(folder: pathlib.Path) -> list[dict]:
  """Rows without what depends on the clock."""
  return [
    {
      key: value
      for key, value in row.items()
      if not (key.startswith("time/") or key.endswith("_per_s"))
    }
    for row in rows(folder)
  ]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  """Content of every file of a folder by its path inside."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


# More devices can need a second pass, whose scores are a cost.
COSTS = ("compute/score", "compute/forward_equivalents", "compute/cumulative")


def assert_agrees(folder, whole, steps=3):
  """The first steps agree within 1e-5, their samples exactly."""
  import pytest

  pairs = zip(
    repeatable(folder)[: steps + 1],
    repeatable(whole)[: steps + 1],
    strict=True,
  )
  for one, other in pairs:
    assert one.keys() == other.keys()
    for key, value in one.items():
      if key in COSTS:
        continue
      # Gap losses and what is made of d are differences of scores of order
      # 1: their error is absolute.
      assert value == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
  names = [p.name for p in (whole / "samples").iterdir()]
  for name in names:
    if int(name.split(".")[0].split("-")[1]) <= steps:
      one, other = folder / "samples" / name, whole / "samples" / name
      if name.startswith("calibration"):
        _assert_close(one, other)
      else:
        assert _texts(one) == _texts(other), name


def _texts(path):
  """Rows of samples without the order in which a text came about.

  Two positions may be equally sure: which is first is then a matter of
  rounding, and the text the same.
  """
  rows = [json.loads(line) for line in path.open()]
  return [{k: v for k, v in r.items() if k != "commit_step"} for r in rows]


def _assert_close(one, other):
  """Rows of numbers agree as metrics do."""
  import pytest

  pairs = zip(one.open(), other.open(), strict=True)
  for first, second in pairs:
    second = json.loads(second)
    # Targets are A / lambda, estimates differences of scores of order 1.
    assert json.loads(first) == pytest.approx(second, rel=1e-5, abs=1e-5)


def free_port() -> int:
  """A port that nothing listens on.

  Below those that systems give to outgoing connections, of which one could
  take it before it is used.
  """
  while True:
    port = random.randrange(15_000, 30_000)
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(("localhost", port))
      return port


# What disturbs a run, and whether it shows.


class CrashError(Exception):
  """What ends a run without any of its own doing."""


def disturb(monkeypatch, method, step, action):
  """Does `action(run)` once, before a method is called at a step."""
  from rspo_jax.runs import Run

  original, left = getattr(Run, method), [action]

  def wrapped(run, *args):
    if run.step == step and left:
      left.pop()(run)
    return original(run, *args)

  monkeypatch.setattr(Run, method, wrapped)


def noted(monkeypatch, **methods):
  """Notes calls in their order: {name: (class, method)} -> list of names."""
  events = []

  def patched(name, owner, method):
    original = getattr(owner, method)

    def wrapped(self, *args):
      events.append(name)
      return original(self, *args)

    monkeypatch.setattr(owner, method, wrapped)

  for name, (owner, method) in methods.items():
    patched(name, owner, method)
  return events


def ask_to_stop(run):
  """SIGTERM, as a scheduler sends it."""
  os.kill(os.getpid(), signal.SIGTERM)
  while not run.interrupt.requested:
    time.sleep(1e-3)


def crash(run):
  """The end of the process, as far as the run can tell."""
  raise CrashError(run.step)


def newest(folder, program):
  """The newest checkpoint of a run."""
  from rspo_jax.checkpoint import Checkpointer

  with Checkpointer(folder / "checkpoints") as checkpointer:
    return checkpointer.restore(program.state_template)


def assert_same_run(folder, whole, program):
  """Two runs left the same metrics, samples, parameters and moments."""
  assert repeatable(folder) == repeatable(whole)
  for name in ("samples", "model"):
    one, other = files(folder / name), files(whole / name)
    assert one == other
  import jax

  one, other = newest(folder, program), newest(whole, program)
  assert one.step == other.step == rows(whole)[-1]["step"]
  jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def environment(**extra):
  """Environment of a process that computes as the tests do."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    **extra,
  }
