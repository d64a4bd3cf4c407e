"""Lines of a file -> packed rows of token ids.

    records   line -> Record, or a message that names file, line and field
    template  Record -> turns of (prompt, answer): the only place a prompt is spelled
    encode    turns -> Sequence(ids, learn): the only place tokenizers are loaded
    packing   lengths -> rows, a pure function of (seed, epoch)
    store     a data file -> encoded files
    feed      encoded files -> feed.at(step), the same on every process
    report    what ``pipedock data`` and a starting run show

This file imports nothing: records and template are used by packages that know no numpy.
"""
