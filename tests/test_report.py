"""Reports: figures against numpy, the page against a real browser."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from rspo_jax import report, report_runs, report_statistics

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPTS = 64


def write_run(
  folder,
  *,
  lambda_=3.0,
  seed=0,
  steps=40,
  name="rspo",
  gain=0.3,
  finished=True,
  calibration=True,
  samples=True,
  extra=None,
):
  """Writes a folder as a run leaves it, with made-up but plausible figures."""
  rng = np.random.default_rng([seed, int(1000 * lambda_), len(name)])
  config = {
    "eval": {"prompts": PROMPTS, "split": "validation"},
    "likelihood": {"masks": 2, "scheme": "complementary"},
    "objective": {
      "lambda_": lambda_,
      "lambda_unit": "token",
      "name": name,
      "centring": "group",
    },
    "rollout": {"group_size": 8, "prompts": 4},
    "run": {"seed": seed, "steps": steps},
    "task": {"name": "countdown"},
    "train": {"passes": "auto", "micro_batch": 8},
  }
  (folder / "samples").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  before = rng.random(PROMPTS) < 0.3
  after = before | (rng.random(PROMPTS) < gain)

  def evaluation(step, right):
    rate = float(right.mean())
    half = 1.96 * math.sqrt(rate * (1 - rate) / PROMPTS) + 0.01
    for kind in ("greedy", "sampled") if samples else ():
      path = folder / "samples" / f"eval-{step:06d}-{kind}.jsonl"
      with path.open("w") as file:
        for i in range(PROMPTS):
          text = f"({i}+3)*2" if right[i] else f"{i}*<b>3</script>"
          row = {
            "prompt": f"{i},2,3={2 * i + 6}",
            "index": i,
            "completion": text,
            "reward": 1.0 if right[i] else 0.1,
            "correct": bool(right[i]),
            "parts": {"correct": float(right[i]), "numbers": 0.9},
            "reason": "reaches the target" if right[i] else "misses it",
            "pieces": list(text),
            "commit_step": [int(s) for s in rng.permutation(len(text))],
          }
          file.write(json.dumps(row) + "\n")
    return {
      "eval/accuracy": rate,
      "eval/accuracy_sampled": rate,
      "eval/n": PROMPTS,
      "eval/ci_low": max(0.0, rate - half),
      "eval/ci_high": min(1.0, rate + half),
      "eval/ci_low_sampled": max(0.0, rate - half),
      "eval/ci_high_sampled": min(1.0, rate + half),
    }

  rows = [{"step": 0} | evaluation(0, before)]
  for step in range(1, steps + 1):
    way = 1 - math.exp(-3 * step / steps)
    row = {
      "step": step,
      "loss": float(rng.normal(-0.1, 0.02)),
      "grad_norm": float(rng.gamma(4, 0.1)),
      "reward/mean": 0.3 + gain * way + float(rng.normal(0, 0.03)),
      "reward/correct": 0.25 + gain * way + float(rng.normal(0, 0.03)),
      "reward/equal_groups": 0.4 - 0.2 * way,
      "rollout/denoiser_calls": 8,
      "rollout/length_mean": 6.0 + way,
      "score/relative_std": 0.1 * way,
      "score/mask_variance": 0.02 + 0.05 * way,
      "gap/lambda_share": lambda_ * 0.1 * way,
      "gap/std": 1.0,
      "calibration/slope": 0.2 * way,
      "calibration/correlation": 0.5 * way,
      "time/rollout_s": 0.5,
      "time/reward_s": 0.01,
      "time/score_s": 0.1,
      "time/update_s": 0.3,
      "time/step_s": 20.0 if step == 1 else 1.0,
    }
    rows.append(row | (extra or {}))
  if finished:
    rows[-1] |= evaluation(steps, after)
    (folder / "summary.json").write_text("{}")
  if calibration and lambda_:
    target = rng.normal(0, 1 / lambda_, 96)
    for step in (1, steps // 2, steps):
      estimate = 0.4 * step / steps * target + rng.normal(0, 0.05, 96)
      path = folder / "samples" / f"calibration-{step:06d}.jsonl"
      path.write_text(
        "".join(
          json.dumps({"advantage": t * lambda_, "target": t, "estimate": e})
          + "\n"
          for t, e in zip(target, estimate, strict=True)
        )
      )
  with (folder / "metrics.jsonl").open("w") as file:
    for row in rows:
      file.write(json.dumps(row) + "\n")
  return folder


def write_sweep(folder, seeds=3, **kwargs):
  """Four groups of runs: the gap, none, a weak one, rejection sampling."""
  runs = {}
  for entry, values in {
    "rspo": {"gain": 0.4},
    "lambda_0": {"lambda_": 0.0, "gain": 0.25},
    "paper_literal": {"lambda_": 0.01, "gain": 0.27},
    "rft": {"name": "rft", "gain": 0.15},
  }.items():
    for seed in range(seeds):
      write_run(folder / f"{entry}-seed{seed}", seed=seed, **values, **kwargs)
      runs[f"{entry}-seed{seed}"] = {
        "entry": entry,
        "workdir": f"{entry}-seed{seed}",
      }
  (folder / "sweep.json").write_text(json.dumps({"config": "", "runs": runs}))
  return folder


def payload_of(*folders):
  groups, notes = report.build([pathlib.Path(folder) for folder in folders])
  return report.payload(groups, notes)


def call(capsys, *words):
  """(exit status, standard output, standard error) of a report."""
  code = report.main([str(word) for word in words])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


# Figures.


def test_the_interval_of_one_seed_is_that_of_a_proportion():
  rng = np.random.default_rng(3)
  table = rng.random((1, 900)) < 0.4
  low, high = report_statistics.interval(
    report_statistics.Bootstrap(4000).means(table)
  )
  rate = table.mean()
  half = 1.96 * math.sqrt(rate * (1 - rate) / 900)
  # 4,000 replicates fix a quantile to about 3 % of the half width.
  assert low == pytest.approx(rate - half, abs=0.1 * half)
  assert high == pytest.approx(rate + half, abs=0.1 * half)


def test_the_bootstrap_draws_seeds_and_prompts_and_pairs_differences():
  rng = np.random.default_rng(4)
  hard = rng.random(80)
  seeds = rng.normal(0, 0.15, 5)
  first, second = (
    rng.random((5, 80)) < np.clip(hard + seeds[:, None] + shift, 0, 1)
    for shift in (0.0, 0.1)
  )
  bootstrap = report_statistics.Bootstrap(4000)
  found = [bootstrap.means(table) for table in (first, second)]
  # By brute force, with other draws: pick rows, pick columns, take the mean.
  brute = [[], []]
  for _ in range(4000):
    rows, columns = rng.integers(5, size=5), rng.integers(80, size=80)
    for out, table in zip(brute, (first, second), strict=True):
      out.append(table[rows][:, columns].mean())
  brute = np.array(brute)
  for one, other in (
    (found[0], brute[0]),
    (found[1] - found[0], brute[1] - brute[0]),
  ):
    low, high = np.quantile(other, (0.025, 0.975))
    assert report_statistics.interval(one) == pytest.approx(
      (low, high), abs=0.12 * (high - low) / 2
    )
    assert one.std() == pytest.approx(other.std(), rel=0.06)
  # Paired: the difference of a table with itself is nothing at all.
  assert np.all(bootstrap.means(first) - bootstrap.means(first.copy()) == 0)


def test_students_quantiles_are_those_of_scipy():
  stats = pytest.importorskip("scipy.stats")
  for n in range(2, 40):
    values = np.random.default_rng(n).normal(size=n)
    low, high = report_statistics.t_interval(values)
    half = stats.t.ppf(0.975, n - 1) * stats.sem(values)
    assert (high - low) / 2 == pytest.approx(half, rel=0.012)
  assert report_statistics.t_interval([0.5]) is None


def seeds_of(rng, count, shift, spread):
  """Verdicts [S, 400] of a config; a spread of 0.2 is 5 to 6 points."""
  hard = rng.normal(0.5, 1, 400)
  seeds = rng.normal(shift, spread, (count, 1))
  return hard + seeds + rng.normal(0, 0.7, (count, 400)) > 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_difference_is_coloured_where_there_is_one_and_in_5_percent_else(
  count,
):
  rng = np.random.default_rng(count)
  bootstrap = report_statistics.Bootstrap(500)

  def sign(shift, spread):
    one = seeds_of(rng, count, shift, spread)
    other = seeds_of(rng, count, 0.0, spread)
    means = bootstrap.means(one) - bootstrap.means(other)
    return report_statistics.change(one * 1.0 - other, means)[-1]

  # 5 % of 400 are 20, with a standard deviation of 4.4; 33 are three above.
  assert sum(sign(0.0, 0.2) != 0 for _ in range(400)) <= 33
  # 30 points apart. Student's t of two seeds wants 12.7 standard errors.
  found = [sign(2.0, 0.03) for _ in range(50)]
  assert -1 not in found and found.count(1) >= {2: 30, 3: 45, 5: 50}[count]


def test_prompts_that_all_seeds_share_do_not_colour_a_difference():
  rng = np.random.default_rng(7)
  bootstrap = report_statistics.Bootstrap(500)
  wrong = 0
  for _ in range(400):
    # Seeds agree; which prompts a config can do is drawn once.
    tables = [np.tile(rng.random(100) < 0.5, (3, 1)) * 1.0 for _ in "ab"]
    means = [bootstrap.means(table) for table in tables]
    cell = report_statistics.change(tables[0] - tables[1], means[0] - means[1])
    wrong += cell[-1] != 0
  assert wrong <= 33


def test_one_seed_colours_its_own_gain_and_no_difference_of_groups(tmp_path):
  write_run(tmp_path / "a", lambda_=3.0, gain=0.9)
  write_run(tmp_path / "b", lambda_=1.0, gain=0.0)
  good, bad = payload_of(tmp_path)["groups"]
  assert good["summary"]["greedy"]["gain"][-1] == 1
  value, low, _, sign = good["versus"]["greedy"][1]
  assert value > 0.3 and low > 0 and sign == 0
  assert bad["versus"]["greedy"][0][-1] == 0


def test_before_after_and_gain_are_means_of_the_verdicts(tmp_path):
  for seed in range(3):
    write_run(tmp_path / f"run-seed{seed}", seed=seed)
  (group,) = payload_of(tmp_path)["groups"]
  rates = []
  for name in ("eval-000000-greedy", "eval-000040-greedy"):
    rows = [
      json.loads(line)
      for seed in range(3)
      for line in (tmp_path / f"run-seed{seed}/samples/{name}.jsonl").open()
    ]
    rates.append(np.mean([row["correct"] for row in rows]))
  cell = group["summary"]["greedy"]
  assert cell["n"] == PROMPTS
  assert cell["before"][0] == pytest.approx(rates[0], rel=1e-4)
  assert cell["after"][0] == pytest.approx(rates[1], rel=1e-4)
  assert cell["gain"][0] == pytest.approx(rates[1] - rates[0], rel=1e-4)
  for value, low, high, *_ in (cell["before"], cell["after"], cell["gain"]):
    assert low < value < high
  assert group["parts"]["after"]["correct"] == pytest.approx(rates[1], rel=1e-4)
  assert group["parts"]["after"]["numbers"] == pytest.approx(0.9)


def test_without_completions_the_logged_intervals_serve(tmp_path):
  write_run(tmp_path / "alone", samples=False)
  (group,) = payload_of(tmp_path)["groups"]
  rows = [
    json.loads(line) for line in (tmp_path / "alone/metrics.jsonl").open()
  ]
  value, low, high = group["summary"]["greedy"]["after"]
  assert value == pytest.approx(rows[-1]["eval/accuracy"], rel=1e-4)
  assert low == pytest.approx(rows[-1]["eval/ci_low"], rel=1e-4)
  assert high == pytest.approx(rows[-1]["eval/ci_high"], rel=1e-4)
  assert group["runs"][0]["pairs"] == {}


def test_groups_are_compared_on_the_same_prompts_only(tmp_path):
  write_run(tmp_path / "a", lambda_=3.0)
  write_run(tmp_path / "b", lambda_=1.0)
  other = write_run(tmp_path / "c", lambda_=2.0)
  config = json.loads((other / "config.json").read_text())
  config["eval"]["split"] = "test"
  (other / "config.json").write_text(json.dumps(config))
  groups = payload_of(tmp_path)["groups"]
  versus = [group["versus"]["greedy"] for group in groups]
  after = [group["summary"]["greedy"]["after"][0] for group in groups]
  assert versus[0][1][0] == pytest.approx(after[0] - after[1], abs=1e-4)
  assert versus[1][0][:3] == pytest.approx(
    [-versus[0][1][i] for i in (0, 2, 1)], abs=1e-4
  )
  assert versus[0][2] is versus[2][0] is versus[0][0] is None


def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
  write_sweep(tmp_path, seeds=2, steps=4)
  groups = payload_of(tmp_path)["groups"]
  # In the order of the sweep, under its names.
  assert [group["name"] for group in groups] == [
    "rspo",
    "lambda_0",
    "paper_literal",
    "rft",
  ]
  assert all([r["seed"] for r in g["runs"]] == [0, 1] for g in groups)
  (tmp_path / "sweep.json").unlink()
  groups = payload_of(tmp_path)["groups"]
  assert {group["name"] for group in groups} == {
    "lambda=0.0",
    "lambda=0.01",
    "name=rft",
    "rspo",
  }


def test_the_page_names_the_runs_that_a_sweep_lost(tmp_path):
  write_sweep(tmp_path, seeds=1, steps=4)
  sweep = json.loads((tmp_path / "sweep.json").read_text())
  sweep["runs"]["lost-seed0"] = {
    "entry": "lost",
    "workdir": "lost-seed0",
    "status": "failed",
    "why": "exit status 3: the loss is not finite",
  }
  (tmp_path / "sweep.json").write_text(json.dumps(sweep))
  assert payload_of(tmp_path)["notes"] == [
    "lost-seed0 of the sweep failed: exit status 3: the loss is not finite"
  ]


def test_several_samples_of_a_prompt_count_with_their_mean(tmp_path):
  folder = write_run(tmp_path / "run")
  path = folder / "samples" / "eval-000040-sampled.jsonl"
  rows = [json.loads(line) for line in path.open()]
  more = [row | {"correct": not row["correct"]} for row in rows[:10]]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows + more))
  (group,) = payload_of(folder)["groups"]
  cell = group["summary"]["sampled"]
  expected = np.mean([0.5] * 10 + [row["correct"] for row in rows[10:]])
  assert cell["n"] == PROMPTS
  assert cell["after"][0] == pytest.approx(expected, rel=1e-4)


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
  shutil.copytree(write_run(tmp_path / "a"), tmp_path / "b")
  data = payload_of(tmp_path)
  assert len(data["groups"][0]["runs"]) == 1
  (note,) = data["notes"]
  assert str(tmp_path / "b") in note and "same config and seed" in note


def test_a_folder_named_twice_counts_once(tmp_path):
  write_run(tmp_path / "runs" / "a")
  data = payload_of(tmp_path / "runs", tmp_path / "runs" / "a")
  assert len(data["groups"][0]["runs"]) == 1


def test_thinned_columns_are_means_over_bins_that_agree_between_seeds():
  rows = [
    {"step": step, "loss": float(step**2), "x/seconds": 2.0 * step}
    for step in range(24)
  ]
  rows[7]["loss"] = None  # was not finite
  rows[3]["reward/mean"] = 0.5
  found = report.columns(rows, 10)
  assert found["step"] == [10, 20, 23]
  squares = np.arange(24.0) ** 2
  assert found["loss"] == pytest.approx(
    [
      np.delete(squares[1:11], 6).mean(),
      squares[11:21].mean(),
      squares[21:].mean(),
    ],
    rel=1e-4,
  )
  assert found["x/seconds"] == [20, 40, 46]
  assert found["reward/mean"] == [0.5, None, None]
  assert report.columns(rows, 1)["step"] == list(range(1, 24))


def test_forwards_count_rollout_scores_and_three_per_mask_of_an_update(
  tmp_path,
):
  def forwards(**kwargs):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    run = report_runs.read_run(write_run(folder, steps=5, **kwargs))
    return report_runs.with_compute(run)[-1]["x/forwards"]

  # 32 sequences: 8 forwards of the sampler; K = 2 by the reference and, three
  # times, by the update; 5 steps.
  assert forwards() == 32 * (8 + 2 * (1 + 3)) * 5
  # Half the groups dropped: they are sampled, not scored.
  half = {"update/kept_share": 0.5}
  assert forwards(extra=half) == 32 * (8 + 0.5 * 2 * (1 + 3)) * 5
  # What the run counted itself goes before.
  assert forwards(extra={"compute/cumulative": 35.0}) == 35


def test_the_regression_of_a_calibration_file_is_numpys(tmp_path):
  folder = write_run(tmp_path / "run")
  points = np.random.default_rng(5).normal((0.2, 0.1), 1.0, (900, 2))
  points[:, 1] += 0.7 * points[:, 0]
  (folder / "samples" / "calibration-000040.jsonl").write_text(
    "".join(json.dumps({"target": x, "estimate": y}) + "\n" for x, y in points)
    + '{"target": 1}\nnot json\n'
  )
  found = report.scatter(report_runs.read_run(folder))
  assert [entry["step"] for entry in found] == [1, 20, 40]
  slope, intercept = np.polyfit(*points.T, 1)
  assert found[-1]["slope"] == pytest.approx(slope, rel=1e-4)
  assert found[-1]["intercept"] == pytest.approx(intercept, rel=1e-3)
  assert found[-1]["correlation"] == pytest.approx(
    np.corrcoef(*points.T)[0, 1], rel=1e-4
  )
  assert found[-1]["n"] == 900
  assert 200 <= len(found[-1]["points"]) <= 400


def test_time_is_split_without_the_step_that_compiles(tmp_path):
  run = report_runs.read_run(write_run(tmp_path / "run"))
  assert report.phases(run) == {
    "rollout": 0.5,
    "reward": 0.01,
    "score": 0.1,
    "update": 0.3,
    "other": pytest.approx(0.09),
    "first step": 20.0,
  }


def test_pairs_show_changed_verdicts_first_and_cut_long_texts(tmp_path):
  folder = write_run(tmp_path / "run")
  path = folder / "samples" / "eval-000040-greedy.jsonl"
  rows = [json.loads(line) for line in path.open()]
  for row in rows:
    row["completion"] += "x" * 5000
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = report.pairs(report_runs.read_run(folder), 5)["greedy"]
  assert len(found) == 5
  assert (found[0]["before"]["correct"], found[0]["after"]["correct"]) == (
    False,
    True,
  )
  assert len(found[0]["after"]["text"]) < 900
  assert "more characters" in found[0]["after"]["text"]


# The command.


def test_twelve_long_runs_take_seconds_and_stay_small(tmp_path, capsys):
  write_sweep(tmp_path / "runs", steps=1500)
  start = time.process_time()  # other processes are not our cost
  code, said, _ = call(
    capsys, tmp_path / "runs", f"--out={tmp_path / 'report.html'}"
  )
  assert code == 0
  assert time.process_time() - start < 10
  assert (tmp_path / "report.html").stat().st_size < 3e6
  assert "12 runs in 4 groups" in said


def test_the_page_refers_to_nothing_outside(tmp_path):
  write_run(tmp_path / "run")
  text = report.page(payload_of(tmp_path), 'A <b>&"title"')
  assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)", text)
  assert "@import" not in text
  assert not re.search(r"@@[A-Z_]+@@", text)
  assert "<h1>A &lt;b>&amp;" in text
  # A completion cannot end the script that holds it.
  data = text.split('id="data">')[1].split("</script>")[0]
  assert json.loads(data)["groups"]
  assert "<" not in data


def test_the_launcher_works_from_anywhere(tmp_path):
  write_run(tmp_path / "run", steps=4)
  done = subprocess.run(
    [sys.executable, str(ROOT / "launch" / "report.py"), "run"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "report.html").exists()


def test_odd_runs_are_shown_as_far_as_they_go(tmp_path):
  write_run(tmp_path / "unfinished", finished=False, lambda_=1.0)
  only = write_run(tmp_path / "evaluated", lambda_=2.0)
  lines = (only / "metrics.jsonl").read_text().splitlines()
  (only / "metrics.jsonl").write_text(
    lines[0] + "\n" + lines[1].replace("0.", "nul") + "\n" + lines[2][:40]
  )
  bare = tmp_path / "supervised"
  bare.mkdir()
  (bare / "config.json").write_text('{"objective": {"name": "sft"}}')
  (bare / "metrics.jsonl").write_text(
    '{"step": 0, "eval/accuracy": 0.5}\n{"step": 1, "loss": null}\n'
    '{"step": 2, "loss": 1.5}\n'
  )
  data = payload_of(tmp_path)
  json.dumps(data, allow_nan=False)
  runs = {run["folder"]: run for g in data["groups"] for run in g["runs"]}
  assert not runs["unfinished"]["finished"]
  assert runs["evaluated"]["columns"] == {"step": []}
  assert runs["supervised"]["columns"]["loss"] == [None, 1.5]


def test_a_damaged_run_is_left_out_and_named(tmp_path, capsys):
  write_run(tmp_path / "good", steps=4)
  broken = write_run(tmp_path / "broken", steps=4)
  (broken / "config.json").write_text("{")
  empty = write_run(tmp_path / "empty", steps=4)
  (empty / "metrics.jsonl").write_text("")
  out = tmp_path / "report.html"
  code, said, err = call(capsys, tmp_path, f"--out={out}")
  assert code == 0
  assert "1 runs" in said
  assert "broken: config.json is damaged" in err
  assert "empty: metrics.jsonl has no rows" in err
  assert "broken: config.json is damaged" in out.read_text()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "no folder is given"),
    (["nowhere"], "is not a folder"),
    (["nothing"], "holds no run"),
    (["run", "--out=nothing"], "is a folder"),
    (["run", "--out=nowhere/report.html"], "cannot be written"),
    (["run", "--uot=x"], "did you mean --out?"),
    (["broken"], "no run could be read"),
  ],
)
def test_a_mistake_in_the_command_is_named(
  tmp_path, monkeypatch, capsys, words, message
):
  monkeypatch.chdir(tmp_path)
  write_run(tmp_path / "run", steps=2)
  (write_run(tmp_path / "broken", steps=2) / "config.json").write_text("[")
  (tmp_path / "nothing").mkdir()
  code, said, err = call(capsys, *words)
  assert code == 2
  assert err.startswith("error: ")
  assert message in err
  assert not said
  assert not list(tmp_path.glob("*.html"))


def test_what_the_page_is_made_of_is_shipped():
  tomllib = pytest.importorskip("tomllib")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  patterns = project["tool"]["setuptools"]["package-data"]["rspo_jax"]
  shipped = {
    path for pattern in patterns for path in (ROOT / "rspo_jax").glob(pattern)
  }
  assert set((ROOT / "rspo_jax" / "assets").iterdir()) <= shipped


# The page in a browser.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A page of twelve runs in four groups."""
  folder = tmp_path_factory.mktemp("report")
  write_sweep(folder / "runs", steps=60)
  out = folder / "report.html"
  assert report.main([str(folder / "runs"), f"--out={out}"]) == 0
  return out


