"""Plants faults, one at a time: the tests that should notice must fail.

    python tests/mutations.py [--filter=TEXT] [--whole]

Each fault changes one function, wherever it lies, in a copy of the tree and
runs the tests of that module which should notice (`--whole`: all tests of the
mirror file). Prints a line a fault; exit status 1 where one was not caught.
Not part of the suite: it takes minutes.
"""

import argparse
import ast
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Fault:
  """One planted fault.

  Attributes:
    what: in words.
    where: function whose body is changed, as "Class.method" of whatever file
      has it; "file:function" where several do, "file:" outside of functions.
    old, new: the text that is replaced, which must occur once in it.
    tests: file below tests/.
    select: expression for pytest -k.
  """

  what: str
  where: str
  old: str
  new: str
  tests: str
  select: str


FAULTS = tuple(
  Fault(*row)
  for row in (
    (
      "the sign of the loss",
      "rspo",
      "loss = -gap * centred",
      "loss = gap * centred",
      "algorithm/test_objectives.py",
      "those_of_the_definition",
    ),
    (
      "ddof 0 in advantages",
      "group_advantages",
      "rewards.std(1, ddof=1, keepdims=True) + 1e-4",
      "rewards.std(1, ddof=0, keepdims=True) + 1e-4",
      "algorithm/test_objectives.py",
      "advantages_are",
    ),
    (
      "centring without stop-gradient",
      "centre",
      "return jax.lax.stop_gradient(jnp.repeat(mean, size, axis=0))",
      "return jnp.repeat(mean, size, axis=0)",
      "algorithm/test_objectives.py",
      "never_the_direction",
    ),
    (
      "the gap is differentiated",
      "objectives:_gap",
      "return jax.lax.stop_gradient(gap)",
      "return gap",
      "algorithm/test_objectives.py",
      "those_of_the_definition",
    ),
    (
      "equal rewards by rounding",
      "group_advantages",
      "return np.where(equal[:, None], 0.0, advantages)",
      "return np.where(equal[:, None], advantages, advantages)",
      "algorithm/test_objectives.py",
      "advantage_zero_exactly",
    ),
    (
      "leave-one-out divides by all draws",
      "_leave_one_out",
      "/ (draws - 1)",
      "/ draws",
      "algorithm/test_objectives.py",
      "leave_one_out",
    ),
    (
      "lambda in the other unit",
      "_scale",
      'terms.length if settings.lambda_unit == "sequence" else 1.0',
      'terms.length if settings.lambda_unit == "token" else 1.0',
      "algorithm/test_objectives.py",
      "those_of_the_definition",
    ),
    (
      "dropped groups in the centre",
      "centre",
      "grouped = (x * keep).reshape(",
      "grouped = (x + 0 * keep).reshape(",
      "algorithm/test_objectives.py",
      "dropped_groups",
    ),
    (
      "rejection sampling weighs by all groups",
      "rewarded_advantages",
      "(correct * (correct.size / max(correct.sum(), 1)))",
      "(correct * (len(correct) / max(correct.sum(), 1)))",
      "algorithm/test_objectives.py",
      "rejection",
    ),
    (
      "targets multiply by lambda",
      "targets",
      "np.asarray(advantages, np.float64) / lambda_)",
      "np.asarray(advantages, np.float64) * lambda_)",
      "algorithm/test_objectives.py",
      "targets",
    ),
    (
      "leave-one-out advantages inverted",
      "others_advantages",
      "np.float32(size / (size - 1))",
      "np.float32((size - 1) / size)",
      "algorithm/test_baselines.py",
      "definitions",
    ),
    (
      "older completions for any objective",
      "on_policy_reason",
      "if not (entry.ratio or entry.off_policy):",
      "if False:",
      "algorithm/test_baselines.py",
      "cannot_use",
    ),
    (
      "the clip takes the larger side",
      "clipped",
      "return jnp.where(bound < free,",
      "return jnp.where(bound > free,",
      "algorithm/test_baselines.py",
      "those_of_the_equation and diffu",
    ),
    (
      "the sign inside k3",
      "k3",
      "return jnp.exp(log_ratio) - 1.0 - log_ratio",
      "return jnp.exp(log_ratio) - 1.0 + log_ratio",
      "algorithm/test_baselines.py",
      "those_of_the_equation and diffu",
    ),
    (
      "ESPO's pull per token",
      "espo",
      "settings.kl_weight * 0.5 * length * jnp.square(d)",
      "settings.kl_weight * 0.5 * jnp.square(d)",
      "algorithm/test_baselines.py",
      "those_of_the_equation and espo",
    ),
    (
      "wd1 a mean over tokens",
      "wd1",
      "-terms.advantage * terms.length * s",
      "-terms.advantage * s",
      "algorithm/test_baselines.py",
      "those_of_the_equation and wd1",
    ),
    (
      "pairs of equal reward",
      "group_pairs",
      "(a[:, :, None] > a[:, None, :])",
      "(a[:, :, None] >= a[:, None, :])",
      "algorithm/test_baselines.py",
      "pairs_of_equal",
    ),
    (
      "VRPO's margin reversed",
      "vrpo",
      "relative[:, :, None] - relative[:, None, :]",
      "relative[:, None, :] - relative[:, :, None]",
      "algorithm/test_baselines.py",
      "those_of_the_equation and vrpo",
    ),
    (
      "SPG's bounds exchanged",
      "spg",
      "jnp.where(terms.advantage > 0, lower, negative)",
      "jnp.where(terms.advantage < 0, lower, negative)",
      "algorithm/test_baselines.py",
      "those_of_the_equation and spg",
    ),
    (
      "TraceRL without 1/|P|",
      "tracerl",
      "per_canvas = -(own * gain[:, :, None]).sum(-1) / size",
      "per_canvas = -(own * gain[:, :, None]).sum(-1)",
      "algorithm/test_baselines.py",
      "those_of_the_equation and tracerl",
    ),
    (
      "TraFL's target times u",
      "trafl",
      "settings.trafl.beta / hidden * terms.advantage",
      "settings.trafl.beta * hidden * terms.advantage",
      "algorithm/test_baselines.py",
      "those_of_the_equation and trafl",
    ),
    (
      "no 1/|M|",
      "_single",
      "jnp.where(corrupt & scored, scale / count, 0.0)",
      "jnp.where(corrupt & scored, scale + 0 * count, 0.0)",
      "algorithm/test_likelihood.py",
      "plain_mean",
    ),
    (
      "one count too many in uniform",
      "uniform",
      "corrupt = (ranks < count[:, :, None]) & scored[:, None]",
      "corrupt = (ranks <= count[:, :, None]) & scored[:, None]",
      "algorithm/test_likelihood.py",
      "count_uniform_elbo",
    ),
    (
      "the full mask too often",
      "complementary",
      "(n, draws)) * total < 1.0",
      "(n, draws)) * total < 2.0",
      "algorithm/test_likelihood.py",
      "count_uniform_elbo",
    ),
    (
      "antithetic counts without + 1",
      "fixed_count",
      "total.astype(jnp.int32) + 1 - first_count",
      "total.astype(jnp.int32) - first_count",
      "algorithm/test_likelihood.py",
      "count_uniform_elbo",
    ),
    (
      "the same key for both subsets of a fixed pair",
      "fixed_count",
      "for mask_key in (first_key, second_key):",
      "for mask_key in (first_key, first_key):",
      "algorithm/test_likelihood.py",
      "two_subsets",
    ),
    (
      "the trace backwards",
      "trace",
      "when[:, :, None] < when[:, None, :]",
      "when[:, :, None] > when[:, None, :]",
      "algorithm/test_masks.py",
      "trace_scores",
    ),
    (
      "a position between blocks stays visible",
      "block_random",
      "| (place >= start + size)",
      "| (place > start + size)",
      "algorithm/test_masks.py",
      "block",
    ),
    (
      "coupled pairs without (L + 1) / L",
      "coupled",
      "scale = (total + 1.0) / jnp.maximum(total, 1.0)",
      "scale = total / jnp.maximum(total, 1.0)",
      "algorithm/test_masks.py",
      "coupled",
    ),
    (
      "EOS itself is not scored",
      "completion_mask",
      "return jnp.cumsum(ends, axis=-1) - ends == 0",
      "return jnp.cumsum(ends, axis=-1) == 0",
      "sampling/test_denoise.py",
      "completion_mask",
    ),
    (
      "quotas rounded down",
      "even_quota",
      "return (remaining + left - 1) // left",
      "return remaining // left",
      "sampling/test_schedules.py",
      "quotas_are",
    ),
    (
      "ties by the highest index",
      "ranks",
      "beats = (other > mine) | ((other == mine) & earlier)",
      "beats = (other > mine) | ((other == mine) & ~earlier)",
      "sampling/test_schedules.py",
      "ties",
    ),
    (
      "Gumbel noise with the wrong sign",
      "gumbel_argmax",
      "return _argmax(logits + temperature * noise)",
      "return _argmax(logits - temperature * noise)",
      "sampling/test_proposals.py",
      "gumbel",
    ),
    (
      "a noisy block sees itself in the clean text",
      "attention:",
      '"clean": operator.gt',
      '"clean": operator.ge',
      "models/test_attention.py",
      "parts_are_one",
    ),
    (
      "gradients summed instead of averaged",
      "_Loss.__call__",
      "return (loss * batch.keep).sum() / self.kept, metrics",
      "return (loss * batch.keep).sum(), metrics",
      "algorithm/test_update.py",
      "every_way_to_cut and none",
    ),
    (
      "masks by place instead of sequence",
      "batch_masks",
      "return jax.tree.map(lambda x: x[batch.row], masks)",
      "return jax.tree.map(lambda x: x + 0 * x[batch.row], masks)",
      "algorithm/test_update.py",
      "masks_go_with",
    ),
    (
      "old terms forgotten",
      "_check_scores",
      "if plan.ratio and old is None:",
      "if False and old is None:",
      "algorithm/test_update.py",
      "old_terms",
    ),
    (
      "early values by place instead of sequence",
      "make_reorder.reorder",
      "cut.split(scores[batch.row])",
      "cut.split(scores)",
      "algorithm/test_update.py",
      "before_the_rewards",
    ),
    (
      "norms are decayed",
      "_decayed.one",
      'names[-1] not in ("scale", "bias")',
      'names[-1] not in ("bias",)',
      "algorithm/test_update.py",
      "adamw",
    ),
    (
      "positions after EOS are seen",
      "scope_masks",
      "[before, after & completion_mask]",
      "[before, after]",
      "run/test_rollout.py",
      "not_seen",
    ),
    (
      "advantages stay where their rows were",
      "make_batch",
      "advantage=found.advantage[found.order].reshape(-1),",
      "advantage=found.advantage.reshape(-1),",
      "run/test_rollout.py",
      "equal_rewards_are_dropped",
    ),
    (
      "all processes judge what they share",
      "Split.own_of",
      "np.array_split(rows, len(who))[who.index(process)]",
      "rows",
      "devices/test_sharding.py",
      "one_process_each",
    ),
    (
      "groups that are all wrong count as solved",
      "solved_advantages",
      "np.where(solved & silent,",
      "np.where(silent,",
      "run/test_rollout.py",
      "push_where_asked",
    ),
    (
      "solved groups forget which completion was better",
      "solved_advantages",
      "np.where(solved & silent,",
      "np.where(solved,",
      "run/test_rollout.py",
      "push_where_asked",
    ),
  )
)


