"""``pipedock data``: what a run.yaml's data becomes, before anything trains on it."""

import argparse
from pathlib import Path
from typing import Any, Dict, Optional

HELP = "check every record; show counts, lengths, packing and a decoded sample with the learnt span"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="run.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    import os

    from pipeline_train import config, families
    from pipeline_train.data import report
    from pipeline_train.data.encode import TextCodec
    from pipeline_train.data.store import default_seq_len

    loaded = config.load(args.config, tuple(args.set))
    folder = _folder(loaded.model.path)
    raw = families.read_config(str(folder))
    dims = families.dims_of(raw)
    config.check_against_model(loaded, dims.layers, dims.max_positions, Path(args.config).name)
    codec = TextCodec.load(str(folder), loaded.data.template)
    codec.check_vocab(dims.vocab)
    seq_len = loaded.data.seq_len or default_seq_len(raw, dims)
    document = _describe(loaded, codec, "train", seq_len)
    document["template"] = codec.format.name
    document["stop_tokens"] = codec.tokenizer.convert_ids_to_tokens(codec.stop_ids)
    if loaded.data.eval is not None:
        document["eval"] = _describe(loaded, codec, "eval", seq_len)
    if args.json:
        return document
    args.answer.write(report.text(document, args.answer.isatty() and "NO_COLOR" not in os.environ) + "\n")
    return None


def text(document: Dict[str, Any]) -> str:
    from pipeline_train.data import report

    return report.text(document)


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from pipeline_train import weights  # imports torch, which nothing else here needs

    return weights.resolve(path, weights=False)


def _describe(loaded: Any, codec: Any, which: str, seq_len: int) -> Dict[str, Any]:
    import tempfile

    from pipeline_train.data import report
    from pipeline_train.data.feed import Feed, prepare
    from pipeline_train.data.store import scratch as scratch_place

    with tempfile.TemporaryDirectory(prefix="pipedock-data-", dir=scratch_place(loaded)) as scratch:
        folder = Path(scratch)
        prepare(loaded, codec, which, folder, seq_len)
        feed = Feed.open(
            folder, which, seq_len=seq_len, rows_per_step=loaded.rows_per_step, seed=loaded.run.seed, pack=loaded.data.pack,
            pad_id=codec.pad_id,
        )  # fmt: skip
        return report.describe(feed, codec, folder, which)
