"""Answers, before anything is rented: will it fit, and how long is a step?

    python launch/plan.py --config=configs/countdown.py:llada_8b \\
        --topology=v5e:2x2 --sequences=64 --masks=2

Reads the command line, without JAX, so that a mistake is told at once; plans
(planner.py); prints the plan as text or JSON.

Exit status: 0 fits, 1 does not fit, 2 mistake in the command.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence

from rspo_jax.planning import chips, table
from rspo_jax.planning.workload import Options

FITS, DOES_NOT_FIT, MISTAKE = 0, 1, 2
HELP = """usage: python launch/plan.py --config=FILE[:ARG,...] --topology=SLICE [options]

  --config=configs/countdown.py:llada_8b   config file, as for a run
  --config.GROUP.KEY=VALUE                 override of one key
  --topology=v5e:2x2 | v6e:2x4 | v5p:2x2x1 | ...   the slice, or
  --topology=gpu:80                        one GPU with 80 GB: an estimate
  --search                                 the smallest slice that holds it, of
                                           the kind in --topology if given
  --sequences=64      completions of a step (rollout.prompts x group_size)
  --masks=2           likelihood.masks
  --prompt=256        data.prompt_length
  --completion=256    sampler.completion_length
  --micro_batches=4   parts in which a step's sequences are differentiated
  --quick             compiles without optimisation: memory, FLOPs and
                      collectives in a fifth of the time, no seconds
  --json              one JSON object on standard output
  --no_cache          compiles again what was compiled before

Nothing is run on hardware: the TPU compiler (pip install libtpu) says what
fits. Exit status: 0 fits, 1 does not fit, 2 mistake in the command."""
_COUNTS = ("sequences", "masks", "prompt", "completion", "micro_batches")
_SWITCHES = ("search", "quick", "json", "no_cache")


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would end the process."""

  def error(self, message):
    raise ValueError(f"{message}; see --help.")


def parse(argv: Sequence[str]) -> Options:
  """Reads the command line.

  Raises:
    ValueError: one message with value and remedy.
  """
  parser = _Parser(add_help=False, allow_abbrev=False)
  for name in ("config", "topology"):
    parser.add_argument(f"--{name}", default="")
  for name in _COUNTS:
    parser.add_argument(f"--{name}")
  for name in _SWITCHES:
    parser.add_argument(f"--{name}", action="store_true")
  known, rest = parser.parse_known_args(list(argv))
  values, overrides, words = vars(known), {}, iter(rest)
  for word in words:
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("--config."):
      near = difflib.get_close_matches(name, values, 1)
      hint = f"; did you mean --{near[0]}?" if near else "; see --help."
      raise ValueError(f"{word} is not an option{hint}")
    key = name.removeprefix("config.")
    overrides[key] = value if equals else next(words, "")
  if not known.config:
    raise ValueError(
      "--config is missing; try --config=configs/countdown.py:llada_8b."
    )
  if not known.topology and not known.search:
    raise ValueError(
      "--topology is missing; try --topology=v5e:2x2, or --search for the "
      "smallest slice."
    )
  for name in _COUNTS:
    text = values[name]
    if text is not None:
      if not (text.isdecimal() and int(text) >= 1):
        raise ValueError(
          f"--{name}={text} must be a whole number of at least 1."
        )
      values[name] = int(text)
  return Options(overrides=overrides, **values)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if any(word in ("-h", "--help", "-help") for word in argv):
    print(HELP)
    return FITS
  try:
    options = parse(argv)
    topology = None
    if not options.search and options.kind != "gpu":
      topology = chips.parse(options.topology)
    # The compiler is asked without a device; with libtpu installed JAX would
    # look for one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    from rspo_jax.planning import planner

    if options.kind == "gpu":
      plan = planner.estimate_gpu(options)
    elif options.search:
      plan = planner.search(options)
    else:
      plan = planner.make_plan(options, topology)
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return MISTAKE
  print(json.dumps(plan) if options.json else table.render(plan))
  return FITS if plan["fits"] else DOES_NOT_FIT
