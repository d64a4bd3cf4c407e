"""Which layers a stage gets. Standard library only: a plan needs no GPU box and no torch.

Cost model, per token of one row, counted in multiply-adds x 2 (FLOPs): a matrix of n parameters costs 2n forward and 4n
backward; causal attention over rows of T tokens costs 2 x 2 x q_size x T/2 forward on average and twice that backward;
recomputing a block adds its forward once more. An embedding lookup costs nothing, but its parameters take memory. With run.fp8 a
FLOP of the head, which stays in bf16, takes longer than one of the blocks.
"""

from typing import Any, Callable, List, Optional, Sequence, Union

from ..errors import UserError
from ..families import FAMILIES, Dims

Join = Callable[[Any, Any], float]
FP8_HEAD = 1.25  # so much longer, by the stages of bloom-7B with run.fp8 and without (benchmarks/results, two H200)
Cost = Callable[[int, int, int], float]  # stage, start, end
Fits = Callable[[int, int, int], bool]  # stage, start, end; what fits still fits with fewer layers


def matrix_params(dims: Dims, layer: int) -> int:
    """Parameters of the layer's matrices; norms and biases are left out, they cost nothing that would show."""
    slots = FAMILIES[dims.family].layer_slots(dims, layer)
    return sum(slot.size(dims)[0] * slot.size(dims)[1] for slot in slots if len(slot.shape) == 2)


def layer_weights(dims: Dims, seq_len: int, recompute: bool = False, fp8: bool = False) -> List[float]:
    """FLOPs per token, forward and backward, of each layer (embed, blocks, head), the head's as ``fp8`` makes them."""
    attention = 2.0 * dims.q_size * seq_len
    block = (2.0 * matrix_params(dims, 1) + attention) * (4 if recompute else 3)
    head = 2.0 * matrix_params(dims, dims.layers - 1) * 3 * (FP8_HEAD if fp8 else 1)
    return [0.0] + [block] * dims.blocks + [head]


def bounds(
    dims: Dims,
    pipe: int,
    parts: Union[str, Sequence[int]] = "auto",
    seq_len: int = 2048,
    recompute: bool = False,
    fits: Optional[Fits] = None,
    fp8: bool = False,
) -> List[int]:
    """P + 1 layer boundaries: stage s owns layers [bounds[s], bounds[s + 1]). Every stage owns at least one layer.

    ``parts`` is a list of layer counts, or "auto": of the splits whose stages all ``fits`` (default: all), the slowest stage as
    fast as possible; among those the largest stage as small as possible (in parameters); among those the most even one. Raises
    UserError when the counts do not fit the model, and NoSplit when "auto" finds no stage layout that ``fits``.
    """
    if pipe > dims.layers:
        raise UserError("parallel.pipe: %d stages, but the model has only %d layers (embed + %d blocks + head). Use at most %d."
                        % (pipe, dims.layers, dims.blocks, dims.layers))  # fmt: skip
    if not isinstance(parts, str):
        if sum(parts) != dims.layers or len(parts) != pipe or min(parts) < 1:
            raise UserError("parallel.parts: %s does not split %d layers (embed + %d blocks + head) into %d stages of 1 or more"
                            % (list(parts), dims.layers, dims.blocks, pipe))  # fmt: skip
        return _cumulated(parts)
    flops = layer_weights(dims, seq_len, recompute, fp8)
    sizes = [float(matrix_params(dims, layer)) for layer in range(dims.layers)]
    ends = None if fits is None else _ends(dims.layers, pipe, fits)
    slowest = _split(flops, pipe, None, None, ends)
    largest = _split(sizes, pipe, flops, _peak(flops, slowest), ends)
    return _evenest(flops, sizes, pipe, _peak(flops, slowest), _peak(sizes, largest), ends)


class NoSplit(ValueError):
    """No layout of the stages fits the memory."""


def parts_of(boundaries: Sequence[int]) -> List[int]:
    """[0, 6, 11] -> [6, 5]."""
    return [b - a for a, b in zip(boundaries, boundaries[1:])]


