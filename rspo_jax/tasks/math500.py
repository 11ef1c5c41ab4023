r"""MATH: competition problems whose answer is a LaTeX expression.

Strict verdict. The answer is what the last closed <answer> tag holds, in it the
last box; without a closed tag the last box; else the whole completion if it is
nothing but a number. Boxes with nothing but a comma, `and` or `or` between them
are one answer. Equal text, numbers, numbers in a base and words are decided
here and exactly (`latex`); everything else by math-verify, in worker processes
with limits of time and memory (`symbolic`). An answer over 1,000 characters is
none.
"""

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence

from rspo_jax import workers
from rspo_jax.datasets import downloads, files
from rspo_jax.tasks import answers, base, d1, latex, prompts

WEIGHTS = {"correct": 1.0, "format": 0.0}
STYLES = ("compact", *prompts.STYLES)

_MAX_ANSWER = 1000
_MAX_NUMBER = 100  # characters of a completion that is one
_TARGET = "rspo_jax.tasks.symbolic:call"
# A comparison takes some 8 ms. The first limit leaves the worker alive, the
# second covers one long operation that nothing can break off.
_LIMITS = workers.Limits(time_s=1.8, cpu_s=1.2, memory_bytes=2 << 30)

_BARE_BOX = re.compile(r"\\boxed ([^$\n{}]{1,100})(?:\$|\n|\Z)")
_FACTORIAL = re.compile(r"([0-9]+)[)}\s]*!")
_MANY_FACTORIALS = re.compile(r"![)}\s]*!")
_EXPONENT = re.compile(r"\^[{(\s]*-?([0-9]+)")
# (x+1)^{999} is multiplied out, and so is a product of a thousand factors.
_LARGE_POWER = re.compile(r"[)\]]\s*\^[{(\s]*-?[0-9]{3,}")
_LARGE_EXPONENTS = re.compile(r"\^[{(\s]*-?[0-9]{3,}")
_LARGE_ITERATION = re.compile(
  r"\\(?:int|sum|prod|binom|tbinom|dbinom)(?![a-z])"
)
_LARGE_NUMBER = re.compile(r"[0-9]{5,}")
_MANY_SIGNS = re.compile(r"(?:[-+]\s*){16}")
_LETTER = re.compile(r"(?<!\\)\b[a-z]\b|[0-9)}][a-z]\b", re.IGNORECASE)
_LETTERS = re.compile(r"[A-Za-z]+")
_DIGITS_ONLY = re.compile(r"[{(\s]*[0-9]")
_SPACE = re.compile(r"\s+|\\[,;!: ]")


