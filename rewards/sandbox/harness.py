"""The two processes that decide on a program: ``serve`` runs it and answers questions, ``Judge`` asks and compares.

The judge is the parent and holds the tests; the program's process was forked off before the judge read them, so they
are nowhere in its memory, and it has no handle on the judge but the socket it answers on. Tests name the program's
functions through ``Remote`` objects; arguments and results cross as plain data (``rewards.sandbox.values``). So it
gains a program nothing to end early with status 0, to print anything, to patch builtins or the harness, or to return
objects that equal everything: whatever it does, the judge compares its own plain copies, and a program that ended has
not passed the tests that were still to come.

What differs from running tests and program in one interpreter: a function can't change its caller's arguments, and an
object of a class of the program's own equals only itself.
"""

import builtins
import os
import random
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rewards.sandbox.values import Channel, Closed, Reference, decode, encode

_MESSAGE_CHARACTERS = 300


# ---- the program's process


def serve(channel: Channel) -> None:
    """Answers until the judge goes away. Runs untrusted code in this process."""
    os.environ.clear()
    random.seed(0)  # a verdict should repeat
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    while True:
        try:
            request = channel.receive()
        except Closed:
            return
        reply: dict[str, Any]
        try:
            reply = {"value": encode(_answer(request, module.__dict__, kept), keep)}
        except BaseException as error:  # SystemExit too: the judge is told, and decides
            reply = {"error": type(error).__name__, "message": _text(error), "compiled": request.get("compiled")}
        for stream in (sys.stdout, sys.stderr):
            _quietly(stream.flush)
        try:
            channel.send(reply)
        except ValueError as error:
            channel.send({"error": "ValueError", "message": str(error), "compiled": True})


def _answer(request: dict[str, Any], namespace: dict[str, Any], kept: list[Any]) -> Any:
    action = request["do"]
    if action == "run":
        code = compile(request["text"], "<program>", "exec", dont_inherit=True)
        request["compiled"] = True
        exec(code, namespace)  # the sandboxed process: this is what it is for
        return None
    if action == "global":
        return namespace[request["name"]]
    target = kept[request["of"]]
    if action == "call":
        positional, named = decode(request["with"], kept.__getitem__)
        return target(*positional, **named)
    if action == "attribute":
        return getattr(target, request["name"])
    operation: Callable[..., Any] = _OPERATIONS[action]
    return operation(target, *decode(request["with"], kept.__getitem__))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "iterate": iter,
    "next": next,
    "length": len,
    "item": lambda target, key: target[key],
    "contains": lambda target, item: item in target,
    "truth": bool,
    "text": str,
    "repr": repr,
}


def _text(error: BaseException) -> str:
    try:
        line = _line(error)
        return f"{line}{error}"[:_MESSAGE_CHARACTERS]
    except BaseException:
        return "an exception that can't be shown"


def _line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""


def _quietly(action: Callable[[], Any]) -> None:
    try:
        action()
    except BaseException:
        return


# ---- the judge's process


class ProgramError(Exception):
    """The program raised something that the judge has no class of its own for."""


class Remote:
    """An object in the program's process. Equal only to itself, whatever its class says."""

    def __init__(self, judge: "Judge", index: int) -> None:
        self.__dict__["_judge"], self.__dict__["_index"] = judge, index

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._judge.ask(do="call", of=self._index, **{"with": self._judge.encoded((positional, named))})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.ask(do="attribute", of=self._index, name=name)

    def _do(self, action: str, *arguments: Any) -> Any:
        return self._judge.ask(do=action, of=self._index, **{"with": self._judge.encoded(arguments)})

    def __iter__(self) -> Any:
        return self._do("iterate")

    def __next__(self) -> Any:
        return self._do("next")

    def __len__(self) -> Any:
        return self._do("length")

    def __getitem__(self, key: Any) -> Any:
        return self._do("item", key)

    def __contains__(self, item: Any) -> Any:
        return self._do("contains", item)

    def __bool__(self) -> Any:
        return self._do("truth")

    def __str__(self) -> Any:
        return self._do("text")

    def __repr__(self) -> Any:
        return self._do("repr")


class Judge:
    """Runs a program in the process behind ``channel``, then its tests in this one. They come with a problem, so they
    may be anybody's code: this process must be without privileges, too."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def run_program(self, texts: Iterable[str]) -> tuple[bool, str | None]:
        """Whether it is Python, and the error that it ended with. Raises Closed when its process is gone."""
        compiled = True
        for text in texts:
            self._channel.send({"do": "run", "text": text})
            reply = self._channel.receive()
            if "error" in reply:
                return compiled and reply.get("compiled") is True, _sentence(reply)
        return compiled, None

    def run_tests(
        self, tests: Sequence[str], names: Mapping[str, str], preamble: str, on_result: Callable[[str | None], None]
    ) -> None:
        """Each test's result in order: None when it passed. Raises Closed when the program's process is gone."""
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(compile(preamble, "<preamble>", "exec"), namespace)
        for name, wanted in names.items():
            reply = self._question({"do": "global", "name": wanted})
            if "error" in reply:
                for _ in tests:
                    on_result(f"the program doesn't define {wanted}")
                return
            namespace[name] = self._value(reply)
        for test in tests:
            try:
                exec(compile(test, "<test>", "exec"), namespace)
            except Closed:
                raise
            except AssertionError:
                on_result(f"wrong: {test.strip()[:200]}")
            except BaseException as error:
                on_result(f"{type(error).__name__} in {test.strip()[:200]}: {str(error)[:_MESSAGE_CHARACTERS]}")
            else:
                on_result(None)

    def ask(self, **request: Any) -> Any:
        """The program's answer. An error there is raised here, as the built-in exception of that name."""
        reply = self._question(request)
        if "error" not in reply:
            return self._value(reply)
        kind = getattr(builtins, str(reply["error"]), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                raised = kind(str(reply.get("message")))
            except TypeError:
                raised = ProgramError(_sentence(reply))
            raise raised
        raise ProgramError(_sentence(reply))

    def encoded(self, value: Any) -> Any:
        """``value`` for the program; the judge keeps nothing for it, and its own references go back as such."""
        return encode(_unwrapped(value), _not_plain)

    def _question(self, request: dict[str, Any]) -> dict[str, Any]:
        self._channel.send(request)
        return self._channel.receive()

    def _value(self, reply: dict[str, Any]) -> Any:
        try:
            return decode(reply.get("value"), lambda index: Remote(self, int(index)))
        except RecursionError:
            raise Closed("a value is nested too deeply") from None
        except Exception:
            raise Closed("an answer is no value") from None


def _unwrapped(value: Any) -> Any:
    """Remotes replaced by references, inside lists, tuples and dicts too."""
    if isinstance(value, Remote):
        return Reference(value.__dict__["_index"])
    if type(value) in (list, tuple):
        return type(value)(_unwrapped(item) for item in value)
    if type(value) is dict:
        return {key: _unwrapped(item) for key, item in value.items()}
    return value


def _not_plain(value: Any) -> int:
    raise TypeError(f"a test passes a {type(value).__name__}, which can't be sent to the program")


def _sentence(reply: dict[str, Any]) -> str:
    return f"{str(reply['error'])[:100]}: {str(reply.get('message'))[:_MESSAGE_CHARACTERS]}"
