"""Documents: every command parses, every key exists, every link leads on."""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from configs import base
from rspo_jax.config import identity, load
from rspo_jax.planning import command
from rspo_jax.reporting import trackers
from rspo_jax.run import rules
from rspo_jax.tools.demo import demo
from rspo_jax.tools.report import report
from rspo_jax.tools.sweep import sweep

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAGES.remove(ROOT / "LOG.md")  # what was true on its day
# Programs that are not ours, and what their words mean is their own affair.
OTHERS = {
  "git", "python3", "pip", "wandb", "tensorboard", "apt-get", "gcloud",
  "sbatch", "kubectl", "export", "cd", "source", "mkdir", "ssh", "xpk",
  "gsutil", "for", "do", "done", "echo", "huggingface-cli", "hf", "curl",
  "scp", "tail", "cat", "squeue", "scancel", "tmux", "sudo", "bash",
}  # fmt: skip

OTHERS_FILES = {"eval.py"}  # d1's


def commands(page):
  """Command lines of a page's bash blocks, each as its words."""
  text = page.read_text("utf-8")
  for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
    for line in block.replace("\\\n", " ").splitlines():
      for part in line.split("&&"):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
          words = words[1:]
        if words and words[-1] == "&":  # in the background
          words = words[:-1]
        if words:
          yield [word.removeprefix(".venv/bin/") for word in words]


EVERY = [(page.name, words) for page in PAGES for words in commands(page)]


def check_main(words):
  """Config, switches, keys and values of a run's command."""
  config, *_ = load.parse(["rspo_jax", *words])
  values = config.to_dict()
  if values["data"]["source"] or not values["model"]["path"].startswith(
    rules.EMBEDDED
  ):
    return  # files of the reader's
  with config.unlocked():
    if config.run.logger:  # an extra, which need not be installed here
      assert set(config.run.logger.split(",")) <= trackers.TRACKERS.keys()
      config.run.logger = ""
  rules.check_early(config)


def check(words, monkeypatch):
  """Refuses a command that would not be understood."""
  program, *rest = words
  script = ROOT / program
  if program == "python" and rest[0] == "-m":
    module, rest = rest[1], rest[2:]
    assert importlib.util.find_spec(module), module
    if module == "rspo_jax.main":
      check_main(rest)
    elif module == "rspo_jax.demo":
      demo.PARSER.read(rest)
    elif module == "rspo_jax.report":
      report.PARSER.read(rest)
  elif program == "python":
    name, rest = rest[0], rest[1:]
    if name == "-c":
      compile(rest[0], "docs", "exec")
    elif (ROOT / name).exists():
      parse = {
        "launch/report.py": report.PARSER.read,
        "launch/sweep.py": sweep.PARSER.read,
        "launch/plan.py": command.parse,
      }.get(name)
      if parse:
        parse(rest)
    else:
      assert name in own_files(), name
  elif script.is_file():
    assert os.access(script, os.X_OK) or script.suffix != ".sh", program
  else:
    known = OTHERS | {"pytest", "ruff"}
    assert program in known, f"{program}: is it a command?"
  for word in words:
    match = re.fullmatch(r"(?:-r)?(requirements[\w-]*\.txt)", word)
    assert not match or (ROOT / match[1]).is_file(), word


def own_files():
  """Files that a page tells the reader to write."""
  text = "".join(page.read_text("utf-8") for page in PAGES)
  return set(re.findall(r"^# (\w+\.py)$", text, re.M))


