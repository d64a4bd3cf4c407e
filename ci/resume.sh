#!/usr/bin/env bash
# Crashes at length: the writer of checkpoints killed at every point of its work, runs killed rank by rank and resumed, at other
# layouts too. ci/test.sh runs a part of it. Minutes on 2 cores; PIPEDOCK_RESUME_SEED draws other steps.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/ci/install.sh"
cd "$ROOT"
exec env PIPEDOCK_ALL_POINTS=1 "$VENV/bin/python" -m pytest -q -s --durations=5 tests/unit/test_train_crash.py \
  tests/integration/resume_lane.py "$@"
