#!/usr/bin/env bash
# Runs a command of rspo_jax.main on a TPU slice of Google's cloud.
#
#   launch/tpu.sh run --name=NAME --zone=ZONE [options] -- \
#     --config=configs/countdown.py --workdir=gs://BUCKET/RUN
#
# actions
#   run      create the TPU VM or reuse it, bring the code, run on all hosts,
#            go on while the run ends with 75 or the machines are taken away,
#            then fetch what it wrote; the same command again picks it up
#   fetch    copy the run without its checkpoints to --out
#   stop     let the run save and end with 75
#   delete   give the TPU back
# options
#   --type=v5litepod-4      accelerator type; v6e-8, v5p-8, ...
#   --version=VERSION       runtime (default: by the type)
#   --project=PROJECT       default: gcloud's own
#   --queued                wait in the queue (queued resources)
#   --spot                  cheaper, and may be taken away at any time
#   --out=FOLDER            where results go (default: runs/ and the last folder of --workdir)
#   --restarts=100          at most so many
#   --poll_s=30             seconds between looks at the run
#   --dry_run               print what would run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

usage() {
  sed -n '2,25s/^# \{0,1\}//p' launch/tpu.sh
}

name="" zone="" type=v5litepod-4 version="" project="" out=""
queued=false spot=false restarts=100 poll_s=30
action=${1:-}
case $action in
  run | fetch | stop | delete) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *) die "'$action' is not an action; use run, fetch, stop or delete (--help)." ;;
esac
parse_options "name zone type version project out restarts poll_s" \
  "queued spot" "$@"
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
  die "--name=$name must be a name of a TPU: lower-case letters, digits and -."
[[ -n $zone ]] || die "--zone is missing; where your quota is, such as --zone=us-west4-a."
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts must be a whole number."
[[ $poll_s =~ ^[0-9.]+$ ]] || die "--poll_s=$poll_s must be a number of seconds."
out=${out:-$(default_out)}
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

tpu_vm() {
  run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"
}

on_all() {
  tpu_vm ssh --worker=all "--command=cd rspo_jax && $1"
}

state_of() {
  gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($2)" 2>/dev/null ||
    echo ABSENT
}

create() {
  local options=("--accelerator-type=$type")
  if $spot; then options+=(--spot); fi
  if $queued; then
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" \
      "${where[@]}" "${options[@]}" "--runtime-version=$version"
  else
    tpu_vm create "${options[@]}" "--version=$version"
  fi
}

delete() {
  if $queued; then
    # Takes the machines with it.
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpu_vm delete --quiet
  fi
}

# Sets `fresh` where the machines have not been prepared yet.
create_or_reuse() {
  local state
  if $dry_run; then
    echo "# unless $name is there:"
    create
    return
  fi
  while true; do
    if $queued; then
      state=$(state_of queued-resources state.state)
      [[ $state != ACTIVE ]] || state=$(state_of tpu-vm state)
    else
      state=$(state_of tpu-vm state)
    fi
    case $state in
      READY) return ;;
      ABSENT)
        say "$name: creating $type in $zone"
        create
        fresh=true
        ;;
      STOPPED)
        tpu_vm start
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        say "$name: $state; creating it anew"
        delete
        ;;
      FAILED)
        say "error: the request for $name failed; see: gcloud compute tpus queued-resources describe $(quoted "$name" "${where[@]}")"
        exit 3
        ;;
      *)
        say "$name: $state; waiting"
        sleep "$poll_s"
        ;;
    esac
  done
}

prepare() {
  local bundle
  bundle=${TMPDIR:-/tmp}/rspo_jax-$name.tar.gz
  run git archive --format=tar.gz "--output=$bundle" HEAD
  git diff --quiet HEAD || say "Changes that are not committed stay behind."
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:rspo_jax.tar.gz" \
    "${where[@]}" --worker=all
  tpu_vm ssh --worker=all \
    "--command=mkdir -p rspo_jax && tar -xzf rspo_jax.tar.gz -C rspo_jax"
  on_all "bash launch/setup_tpu_vm.sh"
  run rm -f "$bundle"
}

# Prints what became of the run: its exit status, or "lost".
wait_for_end() {
  local said words failures=0
  while true; do
    if said=$(on_all "bash launch/worker.sh status" 2>/dev/null); then
      failures=0
    else
      # Not there any more, or only not at the moment.
      failures=$((failures + 1))
      if ((failures >= 5)) || [[ $(state_of tpu-vm state) != READY ]]; then
        echo lost
        return
      fi
    fi
    words=$(sed -n 's/^rspo_jax: \([a-z0-9]*\).*/\1/p' <<<"$said" | sort -u)
    # One that failed decides: the others wait for it. Then one that is gone.
    if [[ -n $words && $words != *running* ]]; then
      grep -vx -e 0 -e 75 -e lost <<<"$words" | head -n 1 | grep . && return
      if [[ $words == 0 ]]; then echo 0; elif [[ $words == *lost* ]]; then echo lost; else echo 75; fi
      return
    fi
    sleep "$poll_s"
  done
}

run_it() {
  local status attempt fresh=true command
  check_run
  command="bash launch/worker.sh start $(quoted "${run_args[@]}")"
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    create_or_reuse
    if $fresh; then prepare; fi
    fresh=false
    on_all "$command"
    if $dry_run; then
      on_all "bash launch/worker.sh status"
      echo "# again from the start while the status is 75; then:"
      fetch_bucket "$out"
      return
    fi
    say "$name: running; this may be interrupted, the same command picks it up"
    status=$(wait_for_end)
    case $status in
      0)
        say "$name: done"
        fetch_bucket "$out"
        back=("--name=$name" "${where[@]}")
        if $queued; then back+=(--queued); fi
        say "$name is still there; give it back: launch/tpu.sh delete $(quoted "${back[@]}")"
        return
        ;;
      75 | lost)
        say "$name: $status; going on"
        ;;
      *)
        tpu_vm ssh --worker=all "--command=cd rspo_jax && bash launch/worker.sh log 30" || true
        fetch_bucket "$out" || true
        say "error: the run ended with exit status $status; its last lines are above."
        exit "$status"
        ;;
    esac
  done
  say "error: $name was interrupted more than --restarts=$restarts times; run the same command to go on."
  exit 75
}

case $action in
  run) run_it ;;
  fetch)
    check_run
    fetch_bucket "$out"
    ;;
  stop) on_all "bash launch/worker.sh stop" ;;
  delete) delete ;;
esac
