"""Branches of equal shape and different weights become one: wider, grouped or batched kernels."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm_ffi import StructuralKey

from nnfuze_tvm.graph import dataflow, ir, ops
from nnfuze_tvm.graph.batching import Join, JoinedCall, size_in_bytes
from nnfuze_tvm.graph.dataflow import Value, op_name, operands
from nnfuze_tvm.passes.lower.batching.slices import whole
from nnfuze_tvm.passes.lower.branches import conditions
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk


class Costs:
    """When batching pays: one core of a small board, in microseconds. Only the ratios matter.

    What is saved: a kernel's start (``KERNEL``: its call, loop set-up, cold weights) for every kernel that
    goes, and the vector lanes that a layer with few channels leaves empty. What it costs: every byte that a
    concatenation or a split moves, read and written, and its own kernel, and a slower grouped kernel where
    its input no longer fits the first cache. A chain from a common input to the heads moves nothing but the
    heads.
    """

    KERNEL = 1.0
    BYTES = 4000.0
    """Bytes copied per microsecond."""
    MACS = 8000.0
    """Multiply-accumulates per microsecond with full vectors."""
    LANES = 16
    """Output channels that a kernel computes side by side (a tile of vectors)."""

    CACHE = 32 * 1024
    """Bytes of the first cache."""
    SPREAD = 1.1
    """How much longer a grouped kernel takes whose input is larger: measured 1.05 to 1.12."""

    @classmethod
    def copy(cls, size: int) -> float:
        """Return what one kernel costs that moves ``size`` bytes."""
        return cls.KERNEL + 2 * size / cls.BYTES

    @classmethod
    def saved(cls, plan: JoinedCall) -> float:
        """Return what the joined call saves against one call per branch."""
        if plan.fuses:
            return 0.0
        starts = (len(plan.sizes) - 1) * cls.KERNEL
        if not plan.lanes_before:
            return starts
        work = plan.macs / cls.MACS
        spread = cls.SPREAD if plan.grouped_bytes > cls.CACHE else 1.0
        return starts + work * (1 / cls._filled(plan.lanes_before) - spread / cls._filled(plan.lanes_after))

    @classmethod
    def _filled(cls, channels: int) -> float:
        return channels / (ceil(channels / cls.LANES) * cls.LANES)


@tvm.transform.module_pass(opt_level=0, name="BatchBranches")
class BatchBranches:
    """Batch layers of equal shape and different constant weights that lie in independent branches.

    Layers that read one value become one layer with more output channels; layers that read different values
    become a grouped convolution, or a batched matrix product, over these values side by side. The operators
    behind them are batched as long as all branches go on alike, and what is joined is split where they
    diverge. This happens where :class:`Costs` says that it pays. Works on float and on integer graphs, NCHW
    and NHWC. No result changes. A batched layer has the name of the first branch, the others' names become
    aliases.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return ``mod`` with ``main`` rewritten."""
        # Earlier passes emit per branch what is the same for all, e.g. one transpose of a common input each.
        shared = tvm.transform.Sequential([ShareTrunk()])(mod)
        search = _Search(shared["main"])
        batches = search.run()
        if not batches:
            return mod
        writer = _Writer(search, batches)
        mod = dataflow.with_main(shared, writer.write())
        return ir.with_aliases(mod, writer.aliases) if writer.aliases else mod


@dataclass
class _Batch:
    """Bindings (by index) that one joined call replaces."""

    members: list[int]
    plan: JoinedCall


class _Search:
    """Finds batches: seeds them at layers, grows them in lockstep, and keeps what pays."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.bindings = dataflow.bindings(func)
        self.index = {binding.var: i for i, binding in enumerate(self.bindings)}
        self.outputs = dataflow.output_fields(func)
        self.reads = [
            [self.index[leaf] for leaf in operands(binding.value) if leaf in self.index] for binding in self.bindings
        ]
        self.users: list[list[int]] = [[] for _ in self.bindings]
        for i, sources in enumerate(self.reads):
            for source in dict.fromkeys(sources):
                self.users[source].append(i)
        self.batch_of: dict[int, _Batch] = {}
        self._conditions = conditions(func)
        self._signatures = [self._signature(i) for i in range(len(self.bindings))]
        self._peers: dict[Any, list[int]] = {}
        depth = [0] * len(self.bindings)
        for i, sources in enumerate(self.reads):
            is_layer = ops.is_layer(self.bindings[i].value)
            # Layers of one depth can't depend on one another.
            depth[i] = max((depth[source] for source in sources), default=0) + is_layer
            if is_layer and self._signatures[i] is not None:
                self._peers.setdefault((self._signatures[i], depth[i]), []).append(i)
        self._peers_of = {i: peers for peers in self._peers.values() for i in peers}

    def run(self) -> list[_Batch]:
        """Return the batches that pay, in an order in which each comes after those that it reads."""
        families: list[list[_Batch]] = []
        family_of: dict[int, list[_Batch]] = {}
        for i in range(len(self.bindings)):
            if i in self.batch_of or self._signatures[i] is None:
                continue
            batch, parent = self._grow(i)
            if batch is None:
                batch, parent = self._seed(i), None
            if batch is None:
                continue
            if parent is None:
                families.append([])
            family = families[-1] if parent is None else family_of[id(parent)]
            family.append(batch)
            family_of[id(batch)] = family
            for member in batch.members:
                self.batch_of[member] = batch
        return [batch for family in families for batch in self._best(family)]

    def bound(self, var: Value) -> Value:
        """Return what a Var is bound to, None for nothing."""
        return self.bindings[self.index[var]].value if var in self.index else None

    def _signature(self, i: int) -> Any:
        """Return what calls must have in common to be batched; None if the operator has no rule."""
        value = self.bindings[i].value
        name = op_name(value)
        operator = ops.of(value)
        if operator is None or operator.batch is None or not isinstance(self.bindings[i].var.ty, relax.TensorType):
            return None
        if any(isinstance(arg, relax.Tuple) for arg in value.args):
            return None
        # Target shapes of reshapes follow from the operands; bounds of clips must agree.
        rest = [
            StructuralKey(arg) for arg in value.args if not isinstance(arg, tvm.ir.Var | GenericConst | relax.ShapeExpr)
        ]
        attrs = None if value.attrs is None else StructuralKey(value.attrs)
        types = tuple(str(arg.ty.dtype) for arg in value.args if isinstance(arg.ty, relax.TensorType))
        when = self._conditions.get(self.bindings[i].var)  # sides of a choice stay apart
        return (name, attrs, tuple(rest), types, str(value.ty.dtype), value.ty.ndim, when)

    def _grow(self, i: int) -> tuple[_Batch | None, _Batch | None]:
        """Batch ``i`` with its counterparts behind the other members of a batch that it reads."""
        for source in self.reads[i]:
            parent = self.batch_of.get(source)
            if parent is None or parent.members[0] != source:
                continue
            members = [i]
            for other in parent.members[1:]:
                counterpart = next(
                    (
                        user
                        for user in self.users[other]
                        if user not in self.batch_of
                        and user not in members
                        and self._signatures[user] == self._signatures[i]
                        and self._alike(i, user)
                    ),
                    None,
                )
                if counterpart is None:
                    break
                members.append(counterpart)
            if len(members) == len(parent.members):
                batch = self._batch(members)
                if batch is not None:
                    return batch, parent
        return None, None

    def _alike(self, first: int, other: int) -> bool:
        """Return whether two calls read the same kinds of operands, from the same batches."""
        for left, right in zip(self.bindings[first].value.args, self.bindings[other].value.args, strict=True):
            if isinstance(left, GenericConst) != isinstance(right, GenericConst):
                return False
            mine, theirs = (self.batch_of.get(self.index.get(arg, -1)) for arg in (left, right))
            if mine is not theirs and not (mine is None or theirs is None):
                return False
        return True

    def _seed(self, i: int) -> _Batch | None:
        """Start a batch at layer ``i``: with layers on the same value, else with its like on other values."""
        peers = [peer for peer in self._peers_of.get(i, ()) if peer not in self.batch_of]
        data = self.bindings[i].value.args[0]
        same = [peer for peer in peers if self.bindings[peer].value.args[0].same_as(data)]
        for members in (same, [peer for peer in peers if self._same_shapes(i, peer)]):
            if len(members) > 1:
                batch = self._batch(members)
                if batch is not None:
                    return batch
        return None

    def _same_shapes(self, first: int, other: int) -> bool:
        pairs = zip(self.bindings[first].value.args, self.bindings[other].value.args, strict=True)
        return all(ir.static_shape(left) == ir.static_shape(right) for left, right in pairs)

    def _batch(self, members: list[int]) -> _Batch | None:
        calls = [self.bindings[member].value for member in members]
        operator = ops.of(calls[0])
        assert operator is not None and operator.batch is not None
        plan = operator.batch(calls, [self._joined_axis(calls, arg) for arg in range(len(calls[0].args))])
        if plan is None or self._depends(members):
            return None
        return _Batch(members, plan)

    def _joined_axis(self, calls: Sequence[Call], position: int) -> int | None:
        """Return along which axis arguments are joined: if they are a whole batch, in its order."""
        indices = [self.index.get(call.args[position], -1) for call in calls]
        batch = self.batch_of.get(indices[0])
        return batch.plan.axis if batch is not None and batch.members == indices else None

    def _depends(self, members: Sequence[int]) -> bool:
        """Return whether a member needs another one's result, in the graph in which batches are one node."""
        targets, seen = set(members), set[int]()
        pending = [user for member in members for user in self.users[member]]
        while pending:
            node = pending.pop()
            if node in targets:
                return True
            if node in seen:
                continue
            batch = self.batch_of.get(node)
            nodes = batch.members if batch is not None else [node]
            if targets.intersection(nodes):
                return True
            seen.update(nodes)
            pending.extend(user for one in nodes for user in self.users[one])
        return False

    def _best(self, family: list[_Batch]) -> list[_Batch]:
        """Return the beginning of a family of batches that saves most; nothing where nothing pays.

        Of equal ones the longest, so that what follows a layer stays with it.
        """
        best, length = 1e-9, 0
        for end in range(1, len(family) + 1):
            gain = self._gain(family[:end])
            if gain >= best:
                best, length = gain, end
        for batch in family[length:]:
            for member in batch.members:
                del self.batch_of[member]
        return family[:length]

    def _gain(self, family: Sequence[_Batch]) -> float:
        """Return what the batches save, minus what the joins and splits around them cost."""
        owner = {member: batch for batch in family for member in batch.members}
        gain = sum(Costs.saved(batch.plan) for batch in family)
        joined: set[tuple[int, int]] = set()
        for batch in family:
            for operand in batch.plan.operands:
                if not isinstance(operand, Join):
                    continue
                indices = [self.index.get(value, -1) for value in operand.values]
                source = owner.get(indices[0])
                if source is not None and source.members == indices and source.plan.axis == operand.axis:
                    joined.update((index, member) for index in indices for member in batch.members)
                else:
                    gain -= Costs.copy(sum(size_in_bytes(value) for value in operand.values))
        public = set(self.outputs)
        for batch in family:
            apart = [
                member
                for member in batch.members
                if self.bindings[member].var in public
                or any((member, user) not in joined for user in self.users[member])
            ]
            if apart:
                gain -= Costs.copy(sum(size_in_bytes(self.bindings[member].var) for member in apart))
        return gain


