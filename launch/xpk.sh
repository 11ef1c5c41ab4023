#!/usr/bin/env bash
# Runs a command of rspo_jax.main on TPU slices of a GKE cluster, by xpk.
#
#   launch/xpk.sh --name=NAME --cluster=CLUSTER --type=v5litepod-16 [options] \
#     -- --config=configs/countdown.py --workdir=gs://BUCKET/RUN
#
# A pod that is taken away saves first; the workload is started again while it
# ends with 75, on machines that need not be the same. Results: --fetch.
# options
#   --slices=1              number of slices
#   --zone=ZONE --project=PROJECT   default: gcloud's own
#   --image=python:3.12     image that the code is added to
#   --spot                  on spot machines
#   --restarts=100          at most so many
#   --fetch                 copy the run without its checkpoints to --out
#   --out=FOLDER            (default: runs/ and the last folder of --workdir)
#   --dry_run               print what would run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

usage() {
  sed -n '2,18s/^# \{0,1\}//p' launch/xpk.sh
}

name="" cluster="" type="" slices=1 zone="" project="" image=python:3.12
spot=false restarts=100 fetch=false out=""
parse_options "name cluster type slices zone project image restarts out" \
  "spot fetch" "$@"
[[ $name =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] ||
  die "--name=$name must be at most 39 lower-case letters, digits and -."
check_run
out=${out:-$(default_out)}
if $fetch; then
  fetch_bucket "$out"
  exit 0
fi
[[ -n $cluster ]] || die "--cluster is missing; see: xpk cluster list."
[[ -n $type ]] || die "--type is missing, such as --type=v5litepod-16."
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices must be a whole number from 1 on."
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts must be a whole number."

options=()
[[ -z $zone ]] || options+=("--zone=$zone")
[[ -z $project ]] || options+=("--project=$project")
if $spot; then options+=(--spot); fi
# exec: SIGTERM, and the exit status, are the run's.
command="bash launch/setup_tpu_vm.sh && exec .venv/bin/python -u -m rspo_jax.main $(quoted "${run_args[@]}")"
run xpk workload create "--workload=$name" "--cluster=$cluster" \
  "--tpu-type=$type" "--num-slices=$slices" ${options[@]+"${options[@]}"} \
  "--base-docker-image=$image" --script-dir=. \
  --restart-on-exit-codes=75 "--max-restarts=$restarts" \
  --termination-grace-period-seconds=180 "--command=$command"
