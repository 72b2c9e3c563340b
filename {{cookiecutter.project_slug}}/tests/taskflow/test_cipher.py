"""Arguments and results at rest: readable with the right key, by the right task, and by nobody else."""

import asyncio
import base64
import sqlite3
import traceback
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.taskflow import TaskFailed, TaskflowError, TaskManager, TaskStatus, get_task_context
from app.taskflow.cipher import Place, fingerprint, make_cipher

from .conftest import StartManager
from .helpers import PATIENCE, eventually

pytestmark = pytest.mark.anyio


def make_key(number: int) -> str:
    return base64.urlsafe_b64encode(bytes([number]) * 32).decode()


PLACE = Place("id", "name", "arguments", datetime(2026, 1, 1, tzinfo=UTC))
OLD, NEW = make_key(1), make_key(2)
NEEDLE = "Karlsson-on-the-roof"
"""Occurs in no file but where a secret was written."""


def define(manager: TaskManager) -> None:
    @manager.task(retries=2)
    async def double(text: str) -> str:
        return text * 2

    @manager.task
    async def triple(text: str) -> str:
        return text * 3

    @manager.task(retries=1)
    async def flaky(text: str) -> str:
        context = get_task_context()
        assert context is not None
        if context.attempt == 0:
            raise ConnectionError("at first")
        return text

    @manager.task
    async def fail_once(text: str) -> str:
        context = get_task_context()
        assert context is not None
        if context.attempt == 0 and not text.endswith("now"):
            raise ConnectionError("at first")
        return text

    @manager.task(requeue_on_interrupt=True)
    async def slow(text: str, seconds: float) -> str:
        context = get_task_context()
        assert context is not None
        await asyncio.sleep(0 if context.attempt else seconds)
        return text


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.db"


def change(file: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(file, timeout=5)) as connection, connection:
        assert connection.execute(statement, values).rowcount >= 1


async def ended(manager: TaskManager, task_id: str) -> Any:
    record = await manager.store.get(task_id)
    return record if record.status.terminal else None


async def held(start_manager: StartManager, key: object, *calls: tuple[str, str]) -> list[str]:
    """Ids of tasks that a process with that key accepted and did not run."""
    manager = await start_manager(define, encrypt_args_key=key)
    await manager.store.pause_queue("default")
    ids = [await manager.enqueue(task(manager, name), text) for name, text in calls]
    await manager.shutdown()
    return ids


async def run(start_manager: StartManager, key: object) -> TaskManager:
    manager = await start_manager(define, encrypt_args_key=key)
    await manager.store.resume_queue("default")
    return manager


# -- the cipher


def test_what_was_sealed_opens_for_its_task_and_for_no_other() -> None:
    cipher = make_cipher(NEW)
    sealed = cipher.seal(NEEDLE, PLACE)
    assert NEEDLE not in sealed
    assert cipher.open(sealed, PLACE) == NEEDLE
    changes: list[dict[str, Any]] = [
        {"task_id": "other"},
        {"name": "other"},
        {"task_id": "id\0name", "name": ""},
        {"task_id": "", "name": "id\0name"},
        {"column": "result"},
    ]
    for change_ in changes:
        with pytest.raises(ValueError, match="not encrypted for this task"):
            cipher.open(sealed, PLACE._replace(**change_))


def test_the_same_text_is_never_sealed_the_same_way() -> None:
    cipher = make_cipher(NEW)
    assert len({cipher.seal("text", PLACE) for _ in range(100)}) == 100


def test_a_sealed_text_that_was_changed_does_not_open() -> None:
    cipher = make_cipher(NEW)
    sealed = cipher.seal("text", PLACE)
    head, payload = sealed.rsplit(":", 1)
    raw = bytearray(base64.b64decode(payload))
    for place in range(len(raw)):
        changed = raw.copy()
        changed[place] ^= 1
        with pytest.raises(ValueError, match="was changed since"):
            cipher.open(f"{head}:{base64.b64encode(changed).decode()}", PLACE)
    for broken in (f"{head}:", f"{head}:!", sealed[:-8]):
        with pytest.raises(ValueError, match="was changed since"):
            cipher.open(broken, PLACE)


