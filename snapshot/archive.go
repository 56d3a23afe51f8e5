package snapshot

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"quorate/snapshot/snapshotpb"
)

// archive is the schema, as pg_dump wrote it, with the list of what of it is
// restored.
type archive struct {
	cfg  *LoadConfig
	dir  string
	list string
}

func (a *archive) remove() { os.RemoveAll(a.dir) }

func (a *archive) file() string { return filepath.Join(a.dir, "schema.dump") }

func (l *loader) fetchSchema(ctx context.Context) (*archive, error) {
	dir, err := os.MkdirTemp(l.cfg.TempDir, "quorate-snapshot-")
	if err != nil {
		return nil, err
	}
	a := &archive{cfg: l.cfg, dir: dir, list: filepath.Join(dir, "list")}
	if err := l.fetchArchive(ctx, a); err != nil {
		a.remove()
		return nil, fmt.Errorf("the schema: %w", err)
	}
	return a, nil
}

func (l *loader) fetchArchive(ctx context.Context, a *archive) error {
	r, err := l.fetch(ctx, 0)
	if err != nil {
		return err
	}
	f, err := os.Create(a.file())
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	cmd, said, err := program(ctx, a.cfg.BinDir, "pg_restore", a.cfg.ConnString, nil, "--list", a.file())
	if err != nil {
		return err
	}
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("pg_restore --list: %w: %s", err, said)
	}
	return os.WriteFile(a.list, withoutExcluded(out, l.m.Excluded), 0o600)
}

// listed is a line of an archive's table of contents: its number in the archive,
// then the catalog and the row in it that it was made from.
var listed = regexp.MustCompile(`^\d+; (\d+) (\d+) `)

// withoutExcluded removes lines from an archive's table of contents.
func withoutExcluded(list []byte, excluded []*snapshotpb.CatalogEntry) []byte {
	out := make(map[[2]uint64]bool, len(excluded))
	for _, e := range excluded {
		out[[2]uint64{uint64(e.Catalog), uint64(e.Oid)}] = true
	}
	var kept bytes.Buffer
	lines := bufio.NewScanner(bytes.NewReader(list))
	lines.Buffer(nil, len(list)+1)
	for lines.Scan() {
		if m := listed.FindSubmatch(lines.Bytes()); m != nil {
			catalog, _ := strconv.ParseUint(string(m[1]), 10, 32)
			oid, _ := strconv.ParseUint(string(m[2]), 10, 32)
			if out[[2]uint64{catalog, oid}] {
				continue
			}
		}
		kept.Write(lines.Bytes())
		kept.WriteByte('\n')
	}
	return kept.Bytes()
}

// restore makes what belongs to a section of the archive.
func (a *archive) restore(ctx context.Context, section string) error {
	args := []string{"--section=" + section, "--use-list=" + a.list, "--no-tablespaces", "--exit-on-error"}
	if section == "post-data" {
		args = append(args, fmt.Sprintf("--jobs=%d", a.cfg.Jobs))
	}
	cfg := *a.cfg
	cmd, said, err := program(ctx, cfg.BinDir, "pg_restore", cfg.ConnString, cfg.loadSettings(), args...)
	if err != nil {
		return err
	}
	// Without -d it would write a script; the name alone is no secret.
	for _, kv := range cmd.Env {
		if name, ok := bytes.CutPrefix([]byte(kv), []byte("PGDATABASE=")); ok {
			cmd.Args = append(cmd.Args, "--dbname="+string(name))
		}
	}
	cmd.Args = append(cmd.Args, a.file())
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_restore of section %s: %w: %s", section, err, said)
	}
	return nil
}
