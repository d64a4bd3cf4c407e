#!/bin/sh
# Runs the command as whoever owns the mounted folder, so that what it writes belongs to the person who started it, never to root by
# accident. `docker run --user` has the last word, and rootless engines are left alone (there, root is that person already).
set -eu

if [ "$(id -u)" = 0 ]; then
  owner=$(stat -c '%u:%g' "$PIPEDOCK_MOUNT")
  if [ "${owner%%:*}" != 0 ]; then
    # ssh and sshd know only users with a name.
    sed -i "s/^pipedock:x:[0-9]*:[0-9]*:/pipedock:x:$owner:/" /etc/passwd
    set -- setpriv --reuid "${owner%%:*}" --regid "${owner##*:}" --clear-groups -- "$@"
  fi
fi
# Any user id works: libraries that ask for a name or a home get one.
export HOME=/tmp USER=pipedock LOGNAME=pipedock
exec "$@"
