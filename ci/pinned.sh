#!/usr/bin/env bash
# The pinned stack (Python 3.8, torch 1.13.1, DeepSpeed 0.9.2, transformers 4.30.2) in an environment of its own: the unit, parity,
# round-trip, gradient and resume tests on it, then one run continued from this stack to the current one and back. Arguments go to pytest.
# Exit 77: no Python 3.8 is here, nothing was tested. PIPEDOCK_PINNED_PYTHON names one, PIPEDOCK_PINNED_VENV another folder.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PINNED=${PIPEDOCK_PINNED_VENV:-$ROOT/.venv-pinned}
case $PINNED in /*) ;; *) PINNED=$PWD/$PINNED ;; esac
CONSTRAINTS=$ROOT/ci/constraints-pinned.txt
STAMP=$PINNED/pipedock-installed
LOG=$PINNED/install.log

# What the installation depends on: another answer means install again.
identity() {
  { echo "$ROOT"; "$PINNED/bin/python" -V; cat "$ROOT/pyproject.toml" "$CONSTRAINTS" "$ROOT"/ci/{pinned.sh,install_torch.py}; } | sha256sum
}

install() {
  if ! "$PINNED/bin/python" -m pip --version >/dev/null 2>&1; then
    # --clear empties the folder: only one that is ours to empty.
    [ -z "$(ls -A "$PINNED" 2>/dev/null)" ] || [ -f "$PINNED/pyvenv.cfg" ] || fail "$PINNED is not empty and no virtual environment; name another PIPEDOCK_PINNED_VENV"
    say "creating $PINNED with $PYTHON"
    "$PYTHON" -m venv --clear "$PINNED"
  fi
  rm -f "$STAMP"
  : >"$LOG"
  local pip=("$PINNED/bin/python" -m pip install -c "$CONSTRAINTS" --progress-bar off)
  step "installing the tools that build DeepSpeed" "${pip[@]}" setuptools wheel
  step "installing torch" "$PINNED/bin/python" "$ROOT/ci/install_torch.py" "$CONSTRAINTS"
  step "installing pipedock and its libraries" "${pip[@]}" -e "${ROOT}[train,test,parquet,json5]"
  identity >"$STAMP"
}

PYTHON=$(python_of 3.8 "${PIPEDOCK_PINNED_PYTHON:-}") || {
  say "pinned: SKIPPED, no Python 3.8 with venv is here (pyenv install 3.8, or PIPEDOCK_PINNED_PYTHON)"
  exit 77
}
[ -f "$STAMP" ] && [ "$(identity)" = "$(cat "$STAMP")" ] || install
# The other stack, for tests/integration/test_two_stacks.py; without it they are skipped.
[ ! -x "$VENV/bin/pipedock" ] || export PIPEDOCK_OTHER_PYTHON=$VENV/bin/python
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Not here: serve/, which is for Python >= 3.10; bench, whose peers are today's; a browser's and a file system's behaviour, which no
# stack changes.
OTHERS=()
for name in serve_ limits check_verb prove ask_chat client_ bench report_browser train_crash; do
  OTHERS+=("--ignore-glob=*/test_$name*")
done
exec "$PINNED/bin/python" -m pytest -p no:cacheprovider --durations=15 "${OTHERS[@]}" tests/unit tests/parity tests/roundtrip tests/integration "$@"
