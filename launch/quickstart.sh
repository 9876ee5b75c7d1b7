#!/usr/bin/env bash
# The main job on real images: train a teacher on scikit-learn's digits, distil it with SFD into students of
# 1 to 5 network calls, compare them with training-free solvers. About 8 minutes on 2 cores after installation.
#
#   bash launch/quickstart.sh        writes runs/quickstart/report.md; run it again to go on after a stop
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare demo
run() {
  echo
  echo "> $*"
  "$@"
}
run python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir=runs/quickstart/teacher
for calls in 1 2 3 4 5; do
  run python -m diffjax.cli.train --config=configs/quick/sfd_digits.py:$calls --workdir=runs/quickstart/student_$calls
done
run python -m diffjax.cli.evaluate --config=configs/quick/compare_digits.py --workdir=runs/quickstart
cat <<'END'

The report is in runs/quickstart/report.md, its figures in runs/quickstart/report.json.
To try next:
  CIFAR-10      python -m diffjax.cli.train --config=configs/edm/cifar10_ddpmpp.py --workdir=runs/cifar10 --dry_run
  your images   add --config.data.name=image_folder --config.data.path=FOLDER
END
