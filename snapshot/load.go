package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"quorate/snapshot/snapshotpb"
)

// LoadConfig configures the destination side.
type LoadConfig struct {
	ClusterID  string
	ConnString string                   // of an empty database without a logical replication slot, as a superuser
	Client     grpc.ClientConnInterface // to the source's sidecar
	BinDir     string                   // of PostgreSQL's programs, of the source server's version or newer: pg_restore is needed
	TempDir    string                   // where the schema archive is kept meanwhile; default the system's
	Streams    int                      // parts fetched and loaded at a time, default 3
	Jobs       int                      // indexes built at a time, default 2
	// IndexMemoryMiB is maintenance_work_mem of each job, default 128.
	IndexMemoryMiB int
	// Progress, if set, is told now and then what has been loaded. It must be quick.
	Progress func(Progress)
	Logger   *slog.Logger
}

// manifestBytesMax allows for some hundred thousand tables.
const manifestBytesMax = 256 << 20

// Progress says how far a load is.
type Progress struct {
	Phase      string // schema, data, indexes, analyze
	Parts      int
	PartsDone  int
	Rows       uint64
	BytesRaw   uint64 // in COPY's format
	BytesEstim uint64 // of the tables, as the source stores them
}

// Manifest says what was loaded.
type Manifest struct {
	Slot             uint64 // the database holds exactly the slots up to here
	Base             []byte // as the source gave it
	Incarnation      uint64 // of the source's database
	ClusterID        string
	ServerVersionNum uint32 // of the source
	Tables           []Table
	Rows             uint64
	BytesRaw         uint64   // in COPY's format
	Notes            []string // what an operator may want to know: roles made, collations that differ
}

// Table is one of the tables loaded.
type Table struct {
	Schema, Name string
	Rows         uint64
}

