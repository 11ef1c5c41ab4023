"""Trackers are guests: they get the rows, and cannot end the run."""

import io
import sys
import types

import numpy as np
import pytest

from rspo_jax.reporting import trackers
from rspo_jax.reporting.metrics import MetricsWriter

CONFIG = {"run.seed": 0, "objective.lambda_": 3.0}


class Log(list):
  """What a stand-in for a tracker's package was asked."""

  def module(self, **more):
    found = types.ModuleType("stand_in")
    found.__spec__ = types.SimpleNamespace(name="stand_in")
    found.init = lambda **options: self.append(("init", options)) or found
    found.log = lambda values, step: self.append(("log", step, values))
    found.finish = lambda: self.append(("finish",))
    found.Histogram = lambda values: ("histogram", len(values))
    found.Html = lambda text, inject: text
    found.Settings = lambda **options: options
    for name, value in more.items():
      setattr(found, name, value)
    return found


@pytest.fixture
def log(monkeypatch, tmp_path):
  found = Log()
  for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("NETRC", str(tmp_path / "none"))
  for name in trackers.TRACKERS:
    monkeypatch.setitem(sys.modules, name, found.module())
  return found


def run(folder, wanted, warn):
  """A run of three rows with a histogram and a text."""
  with MetricsWriter(folder, 3, False, stream=io.StringIO()) as writer:
    writer.attach(trackers.Trackers(wanted, folder, CONFIG, warn))
    for step in range(3):
      writer.histogram(step, "gap", np.array([0.0, 1.0, np.nan]))
      writer.text(step, "samples", "1<2")
      writer.write(step, {"loss": step / 2})


def test_rows_histograms_and_texts_reach_wandb_in_order(tmp_path, log):
  run(tmp_path, ["wandb"], pytest.fail)
  (_, options), *calls, last = log
  assert options["mode"] == "offline"  # no account at hand
  assert options["config"] == CONFIG and options["dir"] == str(tmp_path)
  assert calls == [
    ("log", step, values)
    for step in range(3)
    for values in (
      {"gap": ("histogram", 2)},
      {"samples": "<pre>1&lt;2</pre>"},
      {"loss": step / 2},
    )
  ]
  assert last == ("finish",)


def test_trackio_gets_numbers(tmp_path, log):
  run(tmp_path, ["trackio"], pytest.fail)
  assert [call for call in log if call[0] == "log"] == [
    ("log", step, {"loss": step / 2}) for step in range(3)
  ]


@pytest.mark.parametrize(
  ("environment", "mode"),
  [
    ({}, "offline"),
    ({"WANDB_API_KEY": "x"}, "online"),
    ({"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, "disabled"),
  ],
)
def test_wandb_is_on_line_only_with_an_account(
  tmp_path, log, monkeypatch, environment, mode
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  trackers.Trackers(["wandb"], tmp_path, CONFIG, pytest.fail)
  assert log[0][1]["mode"] == mode


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_left_out(
  tmp_path, log, monkeypatch, method
):
  def fail(*_, **__):
    raise ConnectionError("no\nroute")

  monkeypatch.setitem(sys.modules, "wandb", log.module(**{method: fail}))
  said = []
  run(tmp_path, ["wandb", "trackio"], said.append)
  assert said == ["wandb is left out from here on: no route"]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
  assert ("finish",) in log  # the other one was not disturbed


def test_the_same_command_is_the_same_run_elsewhere_another(tmp_path):
  one = trackers.identity(tmp_path, CONFIG)
  assert one == trackers.identity(tmp_path, dict(reversed(CONFIG.items())))
  assert one != trackers.identity(tmp_path / "other", CONFIG)
  assert one != trackers.identity(tmp_path, CONFIG | {"run.seed": 1})


def test_a_tracker_that_is_not_known_or_installed_is_refused(monkeypatch):
  assert trackers.names("") == []
  with pytest.raises(ValueError, match="choose from wandb, trackio"):
    trackers.names("wandbb")
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ValueError, match="pip install wandb"):
    trackers.names("wandb")
