"""What a server is asked to be, whichever engine it has."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import List, Optional, Tuple

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # as the other verbs call them -> as servers do


@dataclass(frozen=True)
class Settings:
    """``model``: the folder. ``flags``: more flags of that engine, as it spells them. ``version``, ``image``, ``shards``, ``gpu``,
    ``driver``, ``shm_size``: of tgi and vllm only. ``max_input_tokens``, ``max_total_tokens``: longest prompt, prompt and answer.
    ``need_proof`` False: an export whose proof is missing, failed or stale is served with a warning."""

    model: str
    engine: str = "embedded"
    port: int = 8082
    host: str = "127.0.0.1"
    api_key: Optional[str] = None
    flags: Tuple[str, ...] = ()
    dtype: Optional[str] = None
    max_input_tokens: Optional[int] = None
    max_total_tokens: Optional[int] = None
    max_concurrent_requests: Optional[int] = None
    cors_allow_origin: Optional[str] = None
    version: Optional[str] = None
    image: Optional[str] = None
    shards: int = 1
    gpu: Optional[str] = None
    driver: Optional[str] = None
    shm_size: Optional[str] = None
    need_proof: bool = True

    @property
    def folder(self) -> str:
        return str(Path(self.model).resolve())

    def identity(self) -> str:
        """Equal for servers that answer alike: what was asked for, but for what is only judged beforehand, and the files of the
        model, so that a folder which was written again is another model. The key is in it as part of a hash."""
        fields = {**asdict(self), "model": [self.folder, self._files()], "gpu": None, "driver": None, "need_proof": None}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def _files(self) -> List[Tuple[str, int, int]]:
        """Names, sizes and times of what a server reads. TGI 0.8 adds its own .safetensors beside .bin: those are not looked at."""
        folder = Path(self.folder)
        weights = [*folder.glob("*.bin")] or [*folder.glob("*.safetensors")]
        others = [path for path in (*folder.glob("*.json"), *folder.glob("*.model")) if not path.name.endswith(".index.json")]
        found = [(path.name, path.stat()) for path in weights + others if path.name != "proof.json"]
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
