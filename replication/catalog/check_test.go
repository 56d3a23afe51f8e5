package catalog_test

import (
	"slices"
	"testing"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

func problemNames(t *testing.T, problems []catalog.Problem, fatal bool) []string {
	t.Helper()
	names := []string{}
	for _, p := range problems {
		if p.Text == "" || p.Mend == "" {
			t.Errorf("%+v: no text or no mend", p)
		}
		if p.Fatal == fatal {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return names
}

func TestCheck(t *testing.T) {
	s := postgrestest.Start(t, nil)
	own := sidecar(t, s)
	info, problems, err := catalog.Check(ctx(t), own, catalog.CheckOptions{ReplicationSlot: "quorate_r1"})
	if err != nil || len(problems) != 0 {
		t.Fatalf("a fit server: %v, %v", problems, err)
	}
	if info.Version/10000 < 15 || info.SystemIdentifier == "" || info.Timeline != 1 || info.Database != "postgres" || info.Encoding != "UTF8" {
		t.Errorf("info is %+v", info)
	}

	postgrestest.Exec(t, own, "CREATE ROLE standby REPLICATION LOGIN", "CREATE ROLE plain LOGIN", "CREATE DATABASE other", "CREATE DATABASE listed",
		"CREATE SUBSCRIPTION s CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false)",
		"SELECT pg_create_physical_replication_slot('quorate_r1')")
	for _, db := range []string{"other", "listed"} {
		postgrestest.Exec(t, postgrestest.Connect(t, s, db), "CREATE TABLE t ()")
	}
	_, problems, err = catalog.Check(ctx(t), own, catalog.CheckOptions{ReplicationSlot: "quorate_r1", DatabasesAllowed: []string{"listed"}})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := problemNames(t, problems, true), []string{"other_databases", "replication_slot", "subscriptions"}; !slices.Equal(got, want) {
		t.Errorf("faults %q, want %q", got, want)
	}
	if got, want := problemNames(t, problems, false), []string{"replication_roles"}; !slices.Equal(got, want) {
		t.Errorf("warnings %q, want %q", got, want)
	}

	postgrestest.Exec(t, own, "SET ROLE plain")
	_, problems, err = catalog.Check(ctx(t), own, catalog.CheckOptions{})
	if err != nil || !slices.Equal(problemNames(t, problems, true), []string{"privileges"}) {
		t.Errorf("without privileges: %v, %v", problems, err)
	}
}

func TestCheckOfAnUnfitServer(t *testing.T) {
	s := postgrestest.Start(t, map[string]string{"wal_level": "replica", "fsync": "off", "full_page_writes": "off", "max_prepared_transactions": "5",
		"max_slot_wal_keep_size": "100MB", "max_replication_slots": "0", "max_wal_senders": "1", "superuser_reserved_connections": "0",
		"synchronous_standby_names": "walreceiver"})
	_, problems, err := catalog.Check(ctx(t), sidecar(t, s), catalog.CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"fsync", "full_page_writes", "max_prepared_transactions", "max_replication_slots", "max_slot_wal_keep_size", "max_wal_senders",
		"replication_origins", "synchronous_standby_names", "wal_level"}
	if got := problemNames(t, problems, true); !slices.Equal(got, want) {
		t.Errorf("faults %q, want %q", got, want)
	}
	if got := problemNames(t, problems, false); !slices.Equal(got, []string{"superuser_reserved_connections"}) {
		t.Errorf("warnings %q", got)
	}
}
