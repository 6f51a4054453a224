"""What a machine can do at most: multiply-adds per second, and bytes per second from each level of its memory.

`measure` finds out: small kernels are compiled for the target and timed on it, on this machine or on a board behind an
RPC tracker. `of_board` says what the catalogue expects of a board that is not at hand. What is timed:

- ``fp32`` adds to as many independent vectors as the registers hold, nothing is loaded: the multiply-add units' rate.
- ``int8`` is a register tile whose operands stay in L1, with the instructions that integer kernels take
  (`schedules.intrinsics`): the rate that such a kernel can reach, its loads and broadcasts included.
- ``read`` sums a buffer up in vector registers, over and over. A buffer of half a cache's size stays in it and is too
  large for the cache before it.

Units are decimal: 1 GFLOP/s is 1e9 operations per second, a multiply-add counts as two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tvm
from tvm import s_tir, te, tirx
from tvm.s_tir import meta_schedule as ms
from tvm.script import tirx as T
from tvm.target import Target

from nnfuze_tvm.deploy import loading
from nnfuze_tvm.deploy.threads import use_threads
from nnfuze_tvm.devices import boards
from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.remote import tracker
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.schedules.intrinsics import dot_product
from nnfuze_tvm.schedules.loops import STACK_BYTES

# Each measurement is the best of this many repeats of about this many seconds.
_REPEATS = 20
_REPEAT_SECONDS = 2e-3
# Reads that come from memory run over a buffer of four times the last cache, within these bounds.
_MEMORY_BYTES = (32 << 20, 128 << 20)
FMA_STEPS = 4096
_DOT_STEPS = 64
DOT_REPEATS = 64
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Level:
    """A cache: its bytes per core, and the bytes per second that all threads together read from it."""

    name: str
    bytes: int
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """What a machine can do at most.

    Attributes
    ----------
    fp32, int8 : float
        Operations per second (a multiply-add is two): in float32, and of 8-bit integers with 32-bit sums.
    caches : tuple of Level
        From L1 on.
    dram : float
        Bytes per second read from memory.
    vector_bytes : int
        Bytes of one load into a vector register.
    threads : int
        Threads that the work was spread over.
    source : str
        Where the figures come from.
    """

    fp32: float
    int8: float
    caches: tuple[Level, ...]
    dram: float
    vector_bytes: int
    threads: int
    source: str

    def to_json(self) -> str:
        """Return the figures as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Machine:
        """Return the figures that ``to_json`` wrote."""
        fields = json.loads(text)
        return Machine(**{**fields, "caches": tuple(Level(**level) for level in fields["caches"])})


