#!/bin/sh
# ssh between the nodes of a training, inside the containers.
#   ssh.sh keys   makes the keys in $SSH_KEYS unless they are there: one pair that opens every node, and the nodes' own
#   ssh.sh serve  sshd on $SSH_PORT, never on the host's own, for who holds these keys; as the user that it runs as
# Every node gets the same folder, copied by its owner; no image has a key.
set -eu
umask 077

case ${1:-} in
  keys)
    mkdir -p "$SSH_KEYS"
    [ -f "$SSH_KEYS/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C pipedock -f "$SSH_KEYS/id_ed25519"
    [ -f "$SSH_KEYS/host_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C pipedock -f "$SSH_KEYS/host_ed25519"
    cp "$SSH_KEYS/id_ed25519.pub" "$SSH_KEYS/authorized_keys"
    printf '* %s\n' "$(cut -d ' ' -f 1,2 "$SSH_KEYS/host_ed25519.pub")" >"$SSH_KEYS/known_hosts"
    ;;
  serve)
    if [ ! -f "$SSH_KEYS/host_ed25519" ] || [ ! -f "$SSH_KEYS/authorized_keys" ]; then
      echo "sshd: no keys in $SSH_KEYS; \`docker compose run --rm keys\` makes them, once; every node needs the same ones" >&2
      exit 2
    fi
    # What a rank needs of this container's environment; who comes by ssh gets an empty one.
    set --
    for name in PATH HOME LD_LIBRARY_PATH PYTHONSAFEPATH PYTHONUNBUFFERED HF_HOME HF_TOKEN XDG_CACHE_HOME OMP_NUM_THREADS \
      CUDA_VISIBLE_DEVICES; do
      value=$(printenv "$name" || true)
      [ -z "$value" ] || set -- "$@" "$name=$value"
    done
    conf=$(mktemp)
    cat >"$conf" <<END
Port $SSH_PORT
HostKey $SSH_KEYS/host_ed25519
AuthorizedKeysFile $SSH_KEYS/authorized_keys
StrictModes no
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers $(id -un)
AllowTcpForwarding no
X11Forwarding no
PrintMotd no
SetEnv $*
END
    exec /usr/sbin/sshd -D -e -f "$conf"
    ;;
  *)
    echo "usage: ssh.sh keys | serve" >&2
    exit 2
    ;;
esac
