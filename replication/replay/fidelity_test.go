package replay

import (
	"fmt"
	"testing"
)

// TestTypes carries every kind of type from insert to delete, and compares what
// both databases print, in batches of one transaction and of all.
func TestTypes(t *testing.T) {
	for name, identity := range map[string]string{"key": "DEFAULT", "whole row": "FULL"} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			pk := "PRIMARY KEY"
			if identity == "FULL" {
				pk = ""
			}
			p.both(
				`CREATE SCHEMA "Odd ""Name%s"`,
				`CREATE TYPE mood AS ENUM ('sad', 'it''s, "ok"\', 'NULL')`,
				`CREATE TYPE pt AS (x int, label text)`,
				`CREATE DOMAIN posint AS int CHECK (value > 0)`,
				`CREATE TYPE fr AS RANGE (subtype = float8)`,
				`CREATE TABLE "Odd ""Name%s"."T %s"" ü" (id int `+pk+`, b bool, i2 int2, i8 int8, n numeric, np numeric(12,3), f4 float4, f8 float8, m money,
					tx text, vc varchar(20), ch char(5), qc "char", nm name, by bytea, d date, tm time, tmz timetz, ts timestamp(3), tsz timestamptz, iv interval,
					u uuid, j json, jb jsonb, x xml, ine inet, ci cidr, ma macaddr, bi bit(5), vb varbit, pnt point, bx box, pth path, ply polygon, crc circle, lsg lseg, ln line,
					tsv tsvector, tsq tsquery, r int4range, mr int4multirange, nr numrange, fr fr, e mood, c pt, dm posint, ia int[], ta text[], ea mood[], ca pt[], ja jsonb[], da posint[],
					ba bytea[], bxa box[], lsn pg_lsn, xm xid8, snap pg_snapshot, oidv oidvector, "Weird ""col%d" text)`,
				`ALTER TABLE "Odd ""Name%s"."T %s"" ü" REPLICA IDENTITY `+identity,
			)
			tab := `"Odd ""Name%s"."T %s"" ü"`
			all := ` SELECT g, g%2=0, g, g*10000000000, 'NaN', g+0.125, 'infinity', 1e-300*g, 12.34, E'tab\t nl\n bs\\ q"'' {} \r é 漢', 'vc  ', 'ab', 'x', 'name', '\x00ff0a5c', '2024-02-29', '23:59:59.999999',
					'12:00+05:30', '2024-01-01 00:00:00.123', '294276-12-31 23:59:59.999999+00', '1 year 2 mons -3 days 04:05:06.789', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{"a" :  1, "a":2}', '{"k":[1.10,null]}',
					'<a>b</a>', '10.1.2.3/8', '10.0.0.0/8', '08:00:2b:01:02:03', B'10101', B'1', '(1.5,-2)', '(3,4),(1,2)', '[(0,0),(1,1)]', '((0,0),(1,1),(2,0))', '<(1,2),3>', '[(0,0),(1,1)]', '{1,2,3}',
					'a:1A b', 'a & !b', '[1,5)', '{[1,3),[7,9)}', '(,5.5]', '[1.5,2.5]', 'it''s, "ok"\', row(1, 'a,"b"\')::pt, 7, '{1,NULL,3}', ARRAY['', 'NULL', NULL, 'a,b', '{"x"}', 'back\slash'], ARRAY['sad','NULL']::mood[], ARRAY[row(1,'x y')::pt, NULL],
					ARRAY['{"a":"b\"c"}'::jsonb], ARRAY[1,2]::posint[], ARRAY['\x00'::bytea], ARRAY['(3,4),(1,2)'::box, '(1,1),(0,0)'::box], '16/B374D848', '123', '10:20:10,14,15', '1 2 3', '' FROM `
			p.do(
				`INSERT INTO `+tab+all+`generate_series(1, 3) g`,
				`INSERT INTO `+tab+all+`generate_series(4, 3000) g`,
				`INSERT INTO `+tab+` (id) VALUES (5001)`,
				`INSERT INTO `+tab+` (id, tx, ta, ia, by, vc) VALUES (5002, '', '{}', '{{1,2},{3,4}}', '', '\N')`,
				`UPDATE `+tab+` SET tx = 'NULL', f8 = '-0', n = 1.10, j = '[]', pnt = NULL WHERE id = 1`,
				`UPDATE `+tab+` SET n = 1.1, "Weird ""col%d" = NULL WHERE id IN (2, 5001)`,
				`UPDATE `+tab+` SET i8 = i8 + 1 WHERE id IN (2, 3, 5002)`,
			)
			if identity == "DEFAULT" {
				p.do(`UPDATE `+tab+` SET id = -id, tx = tx || 'moved' WHERE id < 3`, `UPDATE `+tab+` SET i2 = 5 WHERE id > 10`)
			}
			p.do(`DELETE FROM `+tab+` WHERE id IN (3, 4, 5001)`, `DELETE FROM `+tab+` WHERE id BETWEEN 100 AND 160`)
			batch := p.transactions()
			s := p.connect()
			for i := range batch[:2] {
				p.apply(s, batch[i:i+1])
			}
			p.apply(s, batch[2:])
			p.same(tab)
			if n := one[int](t, p.target, "SELECT count(*) FROM "+tab); n != 2938 {
				t.Fatalf("%d rows", n)
			}
			if retries := s.Stats().Retries; retries != 0 {
				t.Fatalf("%d batches had to be repeated row by row", retries)
			}
		})
	}
}

