#!/usr/bin/env bash
# Installs what is missing and runs the tests; arguments go to pytest (ci/test.sh -k export). The last line is pytest's own summary.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/ci/install.sh"
cd "$ROOT"
# The embedded server's GPU kernel runs in Triton's interpreter. Triton comes with torch's builds for CUDA only, and lies beside the
# environment, not in it: deepspeed and torch do other things where they find it.
WANTED=$(sed -n 's/^\(triton==[^ ]*\).*/\1/p' images/cuda/lock.txt)
export PIPEDOCK_TRITON=$ROOT/build/triton
if [ "$(cat "$PIPEDOCK_TRITON/installed" 2>/dev/null)" != "$WANTED" ]; then
  say "installing $WANTED ..."
  rm -rf "$PIPEDOCK_TRITON"
  if "$VENV/bin/python" -m pip install --quiet --no-deps --target "$PIPEDOCK_TRITON" "$WANTED" >&2; then
    echo "$WANTED" >"$PIPEDOCK_TRITON/installed"
  else
    say "$WANTED cannot be installed: the GPU kernel is not tested"
  fi
fi
exec "$VENV/bin/python" -m pytest "$@"
