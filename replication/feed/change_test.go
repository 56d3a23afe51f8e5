package feed

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"quorate/replication/entry"
)

// testChanges publishes each kind of change and reads it back.
func testChanges(t *testing.T, db *database) {
	db.exec(t,
		`CREATE TABLE toast (id int PRIMARY KEY, body text, v text)`,
		`ALTER TABLE toast ALTER body SET STORAGE EXTERNAL`,
		`CREATE TABLE full_toast (id int, body text, v text)`,
		`ALTER TABLE full_toast ALTER body SET STORAGE EXTERNAL, REPLICA IDENTITY FULL`,
		`CREATE SCHEMA "odd *"`,
		`CREATE TABLE "odd *"."a.b>c%" (id int PRIMARY KEY)`,
		`CREATE TABLE wide (id int PRIMARY KEY, big text, small text)`)
	l, s := newLog(), startServer(t)
	l.add(db.exec(t,
		`INSERT INTO toast VALUES (1, repeat('x', 9000), NULL), (2, '', 'é"\')`,
		`UPDATE toast SET v = 'new' WHERE id = 1`,
		`UPDATE toast SET id = 3, body = NULL WHERE id = 2`,
		`DELETE FROM toast WHERE id = 3`,
		`INSERT INTO full_toast VALUES (1, repeat('y', 9000), 'a')`,
		`UPDATE full_toast SET v = 'b'`,
		`DELETE FROM full_toast`,
		`INSERT INTO "odd *"."a.b>c%" VALUES (1)`,
		`TRUNCATE toast, full_toast`,
		`SELECT pg_logical_emit_message(true, 'quorate.ddl', '{"sql":"CREATE TABLE x ()"}')`,
		`SELECT pg_logical_emit_message(true, 'application', 'its own')`,
		`INSERT INTO wide VALUES (1, repeat('z', 9000000), 'kept')`,
	)...)
	l.change(func() {
		l.items[0].Payload.Header.Trace = entry.Trace{TraceID: [16]byte{1}, SpanID: [8]byte{2}, Flags: 1}
		l.items[1].Trace = entry.Trace{TraceID: [16]byte{3}, SpanID: [8]byte{4}}
	})
	p, _ := start(t, configOf(s, l))
	waitFor(t, p, 13)
	all := readAll(t, s.URL())

	show := func(m published) string {
		render := func(row map[string]*string) string {
			if row == nil {
				return "-"
			}
			short := make(map[string]any)
			for k, v := range row {
				if v == nil {
					short[k] = nil
				} else if len(*v) > 20 {
					short[k] = (*v)[:1] + "…"
				} else {
					short[k] = *v
				}
			}
			b, err := json.Marshal(short)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		line := []string{m.ID, m.Subject, m.Op, render(m.Key), render(m.Old), render(m.New)}
		if m.Unchanged != nil {
			line = append(line, "unchanged "+strings.Join(m.Unchanged, ","))
		}
		if m.Omitted != nil {
			b, _ := json.Marshal(m.Omitted)
			line = append(line, "omitted "+string(b))
		}
		for _, table := range m.Tables {
			line = append(line, table.Schema+"."+table.Table)
		}
		return strings.Join(append(line, string(m.DDL)), " ")
	}
	var got []string
	for _, m := range all {
		got = append(got, strings.TrimSpace(show(m)))
	}
	want := []string{
		`7/1/1 quorate.test.main.public.toast insert {"id":"1"} - {"body":"x…","id":"1","v":null}`,
		`7/1/2 quorate.test.main.public.toast insert {"id":"2"} - {"body":"","id":"2","v":"é\"\\"}`,
		`7/2/1 quorate.test.main.public.toast update {"id":"1"} - {"id":"1","v":"new"} unchanged body`,
		`7/3/1 quorate.test.main.public.toast update {"id":"2"} - {"body":null,"id":"3","v":"é\"\\"}`,
		`7/4/1 quorate.test.main.public.toast delete {"id":"3"} - -`,
		`7/5/1 quorate.test.main.public.full_toast insert - - {"body":"y…","id":"1","v":"a"}`,
		`7/6/1 quorate.test.main.public.full_toast update - {"body":"y…","id":"1","v":"a"} {"body":"y…","id":"1","v":"b"}`,
		`7/7/1 quorate.test.main.public.full_toast delete - {"body":"y…","id":"1","v":"b"} -`,
		`7/8/1 quorate.test.main.odd%20%2A.a%2Eb%3Ec%25 insert {"id":"1"} - {"id":"1"}`,
		`7/9/1 quorate.test.main.public.toast truncate - - - public.toast public.full_toast`,
		`7/9/2 quorate.test.main.public.full_toast truncate - - - public.toast public.full_toast`,
		`7/10/1 quorate.test.main.ddl ddl - - - {"sql":"CREATE TABLE x ()"}`,
		`7/12/1 quorate.test.main.public.wide insert {"id":"1"} - {"id":"1","small":"kept"} omitted {"big":9000000}`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	tx := all[2].Transaction
	h := l.items[1].Payload.Header
	if tx.XID != h.Xid || !tx.CommitTime.Equal(h.CommitTime) || tx.LSN != h.EndLSN.String() || tx.Region != "r1" || tx.Incarnation != "00000000000000a1" {
		t.Errorf("transaction %+v, want %+v", tx, h)
	}
	const client = "00-01000000000000000000000000000000-0200000000000000-01"
	if all[0].Trace != client || all[0].Traceparent != client {
		t.Errorf("trace of the client: %q, header %q", all[0].Trace, all[0].Traceparent)
	}
	if want := "00-03000000000000000000000000000000-0400000000000000-00"; all[2].Trace != want || all[2].Traceparent != want {
		t.Errorf("trace given by the source: %q, header %q", all[2].Trace, all[2].Traceparent)
	}
	if all[4].Trace != "" || all[4].Traceparent != "" {
		t.Errorf("trace from nowhere: %q, header %q", all[4].Trace, all[4].Traceparent)
	}
}
