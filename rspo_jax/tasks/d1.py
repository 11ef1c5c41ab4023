"""Verdicts and rewards as the d1 line of work computes them, quirks included.

Papers of that line compare numbers made by one evaluation script and one set of
training rewards. This module gives the same verdicts, so that numbers compare,
without their dangers: nothing is run, and every search takes linear time. What
is kept on purpose:

- Countdown, verdict: without any box the whole completion is the answer, and
  the first `expression=number` in it is what counts; <answer> tags are looked
  at only when a box is left open. The right side of `=` is ignored, digit runs
  are counted wherever they stand (so 1.5 holds the numbers 1 and 5), // and **
  are allowed, and 1e-5 off is on target.
- Countdown, reward: the last tag; 0.1 for anything in it, a box included.
- Sudoku: only cells that were empty are compared, with one stored solution;
  answers are padded with zeros or cut to 16 characters. The verdict reads the
  first tag and removes white space only, the reward reads the last tag and
  keeps digits only.
- MATH: answers are compared as strings in a normal form, so that unreduced
  fractions and units miss; without any box the whole completion is the answer.

Rewards are computed on the text as given. That code strips special tokens when
it decodes, so callers who hold raw text strip them first.
"""

import re

from rspo_jax.tasks import answers, arithmetic, base

_TOLERANCE = 1e-5

_OPENING, _CLOSING = "<answer>", "</answer>"
_ENDS = ("<|eot_id|>", "<|endoftext|>")


def first_tag(text: str) -> str | None:
  """Returns what the first closed answer tag holds."""
  start = text.find(_OPENING)
  if start < 0:
    return None
  end = text.find(_CLOSING, start + len(_OPENING))
  return text[start + len(_OPENING) : end] if end >= 0 else None


def last_tag(text: str) -> str | None:
  """Returns what the last answer tag holds when tags are read from the left."""
  content, position = None, 0
  while True:
    start = text.find(_OPENING, position)
    end = text.find(_CLOSING, start + len(_OPENING)) if start >= 0 else -1
    if end < 0:
      return content
    content = text[start + len(_OPENING) : end]
    position = end + len(_CLOSING)


def last_box(text: str) -> str | None:
  r"""Returns the last box's content, the whole text without any box.

  None when that box is left open. `\boxed ` with a space takes everything up to
  the next dollar sign; \fbox keeps its command.
  """
  if "\\boxed " in text:
    return text.rpartition("\\boxed ")[2].partition("$")[0]
  start = text.rfind("\\boxed")
  if start < 0:
    start = text.rfind("\\fbox")
  if start < 0:
    return text
  depth = 0
  for brace in re.compile("[{}]").finditer(text, start):
    depth += 1 if brace.group() == "{" else -1
    if depth == 0:
      box = text[start : brace.end()]
      left = "\\boxed{"
      return box[len(left) : -1] if box.startswith(left) else box
  return None


_RUN = re.compile(r"[0-9+\-*/() ]+(=?)")


def _left_side(text: str) -> str:
  """Returns the first run of arithmetic before `=` and a number, or the text."""
  for run in _RUN.finditer(text):
    after = text[run.end() : run.end() + 1]
    if run.group(1) and after and after in "0123456789. ":
      return run.group()[:-1].strip()
  return text


def _same_numbers(text: str, numbers) -> bool:
  try:
    return sorted(map(int, re.findall(r"\d+", text))) == sorted(numbers)
  except ValueError:  # more digits than Python converts
    return False


def _on_target(value, target) -> bool:
  if value is None:
    return False
  try:
    return bool(abs(value - target) < _TOLERANCE)
  except (ArithmeticError, TypeError):
    return False


