-- The statements of a turn on PostgreSQL. {facts} are the columns of a StoredTask. Rows arrive as one array for each
-- column. What must be as it was taken for granted is counted: 1 / 0 ends the transaction where it is not, so that the
-- commit can be on its way before the answer has come.

-- name: hold_queues
SELECT name FROM taskflow_queue
WHERE name = ANY(%(queues)s) AND (concurrency IS NOT NULL OR max_size IS NOT NULL) ORDER BY name FOR UPDATE

-- name: hold
SELECT pg_advisory_xact_lock(hashtextextended(word, 0)) FROM unnest(%(words)s::text[]) AS word ORDER BY word

-- name: stage
WITH due AS (
    SELECT task_id FROM taskflow_task WHERE status = 'delayed' AND run_at <= %(now)s
    ORDER BY run_at LIMIT %(most)s FOR UPDATE SKIP LOCKED
), staged AS (
    UPDATE taskflow_task AS task SET status = 'pending' FROM due WHERE task.task_id = due.task_id
    RETURNING task.queue, task.name
)
INSERT INTO taskflow_delta (part, queue, name, status, n, micros)
SELECT %(me)s, queue, name, moved.status, moved.sign * count(*), 0
FROM staged, (VALUES ('delayed', -1), ('pending', 1)) AS moved (status, sign)
GROUP BY queue, name, moved.status, moved.sign ORDER BY queue, name, moved.status
ON CONFLICT (part, queue, name, status) DO UPDATE SET n = taskflow_delta.n + excluded.n

-- name: levels
SELECT queue, name, status, sum(n)::bigint FROM (
    SELECT queue, name, status, n FROM taskflow_counter WHERE status IN ('pending', 'running')
    UNION ALL
    SELECT queue, name, status, n FROM taskflow_delta WHERE status IN ('pending', 'running')
) AS counted GROUP BY queue, name, status HAVING sum(n) > 0

-- name: queues
SELECT name, concurrency, max_size, paused, reason, declared FROM taskflow_queue

-- name: first_due
SELECT run_at FROM taskflow_task WHERE status = 'delayed' ORDER BY run_at LIMIT 1

-- name: transaction
SELECT pg_current_xact_id()::text

-- name: outcome
SELECT pg_xact_status(%(transaction)s::xid8)

-- name: tasks
SELECT {facts} FROM taskflow_task WHERE task_id = ANY(%(ids)s) ORDER BY task_id FOR UPDATE

-- name: one_offs
SELECT {facts} FROM taskflow_task
WHERE run_key = %(run_key)s AND run_key IS NOT NULL AND status || '' IN ('pending', 'delayed') ORDER BY task_id FOR UPDATE

-- name: hold_beats
SELECT instance_id FROM taskflow_instance WHERE instance_id = ANY(%(ids)s) ORDER BY instance_id FOR UPDATE

-- name: left
SELECT {facts} FROM taskflow_task WHERE status = 'running' AND instance IN (
    SELECT dead.instance_id FROM unnest(%(ids)s::text[], %(stamps)s::bigint[]) AS dead (instance_id, stamp)
    LEFT JOIN taskflow_instance AS known ON known.instance_id = dead.instance_id
    WHERE coalesce(known.beat_at, 0) = dead.stamp
) LIMIT %(most)s FOR UPDATE SKIP LOCKED

-- name: held
SELECT {facts} FROM taskflow_task WHERE status = 'running' AND instance = %(me)s FOR UPDATE

-- name: schedules
SELECT name, func_name, "trigger", timezone, overlap, misfire, paused, last_tick, next_tick, started_at
FROM taskflow_schedule WHERE name = ANY(%(names)s) ORDER BY name FOR UPDATE

-- name: live_runs
SELECT DISTINCT schedule FROM taskflow_task
WHERE schedule IS NOT NULL AND status || '' IN ('pending', 'delayed', 'running') AND schedule = ANY(%(names)s)

