"""What TVM's virtual machine does between kernels, without what it does twice."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, substitute, with_main


@module_pass(opt_level=0, name="KeepTensors")
class KeepTensors:
    """Make one tensor of the same part of the same memory, and let the end of a call free what was allocated in it.

    TVM makes a tensor object for every kernel's result, another for what is computed in place, and drops each when it
    was read for the last time. Where they lie is planned before; one object per place and shape will do, and takes less
    code and time. Takes ``main`` as TVM's own passes leave it for the virtual machine.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with fewer steps in ``main``."""
        main = mod["main"]
        made: dict[tuple, Value] = {}
        values: dict[Value, Value] = {}
        steps = []
        for binding in bindings(main):
            value = substitute(binding.value, values)
            if op_name(value) == "vm.kill_object":
                continue
            if isinstance(value, tvm.ir.Var):
                values[binding.var] = value
                continue
            if op_name(value) == "vm.alloc_tensor":
                storage, *rest = value.args
                first = made.setdefault((storage, *map(str, rest)), binding.var)
                if not first.same_as(binding.var):
                    values[binding.var] = first
                    continue
            steps.append(relax.VarBinding(binding.var, value))
        body = relax.SeqExpr([relax.BindingBlock(steps)], substitute(main.body.body, values))
        return with_main(mod, relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs))
