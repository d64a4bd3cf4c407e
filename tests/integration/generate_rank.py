"""One rank of tests/integration/test_ds_generate.py: generates with one model after the other. Arguments: prompts, folders."""

import sys

from pipeline_train.leaving import leave
from serve.ds_generate import main

if __name__ == "__main__":
    rank, prompts, folders = sys.argv[1], sys.argv[2], sys.argv[3:]
    leave(max(main([rank, "--model", folder, "--prompts", prompts, "--max-new-tokens", "9", "--batch", "2"]) for folder in folders))
