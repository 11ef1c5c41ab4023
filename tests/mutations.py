"""Plants faults, one at a time: the mirror test of each module must see it.

    python tests/mutations.py [--filter=TEXT] [--whole]

Each fault replaces one piece of text of one module in a copy of the tree and
runs the tests of that module which should notice (`--whole`: all tests of the
mirror file). Prints a line a fault; exit status 1 where one was not caught.
Not part of the suite: it takes minutes.
"""

import argparse
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
    module: file below rspo_jax/.
    old, new: the text that is replaced, which must occur once.
    tests: file below tests/.
    select: expression for pytest -k.
  """

  what: str
  module: str
  old: str
  new: str
  tests: str
  select: str


def _faults():
  """The list, grouped by module."""
  module, tests = "objectives.py", "test_objectives.py"
  yield from (
    Fault(*row)
    for row in (
      (
        "the sign of the loss",
        module,
        "    loss = -gap * centred\n",
        "    loss = gap * centred\n",
        tests,
        "those_of_the_definition",
      ),
      (
        "ddof 0 in advantages",
        module,
        "rewards.std(1, ddof=1, keepdims=True) + 1e-4",
        "rewards.std(1, ddof=0, keepdims=True) + 1e-4",
        tests,
        "advantages_are",
      ),
      (
        "centring without stop-gradient",
        module,
        "return jax.lax.stop_gradient(jnp.repeat(mean, size, axis=0))",
        "return jnp.repeat(mean, size, axis=0)",
        tests,
        "never_the_direction",
      ),
      (
        "the gap is differentiated",
        module,
        "return jax.lax.stop_gradient(settings.lambda_ * (target - estimate))",
        "return settings.lambda_ * (target - estimate)",
        tests,
        "those_of_the_definition",
      ),
      (
        "equal rewards by rounding",
        module,
        "return np.where(equal[:, None], 0.0, advantages)",
        "return np.where(equal[:, None], advantages, advantages)",
        tests,
        "advantage_zero_exactly",
      ),
      (
        "leave-one-out divides by all draws",
        module,
        "/ (draws - 1)",
        "/ draws",
        tests,
        "leave_one_out",
      ),
      (
        "lambda in the other unit",
        module,
        'if settings.lambda_unit == "sequence" else 1.0',
        'if settings.lambda_unit == "token" else 1.0',
        tests,
        "those_of_the_definition",
      ),
      (
        "dropped groups in the centre",
        module,
        "grouped = (x * keep).reshape(",
        "grouped = (x + 0 * keep).reshape(",
        tests,
        "dropped_groups",
      ),
      (
        "rejection sampling weighs by all groups",
        module,
        "(correct * (kept / max(right, 1)))",
        "(correct * (correct.size / max(right, 1)))",
        tests,
        "rejection",
      ),
      (
        "targets multiply by lambda",
        module,
        "np.asarray(advantages, np.float64) / lambda_)",
        "np.asarray(advantages, np.float64) * lambda_)",
        tests,
        "targets",
      ),
      (
        "leave-one-out advantages inverted",
        module,
        "np.float32(size / (size - 1))",
        "np.float32((size - 1) / size)",
        "test_baselines.py",
        "definitions",
      ),
      (
        "older completions for any objective",
        module,
        "  if not (entry.ratio or entry.off_policy):",
        "  if False:",
        "test_baselines.py",
        "cannot_use",
      ),
    )
  )
  module, tests = "baselines.py", "test_baselines.py"
  equation = "those_of_the_equation and "
  yield from (
    Fault(*row)
    for row in (
      (
        "the clip takes the larger side",
        module,
        "return jnp.minimum(ratio",
        "return jnp.maximum(ratio",
        tests,
        equation + "diffu",
      ),
      (
        "the sign inside k3",
        module,
        "return jnp.exp(log_ratio) - 1.0 - log_ratio",
        "return jnp.exp(log_ratio) - 1.0 + log_ratio",
        tests,
        equation + "diffu",
      ),
      (
        "ESPO's pull per token",
        module,
        "settings.kl_weight * 0.5 * length * jnp.square(d)",
        "settings.kl_weight * 0.5 * jnp.square(d)",
        tests,
        equation + "espo",
      ),
      (
        "wd1 a mean over tokens",
        module,
        "-terms.advantage * terms.length * s",
        "-terms.advantage * s",
        tests,
        equation + "wd1",
      ),
      (
        "pairs of equal reward",
        module,
        "(a[:, :, None] > a[:, None, :])",
        "(a[:, :, None] >= a[:, None, :])",
        tests,
        "pairs_of_equal",
      ),
      (
        "VRPO's margin reversed",
        module,
        "relative[:, :, None] - relative[:, None, :]",
        "relative[:, None, :] - relative[:, :, None]",
        tests,
        equation + "vrpo",
      ),
      (
        "SPG's bounds exchanged",
        module,
        "jnp.where(terms.advantage > 0, lower, negative)",
        "jnp.where(terms.advantage < 0, lower, negative)",
        tests,
        equation + "spg",
      ),
      (
        "TraceRL without 1/|P|",
        module,
        "per_canvas = -(own * gain[:, :, None]).sum(-1) / size",
        "per_canvas = -(own * gain[:, :, None]).sum(-1)",
        tests,
        equation + "tracerl",
      ),
      (
        "TraFL's target times u",
        module,
        "settings.beta / hidden * terms.advantage",
        "settings.beta * hidden * terms.advantage",
        tests,
        equation + "trafl",
      ),
    )
  )
  module = "masks.py"
  yield from (
    Fault(*row)
    for row in (
      (
        "no 1/|M|",
        module,
        "jnp.where(corrupt & scored, scale / count, 0.0)",
        "jnp.where(corrupt & scored, scale + 0 * count, 0.0)",
        "test_likelihood.py",
        "plain_mean",
      ),
      (
        "one count too many in uniform",
        module,
        "  corrupt = (ranks < count[:, :, None]) & scored[:, None]\n"
        "  return _single(corrupt, scored[:, None], prompt_length)\n\n\n"
        "def stratified",
        "  corrupt = (ranks <= count[:, :, None]) & scored[:, None]\n"
        "  return _single(corrupt, scored[:, None], prompt_length)\n\n\n"
        "def stratified",
        "test_likelihood.py",
        "count_uniform_elbo",
      ),
      (
        "the full mask too often",
        module,
        "(n, draws)) * total < 1.0",
        "(n, draws)) * total < 2.0",
        "test_likelihood.py",
        "count_uniform_elbo",
      ),
      (
        "antithetic counts without + 1",
        module,
        "total.astype(jnp.int32) + 1 - first_count",
        "total.astype(jnp.int32) - first_count",
        "test_likelihood.py",
        "count_uniform_elbo",
      ),
      (
        "the same key for both subsets of a fixed pair",
        module,
        "for mask_key in (first_key, second_key):",
        "for mask_key in (first_key, first_key):",
        "test_likelihood.py",
        "two_subsets",
      ),
      (
        "the trace backwards",
        module,
        "when[:, :, None] < when[:, None, :]",
        "when[:, :, None] > when[:, None, :]",
        "test_masks.py",
        "trace_scores",
      ),
      (
        "a position between blocks stays visible",
        module,
        "| (place >= start + size)",
        "| (place > start + size)",
        "test_masks.py",
        "block",
      ),
      (
        "coupled pairs without (L + 1) / L",
        module,
        "scale = (total + 1.0) / jnp.maximum(total, 1.0)",
        "scale = total / jnp.maximum(total, 1.0)",
        "test_masks.py",
        "coupled",
      ),
    )
  )
  module, tests = "sampler.py", "test_sampler.py"
  yield from (
    Fault(*row)
    for row in (
      (
        "EOS itself is not scored",
        module,
        "return jnp.cumsum(ends, axis=-1) - ends == 0",
        "return jnp.cumsum(ends, axis=-1) == 0",
        tests,
        "completion_mask",
      ),
      (
        "quotas rounded down",
        module,
        "return (remaining + left - 1) // left",
        "return remaining // left",
        tests,
        "quotas_are",
      ),
      (
        "ties by the highest index",
        module,
        "beats = (other > mine) | ((other == mine) & earlier)",
        "beats = (other > mine) | ((other == mine) & ~earlier)",
        tests,
        "ties",
      ),
      (
        "Gumbel noise with the wrong sign",
        module,
        "return _argmax(logits - temperature * jnp.log(-jnp.log(uniform)))",
        "return _argmax(logits + temperature * jnp.log(-jnp.log(uniform)))",
        tests,
        "gumbel",
      ),
    )
  )
  module, tests = "train_step.py", "test_train_step.py"
  yield from (
    Fault(*row)
    for row in (
      (
        "gradients summed instead of averaged",
        module,
        "return (loss * batch.keep).sum() / kept, metrics",
        "return (loss * batch.keep).sum(), metrics",
        tests,
        "every_way_to_cut and none",
      ),
      (
        "masks by place instead of sequence",
        module,
        "    masks = jax.tree.map(lambda x: x[batch.row], masks)\n",
        "    masks = jax.tree.map(lambda x: x + 0 * x[batch.row], masks)\n",
        tests,
        "masks_go_with",
      ),
      (
        "old terms forgotten",
        module,
        "    if entry.ratio and settings.updates_per_rollout > 1 and old is None:",
        "    if False and old is None:",
        tests,
        "old_terms",
      ),
      (
        "early values by place instead of sequence",
        module,
        "cut.split(values[batch.row])",
        "cut.split(values)",
        tests,
        "before_the_rewards",
      ),
      (
        "norms are decayed",
        module,
        'names[-1] not in ("scale", "bias")',
        'names[-1] not in ("bias",)',
        tests,
        "adamw",
      ),
    )
  )
  module, tests = "rollout.py", "test_rollout.py"
  yield from (
    Fault(*row)
    for row in (
      (
        "positions after EOS are seen",
        module,
        "[before, after & completion_mask]",
        "[before, after]",
        tests,
        "not_seen",
      ),
      (
        "advantages stay where their rows were",
        module,
        "advantage=advantages.reshape(-1)[places],",
        "advantage=advantages.reshape(-1),",
        tests,
        "equal_rewards_are_dropped",
      ),
      (
        "processes deal kept groups to shards of their own only",
        module,
        "    for _, groups, shards in split.blocks:\n",
        "    for _, groups, shards in split.blocks[:1]:\n",
        tests,
        "however_many_processes",
      ),
      (
        "all processes judge what they share",
        "sharding.py",
        "      np.array_split(rows, len(who))[who.index(process)]\n",
        "      rows\n",
        "test_sharding.py",
        "one_process_each",
      ),
      (
        "groups that are all wrong count as solved",
        "objectives.py",
        "np.where(solved & silent,",
        "np.where(silent,",
        tests,
        "push_where_asked",
      ),
      (
        "solved groups forget which completion was better",
        "objectives.py",
        "np.where(solved & silent,",
        "np.where(solved,",
        tests,
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
  path = tree / "rspo_jax" / fault.module
  before = path.read_text()
  if before.count(fault.old) != 1:
    raise ValueError(
      f"{fault.module}: {fault.old!r} occurs {before.count(fault.old)} times; "
      "name a piece that is there once."
    )
  selection = (fault.tests, None if whole else fault.select)
  if selection not in sound:
    sound[selection] = passes(fault, tree, whole)
  if not sound[selection]:
    raise ValueError(f"{selection} fails without the fault.")
  path.write_text(before.replace(fault.old, fault.new))
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
    fault
    for fault in _faults()
    if options.filter in f"{fault.module} {fault.what}"
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
      line = f"{fault.module:15} {fault.what:46} {word} ({seconds:.0f} s)"
      print(line, flush=True)
  print(f"{len(faults) - len(missed)} of {len(faults)} faults caught.")
  return 1 if missed else 0


if __name__ == "__main__":
  sys.exit(main())
