"""Writes DIR/etc/pip.conf and copies torch wheels: pip inside the stand-in base image then reaches what pip on this machine does.

    python3 ci/standin_pip.py DIR TORCH_VERSION PYTHON_TAG

Takes over this machine's index, proxy and trust settings; its paths are left out, except that a torch wheel of the wanted version
in a ``find-links`` folder comes along (``DIR/opt/wheels``): elsewhere it may only exist as a CUDA build of several GB.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

CARRIED = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries")
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # where ci/standin-base.sh puts this machine's


def host_config() -> Dict[str, str]:
    """pip's settings by bare key; the environment wins over files, as in pip itself."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found: Dict[str, str] = {}
    for line in sorted(listing.splitlines(), key=lambda text: text.startswith(":env:")):
        name, sign, value = line.partition("=")
        if sign:
            found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    return found


def remote(value: str) -> str:
    """The part of a space-separated setting that is not a path of this machine."""
    return " ".join(item for item in value.split() if not item.startswith(("file:", "/", ".", "~")))


def torch_wheels(find_links: str, version: str, python_tag: str) -> List[Path]:
    folders = [Path(item).expanduser() for item in find_links.split() if "://" not in item]
    return sorted(w for f in folders if f.is_dir() for w in f.glob("torch-%s*-%s-*.whl" % (version, python_tag)))


def main(target: str, version: str, python_tag: str) -> None:
    config, root = host_config(), Path(target)
    lines = ["[global]", "cert = " + CA_BUNDLE, "disable-pip-version-check = true"]
    lines += ["%s = %s" % (key, remote(config[key])) for key in CARRIED if remote(config.get(key, ""))]
    wheels = torch_wheels(config.get("find-links", ""), version, python_tag)
    if wheels:
        (root / "opt/wheels").mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            shutil.copy(wheel, root / "opt/wheels")
        lines.append("find-links = /opt/wheels")
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/pip.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
