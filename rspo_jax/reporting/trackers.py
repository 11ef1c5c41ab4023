"""Experiment trackers beside metrics.jsonl: Weights & Biases, trackio.

`run.logger=wandb` (or `trackio`, or both with a comma) sends the rows, and to
Weights & Biases the histograms and sample completions too. A tracker is a
guest: whatever goes wrong in it is said once, and the run goes on without it.

Weights & Biases is on line only where an account is at hand (WANDB_API_KEY or
a login) or WANDB_MODE says so; otherwise it writes to the run's folder, from
where `wandb sync` sends it later. trackio keeps its data on this machine.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

PROJECT = "rspo_jax"


class Wandb:
  """A run at Weights & Biases, or on disk for later."""

  def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
    self._wandb = importlib.import_module("wandb")
    mode = os.environ.get("WANDB_MODE") or (
      "online" if self._has_account() else "offline"
    )
    self._run = self._wandb.init(
      project=os.environ.get("WANDB_PROJECT", PROJECT),
      name=folder.name,
      # The same command continues the same run.
      id=identity(folder, config),
      resume="allow",
      dir=str(folder),
      config=dict(config),
      mode=mode,
      settings=self._wandb.Settings(console="off", silent=True),
    )

  @staticmethod
  def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
      return True
    netrc = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
      return "wandb" in netrc.read_text(encoding="utf-8")
    except (OSError, ValueError):
      return False

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """The row of a step."""
    self._run.log(dict(values), step=step)

  def histogram(self, step: int, name: str, values) -> None:
    """A distribution."""
    self._run.log({name: self._wandb.Histogram(values)}, step=step)

  def text(self, step: int, name: str, text: str) -> None:
    """A text as it stands."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    page = self._wandb.Html(f"<pre>{safe}</pre>", inject=False)
    self._run.log({name: page}, step=step)

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


class Trackio:
  """A run of trackio, which keeps numbers alone."""

  def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
    self._trackio = importlib.import_module("trackio")
    self._trackio.init(
      project=os.environ.get("TRACKIO_PROJECT", PROJECT),
      name=f"{folder.name}-{identity(folder, config)}",
      config=dict(config),
      resume="allow",
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """The row of a step."""
    self._trackio.log(dict(values), step=step)

  def close(self) -> None:
    """Ends the run."""
    self._trackio.finish()


TRACKERS = {"wandb": Wandb, "trackio": Trackio}


def names(setting: str) -> list[str]:
  """The trackers that `run.logger` names.

  Raises:
    ValueError: one that is not known or not installed.
  """
  found = [part.strip() for part in setting.split(",") if part.strip()]
  for name in found:
    if name not in TRACKERS:
      raise ValueError(
        f"run.logger={setting!r} is not known; choose from "
        f"{', '.join(TRACKERS)}, both with a comma, or leave it empty."
      )
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"run.logger={setting!r} needs the package {name}: pip install {name}, "
        "or leave it empty."
      )
  return list(dict.fromkeys(found))


def identity(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
  """Twelve hex digits that name a run's folder and config."""
  text = json.dumps([str(folder.absolute()), config], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


class Trackers:
  """All trackers of a run; one that fails is left out from then on."""

  def __init__(
    self,
    wanted: list[str],
    folder: pathlib.Path,
    config: Mapping[str, Any],
    warn: Callable[[str], None],
  ):
    """Opens them.

    Args:
      wanted: keys of `TRACKERS`.
      folder: of the run; exists.
      config: flat, {"group.key": value}, as it should be found again.
      warn: takes one line.
    """
    self._warn = warn
    self._open: dict[str, Any] = {}
    for name in wanted:
      tracker = self._guarded(name, TRACKERS[name], folder, config)
      if tracker is not None:
        self._open[name] = tracker

  def each(self, method: str, *args) -> None:
    """Calls a method of every tracker that has it."""
    for name, tracker in list(self._open.items()):
      if hasattr(tracker, method):
        self._guarded(name, getattr(tracker, method), *args)

  def _guarded(self, name: str, call: Callable, *args) -> Any:
    try:
      return call(*args)
    except Exception as error:  # a guest's fault must not end the run
      self._open.pop(name, None)
      line = " ".join(str(error).split())
      self._warn(f"{name} is left out from here on: {line or repr(error)}")
      return None