def copy_tree(target: pathlib.Path) -> None:
  """The files under version control, as they stand."""
  names = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  for name in names:
    source, destination = ROOT / name, target / name
    if source.is_file():
      destination.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(source, destination)


def passes(fault: Fault, tree: pathlib.Path, whole: bool) -> bool:
  """Whether the tests that should see a fault pass on the tree as it stands.

  Raises:
    ValueError: no test was selected.
  """
  command = [sys.executable, "-m", "pytest", "-q", "-x"]
  command += ["-p", "no:cacheprovider", f"tests/{fault.tests}"]
  if not whole:
    command += ["-k", fault.select]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  environment["PYTHONDONTWRITEBYTECODE"] = "1"
  done = subprocess.run(
    command, cwd=tree, env=environment, capture_output=True, text=True
  )
  if done.returncode not in (0, 1):
    raise ValueError(
      f"{fault.what}: pytest ended with {done.returncode}: "
      f"{(done.stdout + done.stderr)[-400:]}"
    )
  return done.returncode == 0


def found(tree: pathlib.Path, where: str) -> tuple[pathlib.Path, int, int]:
  """(file, first line, line behind the last) of a function of the package.

  Raises:
    ValueError: no function, or several, are called so.
  """
  stem, _, name = where.rpartition(":")
  places = []

  def visit(node, path, prefix):
    for child in ast.iter_child_nodes(node):
      inner = prefix
      if isinstance(child, ast.FunctionDef | ast.ClassDef):
        inner = f"{prefix}{child.name}."
        if inner == f"{name}.":
          places.append((path, child.lineno - 1, child.end_lineno))
      visit(child, path, inner)

  for path in (tree / "rspo_jax").rglob(f"{stem or '*'}.py"):
    text = path.read_text()
    if name:
      visit(ast.parse(text), path, "")
    else:
      places.append((path, 0, len(text.splitlines())))
  if len(places) != 1:
    raise ValueError(f"{where} names {len(places)} places; name one.")
  return places[0]


