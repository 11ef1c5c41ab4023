"""Countdown: reach a target from given numbers, each used exactly once.

Strict verdict. The answer is what the last closed <answer> tag holds, in it the
last box; else the last box; else the whole completion. It must be an expression
over + - * / and parentheses in the given numbers, optionally followed by
`= target`, which may end in a full stop. Values are exact fractions.
"""

import re
from collections.abc import Sequence

from rspo_jax.config import schema
from rspo_jax.datasets import countdown as generator
from rspo_jax.datasets import files
from rspo_jax.tasks import answers, arithmetic, base, d1, prompts

WEIGHTS = {"correct": 0.9, "numbers": 0.1}
STYLES = ("compact", *prompts.STYLES)

_LATEX = {
  "\\times": "*", "\\cdot": "*", "\\ast": "*", "\\div": "/", "\\left": "",
  "\\right": "", "\\,": "",
}  # fmt: skip
_SIGNS = str.maketrans(
  {
    **dict.fromkeys(
      "\u00d7\u00b7\u22c5\u2219\u2022\u2217\u2715\u2716\uff0a", "*"
    ),
    **dict.fromkeys("\u00f7\u2215\u2044\u2797\uff0f", "/"),
    **dict.fromkeys(
      "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d\u2796", "-"
    ),
    **dict.fromkeys("\u2795\uff0b", "+"),
    **dict.fromkeys("[\uff08", "("),
    **dict.fromkeys("]\uff09", ")"),
    "\uff1d": "=",
  }
)
_MAX_DIGITS = 18  # of a given number: more, and no answer could be read
_MAX_TARGET_DIGITS = 40


def prompt(example: base.Example, style: str) -> str:
  """Returns the user's text: `12,34,56=78` in the compact style."""
  numbers, target = example["ground_truth"]
  if style != "compact":
    return prompts.countdown(numbers, target, style)
  return f"{','.join(map(str, numbers))}={target}"


def demonstration(example: base.Example) -> str:
  """Returns the canonical solution, written without spaces."""
  if "solution" not in example:
    raise ValueError(
      f"the problem {example['ground_truth']} comes without a solution, which"
      " supervised training needs; use the generated data or add a field"
      " 'solution' to the file."
    )
  return example["solution"]


def corrupt(example: base.Example, rng) -> str:
  """Returns a random expression on the right numbers, whatever its value.

  Order, operators and tree are uniform.
  """
  numbers, _ = example["ground_truth"]
  if len(numbers) != 3:
    raise ValueError(
      f"corrupt demonstrations need three numbers, got {numbers}; set the share"
      " of corrupt demonstrations to 0 for this data."
    )
  trees = generator.trees()
  return trees[int(rng.integers(len(trees)))].text.format(*numbers)


def _final_answer(text: str) -> str:
  """Returns the part of a completion that counts as its answer."""
  if "<answer>" in text:
    inside = answers.last_tag(text)
    if inside is not None:
      text = inside
  if "\\boxed" in text:
    boxed = answers.last_box(text)
    if boxed is not None:
      text = boxed
  return text


def _plain(text: str) -> str:
  """Writes LaTeX and unicode operators as plain ones."""
  if "\\" in text or not text.isascii() or "[" in text:
    for symbol, plain in _LATEX.items():
      text = text.replace(symbol, plain)
    text = text.translate(_SIGNS)
  text = text.strip()
  if len(text) > 1 and text[0] == "$" and text[-1] == "$":
    return text.strip("$")
  if text.startswith("\\(") and text.endswith("\\)"):
    return text[2:-2]
  return text


def strict(pairs: base.Pairs) -> list[base.Finding]:
  """Judges completions by examples with `ground_truth` [[numbers], target].

  Returns:
    Findings with parts `correct` and `numbers`: the default weights give 1.0
    when correct, 0.1 for a well-formed expression in exactly the given numbers
    that misses the target, 0 otherwise.
  """
  findings = []
  for example, completion in pairs:
    numbers, correct, reason = _read(example, completion)
    parts = {"correct": float(correct), "numbers": float(numbers)}
    findings.append((correct, parts, reason))
  return findings


