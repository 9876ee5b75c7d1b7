#!/usr/bin/env bash
# Run the tests, in a virtual environment of their own unless one is active.
#
#   bash launch/test.sh              everything (25 minutes on 2 cores)
#   bash launch/test.sh -m fast      one quick case of each module (3 minutes)
#
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare test
python -m pytest tests "$@"
