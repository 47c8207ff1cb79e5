"""Items of an iterator made ahead of their use."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any, TypeVar

Value = TypeVar("Value")


class Prefetcher(Iterator[Value]):
    """The items of an iterator, made ahead of their use by one thread.

    An exception of the iterator is raised where its item would have come.
    """

    _END = object()

    def __init__(self, items: Iterator[Value], depth: int) -> None:
        self.queue: Queue[Any] = Queue(maxsize=max(1, depth))
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self.thread.start()

    def __next__(self) -> Value:
        item = self.queue.get()
        if item is self._END:
            raise StopIteration
        if isinstance(item, _Failure):
            raise item.error
        value: Value = item
        return value

    def close(self) -> None:
        """Stop making items and wait for the thread."""
        self.stopped.set()
        while self.thread.is_alive():
            while not self.queue.empty():
                self.queue.get()
            self.thread.join(0.05)

    def _run(self, items: Iterator[Value]) -> None:
        try:
            for item in items:
                self.queue.put(item)
                if self.stopped.is_set():
                    return
            self.queue.put(self._END)
        except BaseException as error:
            self.queue.put(_Failure(error))


@dataclass(frozen=True)
class _Failure:
    error: BaseException
