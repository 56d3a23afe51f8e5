package catalog_test

import (
	"testing"
	"time"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

func TestSQLFaceForAnOrdinaryRole(t *testing.T) {
	s, own := installed(t)
	postgrestest.Exec(t, own, "CREATE ROLE app", "SET default_transaction_read_only = on")
	now := time.Now().UTC().Truncate(time.Microsecond)
	state := catalog.State{Shard: "main", Region: "r1", Role: "follower", Leader: "r2", Ballot: "7.2", Chosen: 90, Applied: 88, LagSlots: 2, LagSeconds: 0.5,
		Health: "ok", Synchronous: true, DurabilityRegions: 2,
		Regions: []catalog.RegionState{{Region: "r1", Kind: "voter", Role: "follower", Chosen: 90, Applied: 88, LagSlots: 2, LagSeconds: 0.5, Health: "ok", LastHeard: &now}, {Region: "r2", Kind: "voter", Role: "leader"}}}
	for range 2 {
		if err := catalog.Publish(ctx(t), own, state); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		var rows []catalog.LogRow
		for j := range 10 {
			rows = append(rows, catalog.LogRow{Slot: uint64(i*10 + j + 1), Transaction: 700, Time: now, Region: "r2", Tables: []string{"public.t"}, Rows: 3, Bytes: 120})
		}
		rows[0].Trace = "4bf92f3577b34da6a3ce929d0e0e4736"
		if err := catalog.AppendLog(ctx(t), own, "main", rows); err != nil {
			t.Fatal(err)
		}
	}
	app := postgrestest.Connect(t, s, "postgres")
	postgrestest.Exec(t, app, "SET ROLE app")
	for sql, want := range map[string]string{
		"SELECT leader || ' ' || applied || ' ' || lag_slots || ' ' || synchronous FROM quorate.status":            "r2 88 2 true",
		"SELECT string_agg(region || role, ',' ORDER BY region) FROM quorate.regions":                              "r1follower,r2leader",
		"SELECT lag_slots || ' ' || lag_seconds FROM quorate.lag WHERE region = 'r1'":                              "2 0.5",
		"SELECT quorate.leader() || quorate.applied_slot()":                                                        "r288",
		"SELECT count(*) || ' ' || sum(rows) || ' ' || count(trace) || ' ' || max(slot) FROM quorate.log":          "30 90 3 30",
		"SELECT region || transaction || tables[1] || ' ' || (\"time\" <= now()) FROM quorate.log WHERE slot = 11": "r2700public.t true",
		"SELECT count(*)::text FROM quorate.log_batch":                                                             "3",
		"SELECT coalesce(quorate.trace('00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01')::text, 'null')":  "",
		"SELECT coalesce(quorate.leader('no such shard'), 'none')":                                                 "none",
	} {
		if got := query[string](t, app, sql); got != want {
			t.Errorf("%s: %q, want %q", sql, got, want)
		}
	}
	refused(t, app, "22023", "SELECT quorate.trace('00-00000000000000000000000000000000-00f067aa0ba902b7-01')")
	refused(t, app, "22023", "SELECT quorate.trace(NULL)")
	for _, sql := range []string{"TABLE quorate.identity", "SELECT quorate.open_fence('main', 99, 1)", "INSERT INTO quorate.open VALUES ('main', 1, 1, now())", "SELECT quorate.prune_log('0', 0)"} {
		refused(t, app, "42501", sql)
	}

	if n, err := catalog.PruneLog(ctx(t), own, time.Hour, 1<<20); err != nil || n != 0 {
		t.Errorf("nothing to prune: %d, %v", n, err)
	}
	size := query[int64](t, own, "SELECT max(pg_column_size(packed))::bigint FROM quorate.log_batch")
	if n, err := catalog.PruneLog(ctx(t), own, time.Hour, 2*size); err != nil || n != 1 {
		t.Errorf("by size: %d, %v", n, err)
	}
	if got := query[int](t, own, "SELECT min(slot)::int FROM quorate.log"); got != 11 {
		t.Errorf("the oldest slot is %d, want 11", got)
	}
	time.Sleep(2 * time.Millisecond)
	if n, err := catalog.PruneLog(ctx(t), own, time.Millisecond, 1<<20); err != nil || n != 2 {
		t.Errorf("by age: %d, %v", n, err)
	}
}
