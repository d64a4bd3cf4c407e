"""What transformers computes for the variants that the pinned stack's release does not know, as digests in golden.json.

    python -m tests.parity.golden        writes golden.json; needs transformers >= 4.45, golden.json says which one wrote it

A packed row of four samples goes through our layers; transformers gets each sample alone. Weights and tokens come from numpy's
legacy generator, whose numbers are the same in every version. A digest of a tensor: its largest element, a few elements, and its
sum with random signs, in which any element that is wrong shows.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from tests.models import VARIANTS, tiny_config

FILE = Path(__file__).with_name("golden.json")
OLDEST = (4, 30)  # transformers of the pinned stack
LENGTHS = (11, 1, 20, 7)
SAMPLES = 12  # elements kept of each tensor
CASES = {variant.name: variant for variant in VARIANTS if variant.since > OLDEST}


def config_of(name: str) -> Dict[str, Any]:
    return tiny_config("llama", num_hidden_layers=2, **CASES[name].overrides)


def weights_of(name: str) -> Dict[str, np.ndarray]:
    """HF name -> fp32 weight; every one random and large enough to matter."""
    from pipeline_train import families

    config = config_of(name)
    family, dims = families.family_of(config), families.dims_of(config)
    shapes = {family.hf_name(s, layer): s.size(dims) for layer in range(dims.layers) for s in family.layer_slots(dims, layer)}
    if dims.tied:
        del shapes[family.tied[1]]
    random, out = np.random.RandomState(5), {}
    for key, shape in sorted(shapes.items()):
        noise = random.standard_normal(shape)
        if len(shape) > 1:
            out[key] = noise * (1.0 if "embed" in key else 1.2 * shape[1] ** -0.5)
        else:
            out[key] = 0.3 * noise + (0.0 if key.endswith("bias") else 1.0)
    if dims.tied:
        out[family.tied[1]] = out[family.tied[0]]
    return {key: value.astype(np.float32) for key, value in out.items()}


def row() -> Tuple[np.ndarray, np.ndarray]:
    """(ids, targets), each [39]: the samples one after another; -100 is not learnt."""
    random, length = np.random.RandomState(6), sum(LENGTHS)
    ids, targets = random.randint(0, 131, length), random.randint(0, 131, length)
    targets[random.random_sample(length) < 0.3] = -100
    return ids, targets


def digest(tensor: Any) -> List[float]:
    """[largest element, sum with random signs, SAMPLES elements]"""
    flat = np.asarray(tensor.detach().double().numpy()).reshape(-1)
    random = np.random.RandomState(flat.size % 2**31)
    signs = random.randint(0, 2, flat.size) * 2 - 1
    places = random.randint(0, flat.size, SAMPLES)
    return [float("%.8g" % value) for value in [np.abs(flat).max(), (flat * signs).sum()] + list(flat[places])]


def differs(found: List[float], wanted: List[float], elements: int, tolerance: float) -> bool:
    """Whether any of a digest is off by more than ``tolerance`` of the tensor's largest element (of its square root of
    ``elements`` many, for the sum); nan is."""
    bounds = np.full(len(wanted), tolerance * wanted[0])
    bounds[1] *= elements**0.5
    return not (np.abs(np.array(found) - np.array(wanted)) <= bounds).all()


def of_transformers(name: str) -> Dict[str, Any]:
    """Tensor name -> tensor: logits and hidden states [39, ...], the gradient of every weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = config_of(name)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).float().train()
    given = {key: torch.from_numpy(value) for key, value in weights_of(name).items()}
    assert not model.load_state_dict(given, strict=False).unexpected_keys
    ids, targets = (torch.from_numpy(part) for part in row())
    logits, hidden, start = [], [], 0
    for length in LENGTHS:
        out = model(ids[None, start : start + length], output_hidden_states=True)
        logits.append(out.logits[0])
        hidden.append([state[0] for state in out.hidden_states])
        start += length
    logits = torch.cat(logits)
    torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").backward()
    out = {"logits": logits}
    out.update({"hidden %d" % n: torch.cat(parts) for n, parts in enumerate(zip(*hidden))})
    out.update({"gradient of " + key: parameter.grad for key, parameter in model.named_parameters()})
    return out


def of_ours(name: str) -> Dict[str, Any]:
    """The same from our layers, on the packed row."""
    import torch

    from pipeline_train import families, models
    from pipeline_train.models.loss import token_loss
    from tests.models import our_forward

    config, given = config_of(name), weights_of(name)
    family, dims = families.family_of(config), families.dims_of(config)
    layers, parameters = [], {}
    for layer in range(dims.layers):
        module = models.build_layer(dims, layer)
        names = {slot.name: family.hf_name(slot, layer) for slot in family.layer_slots(dims, layer)}
        module.load_state_dict({slot: torch.from_numpy(given[key]) for slot, key in names.items()})
        layers.append(module)
        parameters.update({key: dict(module.named_parameters())[slot] for slot, key in names.items()})
    ids, targets = (torch.from_numpy(part)[None] for part in row())
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    segments = torch.cat([torch.full((length,), n + 1) for n, length in enumerate(LENGTHS)])[None]
    hidden, logits = our_forward(layers, ids, positions, segments)
    token_loss(logits, targets, 1.0).backward()
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    if dims.tied:
        gradients[family.tied[0]] = gradients[family.tied[0]] + gradients.pop(family.tied[1])
    out = {"logits": logits[0]}
    out.update({"hidden %d" % n: state[0] for n, state in enumerate(hidden)})
    out.update({"gradient of " + key: gradient for key, gradient in gradients.items()})
    return out


def stored() -> Dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    import transformers

    lines = ['{"transformers": "%s"' % transformers.__version__]
    for name in CASES:
        digests = {key: digest(tensor) for key, tensor in sorted(of_transformers(name).items())}
        body = ",\n".join(" %s: %s" % (json.dumps(key), json.dumps(value)) for key, value in digests.items())
        lines.append("%s: {\n%s}" % (json.dumps(name), body))
    FILE.write_text(",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