def test_the_newest_key_seals_and_all_of_them_open() -> None:
    before, rotated, after = make_cipher(OLD), make_cipher([NEW, OLD]), make_cipher([NEW])
    assert rotated.open(before.seal("text", PLACE), PLACE) == "text"
    assert after.open(rotated.seal("text", PLACE), PLACE) == "text"
    with pytest.raises(ValueError, match="does not have"):
        after.open(before.seal("text", PLACE), PLACE)


def test_a_plain_text_from_before_the_key_stays_readable_and_a_sealed_one_needs_the_key() -> None:
    since = make_cipher(NEW, PLACE.created_at + timedelta(seconds=1))
    assert since.open("[[1],{}]", PLACE) == "[[1],{}]"
    for cipher in (make_cipher(NEW), make_cipher(NEW, PLACE.created_at)):
        with pytest.raises(ValueError, match="not encrypted and not older than encrypted_since"):
            cipher.open("[[1],{}]", PLACE)
    with pytest.raises(ValueError, match="no key"):
        make_cipher(None).open(make_cipher(NEW).seal("text", PLACE), PLACE)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "not-a-key-at-all",
        b"\xff\xfe not base64 either",
        "schlüssel-schlüssel",
        base64.urlsafe_b64encode(b"Z" * 31).decode(),
        base64.urlsafe_b64encode(b"Z" * 33),
        [NEW, "second-key-is-wrong"],
    ],
    ids=["empty", "text", "bytes", "umlaut", "short", "long", "second"],
)
def test_a_bad_key_is_refused_at_once_without_being_shown(key: Any) -> None:
    with pytest.raises(TaskflowError, match="32 bytes in URL-safe base64") as refused:
        TaskManager(encrypt_args_key=key)
    shown = "".join(traceback.format_exception(refused.value, limit=0))
    for part in [key] if isinstance(key, str | bytes) else key:
        text = part if isinstance(part, str) else repr(part)[2:-1]
        assert not text or text not in shown


def test_an_empty_list_of_keys_is_refused() -> None:
    with pytest.raises(TaskflowError, match="an empty list"):
        TaskManager(encrypt_args_key=[])


def test_what_was_sealed_before_the_column_was_bound_still_opens_for_its_task_alone() -> None:
    nonce = bytes(12)
    sealed = AESGCM(bytes([2]) * 32).encrypt(nonce, b"text", b"id\0name")
    stored = f"sealed:1:{fingerprint(bytes([2]) * 32)}:{base64.b64encode(nonce + sealed).decode()}"
    assert make_cipher(NEW).open(stored, PLACE) == "text"
    with pytest.raises(ValueError, match="not encrypted for this task"):
        make_cipher(NEW).open(stored, PLACE._replace(task_id="other"))
    with pytest.raises(ValueError, match="was changed since"):
        make_cipher(NEW).open(stored.replace("sealed:1:", "sealed:2:"), PLACE)


def test_a_time_without_a_zone_is_refused_as_the_beginning_of_encryption() -> None:
    with pytest.raises(TaskflowError, match="encrypted_since"):
        TaskManager(encrypt_args_key=NEW, encrypted_since=datetime(2026, 1, 1))


# -- in the engine


async def test_arguments_and_results_cross_the_database_unreadable(start_manager: StartManager, file: Path) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW)
    waiting = await manager.enqueue(task(manager, "double"), NEEDLE, delay_seconds=3_600)
    task_id = await manager.enqueue(task(manager, "double"), NEEDLE)
    assert await manager.result(task_id, PATIENCE) == NEEDLE * 2
    files = list(file.parent.glob("tasks.db*"))
    assert {found.name for found in files} >= {"tasks.db", "tasks.db-wal"}
    stored = b"".join(found.read_bytes() for found in files)
    assert waiting.encode() in stored  # it is looked for where the rows are
    for secret in (NEEDLE, NEW, NEEDLE[:8]):
        assert secret.encode() not in stored
        assert base64.b64encode(secret.encode())[:-4] not in stored
    await manager.shutdown()
    assert NEEDLE.encode() not in b"".join(found.read_bytes() for found in file.parent.glob("tasks.db*"))


