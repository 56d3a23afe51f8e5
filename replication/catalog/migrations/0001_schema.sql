-- Version 1 of what Quorate keeps in a database.
--
-- Two schemas. "quorate" holds state; pg_dump -N quorate leaves it out.
-- "quorate_fence" holds only the functions that the triggers and event triggers
-- call. pg_dump has no way to leave event triggers out, so these functions go
-- along with a dump, and do nothing where "quorate" is missing.
--
-- Names are qualified everywhere, and operators resolve in pg_catalog: each
-- function either has its own search_path or, where its cost counts, spells the
-- operator out.

-- A dump that was restored here may have brought these along; they would look
-- for functions that are not there yet.
DROP EVENT TRIGGER IF EXISTS quorate_ddl_start, quorate_ddl_drop, quorate_table_rewrite, quorate_ddl_end, quorate_ddl_end_capture;

CREATE SCHEMA quorate;
CREATE SCHEMA IF NOT EXISTS quorate_fence;
GRANT USAGE ON SCHEMA quorate, quorate_fence TO PUBLIC;

------------------------------------------------------------------- state

CREATE TABLE quorate.version (
    version      integer PRIMARY KEY,
    installed_at timestamptz NOT NULL DEFAULT now()
);

-- Which cluster, region and life of the database this is. ddl_key tells the
-- DDL messages of the event trigger from those that any user can emit.
CREATE TABLE quorate.identity (
    only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    cluster_id  text NOT NULL,
    region      text NOT NULL,
    shard       text NOT NULL,
    incarnation bigint NOT NULL DEFAULT 0, -- 64 bits, to be read as unsigned; 0: none yet
    ddl_key     bytea NOT NULL DEFAULT decode(
        replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex')
);

-- Settings made by ALTER SYSTEM, for uninstall to reset.
CREATE TABLE quorate.system_setting (name text PRIMARY KEY);

-- The newest ballot that opened or closed each shard's fence. Logged, so that
-- an older one is refused also after a crash.
CREATE TABLE quorate.fence_ballot (
    shard   text PRIMARY KEY,
    counter bigint NOT NULL,
    replica bigint NOT NULL
);

-- A shard is open for writes while its row is here. Not MVCC and not crash-safe
-- on purpose: opened by INSERT (older snapshots do not see it), closed by
-- TRUNCATE (which waits for whoever passed, and which older snapshots do see),
-- empty after a crash (unlogged), void after a clean restart (postmaster_start).
-- No index: every writing statement looks here, and a scan of one page is the
-- cheapest plan only as long as there is no other. open_fence keeps rows unique.
CREATE UNLOGGED TABLE quorate.open (
    shard            text NOT NULL,
    counter          bigint NOT NULL,
    replica          bigint NOT NULL,
    postmaster_start timestamptz NOT NULL
);

-- What the sidecar last published about each shard; the views read it.
CREATE UNLOGGED TABLE quorate.published (
    shard text PRIMARY KEY,
    at    timestamptz NOT NULL,
    state jsonb NOT NULL
) WITH (fillfactor = 50);

-- The shared log as rows of many entries each: one row a second, not one a
-- transaction.
CREATE UNLOGGED TABLE quorate.log_batch (
    shard      text NOT NULL,
    first_slot bigint NOT NULL,
    last_slot  bigint NOT NULL,
    written    timestamptz NOT NULL DEFAULT clock_timestamp(),
    packed     jsonb NOT NULL,
    PRIMARY KEY (shard, first_slot)
);

REVOKE ALL ON ALL TABLES IN SCHEMA quorate FROM PUBLIC;
GRANT SELECT ON quorate.open, quorate.published, quorate.log_batch, quorate.version TO PUBLIC;

------------------------------------------------------------------- fence

-- shard names the shard of this database.
CREATE FUNCTION quorate.shard() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$ SELECT i.shard FROM quorate.identity i $$;

-- make_fence writes the function behind the fence of this database's shard: a
-- BEFORE statement trigger, ENABLE ALWAYS, on every table and partition. The
-- hot path is one cached plan over one row, as the caller; all else is in
-- quorate.refuse. The shard is a literal, since a parameter costs half as much
-- again. The plan's ACCESS SHARE on quorate.open lasts to the end of the
-- transaction, and that is what closing waits for.
CREATE FUNCTION quorate.make_fence() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $make$
BEGIN
    EXECUTE format($create$
CREATE OR REPLACE FUNCTION quorate_fence.fence() RETURNS trigger LANGUAGE plpgsql AS $fence$
BEGIN
    IF pg_catalog.to_regclass('quorate.open') IS NULL THEN
        RETURN NULL; -- restored outside a cluster
    END IF;
    PERFORM FROM quorate.open o
      WHERE o.shard OPERATOR(pg_catalog.=) %1$L
        AND o.postmaster_start OPERATOR(pg_catalog.=) pg_catalog.pg_postmaster_start_time();
    IF NOT FOUND THEN
        PERFORM quorate.refuse(%1$L, TG_OP);
    END IF;
    RETURN NULL;
END
$fence$ $create$, quorate.shard());
END $make$;

-- leader names the region that leads a shard, null if none is known.
CREATE FUNCTION quorate.leader(shard text DEFAULT 'main') RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS
$$ SELECT nullif(p.state->>'leader', '') FROM quorate.published p WHERE p.shard = leader.shard $$;

-- refuse raises 25006 unless the session replays. It runs as its owner, since
-- asking for the session's origin is a superuser's right. Replay is known by
-- its origin and not by session_replication_role, which any bulk loader sets.
CREATE FUNCTION quorate.refuse(shard text, command text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    leads text := quorate.leader(shard);
    here  text := (SELECT i.region FROM quorate.identity i);
BEGIN
    IF pg_replication_origin_session_is_setup() THEN
        RETURN;
    END IF;
    RAISE EXCEPTION USING
        ERRCODE = '25006',
        MESSAGE = format('cannot execute %s: region %s does not take writes of shard %s', command, here, shard),
        HINT = CASE
            WHEN leads IS NULL THEN format('No leader of shard %s is known at the moment; try again shortly.', shard)
            WHEN leads = here THEN format('Region %s leads shard %s, but is not open for this transaction: start a new one.', here, shard)
            ELSE format('The leader of shard %s is region %s.', shard, leads) END;
END $$;

-- unfenced lists the tables that must have a fence and have none in full force.
CREATE VIEW quorate.unfenced AS
    SELECT c.oid AS relation
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'quorate') AND n.nspname NOT LIKE 'pg\_toast%'
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t
                        WHERE t.tgrelid = c.oid AND t.tgname = 'quorate_fence' AND t.tgenabled = 'A' AND t.tgisinternal
                          AND t.tgfoid = pg_catalog.to_regprocedure('quorate_fence.fence()'));

