"""A model of transformers as the server runs it."""

from typing import Any, Optional

import torch
from safetensors import SafetensorError

from pipeline_train import proof
from pipeline_train.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(folder: str, dtype: Optional[str], device: torch.device, revision: Optional[str], trust_remote_code: bool) -> Any:
    """A folder or hub name -> the model on ``device``, for inference, in ``dtype``; None: fp32 on a CPU, else as it is stored if
    that has 16 bits, else fp16. UserError for code that may not run, weights that cannot be read, weights that are not there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    code = proof.foreign_code(folder)
    if code is not None and not trust_remote_code:
        raise UserError("%s: is code that transformers would run; read it, then remove it or give --trust-remote-code" % code)
    config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    if dtype is not None:
        chosen = DTYPES[dtype]
    elif device.type == "cpu":
        chosen = torch.float32
    else:
        stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        chosen = stored if stored in (torch.float16, torch.bfloat16) else torch.float16
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=chosen, revision=revision, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError("%s: its weights cannot be loaded: %.300s" % (folder, why)) from error
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            "%s: %d weights are missing, the first is %s; a model with random weights is not served"
            % (folder, len(missing), missing[0])
        )
    return model.to(device).eval().requires_grad_(False)


def positions(config: Any) -> int:
    """How many tokens a row may have."""
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) == "longrope":
        # Beyond this, transformers turns all rows of a pass otherwise as soon as one of them is there.
        return int(getattr(config, "original_max_position_embeddings", 0) or scaling["original_max_position_embeddings"])
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 2048
