"""What a run keeps of single completions, for people to look at.

1. A completion's pieces and the forward that wrote each of them: enough to
   play its denoising again, step by step (report, demo).
2. Target and estimate of each completion of a step, as the objective compares
   them: what the calibration plot is made of.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

CALIBRATION_ROWS = 512  # completions of one file
_DIGITS = 6


class Pieces:
  """Text of single tokens, special ones by name; remembers what it read."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self._text_by_id: dict[int, str] = {}

  def __call__(self, ids: Iterable[int]) -> list[str]:
    """One text a token; of a character cut in two, a replacement mark."""
    out = []
    for token in ids:
      token = int(token)
      if token not in self._text_by_id:
        self._text_by_id[token] = self._tokenizer.decode(
          [token], skip_special=False
        )
      out.append(self._text_by_id[token])
    return out


def denoising_rows(
  pieces: Pieces,
  tokens: np.ndarray,
  scored: np.ndarray,
  commit_step: np.ndarray,
) -> list[dict[str, Any]]:
  """Pieces and commit steps of completions through their first EOS.

  Args:
    pieces: of the model's tokenizer.
    tokens: i32 [n, L].
    scored: bool [n, L], True through the first EOS.
    commit_step: i32 [n, L], the forward that wrote a position; -1: none did.

  Returns:
    n dicts of two equally long lists, `pieces` and `commit_step`.
  """
  return [
    {"pieces": pieces(row[kept]), "commit_step": steps[kept].tolist()}
    for row, kept, steps in zip(tokens, scored, commit_step, strict=True)
  ]


def calibration_rows(columns: dict[str, np.ndarray]) -> list[dict[str, float]]:
  """The first completions as rows of samples/calibration-*.jsonl."""
  count = min(CALIBRATION_ROWS, len(columns["estimate"]))
  return [
    {key: float(f"{values[i]:.{_DIGITS}g}") for key, values in columns.items()}
    for i in range(count)
  ]


def readable(rows: Sequence[dict[str, Any]]) -> str:
  """Rows of samples/ as text: prompt, then a line a completion."""
  lines, prompt = [], None
  for row in rows:
    if row["prompt"] != prompt:
      prompt = row["prompt"]
      lines += ["", prompt] if lines else [prompt]
    verdict = "right" if row["correct"] else "wrong"
    reason = row.get("verdict", {}).get("reason", "")
    said = f"  [{verdict}, reward {row['reward']:.3g}"
    said += f": {reason}]" if reason else "]"
    lines.append("  " + row["completion"] + said)
  return "\n".join(lines)
