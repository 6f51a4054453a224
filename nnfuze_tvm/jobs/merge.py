"""What ``nnfuze merge`` does: networks that were trained apart learn to share a trunk, and become ONNX files again."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from nnfuze_tvm.analysis import measure, metrics
from nnfuze_tvm.deploy.runner import signature
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.frontend.export import export as to_onnx
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.samples import by_inference
from nnfuze_tvm.jobs.announce import Announce, silent
from nnfuze_tvm.jobs.data import Arrays
from nnfuze_tvm.jobs.directory import JOB, JobDirectory, replace
from nnfuze_tvm.jobs.learnt_trunk import digest, file_names
from nnfuze_tvm.jobs.request import model_path
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.merge.common_inputs import CommonInputs
from nnfuze_tvm.reading.arrays import read_arrays
from nnfuze_tvm.reading.files import parse_json, read_file
from nnfuze_tvm.reading.limits import MOST_EPOCHS, MOST_THREADS
from nnfuze_tvm.report.merging import Attempt, CurvePoint, MergeReport, TaskScore
from nnfuze_tvm.report.merging_html import render_merge_html
from nnfuze_tvm.report.record import LayerUse
from nnfuze_tvm.report.text import duration
from nnfuze_tvm.training.course import Schedule
from nnfuze_tvm.training.judge import Evaluation, Score
from nnfuze_tvm.training.merging import Search, Shared, Watch, share
from nnfuze_tvm.training.network import Network, torch
from nnfuze_tvm.training.stitches import Candidate
from nnfuze_tvm.training.trials import Trial

_LOG = logging.getLogger(__name__)
_LOG.setLevel(logging.INFO)

# Seconds between two times that the state is kept, and that it is said how far it is.
_KEPT, _SAID = 30.0, 5.0
# What may not change between a merge and its going on.
_FIXED = ("networks", "shared_inputs", "data", "evaluation", "budget", "epochs", "seed", "threads", "torch")
_STATE = "state"
# Bytes of its digest.
_DIGEST = 32
# So many steps a trial has at least, however few samples there are, and how fast is learnt at first.
_LEAST, _RATE = 2500, 3e-3
# What the report says of a layer as it was measured.
_USE = ("name", "op", "macs", "parameters", "integer", "depth")


@dataclass(frozen=True)
class Options:
    """What a merge is asked for; see `merge`."""

    models: Sequence[str]
    data: str
    shared_inputs: Sequence[str] = ()
    evaluation: str | None = None
    budget: float = 1.0
    epochs: int = 20
    seed: int = 0
    threads: int = 1

    def check(self) -> None:
        """Complain about what can't be meant."""
        if len(self.models) < 2:
            raise InputError(f"nnfuze merge: {len(self.models)} network given; there is something to share from two on")
        if not 0 <= self.budget <= 100:
            raise InputError(f"--budget {self.budget:g}: give points in percent, from 0 to 100")
        for name, value, most in (("epochs", self.epochs, MOST_EPOCHS), ("threads", self.threads, MOST_THREADS)):
            if not 1 <= value <= most:
                raise InputError(f"--{name} {value}: give a number from 1 to {most}")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: give 0 or more")


def merge(
    models: Sequence[str] | None,
    output: str | os.PathLike[str],
    *,
    data: str | None = None,
    announce: Announce = silent,
    **fields: Any,
) -> MergeReport:
    """Let networks that were trained apart share a trunk; ``output`` gets one ONNX file per task, and the report.

    Parameters
    ----------
    models : sequence of str
        ONNX files over the same inputs, ``path`` or ``task=path``. Without them the merge in ``output`` goes on.
    output : path
        A directory, which also keeps what is needed to go on after an interruption.
    data : str
        An ``.npz`` file: what to learn from, samples ``[N, …]`` by input, without labels.
    announce : callable
        Is told what is being done, in a few words.
    **fields
        - ``shared_inputs``: inputs of other names or forms that are one, see `graph.links.wire`;
        - ``evaluation``: an ``.npz`` file like the data's with labels ``[N]`` by task;
        - ``budget`` (1.0): points that a task may lose, of accuracy where the evaluation has labels of it, else of
          agreement with its original on a tenth of the samples, which is not learnt from;
        - ``epochs`` (20): how often each sample is seen per trial;
        - ``seed`` (0), ``threads`` (1): the same ones give the same files on one machine.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit; nothing is written then.
    """
    path = Path(os.path.abspath(output))
    options = Options([str(model) for model in models], data or "", **fields) if models else _saved(path)
    options.check()
    if not options.data:
        raise InputError("--data: give an .npz file with samples [N, …] by input to learn from")
    announce("loading the networks")
    mod = load(options.models)
    if options.shared_inputs:
        mod = _run([CommonInputs(options.shared_inputs)], mod)
    samples, evaluation = _data(mod, options)
    facts = _facts(options)
    _check_place(path)
    directory = JobDirectory(path, "merge")
    try:
        directory.claim(facts, _FIXED)
        with directory.logging("merge"):
            diary = _Diary(path / _STATE, announce, [facts[name] for name in _FIXED])
            return _merge(mod, samples, evaluation, options, path, diary, announce)
    finally:
        directory.close()


