#!/usr/bin/env bash
# Two nodes on this machine: two launchers, a folder each, over the loopback interface. Every way in which a node or a rank ends, a
# shared disk, four ranks, other data; and both started from one by a hostfile over an sshd of the test's own (skipped where there is no
# openssh-server; pdsh's part where there is no pdsh); what two have left, gathered and gone on with on one.
# ci/test.sh runs a part of it. Minutes on 2 cores.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/ci/install.sh"
cd "$ROOT"
exec "$VENV/bin/python" -m pytest -q --durations=5 tests/integration/teams_lane.py tests/integration/nodes_lane.py \
  tests/integration/nodes_ssh_lane.py \
  tests/integration/gather_lane.py "$@"
