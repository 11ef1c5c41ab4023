"""What a step leaves for readers: samples, calibration, incidents.

Functions of arrays of all processes where they write; each of them is called by
all processes.
"""

import operator

import jax
import numpy as np

from rspo_jax.algorithm import streams
from rspo_jax.algorithm.types import RolloutBatch
from rspo_jax.devices import sharding
from rspo_jax.reporting import transcripts
from rspo_jax.run import incident, rollout
from rspo_jax.run.runs import Run

SAMPLED_GROUPS = 8  # groups of a rollout that samples/ shows
TEXT_ROWS = 16  # completions of it that TensorBoard shows


def keep_samples(run: Run, prompts, judged, out, rewards) -> None:
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
  played = transcripts.denoising_rows(
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
  step = run.state.step + 1
  run.write_rows(run.workdir / "samples" / f"train-{step:06d}.jsonl", rows)
  run.writer.text(
    step, "samples/completions", transcripts.readable(rows[:TEXT_ROWS])
  )
  run.writer.histogram(step, "reward", rewards)


def keep_calibration(
  run: Run, batch: RolloutBatch, compared: dict[str, jax.Array]
) -> None:
  """Targets beside estimates into samples/, their spread to TensorBoard.

  Args:
    run: whose step it is.
    batch: of the step.
    compared: of its first update (`objectives.calibration`).
  """
  if not compared:
    return
  columns = {key: sharding.whole(x) for key, x in compared.items()}
  row, keep = sharding.whole(batch.row), sharding.whole(batch.keep)
  order = np.argsort(row)
  order = order[keep[order] > 0]
  columns = {key: values[order] for key, values in columns.items()}
  step = run.state.step + 1
  if "target" in columns and run.state.lambda_:
    run.write_rows(
      run.workdir / "samples" / f"calibration-{step:06d}.jsonl",
      transcripts.calibration_rows(columns),
    )
  for name, key in (
    ("score/relative", "relative"),
    ("score/centred", "estimate"),
    ("gap", "gap"),
  ):
    if key in columns:
      run.writer.histogram(step, name, columns[key])


def write_incident(run: Run, bad, values, batch, scores) -> None:
  """Keeps what a step that is not finite was made of."""
  folder = incident.folder_of(run.workdir, run.state.step)
  seed, before = run.settings.run.seed, run.state.step - 1
  arrays = {"batch": batch, "scores": [vars(each) for each in scores]}
  tokens = sharding.local_rows(batch.tokens)
  seen = sharding.local_rows(batch.token_mask)
  message = incident.write(
    folder,
    {
      "step": run.state.step,
      "not_finite": incident.encode(bad),
      "metrics": incident.encode(values),
      "in_a_row": run.state.tally.in_a_row,
      "processes": jax.process_count(),
      "seed": seed,
      "keys": {
        name: jax.random.key_data(
          streams.stream_key(seed, before, stream)
        ).tolist()
        for name, stream in (
          ("rollout", streams.ROLLOUT),
          ("masks", streams.MASKS),
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
    f"Step {run.state.step} is not finite: {listed}. It was "
    f"{'applied all the same' if applied else 'not applied'}; "
    + (message or f"its inputs and keys are in {folder}.")
  )
