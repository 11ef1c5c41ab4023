r"""Whether two LaTeX answers mean the same, by math-verify (in a worker).

math-verify parses both with an ANTLR grammar into SymPy and compares values,
sets, intervals, equations and matrices. That can take for ever on a tower of
powers, so this module is imported by worker processes only; `math500` calls it
through `workers`.

How two values are compared is ours (`same_value`), wherever they stand in a
set or a matrix: math-verify takes what differs by less than 1e-15 for equal,
and compares decimals by their places after the point. So are sequences with
dots, which it drops.
"""

import fractions
import functools
import itertools
import logging
import re

import math_verify
import sympy
from math_verify import grader

from rspo_jax.tasks import latex

# It warns that its own time limits are off: the worker keeps them.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

# Digits to which a difference is taken before it counts as none.
_DIGITS = 300
_MAX_PLACES = 400
_POINT = (
  sympy.Rational(173, 71), sympy.Rational(311, 97), sympy.Rational(59, 43),
  sympy.Rational(229, 61), sympy.Rational(131, 89), sympy.Rational(83, 29),
)  # fmt: skip
_UNDONE = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit,
           sympy.Derivative)  # fmt: skip
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")
_OR = re.compile(r"\s*(?:\\text\s*\{\s*or\s*\}|\bor\b|\\lor\b|\\vee\b)\s*")
_AND = re.compile(
  r"\s*(?:\\text\s*\{\s*and\s*\}|\band\b|\\land\b|\\wedge\b)\s*"
)
_SET_OF = re.compile(
  r"\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|\||:)(.*)\\\}"
)


@functools.lru_cache(maxsize=4096)
def _parsed_gold(gold: str):
  return _parse(gold)


def _parse(text: str):
  # In a box of its own an answer is read whole, not searched for a part that
  # looks like one.
  return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def readable(gold: str) -> bool:
  """Whether a gold answer is an expression; what is not stays a string."""
  return any(not isinstance(found, str) for found in _parsed_gold(gold))


def equal(gold: str, answer: str) -> bool:
  """Whether an answer means the same as the gold answer.

  Args:
    gold: LaTeX; units, set braces and the like are for math-verify to judge.
    answer: LaTeX of a completion.
  """
  terms, found = latex.sequence(gold), latex.sequence(answer)
  if terms is not None or found is not None:
    return terms is not None and found is not None and _alike(terms, found)
  gold, answer = _conditions(gold), _conditions(answer)
  wanted, given = _parsed_gold(gold), _parse(answer)
  if math_verify.verify(
    wanted, given, timeout_seconds=None, allow_set_relation_comp=True
  ):
    return True
  if _RELATION.search(gold) or _RELATION.search(answer):
    return _same_region(gold, answer)
  return False


def _conditions(text: str) -> str:
  r"""Takes the conditions out of \{x \mid x<3\}."""
  match = _SET_OF.fullmatch(text)
  return match[1] if match else text


def _alike(terms: tuple[str, list[str]], found: tuple[str, list[str]]) -> bool:
  """Whether two sequences have the same terms, dots at the same place.

  More terms before the dots may be written out where they go on by the same
  difference.
  """
  if terms[0] != found[0] and terms[0] and found[0]:
    return False
  short, long = sorted((terms[1], found[1]), key=len)
  more = len(long) - len(short)
  if "..." not in short or "..." not in long:
    return False
  head = short.index("...")
  if more:
    if head < 2 or long.index("...") != head + more:
      return False
    numbers = [latex.number(latex.plain(term)) for term in long[: head + more]]
    if None in numbers:
      return False
    values = [number.value for number in numbers]
    steps = {b - a for a, b in itertools.pairwise(values)}
    if len(steps) > 1:
      return False
    long = long[:head] + long[head + more :]
  return all(
    one == other or ("..." not in (one, other) and equal(one, other))
    for one, other in zip(short, long, strict=True)
  )


def _region(text: str) -> tuple[sympy.Set | None, set]:
  """The numbers that conditions or an interval allow, and their symbols."""
  for word, together in ((_OR, sympy.Union), (_AND, sympy.Intersection)):
    parts = word.split(text)
    if len(parts) > 1:
      regions = [_region(part) for part in parts]
      if any(region is None for region, _ in regions):
        return None, set()
      symbols = set().union(*(found for _, found in regions))
      return together(*(region for region, _ in regions)), symbols
  (found, *_) = _parsed_gold(text) or [None]
  if isinstance(found, sympy.Eq) and isinstance(found.rhs, sympy.Set):
    return found.rhs, found.lhs.free_symbols
  if isinstance(found, sympy.Set):
    return found, set()
  if grader.is_relation(found) and len(found.free_symbols) == 1:
    return grader.unwrap_fcs(found).as_set(), found.free_symbols
  return None, set()


def _same_region(gold: str, answer: str) -> bool:
  """Whether inequalities, or an interval and inequalities, say the same."""
  try:
    (wanted, its), (given, theirs) = _region(gold), _region(answer)
    if wanted is None or given is None or (its and theirs and its != theirs):
      return False
    return wanted == given or bool(wanted.symmetric_difference(given).is_empty)
  except Exception:  # SymPy cannot solve every inequality
    return False


