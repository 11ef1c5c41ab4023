"""What evaluations say to a reader: tables, and the files they leave.

    python -m rspo_jax.scores DIR [DIR ...]

prints one table over every evaluation (`--mode=eval`) that was written to the
folders, as Markdown.

1. An evaluation is one JSON object, DIR/eval/NAME.json: what was evaluated, its
   `eval/*` metrics and the accuracies by difficulty. `read` finds them.
2. `table` puts several side by side; `decodings`, `passes` and `difficulties`
   are the tables of one.
3. `d1_document` is an evaluation in the layout of d1's program, so that its
   scripts can read ours: its field names, without its prompts or verdicts.
"""

import hashlib
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PASS = "eval/pass_at_"


def percent(share: float) -> str:
  """A share as a cell of a table."""
  return f"{100 * share:.1f} %"


def interval(low: float, high: float) -> str:
  """An interval of shares as a cell of a table."""
  return f"{100 * low:.1f} to {100 * high:.1f}"


def natural(text: str) -> list:
  """Sorts texts by the numbers in them: "9 empty" before "10 empty"."""
  parts = re.split(r"([0-9]+)", text)
  return [int(p) if i % 2 else p for i, p in enumerate(parts)]


def sampler_name(settings) -> str:
  """A sampler as an entry of `eval.samplers` names it.

  Args:
    settings: sampler.SamplerSettings; lengths and temperature are not part of
      the name.
  """
  parts = [settings.algorithm]
  if settings.remasking != "low_confidence":
    parts.append(settings.remasking)
  if settings.cache != "none":
    parts.append(settings.cache)
  for name in ("threshold", "factor", "top_p", "top_k", "cfg_scale"):
    value = getattr(settings, name)
    if value is not None and (name != "cfg_scale" or value):
      parts.append(f"{name}={value:g}")
  return "+".join(parts)


def decodings(values: Mapping[str, float]) -> list[dict[str, str]]:
  """Rows of the table of one evaluation, one a decoding.

  Args:
    values: `evaluate.metrics`.
  """
  rows = []
  for kind, end in (("greedy", ""), ("sampled", "_sampled")):
    row = {
      "decoding": kind,
      "accuracy": percent(values["eval/accuracy" + end]),
      "95 % interval": interval(
        values["eval/ci_low" + end], values["eval/ci_high" + end]
      ),
      "mean reward": f"{values['eval/reward' + end]:.3f}",
      "forwards": f"{values['eval/denoiser_calls' + end]:.4g}",
      "tokens/s": _speed(values, end),
    }
    rows.append(row)
  return rows


def _speed(values: Mapping[str, float], end: str) -> str:
  """Tokens a second, empty where nothing ran that was compiled before."""
  speed = values.get(f"eval/tokens{end}_per_s")
  return "" if speed is None else f"{speed:,.0f}"


def passes(values: Mapping[str, float]) -> list[dict[str, str]]:
  """One row with every pass@k, none where prompts have one sample."""
  row = {
    f"pass@{key.removeprefix(_PASS)}": percent(value)
    for key, value in values.items()
    if key.startswith(_PASS)
  }
  return [row] if row else []


