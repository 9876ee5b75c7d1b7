#!/usr/bin/env bash
# Immiscible diffusion on digits: consistency training, flow matching and DDPM, each with noise as drawn, assigned
# exactly, by auction and nearest of 8; class-conditional with noise as drawn, assigned exactly over the batch, and within
# each class; three seeds, 63 runs of a minute or so each.
#
#   bash launch/immiscible_digits.sh            writes runs/immiscible_digits/report.md; run it again to go on after a stop
#   bash launch/immiscible_digits.sh --smoke    the same in small into runs/smoke_immiscible: does everything work here?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

base=runs/immiscible_digits seeds=(0 1 2) train=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    base=runs/smoke_immiscible seeds=(0)
    train=(--config.train.total_images=5120 --config.train.keep_every_steps=10 --config.train.checkpoint_every_steps=10)
    compare=(--config.num_samples=200 --config.batch_size=200 --config.seeds="(0,)" --config.batches="(16,)" --config.gaussians_updates=500)
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo

for seed in "${seeds[@]}"; do
  for objective in consistency flow ddim; do
    for variant in none linear auction knn labels_none labels_linear labels_class; do
      run python -m diffjax.cli.train --config="configs/quick/immiscible_digits.py:${objective}_$variant" \
        --workdir="$base/seed_$seed/${objective}_$variant" --config.seed="$seed" ${train[@]+"${train[@]}"}
    done
  done
done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_immiscible.py --workdir="$base" --config.base="$base" \
  ${compare[@]+"${compare[@]}"}
echo
echo "The report is $base/report.md, with pictures beside it and its figures in $base/report.json."