-- name: insert_tasks
WITH stored AS (
    INSERT INTO taskflow_task
        (task_id, name, queue, priority, executor, source, status, attempt, instance, started_at, max_attempts,
         created_at, run_at, arguments, tags, requeue, idempotency_key, retry_of, trace, schedule, run_key,
         excused, crashes, cancel_requested)
    SELECT task_id, name, queue, priority, executor, source, status, attempt, instance, started_at, max_attempts,
         created_at, run_at, arguments, tags, requeue <> 0, idempotency_key, retry_of, trace, schedule, run_key,
         0, 0, false
    FROM unnest(
        %(task_id)s::text[], %(name)s::text[], %(queue)s::text[], %(priority)s::int[], %(executor)s::text[],
        %(source)s::text[], %(status)s::text[], %(attempt)s::int[], %(instance)s::text[], %(started_at)s::bigint[],
        %(max_attempts)s::int[], %(created_at)s::bigint[], %(run_at)s::bigint[], %(arguments)s::text[],
        %(tags)s::text[], %(requeue)s::int[], %(idempotency_key)s::text[], %(retry_of)s::text[], %(trace)s::text[],
        %(schedule)s::text[], %(run_key)s::text[]
    ) AS arrived (task_id, name, queue, priority, executor, source, status, attempt, instance, started_at,
         max_attempts, created_at, run_at, arguments, tags, requeue, idempotency_key, retry_of, trace, schedule,
         run_key)
    ON CONFLICT (task_id) DO NOTHING RETURNING 1
)
SELECT 1 / (count(*) = %(rows)s)::int FROM stored

-- The status is compared as an expression: the index of what runs is full of what ran a moment ago.
-- name: end_attempts
WITH ended AS (
    UPDATE taskflow_task AS task SET
        status = ended.status, run_at = coalesce(ended.run_at, task.run_at), finished_at = ended.finished_at,
        result = ended.result, error = ended.error, stacktrace = ended.stacktrace, excused = ended.excused,
        error_key = ended.error_key, cancel_requested = false
    FROM unnest(
        %(task_id)s::text[], %(attempt)s::int[], %(instance)s::text[], %(status)s::text[], %(run_at)s::bigint[],
        %(finished_at)s::bigint[], %(result)s::text[], %(error)s::text[], %(stacktrace)s::text[], %(excused)s::int[],
        %(error_key)s::text[]
    ) AS ended (task_id, attempt, instance, status, run_at, finished_at, result, error, stacktrace, excused, error_key)
    WHERE task.task_id = ended.task_id AND task.status || '' = 'running' AND task.attempt = ended.attempt
    AND task.instance = ended.instance AND NOT (task.cancel_requested AND ended.status IN ('pending', 'delayed'))
    RETURNING 1
)
SELECT 1 / (count(*) = %(rows)s)::int FROM ended

-- name: progress
UPDATE taskflow_task AS task SET progress = told.progress
FROM unnest(%(task_id)s::text[], %(attempt)s::int[], %(progress)s::text[]) AS told (task_id, attempt, progress)
WHERE task.task_id = told.task_id AND task.status || '' = 'running' AND task.attempt = told.attempt
AND task.instance = %(me)s

-- Each executor is a walk of its own with its own limit: where that is 0, it costs nothing however many tasks wait for
-- that executor.
-- name: claim
WITH chosen AS (
    SELECT task_id FROM (
        SELECT * FROM (SELECT task_id, priority, run_at FROM taskflow_task
            WHERE status = 'pending' AND queue = %(queue)s AND executor = 'async' AND name = ANY(%(names)s)
            ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT %(async)s FOR UPDATE SKIP LOCKED) AS a
        UNION ALL
        SELECT * FROM (SELECT task_id, priority, run_at FROM taskflow_task
            WHERE status = 'pending' AND queue = %(queue)s AND executor = 'thread' AND name = ANY(%(names)s)
            ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT %(thread)s FOR UPDATE SKIP LOCKED) AS t
        UNION ALL
        SELECT * FROM (SELECT task_id, priority, run_at FROM taskflow_task
            WHERE status = 'pending' AND queue = %(queue)s AND executor = 'process' AND name = ANY(%(names)s)
            ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT %(process)s FOR UPDATE SKIP LOCKED) AS p
    ) AS ready ORDER BY coalesce(priority, 0) DESC, run_at, task_id LIMIT %(most)s
), seized AS (
    UPDATE taskflow_task AS task SET
        status = 'running', attempt = attempt + 1, instance = %(me)s, started_at = %(now)s, finished_at = NULL,
        progress = NULL, cancel_requested = false
    FROM chosen WHERE task.task_id = chosen.task_id
    RETURNING {task_facts}
), told AS (
    INSERT INTO taskflow_event (task_id, at, kind, attempt, instance)
    SELECT task_id, %(now)s, 'started', attempt - 1, %(me)s FROM seized
), counted AS (
    INSERT INTO taskflow_delta (part, queue, name, status, n, micros)
    SELECT %(me)s, queue, name, moved.status, moved.sign * count(*), 0
    FROM seized, (VALUES ('pending', -1), ('running', 1)) AS moved (status, sign)
    GROUP BY queue, name, moved.status, moved.sign ORDER BY queue, name, moved.status
    ON CONFLICT (part, queue, name, status) DO UPDATE SET n = taskflow_delta.n + excluded.n
)
SELECT * FROM seized ORDER BY coalesce(priority, 0) DESC, run_at, task_id

