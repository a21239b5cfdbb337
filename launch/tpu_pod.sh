#!/usr/bin/env bash
# Rents a TPU slice as a queued resource and runs t5x-lite on all its workers.
#
#   launch/tpu_pod.sh [--dry_run] create | wait | install | logs | status | stop | delete
#   launch/tpu_pod.sh [--dry_run] run train --gin_file=... --gin.MODEL_DIR=gs://...
#
# Settings, from the environment:
#   PROJECT, ZONE   of Google Cloud; required
#   NAME            of the slice (t5x-lite)
#   ACCELERATOR     v4-1024, v5p-1024 (two cores a chip), v5litepod-256, v6e-256
#   NUM_SLICES      slices joined by the data-center network (1)
#   SPOT            1 for preemptible capacity, at about a third of the price
#   PACKAGE         the wheel that install puts on the workers, in gs://
#
# docs/launch.md walks through it. --dry_run prints every command instead.
set -euo pipefail

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then
  dry_run=true
  shift
fi
action=${1:-}
if [[ -z "$action" ]]; then
  sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
shift

: "${PROJECT:?set PROJECT to your Google Cloud project}"
: "${ZONE:?set ZONE, for example us-east5-a}"
name=${NAME:-t5x-lite}
accelerator=${ACCELERATOR:-v5litepod-16}
num_slices=${NUM_SLICES:-1}
package=${PACKAGE:-}
where=(--project="$PROJECT" --zone="$ZONE")

case "$accelerator" in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    echo "tpu_pod.sh: ACCELERATOR=$accelerator: use v4-*, v5p-*, v5litepod-* or v6e-*" >&2
    exit 2
    ;;
esac

nodes=("$name")
if ((num_slices > 1)); then
  nodes=()
  for ((i = 0; i < num_slices; i++)); do nodes+=("$name-$i"); done
fi

# Runs a command on every worker of every slice.
everywhere() {
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1"
  done
}

case "$action" in
  create)
    options=(--accelerator-type="$accelerator" --runtime-version="${RUNTIME:-$runtime}")
    if ((num_slices > 1)); then
      options+=(--node-count="$num_slices" --node-prefix="$name")
    else
      options+=(--node-id="$name")
    fi
    [[ "${SPOT:-0}" != 1 ]] || options+=(--spot)
    run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
    ;;
  wait)
    describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
    if $dry_run; then
      run "${describe[@]}"
    else
      until state=$("${describe[@]}") && [[ "$state" == ACTIVE ]]; do
        case "$state" in FAILED | SUSPENDED) echo "tpu_pod.sh: $name is $state" >&2; exit 1 ;; esac
        echo "$name is $state"
        sleep 30
      done
    fi
    ;;
  install)
    if [[ "$package" != *.whl ]]; then
      echo "tpu_pod.sh: PACKAGE='$package': set it to a wheel in gs://, made by 'pip wheel --no-deps .'" >&2
      exit 2
    fi
    # The workers' own Python is too old: uv brings one.
    wheel="$(printf %q "$(basename "$package")")"
    everywhere "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --allow-existing --python 3.12 ~/t5x && gcloud storage cp $(printf %q "$package") ~/ && ~/.local/bin/uv pip install --python ~/t5x/bin/python --reinstall-package t5x-lite ~/$wheel'[tpu]'"
    ;;
  run)
    [[ $# -gt 0 ]] || { echo 'tpu_pod.sh: run what? for example: run train --gin_file=...' >&2; exit 2; }
    # In the background of each worker, so that it outlives this connection. A
    # lost worker (exit code 5) or a crash starts again from the last checkpoint;
    # a finished run (0), a mistake (2), a step that does not fit (3), a diverged
    # run (4) and a missing program (126, 127) do not. JAX asks the slice itself
    # who the other workers are: T5X_LITE_TPU_SLICE says that there is one.
    command="t5x-lite$(printf ' %q' "$@")"
    loop="export T5X_LITE_TPU_SLICE=1 LIBTPU_INIT_ARGS=--fibers_default_thread_stack_size=4194304 PATH=\$HOME/t5x/bin:\$PATH; while true; do $command; code=\$?; echo exit code \$code; case \$code in 0|2|3|4|126|127) break;; esac; sleep 30; done"
    everywhere "nohup setsid bash -c $(printf %q "$loop") > ~/t5x-lite.log 2>&1 & echo \$! > ~/t5x-lite.pid"
    ;;
  logs)
    run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command='tail -n 100 -f ~/t5x-lite.log'
    ;;
  status)
    everywhere 'tail -n 2 ~/t5x-lite.log'
    ;;
  stop)
    # The loop first, then SIGTERM: every process saves and stops at one step.
    everywhere "kill \$(cat ~/t5x-lite.pid); pkill -TERM -x t5x-lite || true"
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    ;;
  *)
    echo "tpu_pod.sh: no action '$action'; there are create, wait, install, run, logs, status, stop, delete" >&2
    exit 2
    ;;
esac
