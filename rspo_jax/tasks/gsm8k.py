r"""GSM8K: grade-school word problems whose answer is one number.

Strict verdict. The answer is what the last closed <answer> tag holds, in it the
last box; without a closed tag the last box; without either what follows `####`;
else the whole completion if it is nothing but a number. It must name one
number: digits with or without thousands separators and sign, a decimal, a/b,
\frac{a}{b} or a mixed number; currency, percent and units around it do not
matter, of an equation the right side counts. What is neither of these, such as
an operator, is never passed over: \sqrt{9}, 3! and 2^3 name no number. Values
are compared as exact fractions.
"""

import contextlib
import fractions
import functools
import re
from collections.abc import Mapping, Sequence

from rspo_jax.datasets import downloads, files
from rspo_jax.tasks import answers, base, d1, latex, prompts

WEIGHTS = {"correct": 1.0, "format": 0.0}
STYLES = ("compact", *prompts.STYLES)

# An answer is short; more than this is a text, not an answer.
_MAX_ANSWER = 400
_MAX_GOLD = 10**40
_MANY_STEPS = 7  # beyond it problems are too few for a class each

_GOLD = re.compile(
  r"[-+]?(?:[0-9,]{1,60}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,2})?"
  r"|[-+]?[0-9,]{1,60}/[0-9,]{1,60}"
)
_ALONE = re.compile(r"[-+$\u2212\u2013]*\.?[0-9][0-9,.]{0,40}")
_CURRENCY = re.compile("[\u00a2\u00a3\u00a5\u20a9\u20ac\u20b9\u20bd]")
# Atomic, as all that is repeated here: letters can be split into words in many
# ways, which a text that does not match would have to be tried in.
_WORD = r"(?>[A-Za-z]+(?:['-][A-Za-z]+)*)"
# What may stand before a number: words, a colon, an opening bracket.
_BEFORE = re.compile(
  rf"(?:{_WORD}|[\s.,:;(\"'#~$*`{{]|\\\$|\\[,;:! ]|\\approx|\\left|\\boxed)*+"
)
# What may stand behind it: percent, degrees, an ordinal, units with exponents.
_BEHIND = re.compile(
  r"(?:\s*\\%|\s*\^\s*(?:\\circ|\{\s*(?:\\circ|th|st|nd|rd)\s*\}))?"
  r"(?:[\s.,;:()\"'~$*`}]|\\\$|\\[,;:! ]|\\right|\\quad"
  rf"|(?:[/-]|\\cdot)?\s*{_WORD}(?:\s*\}}?\^\s*(?:\{{\s*-?[0-9]\s*\}}|-?[0-9]))?"
  r")*+"
)
_WORDS = re.compile(r"(?<!\\)\b[A-Za-z]+")
# Words that make another number of a number, which no unit does.
_OPERATORS = frozenset(
  [
    "pi",
    "sqrt",
    "root",
    "cbrt",
    "log",
    "ln",
    "exp",
    "sin",
    "cos",
    "tan",
    "abs",
    "floor",
    "ceil",
    "round",
    "max",
    "min",
    "mod",
    "minus",
    "negative",
    "plus",
    "times",
    "divided",
    "multiplied",
    "half",
    "halves",
    "twice",
    "double",
    "triple",
    "factorial",
    "not",
    "than",
  ]
)
_POWERS = frozenset(("squared", "cubed", "factorial"))  # right behind a number
_LETTERS = frozenset("mgLlshdCFJNWVAtca")  # units of one letter, and "a day"
_SCALES = {
  "hundred": 100,
  "thousand": 10**3,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
}


def parse_number(text: str) -> fractions.Fraction | None:
  """Returns the one number that a short text names, None where it does not.

  Args:
    text: an answer such as `18`, `$1,234.50`, `\\frac{3}{4}`, `18 apples`.
  """
  if len(text) > _MAX_ANSWER:
    return None
  text = latex.plain(_CURRENCY.sub("", text)).rpartition("=")[2].strip()
  found = latex.number(text)
  if found is not None:
    return found.value
  text = latex.unwrapped(text)
  parts = latex.parted(text)
  if parts is None:
    return None
  before, number, behind = parts
  found = latex.number(number)
  if found is None or before[-1:].isalpha():
    return None
  if not _BEFORE.fullmatch(before) or not _BEHIND.fullmatch(behind):
    return None
  named, units = _WORDS.findall(before), _WORDS.findall(behind)
  if any(word.lower() in _OPERATORS for word in named + units):
    return None
  # A letter alone is a variable as a rule.
  if any(len(word) == 1 for word in named):
    return None
  if any(len(word) == 1 and word not in _LETTERS for word in units):
    return None
  if not units:
    return found.value
  if units[0].lower() in _POWERS:
    return None
  return found.value * _SCALES.get(units[0].lower(), 1)


