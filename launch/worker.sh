#!/usr/bin/env bash
# Runs a command of rspo_jax.main on this host, whether or not anybody stays
# connected, and says how it stands.
#
#   launch/worker.sh start --config=... --workdir=gs://...
#   launch/worker.sh status     "rspo_jax: running", or its exit status
#   launch/worker.sh log [N]    the last N lines of what it said
#   launch/worker.sh stop       SIGTERM: it saves and ends with 75
#
# State and log are in $RSPO_JAX_JOB (~/rspo_jax_job); the interpreter is
# $PYTHON (.venv/bin/python of the repository).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
job=${RSPO_JAX_JOB:-$HOME/rspo_jax_job}
python=${PYTHON:-.venv/bin/python}

running() {
  [[ -f $job/pid && ! -f $job/status ]] && kill -0 "$(<"$job/pid")" 2>/dev/null
}

case ${1:-} in
  start)
    if running; then
      if [[ "$(printf '%q ' "${@:2}")" == "$(<"$job/arguments")" ]]; then
        echo "rspo_jax: running already"
        exit 0
      fi
      echo "error: another run is at work here: $(<"$job/arguments"); let it end or stop it." >&2
      exit 2
    fi
    mkdir -p "$job"
    rm -f "$job/status" "$job/pid"
    printf '%q ' "${@:2}" >"$job/arguments"
    # An own session: the end of the connection does not reach it.
    # shellcheck disable=SC2016  # the inner shell expands
    setsid nohup bash -c '
      "$2" -u -m rspo_jax.main "${@:3}" &
      echo $! >"$1/pid.partial"
      mv "$1/pid.partial" "$1/pid"
      code=0
      wait $! || code=$?
      echo "$code" >"$1/status.partial"
      mv "$1/status.partial" "$1/status"
    ' rspo_jax "$job" "$python" "${@:2}" >>"$job/log" 2>&1 </dev/null &
    until [[ -f $job/pid ]]; do sleep 0.05; done
    echo "rspo_jax: started"
    ;;
  status)
    # Between its end and the note of it lies a moment.
    running || [[ -f $job/status ]] || sleep 1
    if [[ -f $job/status ]]; then
      echo "rspo_jax: $(<"$job/status")"
    elif running; then
      echo "rspo_jax: running"
    else
      # Killed, or the machine was started anew: the same command goes on.
      echo "rspo_jax: lost"
    fi
    ;;
  log)
    tail -n "${2:-50}" "$job/log"
    ;;
  stop)
    if running; then
      kill -TERM "$(<"$job/pid")"
    fi
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' launch/worker.sh >&2
    exit 2
    ;;
esac
