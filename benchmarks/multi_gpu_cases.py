"""What multi_gpu.py tries of each engine, and what its command line names. A case: see multi_gpu_rank.py."""

import argparse
import json

from benchmarks.multi_gpu_road import PARTS

MODELS = {"llama": "llama-7b", "bloom": "bloom-7b", "llama-13b": "llama-13b"}  # a row's family -> bench's name
OURS = {  # engine -> what all its cases have: replicas, run.fp8
    "pipeline": {"data": 1}, "pipeline-fp8": {"data": 1, "compile": True, "fp8": True}, "pipeline2": {"data": 2},
}  # fmt: skip
ENGINES = ("pipeline", "pipeline-fp8", "fsdp2-compiled", "fsdp2", "zero3", "pipeline2")
NEEDED = {"seq", "micro", "recompute"}


def tuning(engine, short, long, batch, gpus):
    """-> cases, the likely best first: a quarter of the rows each (a micro-batch for every GPU at least), and for both lengths the
    best of them on all rows. Weights kept whole are tried on all rows: what they save is paid for once a step."""
    cases = _pipeline(engine, short, long) if engine in OURS else _peer(engine, short, long)
    return [case if "best" in case or "keep" in case else dict(case, rows=max(batch // 4, gpus * case["micro"])) for case in cases]


def _pipeline(engine, short, long):
    """What may be fastest by the plan's memory; a replica's rank holds more of the model. Short rows: as many tokens at once."""
    tried = {"pipeline": [(4, True), (2, True), (4, False)], "pipeline2": [(2, True), (4, True)], "pipeline-fp8": [(4, True)]}
    cases = [{"seq": long, "micro": micro, "recompute": "none", "compile": compiled} for micro, compiled in tried[engine]]
    return [dict(OURS[engine], **case) for case in cases + [{"seq": long, "best": long}, {"seq": short, "best": long}]]


def _peer(engine, short, long):
    """Every micro-batch; recomputation where the memory it saves could be worth it; FSDP2 with its weights kept whole, too.
    Compiled blocks keep less, so twice as many rows may fit."""
    keep = [{}, {"keep": True}] if engine.startswith("fsdp2") else [{}]
    most = 8 if engine == "fsdp2-compiled" else 4
    found = []
    for seq, micro in ((long, most), (short, most * long // short)):
        plain = {"seq": seq, "recompute": "none"}
        found += [dict(plain, micro=micro, **more) for more in keep] + [dict(plain, micro=micro // 2)]
        found += [{"seq": seq, "micro": 8, "recompute": "blocks"}, {"seq": seq, "best": seq}]
    rest = [{"seq": long, "micro": micro, "recompute": again} for micro in (1, 2, 4, 8) for again in ("none", "blocks")]
    return found + [case for case in rest if case not in found and (case["micro"] > 2 or case["recompute"] == "none")]


def fastest(found, case, batch):
    """Of the rows that a case with ``best`` chooses from, the fastest; of those that had a part of the ``batch`` only, if there
    are such. None without any."""
    wanted = case["best"], case.get("data")
    rows = [row for row in found if "tokens_per_s" in row and (row["seq"], row.get("data")) == wanted]
    rows = [row for row in rows if row["rows"] < batch] or rows
    return max(rows, key=lambda row: row["tokens_per_s"]) if rows else None


def worthwhile(found, cases):
    """Of the cases that are left after a failure those that may do better; a ``best`` where it will have one to choose from."""
    left = []
    for case in cases:
        if "best" in case:
            rows = [row for row in found if "tokens_per_s" in row] + [one for one in left if "best" not in one]
            hopeful = any((row["seq"], row.get("data")) == (case["best"], case.get("data")) for row in rows)
        else:
            hopeful = not hopeless(found, case)
        left += [case] if hopeful else []
    return left


def hopeless(found, case):
    """Whether a case failed with no more rows at once, and as much recomputation."""
    for row in [row for row in found if "error" in row and "micro" in row]:
        alike = all(row.get(key) == case.get(key) for key in ("seq", "data", "keep"))
        if alike and row["micro"] <= case["micro"] and row["recompute"] in (case["recompute"], "blocks"):
            return True
    return False


def given(text):
    """--cases -> engine: cases. A pipeline's have what all of that engine have."""
    example = '{"fsdp2": [{"seq": 2048, "micro": 4, "recompute": "none"}]}'
    try:
        cases = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("not JSON (%s); expected such as %s" % (error, example)) from None
    if not isinstance(cases, dict) or not all(isinstance(one, list) and one for one in cases.values()):
        raise argparse.ArgumentTypeError("expected an engine's name and a list of cases, such as %s" % example)
    for engine, some in cases.items():
        if engine not in ENGINES:
            raise argparse.ArgumentTypeError("%r is none of %s" % (engine, ", ".join(ENGINES)))
        for case in some:
            if not isinstance(case, dict) or not (NEEDED <= set(case) or {"seq", "best"} <= set(case)):
                raise argparse.ArgumentTypeError("a case of %s lacks seq, micro or recompute: %s" % (engine, json.dumps(case)))
    return {engine: [dict(OURS.get(engine, {}), **case) for case in some] for engine, some in cases.items()}


def parts(text):
    """--only -> [(part, its own parts or None)]"""
    known = dict.fromkeys(MODELS, ENGINES)
    known.update({"road": PARTS}, **{"longest-" + family: () for family in MODELS})
    found = []
    for part in text.split(","):
        name, _, own = part.partition(":")
        wanted = own.split("+") if own else None
        if name not in known:
            raise argparse.ArgumentTypeError("%r is none of %s" % (name, ", ".join(known)))
        unknown = [one for one in wanted or () if one not in known[name]]
        if unknown:
            raise argparse.ArgumentTypeError("%s has no %r (but %s)" % (name, unknown[0], ", ".join(known[name]) or "nothing"))
        found.append((name, wanted))
    return found
