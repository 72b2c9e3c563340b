-- The statements of a turn on SQLite. {rows} is a list of rows, (?, ?, ...), (?, ?, ...), filled up with empty ones;
-- {facts} are the columns of a StoredTask. {cells} are those that the query shows, as one JSON cell, because the driver
-- takes Python's lock back for every row that it hands over, and a busy event loop may keep it for a while.

-- name: levels
SELECT {cells} FROM (SELECT queue, name, status, n FROM taskflow_counter
WHERE status IN ('pending', 'running') AND n > 0)

-- name: queues
SELECT name, concurrency, max_size, paused, reason, declared FROM taskflow_queue

-- name: first_due
SELECT run_at FROM taskflow_task WHERE status = 'delayed' ORDER BY run_at LIMIT 1

-- name: stage
UPDATE taskflow_task SET status = 'pending'
WHERE task_id IN (SELECT task_id FROM taskflow_task WHERE status = 'delayed' AND run_at <= :now ORDER BY run_at LIMIT :most)
RETURNING queue, name

-- name: tasks
SELECT {facts} FROM taskflow_task WHERE task_id IN (SELECT value FROM json_each(:ids))

-- name: one_offs
SELECT {facts} FROM taskflow_task
WHERE run_key = :run_key AND run_key IS NOT NULL AND status || '' IN ('pending', 'delayed')

-- name: beats
SELECT instance_id, beat_at FROM taskflow_instance WHERE instance_id IN (SELECT value FROM json_each(:ids))

-- name: left
SELECT {facts} FROM taskflow_task
WHERE status = 'running' AND instance IN (SELECT value FROM json_each(:ids)) LIMIT :most

-- name: held
SELECT {cells} FROM (SELECT {facts} FROM taskflow_task WHERE status = 'running' AND instance = :me)

-- name: schedules
SELECT name, func_name, "trigger", timezone, overlap, misfire, paused, last_tick, next_tick, started_at
FROM taskflow_schedule WHERE name IN (SELECT value FROM json_each(:names))

-- name: live_runs
SELECT DISTINCT schedule FROM taskflow_task
WHERE schedule IS NOT NULL AND status || '' IN ('pending', 'delayed', 'running')
AND schedule IN (SELECT value FROM json_each(:names))

-- name: insert_tasks
INSERT INTO taskflow_task
    (task_id, name, queue, priority, executor, source, status, attempt, instance, started_at, max_attempts, created_at,
     run_at, arguments, tags, requeue, idempotency_key, retry_of, trace, schedule, run_key,
     excused, crashes, cancel_requested)
SELECT *, 0, 0, 0 FROM (VALUES {rows}) WHERE column1 IS NOT NULL
ON CONFLICT (task_id) DO NOTHING

-- The status is compared as an expression: SQLite would otherwise walk the index of all running tasks and look through
-- the rows for each, instead of the other way round.
-- name: end_attempts
UPDATE taskflow_task AS task SET
    status = ended.status, run_at = coalesce(ended.run_at, task.run_at), finished_at = ended.finished_at,
    result = ended.result, error = ended.error, stacktrace = ended.stacktrace, excused = ended.excused,
    error_key = ended.error_key, cancel_requested = 0
FROM (
    SELECT column1 AS task_id, column2 AS attempt, column3 AS instance, column4 AS status, column5 AS run_at,
        column6 AS finished_at, column7 AS result, column8 AS error, column9 AS stacktrace, column10 AS excused,
        column11 AS error_key
    FROM (VALUES {rows}) WHERE column1 IS NOT NULL
) AS ended
WHERE task.task_id = ended.task_id AND task.status || '' = 'running' AND task.attempt = ended.attempt
AND task.instance = ended.instance AND NOT (task.cancel_requested AND ended.status IN ('pending', 'delayed'))

-- name: progress
UPDATE taskflow_task AS task SET progress = told.progress
FROM (
    SELECT column1 AS task_id, column2 AS attempt, column3 AS instance, column4 AS progress
    FROM (VALUES {rows}) WHERE column1 IS NOT NULL
) AS told
WHERE task.task_id = told.task_id AND task.status || '' = 'running' AND task.attempt = told.attempt
AND task.instance = told.instance

-- Each executor is a walk of its own with its own limit: where that is 0, it costs nothing however many tasks wait for
-- that executor. {named} narrows it to names, where others wait in the queue too.
-- name: ready
SELECT {cells} FROM (
    SELECT * FROM (
        SELECT * FROM (SELECT {claimable} FROM taskflow_task
            WHERE status = 'pending' AND queue = :queue AND executor = 'async' {named}
            ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT :async)
        UNION ALL
        SELECT * FROM (SELECT {claimable} FROM taskflow_task
            WHERE status = 'pending' AND queue = :queue AND executor = 'thread' {named}
            ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT :thread)
        UNION ALL
        SELECT * FROM (SELECT {claimable} FROM taskflow_task
            WHERE status = 'pending' AND queue = :queue AND executor = 'process' {named}
            ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT :process)
    ) ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT :most
)

-- name: seize
UPDATE taskflow_task SET
    status = 'running', attempt = attempt + 1, instance = :me, started_at = :now, finished_at = NULL, progress = NULL,
    cancel_requested = 0
WHERE task_id IN (SELECT value FROM json_each(:ids))