def _saved(path: Path) -> Options:
    """Return what a merge was begun with."""
    try:
        options = Options(**parse_json(read_file(path / JOB))["options"])
        options.check()
        return options
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--output {path}: no merge to go on with; give the networks, too") from None


def _check_place(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / JOB).is_file():
        raise InputError(f"--output {path}: exists and is no merge, so nothing is written there; choose another one")


def _facts(options: Options) -> dict[str, Any]:
    """Return what a merge is about."""
    absolute = [model[: -len(model_path(model))] + os.path.abspath(model_path(model)) for model in options.models]
    kept = {**asdict(options), "models": absolute, "data": os.path.abspath(options.data)}
    kept["evaluation"] = options.evaluation and os.path.abspath(options.evaluation)
    return {
        "options": kept,
        "shared_inputs": list(options.shared_inputs),
        "networks": [digest(model_path(model)) for model in options.models],
        "data": digest(options.data),
        "evaluation": options.evaluation and digest(options.evaluation),
        "budget": options.budget,
        "epochs": options.epochs,
        "seed": options.seed,
        "threads": options.threads,
        "torch": str(torch.__version__),
    }


def _data(mod: tvm.IRModule, options: Options) -> tuple[Arrays, Evaluation]:
    """Return what to learn from and what to judge by, checked, ``[inferences, *shape]``."""
    functions = {gvar.name_hint: func for gvar, func in mod.functions_items() if isinstance(func, relax.Function)}
    merged = _run(pipeline.merge_phases(), mod)
    inputs, outputs, states = signature(merged)
    if states:
        raise InputError(f"input {states[0].name}: networks with states can't learn to share a trunk")
    for task, func in functions.items():
        names, known = ([one.name for one in ones] for ones in (func.params, inputs))
        if {*names} != {*known}:
            raise InputError(
                f"task {task}: networks that share a trunk must have the same inputs, by name, shape and type; "
                f"it has {', '.join(names)}, and all together have {', '.join(known)}; --share-input says which are one"
            )
        # What can't be learnt or written is said before anything is.
        Network(func)
        _file(mod, task)
    shapes = {one.name: one.shape for one in inputs}
    samples = load_calibration(read_arrays(options.data, "data"), merged, what=f"data {options.data}")
    given = {name: by_inference(values, shapes[name]) for name, values in samples.items()}
    if (count := len(next(iter(given.values())))) < 8:
        raise InputError(f"--data {options.data}: {count} samples are too few to learn from")
    if options.evaluation is None:
        return given, Evaluation()
    arrays = read_arrays(options.evaluation, "evaluation data")
    own = {name: values for name, values in arrays.items() if name not in functions}
    shown = load_calibration(own, merged, what=f"evaluation data {options.evaluation}")
    labels = measure.labels_of(arrays, outputs, len(next(iter(shown.values()))))
    labels = {task: classes for task, classes in labels.items() if (classes >= 0).any()}
    return given, Evaluation({name: by_inference(values, shapes[name]) for name, values in shown.items()}, labels)


