"""Several nodes in one process, a thread each: what torch.distributed and the launcher would be to checkpoint.Saver, and launchers
that are joined by real control channels."""

import copy
import json
import threading

from pipeline_train import checkpoint
from pipeline_train.control import Channel
from pipeline_train.place import Node, Place
from tests.fake_pipe import Pipe
from tests.free_port import free_port
from tests.models import tiny_config

DIMS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 8}  # fmt: skip


def at_once(works, timeout=60):
    """Call all of them, each in a thread; -> their results, an exception in place of one."""
    results = [None] * len(works)

    def run(number):
        try:
            results[number] = works[number]()
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: the test looks at it
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "a node waits for ever"
    return results


class Together:
    """torch.distributed for ranks that are threads; also the Place that each one inherits."""

    ReduceOp = type("ReduceOp", (), {"MIN": None})

    def __init__(self, world):
        self.world, self.barrier, self.values, self.local = world, threading.Barrier(world, timeout=60), {}, threading.local()

    def join(self, rank, place):
        self.local.rank, self.local.place = rank, place

    def inherited(self):
        return self.local.place

    def get_rank(self):
        return self.local.rank

    def get_world_size(self):
        return self.world

    def all_gather_object(self, into, value):
        self.values[self.local.rank] = value
        self.barrier.wait()
        into[:] = [copy.deepcopy(self.values[rank]) for rank in range(self.world)]
        self.barrier.wait()

    def all_reduce(self, tensor, op):
        everyone = [None] * self.world
        self.all_gather_object(everyone, int(tensor))
        tensor.fill_(min(everyone))


class Topology:
    """``axes``: the last one varies fastest, as in stages.topology_of."""

    def __init__(self, axes, pipe, data):
        self.axes, self.sizes = axes, {"pipe": pipe, "data": data}

    def get_rank(self, **at):
        return at[self.axes[0]] * self.sizes[self.axes[1]] + at[self.axes[1]]


def pipe_of(rank, axes, pipe, data, **train):
    """The fake pipeline of one rank of several; its stage has its share of 5 layers."""
    fake = Pipe(dims=DIMS, **train)
    topology = Topology(axes, pipe, data)
    places = {topology.get_rank(pipe=p, data=d): (p, d) for p in range(pipe) for d in range(data)}
    fake.pipe_rank, fake.data_rank = places[rank]
    fake.config.parallel.pipe, fake.config.parallel.data, fake.config.parallel.axes = pipe, data, list(axes)
    total = fake.dims.layers
    mine = range(fake.pipe_rank * total // pipe, (fake.pipe_rank + 1) * total // pipe)
    fake.stage.layers = {layer: fake.stage.layers[layer] for layer in mine}
    fake.stage.topology = lambda: topology
    return fake


def place_of(node, names, world, shared=False):
    """Ranks in equal shares, node by node."""
    each = world // len(names)
    return Place(node, tuple(Node(name, tuple(range(n * each, (n + 1) * each))) for n, name in enumerate(names)), shared)


class Cluster:
    """Nodes "a", "b", ... under ``root``, each with a run folder <root>/<name>/out of its own, or one that is shared."""

    def __init__(self, monkeypatch, root, axes=("pipe", "data"), pipe=2, data=1, nodes=2, shared=False):
        self.root, self.axes, self.pipe, self.data, self.shared = root, axes, pipe, data, shared
        self.world, self.names = pipe * data, [chr(ord("a") + n) for n in range(nodes)]
        self.together = Together(self.world)
        monkeypatch.setattr(checkpoint, "dist", self.together)
        monkeypatch.setattr(checkpoint, "Place", self.together)
        self.outs = [root / ("shared" if shared else name) / "out" for name in self.names]
        for out in self.outs:
            (out / "resolved" / "model").mkdir(parents=True, exist_ok=True)
            (out / "resolved" / "model" / "config.json").write_text(json.dumps(tiny_config("llama", **DIMS)))

    def facts(self, rank):
        return {"data": "d"}

    def place(self, node):
        return place_of(node, self.names, self.world, self.shared)

    def save(self, steps, **train):
        """Every rank saves these steps; -> what came of it, by rank: what Saver.finish says, or the exception."""
        return at_once([lambda rank=rank: self._rank(rank, steps, train) for rank in range(self.world)])

    def _rank(self, rank, steps, train):
        node = self.place(0).node_of(rank)
        self.together.join(rank, self.place(node))
        pipe = pipe_of(rank, self.axes, self.pipe, self.data, **train)
        saver, said = checkpoint.Saver(pipe, self.outs[node], self.facts(rank)), []
        for step in steps:
            pipe.set(step)
            saver.save(step)
            said += saver.poll()
        return said + saver.finish()

    def files(self, node, step):
        """Names in a checkpoint; None where there is none."""
        folder = checkpoint.folder(self.outs[node], step)
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None

    def names_of(self, node):
        return sorted(path.name for path in (self.outs[node] / "checkpoints").iterdir())


def joined(names, work, wait_s=30.0):
    """``work(channel)`` at every node, over real connections; an error closes the channel, as launchers do. -> results, by node."""
    port = free_port()

    def node(number):
        channel = Channel.open(number, len(names), "127.0.0.1", port, names[number], wait_s, lambda line: None)
        try:
            result = work(channel)
        except BaseException as error:
            channel.close(error)
            raise
        channel.close()
        return result

    return at_once([lambda number=number: node(number) for number in range(len(names))])
