-- What happens inside Redis, in one step each: `look` shows the rules what they have to see, `apply` writes what they
-- decided, `load` takes in the rows of another store, `beat` and `leave` keep the book of instances. Nothing here asks
-- why: fences are compared, rows are moved.
--
-- KEYS[1] is the prefix of all keys, in one hash slot. ARGV[1] names the function, ARGV[2] is its packed argument, and so
-- is the answer. A task is one packed list, which takes a third of a hash: its columns in the order of COLUMNS, `false`
-- where SQL has NULL. `redis_keys.py` says what each key holds.

local root = KEYS[1]
local function key(...) return root .. table.concat({...}, ':') end

local COLUMNS = {'name', 'queue', 'priority', 'executor', 'source', 'status', 'attempt', 'excused', 'crashes',
    'max_attempts', 'created_at', 'run_at', 'started_at', 'finished_at', 'instance', 'requeue', 'cancel_requested',
    'arguments', 'result', 'error', 'stacktrace', 'tags', 'progress', 'idempotency_key', 'retry_of', 'trace',
    'schedule', 'run_key', 'revision', 'events', 'error_key', 'dismissed_at'}
local PLACE = {}
for place, column in ipairs(COLUMNS) do PLACE[column] = place end
local MOST_EVENTS = 12     -- that are kept in the task itself; more go to a list of their own
local FEED, AUDIT, SUBJECT = 100000, 1000000, 1000

local function number(value) return string.format('%.0f', value) end

-- Tasks, read once and written once ------------------------------------------------------------------------------

local tasks, changed = {}, {}

local function load(id)
    if tasks[id] == nil then
        local packed = redis.call('GET', key('task', id))
        tasks[id] = false
        if packed then
            local cells, task = cmsgpack.unpack(packed), {}
            for place, column in ipairs(COLUMNS) do task[column] = cells[place] or false end
            tasks[id] = task
        end
    end
    return tasks[id]
end

local function save()
    for id in pairs(changed) do
        local task, cells = tasks[id], {}
        if #task.events > MOST_EVENTS then
            for _, event in ipairs(task.events) do redis.call('RPUSH', key('events', id), cmsgpack.pack(event)) end
            task.events = {}
        end
        for place, column in ipairs(COLUMNS) do cells[place] = task[column] end
        redis.call('SET', key('task', id), cmsgpack.pack(cells))
    end
end

-- Where a task stands, by its status -----------------------------------------------------------------------------

local function rank(id, task)
    return string.format('%010.0f%016.0f%s', 2147483648 - (task.priority or 0), task.run_at, id)
end

local function waits(status) return status == 'pending' or status == 'delayed' end

local function place(id, task)
    redis.call('ZADD', key('status', task.status), number(task.created_at), id)
    if task.status == 'pending' then
        redis.call('ZADD', key('ready', task.queue, task.name), 0, rank(id, task))
    elseif task.status == 'delayed' then
        redis.call('ZADD', key('due'), number(task.run_at), id)
    elseif task.status == 'running' then
        redis.call('SADD', key('running', task.instance), id)
        redis.call('SADD', key('runners'), task.instance)
        if task.cancel_requested == 1 then redis.call('SADD', key('stopping', task.instance), id) end
    end
    if waits(task.status) and task.run_key then
        redis.call('SADD', key('run_key', task.run_key), id)
        redis.call('ZADD', key('one_offs'), number(task.run_at), id)
    end
    if task.schedule and (waits(task.status) or task.status == 'running') then
        redis.call('SADD', key('live', task.schedule), id)
    end
    if task.error_key then redis.call('ZADD', key('error', task.error_key), number(task.created_at), id) end
end

local function unplace(id, task)
    redis.call('ZREM', key('status', task.status), id)
    if task.status == 'pending' then
        redis.call('ZREM', key('ready', task.queue, task.name), rank(id, task))
    elseif task.status == 'delayed' then
        redis.call('ZREM', key('due'), id)
    elseif task.status == 'running' then
        redis.call('SREM', key('running', task.instance), id)
        if task.cancel_requested == 1 then redis.call('SREM', key('stopping', task.instance), id) end
        if redis.call('EXISTS', key('running', task.instance)) == 0 then
            redis.call('SREM', key('runners'), task.instance)
        end
    end
    if waits(task.status) and task.run_key then
        redis.call('SREM', key('run_key', task.run_key), id)
        redis.call('ZREM', key('one_offs'), id)
    end
    if task.schedule then redis.call('SREM', key('live', task.schedule), id) end
    if task.error_key then redis.call('ZREM', key('error', task.error_key), id) end
