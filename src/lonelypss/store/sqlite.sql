-- Everything that sqlite.py says to the database. Migrations run once, in the order of their
-- numbers, and are never edited after a release.

-- name: migration_1
CREATE TABLE subscriptions (
    -- AUTOINCREMENT: an id that was handed out never means another row
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind INTEGER NOT NULL CHECK (kind IN (0, 1)),
    pattern BLOB NOT NULL,
    url TEXT NOT NULL,
    recovery TEXT,
    -- of a glob: the glob version that its last change made
    version INTEGER NOT NULL DEFAULT 0,
    UNIQUE (kind, pattern, url)
);
CREATE INDEX subscriptions_of_url ON subscriptions (url, kind, pattern);
CREATE INDEX globs_by_version ON subscriptions (version) WHERE kind = 1;

-- Every change of a glob row makes a new glob version. The triggers see to it, so that whoever
-- edits the table, with the sqlite3 shell too, cannot leave a broadcaster with an old index.
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('glob_version', 0), ('glob_history', 10000);
-- Deleted globs of the newest `glob_history` versions.
CREATE TABLE dropped_globs (version INTEGER PRIMARY KEY, subscription_id INTEGER NOT NULL);

CREATE TRIGGER glob_added AFTER INSERT ON subscriptions WHEN NEW.kind = 1 BEGIN
    UPDATE meta SET value = value + 1 WHERE key = 'glob_version';
    UPDATE subscriptions SET version = (SELECT value FROM meta WHERE key = 'glob_version')
    WHERE id = NEW.id;
END;
CREATE TRIGGER glob_changed AFTER UPDATE OF pattern, url, recovery ON subscriptions
WHEN NEW.kind = 1 BEGIN
    UPDATE meta SET value = value + 1 WHERE key = 'glob_version';
    UPDATE subscriptions SET version = (SELECT value FROM meta WHERE key = 'glob_version')
    WHERE id = NEW.id;
END;
CREATE TRIGGER glob_dropped AFTER DELETE ON subscriptions WHEN OLD.kind = 1 BEGIN
    UPDATE meta SET value = value + 1 WHERE key = 'glob_version';
    INSERT INTO dropped_globs SELECT value, OLD.id FROM meta WHERE key = 'glob_version';
    DELETE FROM dropped_globs WHERE version <=
        (SELECT value FROM meta WHERE key = 'glob_version')
        - (SELECT value FROM meta WHERE key = 'glob_history');
END;

CREATE TABLE missed (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription_id INTEGER NOT NULL REFERENCES subscriptions ON DELETE CASCADE,
    topic BLOB NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL,
    lease_until REAL NOT NULL DEFAULT 0,
    generation INTEGER NOT NULL DEFAULT 1,
    UNIQUE (subscription_id, topic)
);
CREATE INDEX missed_by_time ON missed (max(due, lease_until), due);
CREATE TRIGGER recovery_removed AFTER UPDATE OF recovery ON subscriptions
WHEN NEW.recovery IS NULL BEGIN
    DELETE FROM missed WHERE subscription_id = NEW.id;
END;

-- name: migration_2
CREATE TABLE peers (url TEXT PRIMARY KEY, alive_until REAL NOT NULL) WITHOUT ROWID;

-- name: migration_3
-- Who is subscribed: to how much, and when there was the last sign of life. Broadcasters are not
-- here, `peers` is for them. Triggers count, so that whoever edits the tables cannot forget to.
CREATE TABLE subscribers (
    url TEXT PRIMARY KEY,
    subscriptions INTEGER NOT NULL,
    seen REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),
    address TEXT AS (lower(substr(url, 1, instr(url, '://') + 1 + instr(replace(replace(
        substr(url, instr(url, '://') + 3), '?', '/'), '#', '/') || '/', '/')))) VIRTUAL,
    origin TEXT AS (CASE
        WHEN address GLOB 'http://*:80' THEN substr(address, 1, length(address) - 3)
        WHEN address GLOB 'https://*:443' THEN substr(address, 1, length(address) - 4)
        ELSE address END) STORED
) WITHOUT ROWID;
CREATE INDEX subscribers_by_seen ON subscribers (seen);
CREATE TABLE origins (origin TEXT PRIMARY KEY, subscriptions INTEGER NOT NULL) WITHOUT ROWID;
-- unix milliseconds: since when, and until when, somebody looks after signs of life
INSERT INTO meta VALUES ('leases_since', 0), ('leases_kept', 0);

