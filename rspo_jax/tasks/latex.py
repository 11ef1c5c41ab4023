r"""Reads short answers written in LaTeX, in unicode or in plain text.

1. `plain` gives every way of writing one form: unicode signs become LaTeX, what
   only stands around an answer (dollars, full stops) goes.
2. `number`, `numeral` and `words` read what can be compared exactly and without
   an algebra system: numbers as fractions, numbers in a base, words.

Nothing is evaluated. Texts are short (callers see to that), and every search
takes time linear in them or nearly so.
"""

import dataclasses
import fractions
import itertools
import re
import unicodedata

# Of a decimal that stands for what it was rounded from; see `same_number`.
_LEAST_SHOWN = 6
_DOUBLE_SHOWN = 16
_DOUBLE_ERROR = fractions.Fraction(1, 10**15)
_MAX_EXPONENT = 400
_MAX_ROOTS = 32
_MAX_BASE = 36


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

WRAPPER = (
  r"\\(?:text|mbox|textbf|textit|textrm|texttt|textnormal|mathrm|mathbf|mathit"
  r"|mathsf|mathtt|hbox)\s*"
)
_TEXT = re.compile(WRAPPER + r"\{([^{}]*)\}")
# A wrapper of nothing that could be a word or a unit.
_EMPTY_TEXT = re.compile(WRAPPER + r"\{([^{}A-Za-z\\]*)\}")
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
  return _TEXT.sub(r" \1 ", text)


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


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
  """A number as it was written.

  Attributes:
    value: exact; of `50%` it is 50.
    places: digits after the point, None where it is no decimal.
    shown: significant digits of a decimal, 0 where it is none.
    percent: whether it has the sign of one.
  """

  value: fractions.Fraction
  places: int | None = None
  shown: int = 0
  percent: bool = False


_SPACE = r"(?:\s|\\[,;:! ])*"
_GROUP = r"(?:,(?:\\!\s*)?|\{,\}|\\,)"
_DIGITS = rf"[0-9]{{1,3}}(?:{_GROUP}[0-9]{{3}}){{1,12}}|[0-9]{{1,40}}"
_DECIMAL = re.compile(
  rf"(?P<whole>{_DIGITS})?(?:\.(?P<part>[0-9]{{0,40}})"
  r"(?:\\(?:overline|bar)\s*\{(?P<again>[0-9]{1,40})\})?)?"
  rf"(?:{_SPACE}\\(?:times|cdot){_SPACE}10\s*\^\s*"
  r"(?:\{\s*(?P<power>[-+]?[0-9]{1,3})\s*\}|(?P<digit>[0-9])))?"
)
_INTEGER = rf"(?:{_DIGITS})"
_PART = rf"(?:\{{{_SPACE}(-?{_INTEGER}){_SPACE}\}}|([0-9]))"
_RATIO = re.compile(
  rf"(?P<whole>{_INTEGER})?{_SPACE}"
  rf"\\[dtc]?frac{_SPACE}{_PART}{_SPACE}{_PART}"
)
_SLASH = re.compile(
  rf"(?:(?P<whole>{_INTEGER})\s+)?({_INTEGER})\s*/\s*(-?{_INTEGER})"
)
_SIGN = re.compile(r"([-+]?)\s*(?:\\?\$\s*)?([-+]?)\s*")
_BEGINNING = re.compile(
  r"(?:[-+]\s*)?(?:\\?\$\s*)?(?:[-+]\s*)?(?:"
  rf"(?:{_INTEGER}\s+)?{_INTEGER}\s*/\s*-?{_INTEGER}"
  rf"|(?:{_INTEGER}{_SPACE})?\\[dtc]?frac{_SPACE}{_PART}{_SPACE}{_PART}"
  rf"|(?:{_DIGITS})(?:\.[0-9]{{1,40}})?|\.[0-9]{{1,40}})"
)
_UNIT = re.compile(
  rf"{_SPACE}(?:(\\%)|\^\s*(?:\\circ|\{{\s*\\circ\s*\}})\s*|\\degree\s*)?\Z"
)


def number(text: str) -> Number | None:
  r"""Reads a number that stands alone, None where the text is another thing.

  Args:
    text: as `plain` gives it: digits with or without thousands separators, a
      decimal (`0.\overline{3}` too), a fraction, a mixed number, a number times
      a power of ten; a dollar sign, a percent sign, degrees.
  """
  sign = _SIGN.match(text)
  body, unit = text[sign.end() :], None
  if not body[-1:].isdigit() and (unit := _UNIT.search(body)):
    body = body[: unit.start()]
  if not body or (sign[1] and sign[2]):
    return None
  found = _decimal(body) or _fraction(body)
  if found is None:
    return None
  negative = "-" in (sign[1], sign[2])
  return Number(
    -found.value if negative else found.value,
    found.places,
    found.shown,
    unit is not None and unit[1] is not None,
  )


