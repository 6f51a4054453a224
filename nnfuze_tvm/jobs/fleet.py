"""The devices of a job: how many are registered just now, and what each of them did."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.errors import DeviceError

_PERIOD = 1.0
_TIMEOUT = 2.0

_log = logging.getLogger(__name__)


class Fleet:
    """What a tracker knows under one key, looked up once a second by ``update``.

    Parameters
    ----------
    place : Place
        The tracker.
    key : str
        The devices' key.
    wait : float
        Seconds to wait for the tracker and for the first device.

    Attributes
    ----------
    devices : list of str
        ``host:port`` of every registered device, busy ones included; what was last known while the tracker does
        not answer.

    Raises
    ------
    DeviceError
        If there is no tracker or no device.
    """

    def __init__(self, place: trackers.Place, key: str, wait: float) -> None:
        self.key = key
        self._place = place
        self._session: trackers.Session | None = trackers.connect(place, wait)
        self.devices = trackers.wait_for_device(self._session, key, wait)
        self._asked = self._present = time.monotonic()
        self._trouble = ""

    @property
    def local(self) -> bool:
        """Whether all devices are this machine."""
        return all(device.startswith("127.") for device in self.devices)

    def update(self) -> bool:
        """Ask the tracker, if that was long enough ago; return whether the devices are others now."""
        if time.monotonic() - self._asked < _PERIOD:
            return False
        before = self.devices
        try:
            if self._session is None:
                self._session = trackers.connect(self._place, 0)
            self._session._sock.settimeout(_TIMEOUT)
            self.devices = trackers.devices(self._session).get(self.key, [])
            self._trouble = "" if self.devices else f"tracker {self._place}: no device under key {self.key!r}"
        except DeviceError as err:
            if not self._trouble:
                _log.warning("%s", err)
            self._trouble = str(err)
            self._session = None
        self._asked = time.monotonic()
        if not self._trouble:
            self._present = self._asked
        return sorted(before) != sorted(self.devices)

    def check(self, patience: float) -> None:
        """Give up when there has been no device for ``patience`` seconds.

        Raises
        ------
        DeviceError
            Then.
        """
        if self._trouble and time.monotonic() - self._present > patience:
            raise DeviceError(f"{self._trouble} (for {patience:g} s); the job goes on when it is started again")


@dataclass
class Usage:
    """The work of one device.

    Attributes
    ----------
    device : str
        ``host:port``.
    trials : int
        Candidates that it gave a result for, failures included.
    failed : int
        Those among them that did not run.
    lost : int
        Times that it went away with a candidate, which was then measured again.
    """

    device: str
    trials: int = 0
    failed: int = 0
    lost: int = 0


class DeviceTrial(Protocol):
    """What every job's journal says of a candidate: where it ran, why it did not, and which devices it lost."""

    @property
    def device(self) -> str | None:
        """``host:port`` of the device that gave the result; None if the candidate did not get that far."""

    @property
    def error(self) -> str | None:
        """Why there is no result."""

    @property
    def lost(self) -> tuple[str, ...]:
        """The devices that went away with the candidate."""


def usage(trials: Iterable[DeviceTrial]) -> list[Usage]:
    """Return what every device did, in the order of its first trial; candidates that didn't compile had none."""
    found: dict[str, Usage] = {}
    for trial in trials:
        for device in trial.lost:
            found.setdefault(device, Usage(device)).lost += 1
        if trial.device is not None:
            one = found.setdefault(trial.device, Usage(trial.device))
            one.trials += 1
            one.failed += trial.error is not None
    return list(found.values())
