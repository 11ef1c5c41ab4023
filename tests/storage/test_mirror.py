"""Runs in a bucket: nothing of them needs the machine that they began on."""

import functools
import os
import signal
import sys
import time

import jax
import numpy as np
import pytest
import tiny_runs

import rspo_jax
from rspo_jax import main
from rspo_jax.config import identity, load
from rspo_jax.run import state
from rspo_jax.run import step as step_lib
from rspo_jax.storage import mirror
from rspo_jax.storage.checkpoint import Checkpointer

pytestmark = pytest.mark.usefixtures("quick_runs")

STEPS = tiny_runs.SMALL["run.steps"]


def home_of(address, folder, monkeypatch):
  """The home of a run as it is seen from a machine's folder."""
  folder.mkdir(exist_ok=True)
  monkeypatch.chdir(folder)
  home = mirror.Home(address)
  assert not home.local.exists()
  return home


# Files.


def test_a_push_brings_what_changed_and_a_pull_gives_it_back(
  bucket, tmp_path, monkeypatch
):
  home = home_of("gs://bucket/files/run", tmp_path / "one", monkeypatch)
  assert home.pull() == 0
  for name, text in (("metrics.jsonl", "1\n"), ("samples/a.jsonl", "a")):
    (home.local / name).parent.mkdir(parents=True, exist_ok=True)
    (home.local / name).write_text(text)
  assert home.push() == 2
  assert home.push() == 0
  with (home.local / "metrics.jsonl").open("a") as file:
    file.write("2\n")
  assert home.push() == 1
  there = bucket.files("bucket/files/run")
  assert there == {"metrics.jsonl": b"1\n2\n", "samples/a.jsonl": b"a"}
  # Arrays and models are written to the bucket itself.
  for name in ("checkpoints/step_1/x", "model/config.json"):
    (home.address / name).write_text("large")

  other = home_of("gs://bucket/files/run", tmp_path / "two", monkeypatch)
  assert other.pull() == 2
  assert tiny_runs.files(other.local) == there
  assert other.push() == 0


def test_leftovers_of_a_machine_do_not_replace_what_the_bucket_has(
  bucket, tmp_path, monkeypatch
):
  address = "gs://bucket/leftovers/run"
  home = home_of(address, tmp_path / "one", monkeypatch)
  (home.address / "metrics.jsonl").write_text("of another machine\n")
  home.local.mkdir(parents=True)
  (home.local / "metrics.jsonl").write_text("old\n")
  (home.local / "eval").mkdir()
  (home.local / "eval" / "test.jsonl").write_text("an evaluation")
  assert home.push() == 0
  assert home.push("eval") == 1
  assert home.pull() == 2
  assert (home.local / "metrics.jsonl").read_text() == "of another machine\n"


def test_a_local_folder_is_left_as_it_is(tmp_path):
  home = mirror.Home(str(tmp_path / "run"))
  assert home.address == home.local == tmp_path / "run"
  assert home.pull() == home.push() == 0
  assert not home.local.exists()


def test_a_bucket_without_its_client_is_refused_with_what_to_install(
  monkeypatch,
):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(ValueError, match=r"requirements-gcs\.txt"):
    mirror.Home("gs://bucket/run")


def test_a_bucket_that_does_not_answer_is_given_up(monkeypatch):
  monkeypatch.setattr(mirror, "_ANSWER_S", 0.01)
  with pytest.raises(ValueError, match="no answer within"):
    mirror.answer("gs://bucket/run", lambda: time.sleep(0.5))
  with pytest.raises(ValueError, match="gs://bucket/run cannot be used"):
    mirror.answer("gs://bucket/run", lambda: 1 / 0)


# Runs.


def assert_same_run(address, bucket, whole, program):
  """A run in a bucket is the local run: rows, samples, model, state."""
  there = bucket.files(address.removeprefix("gs://"))
  rows = [line for line in there["metrics.jsonl"].decode().splitlines() if line]
  assert len(rows) == STEPS + 1
  here = tiny_runs.files(whole)
  for name, content in here.items():
    if name.startswith(("samples/", "model/")):
      assert there[name] == content, name
  template = functools.partial(state.template, program)
  with Checkpointer(f"{address}/checkpoints") as one:
    mine = one.restore(template)
  with Checkpointer(whole / "checkpoints") as other:
    its = other.restore(template)
  assert mine.step == its.step == STEPS
  jax.tree.map(np.testing.assert_array_equal, mine.state, its.state)


