"""Recorders on which things go wrong, for tests of what becomes of training then."""

from __future__ import annotations

from collections.abc import Callable

from tests.engine.tape import TapeRecorder

Work = Callable[[], None]


class Failing(TapeRecorder):
    """`recordings` and `replays` fail as they are counted, each with the error that stands under its number, from 0.

    A step is two recordings, and each of its uses two replays; the first use is the check.
    """

    def __init__(self, *, recordings: dict[int, BaseException] | None = None) -> None:
        super().__init__()
        self.recordings, self.replays = recordings or {}, dict[int, BaseException]()
        self.recorded, self.replayed, self.mended = 0, 0, 0

    def record(self, work: Work) -> Work:
        number, self.recorded = self.recorded, self.recorded + 1
        if (error := self.recordings.get(number)) is not None:
            raise error
        replay = super().record(work)

        def counted() -> None:
            number, self.replayed = self.replayed, self.replayed + 1
            if (error := self.replays.get(number)) is not None:
                raise error
            replay()

        return counted

    def mend(self) -> None:
        self.mended += 1


class Wrong(TapeRecorder):
    """Each `which`-th of a step's two replays (0: the forward, 1: the backward) is followed by `fault`."""

    def __init__(self, which: int, fault: Work) -> None:
        super().__init__()
        self.which, self.fault, self.recorded = which, fault, 0

    def record(self, work: Work) -> Work:
        number, self.recorded = self.recorded % 2, self.recorded + 1
        replay = super().record(work)

        def spoilt() -> None:
            replay()
            if number == self.which:
                self.fault()

        return spoilt
