"""The evaluations of --mode=eval: of what, and what is written of them."""

import functools
import json

from rspo_jax.config import identity
from rspo_jax.reporting import tables
from rspo_jax.run import evaluate, state
from rspo_jax.run.runs import Run
from rspo_jax.storage import files
from rspo_jax.storage.checkpoint import Checkpointer, CheckpointError


def load_evaluated(run: Run) -> str:
  """Loads what is to be evaluated: DIR's last checkpoint, or model.path.

  Returns:
    Its name.

  Raises:
    ValueError: there is neither, or the checkpoint cannot be used.
  """
  folder = run.home.address / "checkpoints"
  path = run.settings.model.path
  before = identity.read_config(run.home.address)
  if before is not None and before["model"].get("path") == path:
    with Checkpointer(folder) as checkpointer:
      try:
        template = functools.partial(state.template, run.program)
        restored = checkpointer.restore(template)
      except CheckpointError as error:
        raise ValueError(str(error)) from error
    if restored is not None:
      for message in restored.messages:
        run.writer.warn(message)
      run.state = state.from_checkpoint(
        restored.step, restored.state, restored.extra
      )
      run.saved_step = restored.step
      return f"{folder} at step {restored.step}"
  if not path:
    raise ValueError(
      f"--workdir={run.home.address} holds no checkpoint and model.path is "
      "empty: there is nothing to evaluate; give one of them."
    )
  return path


def evaluate_all(run: Run, source: str) -> None:
  """Evaluates and prints one line an evaluation; writes DIR/eval/ alone.

  Raises:
    Interrupted: a signal came.
  """
  settings, folder = run.settings, run.workdir / "eval"
  for evaluation in settings.evaluations:
    length = evaluation.greedy.completion_length
    parts = [settings.eval.split, str(length), evaluation.name]
    parts = [*filter(None, parts), f"step{run.state.step:06d}"]
    line = {
      "model": source,
      "split": settings.eval.split,
      "step": run.state.step,
      "completion_length": length,
      "sampler": tables.sampler_name(evaluation.greedy),
      "temperature": evaluation.sampled.temperature,
      "samples": settings.eval.samples,
      "seed": evaluation.seed,
      "task": settings.task.name,
      "protocol": settings.task.protocol,
    }
    stem = tables.free_stem(folder / "-".join(parts), line)
    values, greedy = evaluate.evaluate(run, stem, evaluation)
    line |= values | {"by_difficulty": run.state.by_difficulty}
    if run.main_process:
      files.write_json(folder / f"{stem.name}.json", line)
      print(json.dumps(line), flush=True)
      if settings.eval.d1_files:
        texts = [row["completion"] for row in greedy.rows]
        name, document = tables.d1_document(
          settings.task.name,
          run.eval_prompts.examples,
          [run.prompt_text(i) for i in range(len(texts))],
          texts,
          evaluation.greedy,
          source,
        )
        (folder / "d1" / evaluation.name).mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "d1" / evaluation.name / name, document)
  if run.main_process and len(settings.evaluations) > 1:
    run.writer.table(tables.table(tables.read([folder])))
