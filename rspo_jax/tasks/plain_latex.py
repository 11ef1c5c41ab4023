r"""Writes short answers in LaTeX, in unicode or in plain text in one way.

Unicode signs become LaTeX, what only stands around an answer (dollars, full
stops) goes. Nothing is evaluated; texts are short (callers see to that), and
every search takes time linear in them or nearly so.
"""

import re
import unicodedata

_MAX_ROOTS = 32


def _signs() -> dict[int, str]:
  """What each unicode sign is in LaTeX."""
  signs = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-")
  signs |= dict.fromkeys("\u00b7\u22c5\u2219\u2022", "\\cdot ")
  signs |= dict.fromkeys("\u00d7\u2715\u2716\u2a2f", "\\times ")
  signs |= dict.fromkeys("\u2215\u2044\uff0f", "/")
  signs |= dict.fromkeys("\u2264\u2a7d\u2266", "\\le ")
  signs |= dict.fromkeys("\u2265\u2a7e\u2267", "\\ge ")
  signs |= dict.fromkeys("\u00b0\u00ba\u02da", "^\\circ ")
  signs |= dict.fromkeys("\u2205\u00d8\u2300", "\\emptyset ")
  signs |= dict.fromkeys("\u2026\u22ef", "\\ldots ")
  signs |= dict.fromkeys("\u00a0\u2002\u2003\u2007\u3000", " ")
  signs |= dict.fromkeys("\u2009\u200a\u202f\u2006", "\\,")
  signs |= dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061", "")
  signs |= dict.fromkeys("\u201c\u201d\uff02", '"')
  signs |= dict.fromkeys("\u2018\u2019\u2032", "'")
  signs |= {
    "\u00f7": "\\div ", "\u2217": "*", "\u2260": "\\ne ", "\u221e": "\\infty ",
    "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u222a": "\\cup ", "\u3002": ".",
    "\u2229": "\\cap ", "\u2208": "\\in ", "\u2248": "\\approx ",
    "\u2227": "\\land ", "\u2228": "\\lor ", "\u2223": "|", "\u2192": "\\to ",
    "\u27e8": "\\langle ", "\u27e9": "\\rangle ", "\u230a": "\\lfloor ",
    "\u230b": "\\rfloor ", "\u2308": "\\lceil ", "\u2309": "\\rceil ",
    "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}", "\u2115": "\\mathbb{N}",
    "\u211a": "\\mathbb{Q}", "\u2102": "\\mathbb{C}", "\u2220": "\\angle ",
  }  # fmt: skip
  greek = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu nu"
  greek += " xi pi rho sigma tau phi chi psi omega"
  for name in greek.split():
    command = f"\\{'lambda' if name == 'lamda' else name}"
    signs[unicodedata.lookup(f"GREEK SMALL LETTER {name}")] = f"{command} "
  for name in ("Gamma", "Delta", "Theta", "Sigma", "Phi", "Omega"):
    signs[unicodedata.lookup(f"GREEK CAPITAL LETTER {name}")] = f"\\{name} "
  # Vulgar fractions, whose normal form has the sign of a fraction in it.
  for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F)):
    above, _, below = unicodedata.normalize("NFKC", chr(code)).partition(
      "\u2044"
    )
    signs[chr(code)] = f"\\frac{{{above}}}{{{below}}}"
  # Letters of formulas, and the signs of full width (not its digits).
  for code in range(0x1D400, 0x1D7CA):
    letter = unicodedata.normalize("NFKC", chr(code))
    signs[chr(code)] = signs.get(letter, letter)
  for code in (*range(0xFF01, 0xFF10), *range(0xFF1A, 0xFF21)):
    signs.setdefault(chr(code), unicodedata.normalize("NFKC", chr(code)))
  return {ord(sign): latex for sign, latex in signs.items()}


