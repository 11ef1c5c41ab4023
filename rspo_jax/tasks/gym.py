"""reasoning-gym's generators as tasks, with their own scorers.

`task.name=reasoning_gym:NAME` is the generator NAME; options of it follow as
`,KEY=VALUE`, values in JSON: `reasoning_gym:chain_sum,max_terms=2`.

1. Entries 0, 1, 2, ... of the generator are made once (`data.seed`, `data.size`)
   and kept beside the prepared datasets.
2. An entry belongs to validation or test by the hash of its question, one in
   eight each, so that splits share no question; held-out splits hold none twice.
3. The answer is what the last closed <answer> tag holds; without any tag the
   whole completion. Its score, in [0, 1], is the generator's. 1 is correct.
4. The compact prompt is the question without what all questions of the data
   begin and end with: what a tiny model has no use for.

The package runs in worker processes (`generators`): pip install -r
requirements-gym.txt.
"""

import contextlib
import functools
import json
import pathlib
import re
import zlib
from collections.abc import Sequence

from rspo_jax.config import keys, names, schema
from rspo_jax.datasets import files
from rspo_jax.devices import workers
from rspo_jax.storage import files as storage_files
from rspo_jax.tasks import answers, base, own

PREFIX = "reasoning_gym:"
WEIGHTS = {"score": 1.0, "format": 0.0}
# Entries of all splits together.
ENTRIES = {"small": 2_048, "large": 16_384}

_TARGET = "rspo_jax.tasks.generators:call"
_VERSION = 1  # of the files that keep entries
_BUCKETS = 8
# Of making entries, where nothing hostile is at work but much computing is.
_MAKING = workers.Limits(time_s=120.0)
_CORRECT = 1.0 - 1e-9
_REMEDY = "pip install -r requirements-gym.txt"


def _pool(count: int, limits: workers.Limits) -> workers.Workers:
  return workers.pool(_TARGET, count, limits, quiet=True)


def _map(pool: workers.Workers, calls: Sequence[tuple]):
  try:
    return pool.map(calls)
  except workers.FunctionError as error:
    raise ValueError(
      f"task.name={PREFIX}... needs the package reasoning-gym, which cannot be"
      f" used: {error} {_REMEDY}"
    ) from error


def parse(name: str) -> tuple[str, str]:
  """Splits `reasoning_gym:NAME,KEY=VALUE,...`.

  Returns:
    (NAME, options as canonical JSON).

  Raises:
    ValueError: not of that form.
  """
  head, *rest = re.split(r",(?=\s*\w+\s*=)", name.removeprefix(PREFIX))
  options = {}
  for part in rest:
    key, _, text = part.partition("=")
    try:
      value = json.loads(text)
    except ValueError:
      value = text.strip()
    options[key.strip()] = value
  if not re.fullmatch(r"[a-z0-9_]+", head.strip()):
    raise ValueError(
      f"task.name={name!r} must be {PREFIX}NAME with the name of a generator,"
      f" such as {PREFIX}mini_sudoku, and options as ,KEY=VALUE."
    )
  return head.strip(), json.dumps(options, sort_keys=True)


def _check(pool: workers.Workers, name: str, options: str) -> None:
  """Refuses generators and options that reasoning-gym does not have."""
  (found,) = _map(pool, [("names",)])
  if found.reason:
    raise ValueError(f"task.name={PREFIX}{name}: {found.reason}; {_REMEDY}")
  if name not in found.value:
    near = names.nearest(name, found.value)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose from "
    more = "" if near else ", ".join(found.value)
    raise ValueError(
      f"task.name={PREFIX}{name}: reasoning-gym has no such generator;"
      f" {hint}{more}"
    )
  (found,) = _map(pool, [("check", name, options)])
  if found.value:
    raise ValueError(
      f"task.name={PREFIX}{name}: options {options} are not all known; it has"
      f" {', '.join(found.value)}."
    )
  if found.reason:
    raise ValueError(
      f"task.name={PREFIX}{name}: options {options} are refused"
      f" ({found.reason})."
    )


def _kept_in(name: str, options: str, seed: int, size: int, data_dir: str):
  """The file that keeps the entries of a generator."""
  from importlib import metadata

  from rspo_jax.datasets import folders

  try:
    package = metadata.version("reasoning-gym")
  except metadata.PackageNotFoundError:
    package = "none"
  digest = f"{zlib.crc32(options.encode()):08x}"
  folder = folders.data_folder(data_dir) / "reasoning_gym" / package
  return folder / f"{name}-{digest}-{size}-seed{seed}-v{_VERSION}.jsonl"


def _entries(name, options, seed, size, data_dir, count) -> list[list]:
  """[index, question, answer] of every entry that could be made."""
  path = _kept_in(name, options, seed, size, data_dir)
  pool = _pool(count, _MAKING)
  _check(pool, name, options)
  if path.exists():
    try:
      return [row["entry"] for _, row in files.read_rows(path)]
    except (ValueError, KeyError, TypeError):
      path.unlink()  # damaged: it is only a shortcut
  calls = [("entry", name, options, seed, size, i) for i in range(size)]
  outcomes = _map(pool, calls)
  made = [[i, *o.value] for i, o in enumerate(outcomes) if not o.reason]
  if not made:
    raise ValueError(
      f"task.name={PREFIX}{name}: not one entry can be made"
      f" ({outcomes[0].reason}); change its options."
    )
  _keep(path, made)
  return made


