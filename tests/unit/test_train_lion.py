"""Lion by pieces: the same numbers, without temporaries of a whole partition."""

import pytest

torch = pytest.importorskip("torch")
lion_pytorch = pytest.importorskip("lion_pytorch")

from pipeline_train import optimizer  # noqa: E402
from pipeline_train.config_schema import Optim  # noqa: E402


def stepped(make, steps=3):
    generator = torch.Generator().manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(1000, generator=generator))
    lion = make([{"params": [flat], "weight_decay": 0.1}])
    for _ in range(steps):
        flat.grad = torch.randn(1000, generator=generator)
        lion.step()
    return flat.detach(), lion.state[flat]["exp_avg"]


@pytest.mark.parametrize("piece", [64, 1000, 4096])
def test_pieces_make_the_same_step_bit_by_bit(monkeypatch, piece):
    monkeypatch.setattr(optimizer, "LION_PIECE", piece)
    settings = Optim(type="lion", lr=1e-2)
    ours = stepped(lambda groups: optimizer.build(groups, settings, cuda=False, offload=False))
    theirs = stepped(lambda groups: lion_pytorch.Lion(groups, lr=1e-2, betas=tuple(settings.betas)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_no_piece_is_larger_than_stated(monkeypatch):
    monkeypatch.setattr(optimizer, "LION_PIECE", 300)
    seen = []
    update = optimizer.in_pieces(lambda p, grad, exp_avg, lr: seen.append((p.numel(), grad.numel(), exp_avg.numel(), lr)))
    update(torch.zeros(1000), torch.zeros(1000), torch.zeros(1000), 0.5)
    assert seen == [(300, 300, 300, 0.5)] * 3 + [(100, 100, 100, 0.5)]
