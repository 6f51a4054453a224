"""What the emulated CPU runs: one engine, one network, and marks around the inferences that are counted.

    python3 guest.py ENGINE MODEL INPUTS.npz OUTPUTS.npz INFERENCES

It imports nothing of this project: only the engine and numpy are installed beside this Python. An inference takes
numpy arrays and gives numpy arrays of its own, whichever the engine. Last, it prints where libraries are mapped.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Of count.c, where it is explained.
_MARK = 28262
_START, _STOP = 0, 1

# The first inference allocates what later ones use again.
_UNCOUNTED = 1

Arrays = dict[str, np.ndarray]
Call = Callable[[], list[np.ndarray]]


def nnfuze(model: Path, inputs: Arrays) -> Call:
    """Return one inference of a library of ours; its inputs by the names ``0``, ``1``, … in order."""
    import importlib.util

    import tvm_ffi

    # Not `import tvm`, which takes half a minute under emulation.
    spec = importlib.util.find_spec("tvm")
    assert spec and spec.origin
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
    machine = tvm_ffi.load_module(str(model))["vm_load_executable"]()
    cpu, pooled = 1, 2
    machine["vm_initialization"](cpu, 0, pooled)
    main = machine["main"]
    views = [_aligned(inputs[str(n)]) for n in range(len(inputs))]
    buffers = [tvm_ffi.from_dlpack(view) for view in views]

    def run() -> list[np.ndarray]:
        for n, view in enumerate(views):
            view[...] = inputs[str(n)]
        return [np.from_dlpack(field).copy() for field in main(*buffers)]

    return run


def _aligned(like: np.ndarray, alignment: int = 64) -> np.ndarray:
    raw = np.empty(like.nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


def onnxruntime(model: Path, inputs: Arrays) -> Call:
    """Return one inference of an ONNX file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    feed = {value.name: inputs[str(n)] for n, value in enumerate(session.get_inputs())}
    return lambda: session.run(None, feed)


def ncnn(model: Path, inputs: Arrays) -> Call:
    """Return one inference of what pnnx made, a folder; in float32, as the input is."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(model / "model.ncnn.param")) or net.load_model(str(model / "model.ncnn.bin")):
        sys.exit("does not load what pnnx converted")
    arrays = [inputs[str(n)][0] for n in range(len(inputs))]

    def run() -> list[np.ndarray]:
        extractor = net.create_extractor()
        for n, array in enumerate(arrays):
            extractor.input(f"in{n}", ncnn.Mat(array))
        return [np.array(extractor.extract(name)[1]) for name in net.output_names()]

    return run


def tflite(model: Path, inputs: Arrays) -> Call:
    """Return one inference of a TensorFlow Lite file with one input; where that is int8, it is given as such."""
    from tflite_runtime.interpreter import Interpreter

    interpreter = Interpreter(str(model), num_threads=1)
    interpreter.allocate_tensors()
    source, *_ = interpreter.get_input_details()
    array = inputs["0"].transpose(0, 2, 3, 1) if inputs["0"].ndim == 4 else inputs["0"]
    if source["dtype"] == np.int8:
        scale, zero = source["quantization"]
        array = np.clip(np.rint(array / scale) + zero, -128, 127)
    array = np.ascontiguousarray(array, source["dtype"])
    results = interpreter.get_output_details()

    def run() -> list[np.ndarray]:
        interpreter.set_tensor(source["index"], array)
        interpreter.invoke()
        return [_real(interpreter.get_tensor(result["index"]), *result["quantization"]) for result in results]

    return run


def _real(array: np.ndarray, scale: float, zero: int) -> np.ndarray:
    return (array.astype(np.float32) - zero) * np.float32(scale) if array.dtype == np.int8 else array


ENGINES = {"nnfuze": nnfuze, "onnxruntime": onnxruntime, "ncnn": ncnn, "tflite": tflite}


def main() -> None:
    """Run one engine's network as the command line says."""
    engine, model, source, destination, count = sys.argv[1:]
    with np.load(source) as archive:
        inputs = dict(archive)
    run = ENGINES[engine](Path(model), inputs)
    mark = ctypes.CDLL(None).syscall
    for _ in range(_UNCOUNTED):
        outputs = run()
    mark(_MARK, _START)
    for _ in range(int(count)):
        outputs = run()
    mark(_MARK, _STOP)
    np.savez(destination, **{str(n): array for n, array in enumerate(outputs)})  # type: ignore[arg-type]
    print(Path("/proc/self/maps").read_text())


if __name__ == "__main__":
    main()
