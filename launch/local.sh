#!/usr/bin/env bash
# Train on this machine, with all its devices: NVIDIA GPUs, a TPU VM of one host, or the CPU. The flags are those of
# diffjax.cli.train, see `python -m diffjax.cli.train --help`; the same command goes on after a stop.
#
#   bash launch/local.sh --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher
#   bash launch/local.sh --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher --dry_run
#
# --dry_run prints what would be installed and run, and ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

read_arguments "$@"
extras=demo
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  extras=demo,cuda
elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
  extras=demo,tpu
fi
if [ "$dry_run" = yes ]; then
  echo "would install diffjax[$extras] into $(environment), where it is not up to date, and run:"
  echo "python -m diffjax.cli.train$arguments"
  exit 0
fi
prepare "$extras"
exec python -m diffjax.cli.train "$@"
