#!/usr/bin/env bash
# Run the tests, in a virtual environment of their own unless one is active.
#
#   bash launch/test.sh              everything (14 minutes on 2 cores)
#   bash launch/test.sh -m fast      one quick case of each module (2 minutes)
#
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare test
# a process a core, each file in one of them, in the order of conftest.py
python -m pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