class _Writer:
    """Writes the function with its batches as joined calls."""

    def __init__(self, search: _Search, batches: Sequence[_Batch]) -> None:
        self.search = search
        self.batches = batches
        self.aliases: dict[str, str] = {}
        self.emitter = dataflow.Emitter()
        self.owner = {member: batch for batch in batches for member in batch.members}
        self.joined: dict[int, Value] = {}
        self.values: dict[Value, Value] = {}

    def write(self) -> relax.Function:
        for param in self.search.func.params:
            self.emitter.unique(param.name)
        for node in self._order():
            if node in self.owner:
                self._write_batch(self.owner[node])
            else:
                binding = self.search.bindings[node]
                leaves = {leaf: self._apart(leaf) for leaf in operands(binding.value)}
                value = dataflow.substitute(binding.value, leaves)
                self.values[binding.var] = self.emitter.emit(value, binding.var.name)
        outputs = [self._apart(field) for field in self.search.outputs]
        return self.emitter.finish(self.search.func.params, outputs, self.search.func.attrs)

    def _order(self) -> Iterator[int]:
        """Yield bindings in dependency order, each batch once by its first member, close to the old order."""
        head = {member: batch.members[0] for batch in self.batches for member in batch.members}
        waiting: dict[int, int] = {}
        users: dict[int, list[int]] = {}
        for i, sources in enumerate(self.search.reads):
            node = head.get(i, i)
            waiting.setdefault(node, 0)
            for source in sources:
                waiting[node] += 1
                users.setdefault(head.get(source, source), []).append(node)
        ready = [node for node, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        while ready:
            node = heapq.heappop(ready)
            yield node
            for user in users.get(node, ()):
                waiting[user] -= 1
                if waiting[user] == 0:
                    heapq.heappush(ready, user)

    def _write_batch(self, batch: _Batch) -> None:
        new = [
            self._join(operand) if isinstance(operand, Join) else self._apart(operand)
            for operand in batch.plan.operands
        ]
        names = [self.search.bindings[member].var.name for member in batch.members]
        call = batch.plan.build(new)
        if batch.plan.macs and not ops.is_layer(call):
            # A batched product has reshapes around it: the layer's name belongs to the product.
            call = self._named(call, names[0])
            self.joined[batch.members[0]] = self.emitter.emit(call)
        else:
            self.joined[batch.members[0]] = self.emitter.emit(call, names[0])
        if batch.plan.macs:
            self.aliases.update(dict.fromkeys(names[1:], names[0]))

    def _named(self, call: Value, name: str) -> Value:
        """Bind the layer inside of nested calls under its name."""
        if not isinstance(call, Call):
            return call
        if ops.is_layer(call):
            return self.emitter.emit(call, name)
        args = [self._named(arg, name) for arg in call.args]
        return Call(call.op, args, call.attrs, call.ty_args)

    def _join(self, operand: Join) -> Value:
        """Return the values side by side: a batch as it is, else their concatenation."""
        indices = [self.search.index.get(value, -1) for value in operand.values]
        batch = self.owner.get(indices[0])
        if batch is not None and batch.members == indices and batch.plan.axis == operand.axis:
            return self.joined[indices[0]]
        data = whole(operand.values, operand.axis, self.search.bound)
        if data is not None:
            shape = list(ir.static_shape(operand.values[0]))
            shape[operand.axis] = sum(ir.static_shape(value)[operand.axis] for value in operand.values)
            return self.emitter.emit(relax.op.reshape(self._apart(data), shape))
        apart = [self._apart(value) for value in operand.values]
        return self.emitter.emit(relax.op.concat(apart, operand.axis))

    def _apart(self, value: Value) -> Value:
        """Return one value by itself: a batch is split when the first of its members is asked for."""
        batch = self.owner.get(self.search.index.get(value, -1))
        if batch is not None and value not in self.values:
            joined, plan = self.joined[batch.members[0]], batch.plan
            borders = [int(border) for border in np.cumsum(plan.sizes)[:-1]]
            parts = self.emitter.emit(relax.op.split(joined, borders, plan.axis))
            for position, member in enumerate(batch.members):
                part = self.emitter.emit(relax.TupleGetItem(parts, position))
                self.values[self.search.bindings[member].var] = part
        return self.values.get(value, value)