def measure(target: Target, threads: int = 1, remote: tvm.rpc.RPCSession | None = None, source: str = "") -> Machine:
    """Return what the machine that ``target`` names can do, measured on it in about a second.

    Parameters
    ----------
    target : tvm.target.Target
        The machine.
    threads : int
        Threads that run the same kernel at once, each on data of its own.
    remote : tvm.rpc.RPCSession, optional
        A board of that kind; by default this machine is measured.
    source : str
        What to call the machine in the result.
    """
    hw = Hardware.of(target)
    caches = _caches(hw) if remote is None else {"L1": hw.l1_bytes, "L2": hw.l2_bytes}
    low, high = _MEMORY_BYTES
    sizes = {name: size // 2 // (threads if name == "L3" else 1) for name, size in caches.items()}
    sizes["DRAM"] = min(max(4 * max(caches.values()), low), high) // threads
    mod = kernels(hw, threads, sizes)
    with temporary.folder() as scratch:
        path = Path(scratch) / "roofline.so"
        export_library(tvm.compile(mod, target=target), path, target)
        if remote is None:
            module, device = loading.load(path), tvm.cpu()
            use_threads(threads)
        else:
            remote.upload(str(path))
            module, device = remote.load_module(path.name), remote.cpu()
            tracker.use_threads(remote, threads)
        rates = {gvar.name_hint: _rate(module, device, gvar.name_hint, func) for gvar, func in mod.functions_items()}
    return Machine(
        fp32=rates["fp32"],
        int8=rates["int8"],
        caches=tuple(Level(name, size, rates[f"read_{name}"]) for name, size in caches.items()),
        dram=rates["read_DRAM"],
        vector_bytes=hw.vector_bytes,
        threads=threads,
        source=source,
    )


def of_board(target: Target, threads: int = 1) -> Machine | None:
    """Return what a board that ``target`` names can do by the catalogue; None where that has no figures of it.

    The rates of compute and caches are per cycle, and all threads have them at once. The catalogue says how fast L1 is;
    each cache behind it is taken to deliver half of what the one before it does, which is about what these CPUs reach.
    Memory is one core's however many threads there are: on small boards one core nearly exhausts it.
    """
    board = boards.find(str(target.attrs.get("model", "")), str(target.attrs.get("mcpu", "")))
    if board is None or None in (board.fp32, board.int8, board.clock, board.memory):
        return None
    assert board.fp32 and board.int8 and board.clock and board.memory
    cycles = 1e9 * board.clock * threads
    vector_bytes = Hardware.of(target).vector_bytes
    sizes = [size << 10 for size in (board.l1, board.l2, board.l3) if size]
    return Machine(
        fp32=2 * board.fp32 * cycles,
        int8=2 * board.int8 * cycles,
        caches=tuple(
            Level(f"L{n + 1}", size, board.loads * vector_bytes * cycles / 2**n) for n, size in enumerate(sizes)
        ),
        dram=1e9 * board.memory,
        vector_bytes=vector_bytes,
        threads=threads,
        source=f"catalogue: {board.title}",
    )


def kernels(hw: Hardware, threads: int, sizes: Mapping[str, int]) -> tvm.IRModule:
    """Return the kernels to time: ``fp32``, ``int8``, and one ``read_…`` per buffer size in bytes.

    Attribute ``work`` of a kernel says how many operations or bytes one call is.
    """
    found = {"fp32": _multiply_adds(hw, threads), "int8": _dot_products(hw, threads)}
    for name, size in sizes.items():
        found[f"read_{name}"] = _reads(hw, threads, size)
    return tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in found.items()})


