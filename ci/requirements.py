"""Prints the requirements of pyproject.toml, one a line: the project's own and those of the extras named as arguments.

An image installs them in a layer of their own, so that a change of the code does not install everything again.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pip brings the same parser
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
unknown = [name for name in sys.argv[1:] if name not in extras]
if unknown:
    sys.exit("pyproject.toml has no extra %s; it has %s" % (", ".join(unknown), ", ".join(extras)))
print("\n".join(project["dependencies"] + [line for name in sys.argv[1:] for line in extras[name]]))