def _keep(path: pathlib.Path, made: list[list]) -> None:
  """Writes entries for the next start, or leaves it where the disk refuses."""
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"entry": entry}) + "\n" for entry in made)
    storage_files.write(path, "".join(lines))


def _shared_head(texts: Sequence[str]) -> str:
  """What all texts begin with: what the first and the last of them do."""
  first, last = min(texts), max(texts)
  count = 0
  while count < min(len(first), len(last)) and first[count] == last[count]:
    count += 1
  return first[:count]


def shared_ends(questions: Sequence[str]) -> tuple[int, int]:
  """Characters that all questions begin and end with, to whole words.

  (0, 0) where nothing would be left of one.
  """
  # A number that begins alike everywhere is not cut in two.
  start = len(re.sub(r"\S+\Z", "", _shared_head(questions)))
  tail = _shared_head([question[::-1] for question in questions])
  end = len(re.sub(r"\w+\Z", "", tail))
  if start + end >= min(len(question) for question in questions):
    return 0, 0
  return start, end


@functools.lru_cache(maxsize=8)
def _examples(name, options, seed, size, data_dir, count):
  """Examples of every split, by split."""
  entries = _entries(name, options, seed, size, data_dir, count)
  start, end = shared_ends([question for _, question, _ in entries])
  splits = {split: [] for split in base.SPLITS}
  seen = set()
  foil = next((answer for _, _, answer in entries[::-1] if answer), None)
  for index, question, answer in entries:
    bucket = zlib.crc32(question.encode()) % _BUCKETS
    split = {0: "validation", 1: "test"}.get(bucket, "train")
    if split != "train":
      if question in seen:
        continue
      seen.add(question)
    bare = " ".join(question[start : len(question) - end].split())
    splits[split].append(
      {
        "prompt": question,
        "compact": bare,
        "ground_truth": answer,
        "foil": foil,
        "entry": [name, options, seed, size, index],
      }
    )
    foil = answer or foil
  return splits


def prompt(example: base.Example, style: str) -> str:
  """Returns the user's text; see the module for the compact style."""
  if style == "compact":
    return example["compact"]
  return own.prompt(example, style)


def demonstration(example: base.Example) -> str:
  """Returns the generator's answer.

  Raises:
    ValueError: it has none, since many are right.
  """
  if example["ground_truth"] is None:
    raise ValueError(
      f"the generator {example['entry'][0]} gives no answers, which supervised"
      " training needs; train on its scores."
    )
  return example["ground_truth"]


def corrupt(example: base.Example, rng) -> str:
  """Returns the answer to another question of the generator."""
  del rng
  if example["foil"] is None:
    demonstration(example)  # says why there is none
  return example["foil"]


def final_answer(text: str) -> str:
  """Returns the part of a completion that counts as its answer."""
  if "<answer>" in text:
    return (answers.last_tag(text) or "").strip()
  return text.strip()


def _finding(answer: str, outcome: workers.Outcome) -> base.Finding:
  """Reads what a scorer returned."""
  parts = {"score": 0.0, "format": float(bool(answer))}
  reason = f"scored {answer[:40]!a}"
  if outcome.reason:
    reason = f"{base.NO_VERDICT}{outcome.reason}"
  else:
    score, failure = outcome.value
    if failure:
      reason = f"no answer to its scorer ({failure}): {answer[:40]!a}"
    # Neither more than all of it nor less than nothing; nan is nothing.
    parts["score"] = min(score, 1.0) if score > 0 else 0.0
  return parts["score"] >= _CORRECT, parts, reason


def make_task(name: str, settings: own.RewardSettings) -> base.Task:
  """Makes the task of a generator.

  Args:
    name: `reasoning_gym:NAME` with options.
    settings: how its scorer is called.

  Raises:
    ValueError: the name is not of that form.
  """
  generator, options = parse(name)

  def examples(split: str, data: schema.Data) -> Sequence[base.Example]:
    if data.source:
      raise ValueError(
        f"data.source={data.source!r} has no meaning with task.name={name},"
        " which makes its own data; leave it empty."
      )
    keys.one_of("data.size", data.size, ENTRIES)
    size, count = ENTRIES[data.size], settings.processes
    made = _examples(generator, options, data.seed, size, data.dir, count)
    return made[split]

  def strict(pairs: base.Pairs) -> list[base.Finding]:
    # Half a surrogate pair is nothing that a scorer should have to expect.
    found = [
      final_answer(answers.clip(text)).encode("utf-8", "replace").decode()
      for _, text in pairs
    ]
    calls = [
      (
        "score",
        *example["entry"],
        zlib.crc32(example["prompt"].encode()),
        answer,
      )
      for (example, _), answer in zip(pairs, found, strict=True)
    ]
    outcomes = _map(_pool(settings.processes, settings.limits), calls)
    return list(map(_finding, found, outcomes))

  return base.Task(
    name=name,
    examples=examples,
    words=prompt,
    demonstration=demonstration,
    corrupt=corrupt,
    strict=strict,
    weights=WEIGHTS,
    styles=own.STYLES,
  )
