"""What `make torture` calls of yours, besides tasks of its own: really, many times, with all that they do.

A function, or a `partial` that gives it its arguments.
"""

from collections.abc import Callable, Sequence
from functools import partial

from app.tasks import process_webhook, send_digest, send_email

TASKS: Sequence[Callable[..., object]] = [
    send_digest,
    partial(send_email, "nobody@example.com"),
    partial(process_webhook, {"event": "paid"}),
]