def _run(phases: Sequence[tvm.transform.Pass], mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.transform.Sequential(list(phases))(mod)


def _merge(
    mod: tvm.IRModule,
    samples: Arrays,
    evaluation: Evaluation,
    options: Options,
    path: Path,
    diary: _Diary,
    announce: Announce,
) -> MergeReport:
    torch.set_num_threads(options.threads)
    announce("asking the networks")
    schedule = Schedule(epochs=options.epochs, least=_LEAST, rate=_RATE, seed=options.seed)
    found = share(mod, samples, options.budget, schedule, diary, evaluation)
    announce("writing")
    report = _report(mod, samples, options, found, diary)
    files = {name: _file(found.module, task) for task, name in file_names(ir.tasks(found.module)).items()}
    files["report.json"], files["report.html"] = report.to_json().encode(), render_merge_html(report).encode()
    for name, content in files.items():
        replace(path / name, content)
    return report


class _Diary(Watch):
    """Keeps a search's state in a file, behind a digest of it and of what the search is about; says how far it is.

    Attributes
    ----------
    seconds : float
        For how long has been searched, earlier runs included.
    """

    def __init__(self, path: Path, announce: Announce, about: Sequence[Any]) -> None:
        self._path, self._tell, self._about = path, announce, json.dumps(about).encode()
        self._earlier, self._began = 0.0, time.monotonic()
        self._kept = self._said = self._began
        self._trial: tuple[str, float, int] = ("", self._began, 0)

    def _announce(self, text: str) -> None:
        self._tell(text)
        _LOG.info(text)

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def found(self) -> Mapping[str, Any] | None:
        try:
            content = read_file(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{self._path}: can't be read ({error.strerror})") from None
        data = content[_DIGEST:]
        if content[:_DIGEST] != self._digest(data):
            raise InputError(f"{self._path}: damaged, or of another merge; delete it to begin anew")
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
            self._earlier = float(state.pop("seconds"))
        except Exception:  # whatever PyTorch makes of what it didn't write
            raise InputError(f"{self._path}: no state of a merge; delete it to begin anew") from None
        return state

    def _digest(self, data: bytes) -> bytes:
        return hashlib.sha256(self._about + data).digest()

    def keep(self, search: Search, *, now: bool) -> None:
        if now or time.monotonic() - self._kept > _KEPT:
            written = io.BytesIO()
            torch.save({**search.state(), "seconds": self.seconds}, written)
            data = written.getvalue()
            replace(self._path, self._digest(data) + data)
            self._kept = time.monotonic()

    def began(self, candidate: Candidate) -> None:
        text = f"{candidate.task} behind {candidate.donor_cut.name}"
        self._announce(text)
        self._trial = (text, time.monotonic(), 0)

    def stepped(self, step: int, steps: int, loss: float, lost: Mapping[str, float]) -> None:
        text, began, before = self._trial
        if not before:
            # A course that goes on is not at its beginning.
            self._trial = text, began, before = text, time.monotonic(), step
        if (now := time.monotonic()) - self._said < _SAID or step == before:
            return
        self._said = now
        left = (now - began) / (step - before) * (steps - step)
        points = "".join(f", {task} lost {each:.1f}" for task, each in lost.items())
        self._announce(f"{text}: step {step} of {steps}, loss {loss:.3f}{points}, {duration(left)} left")

    def tried(self, trial: Trial) -> None:
        points = ", ".join(f"{task} {score.agreement:.1f} % agree" for task, score in trial.after.items())
        self._announce(f"{self._trial[0]}: {'kept' if trial.kept else 'not kept'}, {points}")


def _file(mod: tvm.IRModule, task: str) -> bytes:
    """Return a task's network as an ONNX file, whose outputs have the names that they had."""
    outputs = [output for output in ir.task_outputs(mod) if output.task == task]
    alone = dataflow.with_functions(ir.with_task_outputs(tvm.IRModule({}), outputs), {task: mod[task]})
    model = to_onnx(_run(pipeline.merge_phases()[:1], alone))
    names = {value.name: output.name for value, output in zip(model.graph.output, outputs, strict=True)}
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)} - {*names}
    names = {old: new for old, new in names.items() if new not in taken}
    for node in model.graph.node:
        for places in (node.input, node.output):
            places[:] = [names.get(name, name) for name in places]
    for value in model.graph.output:
        value.name = names.get(value.name, value.name)
    model.graph.name = task
    return bytes(model.SerializeToString())


def _report(mod: tvm.IRModule, samples: Arrays, options: Options, found: Shared, diary: _Diary) -> MergeReport:
    layers, given = (metrics.layers(_run(pipeline.merge_phases(), each)) for each in (found.module, mod))
    macs = before = sum(layer.macs for layer in given)
    scores = dict(found.originals)
    attempts = []
    for trial in found.tried:
        one = trial.candidate
        then = macs - one.cut.macs + math.prod(one.cut.shape) * one.donor_cut.shape[1]
        if trial.kept:
            macs, scores = then, {**scores, **trial.after}
        own = sum(layer.macs for layer in given if one.task in layer.tasks)
        attempts.append(
            Attempt(
                donor=one.donor,
                task=one.task,
                behind=one.donor_cut.name,
                instead_of=one.cut.name,
                saved=one.cut.macs / max(own, 1),
                macs=then,
                fit=one.fit,
                before=_scores(trial.before),
                after=_scores(trial.after),
                kept=trial.kept,
                steps=trial.steps,
                curve=[CurvePoint(step=p.step, loss=p.loss, lost=dict(p.lost)) for p in trial.curve],
            )
        )
    return MergeReport(
        tasks=ir.tasks(mod),
        budget=options.budget,
        samples=len(next(iter(samples.values()))),
        epochs=options.epochs,
        seed=options.seed,
        threads=options.threads,
        seconds=diary.seconds,
        macs_before=before,
        macs=sum(layer.macs for layer in layers),
        originals=_scores(found.originals),
        scores=_scores(scores),
        attempts=attempts,
        layers=[LayerUse(**{name: getattr(layer, name) for name in _USE}, tasks=list(layer.tasks)) for layer in layers],
    )


def _scores(scores: Mapping[str, Score]) -> dict[str, TaskScore]:
    return {task: TaskScore(**asdict(score)) for task, score in scores.items()}
