"""Verifiers against recordings, hand-made cases and Python itself."""

import fractions
import json
import os
import random
import re
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rspo_jax import workers
from rspo_jax.tasks import TASKS, answers, base, d1
from rspo_jax.tasks import countdown as countdown_task
from rspo_jax.tasks import gsm8k as gsm8k_module
from rspo_jax.tasks import math500 as math500_module

COUNTDOWN = {"ground_truth": [[3, 4, 5], 23], "solution": "3+4*5"}
SUDOKU = {"puzzle": "0310200404001043", "ground_truth": "4312213434211243"}
TWO_SOLUTIONS = {
  "puzzle": "0034300143100040",
  "ground_truth": "2134342143121243",
}
GSM8K = {"question": "How many?", "ground_truth": 18.0, "answer_string": "18"}
MATH500 = {"question": "How much?", "ground_truth": "\\frac{1}{2}"}
EXAMPLES = {
  "countdown": COUNTDOWN,
  "sudoku": SUDOKU,
  "gsm8k": GSM8K,
  "math500": MATH500,
}
GENERATED = ("countdown", "sudoku")
# Verifiers that run in process, in time linear in the completion.
LINEAR = [
  (task, protocol)
  for task in EXAMPLES
  for protocol in base.PROTOCOLS
  if (task, protocol) != ("math500", "strict")
]


def countdown(completion, *arguments, **options):
  return TASKS["countdown"].verify(COUNTDOWN, completion, *arguments, **options)


def sudoku(completion, *arguments, **options):
  return TASKS["sudoku"].verify(SUDOKU, completion, *arguments, **options)


def gsm8k(completion, *arguments, **options):
  return TASKS["gsm8k"].verify(GSM8K, completion, *arguments, **options)


def math500(completion, *arguments, **options):
  return TASKS["math500"].verify(MATH500, completion, *arguments, **options)


def rows_of(path):
  with open(path, encoding="utf-8") as handle:
    return [json.loads(line) for line in handle]


class TestArithmetic:
  @pytest.mark.parametrize(
    ("text", "value"),
    [
      ("7", 7),
      ("1/3*3", 1),
      ("2-3-4", -5),
      ("2-(3-4)", 3),
      ("12/4/3", 1),
      ("12/(4/3)", 9),
      ("-3+5", 2),
      ("2*-3", -6),
      ("--2", 2),
      ("+(-(3))*2", -6),
      (" 1 +\t2\n*3 ", 7),
      ("1/2+1/3", fractions.Fraction(5, 6)),
    ],
  )
  def test_value(self, text, value):
    found = answers.evaluate(answers.tokens(text))
    assert fractions.Fraction(*found) == value

  @pytest.mark.parametrize(
    "text",
    [
      "", "()", "1+", "*1", "1 2", "2(3)", "(1)(2)", "(1", "1)", "1**2", "1//2",
      "1.5", ".5", "1/0", "1/(2-2)", "007", "1_0", "1e3", "0x1", "1j", "a",
      "9" * 19, "1,2", "٣+٤", "1;2", "(" * 5000, "1+" * 5000 + "1",
    ],
  )  # fmt: skip
  def test_what_is_no_expression_is_refused(self, text):
    with pytest.raises(answers.MalformedError):
      answers.evaluate(answers.tokens(text))

  @hypothesis.given(st.text(alphabet="0123456789+-*/() ", max_size=24))
  @hypothesis.settings(max_examples=1000, deadline=None)
  @pytest.mark.filterwarnings("ignore::SyntaxWarning")
  def test_agrees_with_python_on_exact_fractions(self, text):
    try:
      ours = fractions.Fraction(*answers.evaluate(answers.tokens(text)))
    except answers.MalformedError:
      ours = None
    theirs = None
    if "**" not in text and "//" not in text:
      wrapped = re.sub(r"\d+", r"F('\g<0>')", text.strip())
      try:
        theirs = eval(wrapped, {"F": fractions.Fraction})
      except (SyntaxError, TypeError, ZeroDivisionError):
        theirs = None
      leading_zero = re.search(r"(?<!\d)0\d", text)
      if leading_zero or not isinstance(theirs, fractions.Fraction):
        theirs = None
    assert ours == theirs


