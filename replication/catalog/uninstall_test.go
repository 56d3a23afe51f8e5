package catalog_test

import (
	"testing"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

// A region that was seeded anew has a database that never made commits wait: it
// found that done by the one before it. Uninstalling releases them all the same.
func TestUninstallReleasesCommitsOfASeededDatabase(t *testing.T) {
	s, own := installed(t)
	if err := catalog.EnsureSynchronous(ctx(t), own, "quorate"); err != nil {
		t.Fatal(err)
	}
	postgrestest.Exec(t, own, "DELETE FROM quorate.system_setting")
	if err := catalog.Uninstall(ctx(t), own, catalog.UninstallOptions{}); err != nil {
		t.Fatal(err)
	}
	client := postgrestest.Connect(t, s, "postgres")
	if got := query[string](t, client, "SELECT current_setting('synchronous_standby_names')"); got != "" {
		t.Errorf("synchronous_standby_names is %q: every commit waits for a sidecar that is gone", got)
	}
}