def _multiply_adds(hw: Hardware, threads: int) -> tirx.PrimFunc:
    """Return ``sums += sums * factor``, again and again, on as many independent sums as there is room for.

    The sums start with values from outside, as equal ones would be computed once, and are a factor themselves, as
    a product that stays the same would be computed before the loop.
    """
    lanes = hw.lanes("float32")
    count = min(hw.registers * 3 // 4, STACK_BYTES // hw.vector_bytes)

    @T.prim_func(s_tir=True)
    def fp32(factor: T.Buffer((lanes,), "float32"), out: T.Buffer((threads, count, lanes), "float32")) -> None:
        for thread in T.parallel(threads):
            with T.sblock("thread"):
                own = T.axis.spatial(threads, thread)
                T.reads(factor[0:lanes], out[own, 0:count, 0:lanes])
                T.writes(out[own, 0:count, 0:lanes])
                sums = T.alloc_buffer((count, lanes), "float32")
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        sums[i, lane] = out[own, i, lane]
                for _ in T.serial(FMA_STEPS):
                    for i in T.unroll(count):
                        for lane in T.vectorized(lanes):
                            sums[i, lane] = sums[i, lane] + sums[i, lane] * factor[lane]
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        out[own, i, lane] = sums[i, lane]

    return fp32.with_attr("work", 2 * threads * count * lanes * FMA_STEPS)


def _dot_products(hw: Hardware, threads: int) -> tirx.PrimFunc:
    """Return uint8 data × int8 weights in a register tile, tensorized where the CPU has a dot product."""
    dot = dot_product(hw.features)
    lanes = dot.lanes if dot else hw.lanes("int32")
    rows, columns = (4 if hw.registers < 32 else 6), 2 * lanes
    data = te.placeholder((threads, rows, 4 * _DOT_STEPS), "uint8", "data")
    weights = te.placeholder((threads, _DOT_STEPS, columns, 4), "int8", "weights")
    again, step, byte = (te.reduce_axis((0, n)) for n in (DOT_REPEATS, _DOT_STEPS, 4))

    def product(thread: tirx.Var, row: tirx.Var, column: tirx.Var) -> tirx.PrimExpr:
        left = data[thread, row, 4 * step + byte].astype("int32")
        right = weights[thread, step, column, byte].astype("int32")
        return te.sum(left * right, axis=[again, step, byte])

    sums = te.compute((threads, rows, columns), product, name="sums")
    sch = s_tir.Schedule(te.create_prim_func([data, weights, sums]))
    block = sch.get_sblock("sums")
    out = sch.cache_write(block, 0, "global")
    thread, row, column = sch.get_loops(out)
    sch.compute_at(block, thread)
    vector, lane = sch.split(column, [None, lanes])
    for loop in (row, vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    row, column, repeat, steps, bytes_ = sch.get_loops(block)[-5:]
    vector, lane = sch.split(column, [None, lanes])
    sch.reorder(repeat, steps, row, vector, lane, bytes_)
    for loop in (row, vector):
        sch.unroll(loop)
    sch.parallel(thread)
    if dot is None:
        sch.reorder(bytes_, lane)
        sch.unroll(bytes_)
        sch.vectorize(lane)
    init = sch.decompose_reduction(block, repeat)
    *_, row, vector, lane = sch.get_loops(init)
    sch.unroll(row)
    sch.unroll(vector)
    sch.vectorize(lane)
    if dot is not None:
        sch.tensorize(sch.get_loops(block)[-2], dot.name)
    operations = 2 * threads * rows * columns * 4 * _DOT_STEPS * DOT_REPEATS
    return sch.mod["main"].with_attr("work", operations)


def _reads(hw: Hardware, threads: int, size: int) -> tirx.PrimFunc:
    """Return the sum over ``size`` bytes per thread, often enough that one call is worth its overhead."""
    lanes = hw.lanes("int32")
    vectors = min(8, hw.registers // 2)
    steps = max(1, size // (4 * lanes * vectors))
    repeats = max(1, _READ_BYTES // size)

    @T.prim_func(s_tir=True)
    def read(
        data: T.Buffer((threads, steps, vectors, lanes), "int32"), out: T.Buffer((threads, vectors, lanes), "int32")
    ) -> None:
        for thread in T.parallel(threads):
            with T.sblock("thread"):
                own = T.axis.spatial(threads, thread)
                T.reads(data[own, 0:steps, 0:vectors, 0:lanes])
                T.writes(out[own, 0:vectors, 0:lanes])
                sums = T.alloc_buffer((vectors, lanes), "int32")
                for i in T.unroll(vectors):
                    for lane in T.vectorized(lanes):
                        sums[i, lane] = 0
                for _, step in T.grid(repeats, steps):
                    for i in T.unroll(vectors):
                        for lane in T.vectorized(lanes):
                            sums[i, lane] = sums[i, lane] + data[own, step, i, lane]
                for i in T.unroll(vectors):
                    for lane in T.vectorized(lanes):
                        out[own, i, lane] = sums[i, lane]

    return read.with_attr("work", 4 * threads * steps * vectors * lanes * repeats)


def _rate(module: tvm.runtime.Module, device: tvm.runtime.Device, name: str, func: tirx.PrimFunc) -> float:
    """Return operations or bytes per second of one kernel: the best repeat, as others share the machine."""
    # Memory that nobody wrote to may be one single page, so all of it is written to; a factor of 0 keeps sums finite.
    operands = [
        tvm.runtime.tensor(np.zeros([int(dim) for dim in info.shape], str(info.dtype)), device)
        for info in ms.arg_info.ArgInfo.from_prim_func(func)
    ]
    once = module.time_evaluator(name, device, number=1, repeat=2)(*operands).min
    number = max(1, int(_REPEAT_SECONDS / max(once, 1e-8)))
    seconds = module.time_evaluator(name, device, number=number, repeat=_REPEATS)(*operands).min
    return int(func.attrs["work"]) / seconds


def _caches(hw: Hardware) -> dict[str, int]:
    """Return the bytes of this machine's caches, as the operating system says, else as the hardware model has them."""
    found = {"L1": hw.l1_bytes, "L2": hw.l2_bytes}
    for directory in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((directory / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K") and size[:-1].isdigit():
            found[f"L{level}"] = int(size[:-1]) << 10
    return found
