"""Links the torch of another environment into this one, so that ci/locks.sh need not download gigabytes again.

    PYTHON ci/link_torch.py OTHER_PYTHON RELEASE

Run by the environment that gets it. Exit 1: the other one does not exist, has another Python or another release of torch.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ASK = """
import importlib.metadata as m, json, sys
found = [d for d in m.distributions() if d.metadata["Name"].split("-")[0] in ("torch", "triton", "nvidia", "cuda")]
tops = {str(d.locate_file(f.parts[0])) for d in found for f in d.files if f.parts[0] not in ("..", "__pycache__")}
print(json.dumps([sys.version_info[:2], m.version("torch"), sorted(tops)]))
"""


def main(python: str, release: str) -> int:
    try:
        done = subprocess.run([python, "-c", ASK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 1
    version, torch, tops = json.loads(done.stdout.decode())
    if tuple(version) != sys.version_info[:2] or torch.partition("+")[0] != release:
        return 1
    for top in tops:
        link = Path(sysconfig.get_paths()["purelib"], Path(top).name)
        if not link.exists():
            link.symlink_to(top)
    print("torch %s: linked" % torch)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
