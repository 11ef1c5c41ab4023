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

from rspo_jax.config import identity, load
from rspo_jax.run import rules

MISTAKE, INTERRUPTED = 2, 75
HELP = """usage: python -m rspo_jax.main --config=FILE[:ARG,...] [options]

  --config=configs/countdown.py   config file; ARGs are listed in its docstring
  --config.GROUP.KEY=VALUE        override of one key (configs/base.py)
  --workdir=DIR                   where the run is kept; the same DIR goes on
                                  (default: runs/<config>-<hash of the config>)
  --mode=train|eval               train, or evaluate model.path or DIR's last
                                  checkpoint on eval.split

exit status: 0 done, 2 mistake in the command, 3 fault of the run,
75 interrupted after saving: run the same command to go on."""


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  argv = list(sys.argv if argv is None else argv)
  if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
    print(HELP)
    return 0
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
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE
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
