"""Packed batches from JSONL files: sharded by data rank, shuffled, packed to a token budget, resumable at any step.

    stream = PackedStream(files, transform, collator, budget=8192, dp_rank=ps.dp_rank, dp_size=ps.dp_size, seed=0)
    for pack in stream:
        train(pack.batch)
        state = pack.position          # every data rank's; `resume(all_of_them)` goes on behind this pack

Data workers (spawned, so that neither CUDA nor a process group is inherited) turn lines into features; their number
changes nothing but speed, since features are taken in the order in which they were asked for. Packing and collating run
in a thread, `prefetch` packs ahead of the training loop.
"""

import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from .jsonl import BadSample, Feature, JsonlFeatures, JsonlFiles, Transform
from .order import Position, SampleOrder
from .packing import Packer

ON_BAD_SAMPLE = ("skip", "fail")
NAMED = 5  # of the samples in the error that ends a run which finds none it can use


@dataclass(frozen=True)
class Pack:
    """One batch and where it came from."""

    batch: dict[str, Any]
    """What the collator made of it."""
    samples: list[str]
    """file:line of each sample, in order."""
    tokens: int
    """Tokens of the samples, padding left out."""
    bad: list[BadSample]
    """Samples that were skipped on the way to this pack."""
    position: dict[str, Any]
    """This data rank's position behind the pack, as JSON."""