def parted(text: str) -> tuple[str, str, str] | None:
  r"""Splits `about -\$18 a day` into what is before, the number, the rest."""
  match = _BEGINNING.search(text)
  if not match:
    return None
  return text[: match.start()], match[0], text[match.end() :]


# Possessive: letters can be split into units in too many ways to try them.
_MEASURED = re.compile(
  r"(?:\s*+(?:/\s*+[A-Za-z]++|(?:-|\\cdot)?\s*+(?:[A-Za-z]{2,}+|m(?![A-Za-z])))\.?"
  r"(?:\s*+\^\s*+(?:\{\s*[0-9]\s*\}|[0-9]))?)++\s*+"
)


def measure(text: str) -> Number | None:
  r"""Reads a number with a unit, such as `15\text{ cm}^2` or `15 cm^2`."""
  parts = parted(unwrapped(text).strip())
  if parts is None or parts[0] or not _MEASURED.fullmatch(parts[2]):
    return None
  return number(parts[1])


def _whole(digits: str) -> int:
  """The value of digits in groups."""
  return int(re.sub(r"[^0-9]", "", digits))


def _decimal(body: str) -> Number | None:
  match = _DECIMAL.fullmatch(body)
  if not match or not (match["whole"] or match["part"] or match["again"]):
    return None
  whole, part = match["whole"] or "0", match["part"] or ""
  digits = str(_whole(whole)) + part
  power = int(match["power"] or match["digit"] or 0)
  if abs(power) > _MAX_EXPONENT:
    return None
  value = fractions.Fraction(int(digits), 10 ** len(part))
  if match["again"]:
    again = match["again"]
    value += fractions.Fraction(
      int(again), (10 ** len(again) - 1) * 10 ** len(part)
    )
    return Number(value * fractions.Fraction(10) ** power)
  value *= fractions.Fraction(10) ** power
  if match["part"] is None and not power:
    return Number(value)
  return Number(value, len(part) - power, len(digits.lstrip("0")))


def _fraction(body: str) -> Number | None:
  match = _SLASH.fullmatch(body) or _RATIO.fullmatch(body)
  if not match:
    return None
  if match.re is _SLASH:
    above, below = match[2], match[3]
  else:
    above, below = match[2] or match[3], match[4] or match[5]
  above = -_whole(above) if above[0] == "-" else _whole(above)
  below = -_whole(below) if below[0] == "-" else _whole(below)
  if not below or (match["whole"] and not 0 < above < below):
    return None  # a mixed number has a proper fraction
  whole = _whole(match["whole"] or "0")
  return Number(whole + fractions.Fraction(above, below))


def same_number(one: Number, other: Number) -> bool:
  """Whether two numbers are the same.

  That is exactly; or one is a decimal of six significant digits or more to
  which the other rounds. A decimal of sixteen, which is how programs print
  doubles, may be off by 1e-15 of its value. 50% is both 50 and 0.5.
  """
  if one.percent != other.percent:
    hundredth = dataclasses.replace(
      one if one.percent else other, percent=False
    )
    bare = other if one.percent else one
    if same_number(hundredth, bare):
      return True
    places = hundredth.places
    return same_number(
      dataclasses.replace(
        hundredth,
        value=hundredth.value / 100,
        places=None if places is None else places + 2,
      ),
      bare,
    )
  return (
    one.value == other.value
    or rounds_to(other.value, one)
    or rounds_to(one.value, other)
  )


def rounds_to(value: fractions.Fraction, decimal: Number) -> bool:
  """Whether a decimal of enough digits is a value, rounded."""
  if decimal.places is None or decimal.shown < _LEAST_SHOWN:
    return False
  difference = abs(value - decimal.value)
  half = fractions.Fraction(10) ** -decimal.places / 2
  if decimal.shown >= _DOUBLE_SHOWN:
    half = max(half, _DOUBLE_ERROR * abs(decimal.value))
  return difference <= half


_BASES = {
  name: base
  for base, name in enumerate(
    [
      "two",
      "three",
      "four",
      "five",
      "six",
      "seven",
      "eight",
      "nine",
      "ten",
      "eleven",
      "twelve",
      "thirteen",
      "fourteen",
      "fifteen",
      "sixteen",
    ],
    2,
  )
}
_DIGIT = r"(?<![A-Za-z0-9_.\\])([0-9][0-9A-Z]*)"
_BASE = r"\{?\(?(?:base)?([0-9]{1,2}|[a-z]{3,8})\)?\}?"
_NUMERAL = re.compile(
  r"(-?)\(?\{?([0-9][0-9A-Z]*)\}?\)?"
  rf"(?:_{_BASE}|,?\(?(?:in)?base-?{_BASE}\)?)"
)
_EMBEDDED = re.compile(
  rf"{_DIGIT}\s*_\s*(?:\{{\s*([0-9]{{1,2}})\s*\}}|([0-9]))"
)
_SUBSCRIPT = re.compile(r"[0-9]\s*_")


