"""What compile, tune and analyze are asked for: checked records, by names that command line and Python share."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from nnfuze_tvm.devices.remote.tracker import Place
from nnfuze_tvm.errors import InputError, printable
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method, method_settings
from nnfuze_tvm.passes.compress.policy import LayerPolicy
from nnfuze_tvm.reading.limits import LONGEST_WAIT, MOST_EPOCHS, MOST_THREADS, MOST_TRIALS

# Where work is kept by default.
WORK_DIR = "nnfuze-tuning"
_Request = TypeVar("_Request", bound="NetworkRequest")


class NetworkRequest(BaseModel):
    """Which networks, how to compress them, for and on which machine.

    Attributes
    ----------
    models : list of str
        ONNX or TensorFlow Lite files, ``path`` or ``task=path``.
    shared_inputs : list of str, optional
        Inputs that are one and the same in all tasks.
    chains, states : list of str
        Inputs that are outputs of other networks, or of the same one at the call before; see `graph.links.wire`.
    shapes : dict
        Input shapes, by name or ``task:name``.
    merge : str, optional
        A directory of ``nnfuze merge``: the networks share the trunk that was learnt there.
    target : str
        See `devices.targets.resolve`.
    optimize : str
        ``speed``, or ``memory``: weights stay as small as they are, and the bundle's are used where they lie.
    threads : int
        Threads per inference.
    calibration : str, optional
        An ``.npz`` file: samples ``[N, …]`` by input name.
    policy : str, optional
        A policy file; what it states goes before the methods' options.
    options : dict
        The values of the compression methods' options by name, all of them.
    finetune : str, optional
        An ``.npz`` file: samples to train the compressed network on, perhaps with labels ``[N]`` by task.
    epochs : int, optional
        How often the training sees each sample.
    tracker, key : str, optional
        An RPC tracker (``host:port``) and the key of the devices there.
    secret_file : str, optional
        The file with the secret that the tracker and the devices ask for; by default this user's.
    insecure : bool
        The tracker asks for none, as TVM's own.
    wait : float
        Seconds to wait for a tracker that doesn't answer, and for a device that isn't registered.
    work_dir : str, optional
        The directory of a tuning job, and of what was trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[list[str], Field(min_length=1)]
    shared_inputs: list[str] | None = None
    chains: list[str] = Field(default_factory=list)
    states: list[str] = Field(default_factory=list)
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    merge: str | None = None
    target: str = "host"
    optimize: Literal["speed", "memory"] = "speed"
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] = 1
    calibration: str | None = None
    policy: str | None = None
    options: dict[str, Any]
    finetune: str | None = None
    epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] | None = None
    tracker: str | None = None
    key: str | None = None
    secret_file: str | None = None
    insecure: bool = False
    wait: Annotated[float, Field(ge=0, le=LONGEST_WAIT, allow_inf_nan=False)] = 60.0
    work_dir: str | None = None

    @classmethod
    def parse(cls: type[_Request], models: Sequence[str] | None, fields: Mapping[str, Any]) -> _Request:
        """Return a checked request.

        Parameters
        ----------
        models
            The networks.
        fields
            Everything else by name, the methods' options beside the fields of this class.

        Raises
        ------
        InputError
            With one line that names the option and what is wrong with it, also if there is no such option.
        """
        if isinstance(models, str):
            raise InputError(f"models {models!r}: a text; give a list of networks, as [{models!r}]")
        options = method_settings.options(pipeline.METHODS)
        known = [*(name for name in cls.model_fields if name not in ("models", "options")), *options]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise InputError(f"unknown option {name!r}; {hint}")
        types = {option.name: (option.type | None, option.default) for option in options.values()}
        checker = create_model("Options", **types)  # type: ignore[call-overload]
        own = {name: value for name, value in fields.items() if name not in options}
        try:
            chosen = checker(**{name: value for name, value in fields.items() if name in options})
            request = cls.model_validate({"models": models or [], "options": chosen.model_dump(), **own})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            message = first["msg"].lower().replace("input should", "it should")
            about = f" ({options[name].help.rstrip('.')})" if name in options else ""
            raise InputError(
                f"--{name.replace('_', '-')} {printable(str(first['input']), 80)}: {message}{about}"
            ) from None
        if request.policy is None:
            stated = method_settings.settings(pipeline.METHODS, request.options)
            layer = LayerPolicy(**{field: value for field, value in stated.items() if value is not None})
            method_settings.check_used(
                pipeline.METHODS, method.asked(pipeline.METHODS, [layer], request.options), request.options
            )
        if not request.calibration:
            method_settings.check_samples(pipeline.METHODS, request.options)
        if request.epochs is not None and not request.finetune:
            raise InputError(f"--epochs {request.epochs}: give the data to --finetune on, too")
        if request.tracker and not request.key:
            raise InputError(f"--tracker {request.tracker}: give the --key of the devices to use, too")
        if not request.tracker:
            given = {
                f"--key {request.key}": request.key is not None,
                "--secret-file": request.secret_file is not None,
                "--insecure": request.insecure,
            }
            if option := next((option for option, there in given.items() if there), ""):
                raise InputError(f"{option}: give the --tracker where the devices are registered, too")
        return request

    @property
    def place(self) -> Place | None:
        """The tracker, None if there is none.

        Raises
        ------
        DeviceError
            If there is one but no secret.
        """
        return None if self.tracker is None else Place.of(self.tracker, self.secret_file, self.insecure)

    def to_fields(self) -> dict[str, Any]:
        """Return what `parse` takes, for JSON."""
        fields = self.model_dump(mode="json")
        return {**fields.pop("options"), **fields}


class TuneRequest(NetworkRequest):
    """What to tune; ``trials`` is how many candidates to measure per kernel, 0: none."""

    trials: Annotated[int, Field(ge=0, le=MOST_TRIALS)] = 0


class CompileRequest(TuneRequest):
    """What to compile.

    Attributes
    ----------
    evaluation : str, optional
        An ``.npz`` file like the calibration's, perhaps with labels by task name: what to judge the result on.
    compare : bool
        Whether to build and measure every stage, not only the last.
    check : bool
        Whether to compare what was built with the networks as they were given.
    """

    evaluation: str | None = None
    compare: bool = True
    check: bool = True


def model_path(model: str) -> str:
    """Return the path of ``path`` or ``task=path``."""
    _, found, path = model.partition("=")
    return path if found and not os.path.exists(model) else model