@pytest.mark.parametrize(
  ("page", "words"), EVERY, ids=[f"{page}-{words[-1]}" for page, words in EVERY]
)
def test_every_command_is_understood(page, words, monkeypatch):
  del page
  monkeypatch.chdir(ROOT)
  check(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_is_named_exists(page):
  values = identity.flat(base.get_config().to_dict())
  groups = {key.partition(".")[0] for key in values}
  text = page.read_text("utf-8")
  inline = re.findall(r"`([^`\n]+)`", text)
  for code in inline:
    match = re.match(r"(?:--config\.)?(\w+)((?:\.\w+)+)(?:=|$)", code)
    if not match or match[1] not in groups:
      continue
    key = match[1] + match[2]
    if key.endswith((".py", ".md", ".jsonl", ".json")):
      continue
    inside = any(known.startswith(f"{key}.") for known in values)
    opened = key.startswith("task.reward_weights")
    known = key in values or inside or opened or is_defined(key)
    assert known, f"{page.name}: {code}"


def is_defined(dotted):
  """Whether `run.data.Batches` means what a module defines, not a key."""
  *module, name = dotted.split(".")
  path = (ROOT / "rspo_jax").joinpath(*module).with_suffix(".py")
  if not path.is_file():
    return False
  return re.search(rf"^(?:def|class) {name}\b", path.read_text(), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_that_is_named_exists(page):
  files = [str(path) for path in ROOT.rglob("*.py")]
  for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text("utf-8")):
    if name not in OTHERS_FILES and name not in own_files():
      full = f"{ROOT}/{name}" if name.startswith("tests/") else f"/{name}"
      assert any(file.endswith(full) for file in files), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page):
  text = page.read_text("utf-8")
  for target in re.findall(r"\]\(([^)#\s]+)", text):
    if "://" not in target:
      assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_document_is_in_the_index():
  index = (ROOT / "docs" / "README.md").read_text("utf-8")
  for page in (ROOT / "docs").glob("*.md"):
    assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_page_of_configs_is_that_of_the_configs():
  spec = importlib.util.spec_from_file_location(
    "make_configs", ROOT / "docs" / "make_configs.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  page = module.page()
  assert page == module.PAGE.read_text("utf-8"), (
    "configs changed: run python docs/make_configs.py"
  )
  for key in identity.flat(base.get_config().to_dict()):
    assert page.count(f"| `{key}` |") == 1


def test_the_package_names_its_commands_types_and_licence():
  tomllib = pytest.importorskip("tomllib")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  for target in project["project"]["scripts"].values():
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
  assert (ROOT / "rspo_jax" / "py.typed").exists()
  assert (ROOT / project["project"]["license-files"][0]).is_file()
  extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
  for name, extra in extras.items():
    assert all((ROOT / file).is_file() for file in extra["file"]), name
  citation = (ROOT / "CITATION.cff").read_text()
  version = project["project"]["version"]
  assert f"version: {version}" in citation
  assert __import__("rspo_jax").__version__ == version


@pytest.mark.parametrize(
  "site", ["lib/python3/site-packages", "."], ids=["prefix or --user", "target"]
)
def test_an_installed_command_finds_the_configs_from_anywhere(tmp_path, site):
  # As `pip install .` leaves it: no clone on the path, configs under share/.
  share = tmp_path / "share" / "rspo_jax"
  share.mkdir(parents=True)
  (share / "configs").symlink_to(ROOT / "configs")
  package = tmp_path / site
  package.mkdir(parents=True, exist_ok=True)
  (package / "rspo_jax").symlink_to(ROOT / "rspo_jax")
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  code = (
    "import sys\n"
    f"sys.path[0:1] = [{str(package)!r}]\n"
    "from rspo_jax.config import load\n"
    "config = load.parse(['x', '--config=configs/sudoku.py:smoke'])[0]\n"
    "print(config.task.name, config.run.steps)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[0] == "sudoku"


def runnable():
  """Commands of the pages that end by themselves, as `:smoke`."""
  for page, words in EVERY:
    if words[:3] != ["python", "-m", "rspo_jax.main"]:
      continue
    config = next((w for w in words if w.startswith("--config=")), "")
    path, _, arg = config.partition("=")[2].partition(":")
    if "data.source" in " ".join(words) or "model.path" in " ".join(words):
      continue
    if pathlib.Path(path).stem not in ("countdown", "sudoku"):
      continue
    arg = arg if "smoke" in arg else ",".join(filter(None, (arg, "smoke")))
    rest = [
      w for w in words[3:] if not w.startswith(("--config=", "--workdir"))
    ]
    yield pytest.param(
      [f"--config={path}:{arg}", *rest], id=f"{page}-{path}:{arg}-{len(rest)}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", list(runnable()))
def test_commands_of_the_pages_run(words, tmp_path):
  skipped = [w for w in words if "run.logger" in w]
  words = [w for w in words if w not in skipped]
  done = subprocess.run(
    [
      *(sys.executable, "-m", "rspo_jax.main", *words),
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