def ink(browser, metric):
  """The picture of a chart."""
  return browser.run(
    f"document.querySelector('[data-metric=\"{metric}\"] canvas').toDataURL()"
  )


def test_the_page_loads_without_complaint_and_draws_its_charts(browser, made):
  browser.open(made)
  assert browser.complaints() == []
  drawn = browser.run("document.querySelectorAll('.chart canvas').length")
  assert drawn == browser.run("document.querySelectorAll('.chart').length") > 8
  assert (
    browser.run("document.querySelectorAll('#scatter circle').length") == 96
  )


def test_a_page_of_twelve_runs_opens_in_a_second(browser, made):
  assert browser.busy_s(lambda: browser.open(made)) < 1


def test_the_table_sorts_by_click_and_by_key(browser, made):
  browser.open(made)

  def order():
    return browser.run(
      "[...document.querySelectorAll('#comparison tbody tr')]"
      ".map(row => row.dataset.group)"
    )

  assert order() == ["rspo", "lambda_0", "paper_literal", "rft"]
  data = json.loads(browser.run("document.getElementById('data').textContent"))
  after = {
    group["name"]: group["summary"]["greedy"]["after"][0]
    for group in data["groups"]
  }
  button = "document.querySelectorAll('#comparison thead button')[3]"
  browser.run(f"{button}.click()")
  assert order() == sorted(after, key=after.get, reverse=True)
  browser.run(f"{button}.focus()")
  browser.key("Enter", text="\r", windowsVirtualKeyCode=13)
  assert order() == sorted(after, key=after.get)
  assert (
    browser.run(
      "document.querySelectorAll('#comparison th')[3].getAttribute('aria-sort')"
    )
    == "ascending"
  )
  # Differences against another group.
  browser.run(
    "{const box = document.getElementById('baseline'); box.value = '1';"
    "box.dispatchEvent(new Event('change'))}"
  )
  head = browser.run("document.querySelector('#comparison thead').innerText")
  assert "against lambda_0" in head.replace("\n", " ")