-- protect gives a table its fence, if it needs one.
CREATE FUNCTION quorate.protect(relation oid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET client_min_messages = warning AS $$
DECLARE
    name text := relation::regclass::text;
BEGIN
    IF NOT EXISTS (SELECT FROM quorate.unfenced u WHERE u.relation = protect.relation) THEN
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = relation AND t.tgname = 'quorate_fence'
                      AND t.tgisinternal AND t.tgfoid = to_regprocedure('quorate_fence.fence()')) THEN
        EXECUTE format('DROP TRIGGER IF EXISTS quorate_fence ON %s', name);
        EXECUTE format('CREATE TRIGGER quorate_fence BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s '
            'FOR EACH STATEMENT EXECUTE FUNCTION quorate_fence.fence()', name);
        -- As a foreign key's triggers: no dump and no tool that compares schemas
        -- sees it, so a dump restores anywhere, into this database too.
        UPDATE pg_trigger t SET tgisinternal = true WHERE t.tgrelid = relation AND t.tgname = 'quorate_fence';
    END IF;
    EXECUTE format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER quorate_fence', name);
END $$;

-- protect_all does so for every table that lacks one.
CREATE FUNCTION quorate.protect_all() RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$ SELECT count(*) FROM (SELECT quorate.protect(u.relation) FROM quorate.unfenced u OFFSET 0) s $$;

REVOKE ALL ON quorate.unfenced FROM PUBLIC;
REVOKE ALL ON FUNCTION quorate.make_fence(), quorate.protect(oid), quorate.protect_all() FROM PUBLIC;

