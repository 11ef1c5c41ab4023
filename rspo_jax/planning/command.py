"""Answers, before anything is rented: will it fit, and how long is a step?

    python launch/plan.py --config=configs/countdown.py:llada_8b \\
        --topology=v5e:2x2 --sequences=64 --masks=2

Reads the command line, without JAX, so that a mistake is told at once; plans
(planner.py); prints the plan as text or JSON.

Exit status: 0 fits, 1 does not fit, 2 mistake in the command.
"""

import argparse
import json
import os
from collections.abc import Sequence

from rspo_jax.config.cli import OVERRIDE, Option, Parser
from rspo_jax.planning import chips, table
from rspo_jax.planning.workload import Options

FITS, DOES_NOT_FIT = 0, 1


def _check(options: argparse.Namespace) -> None:
  """A slice is named, or is to be found."""
  if not options.topology and not options.search:
    raise ValueError(
      "--topology is missing; try --topology=v5e:2x2, or --search for the "
      "smallest slice."
    )


PARSER = Parser(
  "python launch/plan.py --config=FILE[:ARG,...] --topology=SLICE [options]",
  [
    Option(
      "--config=FILE",
      "config file, as for a run",
      example="configs/countdown.py:llada_8b",
    ),
    Option(OVERRIDE, "override of one key"),
    Option(
      "--topology=SLICE",
      "v5e:2x2, v6e:2x4, v5p:2x2x1, ...; or gpu:80, one GPU with 80 GB: an "
      "estimate",
    ),
    Option(
      "--search",
      "the smallest slice that holds it, of the kind in --topology if given",
    ),
    Option(
      "--sequences=N",
      "completions of a step (rollout.prompts x group_size)",
      None,
      int,
      1,
    ),
    Option("--masks=N", "likelihood.masks", None, int, 1),
    Option("--prompt=N", "data.prompt_length", None, int, 1),
    Option("--completion=N", "sampler.completion_length", None, int, 1),
    Option(
      "--micro_batches=N",
      "parts in which a step's sequences are differentiated",
      None,
      int,
      1,
    ),
    Option(
      "--quick",
      "compiles without optimisation: memory, FLOPs and collectives in a fifth "
      "of the time, no seconds",
    ),
    Option("--json", "one JSON object on standard output"),
    Option("--no_cache", "compiles again what was compiled before"),
  ],
  "Nothing is run on hardware: the TPU compiler (pip install libtpu) says what "
  "fits. Exit status: 0 fits, 1 does not fit, 2 mistake in the command.",
  _check,
)


def options_of(given: argparse.Namespace) -> Options:
  """The options of a command line that was read."""
  values = vars(given)
  return Options(**{k: v for k, v in values.items() if k != "words"})


def parse(argv: Sequence[str]) -> Options:
  """Reads the command line.

  Raises:
    ValueError: one message with value and remedy.
  """
  return options_of(PARSER.read(argv))


def _plan(given: argparse.Namespace) -> int:
  """Plans and prints; returns the exit status."""
  options = options_of(given)
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
  print(json.dumps(plan) if options.json else table.render(plan))
  return FITS if plan["fits"] else DOES_NOT_FIT


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  return PARSER.run(_plan, argv)
