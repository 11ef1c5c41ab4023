#!/usr/bin/env bash
# Prepares a machine for TPU runs: Python, JAX for TPUs, the client of buckets.
#
#   bash launch/setup_tpu_vm.sh [--dry_run]
#
# On every host of a slice, from the repository's root (launch/tpu.sh does it).
# What is installed already is left as it is, so that a restart takes a moment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

usage() {
  sed -n '2,8s/^# \{0,1\}//p' launch/setup_tpu_vm.sh
}
parse_options "" "" "$@"

requirements=(-r requirements.txt -r requirements-gcs.txt 'jax[tpu]>=0.10,<0.11')
mark=.venv/installed
wanted=$(cat requirements.txt requirements-gcs.txt launch/setup_tpu_vm.sh | sha256sum)
if [[ -f $mark && $(<"$mark") == "$wanted" ]]; then
  say "Everything is installed."
  exit 0
fi

python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -n $python ]]; then
  run "$python" -m venv .venv
else
  # The images of TPU VMs come with an older Python.
  run python3 -m pip install --quiet --user uv
  run python3 -m uv venv --quiet --seed --python 3.12 .venv
fi
run .venv/bin/python -m pip install --quiet "${requirements[@]}"
# TPU programs start and stop faster with them (JAX says so at every start).
hugepages=/sys/kernel/mm/transparent_hugepage/enabled
if [[ -e $hugepages ]]; then
  run sudo sh -c "echo always > $hugepages" || say "No huge pages: the start takes longer."
fi
run .venv/bin/python -c 'import jax, rspo_jax, gcsfs'
$dry_run || echo "$wanted" >"$mark"
