"""``python -m pipeline_train.report OUT``: write OUT/report.html again."""

import sys
from pathlib import Path

from ..errors import RunFailed, UserError
from . import write

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline_train.report OUT")
    try:
        print(write(Path(sys.argv[1])))
    except (UserError, RunFailed) as problem:
        print("report: %s" % problem, file=sys.stderr)
        sys.exit(2 if isinstance(problem, UserError) else 1)
