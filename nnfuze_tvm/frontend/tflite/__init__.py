"""TensorFlow Lite files as ONNX networks, which everything behind this room knows already."""

from nnfuze_tvm.frontend.tflite.convert import to_onnx

__all__ = ["to_onnx"]
