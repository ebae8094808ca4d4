#!/usr/bin/env bash
# Runs spin_jax on a Google Cloud TPU pod, by queued resources.
#
#   launch/tpu_pod.sh create   asks for the pod, waits for it, copies this commit to every host, installs it
#   launch/tpu_pod.sh run      starts the run on every host; it outlives the ssh session
#   launch/tpu_pod.sh status   the pod's state, the end of the log, the exit code once there is one
#   launch/tpu_pod.sh resume   after a preemption: delete, create, run; the same WORKDIR continues
#   launch/tpu_pod.sh loop     watches until the run ends, and resumes it whenever the pod is preempted
#   launch/tpu_pod.sh fetch    brings summary, metrics, samples and one iteration's model to RESULTS
#   launch/tpu_pod.sh delete   gives the pod back
#
# --dry-run prints the commands and runs none. Every value below can be set in the environment.
set -euo pipefail

: "${NAME:=spin}"                     # of the queued resource and of its TPU
: "${PROJECT:=}"                      # Google Cloud project; empty: gcloud's own
: "${ZONE:=us-east5-a}"               # has v5p and v6e; v5litepod is in us-west4-a and others
: "${ACCELERATOR:=v6e-16}"            # v5litepod-64, v5p-16 (counted in cores: eight chips), v6e-16, …
: "${SPOT:=1}"                        # 1: spot capacity, cheaper and preemptible; 0: on demand
: "${CONFIG:=configs/zephyr.py}"      # --config of the run
: "${WORKDIR:=gs://my-bucket/zephyr}" # --workdir of the run: a folder of a bucket
: "${ARGS:=}"                         # further flags of the run, split at spaces
: "${EXTRAS:=tpu,gcs}"                # of the installation
: "${PYTHON_VERSION:=3.12}"           # 3.11 or newer; the images' own may be older
: "${POLL:=60}"                       # seconds between two looks at the pod
: "${RESTARTS:=5}"                    # how many crashes loop forgives; preemptions do not count
: "${ITERATION:=3}"                   # whose model fetch brings; 3 is the recipe's last
: "${RESULTS:=results}"               # local folder that fetch fills
: "${ARCHIVE:=/tmp/spin_jax.tar.gz}"  # local file in which the commit travels

case $ACCELERATOR in # the image that goes with the chip
  v5litepod-*) : "${RUNTIME_VERSION:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${RUNTIME_VERSION:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${RUNTIME_VERSION:=v2-alpha-tpuv6e}" ;;
  *) : "${RUNTIME_VERSION:=tpu-ubuntu2204-base}" ;;
esac

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "create run status resume loop fetch delete" "$@"
case $SUBCOMMAND in status | delete) ;; *) in_bucket ;; esac

# What the hosts' shells are given, in the home directory. Whatever the run starts holds the lock: a second
# `run` waits for the first to end.
install="rm -rf spin_jax && mkdir spin_jax && tar -xzf spin_jax.tar.gz -C spin_jax && cd spin_jax"
install+=" && curl -LsSf https://astral.sh/uv/install.sh | sh"
install+=" && ~/.local/bin/uv venv --python $(quoted "$PYTHON_VERSION") .venv"
install+=" && ~/.local/bin/uv pip install --quiet -e $(quoted ".[$EXTRAS]")"
start="(trap \"\" HUP; exec 9> spin_jax.lock; flock 9; rm -f spin_jax.exit; cd spin_jax"
start+="; $(quoted .venv/bin/python "${MAIN[@]}"); echo \$? > ~/spin_jax.exit)"
start+=" >> spin_jax.log 2>&1 < /dev/null &"
report="tail -n 20 spin_jax.log; grep -Hs . spin_jax.exit || true"
ended="cat spin_jax.exit 2> /dev/null || flock -n spin_jax.lock echo gone || true" # nothing while it runs

# Exclude everything but these: gcloud matches its pattern from the start of the path below WORKDIR.
others='(?!config\.json$|(.*/)?(summary\.(json|png)|metrics\.jsonl|samples\.jsonl)$)'

tpus() { run gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}; }
on_hosts() { tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2"; }
describe() { tpus queued-resources describe "$NAME" '--format=value(state.state)'; }
state() { describe 2>/dev/null || echo UNKNOWN; }
delete() { tpus queued-resources delete "$NAME" --force --quiet; }

create() {
  local spot=--spot now=""
  [ "$SPOT" != 0 ] || spot=""
  tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=$RUNTIME_VERSION" ${spot:+"$spot"}
  [ -z "$DRY_RUN" ] || echo "until $(describe) | grep -x ACTIVE; do sleep $POLL; done"
  until [ -n "$DRY_RUN" ] || [ "$now" = ACTIVE ]; do
    sleep "$POLL"
    now=$(state)
    echo "$NAME is $now"
    case $now in FAILED | SUSPENDED) return 1 ;; esac
  done
  run git -C "$ROOT" archive --format=tar.gz "--output=$ARCHIVE" HEAD
  tpus tpu-vm scp "$ARCHIVE" "$NAME:spin_jax.tar.gz" --worker=all
  on_hosts all "$install"
}

resume() {
  if [ -n "$DRY_RUN" ] || [ "$(state)" != UNKNOWN ]; then delete; fi
  create
  on_hosts all "$start"
}

loop() {
  local code crashes=0
  if [ -n "$DRY_RUN" ]; then
    echo "# every $POLL s: the pod's state; where it is ACTIVE, how the run ended, if it did"
    describe
    on_hosts 0 "$ended"
    echo "# with neither 0 nor 2: as run. Where the state is FAILED or SUSPENDED, as resume:"
    resume
    return
  fi
  while sleep "$POLL"; do
    case $(state) in
      ACTIVE)
        code=$(on_hosts 0 "$ended") || continue
        case $code in "") continue ;; 0 | 2) exit "$code" ;; esac
        crashes=$((crashes + 1))
        echo "the run ended: $code (crash $crashes; $RESTARTS are forgiven)"
        [ "$crashes" -le "$RESTARTS" ] || exit 1
        "$0" run || true
        ;;
      FAILED | SUSPENDED) "$0" resume || true ;;
    esac
  done
}

case $SUBCOMMAND in
  create) create ;;
  run) on_hosts all "$start" ;;
  status)
    describe
    if [ -n "$DRY_RUN" ] || [ "$(state)" = ACTIVE ]; then on_hosts 0 "$report"; fi
    ;;
  resume) resume ;;
  loop) loop ;;
  fetch)
    model=iteration_$ITERATION/model
    run mkdir -p "$RESULTS/$model"
    run gcloud storage rsync --recursive "--exclude=$others" "$WORKDIR" "$RESULTS"
    run gcloud storage rsync --recursive "$WORKDIR/$model" "$RESULTS/$model"
    ;;
  delete) delete ;;
esac
