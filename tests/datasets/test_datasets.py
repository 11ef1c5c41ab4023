"""Generators against brute force; datasets on disk; files as a source."""

import collections
import fractions
import itertools
import re

import numpy as np
import pytest

from rspo_jax.datasets import countdown, files, folders, streams, sudoku

SPLITS = ("train", "validation", "test")


def exact_value(text):
  """Evaluates an expression through Python itself, on exact fractions."""
  return eval(re.sub(r"\d+", r"F(\g<0>)", text), {"F": fractions.Fraction})


def reachable(numbers):
  """All values of a list of numbers, by combining two of them at a time."""
  if len(numbers) == 1:
    return {numbers[0]}
  values = set()
  for i, j in itertools.permutations(range(len(numbers)), 2):
    rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
    a, b = numbers[i], numbers[j]
    results = [a + b, a - b, a * b] + ([a / b] if b else [])
    for result in results:
      values |= reachable([result, *rest])
  return values


def count_by_search(puzzle):
  """Counts solutions cell by cell, without a list of grids."""
  if "0" not in puzzle:
    return 1
  cell = puzzle.index("0")
  row, column = divmod(cell, 4)
  peers = {
    puzzle[4 * r + c]
    for r in range(4)
    for c in range(4)
    if r == row or c == column or (r // 2 == row // 2 and c // 2 == column // 2)
  }
  return sum(
    count_by_search(puzzle[:cell] + digit + puzzle[cell + 1 :])
    for digit in "1234"
    if digit not in peers
  )


class TestStreams:
  def test_mix_is_the_published_splitmix64(self):
    assert int(streams.mix(np.uint64(0))) == 0xE220A8397B1DCDAF

  def test_below_is_uniform_within_sampling_error(self):
    words = streams.raw_words((1, 2, 3), 70_000)
    counts = np.bincount(streams.below(words, 7), minlength=7)
    # 7 cells of mean 10,000: five standard deviations are 463.
    assert abs(counts - 10_000).max() < 463

  def test_a_shorter_draw_is_the_beginning_of_a_longer_one(self):
    short, long = (streams.raw_words((5,), n) for n in (10, 100))
    np.testing.assert_array_equal(short, long[:10])


class TestCountdown:
  def test_there_are_68_distinct_expressions_of_three_numbers(self):
    # The third term of the sequence 1, 6, 68, 1170 of such counts.
    assert len(countdown.forms()) == 68
    assert len(countdown.trees()) == 192

  def test_every_tree_is_written_as_it_is_evaluated(self):
    numbers = (7, 11, 13)
    for tree in countdown.trees():
      value = fractions.Fraction(*countdown.evaluate(tree, numbers))
      assert exact_value(tree.text.format(*numbers)) == value, tree

  def test_minimal_parentheses_keep_texts_within_seven_tokens(self):
    for tree in countdown.trees():
      text = tree.text.format(7, 11, 100)
      assert len(re.findall(r"\d+|\D", text)) <= 7, text
      without = text.replace("(", "").replace(")", "")
      if without != text:
        assert exact_value(without) != exact_value(text), text

  def test_exactly_the_reachable_targets_are_found(self):
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 101, (60, 3))
    numbers[:3] = [[5, 5, 5], [1, 1, 1], [100, 100, 1]]
    best = countdown.solve(numbers)
    for row, found in zip(numbers.tolist(), best, strict=True):
      values = reachable([fractions.Fraction(n) for n in row])
      expected = {
        int(v) for v in values if v.denominator == 1 and 10 <= v <= 100
      }
      assert set((np.flatnonzero(found >= 0) + 10).tolist()) == expected
      for column in np.flatnonzero(found >= 0):
        text = countdown.forms()[found[column]].text.format(*row)
        assert exact_value(text) == column + 10

  def test_sums_and_differences_come_before_anything_else(self):
    problems = countdown.generate(0, "train", 2000)
    for i in range(len(problems)):
      a, b, c = problems.numbers[i].tolist()
      sums = {a + b + c, a + b - c, a - b + c, b + c - a}
      sums |= {a - b - c, b - a - c, c - a - b}
      plain = not set(problems.solution(i)) & set("*/(")
      assert plain == (int(problems.target[i]) in sums)

  def test_solutions_use_each_number_once_and_give_the_target(self):
    problems = countdown.generate(3, "train", 3000)
    for i in range(len(problems)):
      text = problems.solution(i)
      used = sorted(map(int, re.findall(r"\d+", text)))
      assert used == sorted(problems.numbers[i].tolist())
      assert exact_value(text) == problems.target[i]

  def test_the_target_is_uniform_among_the_reachable(self):
    problems = countdown.generate(1, "train", 20_000)
    best = countdown.solve(problems.numbers) >= 0
    count = best.sum(axis=1)
    below = np.arange(best.shape[1]) < (problems.target - 10)[:, None]
    rank = ((best & below).sum(axis=1) + 0.5) / count
    # Mean 1/2 and standard error below 0.3 / sqrt(20000): five of them.
    assert abs(rank.mean() - 0.5) < 0.0105

  def test_splits_share_no_problem(self):
    seen = {}
    for split in SPLITS:
      problems = countdown.generate(0, split, 4096)
      keys = np.sort(problems.numbers, axis=1).tolist()
      targets = problems.target.tolist()
      seen[split] = {(*k, t) for k, t in zip(keys, targets, strict=True)}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert len(seen["validation"]) == len(seen["test"]) == 4096

  def test_the_order_of_numbers_does_not_change_the_split(self):
    numbers = np.array(list(itertools.permutations((12, 34, 56))))
    assert len(set(countdown.split_of(numbers, np.full(6, 78)).tolist())) == 1


