#!/usr/bin/env bash
# Exports written by the current stack load in the oldest and the newest transformers, with the same logits and ids: 5 in an environment of
# its own that borrows the current stack's torch, 4.30 in the pinned stack's where ci/pinned.sh made one. Arguments go to pytest.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FIVE=$ROOT/build/transformers5
WANTED=transformers==5.24.0

bash "$ROOT/ci/install.sh"
if [ "$(cat "$FIVE/installed" 2>/dev/null)" != "$WANTED" ]; then
  say "installing $WANTED ..."
  "$VENV/bin/python" -m venv --clear "$FIVE"
  "$FIVE/bin/python" -m pip install --quiet "$WANTED" sentencepiece protobuf >&2 || fail "$WANTED cannot be installed"
  # Behind its own packages: torch, and nothing that is there already.
  "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$FIVE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  echo "$WANTED" >"$FIVE/installed"
fi
OTHERS=$FIVE/bin/python
PINNED=${PIPEDOCK_PINNED_VENV:-$ROOT/.venv-pinned}/bin/python
if [ -x "$PINNED" ]; then OTHERS=$OTHERS:$PINNED; else say "transformers: 4.30 is not tried, ci/pinned.sh makes its environment"; fi
cd "$ROOT"
PIPEDOCK_OTHER_TRANSFORMERS=$OTHERS exec "$VENV/bin/python" -m pytest tests/roundtrip/test_other_transformers.py "$@"