def _exact(value):
  """Evaluates an expression with its decimals as fractions."""
  decimals = {
    each: sympy.Rational(str(each))
    for each in value.atoms(sympy.Float)
    if each.is_finite
  }
  return value.xreplace(decimals).doit()


def _decimal(value, exact) -> latex.Number | None:
  """Reads an expression of decimals as one; None where it is none."""
  if not exact.is_Rational or not value.has(sympy.Float):
    return None
  rest, places = exact.q, 0
  for prime in (2, 5):
    count = 0
    while rest % prime == 0 and count <= _MAX_PLACES:
      rest, count = rest // prime, count + 1
    places = max(places, count)
  if rest != 1 or places > _MAX_PLACES or abs(exact.p) > exact.q * 10**100:
    return None
  digits = str(abs(exact.p) * 10**places // exact.q)
  exact = fractions.Fraction(exact.p, exact.q)
  return latex.Number(exact, places, len(digits))


def _close(one, other, exact, bound) -> bool:
  """Whether one is a decimal to which the other rounds."""
  decimal = _decimal(one, exact)
  if decimal is None or not bound.is_number or not bound.is_real:
    return False
  rational = sympy.Rational(str(bound.evalf(40)))
  return latex.rounds_to(fractions.Fraction(rational.p, rational.q), decimal)


def _nonzero(difference) -> bool | None:
  """Whether a number differs from 0, None where its digits do not tell."""
  parts = difference.evalf(15, maxn=_DIGITS).as_real_imag()
  if not all(part.is_Float or part.is_Rational for part in parts):
    return None
  return any(
    part != 0 and (part.is_Rational or part._prec > 1) for part in parts
  )


def same_value(gold, answer, *_) -> bool:
  """Whether two expressions or matrices of SymPy's have the same value.

  Rationals are compared exactly, other numbers to 300 digits, formulas by
  simplification of their difference; decimals as `latex.same_number` does.
  """
  if isinstance(gold, sympy.MatrixBase | sympy.MatrixExpr) or isinstance(
    answer, sympy.MatrixBase | sympy.MatrixExpr
  ):
    return _same_matrix(gold, answer)
  whole = grader.get_pct_val(gold), grader.get_pct_val(answer)
  if (whole[0] is None) != (whole[1] is None) and same_value(
    gold if whole[0] is None else whole[0],
    answer if whole[1] is None else whole[1],
  ):
    return True  # 9% may be given as 9
  one, other = _exact(gold), _exact(answer)
  if one == other:
    return True
  if _close(gold, answer, one, other) or _close(answer, gold, other, one):
    return True
  difference = one - other
  if difference.is_Rational:
    return difference == 0
  symbols = sorted(difference.free_symbols, key=str)
  if not symbols:
    nonzero = _nonzero(difference)
    if nonzero is not None:
      return not nonzero
  elif len(symbols) <= len(_POINT) and not difference.has(*_UNDONE):
    # What differs somewhere is not the same, which is quickly said.
    point = dict(zip(symbols, _POINT, strict=False))
    if _nonzero(difference.subs(point)):
      return False
  return bool(sympy.simplify(difference).is_zero)


def _same_matrix(gold, answer) -> bool:
  gold, answer = gold.doit(), answer.doit()
  return (
    isinstance(gold, sympy.MatrixBase)
    and isinstance(answer, sympy.MatrixBase)
    and gold.shape == answer.shape
    and all(map(same_value, gold.flat(), answer.flat()))
  )


# math-verify looks both up in its module at each comparison.
grader.sympy_numeric_eq = same_value
grader.sympy_symbolic_eq = lambda gold, answer: False


def call(name: str, *arguments: str) -> bool:
  """The worker's entry: `readable` or `equal`."""
  return {"readable": readable, "equal": equal}[name](*arguments)


def _warm_up() -> None:
  """Fills the grammar's caches, which first uses take a second each to do."""
  for text in (
    r"\frac{1}{2}",
    r"\left(3,\frac{\pi}{2}\right)",
    r"x \in [-2,7]",
    r"\begin{pmatrix} 1 & -2 \\ 3 & 4 \end{pmatrix}",
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
    r"2\sqrt{3}+5i",
    r"x^2-3x+\frac{a}{b}",
    r"\text{Evelyn}",
    r"90^\circ",
    r"1,2,3",
    r"(-\infty,1)\cup(2,\infty)",
    r"\sin x=1",
    r"[\frac{\pi^2}{8}, \frac{5 \pi^2}{4}]",
    r"[\pi^{2}/8, 5\pi^{2}/4]",
    r"\{1 \pm \sqrt{5}, -2\}",
    r"-\infty < x \le \frac{\sqrt{3}}{2}",
    r"2^{-99}x+\sqrt[3]{2}",
    r"7! \times 2!",
    r"12.5\%",
    r"(x-1)(x+1)/2",
  ):
    equal(text, text + " + 1")
    equal(text, text)


_warm_up()
