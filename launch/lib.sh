# shellcheck shell=bash
# What the launch scripts share: options, and commands that a dry run prints.

dry_run=false
run_args=() # behind --: arguments of rspo_jax.main

say() {
  echo "$*" >&2
}

die() {
  say "error: $*"
  exit 2
}

# One word per argument, as a shell needs to read it.
quoted() {
  local word text=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+^-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  echo "${text:1}"
}

# Runs a command; a dry run prints it.
run() {
  if $dry_run; then
    quoted "$@"
  else
    "$@"
  fi
}

# parse_options "value names" "flag names" ARGUMENT...
# Sets the variable of each option; what follows -- goes to run_args.
parse_options() {
  local valued=" $1 " flags=" $2 dry_run " option
  shift 2
  while (($#)); do
    case $1 in
      --)
        run_args=("${@:2}")
        return
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*=*)
        option=${1%%=*}
        option=${option#--}
        [[ $valued == *" $option "* ]] ||
          die "--$option is not an option of $0; see --help. Arguments of rspo_jax.main go behind --."
        printf -v "$option" '%s' "${1#*=}"
        ;;
      --*)
        option=${1#--}
        [[ $flags == *" $option "* ]] ||
          die "$1 is not an option of $0, or lacks its =VALUE; see --help. Arguments of rspo_jax.main go behind --."
        printf -v "$option" true
        ;;
      *)
        die "$1 is not an option of $0; see --help."
        ;;
    esac
    shift
  done
}

# run_argument NAME: the value of --NAME=VALUE or --NAME VALUE behind --, ""
# without.
run_argument() {
  local word before=""
  for word in ${run_args[@]+"${run_args[@]}"}; do
    if [[ $word == "--$1="* ]]; then
      echo "${word#*=}"
    elif [[ $before == "--$1" ]]; then
      echo "$word"
    fi
    before=$word
  done | tail -n 1
}

# default_out: runs/ and the last folder of --workdir.
default_out() {
  local address
  address=$(run_argument workdir)
  address=${address%/}
  echo "runs/${address##*/}"
}

# Refuses a run that its machines would take with them.
check_run() {
  [[ -n $(run_argument config) ]] ||
    die "no --config behind --; end the command with -- --config=configs/countdown.py --workdir=gs://BUCKET/RUN."
  [[ $(run_argument workdir) == gs://?*/?* ]] ||
    die "--workdir behind -- must be gs://BUCKET/FOLDER: the disks of the machines go with them."
}

# fetch_bucket OUT: copies the run without its checkpoints.
fetch_bucket() {
  run mkdir -p "$1"
  run gcloud storage rsync --recursive '--exclude=^checkpoints/' \
    "$(run_argument workdir)" "$1"
}