class TestSudoku:
  def test_the_288_grids_are_valid_and_distinct(self):
    grids = ["".join(map(str, g)) for g in sudoku.all_grids().tolist()]
    assert len(set(grids)) == 288
    for grid in grids:
      assert count_by_search("0" + grid[1:]) == 1

  def test_every_puzzle_has_one_solution_by_search(self):
    columns = sudoku.generate(0, "train", 200).columns()
    for puzzle, solution in zip(*columns.values(), strict=True):
      puzzle, solution = puzzle.decode(), solution.decode()
      assert count_by_search(puzzle) == 1
      assert all(p in ("0", s) for p, s in zip(puzzle, solution, strict=True))

  def test_counting_solutions_agrees_with_search(self):
    rng = np.random.default_rng(0)
    grids = sudoku.all_grids()[rng.integers(0, 288, 50)]
    puzzles = np.where(rng.random((50, 16)) < 0.6, 0, grids).astype(np.int8)
    puzzles[0] = 0
    puzzles[1, :2] = 1  # no solution
    texts = ["".join(map(str, p)) for p in puzzles.tolist()]
    expected = [count_by_search(text) for text in texts[2:]]
    counted = sudoku.count_solutions(puzzles).tolist()
    assert counted == [288, 0, *expected]

  def test_splits_share_no_solution_grid(self):
    grids = [set(sudoku.grids_of(split).tolist()) for split in SPLITS]
    assert [len(g) for g in grids] == [200, 44, 44]
    assert len(set.union(*grids)) == 288
    for split, mine in zip(SPLITS, grids, strict=True):
      solutions = sudoku.generate(0, split, 500).solution
      allowed = {sudoku.all_grids()[i].tobytes() for i in mine}
      assert {s.tobytes() for s in solutions} <= allowed

  def test_empties_are_uniform_from_6_to_11(self):
    empties = (sudoku.generate(0, "test", 4096).puzzle == 0).sum(axis=1)
    counts = collections.Counter(empties.tolist())
    assert sorted(counts) == list(range(6, 12))
    # Mean 683: five standard deviations are 119.
    assert max(abs(n - 4096 / 6) for n in counts.values()) < 119

  def test_held_out_puzzles_are_distinct(self):
    puzzles = sudoku.generate(0, "validation", 4096).puzzle
    assert len({p.tobytes() for p in puzzles}) == 4096