def numeral(text: str) -> tuple[str, int] | None:
  r"""Reads (digits, base) of a number in a base: `52_8`, `52_{\text{eight}}`.

  Returns:
    None where the text is another thing, or has digits that its base lacks.
  """
  if "_" not in text and "base" not in text:
    return None
  compact = re.sub(r"\s|\\[,;:! ]", "", _TEXT.sub(r"\1", text))
  match = _NUMERAL.fullmatch(compact)
  if not match:
    return None
  base = match[3] or match[4]
  base = int(base) if base.isdigit() else _BASES.get(base, 0)
  if in_base(match[2], base) is None:
    return None
  return match[1] + (match[2].lstrip("0") or "0"), base


def in_base(digits: str, base: int) -> int | None:
  """The value of digits in a base, None where it has no such digits."""
  if not 2 <= base <= _MAX_BASE:
    return None
  try:
    return int(digits, base)
  except ValueError:
    return None


def without_bases(text: str) -> str | None:
  """Writes the numbers in a base in an expression as their values.

  Returns:
    None where a number has a subscript that is no base.
  """

  def value(match: re.Match) -> str:
    found = in_base(match[1], int(match[2] or match[3]))
    return match[0] if found is None else f"({found})"

  text = _EMBEDDED.sub(value, text)
  return None if _SUBSCRIPT.search(text) else text


_BLANKS = re.compile(r"\\[,;:! ]|~|\\quad|\s+")
_WRAPPED_WORDS = re.compile(r"\(?[^\W\d_][^\\^_=<>|{}+*/\[\]$%]*")
_BARE_WORDS = re.compile(r"[^\W\d_]+(?:[ ,.']+[^\W_]+)*[.']?")
_RUN = re.compile(r"[^\W\d_]{2,}")
_EDGES = " .,;:!?\"'()"
_ARTICLE = re.compile(r"(?:an?|the) (?=\S\S)")


def spelled(text: str) -> str:
  """An answer as words: no wrappers, no case, no punctuation around it."""
  text = _BLANKS.sub(" ", _TEXT.sub(r" \1 ", text)).strip(_EDGES)
  text = " ".join(text.replace(",", " ").split())
  # A single letter is a symbol, or the name of a choice.
  return text if len(text) < 2 else _ARTICLE.sub("", text.casefold(), 1)


def words(text: str) -> str | None:
  r"""Returns an answer that is words, `spelled`; None where it is a formula.

  Text in a wrapper such as \text is words if it begins with a letter. So are
  bare letters that are no product of symbols: of three letters those that are
  not in the order of the alphabet, of more those that do not follow each other
  in it. `ab`, `xyz` and `abcd` are products, `east` is a word.
  """
  if _TEXT.search(text):
    bare = _BLANKS.sub(" ", _TEXT.sub(r" \1 ", text)).strip()
    # Formulas have text in them too; words have no letters outside of it.
    outside = _TEXT.sub(" ", text)
    if not re.search(r"[A-Za-z0-9]", outside):
      return spelled(text) if _WRAPPED_WORDS.fullmatch(bare) else None
    text = bare
  if not _BARE_WORDS.fullmatch(text):
    return None
  runs = [run for run in _RUN.findall(text) if run not in ("and", "or")]
  if not runs or all(_is_product(run) for run in runs):
    return None
  return spelled(text)


def _is_product(run: str) -> bool:
  """Whether letters side by side are symbols to be multiplied."""
  steps = [ord(b) - ord(a) for a, b in itertools.pairwise(run)]
  if len(run) == 2:
    return True
  return all(step > 0 if len(run) == 3 else step == 1 for step in steps)


DOTS = re.compile(r"\\(?:[lc]?dots[a-z]?|cdots)(?![A-Za-z])|\.\.\.+")
_SEPARATORS = (",", ";", "+", "\\cdot", "\\times", "<", "\\le", "-")


def sequence(text: str) -> tuple[str, list[str]] | None:
  r"""Splits a sequence with dots, such as `1, 2, \ldots, n`.

  Returns:
    (what separates its terms, the terms, `...` standing for dots); None where
    there are no dots.
  """
  text = DOTS.sub(" \\\\ldots ", text).strip()
  if "\\ldots" not in text:
    return None
  for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("{", "}")):
    if text.startswith(opening) and text.endswith(closing):
      text = text[len(opening) : len(text) - len(closing)]
  depth, marks = 0, []
  for i, character in enumerate(text):
    depth += (character in "({[") - (character in ")}]")
    if depth == 0:
      marks += [(s, i) for s in _SEPARATORS if text.startswith(s, i)]
  present = {mark for mark, _ in marks}
  separator = next((s for s in _SEPARATORS if s in present), "")
  terms, start = [], 0
  for mark, i in [*marks, (separator, len(text))]:
    if mark == separator:
      terms.append(text[start:i].strip())
      start = i + len(separator)
  # Of a product `1 \cdot 2 \cdots n` the dots are a separator too.
  split = []
  for term in terms:
    pieces = term.split("\\ldots")
    for j, piece in enumerate(pieces):
      split += ["..."] * (j > 0) + [piece.strip()] * bool(piece.strip())
  return separator, split
