"""Plans: counts against hand counts, refusals before any compilation."""

import dataclasses
import importlib.util
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rspo_jax.algorithm import scoring
from rspo_jax.devices import sharding
from rspo_jax.models import adapters, lora
from rspo_jax.planning import (
  chips,
  command,
  compiler,
  flops,
  hlo,
  planner,
  prices,
  programs,
  table,
  workload,
)
from rspo_jax.run import program, settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNTDOWN = f"{ROOT}/configs/countdown.py"

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is not installed: pip install libtpu",
)


def forbidden(*_, **__):
  """Stands where nothing may be compiled."""
  raise AssertionError("the compiler was asked")


# --- FLOPs ------------------------------------------------------------------


def executed(fn, *shapes, **options):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops.executed(jax.jit(fn).trace(*arrays).jaxpr, **options)


def test_a_matmul_costs_two_flops_a_multiply_add():
  assert executed(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  batched = executed(
    lambda a, b: jnp.einsum("nij,nkj->nik", a, b), (4, 3, 5), (4, 6, 5)
  )
  assert batched == 2 * 4 * 3 * 5 * 6


def test_a_loop_costs_its_body_as_often_as_it_turns():
  def scanned(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=11)[0]

  def counted(x, w):
    return jax.lax.while_loop(
      lambda c: (c[0] < 6) & (c[1].sum() > 0),
      lambda c: (c[0] + 1, c[1] @ w),
      (0, x),
    )[1]

  def told(x, w):
    turns = jnp.int32(x.sum())
    return jax.lax.fori_loop(0, turns, lambda _, c: c @ w, x)

  one = 2 * 3 * 4 * 4
  assert executed(scanned, (3, 4), (4, 4)) == 11 * one
  assert executed(counted, (3, 4), (4, 4)) == 6 * one
  assert executed(told, (3, 4), (4, 4), unknown_trips=5) == 5 * one


def test_recomputation_is_executed_and_a_branch_costs_its_dearest():
  def loss(w, x):
    layer = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))
    return layer(x).sum()

  # Two products forward, the two again to differentiate, four backward; the
  # gradient of x is not asked for, so one product of those is not there.
  one = 2 * 3 * 4 * 4
  both = jax.value_and_grad(loss)
  assert executed(both, (4, 4), (3, 4)) == (2 + 2 + 3) * one
  # Where only the gradient is asked for, the first two are for nothing.
  assert executed(jax.grad(loss), (4, 4), (3, 4)) == (2 + 3) * one

  def branch(x, w):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

  assert executed(branch, (3, 4), (4, 4)) == 2 * one


def test_what_no_result_depends_on_costs_nothing():
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (g @ kept[1].T, kept[0].T @ g),
  )

  def summed(x, w):
    turns = jnp.int32(x.sum())  # a loop that cannot be unrolled
    gradient = jax.grad(lambda x: product(x, w).sum())
    return jax.lax.fori_loop(0, turns, lambda _, x: gradient(x), x)

  # Forward is not needed for the gradient of a sum, w's gradient by nobody.
  one = 2 * 3 * 4 * 4
  assert executed(summed, (3, 4), (4, 4), unknown_trips=5) == 5 * one


def test_what_runs_on_each_device_counts_on_all():
  mesh = jax.sharding.AbstractMesh((4,), ("data",))
  rows = PartitionSpec("data")
  fn = jax.shard_map(
    lambda a, b: a @ b,
    mesh=mesh,
    in_specs=(rows, PartitionSpec()),
    out_specs=rows,
  )
  assert executed(fn, (8, 5), (5, 7)) == 2 * 8 * 5 * 7


# --- The program's text -----------------------------------------------------

TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%unary (u: f32[8,8]) -> f32[8,8] {
  %u = f32[8,8]{1,0} parameter(0)
  ROOT %square = f32[8,8]{1,0} multiply(%u, %u)
}

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[8,128]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = f32[2,128]{1,0:T(2,128)} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={2,128}
}