@functools.cache
def _pool() -> workers.Workers:
  count = max(2, min(8, (os.cpu_count() or 1) // 2))
  return workers.Workers(_TARGET, count, _LIMITS, quiet=True)


def _ask(calls: Sequence[tuple]) -> list[workers.Outcome]:
  try:
    return _pool().map(calls)
  except workers.FunctionError as error:
    raise ValueError(
      "math500 compares answers by the package math-verify, which cannot be"
      f" used: {error} Install requirements-math.txt."
    ) from error


def final_answer(text: str) -> str | None:
  """Returns the part of a completion that counts as its answer."""
  inside = answers.last_tag(text) if "<answer>" in text else None
  if inside is None:
    found = _boxed(text) if "\\boxed" in text else None
    if found is None and len(text) <= _MAX_NUMBER:
      found = text if latex.number(latex.plain(text)) else None
  elif "\\boxed" in inside:
    found = _boxed(inside)
    if found is None:
      # The tag was closed, so the answer is there, whatever the box lacks.
      found = inside.rpartition("\\boxed")[2].strip().removeprefix("{")
  else:
    found = inside
  found = found.strip() if found else ""
  return found if 0 < len(found) <= _MAX_ANSWER else None


def _boxed(text: str) -> str | None:
  r"""Returns what the last box holds; `\boxed 5$` is one without braces.

  Of several boxes in one sentence it is what they hold, with commas between;
  what is the same number as one before is left out.
  """
  kept: list[str] = []
  for box in answers.last_boxes(text):
    if not any(_restates(each, box) for each in kept):
      kept.append(box)
  if kept:
    return ", ".join(kept)
  bare = _BARE_BOX.match(text, max(text.rfind("\\boxed"), 0))
  return bare and bare.group(1)


def _restates(one: str, other: str) -> bool:
  """Whether the content of a box is that of another one again."""
  left, right = latex.number(latex.plain(one)), latex.number(latex.plain(other))
  if left is None or right is None:
    return one.strip() == other.strip()
  return latex.same_number(left, right)


def explodes(answer: str) -> bool:
  """Whether the value of an answer may be too large to write down.

  A symbolic comparison computes such a power or factorial before it compares.
  The limits of the workers hold whatever slips through.
  """
  if any(len(digits) > 4 for digits in _FACTORIAL.findall(answer)):
    return True
  if _MANY_FACTORIALS.search(answer):
    return True
  if any(len(digits) > 5 for digits in _EXPONENT.findall(answer)):
    return True
  if _MANY_SIGNS.search(answer):
    return True
  if _LARGE_ITERATION.search(answer) and _LARGE_NUMBER.search(answer):
    return True
  if len(_LARGE_EXPONENTS.findall(answer)) > 2:
    return True
  if _LARGE_POWER.search(answer) and _LETTER.search(answer):
    return True
  # Exponents in exponents: more than two levels, or two that are all digits.
  exponents, depth = [], 0
  for i, character in enumerate(answer):
    if character == "^":
      exponents.append(depth)
      if len(exponents) > 2:
        return True
      if len(exponents) == 2 and _DIGITS_ONLY.match(answer, i + 1):
        base_of_tower = answer[:i].rpartition("^")[2]
        if not any(c.isalpha() for c in base_of_tower):
          return True
    elif character in "{(":
      depth += 1
    elif character in "})":
      depth -= 1
      exponents = [level for level in exponents if level < depth]
    elif exponents and exponents[-1] == depth and character in " +-*/=,":
      exponents.pop()
  return False


@dataclasses.dataclass(frozen=True, slots=True)
class _Answer:
  """An answer and what it reads as.

  Attributes:
    text: as `latex.plain` gives it.
    compact: without any space.
    number, measure, numeral, words: see `latex`; None where it is no such
      thing.
  """

  text: str
  compact: str
  number: latex.Number | None
  measure: latex.Number | None
  numeral: tuple[str, int] | None
  words: str | None


@functools.lru_cache(maxsize=4096)
def _read(answer: str) -> _Answer:
  text = latex.plain(answer)
  return _Answer(
    text,
    _SPACE.sub("", text),
    latex.number(text),
    latex.measure(text),
    latex.numeral(text),
    latex.words(text),
  )


def _quick(gold: _Answer, answer: _Answer) -> bool | None:
  """Whether two answers are the same, None where that takes more thought."""
  if gold.compact == answer.compact:
    return True
  if gold.numeral is not None:
    return _same_numeral(gold.numeral, answer)
  if gold.words is not None:
    return gold.words == latex.spelled(answer.text)
  if answer.words is not None and not _LETTERS.fullmatch(gold.compact):
    return False  # of a product of symbols the letters may be in any order
  if gold.measure is not None and "\\" in gold.text:
    # A unit in words may be left out, and need not be in words.
    given = answer.number or answer.measure
    if given is not None and latex.same_number(gold.measure, given):
      return True
  if gold.number is None:
    return None
  if answer.numeral is not None:
    return latex.in_base(*answer.numeral) == gold.number.value
  if answer.number is None:
    return None
  return latex.same_number(gold.number, answer.number)


def _same_numeral(gold: tuple[str, int], answer: _Answer) -> bool:
  """Whether an answer has the digits of a number in a base, and its base.

  Without a base it is taken to be in that of the gold answer.
  """
  found = answer.numeral or latex.numeral(answer.text.rpartition("=")[2])
  if found is None:
    return (answer.compact.lstrip("0") or "0") == gold[0]
  return found == gold


def verify_all(
  pairs: Sequence[tuple[base.Example, str]],
  protocol: str = "strict",
  weights: Mapping[str, float] | None = None,
) -> list[base.Verdict]:
  """Judges many completions, as many at a time as there are workers.

  Args:
    pairs: (example, completion); examples with `ground_truth`, LaTeX.
    protocol: strict, or d1 for the verdicts and rewards of `d1`, which know no
      weights and need no workers.
    weights: of the parts `correct` and `format` (there is an answer).

  Returns:
    Verdicts with parts `correct` and `format`.
  """
  base.check_protocol(protocol)
  if protocol == "d1":
    return [d1.math500(example, completion) for example, completion in pairs]
  weights = base.resolve_weights(WEIGHTS, weights)
  found = [final_answer(answers.clip(completion)) for _, completion in pairs]
  correct: list[bool | None] = [False] * len(pairs)
  reasons = ["no final answer"] * len(pairs)
  hard, calls = [], []
  for i, ((example, _), answer) in enumerate(zip(pairs, found, strict=True)):
    if answer is None:
      continue
    reasons[i] = f"read {answer[:40]!a}"
    gold, read = _read(example["ground_truth"]), _read(answer)
    correct[i] = _quick(gold, read)
    if correct[i] is None and explodes(read.text):
      correct[i], reasons[i] = False, f"too large a number: {answer[:40]!a}"
    if correct[i] is None:
      sides = [latex.without_bases(each.text) for each in (gold, read)]
      # A subscript that is no base says nothing that could be compared.
      correct[i] = None if None not in sides else False
      if correct[i] is None:
        hard.append(i)
        calls.append(("equal", *sides))
  for i, outcome in zip(hard, _ask(calls) if calls else [], strict=True):
    correct[i] = outcome.value is True
    if outcome.reason:
      reasons[i] = f"{base.NO_VERDICT}{outcome.reason}"
  verdicts = []
  for right, answer, reason in zip(correct, found, reasons, strict=True):
    parts = {"correct": float(right), "format": float(answer is not None)}
    reward = sum(weights[name] * value for name, value in parts.items())
    verdicts.append(base.Verdict(reward, right, parts, reason))
  return verdicts


def verify(
  example: base.Example,
  completion: str,
  protocol: str = "strict",
  weights: Mapping[str, float] | None = None,
) -> base.Verdict:
  """Judges one completion; see `verify_all`, which is faster for many."""
  return verify_all([(example, completion)], protocol, weights)[0]


def prompt(example: base.Example, style: str) -> str:
  """Returns the user's text."""
  base.check_style(style, STYLES)
  if style == "compact":
    return example["question"]
  return prompts.mathematics(example["question"], style)


def parse_row(row) -> base.Example:
  r"""Turns a row into an example.

  Two layouts: {"problem", "answer"}, and {"problem", "solution"} whose answer
  is the last box of the solution.
  """
  question = files.field(row, "problem", "question")
  if "answer" in row:
    answer = row["answer"]
  else:
    answer = answers.last_box(str(files.field(row, "solution", "answer")))
    if answer is None:
      raise ValueError(r"expected a solution with a \boxed{answer}.")
  if not isinstance(question, str) or not isinstance(answer, str):
    raise ValueError(
      f"expected text as problem and answer, got {question!r:.40} and"
      f" {answer!r:.40}."
    )
  if not answer.strip():
    raise ValueError("expected an answer, got an empty one.")
  example = {"question": question, "ground_truth": answer.strip()}
  for field in ("subject", "level"):
    if field in row:
      example[field] = row[field]
  return example


def _unreadable(golds: Sequence[str]) -> dict[str, str]:
  """The gold answers that no comparison could read, and why."""
  golds = sorted(
    {
      gold
      for gold in golds
      if _read(gold).number is None and _read(gold).words is None
    }
  )
  # With nothing to read the workers still start, so that mistakes show now.
  outcomes = _ask([("readable", _read(gold).text) for gold in golds or ["0"]])
  return {
    gold: outcome.reason or "math-verify finds no expression in it"
    for gold, outcome in zip(golds, outcomes, strict=bool(golds))
    if outcome.value is not True
  }


def _place(path: str, gold: str) -> str:
  """File and line of the first row with a gold answer."""
  for number, row in files.read_rows(path):
    if parse_row(row)["ground_truth"] == gold:
      return f"{path}:{number}"
  return path


def load(split: str, settings: base.DataSettings) -> Sequence[base.Example]:
  """Loads a split of `settings.source`, or of the published files.

  Every gold answer of the caller's own file must be readable; of the published
  training file those that are not are left out, and said.
  """
  base.check_split(split)
  source = settings.source
  path = source.replace("{split}", split)
  if not source:
    path = source = str(downloads.fetch("math500", split, settings.data_dir))
  examples = files.load_split(source, split, parse_row)
  bad = _unreadable([example["ground_truth"] for example in examples])
  if not bad:
    return examples
  gold, why = next(iter(bad.items()))
  if settings.source or split == "test":
    raise ValueError(
      f"{_place(path, gold)}: the answer {gold[:80]!r} cannot be read ({why});"
      " correct it or leave the row out."
    )
  kept = [each for each in examples if each["ground_truth"] not in bad]
  warnings.warn(
    f"{path}: {len(examples) - len(kept)} of {len(examples)} rows are left out,"
    f" whose answers cannot be read, such as {gold[:80]!r} ({why}).",
    stacklevel=2,
  )
  return kept


def difficulty(example: base.Example) -> str | None:
  """The level that the problem's author gave it."""
  level = str(example.get("level", ""))
  return (
    f"level {level.lower().removeprefix('level').strip()}" if level else None
  )


TASK = base.Task(
  "math500",
  load,
  prompt,
  None,
  None,
  verify,
  WEIGHTS,
  STYLES,
  verify_all=verify_all,
  difficulty=difficulty,
)