def test_controls_change_the_curves_and_the_legend_hides_them(browser, made):
  browser.open(made)
  before = ink(browser, "reward/mean")
  for script in (
    "const c = document.getElementById('smoothing'); c.value = '0'",
    "const c = document.getElementById('band'); c.value = 'none'",
    "const c = document.getElementById('axis'); c.value = 'x/forwards'",
  ):
    browser.run(f"{{{script}; c.dispatchEvent(new Event('input'))}}")
    browser.settle()
    after = ink(browser, "reward/mean")
    assert after != before, script
    before = after
  browser.run("document.querySelector('#legend [data-group=rft]').click()")
  browser.settle()
  assert ink(browser, "reward/mean") != before
  label = "document.querySelector('[data-metric=\"reward/mean\"]').ariaLabel"
  assert "rft" not in browser.run(label)
  assert "lambda_0" in browser.run(label)
  assert browser.complaints() == []


def test_a_focused_chart_takes_arrow_keys(browser, made):
  browser.open(made)
  chart = "document.querySelector('[data-metric=\"reward/mean\"]')"
  browser.run(f"{chart}.scrollIntoView(); {chart}.focus()")
  for _ in range(3):
    browser.key("ArrowRight")
  tip = f"{chart}.querySelector('.tip')"
  assert not browser.run(f"{tip}.hidden")
  assert browser.run(f"{tip}.innerText").startswith("step 3")
  assert "rspo" in browser.run(f"{tip}.innerText")
  browser.key("End")
  assert browser.run(f"{tip}.innerText").startswith("step 60")
  browser.key("Escape")
  assert browser.run(f"{tip}.hidden")


