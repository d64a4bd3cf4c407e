# Shared by the scripts of this folder; sourced, never run. Callers have set -euo pipefail already.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${PIPEDOCK_VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-60} PIP_RETRIES=${PIP_RETRIES:-3}

say() { printf '%s\n' "$@" >&2; }

fail() {
  say "${0##*/}: $*"
  exit 1
}

# step WHAT COMMAND...: quiet but alive; the whole output goes to the file $LOG, its end is shown when it fails.
step() {
  local what=$1 begin=$SECONDS
  shift
  say "$what ..."
  "$@" >>"$LOG" 2>&1 || {
    grep -v '^WARNING: Location ' "$LOG" | tail -n 25 >&2
    fail "$what: failed; the whole output is in $LOG"
  }
  say "$what: done in $((SECONDS - begin)) s"
}

# tool NAME==VERSION COMMAND: a checker from the package registry, in a venv of its own beside pipedock's; sets TOOLS to its bin folder.
tool() {
  TOOLS=$VENV/tools/bin
  [ -f "$VENV/tools/$1" ] && return
  [ -x "$TOOLS/python" ] || "$VENV/bin/python" -m venv "$VENV/tools" || return 1
  say "installing $1"
  "$TOOLS/python" -m pip install --quiet --no-deps "$1" >&2 || return 1
  touch "$VENV/tools/$1"
}

# as_root_install PACKAGE...: apt packages, where this machine lets us.
apt_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >&2 && return
  apt-get update >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >&2
}

# free_port: one that no outgoing connection is given.
free_port() {
  "$VENV/bin/python" -c 'from pipeline_train.network import free_port; print(free_port())'
}

# python_of VERSION [NAME]: a Python of that version with venv on standard output: NAME, or else pyenv's, or what the system has.
python_of() {
  local name
  for name in ${2:-"${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python "python$1" python3}; do
    "$name" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null && command -v "$name" && return
  done
  return 1
}