CREATE TRIGGER subscriber_added AFTER INSERT ON subscribers BEGIN
    INSERT INTO origins VALUES (NEW.origin, NEW.subscriptions)
    ON CONFLICT (origin) DO UPDATE SET subscriptions = subscriptions + excluded.subscriptions;
END;
CREATE TRIGGER subscriber_counted AFTER UPDATE OF subscriptions ON subscribers BEGIN
    UPDATE origins SET subscriptions = subscriptions + NEW.subscriptions - OLD.subscriptions
    WHERE origin = NEW.origin;
END;
CREATE TRIGGER subscriber_gone AFTER DELETE ON subscribers BEGIN
    UPDATE origins SET subscriptions = subscriptions - OLD.subscriptions
    WHERE origin = OLD.origin;
    DELETE FROM origins WHERE origin = OLD.origin AND subscriptions <= 0;
END;
CREATE TRIGGER subscription_added AFTER INSERT ON subscriptions
WHEN NOT EXISTS (SELECT 1 FROM peers WHERE url = NEW.url) BEGIN
    INSERT INTO subscribers (url, subscriptions) VALUES (NEW.url, 1)
    ON CONFLICT (url) DO UPDATE SET subscriptions = subscriptions + 1;
END;
CREATE TRIGGER subscription_removed AFTER DELETE ON subscriptions BEGIN
    UPDATE subscribers SET subscriptions = subscriptions - 1 WHERE url = OLD.url;
    DELETE FROM subscribers WHERE url = OLD.url AND subscriptions <= 0;
END;
CREATE TRIGGER subscription_moved AFTER UPDATE OF url ON subscriptions BEGIN
    UPDATE subscribers SET subscriptions = subscriptions - 1 WHERE url = OLD.url;
    DELETE FROM subscribers WHERE url = OLD.url AND subscriptions <= 0;
    INSERT INTO subscribers (url, subscriptions)
    SELECT NEW.url, 1 WHERE NEW.url NOT IN (SELECT url FROM peers)
    ON CONFLICT (url) DO UPDATE SET subscriptions = subscriptions + 1;
END;
CREATE TRIGGER peer_added AFTER INSERT ON peers BEGIN
    DELETE FROM subscribers WHERE url = NEW.url;
END;
INSERT INTO subscribers (url, subscriptions)
SELECT url, count(*) FROM subscriptions WHERE url NOT IN (SELECT url FROM peers) GROUP BY url;

-- name: migration_4
-- Changes whenever what a topic matches may have changed, and not when notices and leases do.
INSERT INTO meta VALUES ('subscriptions_version', 0);
CREATE TRIGGER subscriptions_version_added AFTER INSERT ON subscriptions BEGIN
    UPDATE meta SET value = value + 1 WHERE key = 'subscriptions_version';
END;
CREATE TRIGGER subscriptions_version_changed AFTER UPDATE OF kind, pattern, url, recovery
ON subscriptions BEGIN
    UPDATE meta SET value = value + 1 WHERE key = 'subscriptions_version';
END;
CREATE TRIGGER subscriptions_version_removed AFTER DELETE ON subscriptions BEGIN
    UPDATE meta SET value = value + 1 WHERE key = 'subscriptions_version';
END;

-- name: subscriptions_version
SELECT value FROM meta WHERE key = 'subscriptions_version';

-- name: match
-- One statement is one snapshot: the glob version is that of the moment of the exact rows. It
-- stands in every row, and there is at least one.
SELECT meta.value, s.id, s.url, s.recovery
FROM meta LEFT JOIN subscriptions AS s ON s.kind = 0 AND s.pattern = ?
WHERE meta.key = 'glob_version' ORDER BY s.url LIMIT ?;

-- name: match_more
SELECT id, url, recovery FROM subscriptions WHERE kind = 0 AND pattern = ? AND url > ?
ORDER BY url LIMIT ?;

-- name: glob_version
SELECT version.value, history.value FROM meta AS version, meta AS history
WHERE version.key = 'glob_version' AND history.key = 'glob_history';

-- name: all_globs
SELECT id, pattern, url, recovery, version FROM subscriptions INDEXED BY globs_by_version
WHERE kind = 1 AND version > ? ORDER BY version LIMIT ?;

-- name: changed_globs
-- without statistics SQLite would look at all globs
SELECT id, pattern, url, recovery FROM subscriptions INDEXED BY globs_by_version
WHERE kind = 1 AND version > ?;

-- name: dropped_globs
-- no pattern: the row is gone
SELECT subscription_id, NULL, NULL, NULL FROM dropped_globs WHERE version > ?;

