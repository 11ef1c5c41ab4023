"""FLOPs that are counted against hand counts."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rspo_jax.planning import flops

X, W, ONE = (3, 4), (4, 4), 2 * 3 * 4 * 4  # x @ w costs one


def executed(fn, *shapes, **options):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops.executed(jax.jit(fn).trace(*arrays).jaxpr, **options)


def test_a_matmul_costs_two_flops_a_multiply_add():
  assert executed(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  batched = lambda a, b: jnp.einsum("nij,nkj->nik", a, b)  # noqa: E731
  assert executed(batched, (4, 3, 5), (4, 6, 5)) == 2 * 4 * 3 * 5 * 6


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

  assert executed(scanned, X, W) == 11 * ONE
  assert executed(counted, X, W) == 6 * ONE
  assert executed(told, X, W, unknown_trips=5) == 5 * ONE


def test_recomputation_is_executed_and_a_branch_costs_its_dearest():
  def loss(w, x):
    layer = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))
    return layer(x).sum()

  # Two products forward, the two again to differentiate, four backward; the
  # gradient of x is not asked for, so one product of those is not there.
  both = jax.value_and_grad(loss)
  assert executed(both, W, X) == (2 + 2 + 3) * ONE
  # Where only the gradient is asked for, the first two are for nothing.
  assert executed(jax.grad(loss), W, X) == (2 + 3) * ONE

  def branch(x, w):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

  assert executed(branch, X, W) == 2 * ONE


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
  assert executed(summed, X, W, unknown_trips=5) == 5 * ONE


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
