"""Finds the final answer in a completion.

Everything here takes time linear in its input: tags and boxes are found by plain
string search (a lazy regular expression is quadratic on unclosed tags).
"""

import re

# Of a longer completion the first and the last half of this are read. 65,536
# characters hold some 16,000 tokens, far above any completion length in use.
MAX_CHARACTERS = 65536
# Stands for what was cut out: no part of any answer.
_CUT = "\n\ufffd\n"

_SPECIAL = re.compile(r"<\|[a-z0-9_]{1,32}\|>")


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
