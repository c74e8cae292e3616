"""What the Hopper kernel's source is made of, in plain Python: numbers, pointers, memory, `gl`."""

from types import FunctionType, SimpleNamespace

import torch

from vdit_sparse.kernels.block_sparse.hopper import kernel, parts, steps
from vdit_sparse.kernels.block_sparse.hopper.assembly import AS_BYTES, AS_WORD

ROUNDED = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class Value(torch.Tensor):
    """A number or tensor of the kernel; nothing is changed in place, integers are divided as C
    does."""

    def to(self, dtype, bitcast=False):
        dtype = getattr(dtype, "torch", dtype)
        if bitcast:
            return self.view(dtype)
        if dtype in ROUNDED:
            top = 448 if dtype == torch.float8_e4m3fn else torch.inf
            rounded = self.clamp(-top, top).as_subclass(torch.Tensor).to(dtype)
            return value(rounded.float())
        return super().to(dtype)

    def __floordiv__(self, other):
        return torch.div(self, other, rounding_mode="trunc")

    def __rfloordiv__(self, other):
        return torch.div(value(other), self, rounding_mode="trunc")

    def __mod__(self, other):
        return torch.fmod(self, other)

    def __rmod__(self, other):
        return torch.fmod(value(other), self)

    def __iadd__(self, other):
        return self + other

    def __isub__(self, other):
        return self - other

    def __imul__(self, other):
        return self * other

    def __ixor__(self, other):
        return self ^ other


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Number:
    """A dtype as Gluon has it."""

    def __init__(self, dtype):
        self.torch, self.primitive_bitwidth = dtype, 8 * dtype.itemsize

    def __eq__(self, other):
        return self.torch == getattr(other, "torch", other)

    __hash__ = None


class Pointer:
    def __init__(self, x, offset=0):
        self.flat, self.offset = x, offset

    def __add__(self, offset):
        return Pointer(self.flat, self.offset + offset)


def pointer(x):
    """A pointer to the first number of x, as far as its storage goes; None stays None."""
    if x is None:
        return None
    length = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    return Pointer(x.as_strided((length,), (1,)))


def load(at, mask=True, other=0):
    place, mask = torch.broadcast_tensors(value(at.offset), value(mask))
    found = torch.where(mask, at.flat[torch.where(mask, place, 0)], other)
    return value(found)


def store(at, x, mask=True):
    place, mask, x = torch.broadcast_tensors(value(at.offset), value(mask), value(x))
    at.flat[place[mask]] = x[mask].to(at.flat.dtype)


def add(at, x, sem="acq_rel"):
    """The number before, as an atomic addition gives it."""
    before = load(at)
    store(at, before + x)
    return before


class Buffer:
    """A view of shared memory. owner: the first index of an allocation, of which `dirty` names
    the warp groups that have written it since their last fence."""

    def __init__(self, x, dtype, owner=None):
        self.x, self.dtype, self.owner, self.shape = x, dtype, owner, x.shape

    def index(self, i):
        owner = self.owner[int(i)]
        return Buffer(self.x[int(i)], self.dtype, owner)

    def reshape(self, shape):
        return Buffer(self.x.view(shape), self.dtype, self.owner)

    def permute(self, order):
        return Buffer(self.x.permute(order), self.dtype, self.owner)

    def slice(self, start, length):
        return Buffer(self.x[start : start + length], self.dtype, self.owner)

    def load(self, layout):
        found = value(self.x.clone())
        self.owner.machine.current.pause()
        return found

    def store(self, x):
        self.owner.dirty.add(self.owner.machine.current)
        self.x.copy_(x)

    def read(self):
        if self.owner.machine.current in self.owner.dirty:
            raise RuntimeError("stores to shared memory are read by TMA or wgmma without a fence")
        return self.x.clone()


