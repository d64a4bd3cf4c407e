#!/usr/bin/env bash
# Builds a base image for the Dockerfiles where no image registry can be reached, from this machine's own apt mirror; prints its tag on
# the last line. Needs root, debootstrap and a Docker engine.
#
#   export BASE_IMAGE=$(bash ci/standin-base.sh | tail -n1)
#
# It is a minimal Debian or Ubuntu of this machine's release, with this machine's certificates, apt and pip settings. An image that was
# built from the same settings is reused.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CA_BUNDLE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
TORCH=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$ROOT/ci/constraints-current.txt")

release() { (. /etc/os-release && printf '%s' "$VERSION_CODENAME"); }

# "MIRROR KEYRING" of this release's main component, from apt's own view of its sources.
mirror() {
  apt-get indextargets --format "\$(REPO_URI) \$(RELEASE) \$(COMPONENT) \$(SIGNED_BY)" "Created-By: Packages" |
    awk -v release="$(release)" '$2 == release && $3 == "main" && !found++ { print $1, $4 }' # to the end: no broken pipe for apt
}

apt_settings() { apt-config dump | grep -E '^Acquire::(http|https|Check)' || true; }

proxy_of() { apt-config dump "Acquire::$1::Proxy" | sed -n 's/.*"\(.*\)";/\1/p' | tail -n1; }

bootstrap() { # DIR
  local dir=$1 site keyring
  local -a options=(--variant=minbase "--include=ca-certificates,python3")
  [ "$( (. /etc/os-release && echo "$ID"))" != ubuntu ] || options+=("--components=main,universe") # python3-venv is there
  read -r site keyring < <(mirror) || fail "apt names no mirror for \"$(release)\" main; see /etc/apt/sources.list"
  [ -f "${keyring:-}" ] && options+=("--keyring=$keyring")
  say "debootstrap $(release) ..."
  http_proxy=${http_proxy:-$(proxy_of http)} https_proxy=${https_proxy:-$(proxy_of https)} \
    debootstrap "${options[@]}" "$(release)" "$dir" "$site" >"$dir.log" 2>&1 || {
    tail -n 20 "$dir.log" >&2
    fail "debootstrap failed"
  }
  apt_settings >"$dir/etc/apt/apt.conf.d/90standin"
  cp -L "$CA_BUNDLE" "$dir/etc/ssl/certs/ca-certificates.crt"
  python3 "$ROOT/ci/standin_pip.py" "$dir" "$TORCH" "$(chroot "$dir" python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
  rm -rf "$dir"/var/cache/apt/* "$dir"/var/lib/apt/lists/*
}

command -v docker >/dev/null || fail "docker is not installed"
[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
command -v debootstrap >/dev/null || apt_install debootstrap || fail "debootstrap is not installed"

settings() {
  cat "$ROOT/ci/standin-base.sh" "$ROOT/ci/standin_pip.py" "$CA_BUNDLE"
  mirror
  apt_settings
  python3 -m pip config list
  echo "$TORCH"
}

identity=$(settings | sha256sum | cut -c1-12)
tag=pipedock-standin:$(release)-$identity
if docker image inspect "$tag" >/dev/null 2>&1; then
  say "reusing $tag"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  bootstrap "$work/root"
  say "importing $tag ..."
  tar -C "$work/root" --one-file-system -c . | docker import --change 'CMD ["bash"]' - "$tag" >/dev/null
fi
echo "$tag"
