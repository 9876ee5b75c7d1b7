#!/usr/bin/env bash
# The main job on real images: train a teacher on scikit-learn's digits, distil it with SFD into students of
# 1 to 5 network calls, compare them with training-free solvers. At most 8 minutes on 2 cores after installation.
#
#   bash launch/quickstart.sh            writes runs/quickstart/report.md; run it again to go on after a stop
#   bash launch/quickstart.sh --smoke    the same in small into runs/smoke, two minutes: does everything work here?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

runs=runs/quickstart teacher=() student=() compare=()
case "${1:-}" in
  "") ;;
  --smoke)
    runs=runs/smoke
    teacher=(--config.train.total_images=12800 --config.optim.warmup_images=1280 --config.model.width=64)
    student=(--config.train.total_images=1280)
    compare=(--config.num_samples=200 --config.batch_size=200 --config.calls="(1, 2, 3)")
    ;;
  *) fail "found ${1@Q}, expected nothing or --smoke" ;;
esac
prepare demo

run python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir="$runs/teacher" ${teacher[@]+"${teacher[@]}"}
for calls in 1 2 3 4 5; do
  run python -m diffjax.cli.train --config=configs/quick/sfd_digits.py:$calls --workdir="$runs/student_$calls" \
    --config.method.teacher="$runs/teacher" ${student[@]+"${student[@]}"}
done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_digits.py --workdir="$runs" --config.base="$runs" \
  ${compare[@]+"${compare[@]}"}

cat <<END

The report is $runs/report.md, with pictures beside it and its figures in $runs/report.json.
To try next:
  another number of steps   python -m diffjax.cli.sample --workdir=$runs/teacher --solver=ipndm --num_steps=6 --out=$runs/ipndm
  CIFAR-10                  python -m diffjax.cli.train --config=configs/edm/cifar10_ddpmpp.py --workdir=runs/cifar10 --dry_run
  your own images           --config.data.name=image_folder --config.data.path=FOLDER, see README.md
END
