"""What each estimator makes of the relative score d, measured on a checkpoint.

    python -m rspo_jax.diagnose --config=configs/countdown.py --out=DIR

1. Policy and reference: the reference is the config's model, the policy comes
   from --policy=FOLDER, or from --steps updates of the config's own run.
2. The policy completes prompts; exact scores of both by enumerating all
   2^L - 1 masks where L <= 10, else by many complementary pairs.
3. Every scheme at the same number of forward passes, R times: bias, variance
   and mean squared error of d; correlation of the noise of policy and
   reference, which sharing masks cancels; MSE over uniform's, with a bootstrap
   interval over sequences.
4. Signal to noise of the gradient of the mean score over completions of
   positive and of negative advantage: |E g|^2 / tr Var(g) over mask draws.
5. The bfloat16 noise floor of d, beside the noise of the masks.

Writes diagnose.json, diagnose.png (with matplotlib, requirements-dev.txt) and
prints the table. Units: nats per token and their squares.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

from rspo_jax.config import cli, identity, keys, load
from rspo_jax.config.cli import Option
from rspo_jax.storage import files


def _read(options) -> None:
  """Reads the lists of --forwards and --schemes."""
  from rspo_jax.algorithm import likelihood

  forwards = options.forwards.split(",")
  for text in forwards:
    if not text.isdecimal() or int(text) < 1:
      raise ValueError(
        f"--forwards={text} must be a whole number from 1 on, or several with "
        "commas."
      )
  options.forwards = [int(text) for text in forwards]
  wanted = options.schemes.split(",") if options.schemes else []
  for name in wanted:
    keys.one_of("--schemes", name, likelihood.ESTIMATORS)
  options.schemes = ["uniform", *(wanted or likelihood.ESTIMATORS)]


PARSER = cli.Parser(
  "python -m rspo_jax.diagnose --config=FILE[:ARG,...] [options]",
  [
    load.CONFIG,
    Option(cli.OVERRIDE, "override of one key"),
    Option("--out=DIR", "where diagnose.json and the plot go", "diagnose"),
    Option(
      "--policy=FOLDER",
      "policy in the Hugging Face layout (a run's model/); without it the "
      "config is trained for --steps",
    ),
    Option("--steps=N", "updates of that training", 20, int, 1),
    Option("--forwards=N,N", "passes an estimate, a table each", "2,4"),
    Option(
      "--schemes=a,b",
      "those alone, beside uniform; gradients are measured for uniform, "
      "complementary and the config's",
    ),
    Option("--sequences=N", "completions", 64, int, 1),
    Option("--repeats=N", "estimates of each", 64, int, 1),
  ],
  "exit status: 0 done, 2 mistake in the command.",
  _read,
)


def table(result: dict) -> str:
  """The rows as text."""
  head = (
    f"{'scheme':14}{'K':>3}{'bias':>10}{'sd':>9}{'rmse':>9}"
    f"{'MSE / uniform':>22}{'noise corr':>12}{'SNR A>0':>10}{'A<0':>8}"
  )
  lines = [head]
  for row in result["rows"]:
    span = (
      f"{row['mse_over_uniform']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    )
    snr = [
      row["snr"].get(key, float("nan")) for key in ("positive", "negative")
    ]
    lines.append(
      f"{row['scheme']:14}{row['forwards']:>3}{row['bias']:>10.4f}"
      f"{row['variance'] ** 0.5:>9.4f}{row['mse'] ** 0.5:>9.4f}{span:>22}"
      f"{row['noise_correlation']:>12.3f}{snr[0]:>10.3f}{snr[1]:>8.3f}"
    )
  lines.append(
    f"d without mask noise ({result['exact']}): standard deviation "
    f"{result['relative_std']:.4f} nats per token over {result['sequences']} "
    f"completions; bfloat16 adds {result['bf16_floor']:.5f}."
  )
  return "\n".join(lines)


def plot(result: dict, path: pathlib.Path) -> bool:
  """Root mean squared errors as bars; False where matplotlib is missing."""
  try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
  except ImportError:
    return False
  counts = sorted({row["forwards"] for row in result["rows"]})
  figure, axes = pyplot.subplots(
    1, len(counts), figsize=(5 * len(counts), 4), squeeze=False, sharey=True
  )
  for axis, count in zip(axes[0], counts, strict=True):
    rows = [row for row in result["rows"] if row["forwards"] == count]
    rows.sort(key=lambda row: row["mse"])
    names = [row["scheme"] for row in rows]
    axis.barh(names, [row["mse"] ** 0.5 for row in rows], color="#9db7d5")
    axis.barh(names, [abs(row["bias"]) for row in rows], color="#c25b4e")
    axis.axvline(result["bf16_floor"], color="black", linestyle=":")
    axis.set_title(f"{count} forward passes")
    axis.set_xlabel("error of d, nats per token")
    axis.invert_yaxis()
  axes[0][0].legend(["bfloat16 floor", "root mean square", "bias"])
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
  return True


def _trained(options, out: pathlib.Path) -> pathlib.Path:
  """Folder of a policy after some updates of the config's own run."""
  from rspo_jax import main as trainer

  folder = out / "run"
  given = [f"--config.{key}={v}" for key, v in options.overrides.items()]
  status = trainer.main(
    [
      "diagnose",
      f"--config={options.config}",
      *given,
      f"--workdir={folder}",
      f"--config.run.steps={options.steps}",
      "--config.run.export=True",
      "--config.run.log=quiet",
      "--config.run.tensorboard=False",
      "--config.eval.prompts=64",
      "--config.eval.batch=64",
    ]
  )
  if status:
    raise ValueError(
      f"the policy's run in {folder} ended with status {status}; its message "
      "is above. Or give --policy=FOLDER."
    )
  return folder / "model"