def countdown(example: base.Example, completion: str) -> base.Verdict:
  """Judges a Countdown completion.

  Returns:
    Verdict whose `correct` is the evaluation script's and whose `reward` is the
    training reward: 1, 0.1 or 0. Parts: `correct`, `countdown` (the reward).
  """
  numbers, target = example["ground_truth"]
  text = answers.cut(completion)

  equation = last_box(text)
  if equation is None:
    inside = first_tag(text)
    equation = text if inside is None else inside.strip()
  for latex, plain in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
    equation = equation.replace(latex, plain)
  equation = _left_side(equation)
  correct = _same_numbers(equation, numbers) and _on_target(
    arithmetic.python_value(equation), target
  )

  tagged = last_tag(text)
  if tagged is None:
    reward = 0.0
  else:
    tagged = tagged.strip()
    hit = _same_numbers(tagged, numbers) and _on_target(
      arithmetic.python_value(tagged), target
    )
    reward = 1.0 if hit else 0.1
  parts = {"correct": float(correct), "countdown": reward}
  return base.Verdict(reward, correct, parts, f"read {equation[:40]!a}")


_CELLS = re.compile(r"[\d\s]+")
_SPACE_BEFORE = re.compile(r"(\d{16})\s*\Z")
_WORD = re.compile(r"\b(\d{16})\b")


def sudoku_answer(text: str) -> str:
  """Finds the grid as the evaluation script does: five patterns in turn."""
  for find in (_fenced, _to_end_of_tag, _after_tag, _before_closing, _word):
    found = find(text)
    if found:
      return "".join(found.split())
  return ""


def _fenced(text: str) -> str:
  """The first fenced block of digits after the first opening tag."""
  start = text.find(_OPENING)
  if start < 0:
    return ""
  fence = text.find("```", start + len(_OPENING))
  while fence >= 0:
    cells = _CELLS.match(text, fence + 3)
    if cells and text.startswith("```", cells.end()):
      return cells.group().strip()
    fence = text.find("```", fence + 1)
  return ""


def _first_of(text: str, ends, start: int) -> int:
  found = [i for i in (text.find(end, start) for end in ends) if i >= 0]
  return min(found, default=-1)


def _to_end_of_tag(text: str) -> str:
  """From the first opening tag to an end token or the closing tag."""
  start = text.find(_OPENING)
  if start < 0:
    return ""
  start += len(_OPENING)
  end = _first_of(text, (*_ENDS, _CLOSING), start)
  return text[start:end].strip() if end >= 0 else ""


def _after_tag(text: str) -> str:
  """From the first closing tag to an end token or the end."""
  start = text.find(_CLOSING)
  if start < 0:
    return ""
  start += len(_CLOSING)
  end = _first_of(text, _ENDS, start)
  return text[start : end if end >= 0 else None].strip()


def _before_closing(text: str) -> str:
  """Sixteen digits right before a closing tag."""
  end = text.find(_CLOSING)
  while end >= 0:
    stop = end
    while stop and text[stop - 1].isspace():
      stop -= 1
    cells = text[max(0, stop - 16) : stop]
    if _SPACE_BEFORE.match(cells):
      return cells
    end = text.find(_CLOSING, end + 1)
  return ""


def _word(text: str) -> str:
  """Sixteen digits that stand alone."""
  found = _WORD.search(text)
  return found.group(1) if found else ""


def _share(cells: str, puzzle: str, gold: str) -> float:
  """Returns the share of empty cells that agree, cells padded or cut to 16."""
  empties = puzzle.count("0")
  if not cells or not empties:
    return 0.0
  cells = cells[:16].ljust(16, "0")
  triples = zip(puzzle, cells, gold, strict=True)
  return sum(p == "0" and a == g for p, a, g in triples) / empties


