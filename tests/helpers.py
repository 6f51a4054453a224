"""What several test modules need: what a Relax module gives, computed with NumPy or by code built for this CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm
from hypothesis import settings
from tvm import relax

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import linker_for
from nnfuze_tvm.graph import evaluate


def few(examples: int) -> settings:
    """Return Hypothesis's settings where each example is compiled: so many examples, five times as many with --all."""
    return settings(max_examples=examples * settings().max_examples // 20)


def evaluate_module(mod: tvm.IRModule, inputs: Mapping[str, np.ndarray], function: str = "main") -> list[np.ndarray]:
    """Return the outputs of ``function`` in tuple order, computed with NumPy: for passes that change graphs only.

    Where kernels or machine code are what is tested, `run_module` builds them.
    """
    functions = {var.name_hint: func for var, func in mod.functions_items()}
    return evaluate.executor(tvm.IRModule({**functions, "main": mod[function]}))(inputs)


def keeps_values(change: tvm.transform.Pass, mod: tvm.IRModule, inputs: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """Check that a pass changes a network's one output by rounding only; return what it makes of the network."""
    new = change(mod)
    (want,), (got,) = evaluate_module(mod, inputs), evaluate_module(new, inputs)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
    return new


def compiled(
    mod: tvm.IRModule, function: str = "main", level: int = 1
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """Build ``mod`` without any schedule; return what runs ``function``: arrays by name → outputs in tuple order.

    Parameters
    ----------
    mod
        A module of the package (every function returns a tuple) or one whose function returns a tensor.
    level
        LLVM's optimization level. Small networks take longer to compile than to run.
    """
    params = [param.name for param in mod[function].params]
    executable = tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "opt-level": level}))
    # TVM links what has no kernel at all, and takes a system compiler for it unless told otherwise.
    machine = relax.VirtualMachine(executable.jit(fcompile=linker_for(resolve("host"))), tvm.cpu())

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        result = machine[function](*(tvm.runtime.tensor(np.asarray(inputs[name], order="C")) for name in params))
        if isinstance(result, tvm.runtime.Tensor):
            return [result.numpy()]
        return [field.numpy() for field in result]

    return run


def run_module(
    mod: tvm.IRModule, inputs: Mapping[str, np.ndarray], function: str = "main", level: int = 1
) -> list[np.ndarray]:
    """Build ``mod``, run ``function`` once and return its outputs in tuple order; see `compiled`."""
    return compiled(mod, function, level)(inputs)
