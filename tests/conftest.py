"""What every test shares: the reference data, where it is at hand."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
  """What is marked slow may take longer than the limit of the others."""
  for item in items:
    if item.get_closest_marker("slow"):
      item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Folder of the reference recordings; the test is skipped without it."""
  folder = ROOT.parent / "shared"
  if not (folder / "fixtures").is_dir():
    pytest.skip("no reference recordings: ../shared/fixtures is not there")
  return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
  """A tiny sudoku checkpoint and puzzles: `command(workdir, **overrides)`.

  `command` returns the argv of a small run; `command.checkpoint`,
  `command.puzzles` and `command.cache` name what it uses.
  """
  import functools

  import tiny_runs

  folder = tmp_path_factory.mktemp("tiny")
  with tiny_runs.quick():
    tiny_runs.save_checkpoint(folder / "checkpoint")
  tiny_runs.save_puzzles(folder / "puzzles.jsonl")
  command = functools.partial(
    tiny_runs.command,
    checkpoint=folder / "checkpoint",
    puzzles=folder / "puzzles.jsonl",
    cache=folder / "compiled",
  )
  command.checkpoint = folder / "checkpoint"
  command.puzzles = folder / "puzzles.jsonl"
  command.cache = folder / "compiled"
  return command


@pytest.fixture(scope="module")
def compiled_fast():
  """For files whose time is mostly compilation of tiny programs."""
  import tiny_runs

  with tiny_runs.quick():
    yield


@pytest.fixture
def quick_runs():
  """Runs with the same settings share what they compiled, and that fast."""
  import tiny_runs

  with tiny_runs.quick():
    yield


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
  """The folder of a finished run that nothing disturbed; do not change it."""
  import tiny_runs

  from rspo_jax import main

  folder = tmp_path_factory.mktemp("whole") / "run"
  with tiny_runs.quick():
    assert main.main(tiny(folder, run__tensorboard=True)) == 0
  return folder


@pytest.fixture(scope="session")
def bucket():
  """A bucket on loopback that gs:// leads to, here and in processes."""
  import fake_bucket

  with fake_bucket.Bucket() as served, pytest.MonkeyPatch.context() as patch:
    for name, value in served.variables.items():
      patch.setenv(name, value)
    gcsfs = pytest.importorskip("gcsfs")
    import fsspec
    from etils.epath import backend

    # Read when it was imported, which may have been before.
    patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    backend.fsspec_backend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield served
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
  """Headless Chromium; the test is skipped without it."""
  import shutil

  from browser import Browser

  program = shutil.which("chromium") or shutil.which("google-chrome")
  if program is None:
    pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
  found = Browser(program, tmp_path_factory.mktemp("profile"))
  yield found
  found.close()
