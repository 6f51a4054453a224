"""The networks as they were given, computed by somebody else: ONNX Runtime, or ONNX's own reference evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx

from nnfuze_tvm.frontend import onnx_file
from nnfuze_tvm.frontend.onnx_file import Source
from nnfuze_tvm.frontend.onnx_tensors import nodes
from nnfuze_tvm.graph.wiring import Run, Wiring
from nnfuze_tvm.jobs.check.unsaturated import multiplies_bytes, unsaturated
from nnfuze_tvm.jobs.data import Arrays

How = Literal["exact", "plain", "usual"]

_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "Loop", "Scan", "ClippedLSTM", "DynamicQuantizeLSTM"})


class Originals:
    """The given networks.

    Parameters
    ----------
    models : sequence of str
        ONNX files, ``path`` or ``task=path``.
    wiring : Wiring
        How they hang together.

    Attributes
    ----------
    what : str
        Who computes them; set by `open`.
    """

    def __init__(self, models: Sequence[str], wiring: Wiring) -> None:
        self._wiring = wiring
        self.what = ""
        self._models = models
        self._runs: list[Run] = []

    @cached_property
    def sources(self) -> list[Source]:
        """The networks, their nodes named as the importer names them."""
        found = onnx_file.sources(self._models, None)
        for source in found:
            onnx_file.name_nodes(source)
        return found

    def open(self, heavy: bool, sessions: Sequence[Any] = ()) -> str:
        """Make the networks ready to run; return why it can't be, or an empty string.

        Parameters
        ----------
        heavy : bool
            Whether there is too much to compute for ONNX's own evaluator.
        sessions : sequence of onnxruntime.InferenceSession, optional
            The networks in ONNX Runtime, where somebody has opened them already: taken where they are exact.
        """
        try:
            if any(multiplies_bytes(source.model) for source in self.sources):
                sessions = ()
            runs = [_calls(session) for session in sessions] or [calls_of(source.model) for source in self.sources]
            self.what, self._runs = "ONNX Runtime", runs
            return ""
        except Exception:  # missing, or there is something in a file that it can't run
            self._runs = []
        if heavy:
            return "onnxruntime can't run the networks, and they are too large for ONNX's own evaluator"
        try:
            self._runs = [_evaluator(source.model) for source in self.sources]
        except Exception:
            return "neither onnxruntime nor ONNX's own evaluator can run the networks"
        self.what = "ONNX's own evaluator"
        return ""

    def plainly(self) -> None:
        """Compute node by node from now on; what ONNX Runtime makes of a graph may compute it a bit differently."""
        if self.what == "ONNX Runtime":
            self._runs = [calls_of(source.model, "plain") for source in self.sources]

    def __call__(self, sample: Arrays) -> list[np.ndarray]:
        """Return what the merged network returns for one inference: outputs, and the next values of its states."""
        return self._wiring.step(self._tasks, sample)

    def taken(self, sample: Arrays, task: str) -> dict[str, np.ndarray]:
        """Return the inputs of one of the networks."""
        return self._wiring.trace(self._tasks, sample)[1][task]

    @property
    def _tasks(self) -> dict[str, Run]:
        return dict(zip(self._wiring.tasks, self._runs, strict=True))

    @property
    def against(self) -> str:
        """Who computes them, and what of them where that is not what was given."""
        converted = any(source.label.endswith((".tflite", ".pt2")) for source in self.sources)
        return f"{self.what} on the ONNX form of the files" if converted else self.what

    @property
    def recurrent(self) -> bool:
        """Whether small differences may go round in a loop."""
        return any(node.op_type in _RECURRENT for s in self.sources for node in nodes(s.model.graph))


def with_all_tensors(source: Source) -> tuple[Source, list[tuple[str, str]]]:
    """Return a network whose outputs are all its nodes' outputs, in order, and (node, operator) of each."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    known = {value.name: value for value in model.graph.output}
    makers = {name: node for node in model.graph.node for name in node.output if name}
    del model.graph.output[:]
    model.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in makers)
    return Source(source.task, source.label, model), [(node.name, node.op_type) for node in makers.values()]


def traced(source: Source, what: str) -> Run:
    """Return what computes a network node by node."""
    return calls_of(source.model, "plain") if what == "ONNX Runtime" else _evaluator(source.model)


def calls_of(model: onnx.ModelProto, how: How = "exact") -> Run:
    """Return an ONNX network in ONNX Runtime.

    Parameters
    ----------
    model : onnx.ModelProto
        The network.
    how : str
        ``exact`` computes what the network says, in floats where it has QDQ, and no product is saturated; ``plain``
        does so node by node; ``usual`` is what everybody gets, which saturates on x86 without VNNI.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    if how != "usual":
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
        model = unsaturated(model)
    if how == "plain":
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    return _calls(onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=providers))


def _calls(session: Any) -> Run:
    return lambda inputs: list(map(np.asarray, session.run(None, dict(inputs))))


def _evaluator(model: onnx.ModelProto) -> Run:
    from onnx.reference import ReferenceEvaluator  # slow to import

    evaluator = ReferenceEvaluator(model)
    return lambda inputs: list(map(np.asarray, evaluator.run(None, dict(inputs))))