-- name: set_aside
UPDATE taskflow_task SET status = 'failed', error = :reason, finished_at = :now
WHERE status = :before AND CAST(task_id AS BLOB) = :raw_id

-- name: insert_events
INSERT INTO taskflow_event (task_id, at, kind, attempt, instance, actor, detail)
SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL

-- name: insert_logs
INSERT INTO taskflow_log (task_id, at, level, attempt, message, extra)
SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL

-- name: count
INSERT INTO taskflow_counter (queue, name, status, n, micros)
SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL
ON CONFLICT (queue, name, status) DO UPDATE SET n = n + excluded.n, micros = micros + excluded.micros

-- name: group
INSERT INTO taskflow_failure (error_key, name, error_type, message, frame, first_at, last_at, open, dismissed)
VALUES (:error_key, :name, :error_type, :message, :frame, :at, :at, :open, :dismissed)
ON CONFLICT (error_key) DO UPDATE SET
    message = excluded.message, last_at = max(last_at, excluded.last_at), open = open + excluded.open,
    dismissed = dismissed + excluded.dismissed

-- name: record
INSERT INTO taskflow_gauge (size, at, kind, series, sums, instance) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (size, kind, at, series, instance) DO UPDATE SET sums = excluded.sums

-- name: forget_gauges
DELETE FROM taskflow_gauge WHERE rowid IN
    (SELECT rowid FROM taskflow_gauge WHERE size = :size AND at < :before LIMIT 1000)

-- name: regroup
UPDATE taskflow_failure SET open = open + :open, dismissed = dismissed + :dismissed WHERE error_key = :error_key

-- name: purge_groups
DELETE FROM taskflow_failure WHERE open <= 0 AND dismissed <= 0 AND last_at < :before

-- name: queue_version
UPDATE taskflow_queue SET version = (SELECT max(version) + 1 FROM taskflow_queue)

-- name: advance
UPDATE taskflow_schedule SET
    last_tick = coalesce(:last_tick, last_tick), next_tick = coalesce(:next_tick, next_tick),
    last_run = coalesce(:last_run, last_run), last_task_id = coalesce(:last_task_id, last_task_id),
    started_at = coalesce(:started_at, started_at)
WHERE name = :name

-- name: forget_revoked
DELETE FROM taskflow_revoked WHERE expires_at <= :now

-- name: revoke
INSERT INTO taskflow_revoked (session_id, expires_at) VALUES (:session_id, :expires_at) ON CONFLICT DO NOTHING

-- name: old
SELECT task_id FROM taskflow_task
WHERE status = :status AND created_at < :before AND coalesce(finished_at, created_at) < :before
ORDER BY created_at LIMIT :most

-- name: purge_logs
DELETE FROM taskflow_log WHERE seq IN
    (SELECT seq FROM taskflow_log WHERE task_id IN (SELECT value FROM json_each(:ids)) LIMIT :most)

-- name: purge_events
DELETE FROM taskflow_event WHERE seq IN
    (SELECT seq FROM taskflow_event WHERE task_id IN (SELECT value FROM json_each(:ids)) AND actor IS NULL LIMIT :most)

-- name: purge_tasks
DELETE FROM taskflow_task WHERE task_id IN (SELECT value FROM json_each(:ids))
RETURNING queue, name, started_at, finished_at, error_key, dismissed_at

-- name: purge_damaged
DELETE FROM taskflow_task WHERE status = :status AND CAST(task_id AS BLOB) = :raw_id
RETURNING queue, name, started_at, finished_at, error_key, dismissed_at

-- name: purge_skips
DELETE FROM taskflow_event WHERE seq IN
    (SELECT seq FROM taskflow_event WHERE kind = 'tick_skipped' AND at < :before ORDER BY at LIMIT :most)

-- The index of tags: what is made of it with its table, and then keeps it.
-- name: tag_new_tasks
CREATE TRIGGER taskflow_tag_new_tasks AFTER INSERT ON taskflow_task WHEN new.tags <> '{}'
BEGIN
    INSERT OR IGNORE INTO taskflow_tag (tag, created_at, task_id)
    SELECT key || ':' || value, new.created_at, new.task_id FROM {new_tags};
END

-- name: tag_changed_tasks
CREATE TRIGGER taskflow_tag_changed_tasks AFTER UPDATE OF tags, created_at, task_id ON taskflow_task
WHEN old.tags <> '{}' OR new.tags <> '{}'
BEGIN
    DELETE FROM taskflow_tag
    WHERE tag IN (SELECT key || ':' || value FROM {old_tags}) AND created_at = old.created_at AND task_id = old.task_id;
    INSERT OR IGNORE INTO taskflow_tag (tag, created_at, task_id)
    SELECT key || ':' || value, new.created_at, new.task_id FROM {new_tags};
END

-- name: tag_gone_tasks
CREATE TRIGGER taskflow_tag_gone_tasks AFTER DELETE ON taskflow_task WHEN old.tags <> '{}'
BEGIN
    DELETE FROM taskflow_tag
    WHERE tag IN (SELECT key || ':' || value FROM {old_tags}) AND created_at = old.created_at AND task_id = old.task_id;
END

-- name: tag_old_tasks
INSERT OR IGNORE INTO taskflow_tag (tag, created_at, task_id)
SELECT key || ':' || value, created_at, task_id FROM taskflow_task AS old, {old_tags} AND tags <> '{}' ORDER BY 1, 2, 3
