#!/usr/bin/env bash
# Video on a CPU: trains a small AnimateDiff on a digit that moves and a small Stable Video Diffusion on three real clips,
# and makes clips with both, whole and in slices, with all steps and with 13 of 25. An hour on a core of an AMD EPYC that other work shares.
#
#   bash launch/video_demo.sh          writes runs/video_demo/report.md, with .gif and .mp4; run it again after a stop
#   bash launch/video_demo.sh --smoke  the same in small into runs/smoke_video: does everything work?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

base=runs/video_demo train=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    base=runs/smoke_video
    train=(--config.train.total_images=16 --config.train.checkpoint_every_steps=2)
    compare=(--config.num_clips=1 --config.num_steps=5 --config.full_steps=3 --config.rounds=1
      --config.measured.frames=4 --config.measured.size=16)
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo,video

for name in digits clips; do
  run python -m diffjax.cli.train --config="configs/quick/video_$name.py" --workdir="$base/$name" ${train[@]+"${train[@]}"}
done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_video.py --workdir="$base" --config.base="$base" \
  ${compare[@]+"${compare[@]}"}
echo
echo "The report is $base/report.md, with clips beside it and its figures in $base/report.json."