def test_completions_are_text_filtered_and_played(browser, made):
  browser.open(made)
  pairs = "document.getElementById('pairs')"
  assert browser.run(f"{pairs}.querySelectorAll('b:not(h3 b)').length") == 0
  assert "*<b>3</script>" in browser.run(f"{pairs}.innerText")
  browser.run(
    "{const box = document.getElementById('samples-change');"
    "box.value = '01'; box.dispatchEvent(new Event('change'))}"
  )
  sides = f"[...{pairs}.querySelectorAll('.side')]"
  assert browser.run(
    f"{sides}.every((side, i) => "
    "side.classList.contains('right') === (i % 2 === 1))"
  )
  player = f"{pairs}.querySelector('.player')"
  browser.run(
    f"{{const slider = {player}.querySelector('input'); slider.value = 2;"
    "slider.dispatchEvent(new Event('input'))}"
  )
  hidden = f"{pairs}.querySelectorAll('.side')[0].innerText"
  pieces = browser.run(
    f"{pairs}.querySelectorAll('.side pre')[0].querySelectorAll('span').length"
  )
  # Two positions are committed, the others still masked.
  assert browser.run(hidden).count("▯") == pieces - 2


def test_one_completion_is_played_forward_by_forward(browser, made):
  browser.open(made)
  stage = "document.querySelector('#denoising .stage')"
  cells = f"[...{stage}.querySelectorAll('.cells > span')]"
  written = f"{cells}.filter(c => !c.classList.contains('hidden-piece'))"
  total = browser.run(f"{cells}.length")
  assert browser.run(f"{written}.length") == total > 3
  for step in (0, 2, total):
    browser.run(
      f"{{const slider = {stage}.querySelector('input'); slider.value = {step};"
      "slider.dispatchEvent(new Event('input'))}"
    )
    # One position a forward, as the samples say; the newest stands out.
    assert browser.run(f"{written}.length") == step
    new = browser.run(f"{stage}.querySelectorAll('.new-piece').length")
    assert new == (0 < step < total)
  figures = browser.run(
    f"{written}.map(c => c.querySelector('small').innerText)"
  )
  assert sorted(map(int, figures)) == list(range(1, total + 1))
  browser.run("document.getElementById('play-all').click()")
  browser.settle()
  assert browser.run(f"{written}.length") < total
  assert browser.run(f"{stage}.querySelector('button').innerText") == "stop"
  assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling_and_colours_follow(
  browser, made, dark
):
  browser.open(made, width=390, height=844, dark=dark)
  assert browser.run("document.documentElement.scrollWidth") <= 390
  assert browser.complaints() == []
  channels = browser.run("getComputedStyle(document.body).backgroundColor")
  brightness = sum(map(int, re.findall(r"\d+", channels)[:3]))
  assert (brightness < 150) == dark


def test_charts_are_drawn_anew_when_the_system_turns_dark(browser, made):
  browser.open(made)
  light = ink(browser, "reward/mean")
  browser.colours(True)
  browser.settle()
  assert ink(browser, "reward/mean") != light


def test_a_single_odd_run_makes_a_page_without_complaint(
  browser, tmp_path, capsys
):
  bare = tmp_path / "run"
  bare.mkdir()
  (bare / "config.json").write_text('{"objective": {"name": "sft"}}')
  (bare / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n')
  out = tmp_path / "report.html"
  assert call(capsys, bare, f"--out={out}")[0] == 0
  browser.open(out)
  assert browser.complaints() == []
  assert browser.run("document.querySelectorAll('.chart canvas').length") >= 1
