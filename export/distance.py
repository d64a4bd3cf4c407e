"""How far two forward passes are apart. T tokens of one prompt, D hidden size, V vocabulary."""

from typing import Dict, List

import torch


class States:
    """Hidden states of one layer, prompt by prompt: ours against the reference."""

    def __init__(self) -> None:
        self._relative, self._diff, self._largest = -1.0, 0.0, 0.0
        self._sum, self._count = 0.0, 0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> "States":
        """[..., D] each, of one shape."""
        apart = (ours.float() - theirs.float()).abs()
        self._sum += float(apart.sum(dtype=torch.float64))
        self._count += apart.numel()
        self.worst(float(apart.max()), float(theirs.float().abs().max()))
        return self

    def worst(self, diff: float, largest: float) -> None:
        """Keep the prompt with the largest difference relative to its own largest value; NaN stays NaN."""
        relative = diff / largest if largest > 0 else diff
        if self._relative == self._relative and not relative <= self._relative:
            self._relative, self._diff, self._largest = relative, diff, largest

    def figures(self) -> Dict[str, float]:
        """{"diff": max |ours - theirs|, "max": max |theirs|, "relative": their ratio, all of the worst prompt; "mean": mean |ours -
        theirs| over all}."""
        return {"diff": self._diff, "max": self._largest, "relative": self._relative, "mean": self._sum / max(1, self._count)}


class Logits:
    """The same for the logits of one prompt, a slice of the vocabulary at a time, so that [T, V] is never in memory; and what a
    sampler makes of them: the likeliest token, and KL(theirs || ours) in nats."""

    def __init__(self) -> None:
        self._states = States()
        self._diff = self._largest = torch.zeros(())
        self._sum = 0.0
        self._count = 0
        self._parts: List[Dict[str, torch.Tensor]] = []  # per slice and token: what the sums over V need

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """The next slice, [T, n] each."""
        a, b = theirs.double(), ours.double()
        apart = (a - b).abs()
        self._sum += float(apart.sum())
        self._count += apart.numel()
        self._diff, self._largest = torch.maximum(self._diff, apart.max()), torch.maximum(self._largest, a.abs().max())
        top_a, top_b = a.max(-1), b.max(-1)
        weight = (a - top_a.values[:, None]).exp()
        self._parts.append({
            "a": top_a.values, "b": top_b.values, "at_a": top_a.indices, "at_b": top_b.indices,
            "sum_a": weight.sum(-1), "sum_b": (b - top_b.values[:, None]).exp().sum(-1), "cross": (weight * (a - b)).sum(-1),
        })  # fmt: skip

    def per_token(self) -> Dict[str, torch.Tensor]:
        """{"kl": [T] nats, "same": bool [T], whether the likeliest token is the same}."""
        part = {key: torch.stack([p[key] for p in self._parts]) for key in self._parts[0]}  # [slices, T]
        max_a, max_b = part["a"].max(0), part["b"].max(0)
        scale_a, scale_b = (part["a"] - max_a.values).exp(), (part["b"] - max_b.values).exp()
        sum_a, sum_b = (part["sum_a"] * scale_a).sum(0), (part["sum_b"] * scale_b).sum(0)
        kl = (part["cross"] * scale_a).sum(0) / sum_a - (max_a.values + sum_a.log()) + (max_b.values + sum_b.log())
        at = [part[key].gather(0, top.indices[None])[0] for key, top in (("at_a", max_a), ("at_b", max_b))]
        return {"kl": kl.clamp(min=0.0), "same": (max_a.indices == max_b.indices) & (at[0] == at[1])}

    @staticmethod
    def figures(prompts: List["Logits"]) -> Dict[str, float]:
        """Over several prompts: as ``States.figures``, and {"top1": share of tokens whose likeliest successor is the same, "kl":
        mean, "kl_max"}."""
        states, each = States(), [prompt.per_token() for prompt in prompts]
        for prompt in prompts:
            states.worst(float(prompt._diff), float(prompt._largest))
        kl, same = (torch.cat([one[key] for one in each]) for key in ("kl", "same"))
        mean = sum(p._sum for p in prompts) / max(1, sum(p._count for p in prompts))
        more = {"top1": float(same.double().mean()), "kl": float(kl.mean()), "kl_max": float(kl.max())}
        return dict(states.figures(), mean=mean, **more)
