#!/usr/bin/env bash
# Train in a Slurm job, a process on each of its nodes. The flags are those of diffjax.cli.train. Five minutes before its
# time is up the job gets SIGTERM, saves, and queues itself again, until the run is complete; so it does when a process
# was lost. It stops after an error (code 1) or a mistake (code 2).
#
#   bash launch/slurm.sh --config=configs/edm/cifar10_ddpmpp.py --workdir=runs/cifar10 --dry_run
#   SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=8 bash launch/slurm.sh --nodes=4 --config=... --workdir=...
#
# --nodes=N (1); --workdir must then lie on a disk that all nodes share. --retries=K (100): how often it is queued again
# at most. --dry_run prints the job and ends. Slurm's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT,
# SBATCH_TIMELIMIT, ...; man sbatch) go before the job's defaults. Packages are installed here, since nodes seldom reach
# a network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

own="nodes retries" nodes=1 retries=100
read_arguments "$@"
whole nodes 1
whole retries 0
processes=slurm
[ "$nodes" != 1 ] || processes=one
job="#!/usr/bin/env bash
#SBATCH --job-name=diffjax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=\"$workdir/slurm_%j.log\"
cd ${PWD@Q} || exit 2
export JAX_COMPILATION_CACHE_DIR=${PWD@Q}/.cache/jax
export SRUN_CPUS_PER_TASK=\"\$SLURM_CPUS_PER_TASK\" # from Slurm 22.05 on srun takes one core unless told
code=0
srun --kill-on-bad-exit=0 --label $(printf %q "$(environment)/bin/python") -m diffjax.cli.train --processes=$processes$arguments || code=\$?
# 75: stopped and saved, or a process was lost; above 128: the code of a lost one
if { [ \"\$code\" = 75 ] || [ \"\$code\" -gt 128 ]; } && [ \"\${SLURM_RESTART_COUNT:-0}\" -lt $retries ]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$code\""
if [ "$dry_run" = yes ]; then
  echo "$job"
  exit 0
fi
command -v sbatch >/dev/null || fail "found no sbatch: run this where Slurm's commands are, or use launch/local.sh"
prepare "$(with_bucket demo,cuda)"
mkdir -p "$workdir"
sbatch <<<"$job"
