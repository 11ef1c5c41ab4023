"""What a step leaves for readers: samples, calibration, incidents.

Functions of a run (rspo_jax/runs.py), of arrays of all processes where they
write; each of them is called by all processes.
"""

import dataclasses
import operator

import jax

from rspo_jax import (
  incident,
  objectives,
  rollout,
  sharding,
  traces,
  train_step,
)

SAMPLED_GROUPS = 8  # groups of a rollout that samples/ shows
TEXT_ROWS = 16  # completions of it that TensorBoard shows


def keep_samples(run, prompts, judged, out, rewards) -> None:
  """The first groups of a rollout into samples/ and TensorBoard.

  Args:
    run: whose step it is.
    prompts: that this process holds.
    judged: its own completions.
    out: those of all processes.
    rewards: f32 [B, G], of all.
  """
  group, split = run.settings.rollout.group_size, run.split
  own = sharding.repeated(split.own, group)
  place = sharding.repeated(split.held, group)[own]
  count = int((place < SAMPLED_GROUPS * group).sum())
  own = own[:count]
  scored = sharding.local_rows(out.completion_mask)[own]
  length = scored.shape[1]
  played = traces.denoising_rows(
    run.program.pieces,
    sharding.local_rows(out.tokens)[own, -length:],
    scored,
    sharding.local_rows(out.commit_step)[own],
  )
  rows = [
    [
      int(place[i]),
      {
        "prompt": run.program.prompt(prompts.examples[own[i] // group]),
        "completion": judged.texts[i],
        **rollout.verdict_row(judged.verdicts[i]),
        **played[i],
      },
    ]
    for i in range(count)
  ]
  rows = sorted(sharding.gather_json(rows), key=operator.itemgetter(0))
  rows = [row for _, row in rows]
  step = run.step + 1
  run.write_rows(run.workdir / "samples" / f"train-{step:06d}.jsonl", rows)
  run.writer.text(
    step, "samples/completions", traces.readable(rows[:TEXT_ROWS])
  )
  run.writer.histogram(step, "reward", rewards)


def keep_calibration(run, batch, scores) -> None:
  """Targets beside estimates into samples/, their spread to TensorBoard.

  In the one-pass form the policy is scored here once more: a forward in
  `run.samples_every` steps.
  """
  objective = run.settings.objective
  has_gap = objective.name == "rspo"
  reference, policy = scores.reference, scores.policy
  entry = objectives.OBJECTIVES[objective.name]
  inside = run.scored_inside(batch)
  if (reference is None and not inside) or entry.per_token:
    return
  if inside:
    policy, reference = run.pair(batch, 0)
  elif policy is None:
    policy = run.score(run.policy, batch, 0)
  columns = traces.calibration(
    *(
      sharding.whole(x)
      for x in (
        policy,
        reference,
        batch.advantage,
        batch.completion_mask.sum(-1),
        batch.keep,
        batch.row,
      )
    ),
    dataclasses.replace(objective, lambda_=run.lambda_),
  )
  step = run.step + 1
  if has_gap and "target" in columns:
    run.write_rows(
      run.workdir / "samples" / f"calibration-{step:06d}.jsonl",
      traces.calibration_rows(columns),
    )
  for name, key in (
    ("score/relative", "relative"),
    ("score/centred", "estimate"),
    ("gap", "gap"),
  ):
    if has_gap or key == "relative":
      run.writer.histogram(step, name, columns[key])


def write_incident(run, bad, values, batch, scores) -> None:
  """Keeps what a step that is not finite was made of."""
  folder = incident.folder_of(run.workdir, run.step)
  seed, before = run.settings.run.seed, run.step - 1
  arrays = {"batch": batch, "scores": [vars(each) for each in scores]}
  tokens = sharding.local_rows(batch.tokens)
  seen = sharding.local_rows(batch.token_mask)
  message = incident.write(
    folder,
    {
      "step": run.step,
      "not_finite": incident.encode(bad),
      "metrics": incident.encode(values),
      "in_a_row": run.tally.in_a_row,
      "processes": jax.process_count(),
      "seed": seed,
      "keys": {
        name: jax.random.key_data(
          train_step.stream_key(seed, before, stream)
        ).tolist()
        for name, stream in (
          ("rollout", train_step.ROLLOUT),
          ("masks", train_step.MASKS),
        )
      },
      "texts": run.program.to_text(tokens, seen),
    },
    arrays,
  )
  names = sorted(bad, key=lambda key: ("/" in key, key))
  listed = ", ".join(f"{name} = {bad[name]}" for name in names)
  applied = values.get("update/applied", 0.0)
  run.writer.warn(
    f"Step {run.step} is not finite: {listed}. It was "
    f"{'applied all the same' if applied else 'not applied'}; "
    + (message or f"its inputs and keys are in {folder}.")
  )
