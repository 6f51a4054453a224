"""The bytes that memory delivers: hand-made kernels whose numbers can be counted."""

from __future__ import annotations

import pytest
import tvm_ffi
from tvm import s_tir, te, tirx
from tvm.script import tirx as T

from nnfuze_tvm.analysis import traffic
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve

TARGET = resolve("x86-64-v3")
HW = Hardware.of(TARGET)
VECTOR, LANES = 32, 8


def tree(sch):
    return traffic.loop_tree(sch.mod["main"], TARGET)


def product(m, n, k):
    a, b = te.placeholder((m, k), "float32", "A"), te.placeholder((k, n), "float32", "B")
    r = te.reduce_axis((0, k))
    c = te.compute((m, n), lambda i, j: te.sum(a[i, r] * b[r, j], axis=r), name="C")
    return s_tir.Schedule(te.create_prim_func([a, b, c]))


def tiled(m, n, k, rows, fuse=False):
    """Register tiles of ``rows`` × one vector, columns of tiles outside."""
    sch = product(m, n, k)
    block = sch.get_sblock("C")
    out = sch.cache_write(block, 0, "global")
    i, j = sch.get_loops(out)
    i, row = sch.split(i, [None, rows])
    j, lane = sch.split(j, [None, LANES])
    sch.reorder(j, i, row, lane)
    inner = i
    if fuse:
        inner = sch.fuse(j, i)
    sch.compute_at(block, inner)
    *_, acc_row, acc_lane, step = sch.get_loops(block)
    sch.reorder(step, acc_row, acc_lane)
    for loop in (row, acc_row):
        sch.unroll(loop)
    for loop in (lane, acc_lane):
        sch.vectorize(loop)
    init = sch.decompose_reduction(block, step)
    sch.vectorize(sch.get_loops(init)[-1])
    return sch


def test_copy_reads_and_writes_every_byte_once():
    a = te.placeholder((1024,), "float32", "A")
    sch = s_tir.Schedule(te.create_prim_func([a, te.compute((1024,), lambda i: a[i] * 2.0, name="B")]))
    (loop,) = sch.get_loops(sch.get_sblock("B"))
    _, lane = sch.split(loop, [None, LANES])
    sch.vectorize(lane)
    root = tree(sch)
    assert traffic.l1_bytes(root, HW) == 2 * 4096
    assert traffic.missed_bytes(root, 8192) == 0
    assert traffic.missed_bytes(root, 2048) == 2 * 4096 - 2048


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_narrow_loads_count_as_whole_vectors(dtype):
    a = te.placeholder((64,), dtype, "A")
    sch = s_tir.Schedule(te.create_prim_func([a, te.compute((64,), lambda i: a[i] + a[i], name="B")]))
    assert traffic.l1_bytes(tree(sch), HW) >= 2 * 64 * VECTOR


def test_register_tile_loads_its_operands_once_per_step():
    m, n, k, rows = 12, 64, 10, 4
    loads = (m // rows) * (n // LANES) * k * (rows + 1)
    stores = m * n // LANES
    assert traffic.l1_bytes(tree(tiled(m, n, k, rows)), HW) == (loads + stores) * VECTOR


@pytest.mark.parametrize("fuse", [False, True])
def test_what_does_not_fit_is_fetched_again(fuse):
    m, n, k, rows = 64, 64, 256, 4
    root = tree(tiled(m, n, k, rows, fuse))
    a, b, c = (4 * size for size in (m * k, k * n, m * n))
    assert traffic.missed_bytes(root, a + b + c) == 0
    # Every column of tiles reads all of A; a column of B and a row of tiles' data fit.
    cache = 32 << 10
    assert a > cache
    assert traffic.missed_bytes(root, cache) == (n // LANES) * a + b + c - cache


def test_overlapping_taps_of_straight_line_code_are_loaded_once():
    a, w = te.placeholder((34,), "float32", "A"), te.placeholder((3,), "float32", "W")
    r = te.reduce_axis((0, 3))
    out = te.compute((32,), lambda x: te.sum(a[x + r] * w[r], axis=r), name="out")
    sch = s_tir.Schedule(te.create_prim_func([a, w, out]))
    block = sch.get_sblock("out")
    sums = sch.cache_write(block, 0, "global")
    (x,) = sch.get_loops(sums)
    outer, _ = sch.split(x, [None, 8])
    sch.compute_at(block, outer)
    *_, tap_x, tap = sch.get_loops(block)
    sch.unroll(tap_x)
    sch.unroll(tap)
    # Ten neighbours for eight pixels, and eight stores; the three weights stay in registers all the time.
    assert traffic.l1_bytes(tree(sch), HW) == (4 * (10 + 8) + 3) * VECTOR


def test_first_and_last_iterations_of_their_own_count_once():
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((64, 1024), "float32"), b: T.Buffer((64, 1024), "float32")) -> None:
        for y in T.parallel(64):
            for x in T.vectorized(1024):
                with T.sblock("B"):
                    i, j = T.axis.remap("SS", [y, x])
                    b[i, j] = a[i, j]

    (rows,) = _find_loops(main)
    last = tirx.IfThenElse(rows.loop_var >= 63, rows.body, rows.body)
    branches = tirx.IfThenElse(rows.loop_var < 1, rows.body, last)
    peeled = tirx.For(rows.loop_var, rows.min, rows.extent, rows.kind, branches)
    body = tvm_ffi.structural_map(main.body, (tirx.For, lambda loop: peeled if loop.same_as(rows) else loop))
    for func in (main, main.with_body(body)):
        root = traffic.loop_tree(func, TARGET)
        assert traffic.l1_bytes(root, HW) == 2 * 64 * 4096
        assert traffic.missed_bytes(root, 0) == 2 * 64 * 4096


def _find_loops(func):
    found = []
    tvm_ffi.structural_walk(func.body, (tirx.For, lambda loop: found.append(loop)))
    return [loop for loop in found if loop.kind == tirx.ForKind.PARALLEL]
