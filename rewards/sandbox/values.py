"""Messages between a sandboxed program and its tests, over a socket: length, then JSON.

Only plain data crosses: numbers, text, bytes, the built-in containers and a few standard types. An object of any other
kind stays in the program's process and is sent as a reference to it, so that no method of the program's ever runs in
the process that decides.
"""

import datetime
import json
import os
import select
import socket
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_MESSAGE_BYTES = 16 << 20
MAX_REPORT_BYTES = 4 << 20
"""Of all that the judge says about a job."""
_SMALL = 1 << 53
_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

Encoded = Any


class Closed(Exception):
    """The other side has gone, or sent what is no message."""


class Reference:
    """Marks an object that stayed behind; ``index`` is its number there."""

    def __init__(self, index: int) -> None:
        self.index = index


class Channel:
    """One end. ``waiting`` is called every tenth of a second while there is nothing to read, and may raise."""

    def __init__(self, end: socket.socket, waiting: Callable[[], None] | None = None) -> None:
        self._end = end
        self._waiting = waiting

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError("a value is too large to be sent")
        try:
            self._end.sendall(len(data).to_bytes(4, "big") + data)
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> dict[str, Any]:
        size = int.from_bytes(self._read(4), "big")
        if size > MAX_MESSAGE_BYTES:
            raise Closed("a message is too large")
        try:
            message = json.loads(self._read(size))
        except (ValueError, RecursionError):
            raise Closed("a message is not JSON") from None
        if not isinstance(message, dict):
            raise Closed("a message is not an object")
        return message

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if self._waiting is not None:
                while not select.select([self._end], [], [], 0.1)[0]:
                    self._waiting()
            try:
                piece = os.read(self._end.fileno(), size - len(data))
            except OSError as error:
                raise Closed(str(error)) from None
            if not piece:
                raise Closed("the other side has gone")
            data += piece
        return bytes(data)


def encode(value: Any, keep: Callable[[Any], int]) -> Encoded:
    """``value`` as JSON; ``keep`` stores an object that stays behind and gives its number. Subclasses of plain types
    are sent as those."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_SMALL < number < _SMALL else ["int", hex(number)]
    kind: Any
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, keep) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    name = getattr(value, "__name__", None) if type(value) is type else None
    if name is not None and _TYPES.get(name) is value:
        return ["type", name]
    if isinstance(value, Reference):
        return ["ref", value.index]
    if type(value) is range:
        return ["range", [encode(part, keep) for part in (value.start, value.stop, value.step)]]
    if type(value) in (Decimal, Fraction):
        return [type(value).__name__, str(value)]
    if type(value) in (datetime.datetime, datetime.date, datetime.time):
        return [type(value).__name__, value.isoformat()]
    return ["ref", keep(value)]


def decode(encoded: Encoded, refer: Callable[[int], Any]) -> Any:
    """The value again; ``refer`` makes something of the number of an object that stayed behind. Raises ValueError,
    TypeError and the like for what ``encode`` doesn't write."""
    if not isinstance(encoded, list):
        if isinstance(encoded, dict):
            raise ValueError("an object is no value")
        return encoded
    name, content = encoded
    if name in ("list", "tuple", "set", "frozenset"):
        items = [decode(item, refer) for item in content]
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[name](items)
    if name == "dict":
        return {decode(key, refer): decode(item, refer) for key, item in content}
    if name == "type":
        return _TYPES[content]
    if name == "int":
        return int(content, 16)
    if name in ("bytes", "bytearray"):
        return (bytes if name == "bytes" else bytearray).fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "range":
        return range(*(decode(part, refer) for part in content))
    if name in ("Decimal", "Fraction"):
        return (Decimal if name == "Decimal" else Fraction)(content)
    if name in ("datetime", "date", "time"):
        return getattr(datetime, name).fromisoformat(content)
    if name == "ref":
        return refer(content)
    raise ValueError(f"{name} is no kind of value")
