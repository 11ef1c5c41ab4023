"""The statistics in the documentation are those of the data."""

import pathlib

from rspo_jax.datasets import countdown, statistics, sudoku

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_tables_of_the_documentation_are_current():
  text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
  for table in statistics.tables():
    assert table in text, "run python -m rspo_jax.datasets.statistics"


def test_shares_of_operators_are_counted_over_all_solutions():
  rows = statistics.operators_table().splitlines()[2:]
  shares = [float(row.split("|")[2].strip(" %")) for row in rows]
  assert abs(sum(shares) - 100) < 0.5 and shares == sorted(shares)[::-1]
  # One pair by hand: two additions.
  made = countdown.generate(0, "train", statistics.SIZES["train"])
  twice = sum(made.solution(i).count("+") == 2 for i in range(len(made)))
  (row,) = (row for row in rows if row.startswith("| + + |"))
  assert f"{100 * twice / len(made):.1f} %" in row


def test_empty_cells_are_counted_over_all_puzzles():
  puzzles = sudoku.generate(0, "test", statistics.SIZES["test"]).columns()
  share = sum(p.count(b"0") == 9 for p in puzzles["puzzle"]) / 4096
  row = statistics.sudoku_table().splitlines()[4]
  assert row.split("|")[8].strip() == f"{100 * share:.1f} %"