end

-- What a task is found by, `key:value` of each of its tags. A cell that cannot be read has none.
local function tag_keys(tags)
    local readable, found = pcall(cjson.decode, tags)
    local keys = {}
    if readable and type(found) == 'table' then
        for name, value in pairs(found) do
            if type(name) == 'string' and type(value) == 'string' then table.insert(keys, key('tag', name, value)) end
        end
    end
    return keys
end

local function file_tags(id, task)
    if task.tags == '{}' then return end
    for _, name in ipairs(tag_keys(task.tags)) do redis.call('ZADD', name, number(task.created_at), id) end
end

local function unfile_tags(id, task)
    if task.tags == '{}' then return end
    for _, name in ipairs(tag_keys(task.tags)) do redis.call('ZREM', name, id) end
end

local function file(id, task)
    redis.call('ZADD', key('name', task.name), number(task.created_at), id)
    redis.call('ZADD', key('queue', task.queue), number(task.created_at), id)
    if task.schedule then redis.call('ZADD', key('schedule', task.schedule), number(task.created_at), id) end
    file_tags(id, task)
end

local function unfile(id, task)
    redis.call('ZREM', key('name', task.name), id)
    redis.call('ZREM', key('queue', task.queue), id)
    if task.schedule then redis.call('ZREM', key('schedule', task.schedule), id) end
    unfile_tags(id, task)
end

local function change(id, task, values)
    unplace(id, task)
    if values.queue and values.queue ~= task.queue then
        redis.call('ZREM', key('queue', task.queue), id)
        redis.call('ZADD', key('queue', values.queue), number(task.created_at), id)
    end
    if values.tags then unfile_tags(id, task) end
    for column, value in pairs(values) do task[column] = value end
    if values.tags then file_tags(id, task) end
    task.revision = task.revision + 1
    changed[id] = true
    place(id, task)
end

local function document(name, field)
    local packed = redis.call('HGET', key(name), field)
    return packed and cmsgpack.unpack(packed)
end

-- Books ----------------------------------------------------------------------------------------------------------

local function count(queue, name, status, n, micros)
    local field = cmsgpack.pack({queue, name, status})
    if n ~= 0 then
        redis.call('HINCRBY', key('counts'), field, number(n))
        if status == 'pending' or status == 'running' then
            if redis.call('HINCRBY', key('levels'), field, number(n)) <= 0 then redis.call('HDEL', key('levels'), field) end
            redis.call('HINCRBY', key('totals'), cmsgpack.pack({queue, status}), number(n))
        end
    end
    if micros and micros ~= 0 then redis.call('HINCRBY', key('micros'), field, number(micros)) end
end

local function list_group(error_key, group)
    local kinds = {open = group.open > 0, dismissed = group.dismissed > 0}
    kinds.empty = not (kinds.open or kinds.dismissed)
    for kind, there in pairs(kinds) do
        if there then
            redis.call('ZADD', key('failures_' .. kind), number(group.last_at), error_key)
        else
            redis.call('ZREM', key('failures_' .. kind), error_key)
        end
    end
end

local function regroup(tally)
    local group = document('failures', tally.error_key)
    if not group and not tally.at then return end
    group = group or {name = tally.name, error_type = tally.error_type, message = tally.message, frame = tally.frame,
        first_at = tally.at, last_at = tally.at, open = 0, dismissed = 0}
    if tally.at then
        group.message = tally.message
        group.last_at = math.max(group.last_at, tally.at)
    end
    group.open = group.open + tally.open
    group.dismissed = group.dismissed + tally.dismissed
    redis.call('HSET', key('failures'), tally.error_key, cmsgpack.pack(group))
    list_group(tally.error_key, group)
end

local function total(queue, status)
    return tonumber(redis.call('HGET', key('totals'), cmsgpack.pack({queue, status})) or '0')
