#!/usr/bin/env bash
# Memory of SVD, SVD-XT and AnimateDiff at 576 x 1024 on one TPU chip, unsliced and in slices, by the TPU compiler: no
# TPU is needed. 1 to 8 minutes for each program on 2 cores, 24 programs; started again, it goes on with what is missing.
#
#   bash launch/video_memory.sh                     writes runs/video_memory/report.md and report.json
#   bash launch/video_memory.sh --models svd --plans tight unsliced               further options: --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare demo
python -c "import libtpu" 2>/dev/null || fail "the TPU compiler is not installed: type python -m pip install --no-deps libtpu"
python launch/video_memory.py "$@"