func TestTableShapes(t *testing.T) {
	p := newPair(t)
	p.both(
		`CREATE TABLE toast (id int PRIMARY KEY, small text, big text)`,
		`ALTER TABLE toast ALTER big SET STORAGE EXTERNAL`,
		`CREATE TABLE toastfull (id int, n int, big text)`,
		`ALTER TABLE toastfull ALTER big SET STORAGE EXTERNAL`,
		`ALTER TABLE toastfull REPLICA IDENTITY FULL`,
		`CREATE TABLE toastkey (k text PRIMARY KEY, n int)`,
		`ALTER TABLE toastkey ALTER k SET STORAGE EXTERNAL`,
		`CREATE TABLE computed (id int PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) STORED)`,
		`CREATE TABLE always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int)`,
		`CREATE TABLE always2 (id int PRIMARY KEY, seq int GENERATED ALWAYS AS IDENTITY, n int)`,
		`CREATE TABLE byindex (a int NOT NULL, b text NOT NULL, c text)`,
		`CREATE UNIQUE INDEX byindex_key ON byindex (b, a)`,
		`ALTER TABLE byindex REPLICA IDENTITY USING INDEX byindex_key`,
		`CREATE TABLE parts (id int, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at)`,
		`CREATE TABLE parts_a PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2024-06-01')`,
		`CREATE TABLE parts_b PARTITION OF parts FOR VALUES FROM ('2024-06-01') TO ('2025-01-01')`,
		`CREATE TABLE parent (id int PRIMARY KEY, v text)`,
		`CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)`,
		`CREATE TABLE nokey (a int, b text)`,
		`ALTER TABLE nokey REPLICA IDENTITY FULL`,
		`CREATE TABLE swap (id int PRIMARY KEY, u int UNIQUE, d int UNIQUE DEFERRABLE INITIALLY DEFERRED)`,
		`CREATE TABLE one (id int PRIMARY KEY)`,
		`CREATE TABLE none ()`,
		`CREATE TABLE ref (id int PRIMARY KEY, other int REFERENCES one (id) DEFERRABLE INITIALLY DEFERRED)`,
		`CREATE TABLE dropped (id int PRIMARY KEY, gone int, kept text)`,
		`ALTER TABLE dropped DROP gone`,
		`CREATE TABLE num (n numeric PRIMARY KEY, v text)`,
	)
	// The replica's columns are in another order.
	p.do(`CREATE TABLE byname (id int PRIMARY KEY, a text, b int)`)
	if _, err := p.target.Exec(t.Context(), `CREATE TABLE byname (b int, extra text DEFAULT 'x', id int PRIMARY KEY, a text)`); err != nil {
		t.Fatal(err)
	}
	p.drop()
	p.do(
		`INSERT INTO toast SELECT g, 's', repeat(md5(g::text), 200) FROM generate_series(1, 5) g`,
		`UPDATE toast SET small = 't'`,
		`UPDATE toast SET id = id + 100 WHERE id = 2`,
		`UPDATE toast SET big = NULL WHERE id = 3`,
		`UPDATE toast SET big = '' WHERE id = 4`,
		`INSERT INTO toastfull SELECT 1, 1, repeat(md5('x'), 200) FROM generate_series(1, 3)`,
		`UPDATE toastfull SET n = 2 WHERE ctid = (SELECT min(ctid) FROM toastfull)`,
		`DELETE FROM toastfull WHERE ctid = (SELECT max(ctid) FROM toastfull WHERE n = 1)`,
		`INSERT INTO toastkey SELECT (SELECT string_agg(md5(i::text || g::text), '') FROM generate_series(1, 80) i), g FROM generate_series(1, 3) g`,
		`UPDATE toastkey SET n = n + 10`,
		`DELETE FROM toastkey WHERE n = 12`,
		`INSERT INTO computed VALUES (1, 1), (2, 2)`,
		`UPDATE computed SET a = 7 WHERE id = 2`,
		`INSERT INTO always (n) SELECT g FROM generate_series(1, 4) g`,
		`UPDATE always SET n = 9 WHERE id = 2`,
		`UPDATE always SET id = DEFAULT WHERE id = 3`,
		`INSERT INTO always2 (id, n) SELECT g, g FROM generate_series(1, 4) g`,
		`UPDATE always2 SET seq = DEFAULT WHERE id = 3`,
		`UPDATE always2 SET n = 0 WHERE id = 4`,
		`INSERT INTO byindex VALUES (1, 'x', 'c'), (1, 'y', NULL)`,
		`UPDATE byindex SET c = 'd' WHERE b = 'y'`,
		`UPDATE byindex SET b = 'z' WHERE b = 'x'`,
		`INSERT INTO parts SELECT g, '2024-05-01', 'v' FROM generate_series(1, 10) g`,
		`UPDATE parts SET at = '2024-07-01' WHERE id % 2 = 0`,
		`UPDATE parts SET v = 'w' WHERE id < 5`,
		`INSERT INTO parent VALUES (1, 'p')`, `INSERT INTO child VALUES (1, 'c')`,
		`UPDATE ONLY parent SET v = 'pp'`, `UPDATE child SET v = 'cc'`, `DELETE FROM ONLY parent`,
		`INSERT INTO nokey SELECT 1, 'same' FROM generate_series(1, 5)`, `INSERT INTO nokey VALUES (NULL, NULL), (NULL, NULL)`,
		`UPDATE nokey SET b = 'other' WHERE ctid = (SELECT min(ctid) FROM nokey)`,
		`DELETE FROM nokey WHERE ctid IN (SELECT ctid FROM nokey WHERE a IS NULL LIMIT 1)`,
		`INSERT INTO swap SELECT g, g, g FROM generate_series(1, 4) g`,
		`UPDATE swap SET d = 5 - d`,
		`UPDATE swap SET u = u + 10`,
		`BEGIN; UPDATE swap SET u = 100 WHERE id = 1; UPDATE swap SET u = 11 WHERE id = 2; UPDATE swap SET u = 12 WHERE id = 1; COMMIT`,
		`BEGIN; DELETE FROM swap WHERE id = 3; INSERT INTO swap VALUES (5, 13, 2); COMMIT`,
		`BEGIN; INSERT INTO ref VALUES (1, 1); INSERT INTO one VALUES (1); COMMIT`,
		`INSERT INTO one VALUES (2), (3)`, `UPDATE one SET id = 4 WHERE id = 3`, `UPDATE one SET id = id WHERE id = 2`,
		`INSERT INTO none DEFAULT VALUES`,
		`INSERT INTO dropped VALUES (1, 'a')`, `UPDATE dropped SET kept = 'b'`,
		`INSERT INTO num VALUES (1.10, 'a'), (2, 'b')`, `UPDATE num SET v = 'c' WHERE n = 1.1`, `UPDATE num SET n = 1.100 WHERE n = 1.1`,
		`BEGIN; INSERT INTO one VALUES (50); SAVEPOINT a; INSERT INTO one VALUES (51); ROLLBACK TO a; DELETE FROM one WHERE id = 50; INSERT INTO one VALUES (50); COMMIT`,
		`INSERT INTO byname VALUES (1, 'a', 2), (2, 'b', 3)`, `UPDATE byname SET b = 7 WHERE id = 2`,
	)
	s := p.connect()
	p.apply(s, p.transactions())
	if retries := s.Stats().Retries; retries != 0 {
		t.Fatalf("%d batches had to be repeated row by row", retries)
	}
	tables := []string{"toast", "toastfull", "toastkey", "computed", "always", "always2", "byindex", "parts_a", "parts_b", "ONLY parent", "child", "nokey",
		"swap", "ref", "one", "none", "dropped", "num"}
	p.same(tables...)
	p.same(`(SELECT id, a, b FROM byname)`)
	if got := one[string](t, p.target, "SELECT extra FROM byname WHERE id = 1"); got != "x" {
		t.Fatalf("extra column is %q", got)
	}

	p.do(`TRUNCATE one CASCADE`, `TRUNCATE always RESTART IDENTITY`, `TRUNCATE parts`, `TRUNCATE nokey, num`, `INSERT INTO one VALUES (9)`, `INSERT INTO ref VALUES (1, 9)`)
	p.apply(s, p.transactions())
	p.same("one", "ref", "always", "parts", "nokey", "num")
	if n := one[int64](t, p.target, "SELECT nextval('always_id_seq')"); n != 1 {
		t.Fatalf("restarted identity gives %d", n)
	}
}

// TestHotRowsInOneBatch updates the same few rows many times, with inserts and
// deletes of other tables between, in one batch.
func TestHotRowsInOneBatch(t *testing.T) {
	p := newPair(t)
	p.both(`CREATE TABLE hot (id int PRIMARY KEY, n int, pad text)`, `CREATE TABLE history (id int, delta int)`)
	p.do(`INSERT INTO hot SELECT g, 0, 'pad' FROM generate_series(1, 3) g`)
	for i := range 200 {
		p.do(fmt.Sprintf(`BEGIN; UPDATE hot SET n = n + %d WHERE id = %d; INSERT INTO history VALUES (%d, %d); COMMIT`, i, i%3+1, i%3+1, i))
		switch i {
		case 50:
			p.do(`DELETE FROM hot WHERE id = 2`, `INSERT INTO hot VALUES (2, 1000, NULL)`)
		case 120:
			p.do(`UPDATE hot SET id = 20 WHERE id = 1`, `INSERT INTO hot VALUES (1, 5, '')`)
		}
	}
	s := p.connect()
	p.apply(s, p.transactions())
	p.same("hot", "history")
	if retries := s.Stats().Retries; retries != 0 {
		t.Fatalf("%d batches had to be repeated row by row", retries)
	}
}