class TestExtraction:
  @pytest.mark.parametrize(
    ("text", "content"),
    [
      ("<answer>a</answer>", "a"),
      ("<answer>a</answer><answer>b</answer>", "b"),
      ("<answer>a<answer>b</answer>", "b"),
      ("<answer>a</answer> </answer>", "a"),
      ("<answer>a</answer><answer>b", "a"),
      ("<answer></answer>", ""),
      ("<answer>a", None),
      ("a</answer>", None),
      ("</answer><answer>", None),
      ("", None),
    ],
  )
  def test_last_tag(self, text, content):
    assert answers.last_tag(text) == content

  @pytest.mark.parametrize(
    ("text", "content"),
    [
      (r"\boxed{a}", "a"),
      (r"\boxed{a} \boxed{b}", "b"),
      (r"\boxed{\boxed{a}}", "a"),
      (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
      (r"\boxed {a}", "a"),
      (r"\boxed{a", None),
      (r"\boxed", None),
      ("a", None),
    ],
  )
  def test_last_box(self, text, content):
    assert answers.last_box(text) == content

  def test_special_tokens_are_taken_out(self):
    assert countdown("3+4*5<|eot_id|><|endoftext|>").correct
    assert countdown("<answer>3+4*5<|endoftext|></answer>").correct
    assert not countdown("3+4*<|endoftext|>5<|endoftext|>9").correct
    assert not countdown("3+4*1<|endoftext|>5").correct


class TestCountdown:
  @pytest.mark.parametrize(
    "completion",
    [
      "3+4*5",
      " (4 * 5) + 3\n",
      "<answer>3+4*5</answer>",
      "<reasoning>1</reasoning><answer>1</answer><answer>3+4*5</answer>",
      r"<answer>\boxed{3+4*5}</answer>",
      r"\boxed{3+4*5}",
      r"so \boxed {4 \times 5 + 3}",
      r"<answer>$4 \cdot 5 + 3$</answer>",
      r"<answer>\(4 \cdot 5 + 3\)</answer>",
      "<answer>3 + [4 × 5] = 23</answer>",
      "5*4--3",
      "3+4⋅5",
      "3 + 4·5",
      "3 + 4 ∗ 5",
      "3 + 4•5",
      "（4×5）＋3",
      r"3+4\ast5",
      "3–−4*5",
      "3+4*5 = 23.",
      "<answer>4×5+3=23 .</answer>",
      r"\boxed{3+4\times5=23.}",
    ],
  )
  def test_right_answers(self, completion):
    verdict = countdown(completion)
    assert verdict.correct and verdict.reward == 1.0, verdict
    assert verdict.parts == {"correct": 1.0, "numbers": 1.0}

  @pytest.mark.parametrize(
    ("numbers", "target", "completion"),
    [
      ([30, 4, 5], 21, "30–4–5"),
      ([30, 4, 5], 21, "30‑4−5 = 21."),
      ([30, 4, 5], 24, "30∕5*4"),
      ([30, 4, 5], 24, "30⁄5×4"),
      ([30, 4, 5], 24, "30÷5⋅4"),
      ([30, 4, 5], -21, "4 + 5 − 30 = −21."),
    ],
  )
  def test_signs_of_unicode_are_operators(self, numbers, target, completion):
    example = {"ground_truth": [numbers, target]}
    assert TASKS["countdown"].verify(example, completion).correct
    example = {"ground_truth": [numbers, target + 1]}
    verdict = TASKS["countdown"].verify(example, completion)
    assert not verdict.correct and verdict.parts["numbers"] == 1.0

  @pytest.mark.parametrize(
    "completion",
    [
      "3+4+5", "3-4*5", "<answer>3+4*5=24</answer>", "3/4/5",
      "3+4*5 = 24.", "3+4*5 = 23.5", "3+4*5 = 23..", "3+4*5 = .", "3⋅4⋅5",
    ],
  )  # fmt: skip
  def test_right_numbers_that_miss_get_a_tenth(self, completion):
    verdict = countdown(completion)
    assert not verdict.correct and verdict.reward == 0.1, verdict
    assert verdict.parts == {"correct": 0.0, "numbers": 1.0}

  @pytest.mark.parametrize(
    "completion",
    [
      "",
      "23",
      "3+4",
      "3+4*5+0",
      "3+4*5*1",
      "3+4*5.",
      "34*5",
      "3 4 5",
      "3**4*5",
      "23=3+4*5",
      "3+4*5=",
      "it is 3+4*5",
      "<answer></answer>3+4*5",
      "<answer>3+4*5</answer><answer>3</answer>",
      "3+4*5 = 23 = 24",
      "3/(4-4)*5",
    ],
  )
  def test_wrong_answers(self, completion):
    verdict = countdown(completion)
    assert not verdict.correct, verdict
    if completion not in ("3+4*5=", "3+4*5 = 23 = 24"):
      assert verdict.reward == 0.0, verdict

  def test_a_value_off_by_less_than_a_tolerance_is_wrong(self):
    example = {"ground_truth": [[1, 100001, 5], 5]}
    assert not TASKS["countdown"].verify(example, "1/100001+5").correct

  def test_weights_change_the_reward_and_unknown_ones_are_named(self):
    weights = {"numbers": 0.5, "correct": 1.5}
    assert countdown("3+4*5", weights=weights).reward == 2.0
    assert countdown("3+4+5", weights=weights).reward == 0.5
    assert countdown("3+4+5", weights={"numbers": 0.0}).reward == 0.0
    with pytest.raises(ValueError, match=r"'form'.*correct, numbers"):
      countdown("3+4*5", weights={"form": 1.0})

  def test_the_reason_names_what_is_wrong(self):
    assert "gives 12, not 23" in countdown("3+4+5").reason
    assert "[3, 4]" in countdown("3+4").reason
    assert "'a'" in countdown("a").reason

  def test_demonstrations_are_right_and_corrupt_ones_use_the_numbers(
    self, examples
  ):
    task, rng = TASKS["countdown"], np.random.default_rng(0)
    right = 0
    for example in examples["countdown"]:
      assert task.verify(example, task.demonstration(example)).correct
      verdict = task.verify(example, task.corrupt(example, rng))
      assert verdict.parts["numbers"] == 1.0 or "zero" in verdict.reason
      right += verdict.correct
    assert right / len(examples["countdown"]) < 0.1

  def test_the_compact_prompt(self):
    assert TASKS["countdown"].prompt(COUNTDOWN, "compact") == "3,4,5=23"

  @pytest.mark.parametrize(
    ("row", "example"),
    [
      ({"input": "30,100,93", "output": "23"}, [[30, 100, 93], 23]),
      ({"nums": [82, 93, 48], "target": 37}, [[82, 93, 48], 37]),
    ],
  )
  def test_published_rows_are_read(self, tmp_path, row, example):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    settings = base.DataSettings(source=str(tmp_path / "a.jsonl"))
    (loaded,) = TASKS["countdown"].load("test", settings)
    assert loaded == {"ground_truth": example}
    with pytest.raises(ValueError, match="without a solution"):
      TASKS["countdown"].demonstration(loaded)

  def test_numbers_of_18_digits_and_a_larger_target_are_read(self):
    row = {"nums": [10**18 - 1, 10**17], "target": 10**35 - 10**17}
    example = countdown_task.parse_row(row)
    answer = f"{10**17}*{10**18 - 1}"
    assert TASKS["countdown"].verify(example, answer).correct

  @pytest.mark.parametrize(
    ("row", "message"),
    [
      ({"input": "30,x", "output": "23"}, r"a.jsonl:2: expected whole numbers"),
      ({"input": "30,1.5", "output": "23"}, r"a.jsonl:2: expected whole"),
      ({"input": "30,-1", "output": "23"}, r"a.jsonl:2: .*negative"),
      ({"input": "30,1", "output": "?"}, r"a.jsonl:2: expected whole numbers"),
      ({"input": "30,1", "output": None}, r"a.jsonl:2: expected whole numbers"),
      ({"input": 7, "output": "1"}, r"a.jsonl:2: expected whole numbers"),
      ({"nums": [], "target": 1}, r"a.jsonl:2: expected one number"),
      ({"numbers": [1, True], "target": 1}, r"a.jsonl:2: expected whole"),
      ({"nums": [10**19, 1], "target": 1}, r"a.jsonl:2: .*up to 18 digits"),
      ({"input": "1" * 19, "output": "1"}, r"a.jsonl:2: .*up to 18 digits"),
      ({"nums": [1], "target": 10**40}, r"a.jsonl:2: .*target of up to 40"),
      ({"input": "1", "output": "9" * 400}, r"a.jsonl:2: .*target of up to 40"),
      ({"input": "1_0,2", "output": "20"}, r"a.jsonl:2: expected whole"),
      ({"input": "٣,4", "output": "7"}, r"a.jsonl:2: expected whole"),
      ({"output": "23"}, r"a.jsonl:2: expected a field 'input'"),
      (
        {"nums": [1, 2], "target": 3, "solution": "1+1"},
        r"a.jsonl:2: the solution '1\+1'",
      ),
    ],
  )
  def test_malformed_rows_name_file_and_line(self, tmp_path, row, message):
    good = '{"input": "1,2", "output": "3"}\n'
    (tmp_path / "a.jsonl").write_text(good + json.dumps(row) + "\n")
    settings = base.DataSettings(source=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=message):
      TASKS["countdown"].load("test", settings)


class TestSudoku:
  def test_the_solution_in_each_form(self):
    gold = SUDOKU["ground_truth"]
    spaced = "\n".join(" ".join(gold[i : i + 4]) for i in range(0, 16, 4))
    for text in (gold, spaced, f"<answer>\n{gold}\n</answer>",
                 f"x <answer>{spaced}</answer> y"):  # fmt: skip
      verdict = sudoku(text)
      assert verdict.correct and verdict.reward == 1.0, verdict
      assert verdict.parts["exact"] == verdict.parts["accuracy"] == 1.0

  @pytest.mark.parametrize(
    "form",
    [
      "<answer>{p} -> \\boxed{{{s}}}</answer>", "<answer>{p} -> {s}</answer>",
      "<answer>{p} => {s}</answer>", "<answer>{p} → {s}</answer>",
      "<answer>{p} ⇒ {s}.</answer>", "<answer>{p} --> {s}</answer>",
      "<answer>{p} \\rightarrow {s}</answer>", "<answer>{p}\n{s}</answer>",
      "<answer>Puzzle: {p}\nSolution: {s}</answer>", "{p} -> {s}", "{p}\n{s}",
      "<answer>\\boxed{{{s}}}</answer>", "<answer>{p} -> 1 -> {s}</answer>",
    ],
  )  # fmt: skip
  def test_of_puzzle_and_solution_the_solution_counts(self, form):
    puzzle, solution = SUDOKU["puzzle"], SUDOKU["ground_truth"]
    verdict = sudoku(form.format(p=puzzle, s=solution))
    assert verdict.correct and verdict.reward == 1.0, verdict
    swapped = sudoku(form.format(p=solution, s=puzzle))
    assert not swapped.correct, swapped
    other = puzzle[::-1]
    assert not sudoku(form.format(p=solution, s=other)).correct

  @pytest.mark.parametrize("form", ["{s}{s}", "{q}{s}", "{s} {p}", "x -> {p}"])
  def test_another_grid_before_the_solution_is_not_skipped(self, form):
    puzzle, solution = SUDOKU["puzzle"], SUDOKU["ground_truth"]
    text = form.format(p=puzzle, q=puzzle[::-1], s=solution)
    assert not sudoku(f"<answer>{text}</answer>").correct
    assert sudoku(f"the grid -> {solution}").reward == 0.0

  def test_another_valid_solution_is_correct_and_not_exact(self):
    verdict = TASKS["sudoku"].verify(TWO_SOLUTIONS, "1234342143122143")
    assert verdict.correct and verdict.reward == 1.0
    assert verdict.parts["valid"] == 1.0 and verdict.parts["exact"] == 0.0
    assert verdict.parts["accuracy"] == 0.5

  def test_an_overwritten_clue_is_not_correct(self):
    gold = SUDOKU["ground_truth"]
    wrong = gold[0] + "4" + gold[2:]
    verdict = sudoku(wrong)
    assert not verdict.correct and verdict.parts["accuracy"] == 1.0
    assert "clue" in verdict.reason

  def test_the_share_of_empty_cells_is_counted(self):
    gold, puzzle = SUDOKU["ground_truth"], SUDOKU["puzzle"]
    cell = puzzle.index("0")
    wrong = gold[:cell] + ("1" if gold[cell] != "1" else "2") + gold[cell + 1 :]
    share = (puzzle.count("0") - 1) / puzzle.count("0")
    assert sudoku(wrong).parts["accuracy"] == pytest.approx(share)
    assert sudoku(wrong).reward == pytest.approx(share)

  def test_a_wrong_number_of_digits_is_not_correct(self):
    gold = SUDOKU["ground_truth"]
    for text in (gold[:-1], gold + "1", gold * 2):
      assert not sudoku(f"<answer>{text}</answer>").correct

  @pytest.mark.parametrize(
    "completion",
    [
      "",
      "the grid is 4312213434211243",
      "<answer>4312213434211243",
      "<answer></answer>4312213434211243",
      "<answer>4312213434211243</answer><answer>0310200404001043</answer>",
      "0000000000000000",
      "０" * 16,
      "４３１２２１３４３４２１１２４３",
    ],
  )
  def test_what_is_no_answer_scores_nothing(self, completion):
    verdict = sudoku(completion)
    assert not verdict.correct and verdict.reward == 0.0, verdict

  def test_weights_change_the_reward(self):
    weights = {"cells": 0.0, "valid": 1.0}
    assert sudoku(SUDOKU["ground_truth"], weights=weights).reward == 1.0
    assert sudoku("1" * 16, weights=weights).reward == 0.0

  def test_corrupt_demonstrations_keep_clues_and_redraw_half_the_rest(
    self, examples
  ):
    task, rng = TASKS["sudoku"], np.random.default_rng(0)
    empties = right = 0
    for example in examples["sudoku"]:
      puzzle = example["puzzle"]
      assert task.verify(example, task.demonstration(example)).correct
      text = task.corrupt(example, rng)
      assert len(text) == 16 and set(text) <= set("1234")
      assert all(p in ("0", c) for p, c in zip(puzzle, text, strict=True))
      share = task.verify(example, text).parts["accuracy"]
      empties += puzzle.count("0")
      right += share * puzzle.count("0")
    # Kept with 1/2, redrawn alike with 1/8; standard error is 0.0053.
    assert abs(right / empties - 0.625) < 0.027

  def test_published_rows_are_read(self, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Puzzle,Solution\n0310200404001043,4312213434211243\n")
    settings = base.DataSettings(source=str(path))
    assert TASKS["sudoku"].load("test", settings) == [SUDOKU]

  @pytest.mark.parametrize(
    ("row", "message"),
    [
      ("310200404001043,4312213434211243", r"a.csv:2: .*leading zeros"),
      ("0310200404001045,4312213434211243", r"a.csv:2: expected a puzzle"),
      ("0310200404001043,4312213434211244", r"a.csv:2: the solution"),
      ("0310200404001043,1234341221434321", r"a.csv:2: the solution"),
      ("0310200404001043", r"a.csv:2: .*Puzzle,Solution"),
    ],
  )
  def test_malformed_rows_name_file_and_line(self, tmp_path, row, message):
    (tmp_path / "a.csv").write_text(f"Puzzle,Solution\n{row}\n")
    settings = base.DataSettings(source=str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=message):
      TASKS["sudoku"].load("test", settings)


class TestGsm8k:
  @pytest.mark.parametrize(
    "completion",
    [
      "18",
      "18.0",
      "$18",
      "#### 18",
      "it is 17 #### 18",
      r"\boxed{18}",
      r"\boxed{17} no, \boxed{18}",
      r"<answer>\boxed{18}</answer>",
      r"<answer>\boxed{18\n</answer>",
      "<answer>18</answer>",
      "<answer>17</answer><answer>$18.00</answer>",
      "<answer>18 apples</answer>",
      r"<answer>\boxed{18\text{ apples}}</answer>",
      r"\boxed{\frac{36}{2}}",
      r"\boxed{-\frac{-36}{2}}",
      "<answer>36/2</answer>",
      r"\boxed{9 + 9 = 18}",
      r"\boxed{18\%}",
    ],
  )
  def test_right_answers(self, completion):
    verdict = gsm8k(completion.replace("\\n", "\n"))
    assert verdict.correct and verdict.reward == 1.0, verdict
    assert verdict.parts == {"correct": 1.0, "format": 1.0}

  @pytest.mark.parametrize(
    "completion",
    [
      "",
      "the answer is 18",
      "-18",
      "17.9",
      "181",
      "<answer></answer>18",
      "<answer>18</answer><answer>17</answer>",
      r"\boxed{}18",
      r"\boxed{18",
      r"\boxed{18} \boxed{18",
      r"\boxed{1_8}",
      r"\boxed{18 19 20}",
      r"\boxed{18:00 pm}",
      r"\boxed{nan}",
      r"\boxed{Infinity}",
      r"\boxed{\frac{18}{0}}",
      r"\boxed{2\frac{18}{1}}",
      "<answer>18/0</answer>",
      "<answer>1,8</answer>",
      "<answer>0018 0</answer>",
      "<answer>" + "1" * 500 + "</answer>",
      "１８",
    ],
  )
  def test_wrong_answers(self, completion):
    verdict = gsm8k(completion)
    assert not verdict.correct and verdict.reward == 0.0, verdict

  @pytest.mark.parametrize(
    ("answer", "completion"),
    [
      ("29", "$29.00."), ("1/2", r"\frac12"), (".5", r"\frac12"),
      ("0.5", ".5"), ("0.5", "½"), ("2.5", r"2\frac{1}{2}"), ("2.5", "2½"),
      ("2.5", "2 1/2"), ("18", "18 m^2"), ("18", "18 m²"), ("18", "18 cm³"),
      ("18", "18 cm^{3}"), ("18", r"18\text{ m}^2"),
      ("18", r"18 \text{ km/h}"), ("18", "18 km/h"),
      ("18", "18 miles per hour"), ("18", "$18/hour"), ("18", r"18\%"),
      ("18", "18%"), ("18", "18 percent"), ("1234", "1,234"),
      ("1234", "1{,}234"), ("1234", r"1,\!234"), ("1234", r"1\,234"),
      ("1234", "1\u202f234"), ("1234.5", "$1,234.50"), ("-18", "−18"),
      ("-18", "–18"), ("-18", r"-\$18"), ("18", "18 apples."),
      ("18", "**18**"), ("18", "**18** apples"), ("18", "$18$ dollars"),
      ("18", "€18"), ("18", "18€"), ("18", "x = 18"),
      ("18", "the answer is 18."), ("18", "18 sq. ft."), ("18", r"18^\circ"),
      ("18", "18°C"), ("18", r"18 \mathrm{cm}^{2}"),
      ("18", r"18\,\text{cm}^3"), ("18", "18 square meters"),
      ("18", "Total: $18"), ("18000", "18 thousand dollars"), ("18", "9+9=18"),
      ("18", "18th"), ("18", "(18)"), ("18", "18 a day"), ("18", "18-year"),
      ("0.75", "3/4"), ("0.75", r"\dfrac{3}{4}"), ("-0.75", r"-\frac{3}{4}"),
      ("18", "18 kg·m"), ("18", "18 m/s^2"), ("18", "USD 18"),
      ("118000", "118,000"), ("18", "18 people's"), ("18", r"\$18"),
      ("18", "18.0"), ("18", "18 (dollars)"), ("18", "approximately 18 hours"),
      ("18", "≈ 18"),
    ],
  )  # fmt: skip
  def test_money_fractions_and_units_are_read(self, answer, completion):
    example = {"answer_string": answer}
    for text in (f"<answer>{completion}</answer>", f"\\boxed{{{completion}}}"):
      verdict = TASKS["gsm8k"].verify(example, text)
      assert verdict.correct, verdict

  @pytest.mark.parametrize(
    ("answer", "completion"),
    [
      ("12", r"\frac12"), ("9", r"\sqrt{9}"), ("9", "√9"), ("9", "sqrt(9)"),
      ("3", "3!"), ("2", "2^3"), ("23", "2^3"), ("18", "18^2"),
      ("18", r"18\pi"), ("18", "18π"), ("18", "18x"), ("18", "|−18|"),
      ("18", "-(18)"), ("18", r"\log{18}"), ("18", "18 squared"),
      ("18", "half of 18"), ("18", "18k"), ("18", "18 thousand"),
      ("18", ">18"), ("18", r"x \ge 18"), ("18", "x>=18"), ("18", "!=18"),
      ("18", r"\neq 18"), ("18", r"\pm 18"), ("18", "2×9+0"), ("18", "18i"),
      ("18", "1.8e1"), ("18", "7-18"), ("18", "18–20"), ("18", "18 or 19"),
      ("18", "-18"), ("18", "−18"), ("18", r"\binom{18}{1}x"),
      ("18", r"\lfloor 18.5 \rfloor"), ("18", "18.5."),
      ("18", "18 and a half"), ("234", "1 234"), ("18", "square root of 18"),
      ("18", "negative 18"), ("18", "not 18"), ("18", "18/2"),
      ("18", r"18\frac{1}{2}"), ("18", "18½"), ("18", r"18 \cdot 2"),
      ("5", r"\frac{5}{0}"), ("5", "5/0"), ("18", r"\sqrt[3]{18}"),
      ("18", "x^{18}"), ("18", "18°^2"), ("18", r"\overline{18}"),
      ("18", "18_8"), ("2", "m^2"), ("18", "--18"),
    ],
  )  # fmt: skip
  def test_no_operator_is_passed_over(self, answer, completion):
    example = {"answer_string": answer}
    for text in (f"<answer>{completion}</answer>", f"\\boxed{{{completion}}}"):
      verdict = TASKS["gsm8k"].verify(example, text)
      assert not verdict.correct, verdict

  @pytest.mark.parametrize(
    "number",
    ["1/0", "1e400", "1e-999999999", "1e99999999", "9" * 400, "nan", "inf",
     "1_0", "٣", "0x10", "1e", "", "1" * 41, "1e41"],
  )  # fmt: skip
  def test_a_gold_answer_out_of_bounds_is_refused_at_once(
    self, tmp_path, number
  ):
    row = {"question": "a", "answer": f"#### {number}"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    settings = base.DataSettings(source=str(tmp_path / "a.jsonl"))
    started = time.process_time()
    with pytest.raises(ValueError, match=r"a.jsonl:1: expected a number of up"):
      TASKS["gsm8k"].load("test", settings)
    assert time.process_time() - started < 0.5

  @pytest.mark.parametrize("number", [10**400, float("inf"), float("nan")])
  def test_a_gold_answer_that_is_no_text_is_bounded_too(self, number):
    with pytest.raises(ValueError, match="up to 40 digits"):
      gsm8k_module.gold({"ground_truth": number})

  def test_thousands_and_signs_of_the_gold_answer_count(self):
    example = {"answer_string": "-1,234", "ground_truth": None}
    verify = TASKS["gsm8k"].verify
    assert verify(example, r"\boxed{-1234}").correct
    assert verify(example, r"\boxed{-\$1,234.00}").correct
    assert not verify(example, r"\boxed{1234}").correct

  def test_the_format_can_be_rewarded(self):
    assert gsm8k("<answer>7</answer>", weights={"format": 0.25}).reward == 0.25

  def test_canonical_rows_are_read(self, shared):
    settings = base.DataSettings(
      source=str(shared / "data/gsm8k_{split}.jsonl")
    )
    assert len(TASKS["gsm8k"].load("test", settings)) == 1319
    assert len(TASKS["gsm8k"].load("train", settings)) == 7473

  @pytest.mark.parametrize(
    ("row", "message"),
    [
      ({"question": "a", "answer": "18"}, r"a.jsonl:1: .*#### number"),
      ({"question": "a", "answer": "#### x"}, r"a.jsonl:1: expected a number"),
      ({"question": "a"}, r"a.jsonl:1: expected a field 'answer'"),
    ],
  )
  def test_malformed_rows_name_file_and_line(self, tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    settings = base.DataSettings(source=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=message):
      TASKS["gsm8k"].load("test", settings)


# (gold answer, answer): what mathematics says of them, by hand.
SAME = [
  ("28", "28."), ("28", "$28.$"), ("28", r"\(28\)."), ("28", "**28**"),
  ("28", r"28\,."), ("28", "= 28"), ("2^{-99}", r"\frac{1}{2^{99}}"),
  ("2^{-99}", "0.5^{99}"), ("1/2004!", r"\frac{2005}{2005!}"),
  ("(2^{-99},1)", "(2^{-99},1.0)"), ("0.0000001", "10^{-7}"),
  (".0000672", r"6.72 \times 10^{-5}"), (r"\frac{1}{3}", "0.333333"),
  (r"\frac{1}{3}", r"0.\overline{3}"), (r"\pi", "3.14159"),
  ("0.3", "0.30000000000000004"), (r"\sqrt{2}", "1.4142135623730951"),
  ("52_8", "52_{8}"), ("52_8", r"52_{\text{eight}}"), ("52_8", "52₈"),
  ("52_8", "52"), ("52_8", r"52\text{ base }8"), ("42", "52_8"),
  ("1A_{16}", "1A_{16}."), (r"1, 2, \ldots, n", r"1,2,\dots,n"),
  (r"1, 2, \ldots, n", "1, 2, 3, ..., n"), (r"1, 2, \ldots, n", "1,2,…,n."),
  (r"1+2+\cdots+n", r"1 + 2 + \dots + n"), (r"2\sqrt5", "2√5"),
  (r"\frac{\sqrt{21}}{5}", "√21/5"), (r"\frac{3\sqrt{3}}{4}", "(3√3)/4"),
  (r"(-\infty, 2) \cup (3, \infty)", "(−∞, 2) ∪ (3, ∞)"), ("3R^2", "3R²"),
  (r"1 \pm \sqrt{19}", "1 ± √19"), (r"\{1\pm\sqrt{5},-2\}", "{1±√5, −2}"),
  ("x^5 - x^4 + x^3 - x^2 + x - 1", "x⁵ − x⁴ + x³ − x² + x − 1"),
  (r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]", "[π²/8, 5π²/4]"),
  (r"\frac{1}{2}", "½"), (r"137 \frac{1}{2}", "137½"), (r"120^\circ", "120°"),
  (r"-\frac{\pi}{6}", "−π/6"), (r"x \in [-2,7]", "x ∈ [−2, 7]"),
  (r"x \in [-2,7]", "−2 ≤ x ≤ 7"), (r"7! \times 2!", "7!×2!"),
  ("2^{-3}", "2⁻³"), (r"\sqrt[3]{2}", "∛2"), (r"\text{June 20}", "June 20"),
  ("east", "east"), (r"\text{east}", "east"), (r"\text{east}", "East."),
  (r"\text{Evelyn}", r"\textbf{Evelyn}"), (r"\text{ellipse}", "an ellipse"),
  (r"\text{(C)}", "C"), (r"\text{(C)}", "(C)"),
  (r"\text{(C)}", r"\textbf{(C)}"), ("ab", "ba"), ("abc", "cab"),
  (r"5.4 \text{ cents}", "5.4"), (r"(-\infty,3)", "x<3"),
  ("x<3", r"(-\infty,3)"), ("(2,4)", "2<x<4"), ("[2,4]", r"2 \le x \le 4"),
  (r"(5,\infty)", "x > 5"), (r"(5,\infty)", "5 < x"),
  (r"(-\infty, 2) \cup (3, \infty)", r"x<2 \text{ or } x>3"),
  (r"-2\le x\le 7", r"7\ge x\ge -2"), (r"(-\infty,3)", r"\{x \mid x<3\}"),
  ("(3,4]", "3 < x ≤ 4"),
  ("3, 5, 7", r"The roots are \boxed{3}, \boxed{5}, \boxed{7}"),
  ("3, 5, 7", r"$\boxed{3}$, $\boxed{5}$ and $\boxed{7}$."),
  ("3, 5, 7", r"\boxed{3}, \boxed{5}, and \boxed{7}"),
  ("7", r"first \boxed{3}. Then \boxed{7}"),
  ("7", r"\boxed{7} or \boxed{7.0}"),
  ("-2,1", r"\boxed{1} \text{ and } \boxed{-2}"), (r"\$18.90", "18.9"),
  ("58,500", "58500."), (r"50\%", "0.5"), (r"12.5\%", "12.5"),
  (r"12.5\%", "0.125"), (r"\cot x", "cot x"),
  (r"\frac{3}{4}", r"\frac{3}{4}."), ("x=5", "x = 5."), ("(2,4)", "(2, 4)."),
  (r"\text{east}", r"\text{east}."), (r"\text{east}", r"\text{east.}"),
  (r"\$36", r"\$36."), (r"90^\circ", r"90^\circ."), (r"12\pi", r"12\pi;"),
  ("28", '"28"'), ("28", "28。"), ("28", r"\boxed{28.}"),
  (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}/3,"), ("28", "28.0."),
  (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"), ("10^{-20}", "1/10^{20}"),
  ("(0.5, 2)", r"(\frac12, 2)"), (r"\frac{2}{3}", "0.666667"),
  (r"\sqrt{51}", "7.14142842854285"), (r"\sqrt{51}", "7.141428"),
  (r"\frac{20000}{\pi}", "6366.1977"), ("204_5", "204_{(5)}"),
  ("204_5", "(204)_5"), ("204_5", "x = 204_5"),
  ("204_5", r"204_{\text{five}}"), ("204_5", r"204\ (\text{base }5)"),
  ("101_2, 110_2", "110_2, 101_2"), ("52_8", "052_8"), (r"\log_2 8", "3"),
  (r"2,4,6,\ldots", "2, 4, 6, ..."),
  (r"1,2,4,\ldots,2^n", r"1,2,4,\dots,2^{n}"),
  (r"\{1, 2, \ldots, n\}", "{1,2,…,n}"), (r"-\frac{35}{9}", "−35/9"),
  (r"-\frac{35}{9}", "−35∕9"),
  ("5x - 7y + 11z + 4 = 0", "5x − 7y + 11z + 4 = 0"),
  ("8n^2 + 4n + 1", "8n² + 4n + 1"), (r"11 \sqrt{5} + 11", "11√5 + 11"),
  (r"11 \sqrt{5} + 11", "11√(5) + 11"), (r"\sqrt{x+1}", "√(x+1)"),
  (r"3 \pm 2 \sqrt{2}", "3±2√2"), (r"x\ne 2", "x≠2"), (r"x \ge 5", "x≥5"),
  (r"\alpha+\beta", "α+β"), (r"\frac{1}{x^2}", "x⁻²"), (r"\theta", "θ"),
  (r"15\mbox{ cm}^2", "15 cm²"), (r"864 \mbox{ inches}^2", "864 in²"),
  (r"\frac{270}7\text{ degrees}", "270/7°"), ("6 - 5i", "6−5i"),
  (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{pmatrix} −2 \\ −14 \\ −7 \end{pmatrix}"),
  ("10^{6}", "10⁶"), ("2^{10}", "2¹⁰"), ("x^{n+1}", "xⁿ⁺¹"),
  (r"\text{Yes}", "yes"), (r"\text{odd}", r"\mathrm{odd}"),
  (r"\text{Friday}", r"\text{Friday}."), (r"\text{10 hours}", "10"),
  (r"\text{ellipse}", r"\text{Ellipse}"), (r"\text{neither}", "Neither."),
  ("xy", "yx"), ("pqr", "rqp"), ("mn", "nm"), (r"\text{(B)}", r"\text{B}"),
  (r"\text{(B)}", r"\mathbf{B}"), (r"\text{(B)}", "(B)."), ("3", r"\text{3}"),
  ("(-2,1)", "-2<x<1"), (r"(-\infty, 0]", r"x \le 0"),
  (r"(-\infty, 0]", "x ≤ 0."), (r"(-\infty, 0]", r"0 \ge x"),
  (r"(2,\infty)", "2<x"), (r"[0,\infty)", r"x\geq 0"), ("x>2", r"(2,\infty)"),
  ("x>2", r"x \in (2,\infty)"), (r"(0,9) \cup (9,36)", r"x\in(0,9)\cup(9,36)"),
  (r"(2,12) \cup (12,102)", r"2<x<12 \text{ or } 12<x<102"),
  (r"x<2 \text{ or } x>3", r"(-\infty, 2) \cup (3, \infty)"),
  ("(2,3)", r"x>2 \text{ and } x<3"),
  (r"\left(\frac{3}{5},\frac{8}{3}\right]", r"\frac{3}{5} < x \le \frac{8}{3}"),
  (r"(-\sqrt{3}, \sqrt{3})", r"-\sqrt{3} < x < \sqrt{3}"),
  (r"(-\sqrt{3}, \sqrt{3})", "−√3 < x < √3"), ("(8,-2)", "(8,-2)"),
  ("(8,-2)", "8,-2"), ("1,-2", r"\boxed{1} and \boxed{-2}"),
  ("1,-2", r"\(\boxed{1}\), \(\boxed{-2}\)"),
  ("1,-2", r"<answer>\boxed{1}, \boxed{-2}</answer>"),
  ("1,-2", r"x=\boxed{1}\text{ or }\boxed{-2}"),
  ("5", r"\boxed{4}, so \boxed{5}"),
  (r"\frac{1}{2}", r"\boxed{\frac12}, \boxed{0.5}"),
  ("2, 3", r"\boxed{\frac{4}{2}}, and $\boxed{3}$"),
  (r"\{1\pm\sqrt{5},-2\}", r"\boxed{1+\sqrt5}, \boxed{1-\sqrt5}, \boxed{-2}"),
  (r"137 \frac{1}{2}", "137.5"), (r"11,\! 111,\! 111,\! 100", "11111111100"),
  (r"11,\! 111,\! 111,\! 100", "11{,}111{,}111{,}100"), ("3.21", "321/100"),
  ("4.5", r"4\frac12"), ("p - q", "-q+p"),
  (r"\frac{11+9a}{20}", r"\frac{9a+11}{20}"), ("2k+2", "2(k+1)"),
  ("x^3+3x-6", "x^3+3x-6.0"), ("33", "c = 33"), ("5", r"5\text{ apples}"),
  (r"\frac{\pi}{2}", "1.5707963"),
  (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
  (r"5.4 \text{ cents}", "5.4 cents"), (r"12 \text{ m/s}^2", "12 m/s²"),
]  # fmt: skip
DIFFERENT = [
  ("28", "2.8."), ("28", "28.5."), ("28", "28!"), ("2^{-99}", "2^{-98}"),
  ("1/2004!", "1/2006!"), ("2^{-99}x", "2^{-98}x"),
  ("(2^{-99},1)", "(2^{-98},1)"), (r"\pi+10^{-20}", r"\pi"),
  (r"\sqrt{2}\cdot 10^{-30}", r"\sqrt{3}\cdot 10^{-30}"),
  (r"\begin{pmatrix} 2^{-60} \\ 1 \end{pmatrix}", r"\begin{pmatrix} 2^{-61} \\ 1 \end{pmatrix}"),
  ("10^{20}", "10^{20}+1"), ("0.0000001", "0.0000004"),
  (".0000672", "0.0000673"), (r"\frac{1}{3}", "0.33"),
  (r"\frac{1}{3}", "0.33333"), (r"\pi", "3.14"), ("1234567.25", "1234567"),
  ("1234567", "1234567.4"), ("52_8", "52_9"), ("52_8", "42"), ("52_8", "53_8"),
  ("4210_{5}", "4210_6"), ("52_8", "52 base 9"), ("52", "52_8"),
  ("1A_{16}", "1A_{12}"), (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
  (r"1, 2, \ldots, n", "1,2,n"), (r"1, 2, \ldots, n", r"1,2,\ldots,n+1"),
  (r"1, 2, \ldots, n", r"1,2,4,\ldots,n"), (r"1+2+\cdots+n", r"1+3+\cdots+n"),
  (r"2\sqrt5", "2√6"), (r"(-\infty, 2) \cup (3, \infty)", "(−∞, 2) ∪ (4, ∞)"),
  ("3R^2", "3R³"), (r"120^\circ", "60°"), (r"\text{June 20}", "June 21"),
  (r"\text{June 20}", "20"), ("east", "seat"), (r"\text{east}", "seat"),
  (r"\text{east}", r"\text{west}"), (r"\text{(C)}", "B"), ("abc", "abd"),
  (r"(-\infty,3)", r"x\le 3"), ("[2,4]", r"2 < x \le 4"),
  (r"(-\infty, 2) \cup (3, \infty)", "x<2 or x>4"), ("x<3", "y<3"),
  ("3, 5, 7", r"\boxed{3}, \boxed{5}"),
  ("7", r"\boxed{3}, \boxed{5}, \boxed{7}"), (r"12.5\%", "1.25"),
  ("x^2-1", "(x-1)(x-1)"), ("28", "2.8.0"), (r"\pi", r"\frac{22}{7}"),
  (r"\sqrt{2}", r"\frac{99}{70}"), ("e^{-50}", "e^{-51}"), ("e^{-50}", "0"),
  ("10^{-20}", "0"), (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}"),
  ("[2^{-60}, 1]", "[2^{-61}, 1]"), (r"\{10^{-18}, 1\}", r"\{10^{-19}, 1\}"),
  ("y = 2^{-60}x", "y = 2^{-61}x"), ("x=2^{-60}", "x=2^{-61}"),
  ("10^{-20}i", r"2\cdot 10^{-20}i"), ("x^2+10^{-20}", "x^2"),
  ("0.00000012", "0.00000013"), ("1.0000001", "1.0000002"),
  ("(0.0000001, 2)", "(0.0000002, 2)"), (r"\frac{2}{3}", "0.6667"),
  ("100000", "100000.4"), (r"\sqrt{51}", "7.14"), ("204_5", "204_{6}"),
  ("204_5", "54_{10}"), ("204_5", r"204_{\text{six}}"), ("204_5", "205_{5}"),
  ("2516_8", "2516₉"), ("101_2, 110_2", "101_2, 110_3"), ("52_8", "52_a"),
  ("a_1", "a_2"), (r"\log_2 9", r"\log_3 9"),
  (r"2,4,6,\ldots", r"2,4,8,\ldots"), (r"2,4,6,\ldots", "2,4,6"),
  ("2,4,6", r"2,4,6,\ldots"), (r"1,2,4,\ldots,2^n", r"1,2,4,\ldots,2^{n+1}"),
  (r"\{1, 2, \ldots, n\}", r"\{1,2,\ldots,2n\}"),
  (r"1\cdot 2\cdots n", r"1\cdot 3\cdots n"),
  (r"11 \sqrt{5} + 11", "11√(5 + 11)"), (r"\sqrt{x+1}", "√x+1"),
  (r"x \ge 5", "x>5"), ("2^{10}", "2¹¹"), (r"\text{No}", "yes"),
  (r"\text{even}", "neve"), ("north", "thorn"), (r"\text{Friday}", "Saturday"),
  (r"\text{(B)}", r"\text{(E)}"), ("3", r"\text{three}"),
  ("(-2,1)", r"-2\le x<1"), ("x>2", r"[2,\infty)"),
  (r"(-\sqrt{3}, \sqrt{3})", r"x < \sqrt{3}"), ("5", "x<5"),
  ("1,-2", r"\boxed{1}; \boxed{2}"), ("-2", r"\boxed{1} and \boxed{-2}"),
  ("2k", "k"),
  (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.5 \end{pmatrix}"),
  (r"15\mbox{ cm}^2", "16 cm²"), (r"15\mbox{ cm}^2", "15x"),
  (r"5.4 \text{ cents}", "5.5 cents"),
]  # fmt: skip


def judged_as(pairs, verdict):
  """Those of (gold answer, answer) pairs whose verdict is another one."""
  found = TASKS["math500"].judge(
    [
      (
        {"ground_truth": gold},
        answer if "boxed" in answer else f"<answer>{answer}</answer>",
      )
      for gold, answer in pairs
    ]
  )
  assert not [v for v in found if v.reason.startswith(base.NO_VERDICT)]
  return [
    pair
    for pair, each in zip(pairs, found, strict=True)
    if each.correct != verdict
  ]


UNICODE = {
  "\\pi": "π", "\\infty": "∞", "\\cup": "∪", "\\pm": "±", "\\in": "∈",
  "^\\circ": "°", "\\le": "≤", "\\left": "", "\\right": "", "\\cdot": "⋅",
  "\\times": "×", "\\{": "{", "\\}": "}", "-": "−", "^2": "²", "^3": "³",
  "^4": "⁴", "^5": "⁵", "^6": "⁶", "^7": "⁷", "^8": "⁸", "_5": "₅", "_6": "₆",
  "_8": "₈", "_9": "₉", "_{5}": "₅",
}  # fmt: skip


def in_unicode(text):
  """An answer as it is typed without LaTeX, None where that has no way."""
  text = re.sub(r"\\sqrt\{([0-9]+)\}", r"√\1", text)
  text = re.sub(r"\\sqrt([0-9])", r"√\1", text)
  text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
  for latex, sign in sorted(UNICODE.items(), key=lambda pair: -len(pair[0])):
    text = re.sub(re.escape(latex) + r"(?![a-z])", sign, text)
  return None if "\\" in text or text.isascii() else text


class TestMath500:
  @pytest.mark.parametrize(
    "completion",
    [
      "0.5",
      r"\boxed{\frac{1}{2}}",
      r"<answer>\boxed{\dfrac12}</answer>",
      r"<answer>\frac{2}{4}</answer>",
      r"<answer>\boxed{0.5</answer>",
      r"\boxed{3} no, \boxed {.5}",
      r"so \boxed 0.5$ it is",
      r"<answer>\boxed{ \frac { 50 } { 100 } }</answer><|eot_id|>",
    ],
  )
  def test_answers_that_need_no_worker(self, completion, monkeypatch):
    monkeypatch.setattr(math500_module, "_ask", None)
    verdict = math500(completion)
    assert verdict.correct and verdict.reward == 1.0, verdict
    assert verdict.parts == {"correct": 1.0, "format": 1.0}

  @pytest.mark.parametrize(
    "completion",
    [
      "",
      "the answer is 0.5",
      r"\boxed{1}",
      r"\boxed{0.5",
      r"\boxed{0.5} or \boxed{",
      r"\boxed{\frac{1}{0}}" + " " * 100 + r"\boxed{2}",
      "<answer></answer>0.5",
      "<answer>0.5</answer><answer>2</answer>",
      r"\boxed{9^{9^{9}}}",
      r"\boxed{99999!}",
      r"\boxed{(3!)!}",
      r"\boxed{2^{1000000}}",
      r"\boxed{((2^{999})^{999})^{999}}",
      r"\boxed{(a+b+c+d)^{300}}",
      r"\boxed{x^{1000}-(x+1)^{1000}}",
      r"\boxed{\left(\frac{1}{3}+x\right)^{999}}",
      r"\boxed{\int_0^1 x^{99999} dx}",
      r"\boxed{\prod_{n=1}^{99999} n}",
      r"\boxed{\binom{99999999}{4999999}}",
      "\\boxed{" + "- " * 500 + "5}",
      "<answer>" + "0.5 " * 1000 + "</answer>",
    ],
  )
  def test_wrong_answers_that_need_no_worker(self, completion, monkeypatch):
    monkeypatch.setattr(math500_module, "_ask", None)
    verdict = math500(completion)
    assert not verdict.correct and verdict.reward == 0.0, verdict

  @pytest.mark.parametrize(
    "answer",
    [
      "x^5-x^4+x^3", "e^{x^2}", "a^{b^{c}}", "2^{1994}", "10!", "e^{2\\pi i}",
      "(x^2+1)^{3}", "\\binom{100}{50}", "(1.01)^{365}", "x^{2012}+1", "a - -b",
      "2^{100} + 3^{100}", "\\sum_{k=1}^{100} k^2", "(-1)^{2n}",
      "\\binom{2005}{3}", "7! \\times 2!", "x^{2^n}", "\\sqrt[3]{x^2}+y^2z^2",
    ],
  )  # fmt: skip
  def test_what_can_be_written_down_is_compared(self, answer):
    assert not math500_module.explodes(answer)

  def test_what_is_the_same_is_right(self):
    assert judged_as(SAME, True) == []

  def test_what_is_another_thing_is_wrong(self):
    assert judged_as(DIFFERENT, False) == []

  def test_every_published_answer_may_end_in_a_full_stop(self, shared):
    rows = rows_of(shared / "data/math500_rebuilt.jsonl")
    golds = sorted({row["answer"] for row in rows})
    pairs = [(gold, f"{gold}.") for gold in golds]
    pairs += [(gold, f"$ {gold} $,") for gold in golds]
    assert judged_as(pairs, True) == []

  def test_every_published_answer_may_be_in_unicode(self, shared):
    rows = rows_of(shared / "data/math500_rebuilt.jsonl")
    golds = sorted({row["answer"] for row in rows})
    pairs = [(gold, in_unicode(gold)) for gold in golds if in_unicode(gold)]
    assert len(pairs) > 80
    assert judged_as(pairs, True) == []
    others = [(gold, f"{answer}+3") for gold, answer in pairs]
    assert judged_as(others, False) == []

  def test_what_math_verify_decides(self):
    pairs = {
      (r"15\mbox{ cm}^2", "15"): True,
      (r"\text{(C)}", "C"): True,
      (r"10,\!080", r"7! \times 2!"): True,
      (r"x \in [-2,7]", "[-2, 7]"): True,
      ("3, 5, 7", "3, 7, 5"): True,
      ("5", "5, 6"): False,
      ("5", r"\frac"): False,
      ("5", r"\input{/etc/passwd}"): False,
      (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{3})"): False,
      (r"\frac{1}{3}", "0.33"): False,
    }
    judged = TASKS["math500"].judge(
      [({"ground_truth": gold}, rf"\boxed{{{a}}}") for gold, a in pairs]
    )
    assert [v.correct for v in judged] == list(pairs.values())

  def test_a_comparison_that_does_not_end_is_wrong_and_says_so(
    self, monkeypatch
  ):
    monkeypatch.setattr(
      math500_module,
      "_pool",
      lambda: workers.Workers(
        "time:sleep", 1, workers.Limits(time_s=0.2), quiet=True
      ),
    )
    monkeypatch.setattr(
      math500_module, "_ask", lambda calls: math500_module._pool().map([(9,)])
    )
    verdict = math500(r"\boxed{x}")
    assert not verdict.correct and verdict.reward == 0.0
    assert verdict.reason == "no verdict: took longer than 0.2 s"

  def test_published_rows_are_read(self, shared):
    source = str(shared / "data/math500_rebuilt.jsonl")
    settings = base.DataSettings(source=source)
    examples = TASKS["math500"].load("test", settings)
    assert len(examples) == 500
    rest = [
      len(TASKS["math500"].load(split, settings))
      for split in ("train", "validation")
    ]
    assert sum(rest) == 500 and rest[1] > 10

  def test_the_answer_may_stand_in_the_solution(self, tmp_path):
    row = {"problem": "a", "solution": r"so \boxed{x^2}", "level": 3}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    settings = base.DataSettings(source=str(tmp_path / "a.jsonl"))
    (example,) = TASKS["math500"].load("test", settings)
    assert example == {"question": "a", "ground_truth": "x^2", "level": 3}

  @pytest.mark.parametrize(
    ("row", "message"),
    [
      ({"problem": "a"}, r"a.jsonl:1: expected a field 'solution'"),
      ({"problem": "a", "solution": "5"}, r"a.jsonl:1: expected a solution"),
      ({"problem": "a", "answer": 5}, r"a.jsonl:1: expected text"),
      ({"problem": "a", "answer": " "}, r"a.jsonl:1: .*empty"),
      ({"problem": "a", "answer": "{"}, r"a.jsonl:1: the answer '{' cannot be"),
    ],
  )
  def test_malformed_rows_name_file_and_line(self, tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    settings = base.DataSettings(source=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=message):
      TASKS["math500"].load("test", settings)


class TestD1:
  @hypothesis.given(
    st.text(alphabet="0123456789+-*/(). \n", max_size=16).filter(
      lambda text: not re.search(r"\d{4}|\*\*[^+]*\*\*|\*\*[ (]*\d{3}", text)
    )
  )
  @hypothesis.settings(max_examples=1000, deadline=None)
  @pytest.mark.filterwarnings("ignore::SyntaxWarning")
  def test_values_are_those_of_python(self, text):
    try:
      expected = eval(text.strip(), {"__builtins__": None}, {})
    except Exception:
      expected = None
    if not isinstance(expected, int | float | complex):
      expected = None
    found = d1.python_value(text)
    assert found == expected or (found != found and expected != expected)
    assert type(found) is type(expected)

  @pytest.mark.parametrize(
    ("text", "value"),
    [
      ("2**3**2", 512),
      ("-2**2", -4),
      ("2**-1", 0.5),
      ("7//2", 3),
      ("-7//2", -4),
      (".5*4", 2.0),
      ("1.", 1.0),
      ("(3+\n4)", 7),
      ("3\n+4", None),
      ("007", None),
      ("00", 0),
      ("9**9**9**9", None),
      ("2(3)", None),
      ("1/0", None),
      ("0**-1", None),
      ("٣", None),
    ],
  )
  def test_value(self, text, value):
    assert d1.python_value(text) == value

  @hypothesis.given(
    st.lists(
      st.sampled_from(["<answer>", "</answer>", "a", " ", "b"]), max_size=12
    ).map("".join)
  )
  def test_tags_are_those_of_a_lazy_expression(self, text):
    pattern = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
    found = pattern.findall(text)
    assert d1.last_tag(text) == (found[-1] if found else None)
    assert d1.first_tag(text) == (found[0] if found else None)

  @hypothesis.given(st.text(alphabet="0123(+= a.", max_size=16))
  def test_the_left_side_is_that_of_a_search(self, text):
    found = re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", text)
    expected = found.group(1).strip() if found else text
    assert d1._left_side(text) == expected

  @hypothesis.given(
    st.lists(
      st.sampled_from(
        ["<answer>", "</answer>", "```", "`", "1234", "4321432143214321", " ",
         "\n", "x", "<|eot_id|>", "<|endoftext|>"]
      ),
      max_size=10,
    ).map("".join)
  )  # fmt: skip
  @hypothesis.settings(max_examples=1000, deadline=None)
  def test_grids_are_those_of_the_five_patterns(self, text):
    ends = r"<\|eot_id\|>|<\|endoftext\|>"
    expected = ""
    for pattern in (
      r"<answer>.*?```\s*([\d\s]+)```",
      rf"<answer>(.*?)(?:{ends}|</answer>)",
      rf"</answer>\s*(.*?)(?:{ends}|$)",
      r".*?(\d{16})\s*</answer>",
      r"\b(\d{16})\b",
    ):
      found = re.search(pattern, text, re.DOTALL)
      expected = found.group(1).strip() if found else ""
      if expected:
        break
    assert d1.sudoku_answer(text) == "".join(expected.split())

  @hypothesis.given(
    st.lists(
      st.sampled_from(["\\boxed{", "}", "1", ".", "\n", "a"]), max_size=12
    ).map("".join)
  )
  def test_boxes_are_those_of_a_lazy_expression(self, text):
    assert list(d1._boxes(text)) == re.findall(r"\\boxed{(.*?)}", text)

  @hypothesis.given(
    st.lists(
      st.sampled_from(
        ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "a"]
      ),
      max_size=12,
    ).map("".join)
  )
  @hypothesis.settings(max_examples=1000, deadline=None)
  @hypothesis.example(
    "<reasoning></reasoning><answer></reasoning>\n<answer></answer>"
  )
  @hypothesis.example(
    "<reasoning>\na\n</reasoning>\n<answer>\na\n</answer>\n\n"
  )
  def test_format_rewards_are_those_of_the_patterns(self, text):
    strict = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    soft = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    parts = gsm8k(text, "d1").parts
    assert parts["strict_format"] == 0.5 * bool(re.match(strict, text))
    assert parts["soft_format"] == 0.5 * bool(re.match(soft, text))

  def test_known_quirks_are_kept(self):
    assert countdown("Try 3+4*5 = 99. Done.", "d1").correct
    assert not countdown("<answer>3+4*5</answer>", "d1").correct
    assert countdown("<answer>3+4*5</answer>", "d1").reward == 1.0
    assert countdown(r"<answer>\boxed{3+4*5}</answer>", "d1").reward == 0.1
    assert countdown("<answer></answer>", "d1").reward == 0.1
    example = {"ground_truth": [[2, 3], 8]}
    assert TASKS["countdown"].verify(example, r"\boxed{2 ** 3}", "d1").correct


class TestRecordings:
  def test_countdown_verdicts_and_rewards(self, shared):
    verify = TASKS["countdown"].verify
    for row in rows_of(shared / "fixtures/verifiers/countdown.jsonl"):
      strict = verify(row, row["completion"])
      assert strict.correct == row["careful_correct"], row["id"]
      if not row["disputed"]:
        assert strict.correct == row["reference_eval"]["correct"], row["id"]
      same = verify(row, row["completion"], "d1")
      assert same.correct == row["reference_eval"]["correct"], row["id"]
      reward = verify(row, row["train_text"], "d1").reward
      assert reward == row["reference_reward"]["countdown"], row["id"]

  def test_sudoku_verdicts_and_rewards(self, shared):
    verify = TASKS["sudoku"].verify
    for row in rows_of(shared / "fixtures/verifiers/sudoku.jsonl"):
      strict = verify(row, row["completion"])
      assert strict.correct == row["careful_solved"], row["id"]
      recorded = row["reference_eval"]["accuracy"]
      careful = row.get("careful_fraction")
      if careful is not None:
        assert strict.parts["accuracy"] == pytest.approx(careful), row["id"]
      if not row["disputed"]:
        assert strict.parts["accuracy"] == pytest.approx(recorded), row["id"]
      same = verify(row, row["completion"], "d1")
      assert same.parts["accuracy"] == pytest.approx(recorded), row["id"]
      reward = verify(row, row["train_text"], "d1").reward
      assert reward == pytest.approx(row["reference_reward"]["sudoku"]), row

  def test_gsm8k_verdicts_and_rewards(self, shared):
    verify = TASKS["gsm8k"].verify
    for row in rows_of(shared / "fixtures/verifiers/gsm8k.jsonl"):
      strict = verify(row, row["completion"])
      assert strict.correct == row["careful_correct"], row["id"]
      if not row["disputed"]:
        assert strict.correct == row["reference_eval"]["correct"], row["id"]
      same = verify(row, row["completion"], "d1")
      assert same.correct == row["reference_eval"]["correct"], row["id"]
      parts = verify(row, row["train_text"], "d1").parts
      assert parts == pytest.approx(row["reference_reward"]), row["id"]

  def test_math500_verdicts_and_rewards(self, shared):
    rows = rows_of(shared / "fixtures/verifiers/math500.jsonl")
    judge = TASKS["math500"].judge
    judged = judge([(row, row["completion"]) for row in rows])
    for row, strict in zip(rows, judged, strict=True):
      # The disputed ones too: there math-verify is what is right.
      assert strict.correct == row["math_verify_0_9_0"], row["id"]
    judged = judge([(row, row["completion"]) for row in rows], "d1")
    for row, same in zip(rows, judged, strict=True):
      assert same.correct == row["reference_eval"]["correct"], row["id"]
    judged = judge([(row, row["train_text"]) for row in rows], "d1")
    for row, same in zip(rows, judged, strict=True):
      assert same.parts == row["reference_reward"], row["id"]

  def test_150_answers_in_latex_a_second_on_two_workers(self, shared):
    rows = rows_of(shared / "fixtures/verifiers/math500.jsonl")
    pool = math500_module._pool()
    pool.start()

    def seconds():
      return time.process_time() + sum(
        cpu_seconds(worker.process.pid) for worker in pool._slots if worker
      )

    started = seconds()
    TASKS["math500"].judge([(row, row["completion"]) for row in rows])
    # Processor time, halved: what two workers with a core each would take.
    assert len(rows) / (seconds() - started) * 2 >= 150

  def test_hostile_completions(self, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for row in rows_of(shared / "fixtures/hostile/hostile.jsonl"):
      if row["task"] not in EXAMPLES:
        continue
      text = row["completion"]
      if isinstance(text, dict):
        text = "".join(piece * times for piece, times in text["parts"])
      for protocol in base.PROTOCOLS:
        started = time.process_time()
        verdict = TASKS[row["task"]].verify(row, text, protocol)
        assert time.process_time() - started < 0.5, row["id"]
        assert base.NO_VERDICT not in verdict.reason, row["id"]
        if protocol == "d1" or row["expected"] is None:
          continue
        assert verdict.correct == row["expected"], row["id"]
        fraction = row.get("expected_fraction")
        if fraction is not None:
          assert verdict.parts["accuracy"] == fraction, row["id"]
    assert list(tmp_path.iterdir()) == []

  def test_published_files_load_whole(self, shared):
    for task, name, count in (
      ("countdown", "countdown_cd3_test.jsonl", 256),
      ("countdown", "countdown3_generated_train.jsonl", 4000),
      ("sudoku", "sudoku4x4_test_d1.csv", 500),
      ("sudoku", "sudoku4x4_test_spg_new.csv", 256),
    ):
      settings = base.DataSettings(source=str(shared / "data" / name))
      assert len(TASKS[task].load("test", settings)) == count

  @pytest.mark.parametrize(("task", "protocol"), LINEAR)
  def test_recorded_completions_a_second(self, shared, task, protocol):
    rows = rows_of(shared / f"fixtures/verifiers/{task}.jsonl")
    least = 20_000 if task in GENERATED else 10_000
    assert rate(task, [(r, r["completion"]) for r in rows], protocol) >= least


def cpu_seconds(process):
  """Processor time of another process."""
  try:
    with open(f"/proc/{process}/stat") as handle:
      fields = handle.read().rpartition(")")[2].split()
  except OSError:
    pytest.skip("no /proc to read processor times of workers from")
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rate(task, pairs, protocol):
  """Completions a second of processor time, best of five rounds."""
  verify, best = TASKS[task].verify, 0.0
  for _ in range(5):
    started = time.process_time()
    for example, text in pairs:
      verify(example, text, protocol)
    best = max(best, len(pairs) / (time.process_time() - started))
  return best


@pytest.fixture(scope="module")
def examples():
  """A thousand generated examples of each task."""
  from rspo_jax.datasets import countdown as countdown_data
  from rspo_jax.datasets import sudoku as sudoku_data
  from rspo_jax.tasks import countdown, sudoku

  return {
    "countdown": countdown.Examples(
      countdown_data.generate(0, "train", 1000).columns()
    ),
    "sudoku": sudoku.Examples(sudoku_data.generate(0, "train", 1000).columns()),
  }


PIECES = [
  "<answer>", "</answer>", "<answer", "\\boxed{", "\\boxed ", "}", "{", "(",
  ")", "3", "4", "5", "+", "*", "/", "-", "=", "23", "4312213434211243", "```",
  " ", "\n", "<|endoftext|>", "<|", "\\times", "$", "\x00", "\ud800", "é", "٣",
  ".", "**", "0", "9" * 30, "\\frac", "^", "!", "x", "\\sqrt",
]  # fmt: skip


ANY = st.one_of(
  st.text(max_size=60),
  st.lists(st.sampled_from(PIECES), max_size=24).map("".join),
)


def check_verdict(task, protocol, verdict):
  """What holds of every verdict on every completion."""
  verdict.reason.encode()
  most = 1.0
  if protocol == "d1":  # sums of five and of two rewards
    most = {"gsm8k": 4.0, "math500": 2.75}.get(task, 1.0)
  assert -1.0 <= verdict.reward <= most
  if most == 1.0:
    assert all(0.0 <= value <= 1.0 for value in verdict.parts.values())


@hypothesis.given(completion=ANY)
@hypothesis.settings(max_examples=1000, deadline=None)
def test_any_completion_gets_a_verdict(completion):
  for task, protocol in LINEAR:
    verdict = TASKS[task].verify(EXAMPLES[task], completion, protocol)
    check_verdict(task, protocol, verdict)


@hypothesis.given(completions=st.lists(ANY, min_size=40, max_size=40))
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_completion_gets_a_verdict_from_the_workers(completions):
  boxed = [f"\\boxed{{{completion}}}" for completion in completions[::2]]
  pairs = [(MATH500, text) for text in completions[1::2] + boxed]
  for verdict in TASKS["math500"].judge(pairs):
    check_verdict("math500", "strict", verdict)


def random_completion(rng):
  """Pieces of answers and arbitrary characters, faster than hypothesis."""
  pieces = rng.choices(PIECES, k=rng.randrange(40))
  if rng.random() < 0.3:
    pieces += [chr(rng.randrange(0x11000)) for _ in range(rng.randrange(20))]
    rng.shuffle(pieces)
  return "".join(pieces)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("task", "protocol"),
  [(t, p) for t in sorted(EXAMPLES) for p in base.PROTOCOLS],
)
def test_100000_random_completions_get_a_verdict(task, protocol):
  rng = random.Random(f"{task} {protocol}")
  for _ in range(100):
    pairs = [(EXAMPLES[task], random_completion(rng)) for _ in range(1000)]
    for verdict in TASKS[task].judge(pairs, protocol):
      check_verdict(task, protocol, verdict)


@pytest.mark.parametrize("protocol", base.PROTOCOLS)
@pytest.mark.parametrize("task", sorted(EXAMPLES))
class TestEveryTask:
  @pytest.mark.parametrize(
    "unit",
    [
      "(", "\\boxed{", "\\boxed ", "<answer>", "</answer>", "1 ", "=", "```",
      "1=2", "<|", "{", "{}", "é", "-", ")</answer> ", "<answer>(</answer>",
      "<answer>1+", "\\fbox{}", " ",
    ],
  )  # fmt: skip
  def test_a_megabyte_of_garbage_takes_50_ms_at_most(
    self, task, protocol, unit
  ):
    text = unit * (1_000_000 // len(unit))
    for garbage in (text, f"<answer>{text}</answer>", f"<answer>```{text}"):
      best = float("inf")
      for _ in range(3):
        started = time.process_time()
        TASKS[task].verify(EXAMPLES[task], garbage, protocol)
        best = min(best, time.process_time() - started)
      assert best <= 0.05


@pytest.mark.parametrize("protocol", base.PROTOCOLS)
@pytest.mark.parametrize("task", GENERATED)
def test_20000_compact_completions_a_second(task, protocol, examples):
  rng = np.random.default_rng(0)
  pairs = [(e, TASKS[task].corrupt(e, rng)) for e in examples[task]]
  assert rate(task, pairs, protocol) >= 20_000


@pytest.mark.parametrize("task", sorted(EXAMPLES))
class TestMistakesOfCallers:
  def test_an_unknown_protocol_is_named(self, task):
    with pytest.raises(ValueError, match=r"protocol='d2'.*strict, d1"):
      TASKS[task].verify(EXAMPLES[task], "", "d2")

  def test_an_unknown_style_is_named(self, task):
    with pytest.raises(ValueError, match=r"'d9'.*compact"):
      TASKS[task].prompt(EXAMPLES[task], "d9")

  def test_an_unknown_split_is_named(self, task):
    with pytest.raises(ValueError, match=r"split='dev'.*validation"):
      TASKS[task].load("dev", base.DataSettings())


def test_verifying_imports_neither_jax_nor_dataset_libraries():
  import subprocess
  import sys

  code = (
    "import sys, rspo_jax.tasks;"
    "print([m for m in ('jax','grain','tensorflow_datasets','tensorflow',"
    "'sympy','math_verify')"
    " if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"
