r"""What the user's turn says to a general model, by prompt style.

`d1` and `espo` name formats, not sentences: which tags or boxes a reply is asked
to have in the two lines of work whose results ours are compared with. The words
are our own.

- d1: reasoning in <reasoning> tags, then the bare answer in <answer> tags (for
  MATH in a box inside them).
- espo: GSM8K and MATH ask for steps and a box, without tags; Countdown and
  Sudoku are as in d1, Sudoku with a worked example.

Both are the text of one message; `data.prompt_text` puts it through the
checkpoint's chat template.
"""

STYLES = ("d1", "espo")

_TAGS = """\
Write your reply in exactly this form:
<reasoning>
the steps that lead you to the answer
</reasoning>
<answer>
{answer}
</answer>

"""
_STEPS_AND_BOX = (
  "\n\nWork through this one step at a time and end with the result in"
  " \\boxed{}."
)

_SUDOKU = """\
A 4x4 sudoku is given as 16 digits, row after row; 0 marks an empty cell. Fill
the empty cells so that every row, every column and every one of the four 2x2
boxes holds 1, 2, 3 and 4 once each. Keep the digits that are given. Answer with
all 16 digits, row after row, without spaces.
"""
_SUDOKU_EXAMPLE = """\
For example, 1030341041230320 leads to 1234341241232341 because each row, column
and box then holds every digit once.
"""


def word_problem(question: str, style: str) -> str:
  """GSM8K: the question, and how to answer it with one number."""
  if style == "espo":
    return question + _STEPS_AND_BOX
  return _TAGS.format(answer="the final number alone") + question


def question(text: str, style: str) -> str:
  """Anything else: the text, and where to put the answer."""
  if style == "espo":
    return text + _STEPS_AND_BOX
  return _TAGS.format(answer="the final answer alone") + text


def mathematics(problem: str, style: str) -> str:
  """MATH: the problem, and how to answer it with an expression in a box."""
  if style == "espo":
    return problem + _STEPS_AND_BOX
  return _TAGS.format(answer="\\boxed{the final answer}") + (
    "Solve this problem with the care of a mathematician. The answer inside the"
    f" tags belongs in \\boxed{{}}.\n\n{problem}"
  )


def countdown(numbers: list[int], target: int, style: str) -> str:
  """Countdown: numbers, target and the rules; both styles are the same."""
  del style
  return _TAGS.format(answer="the expression alone") + (
    f"Use the numbers {numbers} to make {target}. Each of them must be used"
    " exactly once; allowed are +, -, *, / and parentheses. Give the expression"
    " without an equals sign: for [1, 5, 6] and 11 it could be 6+5*1."
  )


def sudoku(puzzle: str, style: str) -> str:
  """Sudoku: the rules and the puzzle; espo adds a worked example."""
  example = _SUDOKU_EXAMPLE if style == "espo" else ""
  return (
    f"{_SUDOKU}{example}\n"
    f"{_TAGS.format(answer='the 16 digits')}The puzzle is {puzzle}."
  )
