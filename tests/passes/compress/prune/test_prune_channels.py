"""Pruned networks are compared with masked ones.

To mask a channel is to set to zero every weight that reads it. The masked network has the original shapes and
needs no coupling analysis to be right, so any channel that the analysis couples wrongly shows.
"""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op
from tvm.relax.utils import copy_with_new_vars
from tvm.script import ir as I
from tvm.script import relax as R

from benchmarks.networks import build as build_network
from nnfuze_tvm.errors import InputError, PolicyError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name, substitute
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.channel_groups import CoupledFunction
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels, remove, worst
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm
from tests.helpers import evaluate_module


class Net:
    """Builds one function; layers are named conv0, conv1, …"""

    def __init__(self, *shape, seed=0):
        self.rng = np.random.default_rng(seed)
        self.emitter = Emitter()
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))
        self.emitter.unique("x")
        self.count = 0

    def __call__(self, value, name="lv"):
        return self.emitter.emit(value, name)

    def const(self, *shape):
        return relax.const((self.rng.standard_normal(shape) / 2).astype("float32"))

    def _name(self):
        self.count += 1
        return f"conv{self.count - 1}"

    def conv(self, x, out, kernel=1, groups=1, bias=True, **attrs):
        weight = self.const(out, ir.static_shape(x)[1] // groups, kernel, kernel)
        y = self(op.nn.conv2d(x, weight, padding=kernel // 2, groups=groups, **attrs), self._name())
        return self(op.add(y, self.const(1, out, 1, 1))) if bias else y

    def transposed(self, x, out, groups=1):
        weight = self.const(ir.static_shape(x)[1], out // groups, 1, 1)
        return self(op.nn.conv2d_transpose(x, weight, groups=groups), self._name())

    def dense(self, x, out):
        y = self(op.matmul(x, self.const(ir.static_shape(x)[-1], out)), self._name())
        return self(op.add(y, self.const(out)))

    def norm(self, x):
        channels = ir.static_shape(x)[1]
        gamma, beta, mean = (self.const(channels) for _ in range(3))
        variance = relax.const(self.rng.uniform(0.5, 1, channels).astype("float32"))
        return self(self(op.nn.batch_norm(x, gamma, beta, mean, variance, axis=1, training=False))[0])

    def relu(self, x):
        return self(op.nn.relu(x))

    def reshape(self, x, *shape):
        return self(op.reshape(x, shape))

    def flat(self, x):
        return self.reshape(x, ir.static_shape(x)[0], int(np.prod(ir.static_shape(x)[1:])))

    def head(self, x, classes=3):
        return self.dense(self.flat(self(op.mean(x, [2, 3], keepdims=True))), classes)

    def squeeze_excite(self, x):
        channels = ir.static_shape(x)[1]
        y = self.relu(self.conv(self(op.mean(x, [2, 3], keepdims=True)), 2))
        return self(op.multiply(x, self(op.sigmoid(self.conv(y, channels)))))

    def shuffle(self, x, groups):
        n, c, h, w = ir.static_shape(x)
        y = self(op.permute_dims(self.reshape(x, n, groups, c // groups, h, w), [0, 2, 1, 3, 4]))
        return self.reshape(y, n, c, h, w)

    def module(self, *outputs):
        main = self.emitter.finish([self.x], outputs, tvm.ir.make_node("ir.DictAttrs", num_input=1))
        main = main.with_attr("global_symbol", "main")
        named = [ir.TaskOutput(f"task{i}", "y") for i in range(len(outputs))]
        mod = ir.with_task_outputs(tvm.IRModule({"main": main}), named)
        relax.analysis.well_formed(mod)
        return mod


def shapes(mod):
    """Return the shapes of the layers' weights by layer name."""
    return {
        b.var.name: ir.static_shape(b.value.args[1])
        for b in bindings(mod["main"])
        if op_name(b.value).startswith(("nn.conv", "matmul"))
    }


def prune(mod, keep=0.5, **layers):
    document = {"default": {"keep": keep}, "layers": {name: {"keep": k} for name, k in layers.items()}}
    new = tvm.transform.Sequential([PruneChannels(Policy.parse(document))])(mod)
    relax.analysis.well_formed(new)
    assert dict(new.attrs) == dict(mod.attrs)
    assert [ir.static_shape(f) for f in new["main"].body.body.fields] == [
        ir.static_shape(f) for f in mod["main"].body.body.fields
    ]
    before, after = (bindings(m["main"]) for m in (mod, new))
    assert {b.var.name for b in after} <= {b.var.name for b in before}
    return new


def masked(coupling, dropped):
    """Return the function with zeros for the weights that read one of the classes ``dropped``."""
    roots = coupling.channels.roots()
    emitter, done = Emitter(), {}
    for binding in coupling.bindings:
        value = binding.value
        layer = coupling.layers.get(binding.var)
        if layer is not None and layer.has_own_channels:
            gone = np.isin(roots[layer.inputs], dropped).reshape(layer.filters.groups, -1)
            filters = layer.filters.unpack(layer.weight).copy()
            for group, which in zip(filters, gone, strict=True):
                group[:, which] = 0
            value = substitute(value, {value.args[1]: constant(layer.filters.pack(filters))})
        done[binding.var] = emitter.emit(substitute(value, done), binding.var.name)
    return emitter.finish(coupling.func.params, [done.get(out, out) for out in coupling.outputs])


def pair(first, second):
    functions = {"first": first, "second": copy_with_new_vars(second)}
    return tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})


def compare(both, x, atol):
    for a, b in zip(*(evaluate_module(both, {"x": x}, name) for name in ("first", "second")), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def check_against_masked(mod, keep=0.5, seed=0):
    """Prune every group to ``keep`` by random scores and compare with the masked network."""
    func = mod["main"]
    coupling = CoupledFunction(func)
    rng = np.random.default_rng(seed)
    scores = rng.random(len(coupling.channels.roots()))
    dropped = [worst(g.classes, scores, max(1, round(keep * len(g.classes)))) for g in coupling.groups()]
    gone = np.concatenate([np.zeros(0, int), *dropped])
    both = pair(masked(coupling, gone), remove(coupling, gone).after)
    relax.analysis.well_formed(both)
    x = rng.standard_normal(ir.static_shape(func.params[0])).astype("float32")
    compare(both, x, atol=1e-4)
    return both


def test_golden():
    """A residual block: both sides of the add lose channel 0, the input and the output stay."""

    def filters(*sizes, inner):
        return np.repeat(np.array(sizes, "float32"), inner).reshape(len(sizes), inner, 1, 1)

    net = Net(1, 3, 4, 4)
    a = net(op.nn.conv2d(net.x, relax.const(filters(1, 2, 3, inner=3))), "t/a.0")
    a = net(op.add(a, relax.const(np.arange(3, dtype="float32").reshape(1, 3, 1, 1))))
    b = net(op.nn.conv2d(net.relu(a), relax.const(filters(1, 5, 4, inner=3))), "t/b")
    y = net(op.add(a, b))
    y = net(op.nn.conv2d(y, relax.const(filters(1, 2, inner=3))), "t/c")
    mod = net.module(y)

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 3, 4, 4), "float32")) -> R.Tuple(R.Tensor((1, 2, 4, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                a = R.nn.conv2d(x, R.const(filters(2, 3, inner=3)))
                a1 = R.add(a, R.const(np.array([1, 2], "float32").reshape(1, 2, 1, 1)))
                r = R.nn.relu(a1)
                b = R.nn.conv2d(r, R.const(filters(5, 4, inner=2)))
                s = R.add(a1, b)
                y = R.nn.conv2d(s, R.const(filters(1, 2, inner=2)))
                R.output(y)
            return (y,)

    new = prune(mod, keep=0.67)
    tvm.ir.assert_structural_equal(new["main"], Expected["main"].with_attr("global_symbol", "main"))
    assert list(shapes(new)) == ["t/a.0", "t/b", "t/c"]


def test_keep_all_returns_the_module_itself():
    net = Net(1, 3, 4, 4)
    mod = net.module(net.head(net.conv(net.x, 8)))
    assert PruneChannels(Policy()).transform_module(mod, None).same_as(mod)


def test_at_least_one_channel_stays():
    net = Net(1, 3, 4, 4)
    new = prune(net.module(net.head(net.conv(net.x, 8))), keep=0.01)
    assert shapes(new) == {"conv0": (1, 3, 1, 1), "conv1": (1, 3)}


def test_largest_keep_of_coupled_layers_wins():
    net = Net(1, 3, 4, 4)
    a, b = net.conv(net.x, 8), net.conv(net.x, 8)
    mod = net.module(net.head(net(op.add(a, b))))
    assert shapes(prune(mod, conv0=0.25, conv1=0.75))["conv0"] == (6, 3, 1, 1)
    assert shapes(prune(mod, keep=1.0, conv0=0.25))["conv0"] == (8, 3, 1, 1)


def test_depthwise_follows_its_input_unless_named():
    net = Net(1, 3, 4, 4)
    y = net.conv(net.conv(net.x, 8), 16, kernel=3, groups=8)
    mod = net.module(net.head(y))
    assert shapes(prune(mod, keep=1.0, conv0=0.5)) == {
        "conv0": (4, 3, 1, 1),
        "conv1": (8, 1, 3, 3),
        "conv2": (8, 3),
    }
    assert shapes(prune(mod, keep=1.0, conv0=0.5, conv1=0.75))["conv1"] == (12, 1, 3, 3)
    check_against_masked(mod)


def test_concat_and_split_prune_each_part():
    net = Net(1, 3, 4, 4)
    a, b = net.conv(net.x, 8), net.conv(net.x, 4)
    both = net(op.concat([a, b], axis=1))
    parts = net(op.split(both, 3, axis=1))
    c = net.conv(net(parts[0]), 8)
    d = net(op.add(net(parts[1]), net.conv(net(parts[2]), 4)))
    mod = net.module(net.head(c), net.head(d))
    new = prune(mod, keep=1.0, conv0=0.5)
    # The second half of conv0 is added to what conv3 makes, which wants to stay whole.
    assert shapes(new)["conv0"] == (6, 3, 1, 1)
    assert shapes(new)["conv2"] == (8, 2, 1, 1)
    check_against_masked(mod)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions(groups):
    net = Net(1, 3, 4, 4)
    y = net.conv(net.conv(net.x, 8), 32, kernel=3, groups=groups)
    y = net.conv(net.shuffle(y, groups), 8, groups=groups)
    mod = net.module(net.head(y))
    assert shapes(prune(mod))["conv1"] == (16, 8 // groups // 2, 3, 3)
    check_against_masked(mod)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_transposed_convolutions(groups):
    net = Net(1, 3, 4, 4)
    mod = net.module(net.head(net.transposed(net.conv(net.x, 8), 16, groups)))
    new = prune(mod)
    assert shapes(new)["conv1"] == ((4, 16 // groups, 1, 1) if groups == 8 else (4, 8 // groups, 1, 1))
    check_against_masked(mod)


def test_flatten_into_dense_and_back():
    net = Net(2, 3, 4, 4)
    y = net.dense(net.flat(net.conv(net.x, 8)), 96)
    y = net.conv(net.reshape(y, 2, 6, 4, 4), 4)
    mod = net.module(net.flat(net.head(y)), net.dense(net.flat(y), 2))
    assert shapes(prune(mod))["conv1"] == (64, 48)
    check_against_masked(mod)


def test_nhwc():
    net = Net(1, 4, 4, 3)
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
    y = net.relu(net(op.nn.conv2d(net.x, net.const(8, 1, 1, 3), **layouts), "a"))
    y = net(op.nn.conv2d(y, net.const(8, 3, 3, 1), groups=8, **layouts), "b")
    y = net(op.nn.avg_pool2d(y, (2, 2), layout="NHWC"))
    y = net(op.nn.conv2d(net(op.permute_dims(y, [0, 3, 1, 2])), net.const(2, 8, 1, 1)), "c")
    mod = net.module(y)
    assert shapes(prune(mod)) == {"a": (4, 1, 1, 3), "b": (4, 3, 3, 1), "c": (2, 4, 1, 1)}
    check_against_masked(mod)


FIXING = {
    "softmax": lambda net, y: net(op.nn.softmax(y, axis=1)),
    "mean over channels": lambda net, y: net(op.subtract(y, net(op.mean(y, [1], keepdims=True)))),
    "layer norm": lambda net, y: net(op.nn.layer_norm(y, net.const(8), net.const(8), axes=1)),
    "unknown": lambda net, y: net(op.flip(y, 1)),
    "sum with the input": lambda net, y: net(op.add(y, net.x)),
    "padded channels": lambda net, y: net(op.nn.pad(y, [0, 0, 0, 2, 0, 0, 0, 0])),
    "every second channel": lambda net, y: net(op.strided_slice(y, [1], [0], [8], [2])),
    "task output": lambda net, y: (net.outputs.append(y), y)[1],
}


@pytest.mark.parametrize("name", list(FIXING))
def test_what_must_stay_whole(name):
    net = Net(1, 8, 4, 4)
    net.outputs = []
    y = FIXING[name](net, net.conv(net.x, 8, bias=False))
    mod = net.module(net.head(net.conv(y, 6)), *net.outputs)
    new = prune(mod)
    assert shapes(new)["conv0"] == (8, 8, 1, 1)
    assert shapes(new)["conv1"][0] == 3


def test_trunk_of_several_tasks_is_pruned_once():
    net = Net(1, 3, 4, 4)
    trunk = net.relu(net.conv(net.x, 8, kernel=3))
    mod = net.module(net.head(net.conv(trunk, 4)), net.head(trunk, 5))
    assert shapes(prune(mod)) == {
        "conv0": (4, 3, 3, 3),
        "conv1": (2, 4, 1, 1),
        "conv2": (2, 3),
        "conv3": (4, 5),
    }
    check_against_masked(mod)


def test_before_the_merge_every_function_is_pruned():
    mods = []
    for seed in range(2):
        net = Net(1, 3, 4, 4, seed=seed)
        mods.append(net.module(net.head(net.conv(net.x, 8))))
    functions = {n: m["main"].with_attr("global_symbol", n) for n, m in zip("ab", mods, strict=True)}
    new = PruneChannels(Policy.uniform(keep=0.5))(ir.with_task_outputs(tvm.IRModule(functions), []))
    for name in "ab":
        assert ir.static_shape(bindings(new[name])[0].value.args[1]) == (4, 3, 1, 1)


def test_zero_channels_go_first():
    """With exact zeros in what goes, the pruned network computes what the original does."""
    net = Net(1, 3, 4, 4)
    y = net.relu(net.conv(net.x, 8, kernel=3))
    mod = net.module(net.head(net(op.add(y, net.conv(y, 8)))))
    coupling = CoupledFunction(mod["main"])
    zeros = [1, 2, 5, 7]
    emitter, done = Emitter(), {}
    for binding in coupling.bindings:
        value = binding.value
        if binding.var in coupling.layers or op_name(value) == "add":
            name, old = binding.var.name, value.args[1]
            if isinstance(old, tvm.ir.GenericConst):
                new = old.value.numpy().copy()
                if name in ("conv0", "conv1"):
                    new[zeros] = 0
                elif new.ndim == 4:
                    new[:, zeros] = 0
                value = substitute(value, {old: constant(new)})
        done[binding.var] = emitter.emit(substitute(value, done), binding.var.name)
    main = emitter.finish(mod["main"].params, [done[o] for o in coupling.outputs])
    both = {"main": main.with_attr("global_symbol", "main")}
    mod = ir.with_task_outputs(tvm.IRModule(both), ir.task_outputs(mod))
    x = np.random.default_rng(0).standard_normal((4, 3, 4, 4)).astype("float32")

    for criterion in ("l1", "l2", "activation"):
        new = PruneChannels(Policy.uniform(keep=0.5), criterion, {"x": x})(mod)
        assert shapes(new)["conv1"] == (4, 4, 1, 1)
        compare(pair(mod["main"], new["main"]), x[:1], atol=1e-5)


@pytest.mark.parametrize(("criterion", "stays"), [("l1", [0, 3]), ("l2", [1, 3])])
def test_norms_and_ties(criterion, stays):
    weight = np.array([[2, 2], [3, 0], [1, 1], [9, 9], [2, 2]], "float32").reshape(5, 2, 1, 1)
    net = Net(1, 2, 2, 2)
    y = net(op.nn.conv2d(net.x, relax.const(weight)), "a")
    new = PruneChannels(Policy.uniform(keep=0.4), criterion)(net.module(net.head(y)))
    np.testing.assert_array_equal(bindings(new["main"])[0].value.args[1].value.numpy(), weight[stays])


def test_activation_looks_at_the_data():
    """The filter of channel 0 is large, but what it looks at is nearly always zero."""
    weight = np.array([[5, 0], [0, 1], [0, 2]], "float32").reshape(3, 2, 1, 1)
    net = Net(1, 2, 2, 2)
    y = net(op.nn.conv2d(net.x, relax.const(weight)), "a")
    y = net(op.nn.conv2d(net.relu(y), relax.const(np.ones((2, 3, 1, 1), "float32"))), "b")
    x = np.ones((3, 2, 2, 2), "float32") * np.array([1e-3, 1], "float32").reshape(1, 2, 1, 1)
    new = PruneChannels(Policy.uniform(keep=0.67), "activation", {"x": x})(net.module(y))
    np.testing.assert_array_equal(bindings(new["main"])[0].value.args[1].value.numpy(), weight[1:])


def test_errors():
    net = Net(1, 3, 4, 4)
    mod = net.module(net.head(net.conv(net.x, 8)))
    with pytest.raises(InputError, match="l3"):
        PruneChannels(Policy(), "l3")
    with pytest.raises(InputError, match="needs calibration"):
        PruneChannels(Policy(), "activation")
    with pytest.raises(PolicyError, match="conv0"):
        PruneChannels(Policy.parse({"layers": {"convO": {}}}))(mod)
    with pytest.raises(InputError, match="shape"):
        PruneChannels(Policy.uniform(keep=0.5), "activation", {"x": np.zeros((1, 3, 4, 5), "float32")})(mod)


def test_aliases_of_a_shared_trunk():
    net = Net(1, 3, 4, 4)
    mod = ir.with_aliases(net.module(net.head(net.conv(net.x, 8))), {"other/conv": "conv0"})
    assert shapes(prune(mod, keep=1.0, **{"other/conv": 0.5}))["conv0"] == (4, 3, 1, 1)


def macs(mod):
    total = 0
    for b in bindings(mod["main"]):
        if op_name(b.value).startswith(("nn.conv", "matmul")):
            weight, out = ir.static_shape(b.value.args[1]), ir.static_shape(b.var)
            total += int(np.prod(weight[1:] if len(weight) > 2 else weight[:1])) * int(np.prod(out))
    return total


def resnet18_macs(widths):
    """Return the multiply-accumulates of the ResNet18 for 32×32 images, from its definition."""
    total, before = 32 * 32 * 9 * 3 * widths[0], widths[0]
    for width, size in zip(widths, (32, 16, 8, 4), strict=True):
        total += size**2 * 9 * (before * width + 3 * width * width)
        total += size**2 * before * width if before != width else 0
        before = width
    return total + before * 10


def test_resnet18(tmp_path):
    import onnx

    onnx.save(build_network("resnet18", batch_norm=True), tmp_path / "net.onnx")
    mod = FoldBatchNorm()(load([tmp_path / "net.onnx"], tasks=["main"]))
    assert macs(mod) == resnet18_macs([64, 128, 256, 512])
    assert macs(prune(mod, keep=0.75)) == resnet18_macs([48, 96, 192, 384])


STEPS = (
    "conv conv3 depthwise depthwise2 grouped relu norm prelu residual add concat split slice shuffle "
    "squeeze_excite pool pad softmax transposed tap"
).split()


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16), keep=st.sampled_from([0.25, 0.5, 0.75]))
def test_random_networks(data, seed, keep):
    net = Net(1, data.draw(st.sampled_from([1, 3, 4])), 4, 4, seed=seed)
    x = net.conv(net.x, 8)
    seen, outputs = [x], []
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=8)):
        channels = ir.static_shape(x)[1]
        other = seen[data.draw(st.integers(0, len(seen) - 1))]
        if step == "conv":
            x = net.conv(x, data.draw(st.sampled_from([4, 6, 8])))
        elif step == "conv3":
            x = net.conv(x, 8, kernel=3, bias=False)
        elif step in ("depthwise", "depthwise2") and channels <= 16:
            x = net.conv(x, channels * (1 + (step == "depthwise2")), kernel=3, groups=channels)
        elif step == "grouped" and channels % 2 == 0:
            x = net.conv(x, 12, groups=2)
        elif step == "transposed":
            x = net.transposed(x, 6, groups=2 if channels % 2 == 0 else 1)
        elif step == "relu":
            x = net.relu(x)
        elif step == "norm":
            x = net.norm(x)
        elif step == "prelu":
            x = net(op.nn.prelu(x, net.const(channels), 1))
        elif step == "residual":
            x = net(op.add(x, net.conv(net.relu(x), channels)))
        elif step == "add" and ir.static_shape(other)[1] in (1, channels):
            x = net(op.add(x, other))
        elif step == "concat" and channels <= 16:
            x = net(op.concat([x, other], axis=1))
        elif step == "split" and channels % 2 == 0:
            parts = net(op.split(x, 2, axis=1))
            seen.append(net(parts[0]))
            x = net(parts[1])
        elif step == "slice" and channels > 2:
            x = net(op.strided_slice(x, [1], [1], [channels - 1]))
        elif step == "shuffle" and channels % 2 == 0:
            x = net.shuffle(x, 2)
        elif step == "squeeze_excite":
            x = net.squeeze_excite(x)
        elif step == "pool":
            x = net(op.nn.max_pool2d(x, (3, 3), padding=1))
        elif step == "pad":
            x = net(op.strided_slice(net(op.nn.pad(x, [0, 0, 0, 0, 1, 1, 0, 0])), [2], [0], [4]))
        elif step == "softmax":
            x = net(op.nn.softmax(x, axis=data.draw(st.sampled_from([1, 3]))))
        elif step == "tap":
            outputs.append(net.head(x) if data.draw(st.booleans()) else x)
        seen.append(x)
    outputs.append(net.dense(net.relu(net.dense(net.flat(x), 6)), 3))
    mod = net.module(*outputs)
    both = check_against_masked(mod, keep, seed)
    assert [ir.static_shape(f) for f in both["second"].body.body.fields] == [
        ir.static_shape(f) for f in mod["main"].body.body.fields
    ]
    prune(mod, keep)
