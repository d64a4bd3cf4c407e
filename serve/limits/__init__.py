"""Whether a server can load a model on these cards, and why not, before any container starts. Standard library only.

    config, files, nbytes = look("exports/my-model")
    verdict = judge(Question(config, "tgi", "3.3", shards=2, gpu="t4", files=files, nbytes=nbytes, where="exports/my-model"))

Lowest first: ``question`` (asked and answered), ``engines`` (versions, images), ``sizes`` (of any config.json), ``tensors``,
``folder`` (what lies there), ``gpus`` (cards, drivers), ``split`` (shard counts), ``memory``, ``case`` (a question with what
follows from it); then the rules, ``shapes``, ``files``, ``room``, and ``judge``, which applies them all.
"""

from .folder import look
from .judge import judge
from .question import Files, Question, Verdict

__all__ = ["Files", "Question", "Verdict", "judge", "look"]
