"""What ``pipedock bench`` measures, and what with: our pipeline and its peers, each in processes of its own.

``shapes`` (geometries by name; standard library only), ``rows`` (documents packed or padded into rows), ``ours``, ``peers`` and
``ancestor`` (engines), ``rank`` (one process), ``train`` (all of them, one after the other), ``convert``.
"""
