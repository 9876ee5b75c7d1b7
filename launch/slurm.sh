#!/usr/bin/env bash
# Train in a Slurm job on one node. The flags are those of diffjax.cli.train. Five minutes before its time is up the
# job gets SIGTERM, saves, and queues itself again, until the run is complete.
#
#   bash launch/slurm.sh --config=configs/edm/cifar10_ddpmpp.py --workdir=runs/cifar10 --dry_run
#   SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=8:00:00 bash launch/slurm.sh --config=... --workdir=...
#
# --dry_run prints the job and ends. Slurm's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_GPUS_PER_NODE, ...;
# man sbatch) go before the job's defaults. Packages are installed here, since nodes seldom reach a network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

read_arguments "$@"
job="#!/usr/bin/env bash
#SBATCH --job-name=diffjax
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=\"$workdir/slurm_%j.log\"
cd ${PWD@Q}
export JAX_COMPILATION_CACHE_DIR=${PWD@Q}/.cache/jax
code=0
srun $(printf %q "$(environment)/bin/python") -m diffjax.cli.train$arguments || code=\$?
if [ \"\$code\" = 75 ]; then # stopped and saved
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$code\""
if [ "$dry_run" = yes ]; then
  echo "$job"
  exit 0
fi
command -v sbatch >/dev/null || fail "found no sbatch: run this where Slurm's commands are, or use launch/local.sh"
prepare demo,cuda
mkdir -p "$workdir"
sbatch <<<"$job"
