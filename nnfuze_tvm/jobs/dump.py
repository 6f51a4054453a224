"""The module after every pass of every phase, as text files in a directory."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.ir.instrument import pass_instrument

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.directory import replace
from nnfuze_tvm.passes import pipeline

# A dump's files and no others, also one that was being written: what may be deleted for a new dump.
_NAME = re.compile(r"\d{2,}-[\w-]+\.py|\.\d{2,}-[\w-]+\.py\.new")
# How TVM prints a constant that is no scalar.
_CONSTANT = re.compile(r'metadata\["ir\.GenericConst"\]\[(\d+)\]')


def open_dump(
    path: str | os.PathLike[str] | None, output: str | os.PathLike[str] | None = None
) -> AbstractContextManager[object]:
    """Return a context in which the module after every pass is written into a directory; None: nowhere.

    The context may be entered several times. What an earlier dump left in the directory is deleted when there is
    something to write.

    Raises
    ------
    InputError
        If the directory holds anything else, can't be written, or is ``output`` or in it.
    """
    if path is None:
        return nullcontext()
    if output is not None and Path(path).resolve().is_relative_to(Path(output).resolve()):
        raise InputError(f"--dump-ir {path}: is the place of the bundle; choose another directory")
    return _Dump(Path(path))


class _Dump:
    """Writes the passes of `pipeline.phase`, not those that such a pass runs itself."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._running: list[str] = []
        self._context: Any = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            old = list(directory.iterdir())
            if not all(_NAME.fullmatch(file.name) for file in old):
                raise InputError(f"--dump-ir {directory}: holds other files than a dump's; choose another directory")
        except OSError as error:
            raise InputError(f"--dump-ir {directory}: can't be written ({error.strerror})") from None

    def __enter__(self) -> None:
        dump = self

        @pass_instrument
        class Instrument:
            def run_before_pass(self, _: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
                dump._running.append(str(info.name))

            def run_after_pass(self, mod: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
                *outer, own = dump._running
                dump._running.pop()
                # A phase within a pass is another module's, such as the one that calibration runs.
                phases = [phase for name in outer if (phase := pipeline.phase_name(name))]
                if len(phases) == 1 and pipeline.phase_name(outer[-1]):
                    dump._write(phases[0], own, mod)

        self._context = tvm.transform.PassContext(instruments=[Instrument()])
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.clear()
        self._context.__exit__(kind, error, trace)

    def _write(self, phase: str, name: str, mod: tvm.IRModule) -> None:
        try:
            if not self._count:
                for file in self._directory.iterdir():
                    file.unlink()
            self._count += 1
            replace(self._directory / f"{self._count:02}-{phase}-{name}.py", _text(mod))
        except OSError as error:
            raise InputError(f"--dump-ir {self._directory}: can't be written ({error.strerror})") from None


def _text(mod: tvm.IRModule) -> str:
    """Return a module as TVMScript, with shape and type in place of large constants."""
    text = mod.script(show_meta=False, int_dtype="int64")
    constants: list[GenericConst] = []

    def collect(expr: relax.Expr) -> None:
        if isinstance(expr, GenericConst) and expr.value.ndim and not any(expr.same_as(one) for one in constants):
            constants.append(expr)

    # The printer numbers them in the order in which it meets them.
    for _, func in sorted(mod.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, collect)
    if len(set(_CONSTANT.findall(text))) == len(constants):
        text = _CONSTANT.sub(lambda found: _described(constants[int(found[1])]), text)
    return text.split("\n# Metadata omitted")[0].rstrip() + "\n"


def _described(constant: GenericConst) -> str:
    return f'constant("{constant.value.dtype}{list(map(int, constant.value.shape))}")'
