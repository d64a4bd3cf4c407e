#!/usr/bin/env python3
"""In the place of ssh: runs the command here, in the folder that stands for the host's disk; see test_train_gather_ssh.py.

$FAKE_HOSTS: JSON, host -> folder; one that is not there cannot be reached. $FAKE_LOG: the arguments go there, a JSON list per call.
"""

import json
import os
import sys

LETTERS = "bcDEeFIiJLlmOopQRSWw"  # ssh's options that take an argument

with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\n")
arguments = sys.argv[1:]
while arguments and arguments[0].startswith("-"):
    option = arguments.pop(0)
    if len(option) == 2 and option[1] in LETTERS:
        arguments.pop(0)
host = arguments.pop(0)
hosts = json.loads(os.environ["FAKE_HOSTS"])
if host not in hosts:
    sys.stderr.write("Warning: Permanently added '%s' to the list of known hosts.\n" % host)
    sys.stderr.write("ssh: connect to host %s port 22: Connection refused\n" % host)
    sys.exit(255)
os.chdir(hosts[host])
os.execv("/bin/sh", ["sh", "-c", " ".join(arguments)])
