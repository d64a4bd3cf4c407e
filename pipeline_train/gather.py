"""Brings the files of a checkpoint that lie on other nodes, through the control channel: to node 0, or to every node.

Each node says what it has; all come to the same plan, and files travel through node 0, one after the other. What has arrived
stays, so the same command goes on where it was cut short. Only names that the manifest lists are ever read or written.
"""

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Tuple

from . import arrival, checkpoint_folder, host, manifest, run_folder
from .arrival import ASIDE, Arrival
from .control import Channel, Refusal
from .errors import RunFailed, UserError
from .manifest_values import STEP

Say = Callable[[str], None]  # takes a line for the user
PART = 1 << 23  # bytes of one message


class Source(NamedTuple):
    """One save of a checkpoint: the folder's name, its manifest's sha256, the files listed there, and what each node lacks of them;
    a node that has no folder of it is not in ``lacks``. ``optimizer``: see bring."""

    name: str
    sha256: str
    lists: List[str]
    lacks: Dict[int, List[str]]
    optimizer: bool

    def wanted(self, node: int) -> List[str]:
        """What must come to the node. One without a folder gets all of it."""
        names = self.lacks.get(node, self.lists)
        return [name for name in names if self.optimizer or node not in self.lacks or not name.startswith("optim_")]

    def holders(self, name: str) -> List[int]:
        return sorted(node for node, lacks in self.lacks.items() if name not in lacks)


def bring(channel: Channel, path: Path, say: Say, everywhere: bool = False, optimizer: bool = True) -> Dict[str, Any]:
    """Complete the checkpoint that ``path`` (a run or a checkpoint, on every node) means, on node 0 or ``everywhere``; of a run the
    newest one of which the nodes together have all files. All nodes must call it with the same arguments; when it raises, the
    caller closes the channel with that error, so that all end.

    ``optimizer``: False leaves out what only a resume reads. -> {"checkpoint", "step", "files", "bytes", "seconds"}: what has come
    to this node. Raises UserError, RunFailed."""
    began = time.monotonic()
    here = _Here(channel, Path(path), say)
    targets = list(range(channel.nodes)) if everywhere else [0]
    documents = channel.exchange({"saved": here.saved(), "one": here.one})
    if any(document["one"] for document in documents):  # a checkpoint by another name, lost here
        here.parent = Path(path).parent
    source, passed = choose([document["saved"] for document in documents], targets, optimizer, channel.named, here.parent)
    if passed:
        say("passed over: %s" % passed)
        say("the newest that can be whole is %s: name that one to to-hf, verify and a resume" % (here.parent / source.name))
    here.open(source, channel.node in targets)
    for node in range(1, channel.nodes):
        here.move(source, node, 0, [name for name in source.wanted(0) if source.holders(name)[0] == node])
    for node in [target for target in targets if target]:
        here.move(source, 0, node, source.wanted(node))
    if channel.node in targets:
        here.close(source)
    channel.exchange({"done": channel.node})
    document = {"checkpoint": str(here.parent / source.name), "step": here.step, "files": here.files, "bytes": here.bytes}
    return dict(document, seconds=round(time.monotonic() - began, 3))


def choose(
    saved: List[Dict[str, Any]], targets: Iterable[int], optimizer: bool, named: Callable[[int], str], parent: Path
) -> Tuple[Source, str]:
    """The save to complete, and why not a newer one. ``saved``: by node, folder name -> {"sha256", "lists", "lacks"}; the same
    everywhere, so every node comes to the same answer. ``parent``: of those folders. Raises Refusal when there is none."""
    problem = ""
    for name in sorted({name for folders in saved for name in folders}, key=_order, reverse=True):
        where = parent / name
        for sha256 in dict.fromkeys(folders[name]["sha256"] for folders in saved if name in folders):
            having = {node: folders[name] for node, folders in enumerate(saved) if folders.get(name, {}).get("sha256") == sha256}
            source = Source(name, sha256, having[min(having)]["lists"], {n: having[n]["lacks"] for n in having}, optimizer)
            nowhere = sorted({wanted for node in targets for wanted in source.wanted(node) if not source.holders(wanted)})
            others = [node for node in targets if name in saved[node] and node not in having]
            if nowhere:
                more = " and %d more" % (len(nowhere) - 1) if len(nowhere) > 1 else ""
                problem = problem or "%s: %s%s on none of the %d nodes" % (where, nowhere[0], more, len(saved))
            elif others:
                problem = problem or "%s: on %s it comes from another save than on %s; move it away there" % (
                    where, named(others[0]), named(min(having)))  # fmt: skip
            else:
                return source, problem
    raise Refusal(problem or "%s: no checkpoint there on any of the %d nodes" % (parent, len(saved)))


def _order(name: str) -> int:
    found = STEP.fullmatch(name)
    return int(found.group(1)) if found else -1


