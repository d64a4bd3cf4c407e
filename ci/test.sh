#!/usr/bin/env bash
# Installs what is missing and runs the tests; arguments go to pytest (ci/test.sh -k export). The last line is pytest's own summary.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/ci/install.sh"
cd "$ROOT"
exec "$VENV/bin/python" -m pytest "$@"