def difficulties(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """The table of `evaluate.by_difficulty`."""
  return [
    {
      "difficulty": row["difficulty"],
      "n": str(row["n"]),
      "greedy": percent(row["accuracy"]),
      "95 % interval": interval(row["ci_low"], row["ci_high"]),
      "sampled": percent(row["accuracy_sampled"]),
    }
    for row in rows
  ]


def free_stem(stem: pathlib.Path, line: Mapping[str, Any]) -> pathlib.Path:
  """Where an evaluation's files go: over the same one's, no other's.

  Args:
    stem: folder and beginning of the files' names.
    line: what is evaluated and how, without the results.

  Returns:
    The stem, with eight more digits if another evaluation has it.
  """
  try:
    there = json.loads(stem.with_name(f"{stem.name}.json").read_text("utf-8"))
  except (OSError, ValueError):
    return stem
  if isinstance(there, dict) and line.items() <= there.items():
    return stem
  text = json.dumps(line, sort_keys=True)
  digits = hashlib.sha256(text.encode()).hexdigest()[:8]
  return stem.with_name(f"{stem.name}-{digits}")


def read(folders: Iterable[str | pathlib.Path]) -> list[dict[str, Any]]:
  """Every evaluation in DIR/eval (or DIR itself) of some folders.

  Args:
    folders: of runs, or their eval/.

  Returns:
    the evaluations, by task, model, split, length, sampler and seed.

  Raises:
    ValueError: a folder without any, or a file that is none.
  """
  found = []
  for folder in map(pathlib.Path, folders):
    inside = folder / "eval" if (folder / "eval").is_dir() else folder
    paths = sorted(inside.glob("*.json"))
    if not paths or ((folder / "metrics.jsonl").is_file() and inside == folder):
      raise ValueError(
        f"{folder} holds no evaluation; write one with --mode=eval "
        f"{shlex.quote(f'--workdir={folder}')}."
      )
    for path in paths:
      try:
        row = json.loads(path.read_text(encoding="utf-8"))
      except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
      if not isinstance(row, dict) or "eval/accuracy" not in row:
        raise ValueError(f"{path} is no evaluation; remove it from {inside}.")
      found.append(row)
  return sorted(
    found,
    key=lambda row: (
      row["task"],
      row["model"],
      row["step"],
      row["split"],
      row["completion_length"],
      row["sampler"],
      row["seed"],
    ),
  )


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Several evaluations side by side; what is the same in all is left out.

  Args:
    rows: as `read` gives them.
  """
  telling = {
    "task": "task",
    "model": "model",
    "step": "step",
    "split": "split",
    "protocol": "protocol",
    "completion_length": "length",
    "sampler": "sampler",
    "seed": "seed",
    "temperature": "T",
  }
  shown = [
    key
    for key in telling
    if key == "completion_length" or len({str(row[key]) for row in rows}) > 1
  ]
  ks = sorted(
    {
      int(key.removeprefix(_PASS))
      for row in rows
      for key in row
      if key.startswith(_PASS)
    }
  )
  cells = []
  for row in rows:
    cell = {telling[key]: str(row[key]) for key in shown}
    cell["n"] = str(row["eval/n"])
    for name, end in (("greedy", ""), ("sampled", "_sampled")):
      cell[name] = percent(row["eval/accuracy" + end])
      cell[f"{name}, 95 %"] = interval(
        row["eval/ci_low" + end], row["eval/ci_high" + end]
      )
    for k in ks[1:]:  # pass@1 is the sampled accuracy
      share = row.get(f"{_PASS}{k}")
      cell[f"pass@{k}"] = "" if share is None else percent(share)
    cell["forwards"] = f"{row['eval/denoiser_calls']:.4g}"
    cell["tokens/s"] = _speed(row, "")
    cells.append(cell)
  return cells


def markdown(cells: Sequence[Mapping[str, str]]) -> str:
  """Rows with the same keys as a Markdown table."""
  header = list(cells[0])
  lines = [
    header,
    ["---"] * len(header),
    *([c[k] for k in header] for c in cells),
  ]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def d1_question(task: str, example: Mapping[str, Any]) -> str:
  """The question of an example in the words that d1's parsers look for."""
  if task == "countdown":
    numbers, target = example["ground_truth"]
    return f"Numbers: {list(numbers)}\nTarget: {target}"
  if task == "sudoku":
    return f"Solve the following Sudoku puzzle: {example['puzzle']}\n"
  return str(example.get("question", example.get("prompt", "")))


def d1_document(
  task: str,
  examples: Sequence[Mapping[str, Any]],
  prompts: Sequence[str],
  completions: Sequence[str],
  settings,
  model: str,
) -> tuple[str, dict[str, Any]]:
  """An evaluation in the layout of d1's eval.py.

  Args:
    task: its name.
    examples: n examples.
    prompts: n texts that the model was given.
    completions: n texts.
    settings: sampler.SamplerSettings that made them.
    model: what was evaluated.

  Returns:
    (name of the file, its content).
  """
  length, steps = settings.completion_length, settings.steps
  name = re.sub(r"[^A-Za-z0-9.-]+", "-", task)
  rows = [
    {
      "question": d1_question(task, example),
      "prompt_input": prompt,
      "generations": completion,
      "ground_truth": example.get("ground_truth", example.get("answer")),
    }
    for example, prompt, completion in zip(
      examples, prompts, completions, strict=True
    )
  ]
  return f"{name}_model_{length}_{steps}_0_generations.json", {
    "generations": rows,
    "metrics": {"total_processed": len(rows)},
    "model_path": model,
    "checkpoint_path": "",
    "gen_length": length,
    "diffusion_steps": steps,
    "block_length": settings.block_length,
  }


def main(arguments: Sequence[str]) -> int:
  """Prints the table of the folders named; returns the exit status."""
  if not arguments or arguments[0].startswith("-"):
    print("usage: python -m rspo_jax.scores DIR [DIR ...]", file=sys.stderr)
    return 2 if not arguments else 0
  try:
    print(markdown(table(read(arguments))))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
