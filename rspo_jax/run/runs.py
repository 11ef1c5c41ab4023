"""A run: what it computes with, its state, its folder and what serves it.

What is done with it are functions of it: a step in step.py, evaluations in
evaluate.py, checkpoints in resume.py, the loop in loop.py.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from rspo_jax.devices import sharding
from rspo_jax.devices.interrupt import Interrupt
from rspo_jax.reporting import metrics
from rspo_jax.run.data import PromptBatch
from rspo_jax.run.program import Program
from rspo_jax.run.settings import Settings
from rspo_jax.run.state import RunState
from rspo_jax.storage import files, mirror


class Interrupted(Exception):
  """A signal came amid an evaluation or a step, which is given up."""


@dataclasses.dataclass
class Run:
  """One run in its folder.

  Attributes:
    program: what it computes with.
    state: what a checkpoint holds.
    home: knows the folder on this machine and the one in a bucket, if that is
      where the run lives.
    writer, interrupt: of this process.
    config: the resolved ConfigDict as a dict.
    eval_prompts: of its evaluations.
    saved_step: step of the newest save, under way or done.
    amid_updates: the state is between that of two steps.
    compiling_s: seconds of first calls, this process's.
  """

  program: Program
  state: RunState
  home: mirror.Home
  writer: metrics.MetricsWriter
  interrupt: Interrupt
  config: dict[str, Any]
  eval_prompts: PromptBatch
  saved_step: int = -1
  amid_updates: bool = False
  compiling_s: float = 0.0

  def __post_init__(self):
    self.program.hook.around = self.first_call
    prompts = self.settings.rollout.prompts
    self.split = sharding.split(self.program.mesh, prompts)

  @property
  def settings(self) -> Settings:
    """What the config says."""
    return self.program.settings

  @property
  def workdir(self) -> pathlib.Path:
    """The folder on this machine."""
    return self.home.local

  @property
  def main_process(self) -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0

  @property
  def policy(self):
    """The policy's parameters, as the jitted functions take them."""
    if self.state.train is None:
      return self.program.reference
    return self.program.policy(self.state.train.params)

  @property
  def reference(self):
    """Parameters of the reference as it stands."""
    own = self.state.train.reference
    return self.program.reference if own is None else self.program.policy(own)

  @contextlib.contextmanager
  def first_call(self, name: str):
    """Shows the first call of a jitted function as compilation."""
    # Nobody can break a compilation off: the last moment to do without.
    self.stop_if_asked()
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.writer.phase(f"compiling {name}"))
      saved = self.state.step in (0, self.saved_step) and not self.amid_updates
      if saved and jax.process_count() == 1:
        stack.enter_context(self.interrupt.expendable())
      start = time.perf_counter()
      yield
      self.compiling_s += time.perf_counter() - start

  def stop_if_asked(self, *_) -> None:
    """Gives an evaluation or a step up; all processes do or none."""
    if not self.amid_updates and self.interrupt.agreed(self.state.step):
      raise Interrupted

  def prompt_text(self, index: int) -> str:
    """Text of an evaluation prompt."""
    return self.program.prompt(self.eval_prompts.examples[index])

  def write_rows(self, path: pathlib.Path, rows) -> None:
    """Completions with verdicts as JSON lines, by the main process."""
    if not self.main_process:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))

  def mirror(self) -> None:
    """Brings a run's folder in a bucket up to date.

    Raises:
      MirrorError: the bucket did not take it; raised by every process, since
        one that went on alone would hang in the next collective.
    """
    if not self.home.in_bucket:
      return
    failure = None
    if self.main_process:
      self.writer.flush()
      try:
        self.home.push()
      except mirror.MirrorError as error:
        failure = error
    if sharding.gather_rows(np.array([failure is not None])).any():
      raise failure or mirror.MirrorError(
        "The first process could not copy the run to its bucket; its message "
        "names the cause."
      )
