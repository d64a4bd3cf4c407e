"""The parts of a save: a thread that works behind the next steps, what is left to do after it, and which ranks do it."""

import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from . import checkpoint_folder, manifest_where
from .errors import RunFailed
from .place import Place

Entries = Dict[str, Any]  # file name -> its entry in the manifest


class Job:
    """``work`` in a thread of its own. Then ``result``, or ``problem``: why there is none."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result, self.problem, self.ended = None, "", 0.0
        self.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the main thread raises it, on every rank
            self.problem = str(error) or type(error).__name__
            if not isinstance(error, RunFailed):
                traceback.print_exc()
        self.ended = time.perf_counter()

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()


class Save:
    """One save under way: ``job`` on every rank, and the steps ``left`` to the ranks that lead when it is done everywhere."""

    def __init__(self, final: Path, document: Dict[str, Any], behind: bool, left: List[Callable[["Save"], Any]]) -> None:
        self.final, self.document, self.behind, self.left = final, document, behind, left
        self.began, self.stall = time.perf_counter(), 0.0
        self.job: Optional[Job] = None
        self.where: Dict[str, List[int]] = {}  # file name -> nodes that wrote it
        self.undo = checkpoint_folder.abandon  # when any rank fails now


class Parts:
    """Who makes folders, and what every node's holds. ``scattered``: each node has its own, made by its first rank; else rank 0
    makes the one. ``ranks``: those that write into the same folder as ``rank`` does, None: all."""

    def __init__(self, place: Place, rank: int) -> None:
        self.place, self.scattered = place, not place.shared and len(place.nodes) > 1
        self.ranks: Optional[Tuple[int, ...]] = place.ranks if self.scattered else None
        self.node: Optional[int] = place.node if self.scattered else None
        self.leads = rank == (place.ranks[0] if self.scattered else 0)

    def check(self, problems: Iterable[str]) -> None:
        """``problems``: every rank's, "" for none. Raises RunFailed with the first one, naming its node."""
        for rank, problem in enumerate(problems):
            if problem:
                raise RunFailed(self._named(rank) + problem)

    def compare(self, beside: List[Optional[Entries]], folder: Path) -> None:
        """``beside``: what the ranks that lead will copy into every checkpoint, by rank. Raises RunFailed when nodes differ."""
        for rank, entries in enumerate(beside):
            if entries is not None and entries != beside[0]:
                both = [entries, beside[0] or {}]
                name = min(name for one in both for name in one if both[0].get(name) != both[1].get(name))
                raise self._differs(rank, folder / name, 0)

    def add(self, files: Entries, where: Dict[str, List[int]], written: List[Entries], folder: Path) -> None:
        """Put what every rank has ``written`` into the manifest's ``files``, and which nodes have it into ``where``.

        Raises RunFailed when two nodes have written different files of one name."""
        for rank, entries in enumerate(written):
            for name, entry in entries.items():
                if files.setdefault(name, entry) != entry:
                    raise self._differs(rank, folder / name, where[name][0])
                if self.scattered:
                    where.setdefault(name, []).append(self.place.node_of(rank))

    def document(self, where: Dict[str, List[int]]) -> Dict[str, Any]:
        """What the manifest says about it."""
        return {"where": manifest_where.of([node.name for node in self.place.nodes], where)} if self.scattered else {}

    def _differs(self, rank: int, path: Path, node: int) -> RunFailed:
        return RunFailed("%s%s is not what node %d (%s) has; make the models of all nodes the same"
                         % (self._named(rank), path, node, self.place.nodes[node].name))  # fmt: skip

    def _named(self, rank: int) -> str:
        node = self.place.node_of(rank) if self.scattered else 0
        return "node %d (%s): " % (node, self.place.nodes[node].name) if self.scattered else ""


class Finish:
    """What is left when all files are written: ``steps``, for the ranks that lead. ``beside``: the folder whose files every
    checkpoint has a copy of. Each step is done on every node before the next one begins anywhere."""

    def __init__(self, parts: Parts, beside: Path, keep: int) -> None:
        self.parts, self.beside, self.keep = parts, beside, keep

    def steps(self) -> List[Callable[[Save], Any]]:
        return [self._copy, self._seal, self._publish, self._settle] if self.parts.scattered else [self._complete]

    def _complete(self, save: Save) -> None:
        _on_disk(save, lambda: checkpoint_folder.complete(save.final, save.document, self.beside))
        checkpoint_folder.prune(save.final, self.keep)

    def _copy(self, save: Save) -> Entries:
        return dict(_on_disk(save, lambda: checkpoint_folder.copy_beside(save.final, self.beside)))

    def _seal(self, save: Save) -> None:
        save.document.update(self.parts.document(save.where))
        _on_disk(save, lambda: checkpoint_folder.seal(save.final, save.document, self.parts.node))

    def _publish(self, save: Save) -> None:
        save.undo = checkpoint_folder.withdraw
        _on_disk(save, lambda: checkpoint_folder.publish(save.final))

    def _settle(self, save: Save) -> None:
        save.undo = checkpoint_folder.abandon  # it is whole everywhere and stays
        _on_disk(save, lambda: checkpoint_folder.settle(save.final))
        checkpoint_folder.prune(save.final, self.keep)


def _on_disk(save: Save, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except OSError as error:
        raise checkpoint_folder.unwritable(save.final, save.final.parent, error) from None
