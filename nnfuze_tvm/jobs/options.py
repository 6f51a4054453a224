"""What a compilation is asked for, and the graphs that follow from it before anything is built."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tvm
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.devices.targets import llvm_features, resolve
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import ir
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method
from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy

Announce = Callable[[str], None]
Arrays = Mapping[str, np.ndarray]


class Options(BaseModel):
    """What to compile, how to compress it, for which machine.

    Attributes
    ----------
    models : list of str
        ONNX files, ``path`` or ``task=path``.
    target : str
        See `devices.targets.resolve`.
    calibration, evaluation : str, optional
        ``.npz`` files: samples ``[N, …]`` by input name; the evaluation's may hold labels by task name.
    quantize : str, optional
        ``int8`` or ``fp16``.
    prune : float, optional
        Fraction of the channels to keep.
    criterion : str
        Which channels go first.
    policy : str, optional
        A policy file; what it states goes before ``quantize`` and ``prune``.
    calibration_method : str
        How calibration turns samples into ranges.
    shared_inputs : list of str, optional
        Inputs that are one and the same in all tasks.
    shapes : dict
        Input shapes, by name or ``task:name``.
    trials : int
        Tuning trials per kernel; 0: no tuning.
    tracker, key : str, optional
        An RPC tracker (``host:port``) and the key of the devices there.
    wait : float
        Seconds to wait for a tracker that doesn't answer, and for a device that isn't registered.
    work_dir : str, optional
        Where the tuning job keeps everything.
    threads : int
        Threads per inference.
    compare : bool
        Whether to build and measure every stage, not only the last.
    """

    model_config = ConfigDict(extra="forbid")

    models: Annotated[list[str], Field(min_length=1)]
    target: str = "host"
    calibration: str | None = None
    evaluation: str | None = None
    quantize: Literal["int8", "fp16"] | None = None
    prune: Annotated[float, Field(gt=0, le=1)] | None = None
    criterion: Literal["l1", "l2", "activation"] = "l2"
    policy: str | None = None
    calibration_method: Literal["minmax", "percentile", "mse"] = "minmax"
    shared_inputs: list[str] | None = None
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    trials: Annotated[int, Field(ge=0)] = 0
    tracker: str | None = None
    key: str | None = None
    wait: Annotated[float, Field(ge=0)] = 60.0
    work_dir: str | None = None
    threads: Annotated[int, Field(ge=1)] = 1
    compare: bool = True

    @classmethod
    def parse(cls, **fields: Any) -> Options:
        """Return checked options.

        Raises
        ------
        InputError
            With one line that names the option and what is wrong with it.
        """
        try:
            options = cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
            raise InputError(f"--{name} {first['input']}: {first['msg'].lower()}") from None
        if not options.calibration:
            method.check_samples(pipeline.METHODS, options.model_dump())
        if options.tracker and not options.key:
            raise InputError(f"--tracker {options.tracker}: give the --key of the devices to use, too")
        if options.key and not options.tracker:
            raise InputError(f"--key {options.key}: give the --tracker where the devices are registered, too")
        return options


class Graphs:
    """The graphs of a compilation, stage by stage, none of them lowered.

    Attributes
    ----------
    loaded : tvm.IRModule
        One function per task.
    stages : dict of str to tvm.IRModule
        ``merged`` and, if asked for, ``pruned``, ``int8`` and ``fp16``, in this order.
    inputs : dict
        Name in the merged graph of each (task, input name).
    calibration : dict of str to numpy.ndarray, optional
        Samples by input.
    """

    def __init__(self, options: Options, announce: Announce) -> None:
        announce("loading the networks")
        self.loaded = load(options.models, shared_inputs=options.shared_inputs, shapes=options.shapes or None)
        self.tasks = ir.tasks(self.loaded)
        announce("merging")
        merged = _run(pipeline.merge_phases(options.shared_inputs), self.loaded)
        self.stages = {"merged": merged}
        names = {param.name for param in merged["main"].params}
        self.inputs = {
            (task, p.name): f"{task}.{p.name}" if f"{task}.{p.name}" in names else p.name
            for task in self.tasks
            for p in self.loaded[task].params
        }
        self.policy = _policy(options)
        layers = [layer.name for layer in metrics.layers(merged)]
        lineage = ir.lineage(merged)
        self.policy.validate_layers(layers, lineage)
        chosen = [self.policy.for_layer(name, lineage) for name in layers]
        self.calibration = self._calibration(options, merged, chosen)
        inputs = method.Inputs(self.policy, self.calibration, options.model_dump(), host_executor)
        for way in method.asked(pipeline.METHODS, chosen):
            way.check_features(llvm_features(resolve(options.target)), options.target)
            announce(way.activity)
            self.stages[way.name] = _run(way.passes(inputs), self.last)

    @property
    def last(self) -> tvm.IRModule:
        """The graph of the last stage."""
        return list(self.stages.values())[-1]

    def alone(self, task: str) -> tvm.IRModule:
        """Return the graph of one task, as if it were the only one."""
        outputs = [output for output in ir.task_outputs(self.loaded) if output.task == task]
        functions = {
            var: func
            for var, func in self.loaded.functions.items()
            if not isinstance(func, relax.Function) or var.name_hint == task
        }
        mod = ir.with_task_outputs(tvm.IRModule(functions), outputs)
        return _run(pipeline.merge_phases(), mod)

    def _calibration(
        self, options: Options, merged: tvm.IRModule, chosen: Sequence[LayerPolicy]
    ) -> Mapping[str, np.ndarray] | None:
        if options.calibration is not None:
            from nnfuze_tvm.passes.compress.calibration import load_calibration

            return load_calibration(options.calibration, merged)
        for way in method.asked(pipeline.METHODS, chosen):
            way.check_samples(str(options.policy))
        return None


def read_arrays(path: str, what: str) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file.

    Raises
    ------
    InputError
        If it can't be read, isn't one, or is empty.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"{what} {path}: a single array; save arrays by name with numpy.savez")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(f"{what} {path}: can't be read ({error.strerror or error})") from None
    except (ValueError, zipfile.BadZipFile, EOFError):
        raise InputError(f"{what} {path}: not an .npz file; save arrays by name with numpy.savez") from None
    if not arrays:
        raise InputError(f"{what} {path}: holds no arrays; save arrays by input name with numpy.savez")
    return arrays


def check_names(arrays: Mapping[str, np.ndarray], known: Sequence[str], path: str) -> None:
    """Complain about arrays that belong to nothing, and about values that aren't numbers."""
    for name, array in arrays.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"evaluation data {path}: {name!r} is neither an input nor a task{hint}")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise InputError(f"evaluation data {path}: {name!r} holds NaN or infinite values")


def _policy(options: Options) -> Policy:
    settings = method.settings(pipeline.METHODS, options.model_dump())
    return (Policy.load(options.policy) if options.policy else Policy()).with_default(settings)


def _run(phases: Sequence[tvm.transform.Pass], mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.transform.Sequential(list(phases))(mod)
