"""Entry point: command line, exit status, dispatch.

    python -m rspo_jax.main --config=configs/countdown.py --workdir=DIR

1. The command line is read and checked against the config's keys and types,
   without JAX, so that a mistake is told at once.
2. The first line names the folder of the run; whatever can be refused without
   JAX is refused (`rules.check_early`, `identity.check_workdir`).
3. `loop.main` does the rest.

Exit status: 0 done, 2 the caller's mistake, 3 a fault of the run, 75
interrupted after saving (the same command goes on).
"""

import os
import signal
import sys

from rspo_jax.config import cli, identity, load
from rspo_jax.run import rules

INTERRUPTED = 75


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  argv = list(sys.argv if argv is None else argv)
  if load.PARSER.wants_help(argv[1:]):
    return cli.DONE
  try:
    config, name, workdir, mode = load.parse(argv)
    if not workdir:
      digest = identity.config_hash(config.to_dict())
      workdir = os.path.join("runs", f"{name}-{digest}")
    # In eval mode standard output is for the one line of the result.
    stream = sys.stderr if mode == "eval" else sys.stdout
    print(f"{mode}: {name} in {workdir}", file=stream, flush=True)
    rules.check_early(config)
    rules.check_reachable(config)
    identity.check_workdir(workdir, config.to_dict(), mode)
  except ValueError as error:
    return cli.mistake(error)
  from rspo_jax.run import loop

  return loop.main(config, workdir, mode)


def command() -> None:
  """The process of a run: ends with its exit status."""
  # Until the run takes signals itself there is nothing to save.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(INTERRUPTED)


if __name__ == "__main__":
  command()
