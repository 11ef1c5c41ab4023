"""Finds the final answer in a completion and evaluates arithmetic exactly.

Everything here takes time linear in its input and never runs any of it: tags and
boxes are found by plain string search (a lazy regular expression is quadratic on
unclosed tags), arithmetic by a two-stack parser over integer fractions.
"""

import re

# Of a longer completion the first and the last half of this are read. 65,536
# characters hold some 16,000 tokens, far above any completion length in use.
MAX_CHARACTERS = 65536
# Stands for what was cut out: no part of any answer.
_CUT = "\n\ufffd\n"

_SPECIAL = re.compile(r"<\|[a-z0-9_]{1,32}\|>")
_MAX_DIGITS = 18
_MAX_TOKENS = 4096


class MalformedError(ValueError):
  """The text is not an arithmetic expression, or has no value."""


def cut(completion: str) -> str:
  """Cuts the middle out of a completion longer than MAX_CHARACTERS."""
  if len(completion) <= MAX_CHARACTERS:
    return completion
  half = MAX_CHARACTERS // 2
  return completion[:half] + _CUT + completion[-half:]


def clip(completion: str) -> str:
  """Cuts a completion as `cut` does and takes out special tokens.

  Where a completion ends is for whoever decodes it to say; a verifier may be
  given the raw text of a whole canvas.
  """
  text = cut(completion)
  return _SPECIAL.sub(" ", text) if "<|" in text else text


def last_tag(text: str, tag: str = "answer") -> str | None:
  """Returns what the last closed <tag>…</tag> holds, None without one.

  That is from the last opening tag with a closing one behind it to the first
  closing tag that follows.
  """
  opening, closing = f"<{tag}>", f"</{tag}>"
  start = text.rfind(opening, 0, max(text.rfind(closing), 0))
  if start < 0:
    return None
  start += len(opening)
  return text[start : text.find(closing, start)]


def last_box(text: str) -> str | None:
  r"""Returns what the last outermost \boxed{…} holds, None without one.

  A box in a box counts as its innermost; braces inside must balance.
  """
  start = text.rfind("\\boxed")
  if start < 0:
    return None
  position = start + len("\\boxed")
  while position < len(text) and text[position].isspace():
    position += 1
  if position >= len(text) or text[position] != "{":
    return None
  depth = 0
  for i in range(position, len(text)):
    if text[i] == "{":
      depth += 1
    elif text[i] == "}":
      depth -= 1
      if depth == 0:
        return text[position + 1 : i]
  return None


_MAX_BOXES = 16
_MAX_JOINT = 60  # characters between two boxes of one sentence
_BLANK = r"(?:[\s$~&]|\\[()\[\],;:! ]|\\quad)*"
_JOINT = re.compile(
  rf"\}}{_BLANK}(?:[,;]{_BLANK})?"
  rf"(?:(?:\\(?:text|mbox)\s*\{{\s*)?(?:,|and|or)(?:\s*\}})?)?{_BLANK}\Z"
)


def last_boxes(text: str) -> list[str]:
  r"""Returns what the boxes of the last sentence with boxes hold, in order.

  One sentence: between two boxes there is a comma, a semicolon, `and` or `or`,
  and nothing else but spaces and marks of formulas.
  """
  content = last_box(text)
  found, end = [], len(text)
  while content is not None and len(found) < _MAX_BOXES:
    found.append(content)
    start = text.rfind("\\boxed", 0, end)
    tail = max(start - _MAX_JOINT, 0)
    joint = _JOINT.search(text[tail:start])
    if not joint or not re.search(r"[,;]|and|or", joint[0].replace("\\,", "")):
      break
    end = tail + joint.start() + 1
    start = text.rfind("\\boxed", 0, end)
    content = last_box(text[start:end]) if start >= 0 else None
    if content is not None and not text[start:end].endswith(content + "}"):
      break
  return found[::-1]


_TOKENS = re.compile(r"[0-9]+|\S")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "~": 3}


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


def evaluate(found: list[str]) -> tuple[int, int]:
  """Evaluates tokens with + - * / ( ) and unary signs, exactly.

  Returns:
    (numerator, denominator), denominator never 0, not reduced.

  Raises:
    MalformedError: wrong grammar or division by zero.
  """
  values: list[tuple[int, int]] = []
  pending: list[str] = []  # operators and open parentheses; ~ is unary minus
  operand_next = True
  for token in found:
    if token == "(":
      if not operand_next:
        raise MalformedError("an operator is missing before (")
      pending.append(token)
    elif token == ")":
      if operand_next:
        raise MalformedError("a number is missing before )")
      while pending and pending[-1] != "(":
        _reduce(values, pending.pop())
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
      rank = _PRECEDENCE[token]
      while pending and _PRECEDENCE.get(pending[-1], 0) >= rank:
        _reduce(values, pending.pop())
      pending.append(token)
      operand_next = True
    else:
      if not operand_next:
        raise MalformedError(f"an operator is missing before {token}")
      values.append((int(token), 1))
      operand_next = False
  if operand_next:
    raise MalformedError("a number is missing at the end")
  while pending:
    operator = pending.pop()
    if operator == "(":
      raise MalformedError("unbalanced (")
    _reduce(values, operator)
  return values[0]


def _reduce(values: list[tuple[int, int]], operator: str) -> None:
  """Applies an operator to the top of the value stack."""
  r, s = values.pop()
  if operator == "~":
    values.append((-r, s))
    return
  p, q = values.pop()
  if operator == "+":
    values.append((p * s + r * q, q * s))
  elif operator == "-":
    values.append((p * s - r * q, q * s))
  elif operator == "*":
    values.append((p * r, q * s))
  elif r == 0:
    raise MalformedError("division by zero")
  else:
    values.append((p * s, q * r))
