"""What is asked of the judge and what it answers. Standard library only."""

from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, List, Optional, Tuple


@dataclass(frozen=True)
class Files:
    """What lies in a model folder. ``look`` makes it. A set of tensor names is None where it could not be read."""

    names: Tuple[str, ...]
    safetensors: Optional[FrozenSet[str]] = None  # names of the tensors in *.safetensors
    bins: Optional[FrozenSet[str]] = None  # the same of PyTorch's *.bin
    missing: Tuple[str, ...] = ()  # weights that an index names and that are not there, or links to nothing
    broken: Tuple[str, ...] = ()  # *.safetensors that are not whole
    same_head: Optional[bool] = None  # lm_head.weight is the embedding, byte by byte; None: one of them is not there, or not read
    merge_pairs: bool = False  # tokenizer.json writes merges as lists
    chat_template: str = ""  # "read": where TGI looks; "jinja": in chat_template.jinja alone; "": there is none

    def ending(self, suffix: str) -> List[str]:
        """Weight files of one kind; those that a training run leaves beside them (training_args.bin) are not weights."""
        strangers = ("training", "arguments", "args", "optimizer", "scheduler")
        return [name for name in self.names if name.endswith(suffix) and not any(word in name for word in strangers)]


@dataclass(frozen=True)
class Question:
    """Can this server load this model on these cards?

    ``config``: config.json. ``engine``, ``version``: "tgi" "0.8", "3.3", "3.3.7"; "vllm"; version None is the newest one known.
    ``gpu``: a name of plan/cards.py, "cpu" for a server that gets no GPU, None: not known, cards are not judged. ``gpus``: how
    many there are, ``driver``: "515.65.01"; None: not judged. ``files``, ``nbytes`` (weights on disk): from ``look``; None to
    judge config.json alone. ``dtype``: fp16, bf16, fp32 or None for the server's own choice. ``max_input``, ``max_total``: tokens
    that the user asked for. ``where``: the model as the user named it, for the commands in the answer.
    """

    config: Dict[str, Any]
    engine: str
    version: Optional[str] = None
    shards: int = 1
    gpu: Optional[str] = None
    gpus: Optional[int] = None
    driver: Optional[str] = None
    files: Optional[Files] = None
    nbytes: Optional[int] = None
    dtype: Optional[str] = None
    max_input: Optional[int] = None
    max_total: Optional[int] = None
    where: str = "DIR"


@dataclass
class Verdict:
    """``reasons``: every one why it cannot work, empty when it can. ``notes``: what to know, and what was not judged.

    ``version`` is the whole one ("3.3.7"), ``image`` with its tag, ``digest`` None where none is known. ``flags``, ``env``: what
    this model or card needs of the engine beyond the user's wishes. ``writable``: the server writes into the model folder.
    ``gpu``: the card's whole name. ``capacity``: estimated, in GiB and tokens, see ``memory.capacity``; None where it cannot be
    computed.
    """

    reasons: List[str]
    notes: List[str]
    engine: str
    version: str
    image: str
    digest: Optional[str]
    shards: int
    gpu: Optional[str] = None
    flags: List[str] = field(default_factory=list)
    env: Dict[str, str] = field(default_factory=dict)
    writable: bool = False
    capacity: Optional[Dict[str, Any]] = None

    def refuse(self, reason: str) -> None:
        self.reasons.append(reason)

    def note(self, text: str) -> None:
        self.notes.append(text)