-- name: subscribe
INSERT INTO subscriptions (kind, pattern, url, recovery) VALUES (?, ?, ?, ?)
ON CONFLICT DO NOTHING;

-- name: add_many
-- as many rows as there are
INSERT INTO subscriptions (kind, pattern, url, recovery) VALUES {} ON CONFLICT DO NOTHING;

-- name: unsubscribe
DELETE FROM subscriptions WHERE kind = ? AND pattern = ? AND url = ?;

-- name: subscriptions
SELECT id, kind, pattern, url, recovery FROM subscriptions WHERE url = ? ORDER BY kind, pattern;

-- name: change_recovery
UPDATE subscriptions SET recovery = ? WHERE id = ?;

-- name: drop
DELETE FROM subscriptions WHERE id IN (SELECT value FROM json_each(?));

-- name: record_missed
INSERT INTO missed (subscription_id, topic, due)
SELECT id, ?, ? FROM subscriptions WHERE id = ? AND recovery IS NOT NULL
ON CONFLICT (subscription_id, topic)
DO UPDATE SET generation = generation + 1, due = min(due, excluded.due)
WHERE NOT (due <= excluded.due AND lease_until = 0 AND (generation > 1 OR attempts > 0));

-- name: is_announced
-- such a note stays as it is
SELECT 1 FROM missed WHERE topic = ? AND due <= ? AND subscription_id = ?
AND lease_until = 0 AND (generation > 1 OR attempts > 0);

-- name: clear_missed
DELETE FROM missed WHERE subscription_id = ? AND topic = ?
AND generation = 1 AND attempts = 0 AND lease_until = 0;

-- name: claim_missed
UPDATE missed SET lease_until = ? WHERE id IN (
    SELECT id FROM missed WHERE max(due, lease_until) <= ?
    ORDER BY max(due, lease_until), due LIMIT ?
) RETURNING due, id, generation, subscription_id,
    (SELECT recovery FROM subscriptions WHERE subscriptions.id = subscription_id), topic, attempts,
    (SELECT url FROM subscriptions WHERE subscriptions.id = subscription_id);

-- name: finish_missed
DELETE FROM missed WHERE id = ? AND generation = ? AND lease_until <> 0;

-- name: renew_missed
UPDATE missed SET attempts = 0, due = ?, lease_until = 0 WHERE id = ?;

-- name: retry_missed
UPDATE missed SET attempts = CASE generation WHEN ? THEN attempts + 1 ELSE 0 END,
    due = ?, lease_until = 0
WHERE id = ?;

-- name: postpone_missed
UPDATE missed SET due = ?, lease_until = 0 WHERE id = ?;

-- name: next_due
SELECT max(due, lease_until) FROM missed ORDER BY max(due, lease_until) LIMIT 1;

-- name: peer_alive
SELECT 1 FROM peers WHERE url = ? AND alive_until > ?;

-- name: renew_peer
INSERT INTO peers (url, alive_until) VALUES (?, ?)
ON CONFLICT (url) DO UPDATE SET alive_until = excluded.alive_until;

-- name: remove_peer
DELETE FROM peers WHERE url = ?;

-- name: drop_of_url
DELETE FROM subscriptions WHERE url = ?;

-- name: drop_of_dead_peers
DELETE FROM subscriptions WHERE url IN (SELECT url FROM peers WHERE alive_until <= ?)
RETURNING url;

-- name: forget_dead_peers
DELETE FROM peers WHERE alive_until <= ?;

-- name: counted
SELECT u.subscriptions, o.subscriptions
FROM subscribers AS u JOIN origins AS o ON o.origin = u.origin WHERE u.url = ?;

-- name: renew_lease
UPDATE subscribers SET seen = max(seen, ?) WHERE url = ?;

-- name: leases
SELECT since.value, kept.value FROM meta AS since, meta AS kept
WHERE since.key = 'leases_since' AND kept.key = 'leases_kept';

-- name: begin_leases
UPDATE meta SET value = ? WHERE key = 'leases_since';

-- name: keep_leases
UPDATE meta SET value = ? WHERE key = 'leases_kept';

-- name: stale_subscribers
SELECT url, subscriptions FROM subscribers AS u WHERE seen <= ? AND NOT EXISTS (
    SELECT 1 FROM subscriptions AS s JOIN missed AS m ON m.subscription_id = s.id
    WHERE s.url = u.url
) ORDER BY seen LIMIT ?;

-- name: counts
SELECT (SELECT count(*) FROM subscriptions WHERE kind = 0),
    (SELECT count(*) FROM subscriptions WHERE kind = 1), (SELECT count(*) FROM missed);
