"""A Hopper multiprocessor in plain Python, for the Gluon kernel's own source.

`attend_here` runs `hopper_forward` as it is written, with `gl`, `tma`, `mbarrier` and the products
replaced: each warp group is a thread, of which one runs at a time, changing at random wherever they
meet; a few programs run at once, faster and slower ones. Copies land, and products read shared
memory, as late or as early as a GPU may do it: memory that a copy may be writing holds garbage, and
reading what another has changed meanwhile raises. So this finds deadlocks, buffers that are
overwritten, missing proxy fences, wrong byte counts and wrong numbers. It knows nothing of single
warps, registers, layouts and speed.
"""

import random
import threading
from collections import deque
from types import SimpleNamespace

import torch

from tests.kernels.hopper_gluon import Buffer, Descriptor, pointer, sources, value
from vdit_sparse.kernels.block_sparse.hopper import kernel, launch

GARBAGE = 77
AT_ONCE = 3  # programs that run at a time


def same(x, y) -> bool:
    """Whether two tensors are equal, NaN being itself."""
    return bool(((x == y) | ((x != x) & (y != y))).all())


class Barrier:
    def __init__(self):
        self.count = self.left = self.bytes = self.done = 0

    def change(self, arrivals, size):
        self.left -= arrivals
        self.bytes += size
        if self.left < 0:
            raise RuntimeError("more arrivals than the barrier's count")
        if self.left == 0 and self.bytes == 0:
            self.done, self.left = self.done + 1, self.count


class Worker:
    """A warp group: a thread that waits for its turn."""

    def __init__(self, machine, function, arguments, speed):
        self.machine, self.speed, self.over, self.error = machine, speed, False, None
        self.ready, self.turn = (lambda: True), threading.Semaphore(0)
        self.products, self.stores = [], []
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self.thread.start()

    def _run(self, function, arguments):
        self.turn.acquire()
        try:
            # A worker may be stopped before its first turn.
            if not self.machine.stopped:
                function(*arguments)
        except BaseException as error:
            self.error = error
        self.over = True
        self.machine.control.release()

    def pause(self, ready=lambda: True):
        self.ready = ready
        self.machine.control.release()
        self.turn.acquire()
        if self.machine.stopped:
            raise SystemExit


