"""Reads the TPU compiler's program text: cycles, traffic, collectives.

1. `parse` cuts the text into computations and instructions.
2. `measure` walks what runs from the entry on, loops as often as they turn,
   and adds up the compiler's own cycle estimates, bytes read and written in
   the device's memory, and bytes that collectives put on the wire.

XLA's summary (`cost_analysis`) counts the body of a loop once, so for a scan
over 32 layers it is of no use. The text has no trip counts either: a loop's
bound is the constant in its condition, its step the constant that its body
adds. A bound that is computed on the device has to be told.

Collectives count as what they are on a ring of n devices, each sending in one
direction: gathers and scatters (n-1)/n of the whole array, reductions twice
that, a permutation its array. Of a conditional the dearest branch counts. An
all-reduce that the compiler has fused with the slice of its result is a
reduce-scatter, whatever its name.
"""

import dataclasses
import functools
import math
import re

# Bytes on the wire of n devices for one byte that a device gives.
_SENT = {
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
# Instructions that touch no memory of their own.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "iota",
  "after-all",
  "partition-id",
  "opt-barrier",
  "optimization-barrier",
}

# Bits of an element (none are printed of pred, which takes a byte), sides,
# layout.
_ARRAY = re.compile(r"\b(?:pred|[sufc]|bf)(\d*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^  (ROOT )?%([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name, opcode: as printed.
    kind: the type it yields, as printed.
    operands: names of its arguments.
    attributes: all that follows them.
    literal: what stands between the parentheses.
    is_root: whether it is the computation's result.
  """

  name: str
  opcode: str
  kind: str
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool

  def called(self, key: str) -> str | None:
    """Name of the computation in an attribute such as `body=`."""
    found = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
    return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Wire:
  """Bytes of one kind of collective, a chip and step.

  Attributes:
    bytes: on the wire.
    blocking_bytes: the part that no computation overlaps.
    count: how often one runs.
  """

  bytes: float = 0.0
  blocking_bytes: float = 0.0
  count: float = 0.0


@dataclasses.dataclass
class Measured:
  """What one run of a program does on one chip.

  Attributes:
    cycles: sum of the compiler's estimates.
    moved_bytes: read from and written to the device's memory.
    wire_by_kind: collectives.
    unpriced: instructions without an estimate that may cost something, by
      name of their target (hand-written kernels).
  """

  cycles: float = 0.0
  moved_bytes: float = 0.0
  wire_by_kind: dict[str, Wire] = dataclasses.field(default_factory=dict)
  unpriced: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, other: "Measured", times: float) -> None:
    """Adds what another part of the program does, run `times` times."""
    self.cycles += times * other.cycles
    self.moved_bytes += times * other.moved_bytes
    for name, count in other.unpriced.items():
      self.unpriced[name] = self.unpriced.get(name, 0) + times * count
    for kind, wire in other.wire_by_kind.items():
      mine = self.wire_by_kind.setdefault(kind, Wire())
      mine.bytes += times * wire.bytes
      mine.blocking_bytes += times * wire.blocking_bytes
      mine.count += times * wire.count

  @property
  def wire_bytes(self) -> float:
    """Bytes on the wire of all collectives."""
    return sum(wire.bytes for wire in self.wire_by_kind.values())


def type_bytes(kind: str, fast: bool = True) -> float:
  """Bytes of a printed type, tuples summed.

  Args:
    kind: such as "(f32[8]{0}, bf16[4,2]{1,0:S(1)})".
    fast: whether arrays in on-chip memory, S(1), count.
  """
  return sum(
    int(bits or 8) / 8 * math.prod(int(n) for n in sides.split(",") if n)
    for bits, sides, layout in _ARRAY.findall(kind)
    if fast or "S(1)" not in layout
  )


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """(computations by name, name of the entry) of an optimised program."""
  computations, entry, current, pending = {}, "", None, []

  def flush():
    if pending and current is not None:
      instruction = _instruction("\n".join(pending))
      current[instruction.name] = instruction
    pending.clear()

  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and " = " not in line.split("(")[0]:
      flush()
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line == "}":
      flush()
      current = None
    elif current is not None:
      # The text of a hand-written kernel goes over several lines, some of
      # which begin with braces.
      if _INSTRUCTION.match(line):
        flush()
      elif not pending:
        continue
      pending.append(line)
  return computations, entry


def _instruction(line: str) -> Instruction:
  """One instruction from its text."""
  head = _INSTRUCTION.match(line)
  rest = _COMMENT.sub("", line[head.end() :])
  end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode = rest.partition("(")[0]
  close = _balanced(rest, len(opcode))
  literal = rest[len(opcode) + 1 : close - 1]
  return Instruction(
    name=head[2],
    opcode=opcode.strip(),
    kind=kind,
    operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
    attributes=rest[close:],
    literal=literal,
    is_root=bool(head[1]),
  )


def _balanced(text: str, start: int) -> int:
  """Index behind the parenthesis that closes the one at start."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == "(") - (text[index] == ")")
    if not depth:
      return index + 1
  return len(text)


def group_size(attributes: str, devices: int) -> int:
  """Devices of one group of a collective, in any of the three spellings.

  Args:
    attributes: such as "replica_groups={{0,1},{2,3}}", "replica_groups=
      [2,4]<=[8]" or "replica_groups=mesh['a'=4,'b'=2] {'a'}".
    devices: of the whole program, for an empty list.
  """
  found = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if found:
    return len(found[1].split(","))
  found = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
  if found:
    return int(found[1])
  found = re.search(
    r"replica_groups=@?mesh\w*\[([^\]]*)\] *\{([^}]*)\}", attributes
  )
  if found:
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  return devices


def measure(text: str, devices: int, unknown_trips: int = 1) -> Measured:
  """What one run of a program does on one chip.

  Args:
    text: `compiled.as_text()`.
    devices: of the program.
    unknown_trips: turns of a loop whose bound the device computes.
  """
  computations, entry = parse(text)

  @functools.cache
  def run(name) -> Measured:
    """What one run of a computation does."""
    computation, measured = computations[name], Measured()
    for instruction in computation.values():
      opcode = instruction.opcode
      if opcode == "while":
        turns = trips(computations, computation, instruction)
        turns = unknown_trips if turns is None else turns
        measured.add(run(instruction.called("body")), turns)
      elif opcode == "call":
        measured.add(run(instruction.called("to_apply")), 1)
      elif opcode == "conditional":
        branches = map(run, _branches(instruction))
        measured.add(max(branches, key=lambda branch: branch.cycles), 1)
      else:
        _add_cycles(instruction, measured)
        _add_wire(computations, computation, instruction, devices, measured)
        measured.moved_bytes += _traffic(computations, computation, instruction)
    return measured

  return run(entry)


def _add_cycles(instruction, measured) -> None:
  """Adds the compiler's estimate, or says that there is none."""
  attributes = instruction.attributes
  found = re.search(r'"estimated_cycles":"(\d+)"', attributes)
  if found:
    measured.cycles += int(found[1])
  elif instruction.opcode == "custom-call":
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    if target and target[1] == "tpu_custom_call":
      measured.unpriced[target[1]] = measured.unpriced.get(target[1], 0) + 1


def _branches(instruction) -> list[str]:
  """Computations of a conditional."""
  found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if found:
    return re.findall(r"%([\w.\-]+)", found[1])
  names = ("true_computation", "false_computation")
  return [instruction.called(name) for name in names]


def trips(computations, computation, loop) -> int | None:
  """Turns of a loop: (bound - start) / step; None where it is computed.

  Args:
    computations: all of them, by name.
    computation: the one that holds the loop.
    loop: the `while` instruction.
  """
  condition = computations[loop.called("condition")]
  body = computations[loop.called("body")]
  initial = computation.get(loop.operands[0]) if loop.operands else None
  compare, inner = _comparison(condition), None
  if compare is None:
    # The comparison may have been fused.
    outer = next((i for i in condition.values() if i.called("calls")), None)
    if outer is not None:
      inner = computations[outer.called("calls")]
      compare = _comparison(inner)
  if compare is None:
    return None

  def source(name):
    """An operand of the comparison, seen from the condition."""
    if inner is not None and inner[name].opcode == "parameter":
      return condition[outer.operands[int(inner[name].literal)]]
    return (inner or condition)[name]

  counter, bound = (source(name) for name in compare.operands)
  if counter.opcode == "constant":
    counter, bound = bound, counter
  end = _constant(bound)
  if end is None:
    end = _initial(computation, initial, bound)
  if end is None:
    return None
  start = _initial(computation, initial, counter) or 0
  return max(math.ceil((end - start) / _step(body, counter)), 0)


def _comparison(computation) -> Instruction | None:
  """The comparison of a loop's condition."""
  return next((i for i in computation.values() if i.opcode == "compare"), None)


def _index(instruction) -> int | None:
  """i of get-tuple-element(..), index=i."""
  found = re.search(r"\bindex=(\d+)", instruction.attributes)
  return int(found[1]) if found else None


def _constant(instruction) -> int | None:
  """Value of an integer constant."""
  if instruction is None or instruction.opcode != "constant":
    return None
  digits = instruction.literal.lstrip("-").isdigit()
  return int(instruction.literal) if digits else None


def _initial(computation, initial, element) -> int | None:
  """Value with which an element of a loop's state begins, if constant."""
  index = _index(element)
  if index is None or initial is None or initial.opcode != "tuple":
    return None
  first = computation.get(initial.operands[index])
  while first is not None and first.opcode in ("copy", "bitcast"):
    first = computation.get(first.operands[0])
  return _constant(first)


def _step(body, counter) -> int:
  """What the body of a loop adds to its counter."""
  index = _index(counter)
  root = next(i for i in body.values() if i.is_root)
  if index is None or root.opcode != "tuple":
    return 1
  changed = body.get(root.operands[index])
  if changed is None or changed.opcode != "add":
    return 1
  for name in changed.operands:
    value = _constant(body.get(name))
    if value:
      return value
  return 1


def _add_wire(computations, computation, instruction, devices, measured):
  """Adds what an instruction sends over the wire."""
  base = instruction.opcode.removesuffix("-start")
  if base in _SENT:
    overlaps = base != instruction.opcode
    _add_collective(measured, base, computation, instruction, devices, overlaps)
    return
  called = instruction.called("calls") or ""
  inner = computations.get(called, {})
  pieces = [i for i in inner.values() if i.opcode in _SENT]
  # An overlapped collective is printed in the fusion that starts it, in those
  # that compute meanwhile and in the one that waits for it: the first counts.
  targets = "".join(i.attributes for i in inner.values())
  starts = '"AsyncCollectiveStart"' in targets
  waits = '"AsyncCollectiveDone"' in targets
  if not starts and (waits or called.startswith("async_collective")):
    return
  overlaps = starts or instruction.opcode == "async-start"
  sliced = any(i.opcode == "dynamic-slice" for i in inner.values())
  for piece in pieces:
    scatters = piece.opcode == "all-reduce" and sliced
    kind = "reduce-scatter" if scatters else piece.opcode
    _add_collective(measured, kind, inner, piece, devices, overlaps)


def _add_collective(
  measured, kind, computation, instruction, devices, overlaps
):
  """Adds one collective."""
  n = group_size(instruction.attributes, devices)
  if kind != "collective-permute" and n == 1:
    return
  given = _operand_bytes(computation, instruction)
  sent = given * _SENT[kind](n)
  wire = measured.wire_by_kind.setdefault(kind, Wire())
  wire.bytes += sent
  wire.blocking_bytes += 0.0 if overlaps else sent
  wire.count += 1


def _operand_bytes(computation, instruction, fast: bool = True) -> float:
  """Bytes of all operands of an instruction."""
  names = (name for name in instruction.operands if name in computation)
  return sum(type_bytes(computation[name].kind, fast) for name in names)


def _traffic(computations, computation, instruction) -> float:
  """Bytes that an instruction reads and writes in the device's memory.

  Of an operand that a fusion only slices, the slices; of a result that is an
  operand updated in place, the update.
  """
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done"):
    return 0.0
  if opcode in ("copy-start", "slice-start"):
    # A transfer into or out of on-chip memory; its type repeats the source.
    target = _ARRAY.search(instruction.kind)
    return type_bytes(target[0]) if target else 0.0
  inner = computations.get(instruction.called("calls") or "", {})
  if not inner:
    if opcode in ("dynamic-slice", "slice"):
      return 2 * type_bytes(instruction.kind, False)
    read = _operand_bytes(computation, instruction, fast=False)
    return read + type_bytes(instruction.kind, False)
  total, in_place = 0.0, set()
  root = next((i for i in inner.values() if i.is_root), None)
  if root is not None and root.opcode == "dynamic-update-slice":
    target, update = (inner.get(name) for name in root.operands[:2])
    total += type_bytes(update.kind, False) if update else 0.0
    in_place.add(target.name if target else "")
  else:
    total += type_bytes(instruction.kind, False)
  for piece in inner.values():
    if piece.opcode != "parameter" or piece.name in in_place:
      continue
    outer = computation.get(instruction.operands[int(piece.literal)])
    if outer is None or not type_bytes(outer.kind, False):
      continue
    users = [i for i in inner.values() if piece.name in i.operands]
    sliced = users and all(
      i.opcode == "dynamic-slice" and i.operands[0] == piece.name for i in users
    )
    if sliced:
      total += sum(type_bytes(i.kind) for i in users)
    else:
      total += type_bytes(outer.kind, False)
  return total
