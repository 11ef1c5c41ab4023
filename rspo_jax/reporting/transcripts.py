"""What a run keeps of single completions, for people to look at.

1. A completion's pieces and the forward that wrote each of them: enough to
   play its denoising again, step by step (report, demo).
2. Target and estimate of each completion of a step, as the objective compares
   them: what the calibration plot is made of. In the unit of lambda:

       estimate_i = d_i (or L_i d_i), less its mean over the centring set
       gap_i      = advantage_i - lambda estimate_i

Host side and numpy alone: the numbers do not depend on how the device cut the
batch.
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


def centred(
  values: np.ndarray, keep: np.ndarray, centring: str, group_size: int
) -> np.ndarray:
  """Values less their mean over the kept of each centring set.

  Args:
    values: f64 [N], groups contiguous.
    keep: bool [N].
    centring: "group", "batch" or "none".
    group_size: G.

  Returns:
    f64 [N].
  """
  if centring == "none":
    return values
  size = group_size if centring == "group" else len(values)
  table, kept = values.reshape(-1, size), keep.reshape(-1, size)
  count = np.maximum(kept.sum(1, keepdims=True), 1)
  mean = np.where(kept, table, 0.0).sum(1, keepdims=True) / count
  return (table - mean).reshape(-1)


def calibration(
  policy: np.ndarray,
  reference: np.ndarray,
  advantage: np.ndarray,
  length: np.ndarray,
  keep: np.ndarray,
  row: np.ndarray,
  objective,
) -> dict[str, np.ndarray]:
  """Targets and estimates of the kept completions of a step.

  Args:
    policy, reference: f32 [N, K], scores before the update, groups contiguous.
    advantage: f32 [N].
    length: [N], scored tokens.
    keep: [N], 0 for completions that the step ignores.
    row: i32 [N], place in the rollout; the result is in its order.
    objective: `objectives.ObjectiveSettings`.

  Returns:
    Columns f64 [kept]: `relative` (d, nats per token), `estimate`, `advantage`,
    `gap`, and, where lambda is not 0, `target`.
  """
  keep = np.asarray(keep) > 0
  relative = np.asarray(policy, np.float64)
  if objective.subtract_reference:
    relative = relative - np.asarray(reference, np.float64)
  relative = relative.mean(1)
  in_unit = relative
  if objective.lambda_unit == "sequence":
    in_unit = relative * np.asarray(length, np.float64)
  estimate = centred(in_unit, keep, objective.centring, objective.group_size)
  advantage = np.asarray(advantage, np.float64)
  columns = {
    "relative": relative,
    "estimate": estimate,
    "advantage": advantage,
    "gap": advantage - objective.lambda_ * estimate,
  }
  if objective.lambda_:
    columns["target"] = advantage / objective.lambda_
  order = np.argsort(np.asarray(row), kind="stable")
  order = order[keep[order]]
  return {key: value[order] for key, value in columns.items()}


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