class Machine:
    """What the kernel's names stand for while one program runs."""

    def __init__(self, program, programs, seed):
        self.random = random.Random(seed)
        self.control, self.stopped, self.current = threading.Semaphore(0), False, None
        self.copies, self.buffers, self.place = [], [], (program, programs)
        self.speed, self.workers, self.outputs = self.random.random() ** 4, [], 0
        self.names = sources(self)

    def specialize(self, groups, warps, registers):
        """Starts the warp groups, which then wait for their turns."""
        self.workers = [Worker(self, *group, self.random.random() ** 4) for group in groups]

    def over(self):
        return all(worker.over for worker in self.workers) and not self.copies

    def stop(self):
        self.stopped = True
        for worker in self.workers:
            worker.turn.release()
            worker.thread.join()

    def move(self):
        """One copy lands, or one warp group has its turn."""
        things = [w for w in self.workers if not w.over and w.ready()] + self.copies
        if not things:
            raise RuntimeError("deadlock: every warp group waits")
        chosen = self.random.choices(things, [thing.speed for thing in things])
        if chosen[0] in self.copies:
            self.copies.remove(chosen[0])
            return chosen[0].land()
        self.current = chosen[0]
        self.current.turn.release()
        self.control.acquire()
        if self.current.error is not None:
            raise self.current.error

    def allocate(self, dtype, shape, layout):
        if dtype == torch.int64:
            return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
        kind = torch.float32
        if dtype in (torch.int8, torch.int32):
            kind = getattr(dtype, "torch", dtype)
        owners = [SimpleNamespace(dirty=set(), machine=self) for _ in range(shape[0])]
        self.buffers += owners
        return Buffer(torch.full(shape, GARBAGE, dtype=kind), dtype, owners)

    def fence(self):
        for owner in self.buffers:
            owner.dirty.discard(self.current)

    def init(self, barrier, count):
        barrier.count = barrier.left = count

    def expect(self, barrier, size):
        barrier.change(1, size)
        self.current.pause()

    def arrive(self, barrier):
        barrier.change(1, 0)
        self.current.pause()

    def wait(self, barrier, parity, pred=True):
        self.current.pause(lambda: not pred or barrier.done & 1 != int(parity))

    def load_tile(self, descriptor, at, barrier, tile):
        tile.x.fill_(GARBAGE)

        def land():
            tile.x.copy_(descriptor.read(at, tile.x.shape))
            barrier.change(0, -tile.x.numel() * tile.dtype.primitive_bitwidth // 8)

        self.copies.append(SimpleNamespace(land=land, speed=0.2))
        self.current.pause()

    def store_tile(self, descriptor, at, tile):
        before, stores = tile.read(), self.current.stores
        self.outputs += 1

        def land():
            if not same(tile.x, before):
                raise RuntimeError("outputs were overwritten before they were stored")
            descriptor.write(at, tile.x)
            stores.remove(copy)

        copy = SimpleNamespace(land=land, speed=0.2 * self.random.random() ** 8)
        stores.append(copy)
        self.copies.append(copy)
        self.current.pause()

    def store_wait(self, pending):
        stores = self.current.stores
        self.current.pause(lambda: len(stores) <= pending)

    def product(self, a, b, acc, use_acc=True, is_async=False):
        def read():
            return tuple(x.read() if isinstance(x, Buffer) else x for x in (a, b))

        self.current.products.append(SimpleNamespace(read=read, first=read(), result=None))
        if use_acc:
            self.current.products[-1].acc = acc
        self.current.pause()
        return self.current.products[-1]

    def product_wait(self, pending, wanted):
        self.current.pause()
        products = self.current.products
        while len(products) > pending:
            done = products.pop(0)
            a, b = done.read()
            if not all(same(x, y) for x, y in zip((a, b), done.first, strict=True)):
                raise RuntimeError("operands changed while a product read them")
            result = a.double() @ b.double() + getattr(done, "acc", 0)
            kind = torch.int32 if a.dtype == torch.int8 else torch.float32
            done.result = value(result.to(kind))
        if wanted[0].result is None:
            raise RuntimeError("a product is used before it is done")
        return wanted[0].result


class Launcher:
    """Stands in for the compiled kernel: `launcher[grid](*arguments, **constants)`."""

    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, grid):
        def run(*arguments, num_warps, maxnreg=None, **constants):
            names = kernel.hopper_forward.arg_names
            given = dict(zip(names, arguments, strict=False)) | constants
            for name, x in given.items():
                if name.endswith("_desc"):
                    given[name] = Descriptor(x)
                elif name.endswith("_ptr"):
                    given[name] = pointer(x)
                elif isinstance(x, int) and name not in constants:
                    given[name] = value(x)
            self.machines = []
            chance, waiting, running = random.Random(self.seed), deque(range(grid[0])), []
            try:
                while waiting or running:
                    if waiting and len(running) < AT_ONCE:
                        program = waiting.popleft()
                        running.append(Machine(program, grid[0], self.seed + program))
                        self.machines.append(running[-1])
                        running[-1].names["hopper_forward"](**given)
                        continue
                    (machine,) = chance.choices(running, [one.speed for one in running])
                    machine.move()
                    if machine.over():
                        machine.stop()
                        running.remove(machine)
            finally:
                for machine in running:
                    machine.stop()

        return run


def attend_here(monkeypatch, seed=0, multiprocessors=2):
    """From here on `launch` and `launch_skipping` compute in this process, on the CPU; what runs
    the kernel, with the `machines` of its last call."""
    launcher = Launcher(seed)
    monkeypatch.setattr(launch, "hopper_forward", launcher)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    return launcher
