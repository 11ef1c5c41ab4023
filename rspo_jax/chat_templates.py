"""What a checkpoint's chat template makes of messages.

A template is a program that comes with the weights and runs anew for every
prompt. It gets

1. the names that `transformers` 5 gives it (`utils/chat_template_utils.py`),
   set even where they are empty: a template asks `tools is not none`, which an
   unset name would answer with yes;
2. jinja2's immutable sandbox, in which it reaches neither Python nor the
   messages of its caller;
3. a worker process with a limit of time and memory at every rendering: nested
   ranges, powers, widths of formats and strings that double are all allowed in
   the sandbox, and what they cost depends on the messages.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from rspo_jax import workers

# A rendering takes a tenth of a millisecond; a busy machine gets its time.
LIMITS = workers.Limits(time_s=10.0, memory_bytes=1 << 30)


def render(
  source: str, messages: Sequence[Mapping[str, Any]], **variables
) -> str:
  """Renders messages within `LIMITS`.

  Args:
    source: the template.
    messages: [{"role": "user", "content": "..."}, ...].
    **variables: further variables of the template.

  Raises:
    ValueError: the template is none, refuses these messages, or takes more
      time, memory or text than it may; or variables that JSON cannot say.
    workers.WorkersError: no process can be started.
  """
  given = {"tools": None, "documents": None, **variables}
  call = [source, {**given, "messages": list(messages)}]
  (outcome,) = _worker().map([call])
  if outcome.reason:
    raise ValueError(
      f"the chat template refused the messages: {outcome.reason}"
    )
  return outcome.value


@functools.lru_cache(maxsize=1)
def _worker() -> workers.Workers:
  """The process that renders, for all templates."""
  target = f"{__name__}:render_here"
  return workers.Workers(target, count=1, limits=LIMITS, quiet=True)


def render_here(source: str, variables: Mapping[str, Any]) -> str:
  """Renders in this process, without limits: what the worker calls."""
  return _compiled(source).render(**variables)


class _Generation(jinja2.ext.Extension):
  """`{% generation %}`: marks the assistant's words, and changes no text."""

  tags = frozenset({"generation"})

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    # A block of its own, as in transformers: names set inside end with it.
    return jinja2.nodes.Scope(body).set_lineno(line)


def _refuse(message):
  raise jinja2.TemplateError(message)


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  # jinja2's own filter escapes for HTML, which the models never saw.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _now(form):
  return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
  """Compiles a template in the sandbox, with the usual helpers."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.globals["raise_exception"] = _refuse
  environment.globals["strftime_now"] = _now
  environment.filters["tojson"] = _to_json
  return environment.from_string(source)