-- name: refit
UPDATE taskflow_task SET executor = %(kind)s WHERE task_id IN (
    SELECT task_id FROM taskflow_task
    WHERE status = 'pending' AND queue = %(queue)s AND executor = ANY(%(others)s) AND name = ANY(%(names)s)
    LIMIT %(most)s FOR UPDATE SKIP LOCKED
)

-- name: insert_events
INSERT INTO taskflow_event (task_id, at, kind, attempt, instance, actor, detail)
SELECT * FROM unnest(%(task_id)s::text[], %(at)s::bigint[], %(kind)s::text[], %(attempt)s::int[], %(instance)s::text[],
    %(actor)s::text[], %(detail)s::text[])

-- name: insert_logs
INSERT INTO taskflow_log (task_id, at, level, attempt, message, extra)
SELECT * FROM unnest(%(task_id)s::text[], %(at)s::bigint[], %(level)s::text[], %(attempt)s::int[], %(message)s::text[],
    %(extra)s::text[])

-- name: count
INSERT INTO taskflow_delta (part, queue, name, status, n, micros)
SELECT %(part)s, * FROM unnest(%(queue)s::text[], %(name)s::text[], %(status)s::text[], %(n)s::bigint[],
    %(micros)s::bigint[])
ON CONFLICT (part, queue, name, status)
DO UPDATE SET n = taskflow_delta.n + excluded.n, micros = taskflow_delta.micros + excluded.micros

-- name: group
INSERT INTO taskflow_failure AS known (error_key, name, error_type, message, frame, first_at, last_at, open, dismissed)
VALUES (%(error_key)s, %(name)s, %(error_type)s, %(message)s, %(frame)s, %(at)s, %(at)s, %(open)s, %(dismissed)s)
ON CONFLICT (error_key) DO UPDATE SET
    message = excluded.message, last_at = greatest(known.last_at, excluded.last_at), open = known.open + excluded.open,
    dismissed = known.dismissed + excluded.dismissed

-- name: record
INSERT INTO taskflow_gauge (size, at, kind, series, sums, instance)
SELECT size, at, kind, series, sums, %(me)s
FROM unnest(%(size)s::int[], %(at)s::bigint[], %(kind)s::text[], %(series)s::text[], %(sums)s::text[])
    AS told (size, at, kind, series, sums)
ON CONFLICT (size, kind, at, series, instance) DO UPDATE SET sums = excluded.sums

-- name: forget_gauges
DELETE FROM taskflow_gauge WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM taskflow_gauge WHERE size = %(size)s AND at < %(before)s LIMIT 1000 FOR UPDATE SKIP LOCKED))

-- name: regroup
UPDATE taskflow_failure SET open = open + %(open)s, dismissed = dismissed + %(dismissed)s WHERE error_key = %(error_key)s

-- name: purge_groups
DELETE FROM taskflow_failure WHERE open <= 0 AND dismissed <= 0 AND last_at < %(before)s

-- name: fold
WITH gone AS (
    DELETE FROM taskflow_delta WHERE part NOT IN (SELECT instance_id FROM taskflow_instance)
    RETURNING queue, name, status, n, micros
)
INSERT INTO taskflow_counter AS counter (queue, name, status, n, micros)
SELECT queue, name, status, sum(n), sum(micros) FROM gone GROUP BY queue, name, status ORDER BY queue, name, status
ON CONFLICT (queue, name, status) DO UPDATE SET n = counter.n + excluded.n, micros = counter.micros + excluded.micros

-- name: set_queue
INSERT INTO taskflow_queue (name, paused, version) VALUES (%(name)s, false, 0) ON CONFLICT (name) DO NOTHING

-- name: set_schedule
INSERT INTO taskflow_schedule (name, func_name, "trigger", timezone, overlap, misfire, paused, last_tick)
VALUES (%(name)s, '', '', '', true, '', false, 0) ON CONFLICT (name) DO NOTHING

-- name: queue_version
UPDATE taskflow_queue SET version = (SELECT max(version) + 1 FROM taskflow_queue) WHERE name = ANY(%(names)s)

