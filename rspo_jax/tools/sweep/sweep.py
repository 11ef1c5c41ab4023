"""Runs, prints or continues every run of a config's `sweep()`.

    python launch/sweep.py --config=configs/countdown.py --out=DIR

1. `sweep()` of the config file gives entries: a name, overrides, seeds. Each
   entry and seed is one run of `rspo_jax.main` in `DIR/<name>-seed<seed>`.
2. All configs are resolved before anything starts: a key that does not exist,
   or a folder that holds another config, stops the sweep while it is cheap.
3. What is finished (`summary.json`) is skipped, what was begun is continued by
   the command that began it, what failed is named at the end and tried again
   by the next call. `DIR/sweep.json` says how each run stands.
"""

import os
import pathlib
from collections.abc import Sequence

from rspo_jax.config import cli, identity, load
from rspo_jax.config.cli import Option
from rspo_jax.storage import mirror
from rspo_jax.tools.sweep import jobs as jobs_lib
from rspo_jax.tools.sweep import runner, scripts


def _check(options) -> None:
  """Refuses options that do not go together."""
  if options.launcher_args and options.launcher == "local":
    raise ValueError(
      "--launcher_args goes with --launcher=slurm or --launcher=xpk."
    )


PARSER = cli.Parser(
  "python launch/sweep.py --config=FILE[:ARG,...] --out=DIR [options]",
  [
    load.CONFIG,
    Option(
      "--out=DIR",
      "folder of the sweep; the same DIR goes on",
      example="runs/sweep",
    ),
    Option(cli.OVERRIDE, "override of one key in every run"),
    Option("--filter=TEXT", "only runs whose name contains TEXT"),
    Option("--jobs=N", "runs at a time", 1, int, 1),
    Option("--dry_run", "print the commands, write nothing"),
    Option(
      "--launcher=NAME",
      "runs here, or prints the job commands of the others",
      "local",
      choices=scripts.LAUNCHERS,
    ),
    Option("--launcher_args=TEXT", "added to each sbatch or xpk command"),
  ],
  "exit status: 0 all done, 2 mistake in the command, 3 some runs failed "
  "(named at the end; the same command tries them again), 75 interrupted: run "
  "the same command to go on.",
  _check,
)


def _check_out(out: pathlib.Path) -> None:
  """Refuses a folder that cannot be written, before anything is."""
  identity.check_links(out, f"--out={out}")
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out} is a file; name a folder.")
  parent = out.absolute()
  while not parent.exists():
    parent = parent.parent
  if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
    raise ValueError(
      f"--out={out} cannot be written: {parent} is not a writable folder; "
      "choose another."
    )


def _sweep(options) -> int:
  """Prints or runs what the options ask for; returns the exit status."""
  out, bucket = pathlib.Path(os.path.expanduser(options.out)), ""
  if options.out.startswith(mirror.BUCKET):
    bucket = options.out.rstrip("/")
    out = mirror.local_copies(bucket)
  _check_out(out)
  every, notes = jobs_lib.plan(options.config, out, options.overrides, bucket)
  jobs = jobs_lib.select(every, options.filter)
  if options.dry_run or options.launcher != "local":
    for note in notes:
      print(f"# {note}")
    for line in scripts.commands(jobs, options.launcher, options.launcher_args):
      print(line)
    if not options.dry_run:
      # sbatch does not make the folder of its output file.
      (out / "logs").mkdir(parents=True, exist_ok=True)
      runner.Manifest(out, options.config, every).write()
    return cli.DONE
  out.mkdir(parents=True, exist_ok=True)
  with runner.locked(out):
    for note in notes:
      print(note)
    manifest = runner.Manifest(out, options.config, every)
    return runner.run(jobs, manifest, options.jobs)


def _guarded(options) -> int:
  """`_sweep`, where a full disk is a fault and no mistake in the command."""
  try:
    return _sweep(options)
  except OSError as error:
    cli.mistake(
      f"{error}. Make room or make the folder writable, then run the same "
      "command again."
    )
    return runner.FAULT


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return PARSER.run(_guarded, argv)
