"""Command lines: what is understood, what is refused, what help costs."""

import importlib
import subprocess
import sys

import pytest

from rspo_jax.config import cli
from rspo_jax.config.cli import Option

COMMANDS = (
  "scores",
  "demo.demo",
  "diagnose.diagnose",
  "report.report",
  "sweep.sweep",
)
PARSER = cli.Parser(
  "x [options]",
  [
    Option("DIR", "folders"),
    Option("--config=FILE", "config file", example="a.py"),
    Option(cli.OVERRIDE, "one key"),
    Option("--count=N", "how many", 1, int, 1),
    Option("--share=X", "how much", None, float, 0, 1),
    Option("--kind=NAME", "which", "this", choices=("this", "that")),
    Option("--quick", "not slowly"),
  ],
  "the end.",
)


def test_options_are_read_in_every_form_and_the_last_one_counts():
  words = "a --count 3 -config=b.py b --quick --share=-0 --count=2"
  words += " --config.run.steps 7 -config.mesh.data=-1 --config.data.dir="
  options = PARSER.read(words.split())
  assert options.words == ["a", "b"] and options.config == "b.py"
  assert (options.count, options.share, options.quick) == (2, 0, True)
  assert options.kind == "this"
  overrides = {"run.steps": "7", "mesh.data": "-1", "data.dir": ""}
  assert options.overrides == overrides


@pytest.mark.parametrize(
  ("word", "said"),
  [
    ("--config=", "--config is missing; try --config=a.py."),
    ("--count=0", "--count=0 must be a whole number from 1 on."),
    ("--count=1.5", "--count=1.5 must be a whole number"),
    ("--count=", "--count needs a value; write --count=N."),
    ("--count", "--count needs a value; write --count=N."),
    ("--share=nan", "--share=nan must be a number in 0 .. 1."),
    ("--kind=thot", "--kind='thot' is not known; did you mean 'that'?"),
    ("--quick=yes", "--quick takes no value; write --quick."),
    ("--quikc", "--quikc is not an option; did you mean --quick? see --help."),
    ("--b1=3", "did you mean --config.optimizer.b1?"),
    ("--config.run.steps", "--config.run.steps needs a value"),
    ("-z", "-z is not an option; see --help."),
  ],
)
def test_what_cannot_be_is_refused_with_value_and_remedy(word, said):
  with pytest.raises(ValueError) as caught:
    PARSER.read(["--config=b.py", word])
  assert said in str(caught.value)


def test_help_says_each_option_once_within_80_columns(capsys):
  assert PARSER.wants_help(["--count=x", "-h"])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "usage: x [options]" and lines[-1] == "the end."
  assert max(map(len, lines)) <= 80
  starts = [line.split()[0] for line in lines if line.startswith("  ")]
  assert starts == [option.form for option in PARSER.options]
  assert any(
    line.endswith("this | that: which (default: this)") for line in lines
  )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_in_any_command_is_one_line_and_status_2(name, capsys):
  command = importlib.import_module(f"rspo_jax.tools.{name}")
  assert command.main(["--frobnicate=1"]) == cli.MISTAKE
  said = capsys.readouterr()
  assert said.out == "" and said.err.count("\n") == 1
  assert said.err.startswith("error: --frobnicate=1 is not an option; ")


def test_no_command_waits_for_jax_before_its_help():
  modules = ", ".join(f"rspo_jax.tools.{name}" for name in COMMANDS)
  code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_reader_that_goes_early_is_no_fault():
  code = (
    "from rspo_jax.config import cli\n"
    "p = cli.Parser('x', [cli.Option('--n=N', 'word ' * 200)], 'end')\n"
    "raise SystemExit(p.run(lambda o: print('y\\n' * 10**6) or 0, []))"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as done:
    done.stdout.read(1)
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait() == 0


@pytest.mark.parametrize("words", [[], ["-u"]], ids=["buffered", "as written"])
def test_the_help_of_a_run_needs_no_reader(words):
  # Short enough for a buffer, which is emptied when the process ends.
  code = "input(); from rspo_jax import main; exit(main.main(['x', '--help']))"
  pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
  with subprocess.Popen([sys.executable, *words, "-c", code], **pipes) as done:
    done.stdout.close()
    done.stdin.write(b"\n")
    done.stdin.flush()
    assert done.stderr.read() == b""
    assert done.wait() == 0