def assembly(source, constraints, arguments, dtype, is_pure, pack):
    """What the kernel's PTX does; e4m3 numbers, elsewhere fp32 that are rounded, are bytes here."""
    if source == AS_WORD.value:
        four = torch.stack([x.as_subclass(torch.Tensor) for x in arguments], -1)
        return value(four.clamp(max=448).to(torch.float8_e4m3fn).view(torch.int32).squeeze(-1))
    if source == AS_BYTES.value:
        words = arguments[0].as_subclass(torch.Tensor)[..., ::4].contiguous()
        return value(words.view(torch.float8_e4m3fn).float())
    assert "huge" in source, source
    return arguments[0]


class Descriptor:
    """A TMA descriptor: zeros past the end, where nothing is written either."""

    def __init__(self, given):
        self.x, self.dtype, self.layout = given.base, Number(given.base.dtype), None

    def _box(self, at, shape):
        spans = [
            (int(a), min(int(a) + n, end))
            for a, n, end in zip(at, shape, self.x.shape, strict=True)
        ]
        spans = [slice(start, max(start, end)) for start, end in spans]
        return tuple(spans), tuple(slice(0, span.stop - span.start) for span in spans)

    def read(self, at, shape):
        there, here = self._box(at, shape)
        box = torch.zeros(list(shape), dtype=torch.float32)
        box[here] = self.x[there].float()
        return box

    def write(self, at, box):
        there, here = self._box(at, box.shape)
        self.x[there] = box[here].to(self.x.dtype)


def sources(machine) -> dict:
    """The functions of the kernel, with this machine in place of Gluon."""
    names = {
        "gl": _language(machine),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None, init=machine.init, expect=machine.expect,
            arrive=machine.arrive, wait=machine.wait,
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=machine.load_tile, store_wait=machine.store_wait,
            async_copy_shared_to_global=machine.store_tile,
        ),
        "fence_async_shared": machine.fence,
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.product_wait,
    }  # fmt: skip
    for module in (parts, steps, kernel):
        for name, thing in vars(module).items():
            if hasattr(thing, "fn"):
                code = thing.fn
                names[name] = FunctionType(code.__code__, names, name, code.__defaults__)
            elif type(thing).__name__ == "constexpr":
                names[name] = thing.value
    return names


def _language(machine) -> SimpleNamespace:
    def pair(function):
        return lambda a, b: function(value(a), value(b))

    def filled(shape, x, dtype, layout):
        return value(torch.full(shape, x, dtype=getattr(dtype, "torch", dtype)))

    def layout(*arguments):
        return None

    return SimpleNamespace(
        program_id=lambda axis: value(machine.place[0]),
        num_programs=lambda axis: value(machine.place[1]),
        to_tensor=value, static_range=range, load=load, store=store, full=filled,
        zeros=lambda shape, dtype, layout: filled(shape, 0, dtype, layout),
        arange=lambda start, end, layout: value(torch.arange(start, end)),
        atomic_add=add, where=lambda c, a, b: value(torch.where(value(c), a, b)),
        maximum=pair(torch.maximum), minimum=pair(torch.minimum),
        max=torch.amax, min=torch.amin, sum=torch.sum, exp2=torch.exp2, log2=torch.log2,
        zeros_like=torch.zeros_like, float16=torch.float16,
        fma=lambda x, y, z: (x.double() * y.double() + z.double()).float(),
        inline_asm_elementwise=assembly, split=lambda x: (x[..., 0], x[..., 1]),
        join=lambda a, b: torch.stack([a, b], -1),
        convert_layout=lambda x, layout: x, thread_barrier=lambda: None,
        warp_specialize=machine.specialize, allocate_shared_memory=machine.allocate,
        NVMMADistributedLayout=layout, SliceLayout=layout, DotOperandLayout=layout,
        BlockedLayout=layout, SwizzledSharedLayout=layout, constexpr=None, int8=torch.int8,
        int32=torch.int32, int64=torch.int64, float32=torch.float32,
        float8e4nv=torch.float8_e4m3fn,
    )  # fmt: skip
