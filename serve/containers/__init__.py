"""Servers of others in containers, through the Docker SDK: text-generation-inference and vLLM.

Lowest first: ``argv`` (flags and environment of each version), ``mounts`` (where the model lies inside), ``gpus`` (which of them
the container gets), ``daemon`` (Docker's engine), ``images``, ``found`` (containers of ours), ``failures`` (what a log says went
wrong), ``create`` (one container), ``start``.
"""
