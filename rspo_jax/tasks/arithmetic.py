"""Evaluates arithmetic that a model wrote, and never runs any of it.

Linear in its input: `evaluate` computes exactly, in integer
fractions; `python_value` gives what Python would, for verdicts that were made
by it.
"""

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_MAX_DIGITS = 18
_MAX_TOKENS = 4096
_MAX_POWER_BITS = 4096  # beyond it a power is taken to miss any target
_MAX_DEPTH = 200  # of parentheses; deeper ones are a syntax error in Python


class MalformedError(ValueError):
  """The text is not an arithmetic expression, or has no value."""


_TOKENS = re.compile(r"[0-9]+|\S")
_PRECEDENCE = {
  "+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "~": 3, "**": 4,
}  # fmt: skip


def tokens(text: str) -> list[str]:
  """Splits arithmetic into numbers and single characters.

  Raises:
    MalformedError: a character that is no digit, operator or parenthesis, a
      number with a leading zero or more than 18 digits, or over 4,096 tokens.
  """
  found = _TOKENS.findall(text)
  if len(found) > _MAX_TOKENS:
    raise MalformedError(f"more than {_MAX_TOKENS} tokens")
  for token in found:
    if token in "+-*/()":
      continue
    if not ("0" <= token[0] <= "9"):
      raise MalformedError(f"unexpected character {token!a}")
    if len(token) > _MAX_DIGITS:
      raise MalformedError(f"a number of {len(token)} digits")
    if token[0] == "0" and len(token) > 1:
      raise MalformedError(f"leading zero in {token}")
  return found


def numbers_in(found: list[str]) -> list[int]:
  """Returns the numbers among tokens, in order."""
  return [int(token) for token in found if token[0] not in "+-*/()"]


def _parse(
  found: Iterable[str], literal: Callable[[str], Any], apply: Callable
) -> Any:
  """Evaluates tokens by two stacks, of values and of what is pending.

  Args:
    found: numbers, operators and parentheses; a sign is an operator.
    literal: a number's token -> its value.
    apply: (stack of values, operator) -> None; `~` is the unary minus.

  Raises:
    MalformedError: wrong grammar.
  """
  values, pending, operand_next = [], [], True
  for token in found:
    if token == "(":
      if not operand_next:
        raise MalformedError("an operator is missing before (")
      pending.append(token)
    elif token == ")":
      if operand_next:
        raise MalformedError("a number is missing before )")
      while pending and pending[-1] != "(":
        apply(values, pending.pop())
      if not pending:
        raise MalformedError("unbalanced )")
      pending.pop()
    elif token in _PRECEDENCE:
      if operand_next:
        if token == "-":
          pending.append("~")
        elif token != "+":
          raise MalformedError(f"a number is missing before {token}")
        continue
      floor = _PRECEDENCE[token] + (token == "**")  # of equals the right first
      while pending and _PRECEDENCE.get(pending[-1], 0) >= floor:
        apply(values, pending.pop())
      pending.append(token)
      operand_next = True
    else:
      if not operand_next:
        raise MalformedError(f"an operator is missing before {token}")
      values.append(literal(token))
      operand_next = False
  if operand_next:
    raise MalformedError("a number is missing at the end")
  while pending:
    if pending[-1] == "(":
      raise MalformedError("unbalanced (")
    apply(values, pending.pop())
  return values[0]


def evaluate(found: list[str]) -> tuple[int, int]:
  """Evaluates tokens with + - * / ( ) and unary signs, exactly.

  Returns:
    (numerator, denominator), denominator never 0, not reduced.

  Raises:
    MalformedError: wrong grammar or division by zero.
  """
  return _parse(found, lambda token: (int(token), 1), _reduce)


def _reduce(values: list[tuple[int, int]], sign: str) -> None:
  """Applies an operator to the top of the value stack."""
  r, s = values.pop()
  if sign == "~":
    values.append((-r, s))
    return
  p, q = values.pop()
  if sign == "+":
    values.append((p * s + r * q, q * s))
  elif sign == "-":
    values.append((p * s - r * q, q * s))
  elif sign == "*":
    values.append((p * r, q * s))
  elif r == 0:
    raise MalformedError("division by zero")
  else:
    values.append((p * s, q * r))


_ALLOWED = re.compile(r"[\d+\-*/().\s]+\n?\Z")
_PYTHON_TOKEN = re.compile(
  r"\*\*|//|[-+*/()]|[0-9]+\.?[0-9]*|\.[0-9]+|[ \t\f]+|[\r\n]+|.", re.DOTALL
)
_BINARY = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "/": operator.truediv,
  "//": operator.floordiv,
}


def python_value(text: str):
  """Evaluates arithmetic as Python would, without letting it run anything.

  Args:
    text: an expression over numbers, + - * / // ** and parentheses.

  Returns:
    int, float or complex; None where Python would raise, and where a power
    would be too large to compute.
  """
  if not _ALLOWED.match(text):
    return None
  try:
    return _parse(_python_tokens(text.strip()), _number, _apply)
  except (ArithmeticError, TypeError, ValueError):
    return None


def _python_tokens(text: str) -> Iterator[str]:
  """The tokens of Python, in which a line may end within parentheses only."""
  depth = 0
  for token in _PYTHON_TOKEN.findall(text):
    depth += (token == "(") - (token == ")")
    if depth > _MAX_DEPTH:
      raise MalformedError("nested too deeply")
    if token[0] not in " \t\f" and not (token[0] in "\r\n" and depth):
      yield token


def _number(token: str):
  """Reads a literal; an integer with leading zeros is none."""
  if not token.isascii() or not token.replace(".", "", 1).isdigit():
    raise ValueError(token)
  if "." in token:
    return float(token)
  if token[0] == "0" and token.strip("0"):
    raise ValueError(token)
  return int(token)


def _apply(values: list, name: str) -> None:
  """Applies an operator to the top of the value stack."""
  right = values.pop()
  if name == "~":
    values.append(-right)
  elif name == "**":
    values.append(_power(values.pop(), right))
  else:
    values.append(_BINARY[name](values.pop(), right))


def _power(base_value, exponent):
  """Raises to a power; OverflowError where the result would be huge."""
  if isinstance(base_value, int) and isinstance(exponent, int):
    bits = max(1, base_value.bit_length())
    if abs(exponent) * bits > _MAX_POWER_BITS and abs(base_value) > 1:
      raise OverflowError("power too large")
  return base_value**exponent
