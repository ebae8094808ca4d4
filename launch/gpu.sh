#!/usr/bin/env bash
# Runs spin_jax on one machine with one or more NVIDIA GPUs: makes the environment, starts the run, and starts it
# again where it fails.
#
#   launch/gpu.sh
#
# CUDA_VISIBLE_DEVICES picks GPUs; all are used without it. Ctrl-C and SIGTERM end the run once it has saved; the
# same command continues. --dry-run prints the commands and runs none. Every value below can be set in the
# environment.
set -euo pipefail

: "${PYTHON:=python3}"           # 3.11 or newer
: "${VENV:=.venv}"               # where the environment is made
: "${EXTRAS:=cuda}"              # of the installation; cuda,gcs where WORKDIR is gs://…
: "${CONFIG:=configs/zephyr.py}" # --config of the run
: "${WORKDIR:=runs/zephyr}"      # --workdir of the run
: "${ARGS:=}"                    # further flags of the run, split at spaces
: "${MEMORY_FRACTION:=0.92}"     # of a GPU, for JAX, which takes 0.75 when not told
: "${RESTARTS:=3}"               # after failures
: "${PAUSE:=30}"                 # seconds before each

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "" "$@"

run cd "$ROOT"
run "$PYTHON" -m venv "$VENV"
run "$VENV/bin/pip" install --quiet -e ".[$EXTRAS]"
set -- env "XLA_CLIENT_MEM_FRACTION=$MEMORY_FRACTION" "$VENV/bin/python" "${MAIN[@]}"
if [ -n "$DRY_RUN" ]; then
  quoted "$@"
  echo "# again after a failure, $RESTARTS times at most"
  exit
fi

python=""
trap 'if [ -n "$python" ]; then kill -TERM "$python" || :; else exit 130; fi' INT TERM # Python saves and ends
for ((left = RESTARTS; ; left--)); do
  "$@" &
  python=$!
  while :; do # a trap ends the wait, but not Python
    code=0
    wait "$python" || code=$?
    kill -0 "$python" 2>/dev/null || break
  done
  python=""
  case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac # complete, bad input, interrupted
  [ "$left" -gt 0 ] || exit "$code"
  echo "exit code $code: again in $PAUSE s, $left times more at most" >&2
  sleep "$PAUSE"
done
