#!/usr/bin/env bash
# Memory of DiT-XL/2's training step on 16 TPU v5e chips and the largest batch that fits, by the TPU compiler: no TPU is
# needed. About a minute for each batch tried on 2 cores.
#
#   bash launch/fit_tpu.sh                          writes runs/fit_tpu/report.md and report.json
#   bash launch/fit_tpu.sh --layouts all --images 32 48 --learned_variance        further options: --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare demo
python -c "import libtpu" 2>/dev/null || fail "the TPU compiler is not installed: type python -m pip install --no-deps libtpu"
python launch/fit_tpu.py "$@"
