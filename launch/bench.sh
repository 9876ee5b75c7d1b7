#!/usr/bin/env bash
# Time per image of DDPM++ (2.2 and 55.7 million parameters, 32x32), train step and forward pass, beside eager
# PyTorch on the same machine in the same run. Four minutes on 2 cores; keep the machine quiet meanwhile.
#
#   bash launch/bench.sh                     writes runs/bench/report.md and report.json
#   bash launch/bench.sh --networks 2.2M     further options: --help
#   bash launch/bench.sh assign              what assigned noise costs: solvers, and steps beside those without it;
#                                            a quarter of an hour, writes runs/bench_assign
#   bash launch/bench.sh latent              DiT, Stable Diffusion's U-Net and decoder beside diffusers' classes, and compile
#                                            time of DiT-XL/2; a quarter of an hour, writes runs/bench_latent
#   bash launch/bench.sh data                images/s of reading cached latents beside those of training a tiny DiT; two
#                                            minutes, writes runs/bench_data
#   bash launch/bench.sh video               slices and step rehash of an SVD-like U-Net beside the same without; ten
#                                            minutes, writes runs/bench_video
#   bash launch/bench.sh metrics             features/s of FID's Inception beside pytorch-fid's, and memory of the moments of
#                                            50,000; three minutes, writes runs/bench_metrics
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare test
if [ "${1:-}" = assign ]; then
  shift
  exec python launch/bench_assign.py "$@"
fi
if [ "${1:-}" = data ]; then
  shift
  exec python launch/bench_data.py "$@"
fi
if [ "${1:-}" = video ]; then
  shift
  exec python launch/bench_video.py "$@"
fi
python -c "import torch" 2>/dev/null || fail "PyTorch is the yardstick and is not installed: type python -m pip install torch"
if [ "${1:-}" = latent ]; then
  shift
  exec python launch/bench_latent.py "$@"
fi
if [ "${1:-}" = metrics ]; then
  shift
  exec python launch/bench_metrics.py "$@"
fi
python launch/bench.py "$@"
