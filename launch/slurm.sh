#!/usr/bin/env bash
# Runs spin_jax on the GPUs of a SLURM cluster. It submits itself as a job.
#
#   launch/slurm.sh
#
# One task a GPU: jax.distributed.initialize() reads SLURM's variables, and gives each task the one GPU numbered
# SLURM_LOCALID. A task must see all GPUs of its node for that, so --gres asks for them: --gpus-per-task would
# hide the others, and the numbers would not fit.
#
# The clone, its environment and WORKDIR must be on a file system that all nodes share. GRACE seconds before the
# time is up the tasks get SIGTERM, save and end, and the job queues again; after a preemption or the loss of a
# node SLURM queues it by itself. --dry-run prints the commands and runs none. Every value below can be set in
# the environment.
set -euo pipefail

if [ "${1:-}" = job ]; then # in the job: srun, with the words that follow
  shift
  [ -n "${SLURM_JOB_ID:-}" ] || { echo "slurm.sh: 'job' is for sbatch; see --help" >&2 && exit 2; }
  late=""
  trap 'late=1; scancel --signal=TERM "$SLURM_JOB_ID" || :' USR1 # reaches the tasks, not this shell
  trap : TERM                                                    # nor may this shell end before they have saved
  srun --kill-on-bad-exit=0 "$@" &
  tasks=$!
  while :; do # a trap ends the wait, but not srun
    code=0
    wait "$tasks" || code=$?
    kill -0 "$tasks" 2>/dev/null || break
  done
  if [ -z "$late" ] || [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then exit "$code"; fi
  exec scontrol requeue "$SLURM_JOB_ID"
fi

: "${NAME:=spin}"                # of the job
: "${NODES:=1}"                  # how many
: "${GPUS_PER_NODE:=8}"          # and as many tasks
: "${CPUS_PER_TASK:=8}"          # of each task
: "${MEM:=0}"                    # of a node; 0: all of it
: "${TIME:=24:00:00}"            # limit of one stretch; the job queues again until the run is complete
: "${GRACE:=600}"                # seconds for a step or batch and for saving
: "${PARTITION:=}"               # empty: the cluster's default
: "${ACCOUNT:=}"                 # empty: the user's default
: "${LOG:=spin-%j.log}"          # %j is the job's number
: "${CONFIG:=configs/zephyr.py}" # --config of the run
: "${WORKDIR:=runs/zephyr}"      # --workdir of the run
: "${ARGS:=}"                    # further flags of the run, split at spaces
: "${PYTHON:=.venv/bin/python}"  # python3 -m venv .venv && .venv/bin/pip install -e '.[cuda]'
: "${MEMORY_FRACTION:=0.92}"     # of a GPU, for JAX, which takes 0.75 when not told

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "" "$@"

set -- "--cpus-per-task=$CPUS_PER_TASK" env "XLA_CLIENT_MEM_FRACTION=$MEMORY_FRACTION" "$PYTHON" "${MAIN[@]}"
run sbatch "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" "--gres=gpu:$GPUS_PER_NODE" \
  "--cpus-per-task=$CPUS_PER_TASK" "--mem=$MEM" "--time=$TIME" --requeue "--signal=B:USR1@$GRACE" \
  --open-mode=append "--output=$LOG" "--chdir=$ROOT" ${PARTITION:+"--partition=$PARTITION"} \
  ${ACCOUNT:+"--account=$ACCOUNT"} "$ROOT/launch/slurm.sh" job "$@"
if [ -n "$DRY_RUN" ]; then
  echo "# in the job:"
  quoted srun --kill-on-bad-exit=0 "$@"
fi
