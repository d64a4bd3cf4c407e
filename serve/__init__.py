"""Serving: the embedded TGI-compatible server, its launcher, and a client for any server that speaks this contract."""