-- name: advance
UPDATE taskflow_schedule SET
    last_tick = coalesce(%(last_tick)s::bigint, last_tick), next_tick = coalesce(%(next_tick)s::bigint, next_tick),
    last_run = coalesce(%(last_run)s::bigint, last_run),
    last_task_id = coalesce(%(last_task_id)s::text, last_task_id),
    started_at = coalesce(%(started_at)s::bigint, started_at)
WHERE name = %(name)s

-- name: forget_revoked
DELETE FROM taskflow_revoked WHERE expires_at <= %(now)s

-- name: revoke
INSERT INTO taskflow_revoked (session_id, expires_at)
SELECT * FROM unnest(%(session_id)s::text[], %(expires_at)s::bigint[]) ON CONFLICT DO NOTHING

-- name: old
SELECT task_id FROM taskflow_task
WHERE status = %(status)s AND created_at < %(before)s AND coalesce(finished_at, created_at) < %(before)s
ORDER BY created_at LIMIT %(most)s FOR UPDATE SKIP LOCKED

-- name: purge_logs
WITH gone AS (
    DELETE FROM taskflow_log WHERE seq IN (SELECT seq FROM taskflow_log WHERE task_id = ANY(%(ids)s) LIMIT %(most)s)
    RETURNING 1
)
SELECT count(*) FROM gone

-- name: purge_events
WITH gone AS (
    DELETE FROM taskflow_event WHERE seq IN
        (SELECT seq FROM taskflow_event WHERE task_id = ANY(%(ids)s) AND actor IS NULL LIMIT %(most)s)
    RETURNING 1
)
SELECT count(*) FROM gone

-- name: purge_tasks
DELETE FROM taskflow_task WHERE task_id = ANY(%(ids)s) RETURNING queue, name, started_at, finished_at, error_key, dismissed_at

-- name: purge_skips
WITH gone AS (
    DELETE FROM taskflow_event WHERE seq IN
        (SELECT seq FROM taskflow_event WHERE kind = 'tick_skipped' AND at < %(before)s ORDER BY at LIMIT %(most)s)
    RETURNING 1
)
SELECT count(*) FROM gone

-- name: events_after
SELECT seq, task_id, at, kind, attempt, instance, actor, detail,
    pg_snapshot_xmin(pg_current_snapshot())::text::bigint
FROM taskflow_event WHERE seq > %(seq)s ORDER BY seq LIMIT %(most)s

-- name: next_transaction
SELECT pg_current_xact_id()::text::bigint

-- name: clock
SELECT clock_timestamp()

-- The index of tags: what is made of it with its table, and then keeps it. A cell that cannot be read has none; a text
-- that is longer than a key and a value may be does not fit into an index.
-- name: tags_of
CREATE OR REPLACE FUNCTION taskflow_tags_of(tags text) RETURNS text[] LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN ARRAY(SELECT key || ':' || value FROM json_each_text(tags::json) WHERE length(key) + length(value) <= 512);
EXCEPTION WHEN others THEN
    RETURN '{}';
END $$

-- name: tag
CREATE OR REPLACE FUNCTION taskflow_tag() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM taskflow_tag
        WHERE tag = ANY(taskflow_tags_of(OLD.tags)) AND created_at = OLD.created_at AND task_id = OLD.task_id;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO taskflow_tag (tag, created_at, task_id)
        SELECT unnest(taskflow_tags_of(NEW.tags)), NEW.created_at, NEW.task_id ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$

-- name: tag_new_tasks
CREATE TRIGGER taskflow_tag_new_tasks AFTER INSERT ON taskflow_task
FOR EACH ROW WHEN (NEW.tags <> '{}') EXECUTE FUNCTION taskflow_tag()

-- name: tag_changed_tasks
CREATE TRIGGER taskflow_tag_changed_tasks AFTER UPDATE OF tags, created_at, task_id ON taskflow_task
FOR EACH ROW WHEN (OLD.tags <> '{}' OR NEW.tags <> '{}') EXECUTE FUNCTION taskflow_tag()

-- name: tag_gone_tasks
CREATE TRIGGER taskflow_tag_gone_tasks AFTER DELETE ON taskflow_task
FOR EACH ROW WHEN (OLD.tags <> '{}') EXECUTE FUNCTION taskflow_tag()

-- name: tag_old_tasks
INSERT INTO taskflow_tag (tag, created_at, task_id)
SELECT unnest(taskflow_tags_of(tags)), created_at, task_id FROM taskflow_task WHERE tags <> '{}' ORDER BY 1, 2, 3
ON CONFLICT DO NOTHING
