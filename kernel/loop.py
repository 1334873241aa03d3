"""The kernel's thread: it lets the core decide, performs what the core asks for, and waits for what happens.

    any thread ──events──> inbox ──> core.step ──actions──> perform ──> driver, host workers, disk, mailboxes
                             ^                                              │
                             └───────────── completions ────────────────────┘

It does not know the Kernel that hosts call, so a forgotten Kernel can be collected.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from msgspec import structs

from llm_os.kernel import events as ev
from llm_os.kernel.core import Core
from llm_os.kernel.disk import Disk
from llm_os.kernel.drafting import chosen
from llm_os.kernel.driver import Batch, Driver, Sampled
from llm_os.kernel.errors import Closed, DriverError
from llm_os.kernel.gate import Gate
from llm_os.kernel.hookspecs import ExitInfo, StepInfo
from llm_os.kernel.image import Image
from llm_os.kernel.plugins import Plugins
from llm_os.kernel.request import Request
from llm_os.kernel.stream import Mailbox

T = TypeVar("T")


class Loop:
    """What the kernel's thread owns."""

    def __init__(self, core: Core, driver: Driver, plugins: Plugins, disk: Disk) -> None:
        self.core = core
        self.driver = driver
        self.plugins = plugins
        self.disk = disk
        self.turn = threading.Lock()  # held while the core steps: snapshots see it between two turns
        self.inbox: queue.SimpleQueue[ev.Event | Callable[[], None]] = queue.SimpleQueue()
        self.mailboxes: dict[int, Mailbox] = {}
        self.unclaimed: dict[int, Mailbox] = {}  # of sessions of an earlier life that nobody has attached to
        self.tickets: dict[int, Future[None]] = {}
        self.host = ThreadPoolExecutor(2, thread_name_prefix="llm-os-host")
        self.gates: dict[int, Gate] = {}  # of processes whose request or answer goes through plugins
        self.leaving: set[Gate] = set()  # of processes that have ended, with what is still on its way to the reader
        self.runs: dict[int, tuple[Batch, float]] = {}  # batches in flight and when they began, likewise
        self.requests: dict[int, Request] = {}  # of live processes, where plugins want to see them
        self.waiters = ThreadPoolExecutor(32, thread_name_prefix="llm-os-waiter")  # they wait for plugins
        self.gate = threading.Lock()  # guards `closed` against the mailboxes and tickets that are about to be added
        self.closed: str | None = None  # what callers are told from now on
        self.ended: Future[None] = Future()  # set when everything has been given back

    def run(self) -> None:
        events: list[ev.Event] = []
        try:
            while not self.core.halted:
                self.announce(events)
                with self.turn:
                    actions = self.core.step(time.monotonic(), events)
                self.perform(actions)
                events = [] if self.core.halted else self.receive_all()
        except BaseException as error:  # a bug in the kernel: nobody may wait for ever
            self.shut(f"the kernel failed: {error!r}")
            raise
        finally:
            wait([gate.done for gate in self.leaving.copy()], self.core.config.hook_limit_s)  # they are finished
            self.abandon()
            self.host.shutdown()
            self.waiters.shutdown(wait=False)  # a call that hangs is left behind
            try:
                self.plugins.tell("halting")
                self.plugins.close()
                self.driver.close()
            finally:
                try:
                    self.disk.close()
                finally:
                    self.ended.set_result(None)

    def receive_all(self) -> list[ev.Event]:
        """What has happened since; waits for it, until the core wants to be woken. Calls that other threads have left
        for this one are made."""
        events: list[ev.Event] = []
        wakeup = self.core.wakeup
        try:
            items = [self.inbox.get(timeout=None if wakeup is None else max(0.0, wakeup - time.monotonic()))]
        except queue.Empty:
            return events
        while not self.inbox.empty():
            items.append(self.inbox.get())
        for item in items:
            if isinstance(item, ev.Event):
                events.append(item)
            else:
                item()
        return events

    def perform(self, actions: list[ev.Action]) -> None:
        """What the device is to do comes first: it computes while readers are told."""
        said: list[ev.Deliver | ev.Reply] = []
        for action in actions:
            match action:
                case ev.Deliver() | ev.Reply():
                    said.append(action)
                case ev.Close(image):
                    self.release(image)
                case ev.Discard(slots):
                    self.disk.discard(slots)
                case _:
                    self.operate(action)
        for item in said:
            match item:
                case ev.Deliver():
                    self.deliver(item)
                case ev.Reply(ticket, error):
                    _settle(self.tickets.pop(ticket), error)

    def announce(self, events: list[ev.Event]) -> None:
        """Plugins see a request before the core does, and batches that came back."""
        if not self.plugins.watching:
            return
        for event in events:
            match event:
                case ev.Submit(pid, request):
                    self.requests[pid] = request
                case ev.Fork(pid, parent) if parent in self.requests:
                    self.requests[pid] = self.requests[parent]
                case ev.Restore(pid, session):
                    self.requests[pid] = session.began.request
                case ev.Completed(operation) if operation in self.runs:
                    self.finished(event)
                    continue
                case _:
                    continue
            if self.plugins.filtering and pid not in self.gates:
                self.gates[pid] = Gate(
                    self.waiters,
                    partial(self.plugins.open_filters, self.requests[pid], isinstance(event, ev.Submit)),
                    self.hand_over,
                    partial(self.inbox.put, ev.Kill(pid, keep=isinstance(event, ev.Restore))),
                )

    def finished(self, event: ev.Completed) -> None:
        batch, began = self.runs.pop(event.operation)
        rows = event.result if isinstance(event.result, tuple) else ()
        step = StepInfo(
            model=batch.model,
            sequences=len(batch.sequences),
            tokens=sum(sequence.end - sequence.position for sequence in batch.sequences),
            seconds=time.monotonic() - began,
            live=len(self.core.processes),
            drafted=sum(len(sequence.guesses) for sequence in batch.sequences),
            accepted=sum(
                len(chosen(sequence, row)) - 1
                for sequence, row in zip(batch.sequences, rows, strict=False)
                if isinstance(row, Sampled)
            ),
        )
        self.plugins.tell("step_finished", step=step)

    def deliver(self, item: ev.Deliver) -> None:
        """Through the plugins' filters, if there are any, to the reader."""
        over = item.completion is not None or item.error is not None
        gate = self.gates.pop(item.pid, None) if over else self.gates.get(item.pid)
        if over and (request := self.requests.pop(item.pid, None)) is not None:
            self.plugins.tell("process_exited", process=_exit(item, request))
        if gate is None:
            self.hand_over(item)
            return
        if over:
            self.leaving.add(gate)
            gate.done.add_done_callback(lambda _: self.leaving.discard(gate))
        gate.put(item)

    def hand_over(self, item: ev.Deliver) -> None:
        over = item.completion is not None or item.error is not None
        mailbox = self.mailboxes.pop(item.pid, None) if over else self.mailboxes.get(item.pid)
        if mailbox is not None:
            mailbox.put(item)

    def operate(self, operation: ev.Operation) -> None:
        future: Future[Any]
        try:
            match operation:
                case ev.Open(_, model, image):
                    future = self.waiters.submit(self.open, model, image)
                case ev.Encode():
                    future = self.encode(operation)
                case ev.Compile(_, _, image, grammar):
                    future = self.waiters.submit(self.plugins.compile_grammar, grammar, image)
                case ev.Load(_, model, image, placement):
                    future = self.driver.load(model, image, placement)
                case ev.Unload(_, model):
                    future = self.driver.unload(model)
                case ev.Release(_, model):
                    future = self.driver.release(model)
                case ev.Prefetch(_, model, image):
                    future = self.driver.prefetch(model, image)
                case ev.SwapOut(_, model, pages, slots, tier):
                    future = self.disk.put(self.driver.swap_out(model, pages), slots, tier)
                case ev.SwapIn(_, model, slots, pages):
                    future = self.swap_in(model, slots, pages)
                case ev.Demote(_, _, slots):
                    future = self.disk.demote(slots)
                case ev.Journal(_, records):
                    future = self.disk.append(records)
                case ev.Run(id, batch):
                    for sequence in batch.sequences:
                        if sequence.sample is not None and sequence.sample.mask is not None:
                            for sample in (sequence.sample, *(guess.sample for guess in sequence.guesses)):
                                assert sample.mask is not None
                                sample.mask.begin()
                    future = self.driver.run(batch)
                    if self.plugins.watching:
                        self.runs[id] = batch, time.monotonic()
                case ev.Copy(_, model, moves):
                    future = self.driver.copy(model, moves)
        except Exception as error:  # a driver that raises instead of failing its future
            future = _failed(error)
        if not isinstance(future, Future):
            future = _failed(DriverError(f"the driver answered {type(operation).__name__} with no future"))
        future.add_done_callback(partial(self.complete, operation.id))

    def complete(self, operation: int, future: Future[Any]) -> None:
        error = DriverError("the operation was cancelled") if future.cancelled() else future.exception()
        self.inbox.put(ev.Completed(operation, None if error else future.result(), error))

    def encode(self, operation: ev.Encode) -> Future[list[int]]:
        gate = self.gates.get(operation.pid)
        if gate is None:
            return self.host.submit(encode, operation)
        encoded: Future[list[int]] = Future()

        def go_on(request: Future[Request]) -> None:
            try:
                changed = structs.replace(operation, request=request.result())
                _then(self.host.submit(encode, changed), encoded, lambda tokens: tokens)
            except Exception as error:  # a plugin refused it or failed; or the kernel has closed
                encoded.set_exception(error)

        gate.request.add_done_callback(go_on)
        return encoded

    def swap_in(self, model: str, slots: tuple[int, ...], pages: tuple[int, ...]) -> Future[tuple[bool, ...]]:
        """Read the slots, then write the sound ones into their pages."""
        done: Future[tuple[bool, ...]] = Future()

        def write(contents: list[bytes | None]) -> None:
            """In the kernel's thread, as every call of the driver."""
            good = [(page, content) for page, content in zip(pages, contents, strict=True) if content is not None]
            try:
                written = self.driver.swap_in(model, tuple(page for page, _ in good), tuple(c for _, c in good))
                _then(written, done, lambda _: tuple(content is not None for content in contents))
            except Exception as error:
                done.set_exception(error)

        def read(future: Future[list[bytes | None]]) -> None:
            if (error := future.exception()) is not None:
                done.set_exception(error)
            else:
                self.inbox.put(partial(write, future.result()))

        self.disk.get(slots).add_done_callback(read)
        return done

    def open(self, model: str, last: Image | None) -> ev.Opened:
        image = last if last is not None and last.fresh() else self.plugins.open_image(model)
        try:
            return ev.Opened(image, self.driver.footprint(image, self.core.config.batch_tokens))
        except BaseException:
            if image is not last:
                image.close()
            raise

    def release(self, image: Image) -> None:
        try:
            self.host.submit(image.close)
        except RuntimeError:  # Python is exiting, and executors take no more work
            image.close()

    def halt(self) -> None:
        self.shut("the kernel is closed")
        self.inbox.put(ev.Halt())

    def shut(self, reason: str) -> None:
        """No call gets in from now on."""
        with self.gate:
            self.closed = self.closed or reason

    def abandon(self) -> None:
        """After the last step: whoever still waits is told so."""
        for pid in list(self.mailboxes):
            if mailbox := self.mailboxes.pop(pid, None):  # its reader may be leaving at this moment
                mailbox.put(ev.Deliver(pid, error=Closed(self.closed)))
        for ticket in list(self.tickets):
            _settle(self.tickets.pop(ticket), Closed(self.closed))


def encode(operation: ev.Encode) -> list[int]:
    """A request's token ids, through the image's chat template unless it is raw."""
    request, image = operation.request, operation.image
    if request.messages is not None:
        text = image.render_chat(request.messages, *([request.tools] if request.tools else ()))
        return image.encode(text, raw=False)
    if isinstance(request.prompt, str):
        return image.encode(request.prompt, raw=True)
    return list(request.prompt or ())


def _exit(item: ev.Deliver, request: Request) -> ExitInfo:
    done = item.completion
    return ExitInfo(
        pid=item.pid,
        tenant=request.tenant,
        model=request.model,
        finish_reason=done.finish_reason if done is not None else None,
        error=str(item.error) if item.error is not None else None,
        usage=done.usage if done is not None else None,
    )


def _failed(error: Exception) -> Future[Any]:
    future = Future[Any]()
    future.set_exception(error)
    return future


def _then(future: Future[Any], done: Future[T], change: Callable[[Any], T]) -> None:
    """Settle `done` as `future` is, with its result changed."""

    def settle(future: Future[Any]) -> None:
        error = DriverError("the operation was cancelled") if future.cancelled() else future.exception()
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(change(future.result()))

    future.add_done_callback(settle)


def _settle(future: Future[None], error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
