"""The process that looks at a models folder, and the only one that ever touches it.

A folder on a dead network mount stops whoever asks for its content, and SIGKILL with him; here that is this process and
not the daemon. It is started as `python -P -m llamavisor.watch.worker`, is told what to look at through its standard
input (a path may hold anything, a command line may not), tells what it found through its standard output, and ends when
either closes.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from llamavisor.catalog.entry import Scan
from llamavisor.catalog.mounts import network_devices
from llamavisor.watch.hints import FolderId, Hint, Hints, add_linked, find_folders, identify, is_about_name
from llamavisor.watch.wire import Configure, Decoder, Mode, ScanNow, encode, encode_scan

NAMES_REST_S = 0.2
"""Between two looks while files come or go: 10,000 files dropped at once cost a few looks, not 10,000."""
CONTENT_REST_S = 2.0
"""Between two looks while files are only written to. What settles is looked at when it is due, whatever is hinted."""
CONTENT_SHARE = 10
"""While somebody copies, looking may take this part of the time."""
POLLING_S = 5.0
"""Between two looks when the kernel gives no hints."""
ROOT_CHECK_S = 2.0
"""How soon a folder is noticed that was put in the place of the one that we listen to: one stat."""
MIN_AGAIN_S = 0.05
REARM_S = 1.0
"""Between two attempts to listen again when what ended the last one is still going on."""
RETRY_S = 300.0
"""Between two attempts after the kernel refused: a limit is rarely raised. No listening lasts longer than this either:
what makes it deaf unnoticed (a file system that is unmounted and mounted again) does not for long."""
_NICE = 5
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 64 * 1024


class Looking(Protocol):
    """What looks at the folder: `llamavisor.catalog.scanner.Scanner`.

    Attributes:
        linked: folders that links lead to or into, as of the last look.
    """

    linked: tuple[str, ...]

    def scan(self) -> Scan:
        """Look now; may take long, or never return."""
        ...


class Line:
    """The pipe to the daemon and the one from it; ends this process when the daemon has gone."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading = reading
        self._writing = writing
        self._decoder = Decoder()

    def receive(self) -> list[object]:
        """What has come; waits until something has."""
        data = os.read(self.reading, _READ_BYTES)
        if not data:
            os._exit(0)
        return list(self._decoder.feed(data))

    def send(self, data: bytes) -> None:
        """Hand over, however long the daemon takes."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._writing, view) :]
        except BrokenPipeError:
            os._exit(0)


class Worker:
    """Decides when to look, and looks.

    It looks at once, and then at the earliest of: a hint of the kernel, what the last look asked for, the interval, and
    a message of the daemon.

    Args:
        configure: what to look at.
        line: to the daemon.
        scanner: looks.
        hints: of the kernel.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        configure: Configure,
        line: Line,
        scanner: Looking,
        hints: Hints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._root = configure.root
        self._interval_s = configure.interval_s
        self._token = configure.token
        self._line = line
        self._scanner = scanner
        self._hints = hints
        self._is_asked = True
        self._hint = Hint.NOTHING
        self._is_network = False
        self._root_id: FolderId | None = None
        self._last_end = self._clock()
        self._duration_s = 0.0
        self._again_at = float("inf")
        self._rearm_at = 0.0
        self._failed_at = float("-inf")
        self._refusal = ""  # why the kernel does not give hints
        self._absence = ""  # why there is nothing to listen to
        self._linked: tuple[str, ...] = ()
        self._failure = ""
        self._errors = 0
        self._told: Mode | None = None

    def __repr__(self) -> str:
        return f"<Worker {self._root!r} {self._hints!r} errors={self._errors}>"

    def run(self) -> None:
        """Look again and again. Returns never; the process ends when the daemon does."""
        poll = select.poll()
        poll.register(self._line.reading, select.POLLIN)
        poll.register(self._hints.wakeup, select.POLLIN)
        while True:
            if self._due_at() <= self._clock():
                self._look()
                wait_s = 0.0  # what has come meanwhile is read first
            else:
                wait_s = min(self._due_at() - self._clock(), ROOT_CHECK_S)
            for ready, _ in poll.poll(max(wait_s, 0.0) * 1000):
                if ready == self._line.reading:
                    self.hear(self._line.receive())
                else:
                    self._listen_to_kernel()
            self._check_root()

    def _due_at(self) -> float:
        """When to look next."""
        if self._is_asked:
            return 0.0
        due = min(self._last_end + self._pause_s(), self._again_at)
        if self._hint is Hint.CONTENT:
            due = min(due, self._last_end + max(CONTENT_REST_S, CONTENT_SHARE * self._duration_s))
        elif self._hint is not Hint.NOTHING:
            due = min(due, self._last_end + self._rest_s())
        if self._is_deaf:
            due = min(due, max(self._rearm_at, self._last_end + self._rest_s()))
        return due

    def _rest_s(self) -> float:
        return max(NAMES_REST_S, self._duration_s)

    @property
    def _is_deaf(self) -> bool:
        """Whether it should be listening and is not."""
        return self._mode() == "inotify" and self._root_id is not None and not self._hints.is_listening

    def _pause_s(self) -> float:
        """How long to wait when nothing hints at anything."""
        if self._mode() == "inotify" or self._root_id is None:  # that it comes is noticed by itself
            return self._interval_s
        return min(self._interval_s, max(POLLING_S, CONTENT_SHARE * self._duration_s))

    def _look(self) -> None:
        self._is_asked, self._hint = False, Hint.NOTHING
        token = self._token
        # In this order: what comes between the two is in the look, what comes after it gives a hint.
        self._listen_anew()
        self._tell_mode()
        begin = self._clock()
        scan = self._scanner.scan()
        self._last_end = self._clock()
        self._duration_s = self._last_end - begin
        again_s = scan.again_in_s
        self._again_at = float("inf") if again_s is None else self._last_end + max(again_s, MIN_AGAIN_S)
        for data in encode_scan(scan, token):
            self._line.send(data)
        self._follow_links()

    def _follow_links(self) -> None:
        """Listen behind links as well. What is there is known after a look, so another one has to follow."""
        if self._scanner.linked == self._linked:
            return
        self._linked = self._scanner.linked
        if self._hints.is_listening and self._listen_anew():
            self._hint = max(self._hint, Hint.NAMES)
        self._tell_mode()

    def hear(self, messages: Iterable[object]) -> None:
        """Note what the daemon said."""
        for message in messages:
            if isinstance(message, ScanNow):
                self._token = message.token
                self._is_asked = True

    def _listen_to_kernel(self) -> None:
        hint, failure = self._hints.take()
        if failure:
            if not is_about_name(failure):
                self._failure = failure
                self._errors += 1
            now = self._clock()
            if now - self._failed_at < CONTENT_REST_S:  # a file with a bad name is being written to: no haste
                self._rearm_at = self._last_end + max(REARM_S, CONTENT_SHARE * self._duration_s)
                hint = Hint.CONTENT
            self._failed_at = now
        self._hint = max(self._hint, hint)
        if hint is Hint.FOLDERS:
            self._hints.stop()

    def _check_root(self) -> None:
        """Look when there is another folder now than there was, or one where there was none."""
        if _identify(self._root) != self._root_id:
            self._is_asked = True

    def _listen_anew(self) -> bool:
        """Listen to all folders that there are now; whether it did not already."""
        self._root_id = _identify(self._root)
        self._is_network = self._root_id is not None and self._root_id[0] in network_devices()
        folders = {} if self._is_network or self._root_id is None else find_folders(self._root)
        self._absence = "" if folders else "there is no folder that can be read"
        if not folders:
            self._hints.stop()
            return False
        folders = add_linked(folders, self._linked)
        now = self._clock()
        if now < self._rearm_at or self._hints.covers(folders, within_s=RETRY_S):
            return False
        try:
            self._hints.listen(folders)
        except FileNotFoundError:  # since it was found
            self._rearm_at = now + REARM_S
        except OSError as error:
            self._failure = self._refusal = str(error)
            self._errors += 1
            self._rearm_at = now + RETRY_S
        else:
            self._refusal = ""
            return True
        return False

    def _mode(self) -> str:
        return "polling" if self._is_network or self._absence or self._refusal else "inotify"

    def _tell_mode(self) -> None:
        reason = self._failure
        if self._is_network:
            reason = "the folder is on a network file system"
        elif self._absence:
            reason = self._absence
        elif self._refusal:
            reason = self._refusal
        mode = Mode(self._mode(), reason, self._errors)
        if mode != self._told:
            self._told = mode
            self._line.send(encode(mode))


def _identify(folder: str) -> FolderId | None:
    try:
        return identify(folder)
    except OSError:
        return None


def main() -> None:
    """Be the worker."""
    # Only the end of the daemon ends this process: by this signal, or by the end of the pipes if it came before.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the daemon when a group gets them
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(_NICE)
    writing = os.dup(1)
    os.dup2(2, 1)  # a stray print must not end up between two messages
    line = Line(0, writing)
    messages: list[object] = []
    while not (configures := [message for message in messages if isinstance(message, Configure)]):
        messages += line.receive()
    configure = configures[0]
    # Late, so that a worker whose catalog does not even import still says so on its standard error.
    from llamavisor.catalog.scanner import Scanner  # noqa: PLC0415

    worker = Worker(configure, line, Scanner(configure.root, link_dirs=configure.link_dirs), Hints())
    worker.hear(messages)
    worker.run()


if __name__ == "__main__":
    main()
