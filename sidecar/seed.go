package sidecar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/paxosgroup"
	"quorate/replication/entry"
	"quorate/replication/sequence"
	"quorate/sidecar/admin"
	"quorate/sidecar/config"
	"quorate/sidecar/sidecarpb"
	"quorate/snapshot"
)

// The image of another region is loaded into a database of its own beside the
// one it replaces; when it is complete and flushed, the two change names in one
// transaction. A crash before that leaves the old database and a leftover that
// is dropped; after it, the new one and a leftover that is dropped.
func (db *database) seedName() string { return db.base.Database + "_quorate_seed" }
func (db *database) oldName() string  { return db.base.Database + "_quorate_old" }

// tidy removes what a seeding that was cut short left behind.
func (db *database) tidy(ctx context.Context) error {
	return db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		for _, name := range []string{db.seedName(), db.oldName()} {
			if err := dropDatabase(ctx, conn, name); err != nil {
				return err
			}
		}
		return dropOrigins(ctx, conn)
	})
}

// dropOrigins drops the replication origins that go with no replication slot.
// Origins belong to the server, not to a database, and their number is bounded.
func dropOrigins(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin
		WHERE roname LIKE 'quorate\_%' AND roname NOT IN (SELECT slot_name FROM pg_replication_slots)`)
	if err != nil {
		return fmt.Errorf("drop replication origins: %w", err)
	}
	return nil
}

// dropDatabase drops a database, its replication slots first.
func dropDatabase(ctx context.Context, conn *pgx.Conn, name string) error {
	if err := dropSlots(ctx, conn, name); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "DROP DATABASE IF EXISTS "+quoted(name)+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	return nil
}

// dropSlots drops the sidecar's replication slots of a database, ending whoever
// streams from them: a former life of this sidecar.
func dropSlots(ctx context.Context, conn *pgx.Conn, name string) error {
	for {
		rows, err := conn.Query(ctx, "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = $1 AND slot_name LIKE 'quorate%'", name)
		if err != nil {
			return err
		}
		type slot struct {
			Name string
			PID  *int32
		}
		slots, err := pgx.CollectRows(rows, pgx.RowToStructByPos[slot])
		if err != nil {
			return err
		}
		if len(slots) == 0 {
			return nil
		}
		for _, s := range slots {
			if s.PID != nil {
				if _, err := conn.Exec(ctx, "SELECT pg_terminate_backend($1)", *s.PID); err != nil {
					return err
				}
				continue
			}
			if _, err := conn.Exec(ctx, "SELECT pg_drop_replication_slot($1)", s.Name); err != nil && !isCode(err, "42704") && !isCode(err, "55006") {
				return fmt.Errorf("drop replication slot %s: %w", s.Name, err)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// createSeed makes the empty database that an image is loaded into, with the
// encoding and locale of the one it will replace.
func (db *database) createSeed(ctx context.Context) error {
	return db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		var encoding, collate, ctype, owner string
		err := conn.QueryRow(ctx, `SELECT pg_encoding_to_char(encoding), datcollate, datctype, pg_get_userbyid(datdba)
			FROM pg_database WHERE datname = $1`, db.base.Database).Scan(&encoding, &collate, &ctype, &owner)
		if err != nil {
			return fmt.Errorf("look at database %s: %w", db.base.Database, err)
		}
		_, err = conn.Exec(ctx, fmt.Sprintf("CREATE DATABASE %s TEMPLATE template0 OWNER %s ENCODING %s LC_COLLATE %s LC_CTYPE %s",
			quoted(db.seedName()), quoted(owner), literal(encoding), literal(collate), literal(ctype)))
		if err != nil {
			return fmt.Errorf("create database %s: %w", db.seedName(), err)
		}
		return nil
	})
}

// swap puts the loaded database in the place of the old one.
func (db *database) swap(ctx context.Context) error {
	return db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, "ALTER DATABASE "+quoted(db.base.Database)+" ALLOW_CONNECTIONS false"); err != nil {
			return err
		}
		if err := dropSlots(ctx, conn, db.base.Database); err != nil {
			return err
		}
		for {
			if _, err := conn.Exec(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = ANY($1)",
				[]string{db.base.Database, db.seedName()}); err != nil {
				return err
			}
			err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, "ALTER DATABASE "+quoted(db.base.Database)+" RENAME TO "+quoted(db.oldName())); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, "ALTER DATABASE "+quoted(db.seedName())+" RENAME TO "+quoted(db.base.Database))
				return err
			})
			if err == nil {
				break
			}
			if !isCode(err, "55006") || ctx.Err() != nil { // object_in_use: a backend is still on its way out
				return fmt.Errorf("put the loaded database in place: %w", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
		if err := dropDatabase(ctx, conn, db.oldName()); err != nil {
			return err
		}
		return dropOrigins(ctx, conn)
	})
}

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// seed replaces the replicated database by an image of a healthy region that
// stands at or above a slot, under a new incarnation, and returns where in the log
// it stands. It tries the regions
// in turn until ctx ends; the old database is kept until the new one is complete.
func seed(ctx context.Context, cfg *config.Config, db *database, peers *regionClients, clusterID uint64, above paxosgroup.Slot, member *membership, log *slog.Logger, say func(string)) (paxosgroup.Base, paxosgroup.Incarnation, error) {
	for {
		for _, region := range sources(ctx, cfg, peers, clusterID) {
			base, inc, err := seedFrom(ctx, cfg, db, peers, clusterID, region, above, member, log, say)
			if err == nil {
				return base, inc, nil
			}
			if ctx.Err() != nil {
				return base, 0, ctx.Err()
			}
			log.Warn("seeding did not succeed", "from", region, "err", err)
			say(fmt.Sprintf("seeding from %s: %v", region, err))
		}
		select {
		case <-ctx.Done():
			return paxosgroup.Base{}, 0, ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// sources lists the regions that could give an image, the nearest follower
// first and the leader, which has enough to do, last.
func sources(ctx context.Context, cfg *config.Config, peers *regionClients, clusterID uint64) []string {
	type answer struct {
		region string
		leads  bool
		after  time.Duration
	}
	var mu sync.Mutex
	var answers []answer
	var wg sync.WaitGroup
	begun := time.Now()
	for _, r := range cfg.Regions {
		if r.Name == cfg.Region {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, peerStatusWithin)
			defer cancel()
			c, err := peers.cluster(r.Name)
			if err != nil {
				return
			}
			reply, err := c.Region(ctx, &sidecarpb.RegionRequest{ClusterId: clusterID})
			if err != nil || reply.State != admin.StateFollowing && reply.State != admin.StateLeading {
				return
			}
			mu.Lock()
			answers = append(answers, answer{r.Name, reply.State == admin.StateLeading, time.Since(begun)})
			mu.Unlock()
		})
	}
	wg.Wait()
	slices.SortFunc(answers, func(a, b answer) int {
		if a.leads != b.leads {
			if a.leads {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.after, b.after)
	})
	regions := make([]string, len(answers))
	for i, a := range answers {
		regions[i] = a.region
	}
	return regions
}

func seedFrom(ctx context.Context, cfg *config.Config, db *database, peers *regionClients, clusterID uint64, region string, above paxosgroup.Slot, member *membership, log *slog.Logger, say func(string)) (base paxosgroup.Base, inc paxosgroup.Incarnation, err error) {
	conn, err := peers.conn(region)
	if err != nil {
		return base, 0, err
	}
	if err := db.tidy(ctx); err != nil {
		return base, 0, err
	}
	if err := db.createSeed(ctx); err != nil {
		return base, 0, err
	}
	bin, err := db.binDir(ctx, cfg)
	if err != nil {
		return base, 0, err
	}
	begun := time.Now()
	say("loading an image from region " + region)
	manifest, err := snapshot.Load(ctx, snapshot.LoadConfig{
		Client: conn, ConnString: db.dsnOf(db.seedName()), ClusterID: fmt.Sprintf("%016x", clusterID),
		BinDir: bin, Streams: cfg.Snapshot.Parallel, Logger: log,
	})
	if err != nil {
		return base, 0, err
	}
	if base, err = paxosgroup.DecodeBase(manifest.Base); err != nil {
		return base, 0, fmt.Errorf("image of region %s: %w", region, err)
	}
	if base.Slot < above {
		return base, 0, fmt.Errorf("the image stands at slot %d, and this region's own log begins only after slot %d", base.Slot, above)
	}
	inc = newIncarnation()
	to, err := db.connectTo(ctx, db.seedName(), "seeding")
	if err != nil {
		return base, 0, err
	}
	err = db.found(ctx, to, clusterID, cfg.Region, inc, base.Slot)
	to.Close(context.WithoutCancel(ctx))
	if err != nil {
		return base, 0, err
	}
	// Before the database is there: from now on it is known that nothing of this
	// incarnation is below.
	err = member.mark(func(id *identity) {
		id.Footings = addFooting(id.Footings, footing{Incarnation: inc, Slot: base.Slot, Seeded: true})
	})
	if err != nil {
		return base, 0, err
	}
	if err := db.swap(ctx); err != nil {
		return base, 0, err
	}
	log.Info("seeded", "from", region, "slot", base.Slot, "incarnation", inc, "took", time.Since(begun))
	return base, inc, nil
}

// binDir is where PostgreSQL's programs of the server's version are: a newer
// pg_dump writes settings that an older server refuses.
func (db *database) binDir(ctx context.Context, cfg *config.Config) (string, error) {
	if cfg.Postgres.BinDir != "" {
		return cfg.Postgres.BinDir, nil
	}
	var version int
	err := db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version)
	})
	if err != nil {
		return "", fmt.Errorf("read the server's version: %w", err)
	}
	program := cfg.Postgres.Binary("pg_dump", version/10000)
	if !filepath.IsAbs(program) {
		if program, err = exec.LookPath(program); err != nil {
			return "", fmt.Errorf("pg_dump of PostgreSQL %d is not found: install postgresql-client-%d, or set postgres.bin_dir", version/10000, version/10000)
		}
	}
	return filepath.Dir(program), nil
}

// Open implements snapshot.Source: it exports this region's database at a slot
// that is known exactly.
func (s *shard) Open(ctx context.Context) (*snapshot.Exported, error) {
	st := s.group.Status()
	s.mu.Lock()
	se, settled := s.session, s.settled
	leading := st.Role == paxosgroup.Leader && s.proposing == st.Ballot && s.term.ballot == st.Ballot && s.open
	s.mu.Unlock()
	switch {
	case se == nil:
		return nil, errors.New("this region's database is not connected")
	case leading:
		return se.exportLeader(ctx, st.Ballot)
	case settled:
		return se.exportFollower(ctx)
	}
	return nil, errors.New("this region's database is not settled")
}

// exportWithin bounds the export of a snapshot, during which replay stands still.
const exportWithin = 5 * time.Second

// exportFollower exports between two batches of replay, so the image is exactly
// what was applied.
func (se *session) exportFollower(ctx context.Context) (*snapshot.Exported, error) {
	short, cancel := context.WithTimeout(ctx, exportWithin)
	defer cancel()
	if err := se.lockApplying(short); err != nil {
		return nil, err
	}
	defer se.unlockApplying()
	// Nothing foreign is applied meanwhile, and while it is settled nothing local
	// commits: what is counted as applied before the export is in it.
	se.mu.Lock()
	settled, applied := se.settled, se.applied
	se.mu.Unlock()
	if !settled {
		return nil, errNotSettled
	}
	e, err := se.replay.Export(short)
	if err != nil {
		return nil, err
	}
	se.mu.Lock()
	settled = se.settled
	se.mu.Unlock()
	if !settled {
		e.Release()
		return nil, errNotSettled
	}
	// What was applied last may not be in applied yet.
	slot := max(applied, paxosgroup.Slot(e.Slot))
	// The image's log must hold the large transaction that is under way from its
	// first fragment on. Fragments write nothing, and sequence marks among them
	// may be applied twice, so an earlier slot is as true of the image.
	// Where one began is known only of what was learned.
	se.mu.Lock()
	known := slot <= se.learned
	slot = se.large.whole(slot)
	se.mu.Unlock()
	if !known {
		e.Release()
		return nil, fmt.Errorf("export at slot %d: the log is learned only up to below it", slot)
	}
	return se.exported(ctx, e.Name, slot, e.Release)
}

// exportLeader exports the snapshot that the making of a replication slot gives:
// an exact prefix of the WAL, which an ordinary one is not. It may hold commits
// that are not effective yet, so it is handed out only when all in it are.
func (se *session) exportLeader(ctx context.Context, ballot paxosgroup.Ballot) (*snapshot.Exported, error) {
	cfg, err := pgconn.ParseConfig(se.db.dsn)
	if err != nil {
		return nil, err
	}
	cfg.RuntimeParams["replication"] = "database"
	cfg.RuntimeParams["application_name"] = se.db.name("export")
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect for an export: %w", err)
	}
	release := func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		conn.Close(ctx)
	}
	// It waits for every transaction that runs.
	slotCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	made, err := pglogrepl.CreateReplicationSlot(slotCtx, conn, "quorate_export_"+newIncarnation().String(), "pgoutput",
		pglogrepl.CreateReplicationSlotOptions{Temporary: true, SnapshotAction: "EXPORT_SNAPSHOT"})
	if err != nil {
		release()
		return nil, fmt.Errorf("make a slot to export a snapshot (it waits for running transactions): %w", err)
	}
	point, err := pglogrepl.ParseLSN(made.ConsistentPoint)
	if err != nil {
		release()
		return nil, err
	}
	var slot paxosgroup.Slot
	nudged := make(chan error, 1)
	go func() {
		probe, err := se.db.connect(slotCtx, "export")
		if err == nil {
			_, err = probe.Exec(slotCtx, "SELECT pg_logical_emit_message(true, $1, 'export')", entry.LocalPrefix)
			probe.Close(context.WithoutCancel(slotCtx))
		}
		nudged <- err
	}()
	lost := errors.New("this region lost leadership while it exported")
	err = se.await(slotCtx, func() bool {
		if se.proposing != ballot {
			return true
		}
		for _, p := range se.pending {
			if p.commit && p.lsn <= point && p.lsn > se.effectiveLSN {
				return false
			}
		}
		if se.captured < point {
			return false
		}
		slot = se.term.slot
		if own, ok := se.own.slotAt(point); ok {
			slot = max(slot, own)
		}
		return true
	})
	err = errors.Join(err, <-nudged)
	if err == nil && slot == 0 {
		err = lost
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("export: %w", err)
	}
	e, err := se.exported(ctx, made.SnapshotName, slot, release)
	if err == nil {
		e.Verify = func(ctx context.Context) error { return se.markAnew(ctx, ballot) }
	}
	return e, err
}

// markAnew has every sequence in use marked behind the slot of an image that was
// just shipped. An image of a leader holds what its sequences were, not the marks
// ahead of them, and marks chosen before its slot are not replayed into it: a
// region that starts from it must meet new ones before it can ever lead.
func (se *session) markAnew(ctx context.Context, ballot paxosgroup.Ballot) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var until uint64
	se.set(func() {
		if se.proposing == ballot {
			se.tracker, se.sequences = sequence.NewTracker(), true
			se.arrivals++
			se.wanted, until = se.arrivals, se.arrivals
		}
	})
	lost := until == 0
	err := se.await(ctx, func() bool {
		lost = lost || se.proposing != ballot
		return lost || se.covered >= until
	})
	if err == nil && lost {
		err = errors.New("this region lost leadership while its image was shipped")
	}
	if err != nil {
		return fmt.Errorf("mark the sequences behind the image: %w", err)
	}
	return nil
}

func (se *session) exported(ctx context.Context, name string, slot paxosgroup.Slot, release func()) (*snapshot.Exported, error) {
	unhold := se.hold(slot) // from before the base is known to be there
	bin, err := se.db.binDir(ctx, se.cfg)
	var base paxosgroup.Base
	if err == nil {
		base, err = se.group.BaseAt(slot)
	}
	if err != nil {
		unhold()
		release()
		return nil, fmt.Errorf("export at slot %d: %w", slot, err)
	}
	inner := release
	release = func() {
		unhold()
		inner()
	}
	return &snapshot.Exported{
		ConnString: se.db.dsn, SnapshotName: name, Slot: uint64(slot), Base: paxosgroup.EncodeBase(base),
		Incarnation: uint64(se.incarnation), BinDir: bin, Release: release,
	}, nil
}
