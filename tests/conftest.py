"""What every test shares: the reference data, where it is at hand."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Folder of the reference recordings; the test is skipped without it."""
  folder = ROOT.parent / "shared"
  if not (folder / "fixtures").is_dir():
    pytest.skip("no reference recordings: ../shared/fixtures is not there")
  return folder
