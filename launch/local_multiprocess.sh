#!/usr/bin/env bash
# Runs a command as N processes of one run on this machine.
#
#   launch/local_multiprocess.sh [--dry_run] [--log_dir DIR] N COMMAND...
#   launch/local_multiprocess.sh 2 t5x-lite train --gin_file=... --gin.MODEL_DIR=...
#
# The processes find each other through JAX_COORDINATOR_ADDRESS,
# JAX_NUM_PROCESSES and JAX_PROCESS_ID. On CPUs each has one device, or as many
# as XLA_FLAGS=--xla_force_host_platform_device_count=K says; on GPUs each gets
# its share of CUDA_VISIBLE_DEVICES. Output is shown with the process's number
# in front, or kept in DIR/process_I.log. SIGTERM and Ctrl-C go on to every
# process. Exits with the first code that is not 0.
set -euo pipefail

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

dry_run=false
log_dir=''
while [[ $# -gt 0 ]]; do
  case "$1" in
    --dry_run) dry_run=true ;;
    --log_dir)
      [[ $# -gt 1 ]] || usage
      log_dir=$2
      shift
      ;;
    *) break ;;
  esac
  shift
done
[[ $# -ge 2 && "$1" =~ ^[1-9][0-9]*$ ]] || usage
count=$1
shift

port=${PORT:-}
if [[ -z "$port" ]]; then
  if $dry_run; then
    port=PORT
  else
    port=$(python3 -c 'import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
  fi
fi

# The I-th of N equal shares of the GPUs, if there are any.
gpus_of() {
  local all
  IFS=, read -r -a all <<< "${CUDA_VISIBLE_DEVICES:-}"
  local share=$((${#all[@]} / count))
  [[ $share -gt 0 ]] || return 0
  local IFS=,
  echo "CUDA_VISIBLE_DEVICES=${all[*]:$(($1 * share)):share}"
}

[[ -z "$log_dir" ]] || $dry_run || mkdir -p "$log_dir"
pids=()
# Called by the trap.
# shellcheck disable=SC2317,SC2329
forward() {
  kill -s "$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((i = 0; i < count; i++)); do
  environment=(
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$count"
    "JAX_PROCESS_ID=$i"
  )
  gpus=$(gpus_of "$i")
  [[ -z "$gpus" ]] || environment+=("$gpus")
  if $dry_run; then
    printf '%q ' env "${environment[@]}" "$@"
    echo
  elif [[ -n "$log_dir" ]]; then
    env "${environment[@]}" "$@" > "$log_dir/process_$i.log" 2>&1 &
    pids+=($!)
  else
    env "${environment[@]}" "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done
$dry_run && exit 0

status=0
for pid in "${pids[@]}"; do
  # A signal ends the wait early; the process may still be saving.
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [[ $status -ne 0 ]] || status=$code
done
exit "$status"
