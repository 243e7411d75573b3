-- Everything that postgres.py says to the database. Migrations run once, in the order of their
-- numbers, and are never edited after a release.

-- name: migration_1
CREATE TABLE lonelyps_meta (key text PRIMARY KEY, value bigint NOT NULL);
INSERT INTO lonelyps_meta VALUES ('schema', 0), ('glob_version', 0), ('glob_history', 10000);

-- Urls are bytes, too: text cannot hold everything that is legal in them. Patterns and urls may be
-- longer than an index row, so that their hashes are indexed.
CREATE TABLE lonelyps_subscriptions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind smallint NOT NULL CHECK (kind IN (0, 1)),
    pattern bytea NOT NULL,
    url bytea NOT NULL,
    recovery bytea,
    -- of a glob: the glob version that its last change made
    version bigint NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX lonelyps_subscriptions_key
ON lonelyps_subscriptions (sha256(pattern), sha256(url), kind);
CREATE INDEX lonelyps_subscriptions_of_url ON lonelyps_subscriptions (sha256(url));
CREATE INDEX lonelyps_globs_by_version ON lonelyps_subscriptions (version) WHERE kind = 1;

-- Deleted globs of the newest `glob_history` versions.
CREATE TABLE lonelyps_dropped_globs (
    version bigint, subscription_id bigint, PRIMARY KEY (version, subscription_id)
);

-- Each transaction that changes globs makes one new version. Whoever makes one holds the row of the
-- counter until the commit, so that versions become visible in their order: who has seen a version
-- has seen all before it. The triggers see to it, so that whoever edits the table, with psql too,
-- cannot leave a broadcaster with an old index.
CREATE FUNCTION lonelyps_next_glob_version() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    made bigint := nullif(current_setting('lonelyps.glob_version', true), '')::bigint;
BEGIN
    IF made IS NULL THEN
        UPDATE lonelyps_meta SET value = value + 1 WHERE key = 'glob_version'
        RETURNING value INTO made;
        PERFORM set_config('lonelyps.glob_version', made::text, true);
        DELETE FROM lonelyps_dropped_globs WHERE version <= made
            - (SELECT value FROM lonelyps_meta WHERE key = 'glob_history');
    END IF;
    RETURN made;
END $$;
CREATE FUNCTION lonelyps_glob_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO lonelyps_dropped_globs VALUES (lonelyps_next_glob_version(), OLD.id);
        RETURN OLD;
    END IF;
    NEW.version := lonelyps_next_glob_version();
    RETURN NEW;
END $$;
CREATE TRIGGER lonelyps_glob_added BEFORE INSERT ON lonelyps_subscriptions
FOR EACH ROW WHEN (NEW.kind = 1) EXECUTE FUNCTION lonelyps_glob_changes();
CREATE TRIGGER lonelyps_glob_changed BEFORE UPDATE OF pattern, url, recovery
ON lonelyps_subscriptions
FOR EACH ROW WHEN (NEW.kind = 1) EXECUTE FUNCTION lonelyps_glob_changes();
CREATE TRIGGER lonelyps_glob_dropped BEFORE DELETE ON lonelyps_subscriptions
FOR EACH ROW WHEN (OLD.kind = 1) EXECUTE FUNCTION lonelyps_glob_changes();

CREATE TABLE lonelyps_missed (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subscription_id bigint NOT NULL REFERENCES lonelyps_subscriptions ON DELETE CASCADE,
    topic bytea NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    due float8 NOT NULL,
    lease_until float8 NOT NULL DEFAULT 0,
    generation bigint NOT NULL DEFAULT 1
);
CREATE UNIQUE INDEX lonelyps_missed_key ON lonelyps_missed (subscription_id, sha256(topic));
CREATE INDEX lonelyps_missed_by_time ON lonelyps_missed (greatest(due, lease_until), due);
CREATE FUNCTION lonelyps_recovery_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM lonelyps_missed WHERE subscription_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER lonelyps_recovery_removed AFTER UPDATE OF recovery ON lonelyps_subscriptions
FOR EACH ROW WHEN (NEW.recovery IS NULL) EXECUTE FUNCTION lonelyps_recovery_removed();

