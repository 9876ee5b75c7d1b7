#!/usr/bin/env bash
# Plans of training steps on TPUs by the TPU compiler: no TPU is needed. The largest batch a chip that fits, memory, FLOPs and
# collectives of DiT-XL/2, mmDiT-XL/2 at 512, EMD of an ADM and SFD of Stable Diffusion 1.5 on v5e, v5p and v6e, and how
# collectives grow from 4 to 64 chips, unless --recipes or --topologies ask for less. Some 40 programs, of a minute (DiT) to
# 25 (EMD of the ADM, 16 GB); started again, it goes on with what is missing.
#
#   bash launch/plans.sh                            writes runs/plans/report.md and report.json
#   bash launch/plans.sh --recipes dit --topologies v5e:4x4 --level O1           further options: --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare demo
python -c "import libtpu" 2>/dev/null || fail "the TPU compiler is not installed: type $(command -v python) -m pip install --no-deps libtpu"
python launch/plans.py "$@"
