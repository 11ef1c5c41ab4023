"""Countdown: reach a target from given numbers, each used exactly once.

Strict verdict. The answer is what the last closed <answer> tag holds, in it the
last box; else the last box; else the whole completion. It must be an expression
over + - * / and parentheses in the given numbers, optionally followed by
`= target`, which may end in a full stop. Values are exact fractions.
"""

import re
from collections.abc import Mapping, Sequence

from rspo_jax.datasets import countdown as generator
from rspo_jax.datasets import files
from rspo_jax.tasks import answers, base, d1, prompts

WEIGHTS = {"correct": 0.9, "numbers": 0.1}
STYLES = ("compact", *prompts.STYLES)

_LATEX = {
  "\\times": "*",
  "\\cdot": "*",
  "\\ast": "*",
  "\\div": "/",
  "\\left": "",
  "\\right": "",
  "\\,": "",
}
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
  base.check_style(style, STYLES)
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


def _verdict(parts, weights, reason) -> base.Verdict:
  reward = sum(weights[name] * value for name, value in parts.items())
  return base.Verdict(reward, parts["correct"] == 1.0, parts, reason)


def verify(
  example: base.Example,
  completion: str,
  protocol: str = "strict",
  weights: Mapping[str, float] | None = None,
) -> base.Verdict:
  """Judges one completion.

  Args:
    example: with `ground_truth` [[numbers], target].
    completion: any text.
    protocol: strict, or d1 for the verdicts and rewards of `d1`, which know no
      weights.
    weights: of the parts `correct` and `numbers`; the default gives 1.0 when
      correct, 0.1 for a well-formed expression in exactly the given numbers
      that misses the target, 0 otherwise.

  Returns:
    Verdict with parts `correct` and `numbers`.
  """
  base.check_protocol(protocol)
  if protocol == "d1":
    return d1.countdown(example, completion)
  weights = base.resolve_weights(WEIGHTS, weights)
  numbers, target = example["ground_truth"]
  text = _plain(_final_answer(answers.clip(completion)))
  try:
    left, equals, right = text.partition("=")
    found = answers.tokens(left)
    used = answers.numbers_in(found)
    if sorted(used) != sorted(numbers):
      return _verdict(
        {"correct": 0.0, "numbers": 0.0},
        weights,
        f"uses {used[:8] or 'no numbers'}, not each of {list(numbers)} once",
      )
    numerator, denominator = answers.evaluate(found)
  except answers.MalformedError as error:
    return _verdict(
      {"correct": 0.0, "numbers": 0.0}, weights, f"no expression: {error}"
    )
  value = str(numerator // denominator)
  if numerator % denominator:
    value = f"{numerator}/{denominator}"
  if numerator != target * denominator:
    return _verdict(
      {"correct": 0.0, "numbers": 1.0}, weights, f"gives {value}, not {target}"
    )
  if equals and right.strip().removesuffix(".").rstrip() != str(target):
    return _verdict(
      {"correct": 0.0, "numbers": 1.0},
      weights,
      f"claims to give {right.strip()[:20]!a}, not {target}",
    )
  return _verdict({"correct": 1.0, "numbers": 1.0}, weights, f"gives {value}")


class Examples(Sequence):
  """Columns of generated problems as a random-access sequence of examples."""

  def __init__(self, columns):
    self.numbers = columns["numbers"]  # i32 [n, 3]
    self.target = columns["target"]  # i32 [n]
    self.solution = columns["solution"]  # byte strings [n]

  def __len__(self) -> int:
    return len(self.target)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return {
      "ground_truth": [
        self.numbers[index].tolist(),
        int(self.target[index]),
      ],
      "solution": self.solution[index].decode(),
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
    if not verify(example, str(solution)).correct:
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


def load(split: str, settings: base.DataSettings) -> Sequence[base.Example]:
  """Loads a split of the generated data, or of `settings.source`."""
  base.check_split(split)
  if settings.source:
    return files.load_split(settings.source, split, parse_row)
  from rspo_jax.datasets import builders

  return Examples(
    builders.load_columns(
      "countdown", split, settings.size, settings.seed, settings.data_dir
    )
  )


def difficulty(example: base.Example) -> str:
  """How many numbers, and whether the known solution multiplies or divides."""
  count = f"{len(example['ground_truth'][0])} numbers"
  if "solution" not in example:
    return count
  times = sum(character in "*/" for character in example["solution"])
  return f"{count}, {times} of * and /"


TASK = base.Task(
  "countdown",
  load,
  prompt,
  demonstration,
  corrupt,
  verify,
  WEIGHTS,
  STYLES,
  difficulty=difficulty,
)
