r"""Whether two LaTeX answers mean the same, by math-verify (in a worker).

math-verify parses both with an ANTLR grammar into SymPy and compares values,
sets, intervals, equations and matrices. That can take for ever on a tower of
powers, so this module is imported by worker processes only; `math500` calls it
through `workers`.
"""

import functools
import logging

import math_verify

# It warns that its own time limits are off: the worker keeps them.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

_SIGNIFICANT_DIGITS = 6


@functools.lru_cache(maxsize=4096)
def _parsed_gold(gold: str):
  return _parse(gold)


def _parse(latex: str):
  # In a box of its own an answer is read whole, not searched for a part that
  # looks like one.
  return math_verify.parse(f"\\boxed{{{latex}}}", parsing_timeout=None)


def readable(gold: str) -> bool:
  """Whether a gold answer is an expression; what is not stays a string."""
  return any(not isinstance(found, str) for found in _parsed_gold(gold))


def equal(gold: str, answer: str) -> bool:
  """Whether an answer means the same as the gold answer.

  Args:
    gold: LaTeX; units, set braces and the like are for math-verify to judge.
    answer: LaTeX of a completion.
  """
  return bool(
    math_verify.verify(
      _parsed_gold(gold),
      _parse(answer),
      float_rounding=_SIGNIFICANT_DIGITS,
      timeout_seconds=None,
    )
  )


def call(name: str, *arguments: str) -> bool:
  """The worker's entry: `readable` or `equal`."""
  return {"readable": readable, "equal": equal}[name](*arguments)


def _warm_up() -> None:
  """Fills the grammar's caches, which first uses take a second each to do."""
  for latex in (
    r"\frac{1}{2}",
    r"\left(3,\frac{\pi}{2}\right)",
    r"x \in [-2,7]",
    r"\begin{pmatrix} 1 & -2 \\ 3 & 4 \end{pmatrix}",
    r"2\sqrt{3}+5i",
    r"x^2-3x+\frac{a}{b}",
    r"\text{Evelyn}",
    r"90^\circ",
    r"1,2,3",
    r"(-\infty,1)\cup(2,\infty)",
    r"\sin x=1",
  ):
    equal(latex, latex + " + 1")


_warm_up()