func (c *LoadConfig) setDefaults() error {
	var errs []error
	for _, f := range []struct{ name, value string }{{"ClusterID", c.ClusterID}, {"ConnString", c.ConnString}, {"BinDir", c.BinDir}} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s: missing", f.name))
		}
	}
	if c.Client == nil {
		errs = append(errs, fmt.Errorf("%s: missing", "Client"))
	}
	if c.Streams == 0 {
		c.Streams = 3
	}
	if c.Jobs == 0 {
		c.Jobs = 2
	}
	if c.IndexMemoryMiB == 0 {
		c.IndexMemoryMiB = 128
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// Load fetches an image and loads it into the empty database of cfg. After an
// error the database is to be dropped.
func Load(ctx context.Context, cfg LoadConfig) (Manifest, error) {
	if err := cfg.setDefaults(); err != nil {
		return Manifest{}, fmt.Errorf("load a snapshot: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	client := snapshotpb.NewSnapshotClient(cfg.Client)
	imageCtx, release := context.WithCancel(ctx)
	defer release()
	stream, err := client.Open(imageCtx, &snapshotpb.OpenRequest{ClusterId: cfg.ClusterID, Protocol: protocol}, grpc.MaxCallRecvMsgSize(manifestBytesMax))
	if err != nil {
		return Manifest{}, fmt.Errorf("open a snapshot: %w", err)
	}
	m, err := stream.Recv()
	if err != nil {
		return Manifest{}, fmt.Errorf("open a snapshot: %w", err)
	}
	if m.ClusterId != cfg.ClusterID || m.Protocol != protocol {
		return Manifest{}, fmt.Errorf("open a snapshot: an image of cluster %q by protocol %d, expected cluster %q by %d", m.ClusterId, m.Protocol, cfg.ClusterID, protocol)
	}
	// The image lives as long as this stream: its end, before all is here, is the
	// end of the load.
	l := &loader{cfg: &cfg, client: client, m: m, rows: make([]atomic.Uint64, len(m.Tables)), release: release}
	released := make(chan struct{})
	go func() {
		defer close(released)
		_, err := stream.Recv()
		if !l.completed.Load() {
			cancel(fmt.Errorf("the source gave up the image: %w", err))
		}
	}()
	defer func() {
		release()
		<-released
	}()
	if err := l.run(ctx); err != nil {
		if ctx.Err() != nil && context.Cause(ctx) != nil {
			err = context.Cause(ctx)
		}
		return Manifest{}, fmt.Errorf("load a snapshot: %w", err)
	}
	return l.result(), nil
}

type loader struct {
	cfg    *LoadConfig
	client snapshotpb.SnapshotClient
	m      *snapshotpb.Manifest
	notes  []string
	rows   []atomic.Uint64 // by table

	release   func() // ends the image
	completed atomic.Bool

	mu       sync.Mutex
	progress Progress // guarded by mu
}

func (l *loader) run(ctx context.Context) error {
	conn, err := l.connect(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	began := time.Now()
	step := func(phase string, f func() error) error {
		l.report(func(p *Progress) { p.Phase = phase })
		if err := f(); err != nil {
			return err
		}
		l.cfg.Logger.Info("snapshot load", "phase", phase, "done_after", time.Since(began))
		return nil
	}
	var archive *archive
	defer func() {
		if archive != nil {
			archive.remove()
		}
	}()
	if err := step("schema", func() (err error) {
		if err := l.check(ctx, conn); err != nil {
			return err
		}
		if err := l.makeRoles(ctx, conn); err != nil {
			return err
		}
		if archive, err = l.fetchSchema(ctx); err != nil {
			return err
		}
		return archive.restore(ctx, "pre-data")
	}); err != nil {
		return err
	}
	if err := step("data", func() error {
		if err := l.emptyExtensionTables(ctx, conn); err != nil {
			return err
		}
		if err := l.data(ctx); err != nil {
			return err
		}
		return l.setSequences(ctx, conn)
	}); err != nil {
		return err
	}
	// All is here. The source must say that it is good, and then need not hold
	// back vacuum while indexes are built.
	if _, err := l.client.Complete(ctx, &snapshotpb.CompleteRequest{Image: l.m.Image}); err != nil {
		return fmt.Errorf("complete the image: %w", err)
	}
	l.completed.Store(true)
	l.release()
	if err := step("indexes", func() error {
		if err := archive.restore(ctx, "post-data"); err != nil {
			return err
		}
		return l.refreshViews(ctx, conn)
	}); err != nil {
		return err
	}
	return step("analyze", func() error {
		if err := l.analyze(ctx); err != nil {
			return err
		}
		// The flush of this commit record is one of everything before it.
		for _, q := range []string{"BEGIN", "SET LOCAL synchronous_commit = local", "SELECT pg_current_xact_id()", "COMMIT"} {
			if _, err := conn.Exec(ctx, q); err != nil {
				return fmt.Errorf("flush what was loaded: %w", err)
			}
		}
		return nil
	})
}

func (l *loader) report(change func(*Progress)) {
	l.mu.Lock()
	change(&l.progress)
	p := l.progress
	l.mu.Unlock()
	if l.cfg.Progress != nil {
		l.cfg.Progress(p)
	}
}

func (l *loader) result() Manifest {
	out := Manifest{Slot: l.m.Slot, Base: l.m.Base, Incarnation: l.m.Incarnation, ClusterID: l.m.ClusterId, ServerVersionNum: l.m.ServerVersionNum, Notes: l.notes}
	for i, t := range l.m.Tables {
		n := l.rows[i].Load()
		out.Tables = append(out.Tables, Table{Schema: t.Name.Schema, Name: t.Name.Name, Rows: n})
		out.Rows += n
	}
	out.BytesRaw = l.progress.BytesRaw
	return out
}

// loadSettings are for writing: the source has checked the data, and what is
// half loaded is dropped.
func (c *LoadConfig) loadSettings() map[string]string {
	return map[string]string{
		"synchronous_commit": "off", "session_replication_role": "replica", "statement_timeout": "0", "lock_timeout": "0",
		"idle_in_transaction_session_timeout": "0", "row_security": "off", "default_transaction_read_only": "off",
		"maintenance_work_mem": fmt.Sprintf("%dMB", c.IndexMemoryMiB), "check_function_bodies": "off",
	}
}

func (l *loader) connect(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(l.cfg.ConnString)
	if err != nil {
		return nil, fmt.Errorf("connection string: %w", err)
	}
	for k, v := range l.cfg.loadSettings() {
		cfg.RuntimeParams[k] = v
	}
	cfg.RuntimeParams["application_name"] = "quorate snapshot"
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	cfg.RuntimeParams["search_path"] = "pg_catalog"
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the local database: %w", err)
	}
	return conn, nil
}

// data fetches and loads all parts.
func (l *loader) data(ctx context.Context) error {
	order := make([]int, len(l.m.Parts))
	var estimate uint64
	for i, p := range l.m.Parts {
		if int(p.Table) >= len(l.m.Tables) {
			return fmt.Errorf("%w: part %d is of table %d of %d", ErrCorrupt, i+1, p.Table, len(l.m.Tables))
		}
		order[i] = i
		estimate += p.BytesEstimate
	}
	// The largest first, so that no long one is left for the end.
	sort.SliceStable(order, func(a, b int) bool {
		return l.m.Parts[order[a]].BytesEstimate > l.m.Parts[order[b]].BytesEstimate
	})
	l.report(func(p *Progress) { p.Parts, p.BytesEstim = len(order), estimate })
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(l.cfg.Streams, len(order)) {
		g.Go(func() error {
			conn, err := l.connect(ctx)
			if err != nil {
				return err
			}
			defer closeConn(conn)
			for {
				n := int(next.Add(1)) - 1
				if n >= len(order) {
					return nil
				}
				if err := l.part(ctx, conn.PgConn(), order[n]); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

func (l *loader) part(ctx context.Context, conn *pgconn.PgConn, index int) error {
	t := l.m.Tables[l.m.Parts[index].Table]
	r, err := l.fetch(ctx, uint32(index+1))
	if err != nil {
		return fmt.Errorf("table %s: %w", quoted(t.Name), err)
	}
	sql := "COPY " + quoted(t.Name)
	if len(t.Columns) > 0 {
		sql += " (" + quotedList(t.Columns) + ")"
	}
	tag, err := conn.CopyFrom(ctx, r, sql+" FROM STDIN (FORMAT binary)")
	if err != nil {
		if r.err != nil {
			err = r.err // of which the server's words are only the echo
		}
		return fmt.Errorf("table %s: %w", quoted(t.Name), err)
	}
	if !r.ended || uint64(tag.RowsAffected()) != r.rows {
		return fmt.Errorf("table %s: %w: %d rows of part %d were loaded, the source sent %d", quoted(t.Name), ErrCorrupt, tag.RowsAffected(), index+1, r.rows)
	}
	l.rows[l.m.Parts[index].Table].Add(r.rows)
	l.report(func(p *Progress) {
		p.PartsDone++
		p.Rows += r.rows
		p.BytesRaw += r.total
	})
	return nil
}

// fetched is the content of a part, and why it broke off.
type fetched struct {
	chunkReader
	err error
}

func (f *fetched) Read(p []byte) (int, error) {
	n, err := f.chunkReader.Read(p)
	if err != nil && !f.ended {
		f.err = err
	}
	return n, err
}

func (l *loader) fetch(ctx context.Context, part uint32) (*fetched, error) {
	stream, err := l.client.Fetch(ctx, &snapshotpb.FetchRequest{Image: l.m.Image, Part: part})
	if err != nil {
		return nil, fmt.Errorf("fetch part %d: %w", part, err)
	}
	return &fetched{chunkReader: chunkReader{part: part, recv: stream.Recv}}, nil
}

// emptyExtensionTables removes the rows that CREATE EXTENSION put into tables of
// its own: the image has them as they are at the source.
func (l *loader) emptyExtensionTables(ctx context.Context, conn *pgx.Conn) error {
	for _, t := range l.m.Tables {
		if t.OfExtension {
			if _, err := conn.Exec(ctx, "DELETE FROM "+quoted(t.Name)); err != nil {
				return fmt.Errorf("empty table %s of an extension: %w", quoted(t.Name), err)
			}
		}
	}
	return nil
}

func (l *loader) setSequences(ctx context.Context, conn *pgx.Conn) error {
	for _, s := range l.m.Sequences {
		if _, err := conn.Exec(ctx, "SELECT setval($1::text::regclass, $2::int8, $3::bool)", quoted(s.Name), s.LastValue, s.IsCalled); err != nil {
			return fmt.Errorf("set sequence %s: %w", quoted(s.Name), err)
		}
	}
	return nil
}

// refreshViews fills materialized views. One that reads another must wait for
// it: passes go on as long as one view more was filled.
func (l *loader) refreshViews(ctx context.Context, conn *pgx.Conn) error {
	left := l.m.MaterializedViews
	for len(left) > 0 {
		var waiting []*snapshotpb.Name
		var last error
		for _, v := range left {
			_, err := conn.Exec(ctx, "REFRESH MATERIALIZED VIEW "+quoted(v))
			var pg *pgconn.PgError
			if errors.As(err, &pg) && pg.Code == "55000" { // reads one that is not populated
				waiting, last = append(waiting, v), fmt.Errorf("fill materialized view %s: %w", quoted(v), err)
				continue
			}
			if err != nil {
				return fmt.Errorf("fill materialized view %s: %w", quoted(v), err)
			}
		}
		if len(waiting) == len(left) {
			return last
		}
		left = waiting
	}
	return nil
}

// analyze gathers what the planner needs, for every table that has rows.
func (l *loader) analyze(ctx context.Context) error {
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(l.cfg.Jobs, len(l.m.Tables)) {
		g.Go(func() error {
			conn, err := l.connect(ctx)
			if err != nil {
				return err
			}
			defer closeConn(conn)
			for {
				n := int(next.Add(1)) - 1
				if n >= len(l.m.Tables) {
					return nil
				}
				if l.rows[n].Load() == 0 {
					continue
				}
				if _, err := conn.Exec(ctx, "ANALYZE "+quoted(l.m.Tables[n].Name)); err != nil {
					return fmt.Errorf("analyze %s: %w", quoted(l.m.Tables[n].Name), err)
				}
			}
		})
	}
	return g.Wait()
}

// check refuses a database into which the image does not fit.
func (l *loader) check(ctx context.Context, conn *pgx.Conn) error {
	var version uint32
	var encoding, collate, ctype string
	var tables, slots int64
	err := conn.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, pg_encoding_to_char(encoding), datcollate, datctype,
		(SELECT count(*) FROM pg_class c WHERE c.oid >= 16384 AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
		   AND c.relnamespace <> coalesce((SELECT oid FROM pg_namespace WHERE nspname = 'information_schema'), 0::oid)),
		(SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'logical' AND database = current_database())
		FROM pg_database WHERE datname = current_database()`).Scan(&version, &encoding, &collate, &ctype, &tables, &slots)
	if err != nil {
		return fmt.Errorf("read the database's properties: %w", err)
	}
	switch {
	case tables > 0:
		return fmt.Errorf("the database is not empty: it has %d tables, views or sequences", tables)
	case slots > 0:
		return errors.New("the database has a logical replication slot, which would decode the load: make it afterwards")
	case encoding != l.m.Encoding:
		return fmt.Errorf("the database has encoding %s, the source %s: create it with ENCODING '%s'", encoding, l.m.Encoding, l.m.Encoding)
	case version/10000 < l.m.ServerVersionNum/10000:
		return fmt.Errorf("this server has version %d, the source %d: upgrade this one first", version, l.m.ServerVersionNum)
	}
	if collate != l.m.Collate || ctype != l.m.Ctype {
		return fmt.Errorf("the database sorts by %s (characters by %s), the source by %s (%s): create it with the same locale", collate, ctype, l.m.Collate, l.m.Ctype)
	}
	if version/10000 != l.m.ServerVersionNum/10000 {
		l.notes = append(l.notes, fmt.Sprintf("the source's server has version %d, this one %d", l.m.ServerVersionNum, version))
	}
	for _, e := range l.m.Extensions {
		var available bool
		if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_available_extension_versions WHERE name = $1 AND version = $2)", e.Name, e.Version).Scan(&available); err != nil {
			return fmt.Errorf("look for extension %q: %w", e.Name, err)
		}
		if !available {
			var any bool
			if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = $1)", e.Name).Scan(&any); err != nil {
				return fmt.Errorf("look for extension %q: %w", e.Name, err)
			}
			if !any {
				return fmt.Errorf("extension %q is not available on this server: install its package", e.Name)
			}
			l.notes = append(l.notes, fmt.Sprintf("extension %q is of version %s at the source, which this server does not have: its default version is used", e.Name, e.Version))
		}
	}
	for _, c := range l.m.Collations {
		if c.Name.Schema != "pg_catalog" || c.Version == "" {
			continue
		}
		var here string
		err := conn.QueryRow(ctx, `SELECT coalesce(max(pg_collation_actual_version(c.oid)), '') FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
			WHERE n.nspname = $1 AND c.collname = $2`, c.Name.Schema, c.Name.Name).Scan(&here)
		if err != nil {
			return fmt.Errorf("look for collation %q: %w", c.Name.Name, err)
		}
		if here != c.Version {
			l.notes = append(l.notes, fmt.Sprintf("collation %q has version %q here, %q at the source: what it orders may differ", c.Name.Name, here, c.Version))
		}
	}
	return nil
}

func (l *loader) makeRoles(ctx context.Context, conn *pgx.Conn) error {
	for _, role := range l.m.Roles {
		var exists bool
		if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role).Scan(&exists); err != nil {
			return fmt.Errorf("look for role %q: %w", role, err)
		}
		if exists {
			continue
		}
		if _, err := conn.Exec(ctx, "CREATE ROLE "+pgx.Identifier{role}.Sanitize()+" NOLOGIN"); err != nil {
			return fmt.Errorf("make role %q: %w", role, err)
		}
		l.notes = append(l.notes, fmt.Sprintf("role %q was missing and was made without LOGIN", role))
	}
	return nil
}