def sudoku(example: base.Example, completion: str) -> base.Verdict:
  """Judges a sudoku completion.

  Returns:
    Verdict whose `correct` says that the evaluation script finds all empty
    cells right and whose `reward` is the training reward. Parts: `accuracy`
    (the script's share of empty cells), `sudoku` (the reward).
  """
  puzzle, gold = example["puzzle"], example["ground_truth"]
  text = answers.cut(completion)
  found = sudoku_answer(text)
  accuracy = _share(found, puzzle, gold)
  tagged = last_tag(text)
  digits = "".join(c for c in tagged or "" if c.isdigit())
  reward = _share(digits, puzzle, gold)
  parts = {"accuracy": accuracy, "sudoku": reward}
  return base.Verdict(reward, accuracy == 1.0, parts, f"read {found[:20]!a}")


_FIRST_NUMBER = re.compile(r"-?\d+\.?\d*")
_BOX = "\\boxed{"
_STOP = re.compile(r"[}\n]")


def _boxes(text: str):
  """Yields what boxes hold up to their first brace, on one line."""
  start, stop = text.find(_BOX), None
  while start >= 0:
    inside = start + len(_BOX)
    if stop is None or stop.start() < inside:
      stop = _STOP.search(text, inside)
      if stop is None:
        return
    following = start + 1
    if stop.group() == "}":
      yield text[inside : stop.start()]
      following = stop.end()
    start = text.find(_BOX, following)


def _float(text: str, which: int) -> float | None:
  """Reads a float, or else the first (0) or last (-1) number in the text."""
  try:
    return float(text)
  except ValueError:
    numbers = _FIRST_NUMBER.findall(text)
    return float(numbers[which]) if numbers else None


def gsm8k_answer(text: str) -> float | None:
  """Finds the answer as the evaluation script does: boxes, then the tag."""
  for content in _boxes(text):
    content = content.strip()
    if content.strip("."):
      value = _float(content, 0)
      if value is not None:
        return value
  inside = first_tag(text)
  return _float(inside.strip(), -1) if inside and inside.strip() else None


# In the format rewards a dot matches no line break, so that reasoning of several
# lines never earns them.
_STRICT_FORMAT = re.compile(
  r"<reasoning>\n[^\n]*\n</reasoning>\n<answer>\n[^\n]*\n</answer>\n\n?\Z"
)
_REASONED = re.compile(r"</reasoning>\s*<answer>")


def _soft_format(text: str) -> bool:
  """Whether the text begins with both blocks in order, each on one line."""
  opening = "<reasoning>"
  if not text.startswith(opening):
    return False
  line_end = text.find("\n")
  line_end = len(text) if line_end < 0 else line_end
  # Both are looked up again only once passed, which keeps the loop linear.
  closing = newline = -1
  for between in _REASONED.finditer(text, len(opening)):
    if between.start() > line_end:
      return False
    start = between.end()
    if closing < start:
      closing = text.find(_CLOSING, start)
      if closing < 0:
        return False
    if newline < start:
      newline = text.find("\n", start)
      newline = len(text) if newline < 0 else newline
    if closing < newline:
      return True
  return False


def _tag_count(text: str) -> float:
  """An eighth for each tag on its own line, less what follows the answer."""
  count = 0.0
  if text.count("<reasoning>\n") == 1:
    count += 0.125
  if text.count("\n</reasoning>\n") == 1:
    count += 0.125
  if text.count("\n<answer>\n") == 1:
    count += 0.125
    count -= len(text.rpartition("\n</answer>\n")[2]) * 0.001
  if text.count("\n</answer>") == 1:
    count += 0.125
    count -= (len(text.rpartition("\n</answer>")[2]) - 1) * 0.001
  return count