@dataclass
class PackedStream:
    """Iterable of `Pack`s; ends after `epochs`, or never.

    Args:
        files: where the samples are.
        transform: (sample, folder) -> feature; picklable.
        collator: features -> batch.
        budget: tokens in a pack at most.
        dp_rank, dp_size: ranks of one sequence-parallel group share a dp_rank and see the same packs.
        seed: of the shuffle; None keeps the files' order.
        epochs: None never ends.
        on_bad_sample: "skip" hands broken samples out with the next pack, "fail" raises a ValueError at the first.
        workers: processes; 0 works in this one.
        buffer: samples that wait to be packed; more of them leave less padding.
        prefetch: packs made ahead; 0 makes each when it is asked for.
        pin_memory: put batches where a GPU can fetch them without waiting.
    """

    files: JsonlFiles
    transform: Transform
    collator: Callable[[Sequence[Feature]], dict[str, Any]]
    budget: int
    dp_rank: int = 0
    dp_size: int = 1
    seed: int | None = 0
    epochs: int | None = None
    on_bad_sample: str = "skip"
    workers: int = 0
    buffer: int = 64
    prefetch: int = 2
    pin_memory: bool = False
    _order: SampleOrder = field(init=False)
    _position: Position = field(init=False)

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(f"on_bad_sample={self.on_bad_sample!r}; choose one of {', '.join(ON_BAD_SAMPLE)}.")
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank={self.dp_rank} is not one of dp_size={self.dp_size} ranks.")
        self._order = SampleOrder(len(self.files), self.seed, self.epochs)
        self._position = Position()

    def resume(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind packs whose `position`s are given, one for each data rank of the run that was stopped.

        Raises:
            ValueError: the data is not what that run had.
        """
        former = states[0]["order"]
        if (former["size"], former["seed"]) != (len(self.files), self.seed):
            raise ValueError(
                f"the stopped run had {former['size']} samples and seed {former['seed']}, this one has "
                f"{len(self.files)} and {self.seed}; resume with the same data and seed, or start a new run."
            )
        if states[0].get("data", self.files.fingerprint) != self.files.fingerprint:
            raise ValueError(
                f"the data files hold as many samples as the stopped run's, {len(self.files)}, but other ones; resume "
                "with the same data, or start a new run."
            )
        first = tuple((epoch, place) for epoch, place in former["first"])
        order = SampleOrder(former["size"], former["seed"], self.epochs, first, former["start"])
        positions = [Position(state["taken"], list(state["waiting"])) for state in states]
        if len(states) == self.dp_size:
            self._order, self._position = order, positions[self.dp_rank]
        else:
            self._order, self._position = order.after(positions), Position()

    @property
    def position(self) -> dict[str, Any]:
        """Where iterating begins, as a pack's `position` tells where it goes on."""
        return self._as_json(self._order, self._position)

    def _as_json(self, order: SampleOrder, position: Position) -> dict[str, Any]:
        described = {"size": order.size, "seed": order.seed, "first": order.first, "start": order.start}
        return {**asdict(position), "order": described, "data": self.files.fingerprint}

    def __iter__(self) -> Generator[Pack, None, None]:
        if not self.prefetch:
            yield from self._packs()
            return
        ready: queue.Queue[Pack | BaseException | None] = queue.Queue(self.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():
                _drain(ready)
                thread.join(0.05)

    def _fill(self, ready: "queue.Queue[Pack | BaseException | None]", stop: threading.Event) -> None:
        """The thread: packs into the queue, an error as its last element."""
        try:
            for pack in self._packs():
                ready.put(pack)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # raised again in the training loop
            ready.put(error)

    def _packs(self) -> Iterator[Pack]:
        order, position = self._order, Position(self._position.taken)
        packer: Packer[tuple[int, Feature]] = Packer(self.budget, self.buffer)
        bad: list[BadSample] = []
        in_a_row = 0
        for index, feature, is_new in self._features(order, self._position):
            position.taken += is_new
            if isinstance(feature, BadSample):
                if self.on_bad_sample == "fail":
                    raise ValueError(str(feature))
                bad.append(feature)
                in_a_row += 1
                if in_a_row > order.size:
                    first = "".join(f"\n  {sample}" for sample in bad[-in_a_row:][:NAMED])
                    raise ValueError(f"none of {in_a_row} samples in a row could be used; the first of them:{first}")
                continue
            in_a_row = 0
            packer.add(feature["input_ids"].numel(), (index, feature))
            if packer.full:
                yield self._pack(packer, order, position, bad)
                bad = []
        while packer.waiting or bad:
            yield self._pack(packer, order, position, bad)
            bad = []

    def _pack(
        self,
        packer: "Packer[tuple[int, Feature]]",
        order: SampleOrder,
        position: Position,
        bad: list[BadSample],
    ) -> Pack:
        chosen = packer.take()
        features = [feature for _, feature in chosen]
        waiting = [index for _, (index, _) in packer.waiting]
        lines = [self.files.locate(order.number(index)) for index, _ in chosen]
        batch = self.collator(features) if features else {}
        return Pack(
            batch={key: _pinned(value) for key, value in batch.items()} if self.pin_memory else batch,
            samples=[f"{path}:{line}" for path, line in lines],
            tokens=sum(feature["input_ids"].numel() for feature in features),
            bad=bad,
            position=self._as_json(order, Position(position.taken, waiting)),
        )

    def _features(self, order: SampleOrder, position: Position) -> Iterator[tuple[int, Feature | BadSample, bool]]:
        """(index, feature, whether it is taken now) in order; those that waited when the run stopped come first."""

        def plan() -> Iterator[tuple[int, bool]]:
            yield from ((index, False) for index in position.waiting)
            yield from ((index, True) for index in order.indices(self.dp_rank, self.dp_size, position.taken))

        dataset = JsonlFeatures(self.files, self.transform)
        if not self.workers:
            for index, is_new in plan():
                yield index, dataset[order.number(index)], is_new
            return
        loader = DataLoader(
            dataset,
            sampler=(order.number(index) for index, _ in plan()),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            multiprocessing_context="spawn",
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # else the loader draws from the training loop's random numbers
        )
        for (index, is_new), feature in zip(plan(), loader, strict=True):
            if not isinstance(feature, BadSample):
                # Copied: a tensor that lies in a worker's shared memory holds a file descriptor, and they are few.
                feature = {key: value.clone() for key, value in feature.items()}
            yield index, feature, is_new


def _unchanged(feature: Any) -> Any:
    return feature


def _leave_signals_to_the_parent(worker: int) -> None:
    """A scheduler sends SIGTERM to every process; workers live on until the last checkpoint is written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _pinned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    return {key: _pinned(part) for key, part in value.items()} if isinstance(value, dict) else value


def _drain(ready: "queue.Queue[Any]") -> None:
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
