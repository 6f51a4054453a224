from __future__ import annotations

import pytest

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import NAMED, resolve


@pytest.mark.parametrize(
    ("name", "isa", "vector_bytes", "registers"),
    [
        ("aarch64", "arm", 16, 32),
        ("armv7", "generic", 16, 16),
        ("x86-64-v3", "x86", 32, 16),
        ("x86-64-v4", "x86", 64, 32),
    ],
)
def test_registers_of_named_targets(name, isa, vector_bytes, registers):
    hw = Hardware.of(resolve(name))
    assert (hw.isa, hw.vector_bytes, hw.registers) == (isa, vector_bytes, registers)


@pytest.mark.parametrize("name", [*NAMED, "host"])
def test_every_target_has_a_usable_model(name):
    hw = Hardware.of(resolve(name))
    assert hw.cores >= 1
    assert 0 < hw.l1_bytes < hw.l2_bytes
    assert hw.lanes("float32") == hw.vector_bytes // 4 == hw.lanes("int32") == hw.lanes("uint8") // 4


def test_dot_product_feature_is_seen():
    assert "dotprod" in Hardware.of(resolve("aarch64+dotprod")).features
    assert "dotprod" not in Hardware.of(resolve("aarch64")).features


def test_a_board_of_the_same_cpu_may_have_other_caches():
    own = Hardware.of(resolve("rpi5"))
    assert (own.l1_bytes, own.l2_bytes, own.cores) == (64 << 10, 512 << 10, 4)
    assert Hardware.of(resolve("jetson-orin")).l2_bytes == 256 << 10
    assert Hardware.of(resolve("rpi4")).l2_bytes == 2 * Hardware.of(resolve("aarch64")).l2_bytes


def test_a_json_target_is_known_by_its_cpu():
    hw = Hardware.of(resolve('{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1", "num-cores": 2}'))
    assert (hw.l2_bytes, hw.cores) == (1 << 20, 2)


def test_32_bit_kernels_take_no_intrinsic_of_64_bit_arm():
    assert "neon" not in Hardware.of(resolve("armv7")).features


def test_a_target_without_features_gets_the_generic_model():
    hw = Hardware.of(resolve('{"kind": "llvm", "mtriple": "riscv64-linux-gnu"}'))
    assert hw.isa == "generic"
