"""What is said of a run: before its steps, of each, and at its end."""

import shlex
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from rspo_jax import metrics, run_config, workdir
from rspo_jax.runs import Run

# Below it the gap is the advantage: rspo.md's bound for saying so.
NEGLIGIBLE_SHARE = 0.01


def finish(run: Run) -> None:
  """Exports the model, writes summary.json and says what came of the run."""
  settings, writer = run.settings, run.writer
  exported = ""
  if settings.run.export:
    exported = "model/" if run.program.lora is None else "model/, adapter/"
    with writer.phase(f"exporting {exported}"):
      run.export()
  seconds = {k: round(v, 2) for k, v in run.seconds.items()}
  summary = {
    "before": run.first_eval,
    "after": run.last_eval,
    "by_difficulty": run.by_difficulty,
    "seconds": seconds,
    "steps": run.step,
  }
  share = lambda_share(run)
  if share is not None:
    summary["lambda_share"] = share
  if run.main_process:
    workdir.write_json(run.workdir / run_config.SUMMARY, summary)
  writer.table(
    _changes(run),
    title=f"{settings.eval.split}, n = {run.last_eval['eval/n']}, "
    f"{run.step} steps",
  )
  writer.say(_spent(seconds))
  if said := _gap(settings.objective, share):
    writer.say(said)
  for line in _left(run, exported):
    writer.say(line)


def _changes(run: Run) -> list[dict[str, str]]:
  """Rows of a table: evaluations before and after."""
  temperature = run.settings.sampled.temperature
  rows = []
  for name, key in (
    ("greedy accuracy", "eval/accuracy"),
    (f"accuracy at T={temperature:g}", "eval/accuracy_sampled"),
    ("mean reward (greedy)", "eval/reward"),
  ):
    before, after = run.first_eval[key], run.last_eval[key]
    rows.append(
      {
        "": name,
        "before": f"{before:.3f}",
        "after": f"{after:.3f}",
        "change": f"{after - before:+.3f}",
      }
    )
  return rows


def _phases(values: Mapping[str, float]) -> dict[str, float]:
  """Seconds by phase, "step" the whole, of keys such as time/rollout_s."""
  return {
    key[5:-2]: value
    for key, value in values.items()
    if key.startswith("time/") and key.endswith("_s")
  }


def _spent(seconds: Mapping[str, float]) -> str:
  """Where the time of a run went."""
  phases = _phases(seconds)
  total = max(phases.pop("step", 0.0), 1e-9)
  phases["other"] = max(0.0, total - sum(phases.values()))
  split = ", ".join(
    f"{name} {100 * value / total:.0f} %" for name, value in phases.items()
  )
  first_s = seconds.get("first_calls", 0.0)
  return (
    f"Steps took {total:.0f} s, {first_s:.0f} s of them in first calls, which "
    f"compile: {split}."
  )


def _gap(objective, share: float | None) -> str:
  """That the gap did nothing, where it did nothing; else ""."""
  if objective.name == "rspo" and not objective.lambda_:
    return "objective.lambda_=0: this run was advantage-weighted ELBO, without a gap."
  if share is not None and share < NEGLIGIBLE_SHARE:
    return (
      f"gap/lambda_share was {share:.1e} on average: the gap was the advantage "
      "and this run advantage-weighted ELBO. A larger objective.lambda_ makes "
      "the gap act."
    )
  return ""


def _left(run: Run, exported: str) -> Iterator[str]:
  """What the run's folder holds, and what to do with it."""
  tensorboard = ", tensorboard/" if run.settings.run.tensorboard else ""
  folder, home = run.workdir, run.home.address
  yield (
    f"In {home}: metrics.jsonl, samples/, checkpoints/{tensorboard}"
    + (f", {exported}." if exported else ".")
  )
  yield "Next:"
  report = ["python", "-m", "rspo_jax.report", str(folder), "--out=report.html"]
  yield f"  {shlex.join(report)}"
  if exported:
    demo = ["python", "-m", "rspo_jax.demo", f"--model={folder / 'model'}"]
    yield f"  {shlex.join(demo)}"
  yield (
    f"  the same command with {shlex.quote(f'--workdir={home}')} --mode=eval "
    "--config.eval.split=test"
  )


def lambda_share(run: Run) -> float | None:
  """Mean of gap/lambda_share over the run's rows; None without a lambda."""
  if not run.settings.objective.lambda_:
    return None
  shares = [
    row["gap/lambda_share"]
    for row in metrics.read_rows(run.writer.path)
    if row.get("gap/lambda_share") is not None
  ]
  return float(np.mean(shares)) if shares else None


def described(run: Run) -> str:
  """What the debug level says before the first step."""
  settings = run.settings
  total = settings.rollout.prompts * settings.rollout.group_size
  size = sum(x.size for x in jax.tree.leaves(run.state.params))
  mesh = " x ".join(f"{k} {n}" for k, n in run.program.mesh.shape.items())
  return (
    f"{size:,} trained parameters on {jax.device_count()} "
    f"{jax.devices()[0].device_kind} ({mesh}); {total} sequences a step in "
    f"micro-batches of {settings.step.micro_batch}; prompts of "
    f"{settings.prompt_length}, completions of "
    f"{settings.sampler.completion_length} tokens"
  )


def timed(step: int, values: dict[str, float]) -> str:
  """What the debug level says of a step: where its time went."""
  phases = _phases(values)
  total = phases.pop("step", 0.0)
  split = ", ".join(f"{name} {s:.3f}" for name, s in phases.items())
  return f"step {step}: {total:.3f} s ({split})"