async def test_without_a_key_they_are_readable_there(start_manager: StartManager, file: Path) -> None:
    """What shows that the test above looks in the right place."""
    manager = await start_manager(define)
    await manager.result(await manager.enqueue(task(manager, "double"), NEEDLE), PATIENCE)
    assert NEEDLE.encode() in b"".join(found.read_bytes() for found in file.parent.glob("tasks.db*"))


async def test_pages_and_the_api_are_not_shown_what_was_sealed(start_manager: StartManager) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW)
    task_id = await manager.enqueue(task(manager, "double"), NEEDLE, delay_seconds=3_600)
    record = await manager.store.get(task_id)
    with pytest.raises(ValueError, match=r".") as refused:
        manager.store.arguments(record)
    assert NEEDLE not in str(refused.value)


async def test_swapped_rows_fail_alone_and_without_retries(start_manager: StartManager, file: Path) -> None:
    one, other, sibling, renamed = await held(
        start_manager, NEW, ("double", "one"), ("double", "other"), ("double", "sibling"), ("double", "renamed")
    )
    change(
        file,
        "UPDATE taskflow_task SET arguments = (SELECT arguments FROM taskflow_task AS theirs WHERE theirs.task_id = "
        "CASE taskflow_task.task_id WHEN ? THEN ? ELSE ? END) WHERE task_id IN (?, ?)",
        *(one, other, one),
        *(one, other),
    )
    change(file, "UPDATE taskflow_task SET name = 'triple' WHERE task_id = ?", renamed)
    manager = await run(start_manager, NEW)
    assert await manager.result(sibling, PATIENCE) == "siblingsibling"
    for task_id in (one, renamed):
        with pytest.raises(TaskFailed, match="not encrypted for this task"):
            await manager.result(task_id, PATIENCE)
    record = await manager.store.get(one)
    assert (record.status, record.attempt) == (TaskStatus.FAILED, 1)


async def test_a_swapped_result_is_not_returned_for_another_task(start_manager: StartManager, file: Path) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW)
    one, other = [await manager.enqueue(task(manager, "double"), text) for text in ("one", "other")]
    for task_id in (one, other):
        await manager.result(task_id, PATIENCE)
    change(
        file,
        "UPDATE taskflow_task SET result = (SELECT result FROM taskflow_task AS theirs WHERE theirs.task_id = ?) "
        "WHERE task_id = ?",
        one,
        other,
    )
    with pytest.raises(ValueError, match="not encrypted for this task"):
        await manager.result(other)
    assert await manager.result(one) == "oneone"


async def test_keys_rotate_without_losing_what_waits(start_manager: StartManager) -> None:
    (before,) = await held(start_manager, OLD, ("double", "before"))
    (during,) = await held(start_manager, [NEW, OLD], ("double", "during"))
    manager = await run(start_manager, [NEW, OLD])
    assert await manager.result(before, PATIENCE) == "beforebefore"
    assert await manager.result(during, PATIENCE) == "duringduring"


async def test_a_removed_key_fails_its_tasks_and_no_other(start_manager: StartManager) -> None:
    (before,) = await held(start_manager, OLD, ("double", "before"))
    (after,) = await held(start_manager, [NEW, OLD], ("double", "after"))
    manager = await run(start_manager, NEW)
    assert await manager.result(after, PATIENCE) == "afterafter"
    with pytest.raises(TaskFailed, match="a key that this process does not have"):
        await manager.result(before, PATIENCE)
    assert (await manager.store.get(before)).attempt == 1


