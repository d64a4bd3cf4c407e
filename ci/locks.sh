#!/usr/bin/env bash
# Tests images/*/lock.txt: they say what the constraints give; those of the cpu and cu116 stacks are installed, every file checked against
# its hash, and import what matters; that of the cuda stack, gigabytes, is resolved without installing. `--write` writes them again.
# Exit 77: neither Python 3.11 nor 3.8 is here, nothing was installed.
#
# The one wheel that a lock does not hold is linked from .venv or .venv-pinned where one has its release, else installed as ci/ does.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

install_lock() { # STACK PYTHON CONSTRAINTS OTHER_PYTHON CODE
  local dir=$WORK/$1 release
  local -a python=("$dir/bin/python")
  release=$(sed -n 's/^# elsewhere: torch==\([^+]*\).*/\1/p' "$ROOT/images/$1/lock.txt")
  "$2" -m venv "$dir"
  if ! "${python[@]}" "$ROOT/ci/link_torch.py" "$4" "$release"; then
    "${python[@]}" "$ROOT/ci/install_torch.py" "$ROOT/ci/$3"
  fi
  "${python[@]}" "$ROOT/images/install_lock.py" "$ROOT/images/$1/lock.txt"
  (cd "$ROOT" && "${python[@]}" -c "$5")
  # The example of compose/run.yaml, made as the train service makes it, up to where pipedock would begin.
  mkdir -p "$dir"/work/{data,models,runs,exports}
  printf '#!/bin/sh\n' >"$dir/bin/pipedock"
  chmod +x "$dir/bin/pipedock"
  (cd "$dir/work" && PATH=$dir/bin:$PATH PYTHONPATH=$ROOT "${python[@]}" "$ROOT/compose/road.py" train "$ROOT/compose/run.yaml")
}

bash "$ROOT/ci/install.sh"
tool uv==0.13.8 || fail "uv cannot be installed"
export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt} # uv's own list may lack this network's
if [ "${1:-}" = --write ]; then
  exec "$VENV/bin/python" "$ROOT/ci/lock.py" "$TOOLS/uv" write
fi

declare -A JOBS=()
begin() { # STACK VERSION NAME, then install_lock's
  local python
  python=$(python_of "$2" "$3") || {
    say "locks: images/$1/lock.txt NOT installed, no Python $2 is here"
    return 0
  }
  install_lock "$1" "$python" "${@:4}" >"$WORK/$1.log" 2>&1 &
  JOBS[$1]=$!
}

begin cpu 3.11 '' constraints-current.txt "$VENV/bin/python" \
  'import deepspeed, transformers, starlette, sentencepiece, google.protobuf, pyarrow; import pipeline_train.loop, export, serve.embedded'
begin cu116 3.8 "${PIPEDOCK_PINNED_PYTHON:-}" constraints-pinned.txt "${PIPEDOCK_PINNED_VENV:-$ROOT/.venv-pinned}/bin/python" \
  'import deepspeed, transformers, sentencepiece, google.protobuf, pyarrow, lion_pytorch; import pipeline_train.loop, export'

"$VENV/bin/python" "$ROOT/ci/lock.py" "$TOOLS/uv" check
"$TOOLS/uv" pip install --no-config --native-tls --dry-run --quiet --require-hashes --target "$WORK/cuda" \
  --python-version 3.12 --python-platform x86_64-manylinux_2_28 -r "$ROOT/images/cuda/lock.txt"
say "locks: cuda, every pin found with its hash (not installed)"

failed=()
for stack in "${!JOBS[@]}"; do
  if wait "${JOBS[$stack]}"; then
    say "locks: $stack, installed with hashes and imported"
  else
    grep -v '^WARNING: Location ' "$WORK/$stack.log" | tail -n 25 >&2
    failed+=("$stack")
  fi
done
[ ${#failed[@]} = 0 ] || fail "these locks cannot be installed: ${failed[*]}"
[ ${#JOBS[@]} != 0 ] || exit 77
