r"""GSM8K: grade-school word problems whose answer is one number.

Strict verdict. The answer is what the last closed <answer> tag holds, in it the
last box; without a closed tag the last box; without either what follows `####`;
else the whole completion if it is nothing but a number. It must name one
number: digits with or without thousands separators and sign, a decimal, a/b or
\frac{a}{b}; currency, percent and units around it do not matter, of an equation
the right side counts. Values are compared as exact fractions.
"""

import fractions
import re
from collections.abc import Mapping, Sequence

from rspo_jax.config import schema
from rspo_jax.datasets import downloads, files
from rspo_jax.tasks import answers, base, d1, prompts

WEIGHTS = {"correct": 1.0, "format": 0.0}
STYLES = ("compact", *prompts.STYLES)

# An answer is short; more than this is a text, not an answer.
_MAX_ANSWER = 400
_MAX_DIGITS = 40
_MANY_STEPS = 7  # beyond it problems are too few for a class each

_NUMBER = re.compile(
  r"(?P<sign>[-+]\s*\$?\s*)?"
  r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?"
  r"(?P<part>\.[0-9]+)?"
)
_FRACTION = re.compile(
  r"\\[dt]?frac\s*\{\s*(-?[0-9]{1,40})\s*\}\s*\{\s*(-?[0-9]{1,40})\s*\}"
)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[,;!: ]|\\left|\\right|\\\$|\\%|\\\(|\\\)|[$%*`{}]")
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})
# Nothing of a number may touch these on either side: 2:00, 1_8, 3x4, 7-8.
_JOINTS = re.compile(
  r"[0-9][0-9.,]*\s*[:_^x×*/+-]\s*[0-9]|[0-9]_|[0-9]\.[0-9]+\."
)


def parse_number(text: str) -> fractions.Fraction | None:
  """Returns the one number that a short text names, None where it does not.

  Args:
    text: an answer such as `18`, `$1,234.50`, `\\frac{3}{4}`, `18 apples`.
  """
  text = text.strip()[:_MAX_ANSWER].translate(_MINUS)
  text = text.rpartition("=")[2]
  text = _TEXT.sub(r" \1 ", text)
  value = _lone_fraction(text)
  if value is not None:
    return value
  text = _NOISE.sub("", text).strip()
  ratio = re.fullmatch(r"(-?[0-9]{1,40})\s*/\s*([0-9]{1,40})", text)
  if ratio:
    return _ratio(*ratio.groups())
  if _JOINTS.search(text):
    return None
  found = [
    match
    for match in _NUMBER.finditer(text)
    if match["whole"] is not None or match["part"] is not None
  ]
  if len(found) != 1:
    return None
  (match,) = found
  digits = (match["whole"] or "0").replace(",", "") + (match["part"] or "")
  if len(digits) > _MAX_DIGITS:
    return None
  value = fractions.Fraction(digits)
  return -value if (match["sign"] or "").startswith("-") else value


def _lone_fraction(text: str) -> fractions.Fraction | None:
  r"""Reads \frac{a}{b} where no other digit stands beside it."""
  match = _FRACTION.search(text)
  if not match:
    return None
  before, after = text[: match.start()], text[match.end() :]
  if re.search(r"[0-9]", before + after):
    return None
  value = _ratio(*match.groups())
  if value is not None and _NOISE.sub("", before).strip().endswith("-"):
    return -value
  return value


def _ratio(above: str, below: str) -> fractions.Fraction | None:
  return fractions.Fraction(int(above), int(below)) if int(below) else None


def gold(example: base.Example) -> fractions.Fraction:
  """Returns the right answer of an example.

  Raises:
    ValueError: an example whose answer is no number.
  """
  for field in ("answer_string", "ground_truth"):
    answer = example.get(field)
    if isinstance(answer, str):
      answer = answer.replace(",", "").strip()
    try:
      if answer is not None:
        return fractions.Fraction(answer)
    except (ValueError, TypeError, OverflowError) as error:
      raise ValueError(
        f"expected a number as the answer, got {answer!r:.40}."
      ) from error
  raise ValueError("expected an answer, got none.")


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
  return (
    stripped if re.fullmatch(r"[-+$]*[0-9][0-9,.]{0,40}", stripped) else None
  )


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


def load(split: str, settings: schema.Data) -> Sequence[base.Example]:
  """Loads a split of `settings.source`, or of the published files."""
  base.check_split(split)
  if not settings.source:
    path = downloads.fetch("gsm8k", split, settings.dir)
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
