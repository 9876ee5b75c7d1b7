#!/usr/bin/env bash
# SFD in full on scikit-learn's digits: students of 1 to 5 calls, SFD-v, the second stage, and the baselines
# (progressive distillation, AMED-Plugin, GITS, every training-free solver), three training seeds. About half an hour
# on 2 cores after installation.
#
#   bash launch/sfd_digits.sh            writes runs/sfd_digits/report.md; run it again to go on after a stop
#   bash launch/sfd_digits.sh --smoke    the same in small into runs/smoke_sfd_digits: does everything work here?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_sfd.sh"

base=runs/sfd_digits seeds=(0 1 2) teacher=() student=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    base=runs/smoke_sfd_digits seeds=(0)
    teacher=(--config.train.total_images=12800 --config.optim.warmup_images=1280 --config.model.width=64)
    student=(--config.train.total_images=1280)
    compare=(--config.num_samples=200 --config.batch_size=200 --config.calls="(1, 2, 3)" --config.seeds="(0,)")
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo

run python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir="$base/teacher" ${teacher[@]+"${teacher[@]}"}
for seed in "${seeds[@]}"; do students digits "$base" "$seed" ${student[@]+"${student[@]}"}; done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_sfd.py:digits --workdir="$base" \
  --config.base="$base" ${compare[@]+"${compare[@]}"}
echo
echo "The report is $base/report.md, with pictures beside it and its figures in $base/report.json."
