#!/usr/bin/env bash
# Break trainings of several processes on this machine in every way that a pod breaks them, and see that they end in a
# clear message and go on to the same bits. About 15 minutes on 2 cores.
#
#   bash launch/faults.sh                        writes runs/faults/report.md and .json, table `faults`
#   bash launch/faults.sh --only=kill_one,nan_on_one_host --out=runs/faults_some
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

prepare demo,bucket
exec python launch/faults.py "$@"