def gold(example: base.Example) -> fractions.Fraction:
  """Returns the right answer of an example.

  Raises:
    ValueError: an example whose answer is no number of up to 40 digits.
  """
  for field in ("answer_string", "ground_truth"):
    if example.get(field) is not None:
      return _gold(example[field])
  raise ValueError("expected an answer, got none.")


@functools.lru_cache(maxsize=4096, typed=True)
def _gold(answer) -> fractions.Fraction:
  value = None
  if isinstance(answer, str):
    # Short, so that neither its digits nor an exponent take long to write out.
    if _GOLD.fullmatch(answer.strip()):
      with contextlib.suppress(ZeroDivisionError):
        value = fractions.Fraction(answer.replace(",", "").strip())
  elif isinstance(answer, int | float) and abs(answer) < _MAX_GOLD:
    value = fractions.Fraction(answer)  # which no nan is below
  if value is None or abs(value) >= _MAX_GOLD:
    shown = repr(answer) if isinstance(answer, str | float) else "a large one"
    raise ValueError(
      f"expected a number of up to 40 digits as the answer, got {shown:.40}."
    )
  return value


def final_answer(text: str) -> str | None:
  """Returns the part of a completion that counts as its answer."""
  if "<answer>" in text:
    inside = answers.last_tag(text)
    if inside is not None:
      boxed = answers.last_box(inside)
      return inside if boxed is None else boxed
  if "\\boxed" in text:
    # A box that is never closed is no answer, whatever stands before it.
    return answers.last_box(text)
  if "####" in text:
    return text.rpartition("####")[2]
  stripped = text.strip()
  return stripped if _ALONE.fullmatch(stripped) else None


def verify(
  example: base.Example,
  completion: str,
  protocol: str = "strict",
  weights: Mapping[str, float] | None = None,
) -> base.Verdict:
  """Judges one completion.

  Args:
    example: with `answer_string` or `ground_truth`, a number.
    completion: any text.
    protocol: strict, or d1 for the verdicts and rewards of `d1`, which know no
      weights.
    weights: of the parts `correct` and `format` (the answer names one number).

  Returns:
    Verdict with parts `correct` and `format`.
  """
  base.check_protocol(protocol)
  if protocol == "d1":
    return d1.gsm8k(example, completion)
  weights = base.resolve_weights(WEIGHTS, weights)
  answer = final_answer(answers.clip(completion))
  if answer is None:
    found, reason = None, "no final answer"
  else:
    lines = answer.strip().split("\n", 1)
    found = parse_number(lines[0])
    reason = f"reads {found}" if found is not None else (
      f"not one number: {lines[0][:40]!a}"
    )  # fmt: skip
  correct = found is not None and found == gold(example)
  parts = {"correct": float(correct), "format": float(found is not None)}
  reward = sum(weights[name] * value for name, value in parts.items())
  return base.Verdict(reward, correct, parts, reason)


def prompt(example: base.Example, style: str) -> str:
  """Returns the user's text; the question alone in the compact style."""
  base.check_style(style, STYLES)
  if style == "compact":
    return example["question"]
  return prompts.word_problem(example["question"], style)


def parse_row(row) -> base.Example:
  """Turns a row {"question", "answer": "... #### 18"} into an example."""
  question = str(files.field(row, "question"))
  answer = str(files.field(row, "answer"))
  _, mark, last = answer.rpartition("####")
  if not mark:
    raise ValueError(
      f"expected an answer that ends in '#### number', got {answer[-40:]!r}."
    )
  example = {"question": question, "answer_string": last.strip()}
  example["steps"] = answer.count("<<")
  example["ground_truth"] = float(gold(example))
  return example


def load(split: str, settings: base.DataSettings) -> Sequence[base.Example]:
  """Loads a split of `settings.source`, or of the published files."""
  base.check_split(split)
  if not settings.source:
    path = downloads.fetch("gsm8k", split, settings.data_dir)
    return files.load_split(str(path), split, parse_row)
  return files.load_split(settings.source, split, parse_row)


def difficulty(example: base.Example) -> str | None:
  """The number of calculations in the reference solution."""
  steps = example.get("steps")
  if not steps:
    return None
  return f"{steps} steps" if steps < _MANY_STEPS else f"{_MANY_STEPS} or more"


TASK = base.Task(
  "gsm8k",
  load,
  prompt,
  None,
  None,
  verify,
  WEIGHTS,
  STYLES,
  difficulty=difficulty,
)
