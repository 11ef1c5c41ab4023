"""The compiler's program text: loops, collectives and traffic by hand."""

import pytest

from rspo_jax.planning import hlo

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
  lines = (
    "  %stack = f32[32,8,128] parameter(0)",
    "  %i = s32[] parameter(1)",
    "  %f = f32[1,8,128] fusion(%stack, %i), calls=%sliced",
  )
  outer = {made.name: made for made in map(hlo._instruction, lines)}
  moved = hlo._traffic(computations, outer, outer["f"])
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