%starts (q: bf16[16,4]) -> (bf16[16,4], bf16[32,4]) {
  %q = bf16[16,4]{1,0} parameter(0)
  %all-gather.1 = bf16[32,4]{1,0} all-gather(%q), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[16,4]{1,0}, bf16[32,4]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (q.1: bf16[16,4], r.1: f32[8,8]) -> f32[8,8] {
  %q.1 = bf16[16,4]{1,0} parameter(0)
  %r.1 = f32[8,8]{1,0} parameter(1)
  %all-gather.2 = bf16[32,4]{1,0} all-gather(%q.1), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %dot.1 = f32[8,8]{1,0} multiply(%r.1, %r.1)
}

%waits (q.2: bf16[16,4]) -> bf16[32,4] {
  %q.2 = bf16[16,4]{1,0} parameter(0)
  %all-gather.3 = bf16[32,4]{1,0} all-gather(%q.2), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %custom-call.2 = bf16[32,4]{1,0} custom-call(%q.2, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%sliced (s.0: f32[32,8,128], s.1: s32[]) -> f32[1,8,128] {
  %s.0 = f32[32,8,128]{2,1,0} parameter(0)
  %s.1 = s32[] parameter(1)
  ROOT %dynamic-slice.2 = f32[1,8,128]{2,1,0} dynamic-slice(%s.0, %s.1), dynamic_slice_sizes={1,8,128}
}

%inner_condition (i: (s32[], f32[8,8])) -> pred[] {
  %i = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.0 = s32[] get-tuple-element(%i), index=0
  %bound = s32[] constant(8)
  ROOT %lt = pred[] compare(%i.0, %bound), direction=LT
}

%inner_body (j: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %j = (s32[], f32[8,8]{1,0}) parameter(0)
  %j.0 = s32[] get-tuple-element(%j), index=0
  %j.1 = f32[8,8]{1,0} get-tuple-element(%j), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j.0, %two)
  %work = f32[8,8]{1,0} fusion(%j.1), kind=kLoop, calls=%unary, backend_config={"window_config":{"estimated_cycles":"100"}}
  %permuted = f32[8,8]{1,0} collective-permute(%work), channel_id=1, source_target_pairs={{0,1}}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %permuted)
}

%outer_condition (k: (s32[], f32[8,8], s32[])) -> pred[] {
  %k = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %k.0 = s32[] get-tuple-element(%k), index=0
  %k.2 = s32[] get-tuple-element(%k), index=2
  ROOT %lt.1 = pred[] compare(%k.0, %k.2), direction=LT
}

%outer_body (l: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %l = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %l.0 = s32[] get-tuple-element(%l), index=0
  %l.1 = f32[8,8]{1,0} get-tuple-element(%l), index=1
  %l.2 = s32[] get-tuple-element(%l), index=2
  %one = s32[] constant(1)
  %l.3 = s32[] add(%l.0, %one)
  %start = s32[] constant(2)
  %state = (s32[], f32[8,8]{1,0}) tuple(%start, %l.1)
  %while.1 = (s32[], f32[8,8]{1,0}) while(%state), condition=%inner_condition, body=%inner_body
  %w = f32[8,8]{1,0} get-tuple-element(%while.1), index=1
  ROOT %out.1 = (s32[], f32[8,8]{1,0}, s32[]) tuple(%l.3, %w, %l.2)
}

%cheap (c.0: f32[8,8]) -> f32[8,8] {
  %c.0 = f32[8,8]{1,0} parameter(0)
  ROOT %c.1 = f32[8,8]{1,0} fusion(%c.0), kind=kLoop, calls=%unary, backend_config={"window_config":{"estimated_cycles":"1"}}
}

%dear (d.0: f32[8,8]) -> f32[8,8] {
  %d.0 = f32[8,8]{1,0} parameter(0)
  ROOT %d.1 = f32[8,8]{1,0} fusion(%d.0), kind=kLoop, calls=%unary, backend_config={"window_config":{"estimated_cycles":"40"}}
}

ENTRY %main (a: f32[8,128], b: bf16[16,4], c: f32[8,8], /*index=3*/d: s32[], e: pred[]) -> f32[8,8] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %c = f32[8,8]{1,0} parameter(2)
  %d = s32[] parameter(3)
  %e = pred[] parameter(4)
  %reduced = f32[2,128]{1,0:T(2,128)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%c), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  %async-start = (bf16[16,4]{1,0}, bf16[32,4]{1,0}) fusion(%b), kind=kCustom, calls=%starts
  %meanwhile = f32[8,8]{1,0} fusion(%b, %c), kind=kOutput, calls=%async_collective_fusion.7, backend_config={"window_config":{"estimated_cycles":"7"}}
  %async-done = bf16[32,4]{1,0} fusion(%b), kind=kCustom, calls=%waits
  %kernel = f32[8,8]{1,0} custom-call(%c), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"body": "
}} ROOT %not_an_instruction
}}"}
  %zero.1 = s32[] constant(0)
  %state.1 = (s32[], f32[8,8]{1,0}, s32[]) tuple(%zero.1, %kernel, %d)
  %while.2 = (s32[], f32[8,8]{1,0}, s32[]) while(%state.1), condition=%outer_condition, body=%outer_body
  %got = f32[8,8]{1,0} get-tuple-element(%while.2), index=1
  ROOT %chosen = f32[8,8]{1,0} conditional(%e, %got, %got), branch_computations={%cheap, %dear}
}
"""


def test_loops_of_the_programs_text_turn_as_often_as_they_run():
  # The inner loop goes 2, 4, 6; the outer one's bound is an argument.
  measured = hlo.measure(TEXT, 8, unknown_trips=5)
  assert measured.cycles == 7 + 5 * 3 * 100 + 40
  assert measured.unpriced == {"tpu_custom_call": 1.0}


def test_collectives_count_once_and_as_what_they_are():
  wires = hlo.measure(TEXT, 8, unknown_trips=5).wire_by_kind
  found = {k: (w.bytes, w.blocking_bytes, w.count) for k, w in wires.items()}
  scattered = 8 * 128 * 4 * 3 / 4
  reduced = 2 * 8 * 8 * 4 * 3 / 4
  gathered = 16 * 4 * 2 * 1
  permuted = 5 * 3 * 8 * 8 * 4
  assert found == {
    "reduce-scatter": (scattered, scattered, 1),
    "all-reduce": (reduced, reduced, 1),
    "all-gather": (gathered, 0, 1),
    "collective-permute": (permuted, permuted, 15),
  }


def test_a_fusion_that_slices_reads_the_slice():
  computations, _ = hlo.parse(TEXT)
  outer = {
    "stack": hlo.Instruction(
      "stack", "parameter", "f32[32,8,128]", (), "", "0", False
    ),
    "i": hlo.Instruction("i", "parameter", "s32[]", (), "", "1", False),
  }
  fusion = hlo.Instruction(
    "f", "fusion", "f32[1,8,128]", ("stack", "i"), ", calls=%sliced", "", False
  )
  moved = hlo._traffic(computations, outer, fusion)
  assert moved == 2 * 8 * 128 * 4 + 4


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("replica_groups={{0,1},{2,3}}", 2),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
    ("replica_groups={}", 8),
  ],
)
def test_groups_of_a_collective_are_read_in_every_spelling(groups, size):
  assert hlo.group_size(f", channel_id=1, {groups}, x=1", 8) == size


# --- Slices and seconds -----------------------------------------------------


def test_a_slice_is_named_with_its_sides_in_any_order():
  assert chips.parse("v5e:4x2") == chips.parse("v5e:2x4")
  assert chips.parse("v5p:1x2x2").name == "v5p:2x2x1"
  assert chips.parse("v6e:2x4").devices == 8


@pytest.mark.parametrize(
  ("text", "near"),
  [
    ("v5e:3x3", "v5e:2x4"),
    ("v5e:2x2x1", "v5e:2x2"),
    ("v5:2x2", "v5e:2x2"),
    ("v6:2x4", "v6e:2x4"),
    ("v5e", "v5e:2x2"),
    ("v5e:two", "v5e:2x2"),
    ("tpu9:2x2", "v5e"),
  ],
)
def test_a_slice_that_is_not_sold_is_refused_with_one_that_is(text, near):
  with pytest.raises(ValueError, match=near):
    chips.parse(text)


def test_the_compilers_refusal_says_how_much_was_needed():
  text = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    "the total memory required for HLO temporaries (21.95G) exceeds available "
    "HBM (15.75G)."
  )
  assert compiler.out_of_memory(text) == int(21.95 * 2**30)
  assert compiler.out_of_memory("INTERNAL: something else") is None


def described(useful, **resident):
  resident = {"weights": 2e9, "moments": 3e9, "reference": 4e9} | resident
  call = programs.Call(
    function=None,
    arguments=(),
    uses=("weights", "moments"),
    runs=1,
    trips=1,
    useful=useful,
    temporaries={"gradients": 1e9},
  )
  mesh = types.SimpleNamespace(size=4)
  program = types.SimpleNamespace(mesh=mesh)
  return programs.Described(program, {"update": call}, resident, useful)


def result(**changes):
  measured = hlo.Measured(
    cycles=3e9,
    moved_bytes=8e9,
    wire_by_kind={
      "all-gather": hlo.Wire(90e9, 0.0, 4),
      "all-reduce": hlo.Wire(45e9, 45e9, 2),
    },
  )
  measured = dataclasses.replace(measured, **changes)
  memory = dict(
    arguments=5_100_000_000,
    temporaries=2_500_000_000,
    outputs=5_000_000_000,
    aliased=5_000_000_000,
    code=0,
  )
  return {
    "memory": memory,
    "needed_bytes": 7_600_000_000,
    "flops": 4 * 1.5e14,
    "measured": dataclasses.asdict(measured),
    "compile_s": 1.0,
  }


def test_seconds_are_read_three_ways_and_mfu_counts_useful_flops():
  v5e = chips.parse("v5e:2x2")
  row = prices.price(described(4 * 1.2e14), v5e, "update", "full", result())
  compute, wire, blocking = 3e9 / v5e.chip.clock_hz, 1.5, 0.5
  expected = {
    "overlap": max(compute, wire),
    "sync": compute + blocking,
    "serial": compute + wire,
  }
  for name, seconds in expected.items():
    assert row["readings"][name]["seconds"] == pytest.approx(seconds)
    assert row["readings"][name]["mfu"] == pytest.approx(
      1.2e14 / 197e12 / seconds
    )
  assert row["seconds"] == row["readings"]["sync"]["seconds"]
  assert row["flops"] == 1.5e14 and row["collective_gb"] == 135


def test_a_program_fits_with_what_stays_beside_it():
  v5e = chips.parse("v5e:2x2")
  row = prices.price(described(1.0), v5e, "update", "full", result())
  assert row["hbm_gb"] == 7.6 and row["resident_gb"] == 4.0 and row["fits"]
  assert row["filled_by_gb"]["gradients"] == 1.0
  assert sum(row["filled_by_gb"].values()) == pytest.approx(7.6)
  crowded = described(1.0, other=1e10)
  assert not prices.price(crowded, v5e, "update", "full", result())["fits"]


@pytest.mark.parametrize(
  ("level", "changes"),
  [
    ("quick", {}),
    # Fewer cycles than the matmuls need at peak cannot be the whole program.
    ("full", {"cycles": 1e9}),
    ("full", {"unpriced": {"tpu_custom_call": 2.0}}),
  ],
)
def test_seconds_that_the_compiler_does_not_give_are_null(level, changes):
  row = prices.price(
    described(1.0), chips.parse("v5e:2x2"), "update", level, result(**changes)
  )
  assert row["seconds"] is None and row["mfu"] is None and row["notes"]
  assert row["collective_gb"] == 135


# --- The command ------------------------------------------------------------


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--topology=v5e:3x3", "v5e:2x4"),
    ("--topology=gpu:big", "gpu:80"),
    ("--topology=v5e:2x2 --sequences=none", "--sequences=none"),
    ("--topology=v5e:2x2 --sequence=4", "--sequences"),
    ("--topology=v5e:2x2 --sequences=30", "--sequences=32"),
    ("--topology=v5e:2x2 --masks=3", "use 2"),
    (
      "--topology=v5e:2x2 --sequences=64 --micro_batches=5",
      "--micro_batches=4",
    ),
    ("--topology=v5e:2x2 --config.mesh.fsdp=3", "mesh.fsdp=-1"),
    ("--topology=v5e:2x2 --config.mesh.tensor=2", "mesh.tensor=1"),
    ("--topology=v5e:2x4 --config.mesh.fsp=2", "mesh.fsdp"),
    ("", "--topology"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(
  words, message, monkeypatch, capsys
):
  monkeypatch.setattr(compiler, "topology_devices", forbidden)
  monkeypatch.setattr(compiler, "compile_call", forbidden)
  argv = [f"--config={COUNTDOWN}", *words.split()]
  assert command.main(argv) == command.MISTAKE
  error = capsys.readouterr().err
  assert message in error and error.startswith("error: ")


@needs_compiler
def test_a_small_run_is_planned_and_its_plan_is_kept(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  argv = [f"--config={COUNTDOWN}", "--topology=v5e:2x2", "--quick", "--json"]
  argv += ["--sequences=32", "--masks=2", "--micro_batches=2"]
  argv += ["--config.model.head_chunks=1"]
  assert command.main(argv) == command.FITS
  first = capsys.readouterr().out
  made = json.loads(first)
  assert made["fits"] and made["micro_batches"] == 2 and made["chips"] == 4
  wanted = {"hbm_gb", "resident_gb", "capacity_gb", "flops"}
  wanted |= {"collective_gb", "seconds", "mfu"}
  for name in ("update", "rollout"):
    row = made["programs"][name]
    assert wanted <= row.keys()
    assert 0 < row["hbm_gb"] + row["resident_gb"] < row["capacity_gb"]
    assert row["seconds"] is None  # not without optimisation
  rollout = made["programs"]["rollout"]
  assert rollout["flops"] == rollout["useful_flops"]
  # The same question again is answered from the cache, to the bit.
  monkeypatch.setattr(compiler, "compile_call", forbidden)
  assert command.main(argv) == command.FITS
  assert capsys.readouterr().out == first
  assert "v5e:2x2: fits" in table.render(made)
  # Other memory, other answer: the cache tells the two apart.
  with pytest.raises(AssertionError):
    command.main([*argv, "--config.model.remat=True"])


@pytest.fixture
def estimated(capsys):
  """The estimate for one GPU of a small run, by the words of its command."""

  def plan(arg, *words):
    argv = [f"--config={COUNTDOWN}{arg}", "--topology=gpu:80", "--json"]
    argv += ["--sequences=32", "--prompt=24", "--completion=8", *words]
    assert command.main(argv) == command.FITS
    return json.loads(capsys.readouterr().out)

  return plan


def test_a_rollout_that_waits_for_its_step_is_held_and_scored(estimated):
  before = estimated(":gdpo")
  after = estimated(":gdpo", "--config.rollout.stale_steps=1")
  held = after["resident_by_name_gb"].pop("rollout ahead")
  # Tokens and their mask, order and end of completions, two counts, 3 values.
  expected = 32 * (32 * 5 + 8 * 5 + 3 * 4) + 8
  assert held * chips.GB == pytest.approx(expected)
  assert after["resident_by_name_gb"] == before["resident_by_name_gb"]
  assert "scores" not in before["programs"]
  assert after["programs"]["scores"]["runs"] == 1
  beside = [p["programs"]["update"]["resident_gb"] for p in (before, after)]
  assert beside[1] - beside[0] == pytest.approx(held, rel=1e-3)


def test_a_ratio_under_an_adapter_costs_the_policys_scores_alone(estimated):
  words = ["--config.train.updates_per_rollout=2", "--config.train.passes=one"]
  whole = estimated(":gdpo", *words)["programs"]["scores"]
  words += ["--config.lora.rank=4", "--config.objective.kl_weight=0.1"]
  # The update scores the reference itself, so that the loop asks for the
  # policy's scores only: before the first update, for both of them.
  scores = estimated(":gdpo", *words)["programs"]["scores"]
  assert scores["runs"] == whole["runs"] == 2
  assert scores["useful_flops"] == whole["useful_flops"]
  # A pass through the same weights, and a little for the adapter.
  assert 1 < scores["flops"] / whole["flops"] < 1.5


def test_an_adapter_that_a_run_starts_from_is_planned_as_one(
  estimated, tmp_path
):
  asked = estimated("", "--config.lora.rank=4")
  options = workload.Options(COUNTDOWN, {}, "gpu:80")
  config, _ = workload.configure(options, 1)
  model = programs.model_config(settings.build(config, 1, planning=True))
  found = lora.LoraSettings(4, 8.0, lora.PROJECTIONS)
  start = lora.init(model, found, jax.random.key(0))
  adapters.save_adapter(tmp_path, model, found, start, base="tiny")
  given = estimated(
    "", "--config.lora.rank=0", f"--config.lora.path={tmp_path}"
  )
  held, new = given["resident_by_name_gb"], asked["resident_by_name_gb"]
  assert held["adapter"] == new["adapter"] and held["moments"] == new["moments"]
  # The reference keeps the adapter that the run started from.
  more = held["frozen weights"] - new["frozen weights"]
  assert more == pytest.approx(held["adapter"])


@pytest.mark.parametrize("ratio", ["", "updates", "sampler"])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("shared_base", [False, True])
@pytest.mark.parametrize("updates", [1, 3])
def test_calls_outside_the_updates_cost_all_that_the_loop_scores_there(
  ratio, two_passes, shared_base, updates
):
  scores = scoring.ScorePlan(
    updates=updates,
    masks=4,
    uses_reference=True,
    ratio=ratio,
    two_passes=two_passes,
    shared_base=shared_base,
    early=True,
  )
  forwards = updates * (ratio == "sampler")
  for update in range(updates):
    needed = scores.before(update)
    forwards += needed.reference + needed.policy + scores.policy_again(update)
  each = 2 if scores.before(0).together else 1
  assert scores.calls == -(-forwards // each)


def test_runs_that_differ_in_a_programs_shapes_share_no_answer(monkeypatch):
  monkeypatch.setattr(compiler.importlib.metadata, "version", str)

  def digest(**changes):
    options = workload.Options(COUNTDOWN, {}, "v5e:1x1", **changes)
    config, _ = workload.configure(options, 1)
    built = settings.build(config, 1, planning=True)
    made = types.SimpleNamespace(
      settings=built, model=types.SimpleNamespace(config=None), lora=None
    )
    return compiler.digest(made, chips.parse("v5e:1x1"), "update", "full")

  changes = [{}, {"prompt": 48}, {"completion": 24}, {"masks": 8}]
  assert len({digest(**each) for each in changes}) == len(changes)
  assert digest() == digest()


def test_a_run_on_a_tpu_gives_the_compiler_the_plans_option_and_no_other_does():
  def mesh(platform):
    devices = np.array([[[types.SimpleNamespace(platform=platform)]]])
    return types.SimpleNamespace(devices=devices)

  assert "windowed_einsum" in "".join(program.compiler_options(mesh("tpu")))
  assert program.compiler_options(mesh("cpu")) == {}
  assert program.compiler_options(mesh("gpu")) == {}


def test_bytes_of_a_chip_are_those_of_its_shard():
  mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
  where = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp", None))
  tree = {
    "a": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=where),
    "b": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=where),
  }
  assert programs.chip_bytes(tree) == 2 * 6 * 2 + 1 * 3 * 4


# --- The real one -----------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", ["v5e:2x2", "v5e:4x4"])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_scattered_sum_stays_one_in_the_compilers_hands(name, dimension):
  devices = compiler.topology_devices(chips.parse(name))
  mesh = sharding.make_mesh(devices=devices)
  rows = PartitionSpec("fsdp", None)

  def gradient(x, cotangent):
    partial = jax.lax.dot_general(x, cotangent, (((0,), (0,)), ((), ())))
    return sharding.sum_scatter(partial, "fsdp", dimension)

  fn = jax.shard_map(
    gradient,
    mesh=mesh,
    in_specs=(rows, rows),
    out_specs=PartitionSpec(
      *(("fsdp", None) if dimension == 0 else (None, "fsdp"))
    ),
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct(
    (512 * mesh.size, 2048),
    jnp.bfloat16,
    sharding=jax.sharding.NamedSharding(mesh, rows),
  )
  traced = jax.jit(fn).trace(x, x)
  compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  wires = hlo.measure(compiled.as_text(), mesh.size).wire_by_kind
  # A ring's count, in bfloat16, whatever the number of stages; the compiler pads.
  by_hand = 2 * 2048**2 * (mesh.size - 1) / mesh.size
  assert wires["reduce-scatter"].bytes == pytest.approx(by_hand, rel=0.05)
  assert "all-reduce" not in wires


@needs_compiler
def test_llada_8b_with_adapters_compiles_and_fits_on_four_v5e_chips():
  options = workload.Options(
    config=f"{COUNTDOWN}:llada_8b",
    overrides={},
    topology="v5e:2x2",
    sequences=64,
    masks=2,
    prompt=256,
    completion=256,
    micro_batches=4,
    quick=True,
    no_cache=True,
  )
  made = planner.make_plan(options, chips.parse("v5e:2x2"), ("update",))
  update = made["programs"]["update"]
  assert made["passes"] == "one" and made["fits"]
  assert update["hbm_gb"] <= 7.6
  assert update["compile_s"] <= 90  # of CPU time
  # Every micro-batch gathers the layers' kernels twice, three quarters of them
  # from other chips; policy and reference share a gather.
  layers = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
  by_hand = 4 * 2 * 2 * layers * 3 / 4 / 1e9
  assert update["collectives"]["all-gather"]["gb"] == pytest.approx(
    by_hand, rel=0.1
  )
  # The adapter's gradients are scattered, not summed on every chip.
  assert update["collectives"].get("all-reduce", {"gb": 0})["gb"] < 0.05