CREATE TABLE lonelyps_peers (url bytea PRIMARY KEY, alive_until float8 NOT NULL);

-- name: migration_2
-- Signatures that were accepted, in order of time, so that what is written together lies together
-- and goes together. The memory is complete from the stamp of the one row without a code, exclusive,
-- to `replay_horizon`, inclusive; what is stamped outside is not accepted. After a crash the server
-- empties the table, and that row is missing; then it begins anew where the horizon had been, which
-- is in a table that survives.
CREATE UNLOGGED TABLE lonelyps_used (stamp bigint, code bytea, PRIMARY KEY (stamp, code));
CREATE UNIQUE INDEX lonelyps_used_from ON lonelyps_used ((code = '')) WHERE code = '';
INSERT INTO lonelyps_meta VALUES ('replay_horizon', 0);

-- name: migration_3
-- so that all globs can be read in pages
CREATE INDEX lonelyps_globs_by_version_and_id ON lonelyps_subscriptions (version, id)
WHERE kind = 1;
DROP INDEX lonelyps_globs_by_version;

-- Who is subscribed: to how much, and when there was the last sign of life. Broadcasters are not
-- here, `lonelyps_peers` is for them.
CREATE TABLE lonelyps_subscribers (
    url bytea NOT NULL,
    origin text NOT NULL GENERATED ALWAYS AS (left(coalesce(regexp_replace(
        substring(lower(encode(url, 'escape')) from '^[a-z]+://[^/?#]*'),
        '^(http:.*):80$|^(https:.*):443$', '\1\2'), ''), 300)) STORED,
    subscriptions bigint NOT NULL,
    seen float8 NOT NULL DEFAULT extract(epoch FROM clock_timestamp())
);
CREATE UNIQUE INDEX lonelyps_subscribers_key ON lonelyps_subscribers (sha256(url));
CREATE INDEX lonelyps_subscribers_by_seen ON lonelyps_subscribers (seen);
CREATE TABLE lonelyps_origins (origin text PRIMARY KEY, subscriptions bigint NOT NULL);
-- unix milliseconds: since when, and until when, somebody looks after signs of life
INSERT INTO lonelyps_meta VALUES ('leases_since', 0), ('leases_kept', 0);

-- Triggers count, once for each statement, so that whoever edits the table cannot forget to. They
-- hold the rows of the counters until the commit: what they say is never out of date. Always in the
-- same order, so that two cannot wait for each other.
CREATE FUNCTION lonelyps_count() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    sign integer := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END;
BEGIN
    INSERT INTO lonelyps_subscribers AS u (url, subscriptions)
    SELECT c.url, sign * count(*) FROM changed AS c
    WHERE NOT EXISTS (SELECT FROM lonelyps_peers AS p WHERE p.url = c.url)
    GROUP BY c.url ORDER BY c.url
    ON CONFLICT (sha256(url)) DO UPDATE SET subscriptions = u.subscriptions + excluded.subscriptions;

    INSERT INTO lonelyps_origins AS o
    SELECT u.origin, sign * count(*) FROM changed AS c
    JOIN lonelyps_subscribers AS u ON sha256(u.url) = sha256(c.url)
    GROUP BY u.origin ORDER BY u.origin
    ON CONFLICT (origin) DO UPDATE SET subscriptions = o.subscriptions + excluded.subscriptions;

    IF sign < 0 THEN
        WITH gone AS (
            DELETE FROM lonelyps_subscribers WHERE subscriptions <= 0
            AND sha256(url) IN (SELECT sha256(c.url) FROM changed AS c) RETURNING origin
        )
        DELETE FROM lonelyps_origins
        WHERE subscriptions <= 0 AND origin IN (SELECT origin FROM gone);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER lonelyps_counted_in AFTER INSERT ON lonelyps_subscriptions
REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION lonelyps_count();
CREATE TRIGGER lonelyps_counted_out AFTER DELETE ON lonelyps_subscriptions
REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION lonelyps_count();

CREATE FUNCTION lonelyps_peer_added() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    gone lonelyps_subscribers;
BEGIN
    DELETE FROM lonelyps_subscribers WHERE sha256(url) = sha256(NEW.url) RETURNING * INTO gone;
    UPDATE lonelyps_origins SET subscriptions = subscriptions - gone.subscriptions
    WHERE origin = gone.origin;
    DELETE FROM lonelyps_origins WHERE origin = gone.origin AND subscriptions <= 0;
    RETURN NULL;
END $$;
CREATE TRIGGER lonelyps_peer_added AFTER INSERT ON lonelyps_peers
FOR EACH ROW EXECUTE FUNCTION lonelyps_peer_added();

-- Raises LP429 with the two counts if there are more than `per_url` or `per_origin`.
CREATE FUNCTION lonelyps_check_quotas(asked bytea, per_url bigint, per_origin bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    of_url bigint;
    of_origin bigint;
BEGIN
    SELECT u.subscriptions, o.subscriptions INTO of_url, of_origin
    FROM lonelyps_subscribers AS u JOIN lonelyps_origins AS o USING (origin)
    WHERE sha256(u.url) = sha256(asked);
    IF of_url > per_url OR of_origin > per_origin THEN
        RAISE EXCEPTION USING ERRCODE = 'LP429', MESSAGE = of_url || ' ' || of_origin;
    END IF;
END $$;
-- Looks first: an insert that is not done would all the same make a new version of the globs.
CREATE FUNCTION lonelyps_subscribe(
    a_kind smallint, a_pattern bytea, a_url bytea, a_recovery bytea,
    per_url bigint, per_origin bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO lonelyps_subscriptions (kind, pattern, url, recovery)
    SELECT a_kind, a_pattern, a_url, a_recovery WHERE NOT EXISTS (
        SELECT FROM lonelyps_subscriptions
        WHERE kind = a_kind AND sha256(pattern) = sha256(a_pattern) AND sha256(url) = sha256(a_url)
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM lonelyps_check_quotas(a_url, per_url, per_origin);
    RETURN true;
END $$;

INSERT INTO lonelyps_subscribers (url, subscriptions)
SELECT url, count(*) FROM lonelyps_subscriptions AS s
WHERE NOT EXISTS (SELECT FROM lonelyps_peers AS p WHERE p.url = s.url) GROUP BY url;
INSERT INTO lonelyps_origins
SELECT origin, sum(subscriptions) FROM lonelyps_subscribers GROUP BY origin;

-- name: schema
SELECT to_regclass('lonelyps_meta') IS NOT NULL;

-- name: schema_version
SELECT value FROM lonelyps_meta WHERE key = 'schema';

-- name: set_schema_version
UPDATE lonelyps_meta SET value = $1 WHERE key = 'schema';

-- name: match
-- One statement is one snapshot: the glob version is that of the moment of the exact rows. It
-- stands in every row, and there is at least one for each topic asked about.
SELECT asked.n, meta.value, s.id, s.url, s.recovery
FROM unnest($1::bytea[]) WITH ORDINALITY AS asked (topic, n)
JOIN lonelyps_meta AS meta ON meta.key = 'glob_version'
LEFT JOIN lonelyps_subscriptions AS s
    ON s.kind = 0 AND sha256(s.pattern) = sha256(asked.topic) AND s.pattern = asked.topic;

-- name: match_once
-- As match; and remembers the codes $3, stamped $2. Besides the rows of match, none if there are no
-- topics, comes one with n = 0 that tells from where to where the memory is complete, none if there
-- is no memory, and one with n < 0 for each code that is new.
WITH memory AS (
    SELECT u.stamp AS begins, m.value AS horizon FROM lonelyps_used AS u, lonelyps_meta AS m
    WHERE u.code = '' AND m.key = 'replay_horizon'
),
added AS (
    INSERT INTO lonelyps_used
    SELECT g.stamp, g.code FROM unnest($2::bigint[], $3::bytea[]) AS g (stamp, code), memory AS m
    WHERE g.stamp > m.begins AND g.stamp <= m.horizon
    -- in one order, so that two who add the same codes cannot wait for each other
    ORDER BY 1, 2 ON CONFLICT DO NOTHING RETURNING stamp, code
)
SELECT asked.n, meta.value, s.id, s.url, s.recovery
FROM unnest($1::bytea[]) WITH ORDINALITY AS asked (topic, n)
JOIN lonelyps_meta AS meta ON meta.key = 'glob_version'
LEFT JOIN lonelyps_subscriptions AS s
    ON s.kind = 0 AND sha256(s.pattern) = sha256(asked.topic) AND s.pattern = asked.topic
UNION ALL
SELECT 0, begins, horizon, NULL, NULL FROM memory
UNION ALL
SELECT -1, stamp, NULL, code, NULL FROM added;

-- name: extend_memory
-- Lets it hold stamps up to $1, and first begins it where there is none. Must survive a crash from
-- its commit on.
WITH horizon AS (
    SELECT value, CASE current_setting('synchronous_commit')
        WHEN 'off' THEN set_config('synchronous_commit', 'local', true) END
    FROM lonelyps_meta WHERE key = 'replay_horizon' FOR UPDATE
),
begun AS (
    INSERT INTO lonelyps_used SELECT value, '' FROM horizon
    WHERE NOT EXISTS (SELECT FROM lonelyps_used WHERE code = '')
    ON CONFLICT DO NOTHING
)
UPDATE lonelyps_meta AS m SET value = $1 FROM horizon
WHERE m.key = 'replay_horizon' AND m.value < $1;

-- name: shorten_memory
-- Forgets up to $2 of the codes stamped long before the beginning of the memory, and moves that to
-- $1 at most. In between lies a minute in which every question that does not know it yet has ended.
WITH memory AS (SELECT stamp FROM lonelyps_used WHERE code = ''),
gone AS (
    DELETE FROM lonelyps_used WHERE (stamp, code) IN (
        SELECT u.stamp, u.code FROM lonelyps_used AS u, memory
        WHERE u.code <> '' AND u.stamp <= memory.stamp - 60
        ORDER BY u.stamp LIMIT $2 FOR UPDATE OF u SKIP LOCKED
    ) RETURNING 1
),
moved AS (
    UPDATE lonelyps_used SET stamp = least($1, extract(epoch FROM clock_timestamp())::bigint - $3)
    WHERE code = '' AND stamp < least($1, extract(epoch FROM clock_timestamp())::bigint - $3)
)
SELECT count(*) FROM gone;

-- name: glob_changes
-- What has changed since version $1, or, where that is too long ago, $4 of all globs, those behind
-- ($2, $3). The first row tells the version, and which of the two it is.
WITH now AS (
    SELECT v.value AS version, $1 < v.value - h.value OR $1 > v.value OR $1 < 0 AS is_complete
    FROM lonelyps_meta AS v, lonelyps_meta AS h
    WHERE v.key = 'glob_version' AND h.key = 'glob_history'
)
SELECT version, is_complete, NULL::bigint AS id, NULL::bytea AS pattern, NULL::bytea AS url,
    NULL::bytea AS recovery FROM now
UNION ALL
SELECT d.version, NULL, d.subscription_id, NULL, NULL, NULL
FROM lonelyps_dropped_globs AS d, now WHERE NOT is_complete AND d.version > $1
UNION ALL
SELECT s.version, NULL, s.id, s.pattern, s.url, s.recovery
FROM lonelyps_subscriptions AS s, now WHERE NOT is_complete AND kind = 1 AND s.version > $1
UNION ALL
SELECT * FROM (
    SELECT s.version, NULL::boolean, s.id, s.pattern, s.url, s.recovery
    FROM lonelyps_subscriptions AS s
    WHERE kind = 1 AND (SELECT is_complete FROM now) AND (s.version, s.id) > ($2, $3)
    ORDER BY s.version, s.id LIMIT $4
) AS page
ORDER BY is_complete NULLS LAST, version, id;

-- name: subscribe
SELECT lonelyps_subscribe($1::smallint, $2, $3, $4, $5, $6);

-- name: unsubscribe
DELETE FROM lonelyps_subscriptions
WHERE kind = $1 AND sha256(pattern) = sha256($2) AND pattern = $2
AND sha256(url) = sha256($3) AND url = $3
RETURNING id;

-- name: subscriptions
SELECT id, kind, pattern, url, recovery FROM lonelyps_subscriptions
WHERE sha256(url) = sha256($1) AND url = $1 ORDER BY kind, pattern;

-- name: lock_url
-- whoever sets the subscriptions of one url waits for the others
SELECT pg_advisory_xact_lock(hashtextextended(encode(sha256($1), 'hex'), 7));

-- name: lock_globs
-- before any row, so that two who change globs cannot wait for each other
SELECT value FROM lonelyps_meta WHERE key = 'glob_version' FOR UPDATE;

-- name: add_many
INSERT INTO lonelyps_subscriptions (kind, pattern, url, recovery)
SELECT a.kind, a.pattern, $1, a.recovery
FROM unnest($2::smallint[], $3::bytea[], $4::bytea[]) AS a (kind, pattern, recovery)
ON CONFLICT (sha256(pattern), sha256(url), kind) DO UPDATE SET recovery = excluded.recovery;

-- name: check_quotas
SELECT lonelyps_check_quotas($1, $2, $3);

-- name: change_recovery
UPDATE lonelyps_subscriptions AS s SET recovery = c.recovery
FROM unnest($1::bigint[], $2::bytea[]) AS c (id, recovery) WHERE s.id = c.id;

-- name: drop
DELETE FROM lonelyps_subscriptions WHERE id = ANY ($1::bigint[]);

-- name: record_missed
INSERT INTO lonelyps_missed (subscription_id, topic, due)
SELECT s.id, m.topic, $3
FROM unnest($1::bigint[], $2::bytea[]) AS m (id, topic)
JOIN lonelyps_subscriptions AS s ON s.id = m.id AND s.recovery IS NOT NULL
ORDER BY s.id, m.topic
FOR KEY SHARE OF s
ON CONFLICT (subscription_id, sha256(topic)) DO UPDATE
SET generation = lonelyps_missed.generation + 1,
    due = least(lonelyps_missed.due, excluded.due)
WHERE NOT (
    lonelyps_missed.due <= excluded.due AND lonelyps_missed.lease_until = 0
    AND (lonelyps_missed.generation > 1 OR lonelyps_missed.attempts > 0)
);

-- name: clear_missed
DELETE FROM lonelyps_missed AS m
USING unnest($1::bigint[], $2::bytea[]) AS c (id, topic)
WHERE m.subscription_id = c.id AND sha256(m.topic) = sha256(c.topic) AND m.topic = c.topic
AND generation = 1 AND attempts = 0 AND lease_until = 0;

-- name: claim_missed
WITH due AS (
    SELECT id FROM lonelyps_missed WHERE greatest(due, lease_until) <= $2
    ORDER BY greatest(due, lease_until), due LIMIT $3 FOR UPDATE SKIP LOCKED
)
UPDATE lonelyps_missed AS m SET lease_until = $1
FROM due, lonelyps_subscriptions AS s
WHERE m.id = due.id AND s.id = m.subscription_id
RETURNING m.due, m.id, m.generation, m.subscription_id, s.recovery, m.topic, m.attempts, s.url;

-- name: finish_missed
WITH gone AS (
    DELETE FROM lonelyps_missed WHERE id = $1 AND generation = $2 AND lease_until <> 0 RETURNING id
)
UPDATE lonelyps_missed SET attempts = 0, due = $3, lease_until = 0
WHERE id = $1 AND (generation <> $2 OR lease_until = 0) AND NOT EXISTS (SELECT FROM gone);

-- name: retry_missed
UPDATE lonelyps_missed SET attempts = CASE generation WHEN $2 THEN attempts + 1 ELSE 0 END,
    due = $3, lease_until = 0
WHERE id = $1;

-- name: postpone_missed
UPDATE lonelyps_missed AS m SET due = n.due, lease_until = 0
FROM unnest($1::bigint[], $2::float8[]) AS n (id, due) WHERE m.id = n.id;

-- name: next_due
SELECT greatest(due, lease_until) FROM lonelyps_missed ORDER BY greatest(due, lease_until) LIMIT 1;

-- name: renew_peer
WITH before AS (SELECT alive_until FROM lonelyps_peers WHERE url = $1),
made AS (
    INSERT INTO lonelyps_peers (url, alive_until) VALUES ($1, $2)
    ON CONFLICT (url) DO UPDATE SET alive_until = excluded.alive_until
)
SELECT EXISTS (SELECT FROM before WHERE alive_until > $3);

-- name: drop_of_url
DELETE FROM lonelyps_subscriptions WHERE sha256(url) = sha256($1) AND url = $1;

-- name: remove_peer
DELETE FROM lonelyps_peers WHERE url = $1;

-- name: dead_peers
SELECT url FROM lonelyps_peers WHERE alive_until <= $1 LIMIT 1;

-- name: drop_of_dead_peers
DELETE FROM lonelyps_subscriptions WHERE id IN (
    SELECT s.id FROM lonelyps_peers AS p
    JOIN lonelyps_subscriptions AS s ON sha256(s.url) = sha256(p.url) AND s.url = p.url
    WHERE p.alive_until <= $1
) RETURNING url;

-- name: forget_dead_peers
DELETE FROM lonelyps_peers WHERE alive_until <= $1;

-- name: renew_leases
WITH mine AS (
    SELECT sha256(url) AS key FROM lonelyps_subscribers
    WHERE sha256(url) IN (SELECT sha256(u) FROM unnest($1::bytea[]) AS u) AND seen < $2
    ORDER BY url FOR NO KEY UPDATE
)
UPDATE lonelyps_subscribers SET seen = $2 WHERE sha256(url) IN (SELECT key FROM mine);

-- name: keep_leases
-- since when they are looked after: $1, unless somebody has done so until now
WITH kept AS (
    UPDATE lonelyps_meta AS k SET value = $2 FROM (
        SELECT value FROM lonelyps_meta WHERE key = 'leases_kept' FOR UPDATE
    ) AS before WHERE k.key = 'leases_kept' RETURNING before.value
)
UPDATE lonelyps_meta AS s SET value = CASE WHEN kept.value < $1 THEN $1 ELSE s.value END
FROM kept WHERE s.key = 'leases_since' RETURNING s.value;

-- name: stale_subscribers
SELECT url, subscriptions FROM lonelyps_subscribers AS u WHERE seen <= $1 AND NOT EXISTS (
    SELECT FROM lonelyps_subscriptions AS s JOIN lonelyps_missed AS m ON m.subscription_id = s.id
    WHERE sha256(s.url) = sha256(u.url)
) ORDER BY seen LIMIT $2 FOR UPDATE OF u SKIP LOCKED;

-- name: counts
SELECT (SELECT count(*) FROM lonelyps_subscriptions WHERE kind = 0) AS exact,
    (SELECT count(*) FROM lonelyps_subscriptions WHERE kind = 1) AS glob,
    (SELECT count(*) FROM lonelyps_missed) AS missed;

-- name: condition
SELECT extract(epoch FROM clock_timestamp())::float8 AS clock,
    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS can_create,
    pg_is_in_recovery() AS is_standby,
    current_setting('max_connections')::integer
        - current_setting('superuser_reserved_connections')::integer AS connections;

-- name: living_peers
SELECT url FROM lonelyps_peers WHERE alive_until > $1;
