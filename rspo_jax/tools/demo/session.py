"""A loaded model that completes prompts and shows how.

A prompt is encoded and padded on the left to a multiple of 8 tokens, so that
few programs are compiled. Of the tasks `countdown` and `sudoku` the compact
prompt (`3,5,7=56`, 16 digits with 0 for an empty cell) is understood as an
example: the answer then gets the verifier's verdict. Any other text is a
message to a model that has a chat template.

The sampler runs as it does in training. What is shown comes from inside the
compiled loop: before each forward the canvas is handed to the host, so a large
model is seen at the speed at which it works.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

from rspo_jax.config import identity
from rspo_jax.run import rules

PROMPT_CHARACTERS = 4000  # longest prompt that is read
LONGEST = 1024  # tokens of a completion
EXAMPLES = 64  # prompts that are offered
TASKS = ("countdown", "sudoku")
_BUCKET = 8
_COMPILED = 16  # programs that are kept
_END = "\u220e"
# Completion and block length, steps, where the command says nothing.
_SHAPES = {"countdown": (8, 8, 8), "sudoku": (16, 16, 16)}
_GENERAL = (128, 32, 64)


@dataclasses.dataclass(frozen=True)
class Answer:
  """A finished completion.

  Attributes:
    text: through the first EOS, without special tokens.
    pieces: text of each token through the first EOS.
    commit_step: forward that wrote each of them.
    forwards: of the model.
    seconds: from first to last forward, compilation included.
    verdict: the verifier's, or None where the prompt is no task's.
  """

  text: str
  pieces: list[str]
  commit_step: list[int]
  forwards: int
  seconds: float
  verdict: dict[str, Any] | None


class Session:
  """A loaded model that answers prompts, one at a time."""

  prompt_characters = PROMPT_CHARACTERS

  def __init__(self, path: str, task: str = "", dtype: str = ""):
    """Loads the model.

    Args:
      path: folder or embedded:NAME.
      task: key of `TASKS`, "none", or "" for what the model's folder says.
      dtype: of the parameters; "" for float32, bfloat16 above a billion.

    Raises:
      ValueError: no such model, or one without a tokenizer.
    """
    import rspo_jax
    from rspo_jax.reporting import transcripts

    folder = rules.resolve_model_path(path)
    self.name = path
    self.task = task or task_of(path, folder)
    if not dtype:
      files = pathlib.Path(folder).glob("*.safetensors")
      small = sum(file.stat().st_size for file in files) < 2 * 10**9
      dtype = "float32" if small else "bfloat16"
    self.model = rspo_jax.load_model(folder, dtype=dtype)
    if self.model.tokenizer is None:
      raise ValueError(
        f"--model={path} has no tokenizer.json, so that it can read no prompt; "
        "put the model's tokenizer files beside it."
      )
    self.pieces = transcripts.Pieces(self.model.tokenizer)
    self._listener: Callable = lambda tokens: None
    # A program a shape: the cache counts what JAX keeps.
    self._compiled = functools.lru_cache(_COMPILED)(
      lambda settings, width: _sampler(
        self.model.config, settings, lambda row: self._listener(row)
      )
    )

  @property
  def shape(self) -> tuple[int, int, int]:
    """Completion length, block length and steps by default."""
    length, block, steps = _SHAPES.get(self.task, _GENERAL)
    longest = self.model.config.max_length
    while length > max(1, longest // 2):
      length, block, steps = length // 2, max(1, block // 2), steps // 2
    return length, block, max(1, steps)

  @property
  def longest(self) -> int:
    """Most tokens of a completion."""
    return min(LONGEST, self.model.config.max_length - 1)

  @functools.cached_property
  def examples(self) -> list[str]:
    """Prompts of the task's validation split, in their compact form."""
    if self.task not in TASKS:
      return []
    module = importlib.import_module(f"rspo_jax.datasets.{self.task}")
    columns = module.generate(0, "validation", EXAMPLES).columns()
    if self.task == "sudoku":
      return [puzzle.decode() for puzzle in columns["puzzle"]]
    return [
      f"{','.join(str(int(n)) for n in numbers)}={int(target)}"
      for numbers, target in zip(
        columns["numbers"], columns["target"], strict=True
      )
    ]

  def check(self, **values) -> Any:
    """Sampler settings of a request.

    Args:
      **values: length, block, steps, temperature, cache, threshold; those
        that are missing or None take their defaults.

    Raises:
      ValueError: names the value and the remedy.
    """
    from rspo_jax.sampling import settings as sampling

    length, block, steps = self.shape
    given = {key: v for key, v in values.items() if v is not None}
    length = given.get("length", length)
    if not 1 <= length <= self.longest:
      raise ValueError(
        f"length={length} must lie between 1 and {self.longest}."
      )
    block = given.get("block", min(block, length))
    steps = given.get("steps", min(steps, length))
    if steps > length:
      raise ValueError(
        f"steps={steps} is more than one a token; use at most {length}."
      )
    settings = sampling.SamplerSettings(
      completion_length=length,
      block_length=block,
      steps=steps,
      temperature=float(given.get("temperature", 0.0)),
      cache=given.get("cache", "none"),
      threshold=given.get("threshold"),
    )
    try:
      sampling.validate(settings)
    except ValueError as error:
      text = str(error).replace("sampler.", "").replace("_length", "")
      raise ValueError(text.replace("completion", "length")) from error
    return settings

  def read(self, text: str) -> tuple[dict | None, str]:
    """(the task's example or None, the text that the model is given).

    Raises:
      ValueError: an empty or overlong prompt, or one that this model cannot
        read.
    """
    text = text.strip()
    if not text or len(text) > PROMPT_CHARACTERS:
      raise ValueError(
        f"a prompt of {len(text)} characters cannot be answered; give 1 to "
        f"{PROMPT_CHARACTERS}."
      )
    tokenizer = self.model.tokenizer
    example = example_of(self.task, text)
    if tokenizer.template is None:
      if example is None and self.task in TASKS:
        form = {
          "countdown": "numbers and target, such as 3,5,7=56",
          "sudoku": "16 digits, 0 where a cell is empty",
        }[self.task]
        raise ValueError(f"this model reads {self.task} alone: {form}.")
      return example, text
    if example is not None:
      from rspo_jax.tasks import TASKS as tasks

      text = tasks[self.task].prompt(example, "d1")
    return example, tokenizer.chat([{"role": "user", "content": text}])

  def answer(
    self, text: str, settings, seed: int, tell: Callable[[list], None]
  ) -> Answer:
    """Completes a prompt.

    Args:
      text: what was typed.
      settings: of `check`.
      seed: of the draws, below 2**32.
      tell: called before each forward with the completion's pieces, None where
        nothing is written yet; from a thread of the runtime.

    Raises:
      ValueError: a prompt that cannot be read.
    """
    import jax
    import numpy as np

    config, length = self.model.config, settings.completion_length
    example, prompt = self.read(text)
    ids = self.model.tokenizer.encode(prompt)
    room = config.max_length - length
    if not 0 < len(ids) <= room:
      raise ValueError(
        f"the prompt has {len(ids)} tokens and leaves no room for {length} "
        f"more in the model's {config.max_length}; shorten it or the length."
      )
    width = min(room, -(-len(ids) // _BUCKET) * _BUCKET)
    pad = width - len(ids)
    canvas = np.full((1, width + length), config.mask_id, np.int32)
    canvas[0, :pad], canvas[0, pad:width] = config.pad_id, ids
    mask = np.ones(canvas.shape, bool)
    mask[0, :pad] = False

    def listen(tokens):
      row = np.asarray(tokens)[-length:]
      tell(self.shown(row))

    fn = self._compiled(settings, width)
    self._listener = listen
    start = time.perf_counter()
    try:
      out = fn(self.model.params, canvas, mask, np.uint32(seed))
      jax.block_until_ready(out)
      jax.effects_barrier()
    finally:
      self._listener = lambda tokens: None
    seconds = time.perf_counter() - start
    row = np.asarray(out.tokens)[0, width:]
    tell(self.shown(row))
    ends = np.flatnonzero(row == config.eos_id)
    kept = row[: ends[0] + 1] if len(ends) else row
    answer = self.model.tokenizer.decode(kept.tolist())
    return Answer(
      text=answer,
      pieces=self.pieces(kept),
      commit_step=np.asarray(out.commit_step)[0, : len(kept)].tolist(),
      forwards=int(out.denoiser_calls),
      seconds=seconds,
      verdict=self.verdict(example, answer),
    )

  def shown(self, row) -> list[str | None]:
    """Pieces of a canvas i32 [L]: None where masked, a mark for EOS."""
    config = self.model.config
    special = {config.mask_id: None, config.eos_id: _END}
    return [
      special.get(int(token), piece)
      for token, piece in zip(row, self.pieces(row), strict=True)
    ]

  def verdict(self, example, text: str) -> dict[str, Any] | None:
    """What the task's verifier says, or None without a task."""
    if example is None:
      return None
    from rspo_jax.run import rollout
    from rspo_jax.tasks import TASKS as tasks

    return rollout.verdict_row(tasks[self.task].verify(example, text))[
      "verdict"
    ]


def task_of(path: str, folder: str) -> str:
  """The task that a model was made for, "none" where nothing says so."""
  if path.startswith(rules.EMBEDDED):
    return path.removeprefix(rules.EMBEDDED)
  # DIR/model of a run: DIR/config.json names it.
  config = pathlib.Path(folder).absolute().parent / identity.CONFIG
  try:
    name = json.loads(config.read_text(encoding="utf-8"))["task"]["name"]
  except (OSError, ValueError, KeyError, TypeError):
    return "none"
  return name if name in TASKS else "none"


def example_of(task: str, text: str) -> dict | None:
  """The example that a compact prompt means; None where it is none.

  Raises:
    ValueError: a sudoku without a solution.
  """
  text = "".join(text.split())
  if task == "countdown" and re.fullmatch(
    r"\d{1,6}(,\d{1,6}){1,7}=\d{1,9}", text
  ):
    numbers, _, target = text.partition("=")
    return {"ground_truth": [list(map(int, numbers.split(","))), int(target)]}
  if task == "sudoku" and re.fullmatch(r"[0-4]{16}", text):
    from rspo_jax.datasets import sudoku

    for grid in sudoku.all_grids():
      solution = "".join(str(int(cell)) for cell in grid)
      if all(a in ("0", b) for a, b in zip(text, solution, strict=True)):
        return {"puzzle": text, "ground_truth": solution}
    raise ValueError(f"the sudoku {text} has no solution; change a clue.")
  return None


def _sampler(config, settings, tell: Callable):
  """Compiled (params, canvas, mask, seed) -> samples; `tell` gets a row i32 [S]
  before each forward."""
  import jax

  from rspo_jax import api
  from rspo_jax.models import functions
  from rspo_jax.sampling.denoise import denoise

  denoise_fn = functions.make_denoise_fn(config)

  def watched(params, tokens, *rest):
    jax.debug.callback(tell, tokens[0], ordered=True)
    return denoise_fn(params, tokens, *rest)

  @jax.jit
  def run(params, canvas, mask, seed):
    with api.precision(config):
      return denoise(
        watched,
        params,
        canvas,
        mask,
        jax.random.key(seed),
        settings,
        mask_id=config.mask_id,
        eos_id=config.eos_id,
      )

  return run
