package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"
)

// program prepares one of PostgreSQL's programs to work on the database of a
// connection string. The connection goes by the environment: arguments can be
// read by everybody on the machine, and a password may be in it.
func program(ctx context.Context, binDir, name, connString string, settings map[string]string, args ...string) (*exec.Cmd, *tailBuffer, error) {
	cfg, err := pgx.ParseConfig(connString)
	if err != nil {
		return nil, nil, fmt.Errorf("connection string: %w", err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, name), args...)
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "PG") && !strings.HasPrefix(kv, "LC_") && !strings.HasPrefix(kv, "LANG") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	var options strings.Builder
	for k, v := range settings {
		fmt.Fprintf(&options, " -c %s=%s", k, strings.NewReplacer(`\`, `\\`, " ", `\ `).Replace(v))
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C", "PGHOST="+cfg.Host, fmt.Sprintf("PGPORT=%d", cfg.Port), "PGUSER="+cfg.User, "PGDATABASE="+cfg.Database,
		"PGAPPNAME=quorate snapshot", "PGCLIENTENCODING=UTF8", "PGOPTIONS="+options.String())
	if cfg.Password != "" {
		cmd.Env = append(cmd.Env, "PGPASSWORD="+cfg.Password)
	}
	said := &tailBuffer{}
	cmd.Stderr = said
	return cmd, said, nil
}

// tailBuffer keeps the end of what a program said.
type tailBuffer struct{ b []byte }

const tailBytes = 4 << 10

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > 2*tailBytes {
		t.b = append(t.b[:0], t.b[len(t.b)-tailBytes:]...)
	}
	return len(p), nil
}

func (t *tailBuffer) String() string { return string(bytes.TrimSpace(t.b)) }
