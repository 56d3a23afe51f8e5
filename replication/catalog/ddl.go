package catalog

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// DDL is the content of a message with entry.DDLPrefix: one command, as its
// transaction ran it.
type DDL struct {
	MAC       string            `json:"mac"`
	Version   int               `json:"version"`
	Tag       string            `json:"tag"`
	Statement string            `json:"statement"`
	Role      string            `json:"role"`     // who ran it, and owns what it made
	Settings  map[string]string `json:"settings"` // that bear on its meaning, search_path among them
	Objects   []DDLObject       `json:"objects"`  // made or changed; none for DROP
}

// DDLObject is what a command made or changed.
type DDLObject struct {
	Type     string `json:"type"`
	Identity string `json:"identity"`
}

// DecodeDDL reads the content of a DDL message.
func DecodeDDL(content []byte) (DDL, error) {
	var d DDL
	if err := json.Unmarshal(content, &d); err != nil {
		return DDL{}, fmt.Errorf("decode a DDL message: %w", err)
	}
	if d.Version != 1 {
		return DDL{}, fmt.Errorf("decode a DDL message: version %d is not known", d.Version)
	}
	if d.Statement == "" || d.Role == "" {
		return DDL{}, errors.New("decode a DDL message: it has no statement or no role")
	}
	return d, nil
}

// Authentic reports whether a DDL message is the event trigger's, and not made
// by a user with pg_logical_emit_message: replay runs it as whatever role it
// names. key is Identity.DDLKey of the database that the message was read from.
func Authentic(key, content []byte) bool {
	const lead, tail = `{"mac": "`, `", `
	rest, ok := strings.CutPrefix(string(content), lead)
	if !ok || len(rest) < 2*sha256.Size+len(tail) || rest[2*sha256.Size:2*sha256.Size+len(tail)] != tail {
		return false
	}
	mac, err := hex.DecodeString(rest[:2*sha256.Size])
	if err != nil {
		return false
	}
	inner := sha256.Sum256([]byte(string(key) + "{" + rest[2*sha256.Size+len(tail):]))
	want := sha256.Sum256(append(append([]byte{}, key...), inner[:]...))
	return subtle.ConstantTimeCompare(mac, want[:]) == 1
}

// Executor is a connection or a transaction.
type Executor interface {
	Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// MissingRoleError says that the role of a command does not exist here. Roles
// are of the whole server, and the log does not carry them.
type MissingRoleError struct{ Role, Tag string }

func (e *MissingRoleError) Error() string {
	return fmt.Sprintf("%s was run as role %q, which does not exist on this server: CREATE ROLE %s, as on the leader",
		e.Tag, e.Role, pgx.Identifier{e.Role}.Sanitize())
}

// ReplayDDL runs the command of a DDL message within the open transaction of
// db, a superuser's session with a replication origin. Role and settings of the
// command hold for it alone. What it creates has its fence when ReplayDDL
// returns. After an error the transaction is of no use any more.
func ReplayDDL(ctx context.Context, db Executor, content []byte) error {
	d, err := DecodeDDL(content)
	if err != nil {
		return err
	}
	var role bool
	if err := db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1)", d.Role).Scan(&role); err != nil {
		return fmt.Errorf("replay %s: look for role %s: %w", d.Tag, d.Role, err)
	}
	if !role {
		return &MissingRoleError{Role: d.Role, Tag: d.Tag}
	}
	settings, err := json.Marshal(d.Settings)
	if err != nil {
		return err
	}
	// Settings are made before the role, and put back after it.
	var before string
	if err := db.QueryRow(ctx, `SELECT pg_catalog.jsonb_object_agg(s.key, pg_catalog.current_setting(s.key))::text
		FROM pg_catalog.jsonb_each_text($1) s WHERE pg_catalog.current_setting(s.key, true) IS NOT NULL`, string(settings)).Scan(&before); err != nil {
		return fmt.Errorf("replay %s: read the settings: %w", d.Tag, err)
	}
	set := func(values string) error {
		var n int
		return db.QueryRow(ctx, `SELECT pg_catalog.count(pg_catalog.set_config(s.key, s.value, true))
			FROM pg_catalog.jsonb_each_text($1) s WHERE pg_catalog.current_setting(s.key, true) IS NOT NULL`, values).Scan(&n)
	}
	if err := set(string(settings)); err != nil {
		return fmt.Errorf("replay %s: take on its settings: %w", d.Tag, err)
	}
	if _, err := db.Exec(ctx, "SET LOCAL ROLE "+pgx.Identifier{d.Role}.Sanitize()); err != nil {
		return fmt.Errorf("replay %s: take on role %s: %w", d.Tag, d.Role, err)
	}
	if _, err := db.Exec(ctx, d.Statement); err != nil {
		return fmt.Errorf("replay %s as %s: %s: %w", d.Tag, d.Role, d.Statement, err)
	}
	if _, err := db.Exec(ctx, "SET LOCAL ROLE NONE"); err != nil {
		return fmt.Errorf("replay %s: put the role back: %w", d.Tag, err)
	}
	if err := set(before); err != nil {
		return fmt.Errorf("replay %s: put the settings back: %w", d.Tag, err)
	}
	return nil
}