def _check(config, settings, options) -> None:
  """Refuses what cannot be diagnosed, before anything is trained."""
  if settings.supervised:
    raise ValueError(
      "objective.name='sft' has no reference to be relative to; diagnose a "
      "config of reinforcement learning."
    )
  if config.lora.rank or config.lora.path:
    raise ValueError(
      f"lora.rank={config.lora.rank}, lora.path={config.lora.path!r}: whole "
      "models are diagnosed; use --config.lora.rank=0 --config.lora.path= "
      "and a run's merged model/ as --policy."
    )
  wanted = settings.rollout.prompts * settings.rollout.group_size
  if options.sequences > wanted:
    raise ValueError(
      f"--sequences={options.sequences} is more than one rollout has; use "
      f"at most {wanted}, or raise rollout.prompts."
    )


def _diagnose(options) -> int:
  """Measures, prints and writes what the options ask for."""
  import jax

  from rspo_jax.models import checkpoints
  from rspo_jax.run import loading
  from rspo_jax.run import program as program_lib
  from rspo_jax.run import settings as settings_lib
  from rspo_jax.tools.diagnose import measure

  config = load.resolve(options.config, options.overrides)
  settings = settings_lib.build(config, jax.device_count())
  _check(config, settings, options)
  out = pathlib.Path(options.out)
  identity.check_links(out, f"--out={out}")
  out.mkdir(parents=True, exist_ok=True)
  folder = options.policy or _trained(options, out)
  program = program_lib.build(settings)
  policy = checkpoints.load_model(
    folder,
    settings.model.param_dtype,
    functools.partial(loading.shardings, program.mesh),
  )
  bench = measure.Bench(program, policy.params, options.sequences)
  result = measure.diagnose(
    bench, options.forwards, options.repeats, options.schemes
  )
  files.write(out / "diagnose.json", json.dumps(result, indent=2) + "\n")
  print(table(result))
  if plot(result, out / "diagnose.png"):
    print(f"In {out}: diagnose.json, diagnose.png.")
  else:
    print(f"In {out}: diagnose.json (pip install matplotlib for the plot).")
  return cli.DONE


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return PARSER.run(_diagnose, argv)
