"""TPU chips and the slices they are sold in, as plans need them.

1. `Chip`: what one device of a kind has: bytes of memory as the compiler
   counts them, peak FLOP/s, clock, wire speed.
2. `parse` reads "v5e:2x4" and refuses what is not sold, with the nearest name.
3. `larger` and `slices` walk the slices in order of size.

Sources. Memory: the capacity that the TPU compiler names when it refuses a
program (libtpu 0.0.52). Peak: the vendor's bfloat16 figure. Clock: peak over
the FLOPs of a cycle, matrix units x side^2 x 2; the compiler's own seconds for
a loop-free matmul imply a clock 1 to 10 % lower. Wire: one-way bytes a second
of a chip over the links of one ring in each dimension but the last, an
assumption from public descriptions, tried on no machine.
"""

import dataclasses
import math

from rspo_jax.config.names import nearest

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a slice.

  Attributes:
    kind: the name in front of the colon.
    memory_bytes: what a program may use.
    peak_flops: bfloat16 FLOP/s.
    cycle_flops: bfloat16 FLOPs of one cycle.
    wire_bytes_per_s: one-way, over all links that a collective uses.
    slices: shapes on offer, smallest first.
  """

  kind: str
  memory_bytes: int
  peak_flops: float
  cycle_flops: int
  wire_bytes_per_s: float
  slices: tuple[str, ...]

  @property
  def clock_hz(self) -> float:
    """Cycles a second of the compiler's estimates."""
    return self.peak_flops / self.cycle_flops


_FLAT = ("1x1", "1x2", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x1x1", "2x2x1", "2x2x2")
_DEEP += ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
  chip.kind: chip
  for chip in (
    Chip("v5e", int(15.75 * GIB), 197e12, 4 * 128**2 * 2, 9e10, _FLAT),
    Chip("v6e", int(31.24 * GIB), 918e12, 4 * 256**2 * 2, 1.8e11, _FLAT),
    Chip("v5p", int(95.73 * GIB), 459e12, 8 * 128**2 * 2, 2.7e11, _DEEP),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice: its chip, its shape, its number of devices."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    """As the command line and the compiler call it."""
    return f"{self.chip.kind}:{'x'.join(map(str, self.shape))}"

  @property
  def devices(self) -> int:
    """Chips of the slice."""
    return math.prod(self.shape)


def slices(kind: str = "") -> list[Topology]:
  """All slices, of one kind where it is given, smallest first."""
  chosen = [CHIPS[kind]] if kind else CHIPS.values()
  return [
    Topology(chip, _shape(name)) for chip in chosen for name in chip.slices
  ]


def parse(text: str) -> Topology:
  """Reads KIND:AxB or KIND:AxBxC; the order of the sides does not matter.

  Raises:
    ValueError: a slice that is not on offer, with the nearest ones.
  """
  kind, _, sides = text.strip().lower().partition(":")
  if kind not in CHIPS:
    near = nearest(kind, CHIPS, 0.3) or list(CHIPS)
    sold = [k for k in near if sides in CHIPS[k].slices]
    hint = (
      f"{sold[0]}:{sides}" if sold else f"{near[0]}:{CHIPS[near[0]].slices[2]}"
    )
    raise ValueError(
      f"--topology={text}: {kind!r} is no kind of TPU that can be planned "
      f"({', '.join(CHIPS)}), nor gpu:GB; try --topology={hint}."
    )
  chip = CHIPS[kind]
  try:
    shape = _shape(sides)
  except ValueError:
    shape = ()
  for known in slices(kind):
    if sorted(known.shape) == sorted(shape):
      return known
  every = ", ".join(f"{kind}:{name}" for name in chip.slices)
  near = f"near it: {_nearest(chip, shape)}; all:" if shape else "there are"
  raise ValueError(f"--topology={text} is no slice of {kind}; {near} {every}.")


def larger(topology: Topology) -> list[Topology]:
  """Slices of the same kind with more devices, smallest first."""
  every = slices(topology.chip.kind)
  return [other for other in every if other.devices > topology.devices]


def _shape(text: str) -> tuple[int, ...]:
  """ "2x4" -> (2, 4)."""
  return tuple(int(side) for side in text.split("x"))


def _nearest(chip: Chip, shape: tuple[int, ...]) -> str:
  """The slice of a kind whose number of devices is nearest."""
  wanted = max(math.prod(shape), 1)

  def distance(name):
    return abs(math.log(math.prod(_shape(name)) / wanted))

  return f"{chip.kind}:{min(chip.slices, key=distance)}"
