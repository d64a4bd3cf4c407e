"""A TCP port of the loopback interface that nobody uses at the moment, as the product finds one."""

from pipeline_train.network import free_port

__all__ = ["free_port"]
