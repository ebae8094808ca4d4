#!/usr/bin/env bash
# Runs spin_jax on TPU slices of a GKE cluster, by xpk (pip install xpk; it wants gcloud, kubectl and crane).
#
#   launch/xpk.sh run      submits this commit as a workload of NUM_SLICES slices
#   launch/xpk.sh status   the workload's state and the end of the first host's log
#   launch/xpk.sh delete   removes the workload
#
# The cluster must be there (xpk cluster create). --dry-run prints the commands and runs none. Every value below
# can be set in the environment.
set -euo pipefail

: "${CLUSTER:=spin}"                  # the GKE cluster
: "${WORKLOAD:=spin}"                 # name of the workload; a deleted one's can be used again
: "${PROJECT:=}"                      # Google Cloud project; empty: gcloud's own
: "${ZONE:=us-east5-a}"               # the cluster's
: "${TPU_TYPE:=v6e-16}"               # of a slice: v5litepod-64, v5p-16 (counted in cores), v6e-16, …
: "${NUM_SLICES:=1}"                  # how many of them
: "${CONFIG:=configs/zephyr.py}"      # --config of the run
: "${WORKDIR:=gs://my-bucket/zephyr}" # --workdir of the run: a folder of a bucket
: "${ARGS:=}"                         # further flags of the run, split at spaces
: "${EXTRAS:=tpu,gcs}"                # of the installation
: "${BASE_IMAGE:=python:3.12}"        # the commit is added to it, and installed when a host starts
: "${RESTARTS:=20}"                   # preemptions and crashes after which the workload starts again
: "${GRACE:=300}"                     # seconds between SIGTERM and SIGKILL; a spot VM has fewer
: "${SCRATCH:=/tmp}"                  # local folder for a copy of the commit

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "run status delete" "$@"

copy=$SCRATCH/spin_jax_commit
# exec: xpk signals the process that it started, which must be Python when it saves.
command="pip install --quiet -e $(quoted ".[$EXTRAS]") && exec $(quoted python "${MAIN[@]}")"

first="jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"

xpk_workload() {
  run xpk workload "$@" "--cluster=$CLUSTER" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

case $SUBCOMMAND in
  run)
    in_bucket
    run rm -rf "$copy" "$copy.tar"
    run mkdir -p "$copy"
    run git -C "$ROOT" archive "--output=$copy.tar" HEAD
    run tar -xf "$copy.tar" -C "$copy"
    # Exit code 1: what the hosts end with whose neighbour was preempted. 2 is bad input, and final.
    xpk_workload create "--workload=$WORKLOAD" "--tpu-type=$TPU_TYPE" "--num-slices=$NUM_SLICES" \
      "--base-docker-image=$BASE_IMAGE" "--script-dir=$copy" "--max-restarts=$RESTARTS" \
      --restart-on-exit-codes=1 "--termination-grace-period-seconds=$GRACE" "--command=$command"
    ;;
  status)
    xpk_workload list "--filter-by-job=$WORKLOAD"
    run kubectl logs --tail=20 --selector="xpk.google.com/workload=$WORKLOAD,$first"
    ;;
  delete) xpk_workload delete "--workload=$WORKLOAD" --force ;;
esac
