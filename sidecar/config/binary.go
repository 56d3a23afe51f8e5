package config

import (
	"fmt"
	"os"
	"path/filepath"
)

// Binary returns how to call a client program of PostgreSQL, such as pg_dump,
// for a server of the given major version.
func (p Postgres) Binary(name string, major int) string {
	if p.BinDir != "" {
		return filepath.Join(p.BinDir, name)
	}
	path := filepath.Join(fmt.Sprintf("/usr/lib/postgresql/%d/bin", major), name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	return name
}