def test_a_run_in_a_bucket_goes_on_on_a_machine_that_never_saw_it(
  bucket, tiny, whole, tmp_path, monkeypatch, capsys
):
  address = "gs://bucket/runs/moved"
  argv = tiny(address, run__tensorboard=True)
  program = tiny_runs.program_of(argv)
  original, left = step_lib.train, [3]

  def stopped(run, batches):
    if left and run.state.step == left[0]:
      left.pop()
      os.kill(os.getpid(), signal.SIGTERM)
      while not run.interrupt.requested:
        time.sleep(1e-3)
    return original(run, batches)

  monkeypatch.setattr(step_lib, "train", stopped)
  home_of(address, tmp_path / "one", monkeypatch)
  assert main.main(argv) == 75
  home = home_of(address, tmp_path / "two", monkeypatch)
  assert main.main(argv) == 0
  assert "came from the bucket" in capsys.readouterr().out
  assert_same_run(address, bucket, whole, program)
  assert tiny_runs.repeatable(home.local) == tiny_runs.repeatable(whole)
  # All that was written here is there, and the other way round.
  there = bucket.files("bucket/runs/moved")
  copied = {
    name: content
    for name, content in there.items()
    if not name.startswith(("checkpoints/", "model/"))
  }
  assert tiny_runs.files(home.local) == copied
  assert len([name for name in copied if name.startswith("tensorboard/")]) == 2

  # Finished: the same command says so, from anywhere.
  home_of(address, tmp_path / "three", monkeypatch)
  assert main.main(argv) == 0
  assert "finished" in capsys.readouterr().out
  # Its model and its last checkpoint can be used where they are.
  model = rspo_jax.load_model(f"{address}/model")
  assert jax.tree.leaves(model.params)[0].size
  assert main.main([*argv, "--mode=eval"]) == 0
  assert f"{address}/checkpoints at step {STEPS}" in capsys.readouterr().out
  here = tmp_path / "three" / mirror.LOCAL_COPIES / "bucket/runs/moved/eval"
  written = tiny_runs.files(here)
  assert written and bucket.files("bucket/runs/moved/eval") == written
  # And another config is refused.
  other = [*argv, "--config.rollout.temperature=0.7"]
  assert main.main(other) == 2
  assert "(was 1.0)" in capsys.readouterr().err


def test_a_bucket_that_refuses_stops_a_run_with_3_and_loses_nothing(
  bucket, tiny, whole, tmp_path, monkeypatch, capsys
):
  address = "gs://bucket/runs/refused"
  argv = tiny(address)
  program = tiny_runs.program_of(argv)
  home_of(address, tmp_path / "one", monkeypatch)
  original = step_lib.train

  def refusing(run, batches):
    # From the middle of the run on, until it is started again.
    if run.state.step == 3:
      monkeypatch.setattr(
        bucket, "refuse", lambda method, name: method == "POST"
      )
    return original(run, batches)

  monkeypatch.setattr(step_lib, "train", refusing)
  assert main.main(argv) == 3
  error = capsys.readouterr().err
  assert address in error and "Traceback" not in error
  monkeypatch.setattr(step_lib, "train", original)
  monkeypatch.setattr(bucket, "refuse", lambda method, name: False)
  assert main.main(argv) == 0
  assert_same_run(address, bucket, whole, program)


@pytest.mark.parametrize("requests", range(6))
def test_probes_of_other_processes_come_and_go(
  requests, bucket, tiny, tmp_path, monkeypatch
):
  """A folder that is there at one question and not at the next."""
  config = load.parse(tiny("gs://bucket/runs/new"))[0].to_dict()
  home_of("gs://bucket/runs/new", tmp_path / "one", monkeypatch)
  probe = "bucket/runs/new/.rspo_jax-1-ab"
  bucket.insert(probe, {}, b"")
  left = [None] * requests

  def counted(original):
    def answer(*args):
      if left:
        left.pop()
      else:
        bucket.objects.pop(probe, None)
      return original(*args)

    return answer

  for name in ("read", "list"):
    monkeypatch.setattr(bucket, name, counted(getattr(bucket, name)))
  identity.check_workdir("gs://bucket/runs/new", config, "train")
  assert not left and probe not in bucket.objects
  assert not bucket.files("bucket/runs/new")


def test_a_checkpoint_that_is_not_in_its_bucket_is_refused_at_once(
  bucket, tiny, tmp_path, capsys
):
  words = tiny(tmp_path / "run", model__path="gs://bucket/models/none")
  assert main.main(words) == 2
  error = capsys.readouterr().err
  assert "model.path=gs://bucket/models/none holds no config.json" in error
  assert not (tmp_path / "run").exists()


def test_an_object_is_no_folder(bucket, tiny, tmp_path, monkeypatch):
  config = load.parse(tiny("gs://bucket/runs/file"))[0].to_dict()
  home_of("gs://bucket/runs/file", tmp_path / "one", monkeypatch)
  bucket.insert("bucket/runs/file", {}, b"text")
  with pytest.raises(ValueError, match="is a file; name a folder"):
    identity.check_workdir("gs://bucket/runs/file", config, "train")


def test_a_bucket_that_cannot_be_written_is_refused_before_anything(
  bucket, tiny, tmp_path, monkeypatch, capsys
):
  home = home_of("gs://bucket/runs/closed", tmp_path / "one", monkeypatch)
  monkeypatch.setattr(bucket, "refuse", lambda method, name: method == "POST")
  assert main.main(tiny("gs://bucket/runs/closed")) == 2
  error = capsys.readouterr().err
  assert "gs://bucket/runs/closed" in error and error.count("\n") == 1
  assert not home.local.exists()
  assert not bucket.files("bucket/runs/closed")