@pytest.mark.parametrize("generator", [countdown, sudoku])
class TestBoth:
  def test_a_seed_gives_the_same_columns_and_another_seed_others(
    self, generator
  ):
    first, again, other = (
      generator.generate(seed, "train", 500).columns() for seed in (1, 1, 2)
    )
    for name, column in first.items():
      np.testing.assert_array_equal(column, again[name])
      assert (column != other[name]).any()

  def test_none_asked_none_given(self, generator):
    assert len(generator.generate(0, "test", 0)) == 0

  def test_fewer_are_the_beginning_of_more(self, generator):
    few, many = (
      generator.generate(0, "train", n).columns() for n in (100, 20000)
    )
    for name, column in few.items():
      np.testing.assert_array_equal(column, many[name][:100])


@pytest.fixture
def builders(monkeypatch):
  """The builders, with datasets of a size for tests."""
  module = pytest.importorskip("rspo_jax.datasets.builders")
  monkeypatch.setattr(module, "TRAIN_EXAMPLES", {"small": 300, "large": 500})
  monkeypatch.setattr(module, "HELD_OUT_EXAMPLES", 50)
  return module


def files_by_name(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in sorted(folder.rglob("*array_record*"))
  }


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
class TestBuilders:
  def test_the_same_seed_and_version_give_the_same_bytes(
    self, builders, name, tmp_path
  ):
    for folder in ("a", "b"):
      builders.prepare(name, "small", 0, str(tmp_path / folder))
    first = files_by_name(tmp_path / "a")
    assert len(first) == 3
    assert first == files_by_name(tmp_path / "b")

  def test_held_out_splits_do_not_depend_on_the_size(
    self, builders, name, tmp_path
  ):
    small, large = (
      builders.load_columns(name, "test", size, 0, str(tmp_path))
      for size in ("small", "large")
    )
    for key, column in small.items():
      np.testing.assert_array_equal(column, large[key])

  def test_columns_are_what_the_data_source_reads(
    self, builders, name, tmp_path
  ):
    columns = builders.load_columns(name, "train", "small", 0, str(tmp_path))
    builder = builders.prepare(name, "small", 0, str(tmp_path))
    source = builder.as_data_source("train")
    assert len(source) == 300
    for index in (0, 17, 299):
      for key, value in source[index].items():
        assert np.array_equal(columns[key][index], value)

  def test_missing_or_damaged_columns_are_read_from_the_dataset_again(
    self, builders, name, tmp_path
  ):
    before = builders.load_columns(name, "test", "small", 0, str(tmp_path))
    (path,) = tmp_path.rglob("columns-test.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    for damage in (bytes(content), b"", None):
      path.write_bytes(damage) if damage is not None else path.unlink()
      after = builders.load_columns(name, "test", "small", 0, str(tmp_path))
      assert path.exists()
      for key, column in before.items():
        assert column.dtype == after[key].dtype
        np.testing.assert_array_equal(column, after[key])

  def test_a_damaged_dataset_is_named(self, builders, name, tmp_path):
    builders.load_columns(name, "test", "small", 0, str(tmp_path))
    for path in tmp_path.rglob("columns-*.npz"):
      path.unlink()
    (path,) = tmp_path.rglob("*-test.array_record*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"delete that folder"):
      builders.load_columns(name, "test", "small", 0, str(tmp_path))

  def test_an_unwritable_folder_is_named_with_the_remedy(
    self, builders, name, tmp_path
  ):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="RSPO_JAX_DATA"):
      builders.prepare(name, "small", 0, str(tmp_path / "file"))

  def test_an_unknown_size_is_named(self, builders, name, tmp_path):
    with pytest.raises(ValueError, match=r"data.size='huge'.*small, large"):
      builders.prepare(name, "huge", 0, str(tmp_path))

  def test_nothing_is_printed_to_stdout(self, builders, name, tmp_path, capsys):
    builders.prepare(name, "small", 0, str(tmp_path))
    assert capsys.readouterr().out == ""


def test_the_folder_comes_from_setting_then_environment(monkeypatch):
  monkeypatch.setenv("RSPO_JAX_DATA", "/from/environment")
  assert str(folders.data_folder("/from/setting")) == "/from/setting"
  assert str(folders.data_folder()) == "/from/environment"
  monkeypatch.delenv("RSPO_JAX_DATA")
  assert folders.data_folder().parts[-2:] == ("rspo_jax", "datasets")


class TestFiles:
  @pytest.mark.parametrize(
    ("name", "content", "message"),
    [
      ("a.jsonl", '{"x": 1}\nnot json\n', r"a.jsonl:2: not a JSON object"),
      ("a.jsonl", '{"x": 1}\n\n[1, 2]\n', r"a.jsonl:3: expected a JSON object"),
      ("a.jsonl", "[" * 100_000, r"a.jsonl:1: not a JSON object"),
      ("a.csv", "x,y\n1,2\n3\n", r"a.csv:3: .*x,y"),
      ("a.csv", "x,y\n1,2,3\n", r"a.csv:2: .*x,y"),
      ("a.csv", 'x,y\n1,"2\n', r"a.csv:2"),
      ("a.txt", "x", r"suffix '.txt'"),
      ("a.jsonl", "", r"holds no rows"),
      ("a.csv", "x,y\n", r"holds no rows"),
    ],
  )
  def test_a_malformed_file_names_file_and_line(
    self, tmp_path, name, content, message
  ):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
      files.load_rows(tmp_path / name, lambda row: row)

  def test_unreadable_files_are_named(self, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a.csv cannot be read as UTF-8"):
      files.load_rows(tmp_path / "a.csv", lambda row: row)
    with pytest.raises(ValueError, match=r"b.csv does not exist"):
      files.load_rows(tmp_path / "b.csv", lambda row: row)

  def test_line_separators_inside_json_do_not_shift_lines(self, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "a\u2028b"}\n{"x": 2}\n', encoding="utf-8")
    assert files.load_rows(path, lambda row: row["x"]) == ["a\u2028b", 2]

  def test_csv_cells_keep_leading_zeros(self, tmp_path):
    (tmp_path / "a.csv").write_text("Puzzle\n0012\n")
    assert files.load_rows(tmp_path / "a.csv", dict) == [{"Puzzle": "0012"}]

  def test_csv_cells_keep_their_lines(self, tmp_path):
    path = tmp_path / "a.csv"
    text = 'x,y\n"one\ntwo\u2028three\x0cfour",5\nsix\u2028seven,8\n'
    path.write_text(text, encoding="utf-8")
    assert files.load_rows(path, dict) == [
      {"x": "one\ntwo\u2028three\x0cfour", "y": "5"},
      {"x": "six\u2028seven", "y": "8"},
    ]

  def test_train_and_validation_share_a_file_without_overlap(self, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"x": {i}}}\n' for i in range(1000)))
    parts = {
      split: {row["x"] for row in files.load_split(str(path), split, dict)}
      for split in SPLITS
    }
    assert not parts["train"] & parts["validation"]
    assert parts["train"] | parts["validation"] == parts["test"]
    assert 30 < len(parts["validation"]) < 100

  def test_a_split_in_the_path_names_one_file_each(self, tmp_path):
    (tmp_path / "a_train.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "a_test.jsonl").write_text('{"x": 2}\n')
    source = str(tmp_path / "a_{split}.jsonl")
    assert files.load_split(source, "train", dict) == [{"x": 1}]
    assert files.load_split(source, "test", dict) == [{"x": 2}]

  def test_an_empty_split_is_named(self, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    messages = []
    for split in ("train", "validation"):
      try:
        files.load_split(str(tmp_path / "a.jsonl"), split, dict)
      except ValueError as error:
        messages.append(str(error))
    assert len(messages) == 1 and "{split}" in messages[0]
