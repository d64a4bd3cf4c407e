#!/usr/bin/env bash
# Opens a run's report.html in a headless Chromium, which it installs where it may (Debian/Ubuntu, as root). Exits with 77 where
# there is none. ci/test.sh runs the same tests once a Chromium is there.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

found() { command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable; }

bash "$ROOT/ci/install.sh"
if ! found >/dev/null; then
  say "installing Chromium ..."
  apt_install chromium 2>/dev/null || {
    say "no Chromium: install one (Debian/Ubuntu, as root: apt-get install chromium)"
    exit 77
  }
fi
cd "$ROOT"
exec "$VENV/bin/python" -m pytest tests/integration/test_report_browser.py "$@"
