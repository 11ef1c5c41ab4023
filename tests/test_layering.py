"""Imports go down the list of rooms; pure rooms compute and do nothing else."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "rspo_jax"

# A room may import what stands below it in this list, and itself.
ROOMS = (
  "tools",
  "planning",
  "api",
  "main",
  "run",
  "tasks",
  "sampling",
  "algorithm",
  "models",
  "config",
  "datasets",
  "reporting",
  "storage",
  "devices",
)
# Whole rooms, and single files of others.
PURE = (
  "algorithm",
  "sampling",
  "models.families",
  "models.transformer",
  "models.layers",
  "models.attention",
  "models.cache",
  "models.mlp",
  "models.functions",
  "models.lora",
  "planning.chips",
  "planning.flops",
  "planning.hlo",
  "run.collapse",
  "tasks.base",
  "tasks.answers",
  "tasks.arithmetic",
  "tasks.latex",
  "tasks.plain_latex",
)
WITHOUT_JAX = ("config",)
# What a command imports before its first line.
LIGHT = ("main", "config", "run.rules", "sampling.settings")
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"}
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
  """Dotted name of a module's file, below rspo_jax."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def within(name, places):
  """Whether a module is one of the places or inside of one."""
  return any(name == p or name.startswith(f"{p}.") for p in places)


def imported(name, nodes):
  """Our modules, and the roots of others, that a module's nodes import."""
  found = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}: relative import, line {node.lineno}"
      # `from package import x`: x where it is a module, else the package.
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        is_module = whole.removeprefix("rspo_jax.") in SOURCES
        found.add(whole if is_module else node.module)
  return found


def tree(name):
  """Syntax tree of a module."""
  return ast.parse(SOURCES[name].read_text())


def ours(modules):
  """Those of the package, without its name."""
  return {
    m.removeprefix("rspo_jax").removeprefix(".")
    for m in modules
    if m.split(".")[0] == "rspo_jax"
  }


def test_every_module_lies_in_a_room():
  for name in SOURCES:
    assert name == "" or name.split(".")[0] in ROOMS, name


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_import_goes_upward(name):
  modules = imported(name, ast.walk(tree(name)))
  # The package stands without the configs; only their keys are known.
  if any(m.split(".")[0] == "configs" for m in modules):
    assert name == "config.identity"
  for other in ours(modules) - {""}:
    room, below = name.split(".")[0], other.split(".")[0]
    if name:
      assert ROOMS.index(room) <= ROOMS.index(below), f"{name} imports {other}"


def test_imports_make_no_circle():
  below = {
    name: ours(imported(name, ast.walk(tree(name)))) - {name, ""}
    for name in SOURCES
  }
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


@pytest.mark.parametrize("name", [n for n in SOURCES if within(n, PURE)])
def test_pure_modules_only_compute(name):
  module = tree(name)
  for node in ast.walk(module):
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
  for function in (n for n in module.body if isinstance(n, ast.FunctionDef)):
    makes_key = "jax.random.key(" in ast.unparse(function)
    assert not makes_key or function.name in KEY_MAKERS, function.name


@pytest.mark.parametrize("name", [n for n in SOURCES if within(n, WITHOUT_JAX)])
def test_config_imports_no_jax(name):
  roots = {m.split(".")[0] for m in imported(name, ast.walk(tree(name)))}
  assert not roots & HEAVY, name


def test_a_command_waits_for_jax_as_late_as_it_can():
  seen, todo = set(), [n for n in SOURCES if within(n, LIGHT)]
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    modules = imported(name, tree(name).body)
    assert not {m.split(".")[0] for m in modules} & HEAVY, name
    todo += ours(modules) & SOURCES.keys()
