package catalog

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// The versions of PostgreSQL that are supported, as server_version_num / 10000.
const (
	oldestMajor = 15
	newestMajor = 18
)

// ServerInfo is what Check learned.
type ServerInfo struct {
	Version          int // server_version_num
	SystemIdentifier string
	Timeline         uint32
	Database         string
	Encoding         string
}

// Problem is something about the server that stands in the way.
type Problem struct {
	Name  string // of the check, stable: version, wal_level, …
	Text  string // what is wrong
	Mend  string // what to do about it
	Fatal bool   // false: a warning
}

func (p Problem) String() string { return p.Text + ": " + p.Mend }

// CheckOptions adjust Check.
type CheckOptions struct {
	ReplicationSlot  string   // ours, not counted as one still needed
	DatabasesAllowed []string // that may hold tables beside this one; their commits are not replicated
}

// Check looks at the server and database of conn for everything that Quorate
// relies on. It changes nothing.
func Check(ctx context.Context, conn *pgx.Conn, o CheckOptions) (ServerInfo, []Problem, error) {
	var info ServerInfo
	var problems []Problem
	add := func(fatal bool, name, text, mend string) {
		problems = append(problems, Problem{Name: name, Text: text, Mend: mend, Fatal: fatal})
	}
	fail := func(what string, err error) (ServerInfo, []Problem, error) {
		return info, problems, fmt.Errorf("check the server: %s: %w", what, err)
	}

	var version string
	if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num'), current_database(), current_setting('server_encoding')").
		Scan(&version, &info.Database, &info.Encoding); err != nil {
		return fail("version", err)
	}
	info.Version, _ = strconv.Atoi(version)
	if problem, ok := checkVersion(info.Version); !ok {
		// Nothing else can be asked in a way that an unknown version answers.
		return info, []Problem{problem}, nil
	}
	if info.Encoding != "UTF8" {
		add(true, "encoding", fmt.Sprintf("database %s has encoding %s", info.Database, info.Encoding), "create it with ENCODING 'UTF8'")
	}

	var superuser bool
	if err := conn.QueryRow(ctx, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user").Scan(&superuser); err != nil {
		return fail("privileges", err)
	}
	if !superuser {
		add(true, "privileges", "the sidecar's role is not a superuser (event triggers and replication origins need it)",
			"connect as a superuser, or ALTER ROLE … SUPERUSER")
		return info, problems, nil
	}
	if err := conn.QueryRow(ctx, "SELECT system_identifier::text, (SELECT timeline_id FROM pg_control_checkpoint()) FROM pg_control_system()").
		Scan(&info.SystemIdentifier, &info.Timeline); err != nil {
		return fail("control data", err)
	}
	var recovering bool
	if err := conn.QueryRow(ctx, "SELECT pg_is_in_recovery()").Scan(&recovering); err != nil {
		return fail("recovery", err)
	}
	if recovering {
		add(true, "recovery", "the server is a physical standby", "use its primary, or promote it")
	}

	settings, err := readSettings(ctx, conn)
	if err != nil {
		return fail("settings", err)
	}
	for _, want := range []struct{ name, value, why string }{
		{"wal_level", "logical", "logical decoding needs it"},
		{"fsync", "on", "a crash would lose what was acknowledged"},
		{"full_page_writes", "on", "a crash could leave torn pages"},
		{"max_prepared_transactions", "0", "a prepared transaction cannot be ended on failover"},
		{"max_slot_wal_keep_size", "-1", "the server could drop WAL that has not been replicated"},
		{"idle_replication_slot_timeout", "0", "the server could drop the replication slot"},
	} {
		if have, ok := settings[want.name]; ok && have != want.value {
			add(true, want.name, fmt.Sprintf("%s is %s (%s)", want.name, have, want.why),
				fmt.Sprintf("ALTER SYSTEM SET %s = %s, then restart the server", want.name, want.value))
		}
	}

	var senders, slots, origins, reserved int
	var oursExists bool
	err = conn.QueryRow(ctx, `SELECT
		current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_stat_replication WHERE application_name NOT LIKE $2 || '%'),
		current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots),
		coalesce(current_setting('max_active_replication_origins', true), current_setting('max_replication_slots'))::int
			- (SELECT count(*) FROM pg_replication_origin_status s JOIN pg_replication_origin o ON o.roident = s.local_id WHERE o.roname NOT LIKE $2 || '%'),
		current_setting('superuser_reserved_connections')::int,
		EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1)`, o.ReplicationSlot, ApplicationName).
		Scan(&senders, &slots, &origins, &reserved, &oursExists)
	if err != nil {
		return fail("what is free", err)
	}
	if senders < 2 {
		add(true, "max_wal_senders", fmt.Sprintf("%d walsenders are free, 2 are needed", max(senders, 0)), "raise max_wal_senders and restart the server")
	}
	if oursExists {
		slots++
	}
	if slots < 2 {
		add(true, "max_replication_slots", fmt.Sprintf("%d replication slots are free, 2 are needed (one for good, one while seeding)", slots),
			"raise max_replication_slots and restart the server, or drop slots nobody reads")
	}
	if origins < 1 {
		add(true, "replication_origins", "no replication origin is free", "raise max_replication_slots (from 18 on: max_active_replication_origins) and restart the server")
	}
	if reserved < 3 {
		add(false, "superuser_reserved_connections", fmt.Sprintf("superuser_reserved_connections is %d: clients can keep the sidecar from connecting", reserved),
			"set it to 3 or more and restart the server")
	}

	if err := checkSlot(ctx, conn, o.ReplicationSlot, add); err != nil {
		return fail("replication slot", err)
	}
	if err := checkNeighbours(ctx, conn, o, add); err != nil {
		return fail("other users of the server", err)
	}
	return info, problems, nil
}

