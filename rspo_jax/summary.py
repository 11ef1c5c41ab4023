"""What is said of a run: before its steps, of each, and at its end."""

import jax
import numpy as np

from rspo_jax import metrics, workdir
from rspo_jax.runs import Run

# Below it the gap is the advantage: rspo.md's bound for saying so.
NEGLIGIBLE_SHARE = 0.01


def finish(run: Run) -> None:
  """Exports the model and says what came of the run."""
  settings, writer = run.settings, run.writer
  exported = "model/" if run.program.lora is None else "model/, adapter/"
  if settings.run.export:
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
    workdir.write_json(run.workdir / workdir.SUMMARY, summary)
  rows = []
  for name, key in (
    ("greedy accuracy", "eval/accuracy"),
    (
      f"accuracy at T={settings.sampled.temperature:g}",
      "eval/accuracy_sampled",
    ),
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
  writer.table(
    rows,
    title=f"{settings.eval.split}, n = {run.last_eval['eval/n']}, "
    f"{run.step} steps",
  )
  total = max(seconds.get("time/step_s", 0.0), 1e-9)
  phases = {
    key[5:-2]: value
    for key, value in seconds.items()
    if key.startswith("time/") and key != "time/step_s"
  }
  phases["other"] = max(0.0, total - sum(phases.values()))
  split = ", ".join(
    f"{name} {100 * value / total:.0f} %" for name, value in phases.items()
  )
  first_s = seconds.get("first_calls", 0.0)
  writer.say(
    f"Steps took {total:.0f} s, {first_s:.0f} s of them in first calls, which "
    f"compile: {split}."
  )
  objective = settings.objective
  if objective.name == "rspo" and not objective.lambda_:
    writer.say(
      "objective.lambda_=0: this run was advantage-weighted ELBO, without a gap."
    )
  elif share is not None and share < NEGLIGIBLE_SHARE:
    writer.say(
      f"gap/lambda_share was {share:.1e} on average: the gap was the advantage "
      "and this run advantage-weighted ELBO. A larger objective.lambda_ makes "
      "the gap act."
    )
  folder = run.workdir
  writer.say(
    f"In {run.home.address}: metrics.jsonl, samples/, checkpoints/"
    + (", tensorboard/" if settings.run.tensorboard else "")
    + (f", {exported}" if settings.run.export else "")
    + "."
  )
  writer.say("Next:")
  writer.say(f"  python -m rspo_jax.report {folder} --out=report.html")
  if settings.run.export:
    writer.say(f"  python -m rspo_jax.demo --model={folder / 'model'}")
  writer.say(
    f"  the same command with --workdir={run.home.address} --mode=eval "
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
  phases = {
    key[5:-2]: value
    for key, value in values.items()
    if key.startswith("time/") and key.endswith("_s")
  }
  total = phases.pop("step", 0.0)
  split = ", ".join(f"{name} {s:.3f}" for name, s in phases.items())
  return f"step {step}: {total:.3f} s ({split})"