-- open_fence and close_fence are the two ways a fence moves. Both carry a
-- ballot, and return false where a newer one has been here. Equal ballots pass:
-- they are of one leadership, whose sidecar calls one after the other.
CREATE FUNCTION quorate.claim_fence(shard text, counter bigint, replica bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO quorate.fence_ballot AS b VALUES (shard, counter, replica)
    ON CONFLICT ON CONSTRAINT fence_ballot_pkey DO UPDATE
       SET counter = excluded.counter, replica = excluded.replica
     WHERE (b.counter, b.replica) <= (excluded.counter, excluded.replica);
    RETURN FOUND;
END $$;

CREATE FUNCTION quorate.open_fence(shard text, counter bigint, replica bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET synchronous_commit = local AS $$
BEGIN
    IF NOT quorate.claim_fence(shard, counter, replica) THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT FROM quorate.open o WHERE (o.shard, o.counter, o.replica, o.postmaster_start)
                 = (open_fence.shard, open_fence.counter, open_fence.replica, pg_postmaster_start_time())) THEN
        RETURN true;
    END IF;
    -- A row of an older ballot would let its snapshots pass: only a new file will do.
    PERFORM quorate.empty_fence(shard);
    INSERT INTO quorate.open VALUES (shard, counter, replica, pg_postmaster_start_time());
    RETURN true;
END $$;

CREATE FUNCTION quorate.close_fence(shard text, counter bigint, replica bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET synchronous_commit = local AS $$
BEGIN
    IF NOT quorate.claim_fence(shard, counter, replica) THEN
        RETURN false;
    END IF;
    PERFORM quorate.empty_fence(shard);
    RETURN true;
END $$;

-- empty_fence truncates, and puts the rows of other shards back: their older
-- snapshots are refused too and must be taken anew.
CREATE FUNCTION quorate.empty_fence(shard text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    others quorate.open[];
BEGIN
    LOCK TABLE quorate.open IN ACCESS EXCLUSIVE MODE;
    others := array(SELECT o FROM quorate.open o WHERE o.shard <> empty_fence.shard);
    TRUNCATE quorate.open;
    INSERT INTO quorate.open SELECT * FROM unnest(others);
END $$;

REVOKE ALL ON FUNCTION quorate.claim_fence(text, bigint, bigint), quorate.open_fence(text, bigint, bigint),
    quorate.close_fence(text, bigint, bigint), quorate.empty_fence(text) FROM PUBLIC;

--------------------------------------------------------------------- DDL

-- split cuts a query string into its statements as the server's own parser
-- would: quotes, dollar quotes, nested comments, parentheses (rules) and the
-- bodies of BEGIN ATOMIC hold semicolons that end nothing. bare is the
-- statement with comments and the insides of quotes left out, for looking at
-- keywords.
CREATE FUNCTION quorate.split(query text) RETURNS TABLE (statement text, bare text)
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $split$
DECLARE
    size    integer := length(query);
    here    integer := 1;  -- where to look on
    begun   integer := 1;  -- of the statement
    copied  integer := 1;  -- up to where bare has been filled
    spot    integer;
    past    integer;
    nesting integer;
    parens  integer := 0;
    blocks  integer := 0;  -- BEGIN ATOMIC and CASE still open
    mark    text;
    word    text;
BEGIN
    bare := '';
    LOOP
        spot := regexp_instr(query, $re$['"$;()]|--|/\*|\m(?:begin|case|end)\M$re$, here, 1, 0, 'i');
        IF spot = 0 THEN
            spot := size + 1;
        END IF;
        mark := substr(query, spot, 1);
        past := spot + 1;
        word := '';
        CASE
        WHEN mark = '''' AND substr(query, spot - 1, 1) IN ('e', 'E')
             AND (spot = 2 OR substr(query, spot - 2, 1) !~ '[[:alnum:]_$]') THEN
            past := regexp_instr(query, $re$'(?:[^'\\]|\\.)*'$re$, spot, 1, 1);
            word := '''''';
        WHEN mark IN ('''', '"') THEN
            past := spot + 1 + strpos(substr(query, spot + 1), mark);
            IF past = spot + 1 THEN
                past := 0;
            END IF;
            word := CASE mark WHEN '"' THEN substr(query, spot, CASE WHEN past = 0 THEN 1 ELSE past - spot END) ELSE '''''' END;
        WHEN mark = '$' THEN
            word := substring(substr(query, spot, 66) FROM '^\$(?:[[:alpha:]_][[:alnum:]_]*)?\$');
            IF word IS NULL OR spot > 1 AND substr(query, spot - 1, 1) ~ '[[:alnum:]_$]' THEN
                word := '$'; -- a parameter, or part of a name
            ELSE
                past := strpos(substr(query, spot + length(word)), word);
                past := CASE past WHEN 0 THEN 0 ELSE spot + length(word) + past - 1 + length(word) END;
                word := '''''';
            END IF;
        WHEN mark = '-' THEN
            past := regexp_instr(query, '[\n\r]', spot);
            word := ' ';
        WHEN mark = '/' THEN
            nesting := 1;
            past := spot + 2;
            WHILE nesting > 0 AND past > 0 LOOP
                past := regexp_instr(query, '/\*|\*/', past, 1, 1);
                IF past > 0 THEN
                    nesting := nesting + CASE substr(query, past - 2, 2) WHEN '/*' THEN 1 ELSE -1 END;
                END IF;
            END LOOP;
            word := ' ';
        WHEN mark = '(' THEN
            parens := parens + 1;
            word := mark;
        WHEN mark = ')' THEN
            parens := greatest(parens - 1, 0);
            word := mark;
        WHEN lower(mark) IN ('b', 'c', 'e') THEN
            word := substring(substr(query, spot, 5) FROM '^[[:alpha:]]+');
            past := spot + length(word);
            IF bare || substr(query, copied, spot - copied) ~* '^\s*create\s+(?:or\s+replace\s+)?(?:function|procedure)\M' THEN
                CASE lower(word)
                WHEN 'begin' THEN
                    IF substr(query, past) ~* '^\s+atomic\M' THEN
                        blocks := blocks + 1;
                    END IF;
                WHEN 'case' THEN
                    blocks := blocks + CASE WHEN blocks > 0 THEN 1 ELSE 0 END;
                ELSE
                    blocks := greatest(blocks - 1, 0);
                END CASE;
            END IF;
        ELSE
            NULL; -- a semicolon, or the end
        END CASE;
        bare := bare || substr(query, copied, spot - copied) || word;
        IF past = 0 THEN
            past := size + 1; -- unterminated: to the end
        END IF;
        IF spot > size OR mark = ';' AND parens = 0 AND blocks = 0 THEN
            statement := btrim(substr(query, begun, least(spot, size + 1) - begun), E' \t\n\r');
            bare := btrim(bare, E' \t\n\r');
            IF bare <> '' THEN
                RETURN NEXT;
            END IF;
            EXIT WHEN spot > size;
            bare := '';
            begun := past;
        ELSIF mark = ';' THEN
            bare := bare || ';';
        END IF;
        copied := past;
        here := past;
        IF here > size THEN
            -- One more round, with nothing found, returns what is left.
            here := size + 1;
        END IF;
    END LOOP;
END $split$;

-- has_tag tells whether a bare statement is one of this command tag.
CREATE FUNCTION quorate.has_tag(bare text, tag text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    words text := upper(regexp_replace(bare, '\s+', ' ', 'g'));
    outer_words text;
BEGIN
    IF tag = 'SELECT INTO' THEN
        RETURN words ~ '^[( ]*(SELECT|WITH)\M.*\mINTO\M';
    END IF;
    IF tag IN ('GRANT', 'REVOKE', 'COMMENT', 'SECURITY LABEL') THEN
        -- Memberships and what belongs to the whole server fire no event trigger.
        RETURN words ~ ('^' || tag || '\M.*\mON\M')
           AND words !~ '\mON (?:DATABASE|TABLESPACE|ROLE|PARAMETER)\M';
    END IF;
    words := regexp_replace(words, '^CREATE (?:(?:OR REPLACE|GLOBAL|LOCAL|TEMP|TEMPORARY|UNLOGGED|UNIQUE|TRUSTED|PROCEDURAL|RECURSIVE|CONSTRAINT|DEFAULT) )*', 'CREATE ');
    IF words ~ '^CREATE TABLE\M' THEN
        -- Outside parentheses, AS can only be the query's.
        LOOP
            outer_words := words;
            words := regexp_replace(words, '\([^()]*\)', ' ', 'g');
            EXIT WHEN words = outer_words;
        END LOOP;
        RETURN tag = CASE WHEN words ~ '\mAS\M' THEN 'CREATE TABLE AS' ELSE 'CREATE TABLE' END;
    END IF;
    RETURN words ~ ('^' || tag || '\M') AND NOT (tag LIKE '% OPERATOR' AND words ~ '^\w+ OPERATOR (CLASS|FAMILY)\M');
END $$;

-- this_statement finds the text of the DDL command that fired the event
-- trigger. context is PG_CONTEXT without the trigger's own lines: empty for a
-- command that the client sent, else its innermost line quotes the command.
CREATE FUNCTION quorate.this_statement(tag text, context text) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    query   text := current_query();
    nested  boolean := context <> '';
    batch   text;
    fields  text[];
    nth     integer;
    found   text[];
    reverts boolean;
BEGIN
    IF nested THEN
        query := substring(context FROM '^SQL statement "(.*)$');
        IF query IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = '0A000',
                MESSAGE = format('cannot replicate %s from here', tag),
                DETAIL = format('The text of the command is not known; it runs within: %s', split_part(context, E'\n', 1)),
                HINT = 'Send the command by itself, or from a function in PL/pgSQL.';
        END IF;
        query := CASE strpos(query, E'"\nPL/') WHEN 0 THEN regexp_replace(query, '"[^"]*$', '')
                 ELSE left(query, strpos(query, E'"\nPL/') - 1) END;
    END IF;
    SELECT array_agg(s.statement) FILTER (WHERE quorate.has_tag(s.bare, tag)),
           coalesce(bool_or(s.bare ~* '^(rollback|abort|reset\s+all|discard)\M'), false) AND count(*) > 1
      INTO found, reverts
      FROM quorate.split(query) s;
    IF NOT nested THEN
        -- Which of several in one query string: counted in a setting, which a
        -- rollback among them would turn back.
        batch := 'quorate.nth_' || lower(replace(tag, ' ', '_'));
        fields := string_to_array(current_setting(batch, true), ' ');
        nth := CASE WHEN fields[1] = extract(epoch FROM statement_timestamp())::text THEN fields[2]::integer + 1 ELSE 1 END;
        PERFORM set_config(batch, extract(epoch FROM statement_timestamp())::text || ' ' || nth, false);
    END IF;
    IF cardinality(found) = 1 THEN
        RETURN found[1];
    ELSIF cardinality(found) >= nth AND NOT reverts AND NOT nested THEN
        RETURN found[nth];
    END IF;
    RAISE EXCEPTION USING ERRCODE = '0A000',
        MESSAGE = format('cannot replicate this %s: which of several statements it is cannot be told', tag),
        HINT = 'Send each command in a query string of its own.';
END $$;

-- without_concurrently takes CONCURRENTLY out of a command that cannot run with
-- it inside the transaction that replays.
CREATE FUNCTION quorate.without_concurrently(tag text, statement text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    gap    text := '(?:\s|--[^\n]*\n|/\*(?:[^*]|\*[^/])*\*/)+';
    before text;
BEGIN
    before := CASE tag
        WHEN 'CREATE INDEX' THEN 'create' || gap || '(?:unique' || gap || ')?index' || gap
        WHEN 'DROP INDEX' THEN 'drop' || gap || 'index' || gap
        END;
    IF before IS NOT NULL THEN
        RETURN regexp_replace(statement, '^((?:' || gap || ')?' || before || ')concurrently\M', '\1', 'i');
    END IF;
    RETURN statement;
END $$;

-- varying tells whether an expression of the catalog can have another value
-- when it is evaluated again elsewhere.
CREATE FUNCTION quorate.varying(expression pg_node_tree) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT expression::text ~ '\{(SQLVALUEFUNCTION|NEXTVALUEEXPR)\M'
        OR EXISTS (SELECT FROM regexp_matches(expression::text, ':(?:funcid|opfuncid) (\d+)', 'g') f
                     JOIN pg_proc p ON p.oid = f[1]::oid WHERE p.provolatile <> 'i')
$$;

-- is_replay tells whether the session replays the log.
CREATE FUNCTION quorate.is_replay() RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$ SELECT pg_replication_origin_session_is_setup() $$;

-- is_bookkeeping tells whether the sidecar changes what is its own.
CREATE FUNCTION quorate.is_bookkeeping() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(current_setting('quorate.bookkeeping', true), '') = 'on'
       AND (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = session_user)
$$;

-- refuse_ddl refuses DDL where the shard is not open.
CREATE FUNCTION quorate.refuse_ddl(tag text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    home text := quorate.shard();
BEGIN
    IF NOT EXISTS (SELECT FROM quorate.open o
                    WHERE o.shard = home AND o.postmaster_start = pg_postmaster_start_time()) THEN
        PERFORM quorate.refuse(home, tag);
    END IF;
END $$;

CREATE FUNCTION quorate.refuse_ours() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = 'cannot change what Quorate installed',
        HINT = 'quorate uninstall removes it.';
END $$;

-- ddl_start refuses early, before locks and work, what surely is not about
-- temporary objects; ddl_end refuses the rest, when the objects are known.
CREATE FUNCTION quorate.ddl_start(tag text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF quorate.is_bookkeeping() OR tag = 'REINDEX' THEN
        RETURN; -- from 17 on REINDEX is an event; it is each region's own affair
    END IF;
    IF tag ~ '^(DROP|ALTER) ' AND current_query() ~* '\m(drop|alter)\M.*\mquorate(_fence)?\M' AND tag <> 'ALTER TABLE' THEN
        -- Afterwards it is too late: what would refuse it is gone.
        PERFORM quorate.refuse_ours();
    END IF;
    IF tag = 'ALTER TABLE' AND current_query() ~* '\mdetach\M.*\mconcurrently\M' THEN
        -- Its first half commits before ddl_end, and it leaves a constraint
        -- behind that DETACH by itself does not make.
        RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = 'cannot replicate DETACH PARTITION CONCURRENTLY',
            HINT = 'Use DETACH PARTITION without CONCURRENTLY.';
    END IF;
    IF tag IN ('CREATE EXTENSION', 'ALTER EXTENSION') THEN
        PERFORM set_config('quorate.in_extension', 'on', true);
    END IF;
    IF pg_my_temp_schema() = 0 AND current_query() !~* '\m(temp|temporary|pg_temp)\M' THEN
        PERFORM quorate.refuse_ddl(tag);
    END IF;
END $$;

-- ddl_drop notes for ddl_end whether the command dropped lasting objects ('l'),
-- temporary ones ('t'), our own ('q').
CREATE FUNCTION quorate.ddl_drop() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lc_messages = 'C' AS $$
DECLARE
    kinds   text;
    context text;
BEGIN
    GET DIAGNOSTICS context = PG_CONTEXT;
    IF context ~ '\nPL/pgSQL function quorate\.protect\(oid\) line ' THEN
        RETURN;
    END IF;
    SELECT string_agg(DISTINCT CASE
               WHEN d.is_temporary THEN 't'
               WHEN d.schema_name IN ('quorate', 'quorate_fence')
                 OR d.object_type IN ('schema', 'publication', 'event trigger') AND d.object_name LIKE 'quorate%' THEN 'q'
               ELSE 'l' END, '')
      INTO kinds FROM pg_event_trigger_dropped_objects() d WHERE d.original;
    IF EXISTS (SELECT FROM pg_event_trigger_dropped_objects() d
                WHERE d.original AND d.object_type = 'trigger' AND d.address_names[3] = 'quorate_fence')
       AND NOT quorate.is_bookkeeping() AND NOT quorate.is_replay() THEN
        RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = 'cannot drop the fence of a table of a Quorate database',
            HINT = 'quorate uninstall removes everything that Quorate installed.';
    END IF;
    PERFORM set_config('quorate.dropped', coalesce(current_setting('quorate.dropped', true), '') || coalesce(kinds, ''), true);
END $$;

-- refuse_rewrite refuses the rewrites of a table that fill it differently in
-- each region.
CREATE FUNCTION quorate.refuse_rewrite(relation oid, reason integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (SELECT c.relpersistence = 't' FROM pg_class c WHERE c.oid = relation)
       OR quorate.is_replay() OR quorate.is_bookkeeping() THEN
        RETURN;
    END IF;
    IF reason & 1 <> 0 THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('cannot replicate SET LOGGED or SET UNLOGGED of table %s', relation::regclass),
            HINT = 'Create a new table and copy the rows with INSERT … SELECT.';
    END IF;
    IF reason & 2 <> 0 AND pg_relation_size(relation) > 0 THEN
        PERFORM quorate.refuse_varying_columns(relation);
    END IF;
    IF reason & 4 <> 0 AND pg_relation_size(relation) > 0 THEN
        PERFORM set_config('quorate.retyped', 'on', true);
    END IF;
END $$;

-- refuse_varying_columns refuses a column added in this transaction whose
-- existing rows got a value that another region would not get.
CREATE FUNCTION quorate.refuse_varying_columns(relation oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    col text;
BEGIN
    SELECT format('%I of table %s', a.attname, a.attrelid::regclass) INTO col
      FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped
       AND a.xmin::text::bigint >= (pg_current_xact_id()::text::bigint & 4294967295)
       AND (a.attidentity <> '' OR a.attgenerated = '' AND quorate.varying(d.adbin));
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('cannot replicate the new column %s: its default gives the rows another value in each region', col),
            HINT = 'Add the column without a default, then ALTER COLUMN SET DEFAULT, then UPDATE the rows.';
    END IF;
END $$;

-- ddl_end captures the command as a message within its transaction. caller has
-- the role and the settings under which it ran. Only the event trigger may call
-- it: what it writes is replayed as the role that it names.
CREATE FUNCTION quorate.ddl_end(tag text, caller jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lc_messages = 'C' AS $ddl_end$
DECLARE
    context  text;
    dropped  text := coalesce(current_setting('quorate.dropped', true), '');
    retyped  boolean := coalesce(current_setting('quorate.retyped', true), '') = 'on';
    objects  jsonb;
    lasting  boolean;
    temps    boolean;
    ours     boolean;
    text_of  text;
    bare_of  text;
    content  text;
    tables   oid[];
    relation oid;
BEGIN
    GET DIAGNOSTICS context = PG_CONTEXT;
    IF context ~ '\nPL/pgSQL function quorate\.protect\(oid\) line ' OR quorate.is_bookkeeping() OR tag = 'REINDEX' THEN
        RETURN;
    END IF;
    PERFORM set_config('quorate.dropped', '', true), set_config('quorate.retyped', '', true);
    context := coalesce(substring(context FROM '\nPL/pgSQL function quorate_fence\.ddl_end_capture\(\) line \d+ at PERFORM(?:\n(.*))?$'), '');
    IF tag IN ('CREATE EXTENSION', 'ALTER EXTENSION') THEN
        PERFORM set_config('quorate.in_extension', '', true);
    ELSIF coalesce(current_setting('quorate.in_extension', true), '') = 'on' THEN
        RETURN; -- the script of an extension: it runs again where the extension is created
    END IF;

    SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_object('type', c.object_type, 'identity', c.object_identity)), '[]'),
           coalesce(bool_or(c.kind = 'l'), false), coalesce(bool_or(c.kind = 't'), false), coalesce(bool_or(c.kind = 'q'), false),
           array_agg(DISTINCT c.objid) FILTER (WHERE c.object_type = 'table')
      INTO objects, lasting, temps, ours, tables
      FROM (SELECT d.*, CASE
                WHEN d.schema_name = 'pg_temp' OR d.object_identity ~ '\mpg_temp\.' THEN 't'
                WHEN d.schema_name IN ('quorate', 'quorate_fence') THEN 'q'
                ELSE 'l' END AS kind
              FROM pg_event_trigger_ddl_commands() d) c;
    lasting := lasting OR dropped ~ 'l';
    temps := temps OR dropped ~ 't';
    ours := ours OR dropped ~ 'q';

    -- New tables get their fence at once, here and under replay; one that was
    -- switched off comes back.
    FOREACH relation IN ARRAY coalesce(tables, '{}') LOOP
        PERFORM quorate.protect(relation);
    END LOOP;
    IF tag IN ('CREATE SCHEMA', 'CREATE EXTENSION', 'ALTER EXTENSION') THEN
        PERFORM quorate.protect_all();
    END IF;
    IF quorate.is_replay() THEN
        RETURN;
    END IF;
    IF ours THEN
        PERFORM quorate.refuse_ours();
    END IF;
    text_of := quorate.this_statement(tag, context); -- counts, so also for what is then left out
    IF NOT lasting AND (temps OR tag LIKE 'DROP %' AND tag <> 'DROP OWNED'
                        OR tag ~ '^(CREATE|ALTER) ' AND text_of ~* '\mif\s+(not\s+)?exists\M') THEN
        RETURN; -- temporary objects, and what IF EXISTS and IF NOT EXISTS left undone
    END IF;
    PERFORM quorate.refuse_ddl(tag);
    IF temps AND tag LIKE 'DROP %' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = format('cannot replicate %s of temporary and lasting objects together', tag),
            HINT = 'Drop the temporary ones in a command of their own.';
    END IF;
    IF tag IN ('CREATE SUBSCRIPTION', 'ALTER SUBSCRIPTION', 'IMPORT FOREIGN SCHEMA')
       OR tag IN ('CREATE TABLE AS', 'SELECT INTO') AND text_of !~* '\mwith\s+no\s+data\s*$' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = format('cannot replicate %s', tag),
            HINT = CASE WHEN tag IN ('CREATE TABLE AS', 'SELECT INTO')
                THEN 'Create the table first (CREATE TABLE … AS … WITH NO DATA, or with its columns), then INSERT … SELECT.'
                ELSE 'It would act in every region; there is no way to carry it.' END;
    END IF;
    IF tag IN ('CREATE TABLE', 'ALTER TABLE') AND text_of ~* $re$'\s*(now|today|tomorrow|yesterday)\s*'$re$ AND EXISTS (
        SELECT FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum JOIN pg_type t ON t.oid = a.atttypid
         WHERE d.adrelid = ANY (tables) AND t.typcategory = 'D' AND NOT quorate.varying(d.adbin)) THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'cannot replicate a default such as ''now'' or ''today'': it is the time of this command, another in each region',
            HINT = 'Use now() or CURRENT_DATE, which are looked at for each row.';
    END IF;
    IF tag = 'CREATE TABLE' AND pg_my_temp_schema() <> 0 AND EXISTS (
        SELECT FROM quorate.split(text_of) s, regexp_matches(s.bare, '\mlike\s+("[^"]+"|[[:alnum:]_$.]+)', 'gi') f
          JOIN pg_class c ON c.oid = to_regclass(f[1]) AND c.relpersistence = 't') THEN
        RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = 'cannot replicate CREATE TABLE … LIKE a temporary table',
            HINT = 'Name the columns; the temporary table is in no other region.';
    END IF;
    IF tag = 'ALTER TABLE' THEN
        FOR relation IN
            WITH RECURSIVE family(relation) AS (
                SELECT unnest(tables) UNION SELECT i.inhrelid FROM pg_inherits i JOIN family f ON i.inhparent = f.relation)
            SELECT f.relation FROM family f JOIN pg_class c ON c.oid = f.relation
             WHERE c.relkind = 'r' AND pg_relation_size(c.oid) > 0
               AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.atthasmissing)
        LOOP
            PERFORM quorate.refuse_varying_columns(relation);
        END LOOP;
        IF retyped THEN
            bare_of := (SELECT s.bare FROM quorate.split(text_of) s);
            IF substring(bare_of FROM '(?i)\musing\M(.*)$') ~* '\m(current_(date|time|timestamp|user|role|catalog|schema)|localtime|localtimestamp|session_user|user)\M'
               OR EXISTS (SELECT FROM regexp_matches(substring(bare_of FROM '(?i)\musing\M(.*)$'), '([[:alpha:]_][[:alnum:]_$]*)"?\s*\(', 'g') f
                            JOIN pg_proc p ON p.proname = lower(f[1]) WHERE p.provolatile <> 'i'
                             AND p.proname NOT IN ('to_timestamp', 'to_date', 'to_char', 'to_number', 'concat', 'concat_ws', 'format', 'date_part', 'date_trunc', 'timezone', 'to_json', 'to_jsonb')) THEN
                RAISE EXCEPTION USING ERRCODE = '0A000',
                    MESSAGE = 'cannot replicate a change of type whose USING may give another value in each region',
                    HINT = 'Use immutable functions only, or add a column, UPDATE it and rename it.';
            END IF;
        END IF;
    END IF;
    text_of := quorate.without_concurrently(tag, text_of);
    content := (caller || jsonb_build_object('version', 1, 'tag', tag, 'statement', text_of, 'objects', objects))::text;
    PERFORM pg_logical_emit_message(true, 'quorate.ddl', '{"mac": "'
        || encode(sha256((SELECT i.ddl_key FROM quorate.identity i) || sha256((SELECT i.ddl_key FROM quorate.identity i) || convert_to(content, 'UTF8'))), 'hex')
        || '", ' || substr(content, 2));
END $ddl_end$;
REVOKE ALL ON FUNCTION quorate.ddl_end(text, jsonb) FROM PUBLIC;

-- What the event triggers call. They run as the caller, whose role, search_path
-- and settings are what replay needs, and do nothing outside a cluster.
CREATE OR REPLACE FUNCTION quorate_fence.ddl_start() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_catalog.to_regclass('quorate.open') IS NOT NULL THEN
        PERFORM quorate.ddl_start(TG_TAG);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION quorate_fence.ddl_drop() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_catalog.to_regclass('quorate.open') IS NOT NULL THEN
        PERFORM quorate.ddl_drop();
    END IF;
END $$;

CREATE OR REPLACE FUNCTION quorate_fence.table_rewrite() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_catalog.to_regclass('quorate.open') IS NOT NULL THEN
        PERFORM quorate.refuse_rewrite(pg_catalog.pg_event_trigger_table_rewrite_oid(), pg_catalog.pg_event_trigger_table_rewrite_reason());
    END IF;
END $$;

-- ddl_end only notes who runs the command and how, as its caller: right after
-- it, ddl_end_capture does the rest as its owner, and nobody can call either of
-- them or come between.
CREATE OR REPLACE FUNCTION quorate_fence.ddl_end() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('quorate.caller', pg_catalog.jsonb_build_object('role', current_user::text, 'settings',
        pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object(
            'search_path', pg_catalog.current_setting('search_path'),
            'DateStyle', pg_catalog.current_setting('DateStyle'),
            'IntervalStyle', pg_catalog.current_setting('IntervalStyle'),
            'TimeZone', pg_catalog.current_setting('TimeZone'),
            'standard_conforming_strings', pg_catalog.current_setting('standard_conforming_strings'),
            'check_function_bodies', pg_catalog.current_setting('check_function_bodies'),
            'transform_null_equals', pg_catalog.current_setting('transform_null_equals'),
            'xmloption', pg_catalog.current_setting('xmloption'),
            'default_tablespace', pg_catalog.current_setting('default_tablespace'),
            'default_table_access_method', pg_catalog.current_setting('default_table_access_method'),
            'default_toast_compression', pg_catalog.current_setting('default_toast_compression', true))))::text, true);
END $$;

CREATE OR REPLACE FUNCTION quorate_fence.ddl_end_capture() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lc_messages = 'C' AS $$
BEGIN
    IF to_regclass('quorate.open') IS NOT NULL THEN
        PERFORM quorate.ddl_end(TG_TAG, current_setting('quorate.caller')::jsonb);
    END IF;
END $$;

---------------------------------------------------------------- SQL face

CREATE VIEW quorate.status AS
    SELECT p.shard, s.region, s.role, s.leader, s.ballot, s.lease_left_seconds, s.chosen, s.applied,
           s.lag_slots, s.lag_seconds, s.health, s.synchronous, s.durability_regions, p.at AS published_at
      FROM quorate.published p, LATERAL jsonb_to_record(p.state) AS s(
           region text, role text, leader text, ballot text, lease_left_seconds double precision, chosen bigint,
           applied bigint, lag_slots bigint, lag_seconds double precision, health text, synchronous boolean, durability_regions integer);

CREATE VIEW quorate.regions AS
    SELECT p.shard, r.region, r.kind, r.role, r.chosen, r.applied, r.lag_slots, r.lag_seconds, r.health, r.last_heard, p.at AS published_at
      FROM quorate.published p, LATERAL jsonb_to_recordset(p.state->'regions') AS r(
           region text, kind text, role text, chosen bigint, applied bigint, lag_slots bigint, lag_seconds double precision,
           health text, last_heard timestamptz);

CREATE VIEW quorate.lag AS
    SELECT r.shard, r.region, r.lag_slots, r.lag_seconds, r.published_at FROM quorate.regions r;

CREATE VIEW quorate.log AS
    SELECT b.shard, e.slot, e.transaction, e."time", e.region, e.tables, e.rows, e.bytes, e.trace
      FROM quorate.log_batch b, LATERAL jsonb_to_recordset(b.packed) AS e(
           slot bigint, transaction bigint, "time" timestamptz, region text, tables text[], rows bigint, bytes bigint, trace text);

GRANT SELECT ON quorate.status, quorate.regions, quorate.lag, quorate.log TO PUBLIC;

-- applied_slot returns the slot up to which everything is visible here, as last
-- published. The origin's own progress is not used: it runs ahead of
-- visibility, does not count no-ops, and stands still on the leader.
CREATE FUNCTION quorate.applied_slot(shard text DEFAULT 'main') RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS
$$ SELECT (p.state->>'applied')::bigint FROM quorate.published p WHERE p.shard = applied_slot.shard $$;

-- trace gives the running transaction a W3C trace context as its parent.
CREATE FUNCTION quorate.trace(traceparent text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF traceparent IS NULL OR traceparent !~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$'
       OR substr(traceparent, 4, 32) = repeat('0', 32) OR substr(traceparent, 37, 16) = repeat('0', 16) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = format('%L is not a W3C traceparent', traceparent),
            HINT = 'It looks like 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.';
    END IF;
    PERFORM pg_logical_emit_message(true, 'traceparent', traceparent);
END $$;

-- prune_log keeps the newest batches within an age and a size.
CREATE FUNCTION quorate.prune_log(age interval, bytes bigint) RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    WITH kept AS (
        SELECT b.ctid AS at, b.written, sum(pg_column_size(b.packed)) OVER (ORDER BY b.written DESC, b.first_slot DESC) AS total
          FROM quorate.log_batch b),
    gone AS (
        DELETE FROM quorate.log_batch b USING kept k
         WHERE b.ctid = k.at AND (k.written < clock_timestamp() - age OR k.total > bytes) RETURNING 1)
    SELECT count(*) FROM gone
$$;
REVOKE ALL ON FUNCTION quorate.prune_log(interval, bigint) FROM PUBLIC;

----------------------------------------------------------- event triggers

CREATE EVENT TRIGGER quorate_ddl_start ON ddl_command_start EXECUTE FUNCTION quorate_fence.ddl_start();
CREATE EVENT TRIGGER quorate_ddl_drop ON sql_drop EXECUTE FUNCTION quorate_fence.ddl_drop();
CREATE EVENT TRIGGER quorate_table_rewrite ON table_rewrite EXECUTE FUNCTION quorate_fence.table_rewrite();
-- Those of one event fire in the order of their names.
CREATE EVENT TRIGGER quorate_ddl_end ON ddl_command_end EXECUTE FUNCTION quorate_fence.ddl_end();
CREATE EVENT TRIGGER quorate_ddl_end_capture ON ddl_command_end EXECUTE FUNCTION quorate_fence.ddl_end_capture();
ALTER EVENT TRIGGER quorate_ddl_start ENABLE ALWAYS;
ALTER EVENT TRIGGER quorate_ddl_drop ENABLE ALWAYS;
ALTER EVENT TRIGGER quorate_table_rewrite ENABLE ALWAYS;
ALTER EVENT TRIGGER quorate_ddl_end ENABLE ALWAYS;
ALTER EVENT TRIGGER quorate_ddl_end_capture ENABLE ALWAYS;
