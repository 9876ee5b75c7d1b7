#!/usr/bin/env bash
# Memory of a training step on TPUs, the largest batch that fits, FLOPs and collectives, by the TPU compiler: no TPU is
# needed. Of DiT-XL/2 on 16 v5e chips, or of a recipe on others; one to five minutes for each batch tried on 2 cores.
#
#   bash launch/fit_tpu.sh                          writes runs/fit_tpu/report.md and report.json
#   bash launch/fit_tpu.sh --layouts all --images 32 48 --learned_variance        further options: --help
#   bash launch/fit_tpu.sh --model mmdit_256_improved --topology v5p:2x4x4 --layouts optimiser --images 64
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare demo
python -c "import libtpu" 2>/dev/null ||
  fail "the TPU compiler is not installed: type python -m pip install --no-deps libtpu"
python launch/fit_tpu.py "$@"