end

local next_seq, last_seq = 1, 0

local function next_number()
    if next_seq > last_seq then
        last_seq = redis.call('INCR', key('seq'))
        next_seq = last_seq
    end
    next_seq = next_seq + 1
    return next_seq - 1
end

-- So many numbers at once; all of them are used.
local function reserve(n)
    if n > 0 then
        last_seq = redis.call('INCRBY', key('seq'), n)
        next_seq = last_seq - n + 1
    end
end

local function tell(task_id, at, kind, attempt, instance, actor, detail)
    local seq = next_number()
    local event = {seq, at, kind, attempt, instance, actor, detail}
    local packed = cmsgpack.pack({task_id, event})
    redis.call('XADD', key('feed'), 'MAXLEN', '~', FEED, number(seq) .. '-0', 'e', packed)
    if actor then redis.call('XADD', key('audit'), 'MAXLEN', '~', AUDIT, number(seq) .. '-0', 'e', packed) end
    local task = task_id ~= '' and load(task_id)
    if task then
        table.insert(task.events, event)
        changed[task_id] = true
    elseif task_id ~= '' then
        redis.call('RPUSH', key('events', task_id), cmsgpack.pack(event))
        redis.call('LTRIM', key('events', task_id), -SUBJECT, -1)
        redis.call('SADD', key('subjects'), task_id)
    end
end

-- look -----------------------------------------------------------------------------------------------------------

local function stage(now, most)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('due'), '-inf', number(now), 'LIMIT', 0, most)) do
        local task = load(id)
        count(task.queue, task.name, 'delayed', -1)
        count(task.queue, task.name, 'pending', 1)
        change(id, task, {status = 'pending'})
    end
    save()
end

local function shown(ids, most)
    local found = {}
    for _, id in ipairs(ids) do
        local packed = redis.call('GET', key('task', id))
        if packed then table.insert(found, {id, packed}) end
        if most and #found >= most then break end
    end
    return found
end