def _read(example: base.Example, completion: str) -> tuple[bool, bool, str]:
  """Whether an expression has the right numbers, is right, and why."""
  numbers, target = example["ground_truth"]
  text = _plain(_final_answer(answers.clip(completion)))
  try:
    left, equals, right = text.partition("=")
    found = arithmetic.tokens(left)
    used = arithmetic.numbers_in(found)
    if sorted(used) != sorted(numbers):
      used = used[:8] or "no numbers"
      return False, False, f"uses {used}, not each of {list(numbers)} once"
    numerator, denominator = arithmetic.evaluate(found)
  except arithmetic.MalformedError as error:
    return False, False, f"no expression: {error}"
  value = str(numerator // denominator)
  if numerator % denominator:
    value = f"{numerator}/{denominator}"
  if numerator != target * denominator:
    return True, False, f"gives {value}, not {target}"
  right = right.strip()
  if equals and right.removesuffix(".").rstrip() != str(target):
    return True, False, f"claims to give {right[:20]!a}, not {target}"
  return True, True, f"gives {value}"


def example_of(numbers, target, solution: bytes) -> base.Example:
  """The example of one row of the generated columns."""
  return {
    "ground_truth": [numbers.tolist(), int(target)],
    "solution": solution.decode(),
  }


def parse_row(row) -> base.Example:
  """Turns a row of a published file into an example.

  Two layouts: {"input": "30,100,93", "output": "23"} and {"nums": [82, 93, 48],
  "target": 37}, the latter with an optional solution.
  """
  numbers = files.field(row, "input", "nums", "numbers")
  target = files.field(row, "output", "target")
  if isinstance(numbers, str):
    numbers = numbers.split(",")
  try:
    numbers = [_whole(number, _MAX_DIGITS) for number in numbers]
    target = _whole(target, _MAX_TARGET_DIGITS)
  except (TypeError, ValueError) as error:
    raise ValueError(
      "expected whole numbers of up to 18 digits, and a target of up to 40, as"
      f" in '30,100,93' and '23', got {numbers!r:.60} and {target!r:.60}."
    ) from error
  if not numbers or min(numbers) < 0:
    raise ValueError(f"expected one number or more, none negative: {numbers}.")
  example = {"ground_truth": [numbers, target]}
  solution = row.get("solution", row.get("one_solution"))
  if solution is not None:
    if not _read(example, str(solution))[1]:
      raise ValueError(
        f"the solution {solution!r} does not give {target} from {numbers}."
      )
    example["solution"] = "".join(str(solution).split())
  return example


def _whole(value, digits: int) -> int:
  """Returns a whole number of so many digits, given as int or as text."""
  if isinstance(value, str):
    # Not int(): it takes 1_0 and the digits of other scripts.
    if not re.fullmatch(rf"\s*[-+]?[0-9]{{1,{digits}}}\s*", value):
      raise ValueError(value)
    return int(value)
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(value)
  if abs(value) >= 10**digits:
    raise ValueError(f"more than {digits} digits")
  return value


def examples(split: str, data: schema.Data) -> Sequence[base.Example]:
  """A split of the generated data, or of `data.source`."""
  if data.source:
    return files.load_split(data.source, split, parse_row)
  from rspo_jax.datasets import builders

  columns = builders.load_columns(
    "countdown", split, data.size, data.seed, data.dir
  )
  return base.Examples(columns, example_of)


def difficulty(example: base.Example) -> str:
  """How many numbers, and whether the known solution multiplies or divides."""
  count = f"{len(example['ground_truth'][0])} numbers"
  if "solution" not in example:
    return count
  times = sum(character in "*/" for character in example["solution"])
  return f"{count}, {times} of * and /"


TASK = base.Task(
  name="countdown", examples=examples, words=prompt,
  demonstration=demonstration, corrupt=corrupt, strict=strict, d1=d1.countdown,
  weights=WEIGHTS, styles=STYLES, difficulty=difficulty,
)  # fmt: skip
