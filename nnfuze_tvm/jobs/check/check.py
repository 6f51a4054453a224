"""The check of a compilation: a few samples through what was built and through the networks as they were given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.errors import CheckError, first_line
from nnfuze_tvm.graph import evaluate, ir, ops
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.jobs.build_stages import Builder, Built
from nnfuze_tvm.jobs.check import locate
from nnfuze_tvm.jobs.check.differences import largest, tolerated, typical
from nnfuze_tvm.jobs.check.originals import Originals
from nnfuze_tvm.jobs.check.samples import samples
from nnfuze_tvm.jobs.data import Arrays, EvaluationData
from nnfuze_tvm.jobs.graphs import Graphs
from nnfuze_tvm.jobs.measure_stages import OnnxRuntime
from nnfuze_tvm.jobs.request import CompileRequest
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.report import Check

# Largest differences relative to an output's range: of float32, of what goes round in loops, and of float16.
_TOLERANCE, _RECURRENT, _HALF = 1e-4, 1e-3, 2e-2
# What a quantized network is computed with may be a few steps off in a few places. Typical differences, not largest.
_STEPS, _INTEGERS = 2e-3, 1e-2
# Ratios of scales have this many bits in integer graphs; float values between two roundings are as far apart.
_RATIO = 2.0**-11
# ONNX's own evaluator takes a second for about as many.
_HEAVY = 1 << 31
# Compressed networks are computed with NumPy, too, on so many samples; on one if there is more to multiply.
_FEW, _LARGE = 2, 1 << 28
# No further sample is taken after this many seconds.
_PATIENCE = 0.3

Run = Callable[[Arrays], list[np.ndarray]]


@dataclass
class _Link:
    """Two ways of computing the same outputs, which should give the same.

    Attributes
    ----------
    how : str
        What one says of them if they don't: "differs from …".
    answers, references : list
        Per sample the outputs.
    graph : tvm.IRModule
        What is disturbed to learn what rounding may do.
    of_graph : bool
        The references are what this graph gives.
    unit : float, optional
        By how much, see `tolerated`.
    tolerance : float
        What is allowed of the largest difference in any case.
    steps : float
        What is allowed of the typical one; 0: no such exception.
    locate : callable
        (task, output, sample, what is allowed) → where it goes wrong.
    """

    how: str
    answers: list[list[np.ndarray]]
    references: list[list[np.ndarray]]
    graph: tvm.IRModule
    of_graph: bool
    unit: float | None
    tolerance: float
    steps: float
    locate: Callable[[int, Arrays, float], str]


def check(
    request: CompileRequest,
    graphs: Graphs,
    builder: Builder,
    built: Sequence[Built],
    data: EvaluationData,
    peer: OnnxRuntime | None,
) -> Check:
    """Check a compilation; see `Checker`.

    Raises
    ------
    CheckError
        If something differs by more than rounding can explain.
    """
    try:
        return Checker(request, graphs, builder, built).check(data, peer)
    except CheckError:
        raise
    except Exception as error:  # that something can't be compared doesn't say that it is wrong
        return Check(notes=[f"could not be done: {first_line(error)}"])


class Checker:
    """Checks one compilation.

    Parameters
    ----------
    request : CompileRequest
        What was asked for.
    graphs : Graphs
        The graphs of its stages.
    builder : Builder
        What built them.
    built : sequence of Built
        The stages; the last one is the bundle's.
    """

    def __init__(self, request: CompileRequest, graphs: Graphs, builder: Builder, built: Sequence[Built]) -> None:
        self._graphs = graphs
        self._builder = builder
        self._built = built
        self._originals = Originals(request.models, graphs.wiring)
        self._merged = graphs.stages["merged"]
        last = graphs.last
        self._compressed = len(graphs.stages) > 1
        self._quantized = _quantized(last)
        self._given_quantized = _quantized(self._merged)
        self._macs = sum(layer.macs for layer in metrics.layers(self._merged))
        self._lowering = locate.phases_to_kernels(builder.target)
        # Phases 5 and 6: integers where there will be any.
        self._integer = tvm.transform.Sequential(self._lowering[:2])(last) if self._needs_two else last
        self._final = built[-1].runners[0] if builder.here else None
        # Quantized files are compared as the graph says, in floats.
        merged = [stage for stage in built if stage.record.name == "merged" and stage.runners]
        self._merged_stage = merged[0] if merged and not self._given_quantized else None

    @property
    def _needs_two(self) -> bool:
        """Whether what is built differs on purpose from what was given, or quantizes as that does."""
        return self._compressed or self._quantized

    def check(self, data: EvaluationData, peer: OnnxRuntime | None) -> Check:
        """Compare and return the record.

        Parameters
        ----------
        data : EvaluationData
            What the stages are judged on.
        peer : OnnxRuntime, optional
            The networks as they were given, if they have been opened already.

        Raises
        ------
        CheckError
            If something differs by more than rounding can explain.
        """
        given, references, why = self._given(samples(self._graphs, signature(self._graphs.last).inputs, data), peer)
        if not self._builder.here:
            given, references = given[:_FEW], references[:_FEW]
        result = Check(samples=len(given))
        if why:
            result.notes.append(f"not compared with the networks as they were given: {why}")
        else:
            result.against = self._originals.against
            result.loaded, notes = self._compared(given, references)
            result.notes += notes
        if self._needs_two or why:
            given = given[: _FEW if self._macs < _LARGE else 1]
            run = evaluate.executor(self._integer)
            integers = [run(sample) for sample in given]
            if self._needs_two:
                self._judge(self._rewritten(given, integers), given)
            result.built, notes = self._judge(self._executed(given, integers), given)
            result.notes += notes
        if not self._builder.here:
            result.notes.append("of the graph with all rewrites: kernels for another machine can't run here")
        return result

    def _compared(self, given: list[Arrays], references: list[list[np.ndarray]]) -> tuple[float, list[str]]:
        """Compare what was loaded with the networks as they were given, and once more if it looks wrong."""
        link = self._loaded(given, references)
        try:
            return self._judge(link, given)
        except CheckError:
            self._originals.plainly()
            link.references = [self._originals(sample) for sample in given]
            if max(largest([self._originals(sample) for sample in given], link.references)) > link.tolerance:
                return 0.0, ["the networks give different answers each time"]
            return self._judge(link, given)

    def _given(
        self, candidates: Sequence[Arrays], peer: OnnxRuntime | None
    ) -> tuple[list[Arrays], list[list[np.ndarray]], str]:
        """Return samples that the networks take, what these are made into, and why there is nothing if so."""
        plain = self._given_quantized
        why = self._originals.open(self._macs > _HEAVY, peer.sessions if peer is not None and not plain else ())
        if why:
            return [{**inputs, **self._graphs.wiring.zeros()} for inputs in candidates[:1]], [], why
        if plain:
            self._originals.plainly()
        given: list[Arrays] = []
        references = []
        states = self._graphs.wiring.zeros()
        started = time.perf_counter()
        for inputs in candidates:
            sample = {**inputs, **states}
            try:
                references.append(self._originals(sample))
            except Exception:  # made-up values may be no indices, or no lengths
                continue
            given.append(sample)
            states = dict(zip(states, references[-1][len(references[-1]) - len(states) :], strict=True))
            if time.perf_counter() - started > _PATIENCE:
                break
        if not given:
            return [], [], f"{self._originals.what} runs them on none of the samples"
        return given, references, ""

    def _loaded(self, given: list[Arrays], references: list[list[np.ndarray]]) -> _Link:
        """What was loaded, and the networks as they were given. Uncompressed, the bundle is what was loaded."""
        if self._needs_two:
            run = self._float_run()
        else:
            run = self._bundle_run()
        return _Link(
            f"differs from {self._originals.what}",
            [run(sample) for sample in given],
            references,
            self._merged,
            False,
            0.0,
            self._precision(self._merged),
            _STEPS if self._given_quantized else 0.0,
            self._locate_loaded,
        )

    def _rewritten(self, given: list[Arrays], integers: list[list[np.ndarray]]) -> _Link:
        """The compressed graph, and what it is in integers."""
        last = self._graphs.last
        run = evaluate.executor(last)
        return _Link(
            "differs from the compressed graph",
            integers,
            [run(sample) for sample in given],
            last,
            True,
            _RATIO if self._quantized else 0.0,
            self._precision(last),
            _INTEGERS if self._quantized else 0.0,
            self._locate_rewritten,
        )

    def _executed(self, given: list[Arrays], integers: list[list[np.ndarray]]) -> _Link:
        """The bundle, and its graph in NumPy."""
        run = self._bundle_run()
        return _Link(
            "differs from its graph in NumPy",
            [run(sample) for sample in given],
            integers,
            self._integer,
            True,
            None if self._quantized else 0.0,
            self._precision(self._integer),
            _STEPS if _rounds_states(self._integer) else 0.0,
            self._locate_executed,
        )

    def _float_run(self) -> Run:
        if self._merged_stage is not None:
            runner = self._merged_stage.runners[0]
            return lambda sample: _flat(runner, sample)
        return evaluate.executor(self._merged)

    def _bundle_run(self) -> Run:
        if self._final is not None:
            runner = self._final
            return lambda sample: _flat(runner, sample)
        return evaluate.executor(tvm.transform.Sequential(self._lowering[:-1])(self._graphs.last))

    def _precision(self, mod: tvm.IRModule) -> float:
        dtypes = {str(b.var.ty.dtype) for b in bindings(mod["main"]) if hasattr(b.var.ty, "dtype")}
        if dtypes & {"float16", "bfloat16"}:
            return _HALF
        return _TOLERANCE

    def _judge(self, link: _Link, given: list[Arrays]) -> tuple[float, list[str]]:
        """Return the largest difference, and what is to say about it; raise if nothing explains it."""
        errors = largest(link.answers, link.references)
        highest = max(errors, default=0.0)
        if highest <= link.tolerance:
            return highest, []
        usual = typical(link.answers, link.references)
        if max(usual) <= link.steps:
            return highest, [f"beyond {link.tolerance:.0e} only by steps of 8 bits in a few places"]
        known = link.references if link.of_graph else ()
        found = tolerated(link.graph, given, link.unit, errors, known)
        limits = [max(link.tolerance, limit) for limit in found]
        if link.unit == 0.0 and link.tolerance < _RECURRENT and self._originals.recurrent:
            limits = [max(_RECURRENT, limit) for limit in limits]
        bad = [n for n, error in enumerate(errors) if error > limits[n] and usual[n] > link.steps]
        if not bad:
            return highest, [f"beyond {link.tolerance:.0e} only by what rounding does to this network"]
        worst = max(bad, key=lambda n: errors[n] / limits[n])
        raise self._error(link, given, worst, errors[worst], limits[worst])

    def _error(self, link: _Link, given: list[Arrays], worst: int, error: float, limit: float) -> CheckError:
        owner = ir.task_outputs(self._graphs.last)[worst]
        apart = [largest([a], [r])[worst] for a, r in zip(link.answers, link.references, strict=True)]
        sample = given[int(np.argmax(apart))]
        try:
            where = link.locate(worst, sample, limit)
        except Exception:  # it differs all the same
            where = ""
        by = "in where it is NaN or infinite, or in its type" if np.isinf(error) else f"by {error:.2g} of its range"
        first = f"the first layer that differs is {where}" if where else "no single layer differs"
        return CheckError(
            f"check: task {owner.task!r}: output {owner.name!r} {link.how} {by} ({limit:.2g} is allowed); {first}; "
            "this is a fault of nnfuze: please report it; --no-check writes the bundle all the same"
        )

    def _locate_loaded(self, output: int, sample: Arrays, limit: float) -> str:
        """Find the node or, if what was loaded is right, the pass or the kernel."""
        task = ir.task_outputs(self._graphs.last)[output].task
        number = self._graphs.tasks.index(task)
        own = self._originals.taken(sample, task)
        source = self._originals.sources[number]
        loaded = self._graphs.loaded
        precision = self._precision(self._merged)
        if where := locate.first_node(source, self._originals.what, loaded[task], own, precision):
            return where
        # What hangs together by more than inputs can't be computed task by task.
        apart = not self._graphs.wiring.connected
        if apart and (where := locate.first_step(loaded, pipeline.merge_phases(), sample, output, limit)):
            return where
        stage = self._merged_stage if self._needs_two else self._built[-1]
        if stage is None:
            return ""
        return self._locate_rest(self._merged, self._lowering, output, sample, limit, stage)

    def _locate_rewritten(self, output: int, sample: Arrays, limit: float) -> str:
        return locate.first_step(self._graphs.last, self._lowering[:2], sample, output, limit)

    def _locate_executed(self, output: int, sample: Arrays, limit: float) -> str:
        phases = self._lowering[2:] if self._needs_two else self._lowering
        return self._locate_rest(self._integer, phases, output, sample, limit, self._built[-1])

    def _locate_rest(
        self,
        start: tvm.IRModule,
        phases: list[tvm.transform.Pass],
        output: int,
        sample: Arrays,
        limit: float,
        stage: Built,
    ) -> str:
        """Find the pass or the kernel of a stage."""
        target = self._builder.target
        here = self._final is not None
        with target:
            where = locate.first_step(start, phases if here else phases[:-1], sample, output, limit)
        if where or not here:
            return where
        with target:
            fused = tvm.transform.Sequential(phases)(start)
        return locate.first_kernel(fused, stage.lowered[0], target, sample, output)


def _rounds_states(mod: tvm.IRModule) -> bool:
    """Tell whether a layer rounds the states that its own floats lead to: then rounding decides between two codes."""
    recurrent = [(ops.of(b.value), b.value) for b in bindings(mod["main"])]
    return any(op is not None and op.recurs is not None and op.recurs.already(value) for op, value in recurrent)


def _quantized(mod: tvm.IRModule) -> bool:
    return any(op_name(binding.value) in ("quantize", "dequantize") for binding in bindings(mod["main"]))


def _flat(runner: Runner, sample: Arrays) -> list[np.ndarray]:
    runner.set_inputs({i.name: sample[i.name] for i in runner.inputs})
    states = [tvm.runtime.tensor(sample[state.name]) for state in runner.states]
    return [np.from_dlpack(field).copy() for field in runner.invoke(states)]