local function look(wants)
    if wants.stage then stage(wants.now, wants.most_staged) end
    local next_due = redis.call('ZRANGE', key('due'), 0, 0, 'WITHSCORES')
    local one_offs, left, schedules, live = {}, {}, {}, {}
    for _, run_key in ipairs(wants.run_keys) do
        table.insert(one_offs, {run_key, shown(redis.call('SMEMBERS', key('run_key', run_key)))})
    end
    for _, pair in ipairs(wants.stamps) do
        local known = document('instances', pair[1])
        if (known and known.beat_at or 0) == pair[2] then
            for _, item in ipairs(shown(redis.call('SMEMBERS', key('running', pair[1])), wants.most_left - #left)) do
                table.insert(left, item)
            end
        end
        if #left >= wants.most_left then break end
    end
    for _, name in ipairs(wants.schedules) do
        local packed = redis.call('HGET', key('schedules'), name)
        if packed then table.insert(schedules, {name, packed}) end
    end
    for _, name in ipairs(wants.live) do
        if redis.call('EXISTS', key('live', name)) == 1 then table.insert(live, name) end
    end
    return {redis.call('HGETALL', key('levels')), redis.call('HGETALL', key('queues')), next_due[2] or false,
        shown(wants.tasks), one_offs, left,
        wants.held and shown(redis.call('SMEMBERS', key('running', wants.me))) or {}, schedules, live}
end

-- apply: the fences ----------------------------------------------------------------------------------------------

local function same_members(name, ids)
    local members, known = redis.call('SMEMBERS', name), {}
    for _, id in ipairs(ids) do known[id] = true end
    for _, id in ipairs(members) do if not known[id] then return false end end
    return #members == #ids
end

local function is_stale(me, changes)
    for _, ending in ipairs(changes.endings) do
        local task = load(ending[1])
        if not task or task.status ~= 'running' or task.attempt ~= ending[2] or task.instance ~= me
            or (task.cancel_requested == 1 and waits(ending[4])) then return true end
    end
    for _, update in ipairs(changes.updates) do
        local task = load(update[1])
        if not task or task.revision ~= update[2] then return true end
    end
    for _, insert in ipairs(changes.inserts) do if load(insert[1]) then return true end end
    for _, ceiling in ipairs(changes.ceilings) do
        local queue, pending, max_size, running, concurrency = unpack(ceiling)
        if max_size and pending > 0 and total(queue, 'pending') + pending > max_size then return true end
        if concurrency and running > 0 and total(queue, 'running') + running > concurrency then return true end
    end
    for _, pair in ipairs(changes.stamps) do
        local known = document('instances', pair[1])
        if (known and known.beat_at or 0) ~= pair[2] then return true end
    end
    for _, advance in ipairs(changes.advances) do
        local known = document('schedules', advance.name)
        if advance.since and (not known or known.last_tick ~= advance.since) then return true end
        if advance.started_at and known and (known.started_at or false) ~= advance.before then return true end
    end
    for _, pair in ipairs(changes.run_keys) do
        if not same_members(key('run_key', pair[1]), pair[2]) then return true end
    end
    return false
end

-- apply: the changes ---------------------------------------------------------------------------------------------

local ENDING = {'task_id', 'attempt', 'instance', 'status', 'run_at', 'finished_at', 'result', 'error', 'stacktrace',
    'excused', 'error_key'}
local INSERT = {'name', 'queue', 'priority', 'executor', 'source', 'status', 'attempt', 'instance', 'started_at',
    'max_attempts', 'created_at', 'run_at', 'arguments', 'tags', 'requeue', 'idempotency_key', 'retry_of', 'trace',
    'schedule', 'run_key'}

local function write(me, changes)
    for _, told in ipairs(changes.progress) do
        local task = load(told[1])
        if task and task.status == 'running' and task.attempt == told[2] and task.instance == me then
            task.progress = told[3]
            changed[told[1]] = true
        end
    end
    for _, ending in ipairs(changes.endings) do
        local task, values = load(ending[1]), {cancel_requested = 0}
        for at, column in ipairs(ENDING) do if at > 3 then values[column] = ending[at] end end
        if not values.run_at then values.run_at = task.run_at end
        change(ending[1], task, values)
    end
    for _, update in ipairs(changes.updates) do change(update[1], load(update[1]), update[3]) end
    for _, insert in ipairs(changes.inserts) do
        local id = insert[1]
        local task = {excused = 0, crashes = 0, finished_at = false, cancel_requested = 0, result = false, error = false,
            stacktrace = false, progress = false, revision = 1, events = {}}
        for at, column in ipairs(INSERT) do task[column] = insert[at + 1] end
        tasks[id], changed[id] = task, true
        file(id, task)
        place(id, task)
    end
    for _, kind in ipairs({'queues', 'schedules'}) do
        for _, pair in ipairs(changes[kind]) do
            local known = document(kind, pair[1]) or {}
            for column, value in pairs(pair[2]) do known[column] = value end
            redis.call('HSET', key(kind), pair[1], cmsgpack.pack(known))
        end
    end
    for _, advance in ipairs(changes.advances) do
        local known = document('schedules', advance.name)
        if known then
            for _, column in ipairs({'last_tick', 'next_tick', 'last_run', 'last_task_id', 'started_at'}) do
                known[column] = advance[column] or known[column]
            end
            redis.call('HSET', key('schedules'), advance.name, cmsgpack.pack(known))
        end
    end
    if #changes.revoked > 0 then
        redis.call('ZREMRANGEBYSCORE', key('revoked'), '-inf', number(changes.now))
        for _, pair in ipairs(changes.revoked) do redis.call('ZADD', key('revoked'), number(pair[2]), pair[1]) end
    end
    for _, row in ipairs(changes.counts) do count(unpack(row)) end
    for _, tally in ipairs(changes.groups) do regroup(tally) end
    for _, gauge in ipairs(changes.gauges) do
        local place, at, field, sums, goes_at, oldest = unpack(gauge)
        redis.call('HSET', key('gauge', place .. ':' .. at), field, sums)
        redis.call('ZADD', key('gauges', place), at, at)
        redis.call('ZREMRANGEBYSCORE', key('gauges', place), '-inf', '(' .. number(oldest))
        redis.call('EXPIREAT', key('gauge', place .. ':' .. at), number(goes_at))
    end
    reserve(#changes.events)
    for _, event in ipairs(changes.events) do tell(unpack(event)) end
    for _, line in ipairs(changes.logs) do
        local seq = redis.call('INCR', key('log_seq'))
        redis.call('XADD', key('logs', line[1]), number(seq) .. '-0', 'l', cmsgpack.pack(line))
    end
end

-- apply: claims, in the order of priority and time across names --------------------------------------------------

local function allowed(queue, most)
    local known = document('queues', queue)
    if not known then return most end
    if known.paused == 1 then return 0 end
    if known.concurrency then return math.min(most, known.concurrency - total(queue, 'running')) end
    return most
end

local function claim(me, now, wish)
    local heads, taken, slots, left = {}, {}, wish.slots, allowed(wish.queue, wish.most)
    local started = {}
    local function peek(name) heads[name] = redis.call('ZRANGE', key('ready', wish.queue, name), 0, 0)[1] end
    for name in pairs(wish.names) do peek(name) end
    while left > 0 do
        local first
        for name, head in pairs(heads) do
            if (slots[wish.names[name]] or 0) > 0 and (not first or head < heads[first]) then first = name end
        end
        if not first then break end
        local kind, id = wish.names[first], string.sub(heads[first], 27)
        local task = load(id)
        slots[kind], left = slots[kind] - 1, left - 1
        started[first] = (started[first] or 0) + 1
        change(id, task, {status = 'running', attempt = task.attempt + 1, instance = me, started_at = now,
            finished_at = false, progress = false, cancel_requested = 0})
        tell(id, now, 'started', task.attempt - 1, me, false, false)
        table.insert(taken, id)
        peek(first)
    end
    for name, n in pairs(started) do
        count(wish.queue, name, 'pending', -n)
        count(wish.queue, name, 'running', n)
    end
    return taken
end

-- apply: history -------------------------------------------------------------------------------------------------

local function forget(id, task)
    local events = task.events
    for _, packed in ipairs(redis.call('LRANGE', key('events', id), 0, -1)) do
        table.insert(events, cmsgpack.unpack(packed))
    end
    for _, event in ipairs(events) do  -- what people did to it stays
        if not event[6] then redis.call('XDEL', key('feed'), number(event[1]) .. '-0') end
    end
    if task.error_key then
        local dismissed = task.dismissed_at and 1 or 0
        regroup({error_key = task.error_key, open = dismissed - 1, dismissed = -dismissed})
    end
    unplace(id, task)
    unfile(id, task)
    redis.call('DEL', key('task', id), key('events', id), key('logs', id))
    count(task.queue, task.name, task.status, -1,
        task.started_at and task.finished_at and task.started_at - task.finished_at)
end

local function purge(before, limit)
    local deleted, left = 0, limit
    for _, status in ipairs({'success', 'failed', 'interrupted', 'cancelled', 'rejected'}) do
        local ids = redis.call('ZRANGEBYSCORE', key('status', status), '-inf', '(' .. number(before), 'LIMIT', 0, 250)
        for _, id in ipairs(ids) do
            if left <= 0 then return {deleted, true} end
            local task = load(id)
            if not task then
                redis.call('ZREM', key('status', status), id)
            elseif (task.finished_at or task.created_at) < before then
                local lines = redis.call('XLEN', key('logs', id))
                if lines > left then
                    redis.call('XTRIM', key('logs', id), 'MAXLEN', lines - left)
                    return {deleted, true}
                end
                left = left - 1 - lines - #task.events
                forget(id, task)
                deleted = deleted + 1
            end
        end
        if #ids == 250 and deleted > 0 then return {deleted, true} end
    end
    for _, group in ipairs(redis.call('ZRANGEBYSCORE', key('failures_empty'), '-inf', '(' .. number(before))) do
        redis.call('HDEL', key('failures'), group)
        redis.call('ZREM', key('failures_empty'), group)
    end
    for _, subject in ipairs(redis.call('SMEMBERS', key('subjects'))) do
        local oldest = redis.call('LINDEX', key('events', subject), 0)
        while oldest and cmsgpack.unpack(oldest)[2] < before and not cmsgpack.unpack(oldest)[6] do
            redis.call('LPOP', key('events', subject))
            oldest = redis.call('LINDEX', key('events', subject), 0)
        end
        if not oldest then redis.call('SREM', key('subjects'), subject) end
    end
    return {deleted, false}
end

local function apply(changes)
    local known = redis.call('GET', key('turn', changes.me))
    if known then
        known = cmsgpack.unpack(known)
        if known[1] == changes.turn_id and changes.turn_id ~= '' then return known[2] end
    end
    if is_stale(changes.me, changes) then return false end
    write(changes.me, changes)
    local claimed, purged = {}, {}
    for _, wish in ipairs(changes.wishes) do
        for _, id in ipairs(claim(changes.me, changes.now, wish)) do table.insert(claimed, id) end
    end
    save()
    changed = {}
    for _, item in ipairs(changes.purges) do table.insert(purged, purge(item[1], item[2])) end
    local answer = {shown(claimed), purged}
    if changes.remember then
        redis.call('SET', key('turn', changes.me), cmsgpack.pack({changes.turn_id, answer}), 'EX', 86400)
    end
    return answer
end

-- load: rows of another store, those that are not here yet ---------------------------------------------------------

local take = {}

local function newest(name)
    local entry = redis.call('XREVRANGE', name, '+', '-', 'COUNT', 1)[1]
    return entry and tonumber(string.match(entry[1], '^%d+')) or 0
end

local function append(name, seq, field, value)
    redis.call('XADD', name, number(seq) .. '-0', field, cmsgpack.pack(value))
end

local function go_behind(name, seq)
    if seq > tonumber(redis.call('GET', key(name)) or '0') then redis.call('SET', key(name), number(seq)) end
end

local function put_documents(name, rows)
    for _, row in ipairs(rows) do redis.call('HSET', key(name), row[1], cmsgpack.pack(row[2])) end
    return #rows
end

function take.queue(rows) return put_documents('queues', rows) end

function take.schedule(rows) return put_documents('schedules', rows) end

function take.failure(rows)
    for _, row in ipairs(rows) do list_group(row[1], row[2]) end
    return put_documents('failures', rows)
end

function take.revoked(rows)
    local added = 0
    for _, row in ipairs(rows) do added = added + redis.call('ZADD', key('revoked'), 'NX', number(row[2]), row[1]) end
    return added
end

function take.task(rows)
    local added = 0
    for _, row in ipairs(rows) do
        local id, task = row[1], {revision = 1, events = {}}
        if not load(id) then
            for at = 1, #COLUMNS - 4 do task[COLUMNS[at]] = row[at + 1] end
            task.error_key, task.dismissed_at = row[#COLUMNS - 2], row[#COLUMNS - 1]
            tasks[id], changed[id] = task, true
            file(id, task)
            place(id, task)
            count(task.queue, task.name, task.status, 1,
                task.started_at and task.finished_at and task.finished_at - task.started_at)
            added = added + 1
        end
    end
    return added
end

-- The events of a task, or of whatever else, by their numbers: they may come in any order.
local function merge(id, fresh)
    local task, all, known, added = load(id), {}, {}, 0
    for _, packed in ipairs(redis.call('LRANGE', key('events', id), 0, -1)) do
        table.insert(all, cmsgpack.unpack(packed))
    end
    for _, event in ipairs(task and task.events or {}) do table.insert(all, event) end
    for _, event in ipairs(all) do known[event[1]] = true end
    for _, event in ipairs(fresh) do
        if not known[event[1]] then
            table.insert(all, event)
            added = added + 1
        end
    end
    if added == 0 then return 0 end
    table.sort(all, function(one, other) return one[1] < other[1] end)
    redis.call('DEL', key('events', id))
    if task then
        task.events, changed[id] = all, true
    else
        for _, event in ipairs(all) do redis.call('RPUSH', key('events', id), cmsgpack.pack(event)) end
        redis.call('SADD', key('subjects'), id)
    end
    return added
end

-- The feed begins with what happens next: only events that are kept nowhere else go there.
function take.event(rows)
    local fresh, added, last = {}, 0, 0
    local acts, news = newest(key('audit')), newest(key('feed'))
    for _, row in ipairs(rows) do
        local id, event = row[1], row[2]
        local seq, actor = event[1], event[6]
        last = math.max(last, seq)
        if id ~= '' then
            fresh[id] = fresh[id] or {}
            table.insert(fresh[id], event)
        elseif seq > news then
            append(key('feed'), seq, 'e', row)
            news, added = seq, added + 1
        end
        if actor and seq > acts then
            append(key('audit'), seq, 'e', row)
            acts = seq
        end
    end
    for id, events in pairs(fresh) do added = added + merge(id, events) end
    go_behind('seq', last)
    return added
end

function take.log(rows)
    local newest_of, added, last = {}, 0, 0
    for _, row in ipairs(rows) do
        local seq, line = row[1], row[2]
        local name = key('logs', line[1])
        newest_of[name] = newest_of[name] or newest(name)
        if seq > newest_of[name] then
            append(name, seq, 'l', line)
            newest_of[name], added = seq, added + 1
        end
        last = math.max(last, seq)
    end
    go_behind('log_seq', last)
    return added
end

local function load_rows(wanted)
    local added = take[wanted.kind](wanted.rows)
    save()
    return added
end

-- find: down one sorted set, those that of each other part of a filter some set holds, too ------------------------

local function find(wanted)
    local read = redis.call('ZREVRANGEBYSCORE', key(wanted.name), wanted.high, wanted.low, 'WITHSCORES',
        'LIMIT', wanted.skip, wanted.most)
    local ids, times, last, same = {}, {}, read[#read - 1], 0
    for at = 1, #read, 2 do
        table.insert(ids, read[at])
        times[read[at]] = read[at + 1]
        if read[at + 1] == read[#read] then same = same + 1 end
    end
    for _, names in ipairs(wanted.others) do
        local kept = {}
        for _, name in ipairs(#ids > 0 and names or {}) do
            for at, held in ipairs(redis.call('ZMSCORE', key(name), unpack(ids))) do
                if held then table.insert(kept, ids[at]) end
            end
        end
        ids = kept
    end
    local found = {}
    for _, id in ipairs(ids) do table.insert(found, {times[id], id}) end
    return {#read / 2, same, last and {times[last], last} or false, found}
end

-- index: tasks of before there were indexes that there are now; another call goes on where this one ended -----------

local function index(wanted)
    local name = key('name', wanted.name)
    local ids = redis.call('ZRANGEBYSCORE', name, '(' .. number(wanted.after), '+inf', 'LIMIT', 0, wanted.most)
    if #ids == 0 then return false end
    local last = redis.call('ZSCORE', name, ids[#ids])
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', name, last, last)) do table.insert(ids, id) end  -- of one moment
    for _, id in ipairs(ids) do
        local packed = redis.call('GET', key('task', id))
        local cells = packed and cmsgpack.unpack(packed)
        if cells then file_tags(id, {tags = cells[PLACE.tags], created_at = cells[PLACE.created_at]}) end
    end
    return last
end

-- instances ------------------------------------------------------------------------------------------------------

local function beat(row)
    local known = document('instances', row.instance_id)
    if known and row.beat_at >= known.beat_at - 999 and row.beat_at <= known.beat_at then row.beat_at = known.beat_at + 1 end
    redis.call('HSET', key('instances'), row.instance_id, cmsgpack.pack(row))
    return true
end

local function leave(wanted)
    local mine = document('instances', wanted.instance_id)
    if mine and not wanted.stamp then
        mine.lease_until = 0
        redis.call('HSET', key('instances'), wanted.instance_id, cmsgpack.pack(mine))
    end
    local rows = redis.call('HGETALL', key('instances'))
    for at = 1, #rows, 2 do
        local row = cmsgpack.unpack(rows[at + 1])
        local gone = row.lease_until == 0 or (rows[at] == wanted.instance_id and row.beat_at == wanted.stamp)
        if gone and redis.call('SISMEMBER', key('runners'), rows[at]) == 0 then
            redis.call('HDEL', key('instances'), rows[at])
        end
    end
    return true
end

local functions = {look = look, apply = apply, load = load_rows, find = find, index = index, beat = beat, leave = leave}
return cmsgpack.pack(functions[ARGV[1]](cmsgpack.unpack(ARGV[2])))