def step_flops(dims: Dims, tokens: int, pairs: int) -> float:
    """Model FLOPs of training on ``tokens`` tokens that attend to ``pairs`` (query, key) pairs in all, recomputation and
    padding not counted: 6 x (parameters without the input embedding) x tokens + 12 x blocks x q_size x pairs."""
    params = sum(matrix_params(dims, layer) for layer in range(1, dims.layers))
    return 6.0 * params * tokens + 12.0 * dims.blocks * dims.q_size * pairs


def _cumulated(parts: Sequence[int]) -> List[int]:
    out = [0]
    for part in parts:
        out.append(out[-1] + part)
    return out


def _sums(weights: Sequence[float]) -> List[float]:
    out = [0.0]
    for weight in weights:
        out.append(out[-1] + weight)
    return out


def _peak(weights: Sequence[float], boundaries: Sequence[int]) -> float:
    return max(sum(weights[a:b]) for a, b in zip(boundaries, boundaries[1:])) * (1 + 1e-9)  # rounding of the sums


Ends = Optional[List[List[int]]]  # [stage][start]: the last end that fits


def _ends(layers: int, pipe: int, fits: Fits) -> List[List[int]]:
    """For every stage and first layer how far the stage may reach; an empty stage (end == start) if not even one layer fits."""
    found = []
    for stage in range(pipe):
        end, row = stage, [0] * (layers + 1)
        for start in range(stage, layers - (pipe - stage) + 1):
            end = max(end, start)
            while end < layers and fits(stage, start, end + 1):
                end += 1
            row[start] = end
        found.append(row)
    return found


def _split(
    weights: Sequence[float], pipe: int, capped: Optional[Sequence[float]], cap: Optional[float], ends: Ends = None
) -> List[int]:
    """The split into ``pipe`` non-empty runs with the smallest largest weight, no run's ``capped`` sum above ``cap``."""
    sums, caps = _sums(weights), _sums(capped or weights)

    def cost(stage: int, start: int, end: int) -> float:
        over = cap is not None and caps[end] - caps[start] > cap
        return float("inf") if over or (ends is not None and end > ends[stage][start]) else sums[end] - sums[start]

    return _dynamic(len(weights), pipe, cost, max)


def _evenest(
    flops: Sequence[float], sizes: Sequence[float], pipe: int, most_flops: float, most_size: float, ends: Ends = None
) -> List[int]:
    """Within both caps, the split with the smallest sum of squared stage FLOPs."""
    flop_sums, size_sums, unit = _sums(flops), _sums(sizes), max(flops)

    def cost(stage: int, start: int, end: int) -> float:
        work = flop_sums[end] - flop_sums[start]
        over = work > most_flops or size_sums[end] - size_sums[start] > most_size
        return float("inf") if over or (ends is not None and end > ends[stage][start]) else (work / unit) ** 2

    return _dynamic(len(flops), pipe, cost, lambda a, b: a + b)


def _dynamic(layers: int, pipe: int, cost: Cost, join: Join) -> List[int]:
    """best[p][n]: the first n layers on p stages, ``join`` (max or sum) over their ``cost``. Raises NoSplit."""
    infinite = float("inf")
    best = [[infinite] * (layers + 1) for _ in range(pipe + 1)]
    cut = [[0] * (layers + 1) for _ in range(pipe + 1)]
    best[0][0] = 0.0
    for stage in range(1, pipe + 1):
        for end in range(stage, layers - (pipe - stage) + 1):
            for start in range(stage - 1, end):
                value = join(best[stage - 1][start], cost(stage - 1, start, end))
                if value < best[stage][end]:
                    best[stage][end], cut[stage][end] = value, start
    if best[pipe][layers] == infinite:
        raise NoSplit("%d layers on %d stages" % (layers, pipe))
    out = [layers]
    for stage in range(pipe, 0, -1):
        out.append(cut[stage][out[-1]])
    return out[::-1]
