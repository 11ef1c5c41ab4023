"""Imports go downward; pure modules compute and do nothing else."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "rspo_jax"

# A module may import lower levels, and its own as long as there is no circle.
LEVELS = {
  "rspo_jax": 0,
  "rspo_jax.objectives": 0,
  "rspo_jax.baselines": 0,
  "rspo_jax.masks": 0,
  "rspo_jax.likelihood": 0,
  "rspo_jax.sampler": 0,
  "rspo_jax.sampler_settings": 0,
  "rspo_jax.sharding": 0,
  "rspo_jax.scores": 0,
  "rspo_jax.rounding": 0,
  "rspo_jax.metrics": 0,
  "rspo_jax.mirror": 0,
  "rspo_jax.processes": 0,
  "rspo_jax.checkpoint": 0,
  "rspo_jax.interrupt": 0,
  "rspo_jax.traces": 0,
  "rspo_jax.trackers": 0,
  "rspo_jax.profiler": 0,
  "rspo_jax.options": 0,
  "rspo_jax.locks": 0,
  "rspo_jax.environment": 1,
  "rspo_jax.chips": 0,
  "rspo_jax.flops": 0,
  "rspo_jax.hlo": 0,
  "rspo_jax.incident": 0,
  "rspo_jax.collapse": 0,
  "rspo_jax.models": 0,
  "rspo_jax.models.families": 0,
  "rspo_jax.models.attention": 0,
  "rspo_jax.tasks.base": 0,
  "rspo_jax.tasks.answers": 0,
  "rspo_jax.datasets": 0,
  "rspo_jax.datasets.streams": 0,
  "rspo_jax.datasets.countdown": 0,
  "rspo_jax.datasets.sudoku": 0,
  "rspo_jax.datasets.files": 0,
  "rspo_jax.datasets.folders": 0,
  "rspo_jax.datasets.published": 0,
  "rspo_jax.datasets.downloads": 0,
  "rspo_jax.datasets.builders": 1,
  "rspo_jax.datasets.statistics": 1,
  "rspo_jax.models.published": 1,
  "rspo_jax.models.transformer": 1,
  "rspo_jax.models.lora": 1,
  "rspo_jax.models.hf_folder": 1,
  "rspo_jax.models.hf_weights": 1,
  "rspo_jax.models.hf_adapters": 1,
  "rspo_jax.models.fresh": 1,
  "rspo_jax.workers": 1,
  "rspo_jax.chat_templates": 1,
  "rspo_jax.tokenizer": 1,
  "rspo_jax.tasks.prompts": 1,
  "rspo_jax.tasks.latex": 1,
  "rspo_jax.tasks.symbolic": 1,
  "rspo_jax.tasks.d1": 1,
  "rspo_jax.tasks.countdown": 1,
  "rspo_jax.tasks.sudoku": 1,
  "rspo_jax.tasks.gsm8k": 1,
  "rspo_jax.tasks.math500": 1,
  "rspo_jax.tasks.own": 1,
  "rspo_jax.tasks.gym": 1,
  "rspo_jax.tasks.generators": 1,
  "rspo_jax.data": 1,
  "rspo_jax.train_step": 1,
  "rspo_jax.tasks": 2,
  "rspo_jax.rollout": 2,
  "rspo_jax.run_config": 3,
  "rspo_jax.config_checks": 3,
  "rspo_jax.settings": 3,
  "rspo_jax.evaluate": 3,
  "rspo_jax.program": 3,
  "rspo_jax.room": 4,
  "rspo_jax.records": 4,
  "rspo_jax.runs": 4,
  "rspo_jax.workdir": 4,
  "rspo_jax.summary": 4,
  "rspo_jax.train": 4,
  "rspo_jax.api": 4,
  "rspo_jax.planner": 4,
  "rspo_jax.demo": 4,
  "rspo_jax.demo_web": 4,
  "rspo_jax.report_runs": 4,
  "rspo_jax.report_statistics": 4,
  "rspo_jax.report": 4,
  "rspo_jax.main": 5,
  "rspo_jax.sweep": 6,
  "rspo_jax.diagnose": 6,
  "rspo_jax.plan": 6,
}

PURE = (
  "rspo_jax.chips",
  "rspo_jax.flops",
  "rspo_jax.hlo",
  "rspo_jax.objectives",
  "rspo_jax.baselines",
  "rspo_jax.masks",
  "rspo_jax.likelihood",
  "rspo_jax.sampler",
  "rspo_jax.sampler_settings",
  "rspo_jax.models.families",
  "rspo_jax.models.published",
  "rspo_jax.models.transformer",
  "rspo_jax.models.lora",
  "rspo_jax.tasks.base",
  "rspo_jax.tasks.answers",
  "rspo_jax.train_step",
  "rspo_jax.rounding",
  "rspo_jax.collapse",
)
IMPURE_MODULES = {
  "datetime",
  "io",
  "logging",
  "multiprocessing",
  "os",
  "pathlib",
  "random",
  "shutil",
  "socket",
  "subprocess",
  "sys",
  "tempfile",
  "threading",
  "time",
  "warnings",
}
IMPURE_CALLS = {"open", "print", "input", "eval", "exec", "compile"}
# Streams are a function of (seed, step); shapes need a key that is never used.
KEY_MAKERS = ("stream_key", "kernel_shapes")


def name_of(path):
  """Dotted name of a module's file."""
  parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name):
  """Modules of ours that a module imports, anywhere in its text."""
  found = set()
  for node in ast.walk(ast.parse(SOURCES[name].read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}: relative import, line {node.lineno}"
      # `from package import x`: x where it is a module, else the package.
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        names.append(whole if whole in SOURCES else node.module)
    found |= {n for n in names if n.split(".")[0] in ("rspo_jax", "configs")}
  return found - {name}


def test_every_module_has_a_level():
  assert SOURCES.keys() <= LEVELS.keys()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_import_goes_upward(name):
  for other in imported(name):
    if other.startswith("configs"):
      # The package stands without the configs; only their keys are known.
      assert name == "rspo_jax.run_config"
      continue
    assert LEVELS[other] <= LEVELS[name], f"{name} imports {other}"


def test_imports_make_no_circle():
  below = {name: imported(name) & SOURCES.keys() for name in SOURCES}
  done, path = set(), []

  def visit(name):
    assert name not in path, f"circle: {path[path.index(name) :]}"
    if name not in done:
      path.append(name)
      for other in sorted(below[name]):
        visit(other)
      path.pop()
      done.add(name)

  for name in below:
    visit(name)


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_only_compute(name):
  tree = ast.parse(SOURCES[name].read_text())
  for node in ast.walk(tree):
    where = f"{name}, line {getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Import):
      roots = {alias.name.split(".")[0] for alias in node.names}
      assert not roots & IMPURE_MODULES, where
    elif isinstance(node, ast.ImportFrom):
      assert node.module.split(".")[0] not in IMPURE_MODULES, where
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      assert node.func.id not in IMPURE_CALLS, where
    elif isinstance(node, ast.Attribute):
      # The caller compiles, and owns the keys.
      assert node.attr not in ("jit", "PRNGKey"), where
    assert not isinstance(node, ast.Global | ast.Nonlocal), where
  for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
    makes_key = "jax.random.key(" in ast.unparse(function)
    assert not makes_key or function.name in KEY_MAKERS, function.name


def test_a_command_waits_for_jax_as_late_as_it_can():
  names = ("main", "mirror", "config_checks", "run_config", "sampler_settings")
  light = {"rspo_jax", *(f"rspo_jax.{name}" for name in names)}
  heavy = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"}
  for name in light:
    for node in ast.parse(SOURCES[name].read_text()).body:
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      for other in names:
        assert other.split(".")[0] not in heavy, f"{name} imports {other}"
        if other.startswith("rspo_jax"):
          assert other in light, f"{name} imports {other}"
