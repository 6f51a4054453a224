"""The compression methods on a command line: their options, and what those say of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.passes.compress.method import Method, Option, by_name, find_precision, one_of, precisions


def options(methods: Sequence[Method]) -> dict[str, Option]:
    """Return all options that the methods bring, by name: ``quantize``, which chooses a precision, and their own."""
    names = {name: m for m in methods if m.precision is not None for name in (m.name, m.variant) if name}
    chosen = {name: method.precision for name, method in names.items() if method.precision is not None}
    known = precisions(methods)

    def sets(name: str) -> Mapping[str, Any]:
        precision = chosen[name]
        usual = precision == find_precision(known, precision.weights, precision.activations)
        # Left open where it is usual, so that other bits that a policy states come in what is usual for them.
        return {**precision._asdict(), "format": None if usual else precision.format}

    quantize = Option(
        name="quantize",
        type=one_of(chosen),
        default=None,
        help=", or ".join(f"{m.name} {m.remark}".rstrip() for m in methods if m.name in chosen) + ".",
        sets=sets,
        samples=[name for name, method in names.items() if method.samples],
        metavar=f"<{'|'.join(chosen)}>",
    )
    return by_name([quantize] * bool(chosen) + [one for method in methods for one in method.options])


def settings(methods: Sequence[Method], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the policy fields whose defaults are stated by options.

    Parameters
    ----------
    methods
        The methods.
    values
        Values of options by name, those of no method among them; None is "not given".
    """
    stated: dict[str, Any] = {}
    for name, option in options(methods).items():
        if option.sets is not None and values.get(name) is not None:
            stated |= option.sets(values[name])
    return stated


def check_samples(methods: Sequence[Method], values: Mapping[str, Any]) -> None:
    """Complain about the first option whose value needs samples; call it where there are none.

    Raises
    ------
    InputError
        If there is one.
    """
    for name, option in options(methods).items():
        if values.get(name) in option.samples:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {values[name]}: needs sample inputs; give --calibration samples.npz")


def check_used(methods: Sequence[Method], asked: Sequence[Method], values: Mapping[str, Any]) -> None:
    """Complain about the first option that was given and that no pass will read.

    Parameters
    ----------
    methods
        The methods.
    asked
        Those of them that are asked for.
    values
        Values of options by name.

    Raises
    ------
    InputError
        If there is one.
    """
    for owner, option in [(one, option) for one in methods for option in one.options if option.sets is None]:
        value, flag = values.get(option.name), option.name.replace("_", "-")
        if value in (None, option.default):
            continue
        if owner not in asked:
            raise InputError(f"--{flag} {value}: changes nothing, since no layer is to be {owner.name}; leave it out")
        if option.variant and values.get("quantize") != owner.variant:
            raise InputError(f"--{flag} {value}: changes nothing without --quantize {owner.variant}")