_SIGNS = _signs()
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢₓ"
_LOWERED = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, 2 * "0123456789+-()nix")
_RAISED = re.compile(f"([{_SUPERSCRIPTS}]+)|([{_SUBSCRIPTS}]+)")
_ROOTS = {"\u221a": "\\sqrt", "\u221b": "\\sqrt[3]", "\u221c": "\\sqrt[4]"}
_ASCII_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?=[({0-9])")
_OPERAND = re.compile(r"[0-9]+(?:\.[0-9]+)?|\\[A-Za-z]+|[A-Za-z]")
_PAIRS = {"(": ")", "{": "}", "[": "]"}
_NAMED = re.compile(
  r"(?<![A-Za-z\\])(?:(pi|theta|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln"
  r"|log)|infinity|inf|oo)(?![A-Za-z])"
)
_COMPARED = re.compile(r"<=|>=|!=")
_COMPARISONS = {"<=": "\\le ", ">=": "\\ge ", "!=": "\\ne "}
_PERCENT = re.compile(r"(?<!\\)%")

_WRAPPER = (
  r"\\(?:text|mbox|textbf|textit|textrm|texttt|textnormal|mathrm|mathbf|mathit"
  r"|mathsf|mathtt|hbox)\s*"
)
TEXT = re.compile(_WRAPPER + r"\{([^{}]*)\}")
# A wrapper of nothing that could be a word or a unit.
_EMPTY_TEXT = re.compile(_WRAPPER + r"\{([^{}A-Za-z\\]*)\}")
_AROUND = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"),
           ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'))  # fmt: skip
_OPENINGS = tuple({opening[0] for opening, _ in _AROUND})
_STOPS = (".", ",", ";", ":", "~", "\\")
_LATEX_SPACES = ("\\,", "\\;", "\\:", "\\!", "\\ ", "\\.", "\\\\", "\\quad")
_STARTS = ("=", ":", "\\", "~")
_LEADING = re.compile(r"\A(?:\s|[=:]|\\[,;:! ]|~)+")


def plain(text: str) -> str:
  r"""Writes an answer in the one way that the rest of this module reads.

  Args:
    text: LaTeX, unicode or plain text, such as `2√5.` or `$x ≤ ½$`.

  Returns:
    LaTeX without what surrounds it: `2\sqrt{5}`, `x \le \frac{1}{2}`.
  """
  if not text.isascii():
    text = _RAISED.sub(_script, text).translate(_SIGNS)
  if "sqrt" in text:
    text = _ASCII_ROOT.sub("\u221a", text)
  if not text.isascii():
    text = _write_roots(text)
  if "\\" in text:
    text = _EMPTY_TEXT.sub(r"\1", text)
  if "=" in text:
    text = _COMPARED.sub(lambda match: _COMPARISONS[match[0]], text)
  if "%" in text:
    text = _PERCENT.sub(r"\\%", text)
  text = _NAMED.sub(lambda m: f"\\{m[1]} " if m[1] else "\\infty ", text)
  return _bare(" ".join(text.split()))


def unwrapped(text: str) -> str:
  r"""Takes words out of their wrappers: `18\text{ m}^2` is `18 m^2`."""
  return TEXT.sub(r" \1 ", text)


def _script(match: re.Match) -> str:
  mark = "^" if match[1] else "_"
  return f"{mark}{{{match[0].translate(_LOWERED)}}}"


def _bare(text: str) -> str:
  """Takes off what stands around an answer: blanks, stops, dollars, quotes."""
  while True:
    before = text
    text = text.strip()
    if text.startswith(_STARTS):
      text = _LEADING.sub("", text, 1)
    if text.endswith(_LATEX_SPACES):
      text = text[: text.rindex("\\", 0, -1)]
    elif text.endswith(_STOPS) and not text.endswith("..."):
      text = text[:-1]
    for opening, closing in _AROUND if text[:1] in _OPENINGS else ():
      inside = text[len(opening) : len(text) - len(closing)]
      if (
        len(text) > len(opening) + len(closing)
        and text.startswith(opening)
        and text.endswith(closing)
        and opening not in inside
        and closing not in inside
        and not inside.endswith("\\")
      ):
        text = inside
    if text == before:
      return text


def _write_roots(text: str) -> str:
  """Writes √ and its operand as a command, the last root first."""
  for _ in range(_MAX_ROOTS):
    start = max(text.rfind(root) for root in _ROOTS)
    if start < 0:
      return text
    operand = start + 1
    while operand < len(text) and text[operand] == " ":
      operand += 1
    end = _operand_end(text, operand)
    inside = text[operand:end]
    if inside[:1] in ("(", "{"):
      inside = inside[1:-1]
    text = f"{text[:start]}{_ROOTS[text[start]]}{{{inside}}}{text[end:]}"
  return text


def _operand_end(text: str, start: int) -> int:
  """Where the operand that begins at `start` ends."""
  if start < len(text) and text[start] in "({":
    return _closing(text, start)
  match = _OPERAND.match(text, start)
  if not match:
    return start
  end = match.end()
  # The arguments of a command belong to it.
  while match[0][0] == "\\" and end < len(text) and text[end] in "{[":
    end = _closing(text, end)
  return end


def _closing(text: str, start: int) -> int:
  """One past the bracket that closes the one at `start`, or the end."""
  opening, closing, depth = text[start], _PAIRS[text[start]], 0
  for i in range(start, len(text)):
    if text[i] == opening:
      depth += 1
    elif text[i] == closing:
      depth -= 1
      if depth == 0:
        return i + 1
  return len(text)
