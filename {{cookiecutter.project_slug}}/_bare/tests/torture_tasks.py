"""What `make torture` calls of yours, besides tasks of its own: really, many times, with all that they do.

A function, or a `partial` that gives it its arguments: `[send_digest, partial(send_email, "nobody@example.com")]`.
"""

from collections.abc import Callable, Sequence

TASKS: Sequence[Callable[..., object]] = []
