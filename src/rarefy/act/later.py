"""Generators and coroutines of which somebody runs every step: their code runs when they are asked for values."""

from __future__ import annotations

import types
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from typing import Any

#: What computes when it is asked for values.
LATER = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, map, filter, zip)

Run = Callable[[Callable[[], Any]], Any]


def stepped(value: Any, run: Run, done: Callable[[], None]) -> Any:
    """Return what gives what one of ``LATER`` gives, each step run by ``run``; ``done`` is called at its end."""
    if isinstance(value, types.AsyncGeneratorType):
        return _stream(value, run, done)
    if isinstance(value, types.CoroutineType):
        return _awaited(value, run, done)
    return _steps(value, run, done)


def _steps(iterator: Any, run: Run, done: Callable[[], None]) -> Generator[Any, Any, Any]:
    step: Callable[[], Any] = partial(next, iterator)
    while True:
        try:
            value = run(step)
        except StopIteration as end:
            done()
            return end.value
        try:
            sent = yield value
        except GeneratorExit:
            if hasattr(iterator, "close"):
                run(iterator.close)
            raise
        except BaseException as error:  # whatever the caller threw in is the generator's to catch
            if not hasattr(iterator, "throw"):
                raise
            step = partial(iterator.throw, error)
        else:
            step = partial(next, iterator) if sent is None else partial(iterator.send, sent)


_awaitable = types.coroutine(_steps)


async def _awaited(coroutine: Any, run: Run, done: Callable[[], None]) -> Any:
    return await _awaitable(coroutine.__await__(), run, done)


async def _stream(generator: Any, run: Run, done: Callable[[], None]) -> AsyncGenerator[Any, Any]:
    step = generator.__anext__
    while True:
        try:
            value = await _awaitable(step().__await__(), run, lambda: None)
        except StopAsyncIteration:
            done()
            return
        try:
            sent = yield value
        except GeneratorExit:
            await generator.aclose()
            raise
        except BaseException as error:  # as above
            step = partial(generator.athrow, error)
        else:
            step = partial(generator.asend, sent)