func checkVersion(num int) (Problem, bool) {
	switch major := num / 10000; {
	case major < oldestMajor:
		return Problem{Name: "version", Text: fmt.Sprintf("PostgreSQL %d is too old", major),
			Mend: fmt.Sprintf("upgrade to PostgreSQL %d to %d", oldestMajor, newestMajor), Fatal: true}, false
	case major > newestMajor:
		return Problem{Name: "version", Text: fmt.Sprintf("PostgreSQL %d is newer than this Quorate knows", major),
			Mend: fmt.Sprintf("use PostgreSQL %d to %d, or a newer Quorate", oldestMajor, newestMajor), Fatal: true}, false
	}
	return Problem{}, true
}

func readSettings(ctx context.Context, conn *pgx.Conn) (map[string]string, error) {
	rows, err := conn.Query(ctx, "SELECT name, setting FROM pg_settings")
	if err != nil {
		return nil, err
	}
	settings := map[string]string{}
	for rows.Next() {
		var name, value string
		if err := rows.Scan(&name, &value); err != nil {
			return nil, err
		}
		settings[name] = value
	}
	return settings, rows.Err()
}

type addProblem func(fatal bool, name, text, mend string)

func checkSlot(ctx context.Context, conn *pgx.Conn, slot string, add addProblem) error {
	rows, err := conn.Query(ctx, `SELECT slot_name, coalesce(wal_status, ''), database = current_database(), coalesce(plugin, '')
		FROM pg_replication_slots WHERE slot_name = $1`, slot)
	if err != nil {
		return err
	}
	for rows.Next() {
		var name, status, plugin string
		var here *bool
		if err := rows.Scan(&name, &status, &here, &plugin); err != nil {
			return err
		}
		if here == nil || !*here || plugin != "pgoutput" {
			add(true, "replication_slot", fmt.Sprintf("replication slot %s belongs to another database or plugin", name), "drop it, or configure another name")
		}
		if status == "lost" {
			add(true, "replication_slot", fmt.Sprintf("replication slot %s was invalidated", name), "the region has to be seeded again")
		}
	}
	return rows.Err()
}

func checkNeighbours(ctx context.Context, conn *pgx.Conn, o CheckOptions, add addProblem) error {
	// A table has files; what is in another database can be told only by its
	// traffic, since no session reads two databases.
	rows, err := conn.Query(ctx, `SELECT d.datname FROM pg_database d
		WHERE d.datallowconn AND NOT d.datistemplate AND d.datname <> current_database() AND d.datname <> ALL ($1)`, append([]string{}, o.DatabasesAllowed...))
	if err != nil {
		return err
	}
	others, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, name := range others {
		used, err := hasTables(ctx, conn, name)
		if err != nil {
			add(false, "other_databases", fmt.Sprintf("database %s could not be looked into (%v)", name, err), "see that it holds no tables: one replicated database a server")
			continue
		}
		if used {
			add(true, "other_databases", fmt.Sprintf("database %s on this server holds tables: its commits would be acknowledged without being replicated", name),
				"move it to another server (one replicated database a server), or list it as allowed")
		}
	}

	rows, err = conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE (rolreplication OR rolsuper) AND rolcanlogin AND rolname <> current_user ORDER BY 1`)
	if err != nil {
		return err
	}
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	if len(roles) > 0 {
		add(false, "replication_roles", fmt.Sprintf("roles beside the sidecar's may replicate and could confirm commits in its name: %s", strings.Join(roles, ", ")),
			"ALTER ROLE … NOREPLICATION NOSUPERUSER, or refuse them replication connections in pg_hba.conf")
	}

	rows, err = conn.Query(ctx, `SELECT subname FROM pg_subscription WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	if err != nil {
		return err
	}
	subscriptions, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, name := range subscriptions {
		add(true, "subscriptions", fmt.Sprintf("subscription %s writes to this database past the log", name), "drop it")
	}

	value := ""
	if err := conn.QueryRow(ctx, "SELECT current_setting('synchronous_standby_names')").Scan(&value); err != nil {
		return err
	}
	if v := strings.Trim(value, `"`); v != "" && !strings.HasPrefix(v, ApplicationName) {
		add(true, "synchronous_standby_names", (&ForeignStandbysError{Value: value}).Error(), "see there")
	}
	return nil
}

// hasTables opens a short session to another database of the server.
func hasTables(ctx context.Context, conn *pgx.Conn, database string) (bool, error) {
	cfg := conn.Config().Copy()
	cfg.Database = database
	other, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer other.Close(ctx)
	var used bool
	err = other.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'p', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)')`).Scan(&used)
	return used, err
}