@pytest.mark.parametrize("known", [True, False], ids=["dated", "undated"])
async def test_what_waited_unencrypted_runs_only_where_it_is_said_to_be_older_than_the_key(
    start_manager: StartManager, known: bool
) -> None:
    (plain,) = await held(start_manager, None, ("double", "plain"))
    since = datetime.now(UTC) if known else None
    manager = await start_manager(define, encrypt_args_key=NEW, encrypted_since=since)
    await manager.store.resume_queue("default")
    if known:
        assert await manager.result(plain, PATIENCE) == "plainplain"
    else:
        with pytest.raises(TaskFailed, match="not encrypted and not older"):
            await manager.result(plain, PATIENCE)


async def test_arguments_that_were_copied_into_the_result_are_not_returned(
    start_manager: StartManager, file: Path
) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW)
    task_id = await manager.enqueue(task(manager, "double"), "text")
    await manager.result(task_id, PATIENCE)
    change(file, "UPDATE taskflow_task SET result = arguments WHERE task_id = ?", task_id)
    with pytest.raises(ValueError, match="not encrypted for this task"):
        await manager.result(task_id)
    change(file, "UPDATE taskflow_task SET result = '\"forged\"' WHERE task_id = ?", task_id)
    with pytest.raises(ValueError, match="not encrypted and not older"):
        await manager.result(task_id)


async def test_without_any_key_a_sealed_task_fails_and_says_what_is_missing(start_manager: StartManager) -> None:
    (sealed,) = await held(start_manager, NEW, ("double", "sealed"))
    manager = await run(start_manager, None)
    with pytest.raises(TaskFailed, match="encrypt_args_key"):
        await manager.result(sealed, PATIENCE)


async def test_a_retry_gets_the_arguments_it_had(start_manager: StartManager) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW)
    assert await manager.result(await manager.enqueue(task(manager, "flaky"), "again"), PATIENCE) == "again"


@pytest.mark.parametrize("replaces", [True, False], ids=["same row", "new row"])
async def test_an_operator_s_retry_gets_the_arguments_the_task_had(start_manager: StartManager, replaces: bool) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW, retry_replaces_original=replaces)
    failed = await manager.enqueue(task(manager, "fail_once"), "at last, now" if not replaces else "at last")
    await eventually(lambda: ended(manager, failed))
    if not replaces:  # one that did not fail by itself
        change_to_failed = "UPDATE taskflow_task SET status = 'failed' WHERE task_id = ?"
        change(Path(manager.backend_name.removeprefix("sqlite:///")), change_to_failed, failed)
    retried = await manager.store.retry(failed)
    assert (retried.task_id == failed) == replaces
    assert str(await manager.result(retried.task_id, PATIENCE)).startswith("at last")


async def test_a_key_runs_a_failed_task_again_with_new_sealed_arguments(start_manager: StartManager) -> None:
    manager = await start_manager(define, encrypt_args_key=NEW)
    task_id = await manager.enqueue(task(manager, "fail_once"), "first", idempotency_key="k")
    await eventually(lambda: ended(manager, task_id))
    assert await manager.enqueue(task(manager, "fail_once"), "second", idempotency_key="k") == task_id
    assert await manager.result(task_id, PATIENCE) == "second"


async def test_recovery_after_a_restart_opens_what_the_earlier_process_sealed(start_manager: StartManager) -> None:
    first = await start_manager(define, encrypt_args_key=NEW, shutdown_timeout=0.1)
    interrupted = await first.enqueue(task(first, "slow"), NEEDLE, 3_600)
    await eventually(lambda: first.dispatcher.running == 1)
    await first.shutdown()
    second = await start_manager(define, encrypt_args_key=[NEW])
    assert await second.result(interrupted, PATIENCE) == NEEDLE


async def test_a_result_is_awaited_in_another_instance_that_has_the_key(start_manager: StartManager) -> None:
    one = await start_manager(define, encrypt_args_key=NEW)
    task_id = await one.enqueue(task(one, "double"), "text")
    await one.result(task_id, PATIENCE)
    other = await start_manager(encrypt_args_key=[OLD, NEW])
    assert await other.result(task_id) == "texttext"
    keyless = await start_manager()
    with pytest.raises(ValueError, match="no key"):
        await keyless.result(task_id)
