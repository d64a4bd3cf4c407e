"""A random transformers model to compare with, for the self-test and for the project's own tests."""

from pathlib import Path
from typing import Any, Dict, Union


def make_model(raw: Dict[str, Any], folder: Union[str, Path], seed: int = 0) -> Any:
    """Save a random transformers model of the config.json ``raw`` (safetensors, fp32) and return it in eval mode.

    Norms and biases are random too: a norm that is all ones or a bias that is all zeros would hide mistakes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(raw)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(made).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.0 if "embed" in name else 1.2 * parameter.shape[1] ** -0.5))
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    model.save_pretrained(str(folder), safe_serialization=True)
    return model
