#!/usr/bin/env bash
# One-step generators of the digits teacher: Diff-Instruct, DMD, EMD with 1, 4 and 16 Langevin steps, three training
# seeds, and EMD-16 without noise cancellation: 16 runs of 5 to 17 minutes each, two and a half hours on one core.
#
#   bash launch/emd_digits.sh            writes runs/emd_digits/report.md; run it again to go on after a stop
#   bash launch/emd_digits.sh --smoke    the same in small into runs/smoke_emd_digits: does everything work here?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

base=runs/emd_digits seeds=(0 1 2) teacher=() student=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    base=runs/smoke_emd_digits seeds=(0)
    teacher=(--config.train.total_images=12800 --config.optim.warmup_images=1280 --config.model.width=64)
    student=(--config.train.total_images=2560)
    compare=(--config.num_samples=200 --config.batch_size=200 --config.seeds="(0,)")
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo

run python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir="$base/teacher" ${teacher[@]+"${teacher[@]}"}
for seed in "${seeds[@]}"; do
  variants=(diff_instruct dmd emd_1 emd_4 emd_16)
  if [ "$seed" = 0 ]; then variants+=(emd_16_raw); fi
  for variant in "${variants[@]}"; do
    run python -m diffjax.cli.train --config="configs/quick/emd_digits.py:$variant" \
      --workdir="$base/seed_$seed/$variant" --config.method.teacher="$base/teacher" --config.seed="$seed" \
      ${student[@]+"${student[@]}"}
  done
done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_emd.py --workdir="$base" --config.base="$base" \
  ${compare[@]+"${compare[@]}"}
echo
echo "The report is $base/report.md, with pictures beside it and its figures in $base/report.json."
