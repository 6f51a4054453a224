"""Networks of layers one after the other, and what puts all kernels that can be into groups of bands."""

import dataclasses

import numpy as np
import onnx
import tvm
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm import load
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph import ir
from nnfuze_tvm.passes import InsertQDQ, pipeline
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.schedules.bands import model
from nnfuze_tvm.schedules.bands.progress import Bands
from nnfuze_tvm.schedules.fuse_bands import FuseBands
from nnfuze_tvm.schedules.schedule_kernels import ScheduleKernels

INVERTED = [
    {"kernel": 3, "stride": 2, "channels": 16},
    {"kernel": 1, "channels": 48},
    {"kernel": 3, "depthwise": True},
    {"kernel": 1, "channels": 16},
    {"kernel": 1, "add": True},
]


def grouped(alone, target, height, parts):
    """Return scheduled kernels in groups, as if nothing stayed in the target's cache."""
    return FuseBands(target, dataclasses.replace(Hardware.of(target), l2_bytes=0), always(height, parts))(alone)


def always(height, parts):
    """Return what chooses all groups that are possible, the longest ones first."""

    def best(group, hw):
        steps = group.steps()
        if not model.fits(steps):
            return None
        return len(group.kernels) ** 2, Bands(height, min(parts, -(-steps[-1].rows // height)))

    return best


def chain(layers, shape, seed=0):
    """Return a network of layers one after the other: dicts of kernel, stride, dilation, pad, depthwise, add, pool."""
    rng = np.random.default_rng(seed)
    nodes, constants, value, channels = [], [], "x", shape[1]
    for n, layer in enumerate(layers):
        kernel, dilation = layer.get("kernel", 1), layer.get("dilation", 1)
        pads = [layer.get("pad", kernel // 2 * dilation)] * 4
        if layer.get("pool"):
            attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
            nodes.append(helper.make_node("MaxPool", [value], [f"v{n}"], name=f"n{n}", **attributes))
            value = f"v{n}"
            continue
        groups = channels if layer.get("depthwise") else 1
        wanted = channels if layer.get("depthwise") or layer.get("add") else layer.get("channels", 16)
        weights = rng.standard_normal((wanted, channels // groups, kernel, kernel)) / kernel
        constants += [
            numpy_helper.from_array(weights.astype("float32"), f"w{n}"),
            numpy_helper.from_array(rng.standard_normal(wanted).astype("float32"), f"b{n}"),
        ]
        strides = [layer.get("stride", 1)] * 2
        attributes = {"pads": pads, "strides": strides, "dilations": [dilation] * 2, "group": groups}
        nodes.append(helper.make_node("Conv", [value, f"w{n}", f"b{n}"], [f"c{n}"], name=f"n{n}", **attributes))
        other = [value] if layer.get("add") else []
        nodes.append(helper.make_node("Add" if other else "Relu", [f"c{n}", *other], [f"v{n}"]))
        value, channels = f"v{n}", wanted
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 8
    return onnx.shape_inference.infer_shapes(made)


def lowered(network, tmp_path, target, samples=None, small=False):
    """Return the fused and the scheduled kernels of a network, none of them in groups, and the network.

    With ``small`` weights, as ``--optimize memory`` has them.
    """
    path = tmp_path / "chain.onnx"
    onnx.save(network, path)
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([path]))
    if samples is not None:
        mod = InsertQDQ({"x": samples}, Policy.uniform(bits=8), executor=host_executor)(mod)
    fused = build.fuse(ir.with_small_weights(mod) if small else mod, target)
    with target:
        alone = tvm.transform.Sequential([ScheduleKernels(target), *build.packing_passes()])(fused)
    return fused, alone, mod
