"""The order in which a network's kernels run, what they write over, and where their scratch comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tvm
from tvm import relax, tirx
from tvm.ir import Call, GlobalVar
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target

from nnfuze_tvm.deploy.memory import kernels
from nnfuze_tvm.deploy.memory.graph import Graph, Overwrite, results
from nnfuze_tvm.deploy.memory.order import best_order
from nnfuze_tvm.deploy.memory.split import Loops, candidates, split
from nnfuze_tvm.deploy.memory.work import Work
from nnfuze_tvm.graph.dataflow import Emitter, Value, output_fields, substitute, with_functions

PER_THREAD = "nnfuze.per_thread"
"""A function that has it calls kernels of which every thread takes so many bytes for itself."""

# Steps that the search tries while kernels are tried in two.
_FEW = 2000


@module_pass(opt_level=0, name="PlanMemory")
class PlanMemory:
    """Let the kernels of ``main`` run in an order, and write over their operands, such that little memory is enough.

    What a kernel allocates for all its threads becomes an operand.

    Parameters
    ----------
    target : tvm.target.Target
        The CPU.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the bindings of ``main`` in another order, and kernels in place."""
        mod, graph = _apart(mod, kernels.as_loops(mod, self.target))
        order = best_order(graph.work).steps
        return _Rewriter(mod, graph, order, _worthwhile(graph, order)).module()


def _apart(mod: tvm.IRModule, loops: Loops) -> tuple[tvm.IRModule, Graph]:
    """Return the module with those kernels in two that lower the peak so, as few as possible."""
    may: dict[Overwrite, bool] = {}

    def tried(chosen: Sequence[GlobalVar]) -> tuple[int, tvm.IRModule, Graph]:
        new, own = split(mod, loops, chosen)
        graph = Graph(new["main"], own, may)
        return best_order(graph.work, trials=_FEW).peak, new, graph

    chosen = candidates(mod, loops)
    whole, best = tried([]), tried(chosen)
    if whole[0] <= best[0]:
        return whole[1:]
    for kernel in chosen:
        fewer = [each for each in chosen if each is not kernel]
        if (found := tried(fewer))[0] <= best[0]:
            chosen, best = fewer, found
    return best[1:]


def _worthwhile(graph: Graph, order: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Return per step what it makes over what, where that lowers the peak: as few kernels as possible are changed."""
    work = graph.work
    found: dict[int, list[tuple[int, int]]] = {}
    done = 0
    for n in order:
        done |= 1 << n
        if pairs := work.overlaid(n, done):
            found[n] = pairs
    peak = work.peak(order)
    for kernel in dict.fromkeys(graph.kernel(n) for n in order if n in found):
        fewer = {n: pairs for n, pairs in found.items() if graph.kernel(n) is not kernel}
        steps = [replace(step, over=tuple(fewer.get(n, ()))) for n, step in enumerate(work.steps)]
        if Work(work.sizes, steps, work.kept).peak(order) <= peak:
            found = fewer
    return found


class _Rewriter:
    """Writes a plan into a module."""

    def __init__(
        self, mod: tvm.IRModule, graph: Graph, order: Sequence[int], over: dict[int, list[tuple[int, int]]]
    ) -> None:
        self._mod = mod
        self._graph = graph
        self._order = order
        self._over = {n: self._numbers(n, over.get(n, [])) for n in order}
        self._emitter = Emitter()
        self._values: dict[Value, Value] = {}
        self._builder = relax.BlockBuilder(self._unchanged())
        self._kernels: dict[tuple[GlobalVar, tuple[tuple[int, int], ...]], GlobalVar] = {}

    def module(self) -> tvm.IRModule:
        """Return the module with the function and the kernels of the plan."""
        main, loops = self._graph.main, self._graph.loops
        for param in main.params:
            self._emitter.unique(param.name)
        views = self._ready_views(list(self._graph.views))
        for n in self._order:
            binding = self._graph.calls[n]
            value = substitute(binding.value, self._values)
            self._values[binding.var] = self._emitter.emit(self._call(n, value), binding.var.name)
            views = self._ready_views(views)
        outputs = [substitute(field, self._values) for field in output_fields(main)]
        planned = self._emitter.finish(main.params, outputs, main.attrs)
        used = [self._graph.kernel(n) for n in self._order]
        own = max((kernels.per_thread(loops[kernel]) for kernel in used if kernel is not None), default=0)
        functions = dict(self._builder.get().functions_items())
        return with_functions(self._mod, {**functions, "main": planned.with_attr(PER_THREAD, own)})

    def _numbers(self, n: int, pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Return results and operands by their places in the call of a step."""
        made = self._graph.work.steps[n].makes
        return tuple(sorted((made.index(new), self._graph.operand(n, old)) for new, old in pairs))

    def _unchanged(self) -> tvm.IRModule:
        """Return the module without ``main`` and the kernels that change wherever they are called."""
        loops, called = self._graph.loops, {self._graph.kernel(n) for n in self._order}
        same = {self._graph.kernel(n) for n in self._order if not self._over[n]}
        gone = {v for v in called if v is not None and (v not in same or kernels.scratch(loops[v]))}
        kept = {v: f for v, f in self._mod.functions_items() if v.name_hint != "main" and v not in gone}
        return with_functions(self._mod, kept)

    def _ready_views(self, views: Sequence[relax.VarBinding]) -> list[relax.VarBinding]:
        """Bind the views of what is there; return the others."""
        rest = []
        for binding in views:
            if all(maker in self._values for maker in self._graph.bound(binding.value)):
                value = substitute(binding.value, self._values)
                self._values[binding.var] = self._emitter.emit(value, binding.var.name)
            else:
                rest.append(binding)
        return rest

    def _call(self, n: int, value: Value) -> Value:
        """Return the call of a step's kernel as planned."""
        kernel = self._graph.kernel(n)
        if kernel is None:
            return value
        func, over = self._graph.loops[kernel], self._over[n]
        given = kernels.scratch(func)
        if not given and not over:
            return value
        inputs = list(value.args[1])
        if (kernel, over) not in self._kernels:
            new = kernels.changed(func, len(inputs), given, dict(over))
            self._kernels[kernel, over] = self._builder.add_func(new, kernel.name_hint)
        new = self._kernels[kernel, over]
        operands = relax.Tuple([*inputs, *map(self._allocated, given)])
        if not over:
            return Call(value.op, [new, operands, *value.args[2:]], value.attrs, value.ty_args, value.span, value.ty)
        types = results(value)
        places = [dict(over).get(result, -1) for result in range(len(types))]
        return relax.op.call_tir_inplace(new, operands, places, types)

    def _allocated(self, buffer: tirx.Var) -> Value:
        shape = relax.ShapeExpr([kernels.elements(buffer)])
        return self._emitter.emit(relax.op.builtin.alloc_tensor(shape, str(buffer.ty.dtype), 0), "scratch")
