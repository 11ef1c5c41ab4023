"""Published test files by name."""

import shutil

import pytest

from configs import sudoku
from rspo_jax.config import schema
from rspo_jax.datasets import published
from rspo_jax.run import data, rules
from rspo_jax.tasks import TASKS


@pytest.mark.parametrize("name", sorted(published.FILES))
def test_a_published_file_is_found_by_name(name, shared, tmp_path):
  file = published.FILES[name]
  path = published.locate(f"{name}:{shared / 'data'}")
  clone = tmp_path / "clone" / "dataset"
  clone.mkdir(parents=True)
  shutil.copy(path, clone / file.names[0])
  for place in (path, shared / "data", tmp_path / "clone", clone):
    source = schema.Data(source=f"{name}:{place}")
    examples = data.load_examples(TASKS[file.task], "test", source)
    assert len(examples) == file.rows
  # Neither trained nor tuned on.
  for split in ("train", "validation"):
    with pytest.raises(data.DataError, match=r"eval\.split=test"):
      data.load_examples(TASKS[file.task], split, source)


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"4x4_test_sudoku\.csv of d1"):
    published.locate(f"d1_sudoku:{tmp_path}")


def test_other_sources_are_paths():
  for source in ("a.jsonl", "C:/a.jsonl", "d1_sudoku", "d2:a", ""):
    assert published.split_name(source) == ("", source)


def test_settings_take_a_published_file_and_name_one_that_is_missing(shared):
  config = sudoku.get_config()
  config.data.source = f"spg_sudoku:{shared / 'data'}"
  rules.check_early(config)
  config.data.source = "spg_sudoku:nowhere"
  with pytest.raises(ValueError, match=r"test_sudoku_split_new\.csv of SPG"):
    rules.check_early(config)