def caught(
  fault: Fault, tree: pathlib.Path, whole: bool, sound: dict[tuple, bool]
) -> bool:
  """Whether the tests fail with the fault in place; the tree is as before.

  Args:
    fault: to plant.
    tree: a copy of the repository.
    whole: run all tests of the fault's file.
    sound: whether selections of tests pass without a fault, by what selects
      them; filled here.

  Raises:
    ValueError: the text does not occur exactly once, no test was selected, or
      the tests fail without the fault.
  """
  path, first, last = found(tree, fault.where)
  before = path.read_text()
  lines = before.splitlines(keepends=True)
  body = "".join(lines[first:last])
  if body.count(fault.old) != 1:
    raise ValueError(
      f"{fault.where}: {fault.old!r} occurs {body.count(fault.old)} times; "
      "name a piece that is there once."
    )
  selection = (fault.tests, None if whole else fault.select)
  if selection not in sound:
    sound[selection] = passes(fault, tree, whole)
  if not sound[selection]:
    raise ValueError(f"{selection} fails without the fault.")
  changed = body.replace(fault.old, fault.new)
  path.write_text("".join([*lines[:first], changed, *lines[last:]]))
  try:
    return not passes(fault, tree, whole)
  finally:
    path.write_text(before)


def main() -> int:
  """Plants every fault; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--filter", default="", help="text of the fault or file")
  parser.add_argument("--whole", action="store_true", help="all mirror tests")
  options = parser.parse_args()
  faults = [
    fault for fault in FAULTS if options.filter in f"{fault.where} {fault.what}"
  ]
  missed, sound = [], {}
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder)
    copy_tree(tree)
    for fault in faults:
      start = time.perf_counter()
      try:
        good = caught(fault, tree, options.whole, sound)
        word = "caught" if good else "MISSED"
      except ValueError as error:
        good, word = False, f"ERROR {error}"
      if not good:
        missed.append(fault.what)
      seconds = time.perf_counter() - start
      line = f"{fault.where:28} {fault.what:46} {word} ({seconds:.0f} s)"
      print(line, flush=True)
  print(f"{len(faults) - len(missed)} of {len(faults)} faults caught.")
  return 1 if missed else 0


if __name__ == "__main__":
  sys.exit(main())