def gsm8k(example: base.Example, completion: str) -> base.Verdict:
  """Judges a GSM8K completion.

  Returns:
    Verdict whose `correct` is the evaluation script's (never for a gold answer
    of None, as that script leaves negative ones) and whose `reward` is the sum
    of the five training rewards, which are its parts: `xmlcount`,
    `soft_format`, `strict_format`, `int`, `correctness`.
  """
  text = answers.cut(completion)
  value = gsm8k_answer(text)
  gold = example.get("ground_truth")
  answer = example.get("answer_string")
  if answer is None and gold is not None:
    answer = f"{gold:g}" if gold != int(gold) else str(int(gold))
  tagged = text.rpartition(_OPENING)[2].partition(_CLOSING)[0].strip()
  parts = {
    "xmlcount": _tag_count(text),
    "soft_format": 0.5 * _soft_format(text),
    "strict_format": 0.5 * bool(_STRICT_FORMAT.match(text)),
    "int": 0.5 * tagged.isdigit(),
    "correctness": 2.0 * (tagged == answer),
  }
  correct = value is not None and value == gold
  return base.Verdict(sum(parts.values()), correct, parts, f"read {value}")


def _spell_out(text: str, command: str, arguments: int) -> str:
  r"""Puts braces around bare one-character arguments: \frac12, \sqrt3.

  Raises:
    IndexError: the command ends the text.
  """
  head, *rest = text.split(command)
  parts = [head]
  for piece in rest:
    parts.append(command)
    if piece[0] == "{":
      parts.append(piece)
    elif arguments == 1:
      parts.append(f"{{{piece[0]}}}{piece[1:]}")
    elif len(piece) < 2:
      return text
    elif piece[1] == "{":
      parts.append(f"{{{piece[0]}}}{piece[1:]}")
    else:
      parts.append(f"{{{piece[0]}}}{{{piece[1]}}}{piece[2:]}")
  return "".join(parts)


_DROPPED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_PLAIN_RATIO = re.compile(r"(0|-?[1-9][0-9]{0,40})/(0|-?[1-9][0-9]{0,40})")


def normal_form(text: str) -> str:
  r"""Writes LaTeX answers that look alike in one way, by string alone.

  Raises:
    IndexError: \sqrt or \frac with nothing behind it.
    ValueError: more than one unit.
  """
  text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
  text = text.replace("tfrac", "frac").replace("dfrac", "frac")
  for dropped in _DROPPED:
    text = text.replace(dropped, "")
  value, *units = text.split("\\text{ ")
  if len(units) > 1:
    raise ValueError("more than one unit")
  text = value.replace("\\%", "")
  text = text.replace(" .", " 0.").replace("{.", "{0.")
  if not text:
    return text
  if text[0] == ".":
    text = "0" + text
  sides = text.split("=")
  if len(sides) == 2 and len(sides[0]) <= 2:
    text = sides[1]
  text = _spell_out(text, "\\sqrt", 1).replace(" ", "")
  text = _spell_out(text, "\\frac", 2)
  if text == "0.5":
    return "\\frac{1}{2}"
  ratio = _PLAIN_RATIO.fullmatch(text)
  return "\\frac{{{}}}{{{}}}".format(*ratio.groups()) if ratio else text


def same_form(answer: str, gold: str) -> bool:
  """Whether two answers have one normal form; else whether they are equal."""
  try:
    return normal_form(answer) == normal_form(gold)
  except (IndexError, ValueError):
    return answer == gold


def math500(example: base.Example, completion: str) -> base.Verdict:
  """Judges a MATH completion by its string.

  Returns:
    Verdict whose `correct` is the evaluation script's and whose `reward` is the
    sum of the two training rewards, which are its parts: `correctness_math`,
    `boxed_and_answer_tags`.
  """
  text = answers.cut(completion)
  gold = example["ground_truth"]
  box = last_box(text)
  found = box
  if found is None:
    inside = first_tag(text)
    found = inside.strip() if inside else None
  rewarded = box is not None and same_form(box, gold)
  parts = {
    "correctness_math": 2.0 * rewarded,
    "boxed_and_answer_tags": 0.75 if _OPENING in text else 0.25,
  }
  correct = found is not None and same_form(found, gold)
  reason = "no answer" if found is None else f"read {found[:40]!a}"
  return base.Verdict(sum(parts.values()), correct, parts, reason)
