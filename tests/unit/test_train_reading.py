"""How weights come into a stage: in pieces, each where it belongs, whatever replica holds what of the optimizer's partition."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from pipeline_train import engine, families, masters  # noqa: E402
from pipeline_train.weights import files, open_source  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402


def stub(piece, moments=None):
    pipe = SimpleNamespace(
        watched=SimpleNamespace(pulse=SimpleNamespace(tick=lambda what: None)), _piece=lambda parameter: piece,
        base_optimizer=SimpleNamespace(state=moments or {}),
    )  # fmt: skip
    pipe.write = lambda *args: engine.Pipeline.write(pipe, *args)
    return pipe


@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("of", [slice(0, 20), slice(0, 7), slice(7, 20), slice(5, 6)], ids=str)
def test_a_replica_takes_its_share_of_every_piece(of, size):
    """``of`` the parameter's 20 elements this replica holds; they begin at number 4 of its partition."""
    parameter = torch.nn.Parameter(torch.full((4, 5), float("nan"), dtype=torch.bfloat16))
    flat, inside = torch.zeros(40), slice(4, 4 + of.stop - of.start)
    moment = torch.zeros(40)
    pipe = stub((flat, inside, of), {flat: {"exp_avg": moment}})
    values = torch.randn(20)
    for begin in range(0, 20, size):
        pipe.write(parameter, begin, values[begin : begin + size])
    assert torch.equal(parameter.detach(), values.bfloat16().view(4, 5))
    wanted = torch.zeros(40)
    wanted[inside] = values[of]
    assert torch.equal(flat, wanted) and not moment.any()
    engine.Pipeline.write_whole(pipe, parameter, -values.view(4, 5), "exp_avg")
    assert torch.equal(moment, -wanted) and torch.equal(flat, wanted)
    assert torch.equal(parameter.detach(), values.bfloat16().view(4, 5))


def test_a_replica_that_holds_nothing_of_it_keeps_the_rounded_weight():
    parameter = torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
    stub(None).write(parameter, 2, torch.ones(3))
    assert parameter.tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("bloom", True)])
def test_pieces_of_a_folder_are_its_weights(tmp_path, monkeypatch, family, tied):
    config = tiny_config(family, tie_word_embeddings=tied)
    make_hf(tmp_path, config)
    monkeypatch.setattr(files, "PIECE", 100)
    source, dims = open_source(str(tmp_path)), families.dims_of(config)
    modules = {layer: torch.nn.ParameterDict() for layer in range(dims.layers)}
    got = {}
    pipe = SimpleNamespace(dims=dims, stage=SimpleNamespace(layers=modules))
    pipe.write = lambda parameter, begin, part: got[parameter].append((begin, part.clone()))
    names = {}
    for layer in modules:
        names[layer] = {name: torch.nn.Parameter(torch.zeros(1)) for name in source.layer(layer)}
        got.update({parameter: [] for parameter in names[layer].values()})
    monkeypatch.setattr(masters, "named", lambda pipe, layer: names[layer])
    masters._read(pipe, source)
    for layer in modules:
        for name, wanted in source.layer(layer).items():
            parts = got[names[layer][name]]
            assert torch.equal(torch.cat([part for _, part in parts]).view(wanted.shape), wanted)
            assert [begin for begin, _ in parts] == list(range(0, wanted.numel(), 100))
