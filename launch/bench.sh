#!/usr/bin/env bash
# Time per image of DDPM++ (2.2 and 55.7 million parameters, 32x32), train step and forward pass, beside eager
# PyTorch on the same machine in the same run. Four minutes on 2 cores; keep the machine quiet meanwhile.
#
#   bash launch/bench.sh                     writes runs/bench/report.md and report.json
#   bash launch/bench.sh --networks 2.2M     further options: --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare test
python -c "import torch" 2>/dev/null || fail "PyTorch is the yardstick and is not installed: type python -m pip install torch"
python launch/bench.py "$@"