class _Here:
    """This node's side. ``parent``: the folder in which checkpoints lie."""

    def __init__(self, channel: Channel, path: Path, say: Say) -> None:
        self.channel, self.say, self.files, self.bytes, self.step = channel, say, 0, 0, -1
        self.one = path.name if manifest.is_layer_folder(path) or STEP.fullmatch(path.name) else ""
        self.parent = path.parent if self.one else path if path.name == "checkpoints" else path / "checkpoints"
        self.folder, self.document = path, {}  # type: Path, Dict[str, Any]

    def saved(self) -> Dict[str, Any]:
        """What this node has, for the others. Raises Unreadable."""
        if self.one:
            names = [self.one]
        else:
            lost = [left.name[len(ASIDE) :] for left in self.parent.glob(ASIDE + "step_*")]
            names = [folder.name for folder in run_folder.checkpoints(self.parent)] + lost
        found = {}
        for name in dict.fromkeys(names):
            folder = self._folder_of(name)
            try:
                document = manifest.parse(folder)
            except manifest.Unreadable:
                raise
            except UserError:
                continue
            found[name] = {
                "sha256": manifest.file_entry(folder / manifest.NAME)["sha256"], "lists": sorted(document["files"]),
                "lacks": arrival.lacking(folder, document),
            }  # fmt: skip
        return found

    def _folder_of(self, name: str) -> Path:
        final, aside = self.parent / name, self.parent / (ASIDE + name)
        return aside if manifest.is_layer_folder(aside) and not manifest.is_layer_folder(final) else final

    def open(self, source: Source, target: bool) -> None:
        """Make ready to send and to receive. Raises RunFailed."""
        self.folder = self._folder_of(source.name)
        if self.channel.node in source.lacks:
            self._parse()
        elif target:
            self.folder = self.parent / (ASIDE + source.name)
        if not target:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(ASIDE + "*"):
                shutil.rmtree(str(left)) if left.is_dir() else left.unlink()
        except OSError as error:
            raise arrival.unwritable(self.folder, error) from None

    def _parse(self) -> None:
        self.document = manifest.parse(self.folder)
        self.step = self.document["step"]

    def move(self, source: Source, sender: int, receiver: int, names: List[str]) -> None:
        """One node's files to another; one of both is node 0. A node without a folder gets the manifest first, from the first that
        has it or from node 0."""
        first = receiver not in source.lacks and sender in (0, min(source.lacks))
        if self.channel.node == sender:
            self._check(names)
            for name in ([manifest.NAME] if first else []) + names:
                self._send(receiver, name)
        elif self.channel.node == receiver:
            if first:
                self._take_manifest(source, sender)
            self._check(names)
            if names:
                arrival.check_room(self.folder, self.document, names)
            for name in names:
                self._take(sender, name)

    def _check(self, names: List[str]) -> None:
        """Another node has said them. Raises RunFailed for one that this node's manifest does not list."""
        for name in names:
            if name not in self.document["files"]:
                raise RunFailed("%s: manifest.json lists no such file, though another node has named it" % (self.folder / name))

    def _send(self, receiver: int, name: str) -> None:
        """Raises RunFailed when the file cannot be read."""
        path = self.folder / name
        try:
            with open(str(path), "rb") as file:
                left = os.fstat(file.fileno()).st_size
                while True:
                    data = file.read(min(PART, left))
                    left = left - len(data) if data else 0  # cut off meanwhile: the other end sees it by the size
                    self.channel.send(receiver, {"name": name, "left": left}, data)
                    if not left:
                        return
        except OSError as error:
            raise RunFailed("%s: cannot be read: %s" % (path, error.strerror or error)) from None

    def _parts(self, sender: int, name: str) -> Iterable[bytes]:
        """Raises RunFailed for what is not that file."""
        left = 1
        while left:
            message, data = self.channel.receive(sender)
            if message.get("name") != name or type(message.get("left")) is not int:
                raise RunFailed("%s sent something else than %s: is it of another version?" % (self.channel.named(sender), name))
            left = message["left"]
            yield data

    def _take(self, sender: int, name: str) -> None:
        incoming = Arrival(self.folder, name, self.document["files"][name])
        try:
            for data in self._parts(sender, name):
                incoming.write(data)
        except BaseException:
            incoming.drop()
            raise
        incoming.accept(self.channel.named(sender))
        self.files, self.bytes = self.files + 1, self.bytes + incoming.written
        self.say("%s: %s from %s" % (self.folder / name, host.size(incoming.written), self.channel.named(sender)))

    def _take_manifest(self, source: Source, sender: int) -> None:
        text = b"".join(self._parts(sender, manifest.NAME))
        if hashlib.sha256(text).hexdigest() != source.sha256:
            raise arrival.refused(self.folder / manifest.NAME, self.channel.named(sender))
        try:
            (self.folder / manifest.NAME).write_bytes(text)
        except OSError as error:
            raise arrival.unwritable(self.folder / manifest.NAME, error) from None
        self._parse()

    def close(self, source: Source) -> None:
        """All is here, on disk; a folder that was lost gets its name."""
        final = self.parent / source.name
        try:
            checkpoint_folder.sync(self.folder)
            if self.folder != final:
                assert not arrival.lacking(self.folder, self.document)
                checkpoint_folder.sync(self.folder / manifest.NAME)
                os.replace(str(self.folder), str(checkpoint_folder.aside_of(final)))
                checkpoint_folder.publish(final)
                shutil.rmtree(str(run_folder.old_of(final)), ignore_errors=True)
        except OSError as error:
            raise arrival.unwritable(final, error) from None
