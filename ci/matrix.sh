#!/usr/bin/env bash
# The pipeline against transformers in one process, every case of tests/integration/matrix.py; prints their number and worst figures.
# ci/test.sh runs a part of them. Minutes on 2 cores.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/ci/install.sh"
cd "$ROOT"
FIGURES=$(mktemp)
trap 'rm -f "$FIGURES"' EXIT
code=0
PIPEDOCK_MATRIX=$FIGURES "$VENV/bin/python" -m pytest -q --durations=5 tests/integration/test_train_equals_hf.py "$@" || code=$?
cat "$FIGURES"
exit "$code"
