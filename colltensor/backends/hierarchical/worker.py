"""Worker: the thread that moves data between hosts, beside the caller's in shared memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final


class Task:
    """One thing for the worker to do; made by ``Worker.send``."""

    __slots__ = ("_done", "_work", "error")

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work: Callable[[], None] | None = work
        self._done = threading.Event()

    def wait(self) -> None:
        """Return when it is done; raise what it raised. The work bounds its own time."""
        self._done.wait()
        if self.error is not None:
            raise self.error

    def _finish(self, failure: BaseException | None) -> BaseException | None:
        """Do the work unless an earlier task has failed; return the failure."""
        work, self._work = self._work, None
        if failure is None and work is not None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - kept for whoever waits, whatever it is
                failure = error
        self.error = failure
        self._done.set()
        return failure


NOTHING: Final = Task(lambda: None)
"""A task that is done."""
NOTHING._finish(None)


class Worker:
    """Does tasks one after the other in a thread of its own, made on first use.

    After a failure it does no more.

    Attributes:
        failure: What the first task that failed raised.
    """

    def __init__(self, name: str, on_failure: Callable[[], None]) -> None:
        """Prepare.

        Args:
            name: Of the thread.
            on_failure: Called in the worker's thread when a task has failed.
        """
        self.failure: BaseException | None = None
        self._name = name
        self._on_failure = on_failure
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, work: Callable[[], None]) -> Task:
        """Do ``work`` once what was sent before is done."""
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        task = Task(work)
        self._tasks.put(task)
        return task

    def end(self, timeout_s: float) -> None:
        """Let the thread end once it has done what it was sent, and wait for it.

        Nothing may be sent any more.
        """
        thread = self._thread
        if thread is not None:
            self._tasks.put(None)
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            failed = task._finish(self.failure)
            del task  # and with it the references to memory that it worked on
            if failed is not None and self.failure is None:
                self.failure = failed
                self._on_failure()
