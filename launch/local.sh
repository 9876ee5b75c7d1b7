#!/usr/bin/env bash
# Train on this machine, with all its devices: NVIDIA GPUs, a TPU VM of one host, or the CPU. The flags are those of
# diffjax.cli.train, see `python -m diffjax.cli.train --help`; the same command goes on after a stop.
#
#   bash launch/local.sh --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher
#   bash launch/local.sh --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher --dry_run
#   bash launch/local.sh --processes=2 --retries=3 --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher
#
# --processes=N (1): as N processes, as on N hosts; each has its share of the cores, of the GPUs, and of the CPU devices
# that XLA_FLAGS=--xla_force_host_platform_device_count=D asks for (one each). --retries=K (0): after a loss of one, or
# another end with code 75, all are started again, at most K times. --dry_run prints what would be installed and run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

own="processes retries" processes=1 retries=0
read_arguments "$@"
whole processes 1
whole retries 0
extras=demo
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  extras=demo,cuda
elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
  extras=demo,tpu
  [ "$processes" = 1 ] || fail "found --processes=$processes, expected 1: the chips of a TPU host belong to one process"
fi
extras=$(with_bucket "$extras")
several=(launch/processes.py "--processes=$processes" "--retries=$retries")
if [ "$dry_run" = yes ]; then
  echo "would install diffjax[$extras] into $(environment), where it is not up to date, and run:"
  if [ "$processes$retries" = 10 ]; then
    echo "python -m diffjax.cli.train$arguments"
  else
    eval "\"$(find_python)\" ${several[*]} --dry_run -- python -m diffjax.cli.train$arguments"
  fi
  exit 0
fi
prepare "$extras"
if [ "$processes$retries" = 10 ]; then
  eval "exec python -m diffjax.cli.train$arguments"
fi
eval "exec python ${several[*]} -- python -m diffjax.cli.train$arguments"
