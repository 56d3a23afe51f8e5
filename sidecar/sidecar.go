package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
	"quorate/paxosgroup/runner"
	"quorate/replication/catalog"
	"quorate/sidecar/admin"
	"quorate/sidecar/config"
	"quorate/sidecar/sidecarpb"
	"quorate/snapshot"
	"quorate/tracing"
)

// reconnectBackoff is short, for a healed link should serve at once.
var reconnectBackoff = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond}

// errSuperseded ends a life whose replica must never vote again.
var errSuperseded = errors.New("data_dir was put back to an earlier state")

// Run is a sidecar's life: it returns nil when ctx ends, else why it cannot go on.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	log = log.With("region", cfg.Region)
	for {
		err := run(ctx, cfg, log)
		if !errors.Is(err, errSuperseded) || ctx.Err() != nil {
			return err
		}
		log.Error("this replica does not vote any more: the region joins as a new one, and is seeded anew", "err", err)
	}
}

// run is the life of one replica.
func run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("data_dir: %w", err)
	}
	id, err := loadIdentity(cfg.DataDir)
	if err != nil {
		return err
	}
	if id != nil && (id.Cluster != cfg.Cluster || id.Region != cfg.Region) {
		return fmt.Errorf("data_dir %s belongs to region %s of cluster %s, the configuration names region %s of cluster %s", cfg.DataDir, id.Region, id.Cluster, cfg.Region, cfg.Cluster)
	}
	slots, restored, err := openLog(&cfg, log)
	if err != nil {
		return err
	}
	defer func() { slots.Close() }()
	if _, has := restored[mainGroup]; has && id == nil {
		return fmt.Errorf("%s holds a log, but %s has no %s: they belong together; if the identity is lost, move both away and start again: the region then joins as a new replica", cfg.Log.Where(), cfg.DataDir, identityFile)
	}
	if _, has := restored[mainGroup]; !has && id != nil && id.Began {
		return fmt.Errorf("the log in %s is lost, and with it what this replica promised: it must not vote again. Bring the log back, or move data_dir %s away and empty the database: the region then joins as a new replica", cfg.Log.Where(), cfg.DataDir)
	}
	var db *database // nil in a witness
	if cfg.Own().HasDatabase() {
		if db, err = newDatabase(&cfg, log); err != nil {
			return err
		}
		defer db.close()
	}
	peers := newRegionClients(&cfg)
	defer peers.close()

	back := &backend{cfg: &cfg, peers: peers, version: admin.Build(), log: log, note: "starting", last: map[string]admin.RegionStatus{}}
	first := newFirstLook(db)
	member := newMembership(&cfg, id, peers, log, first.state)

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	adminServer, err := admin.NewServer(admin.Config{Address: cfg.Listen.Admin, Backend: back, Gatherer: registry, Logger: log})
	if err != nil {
		return err
	}
	if err := adminServer.Listen(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return adminServer.Run(ctx) })
	g.Go(func() error {
		id, err := enter(ctx, &cfg, member, first, back.say)
		if err != nil {
			return endOf(ctx, err)
		}
		if id.Life == sidecarpb.Life_LIFE_JOINING {
			_, begun := restored[mainGroup]
			if slots, restored, err = join(ctx, &cfg, &id, member, slots, begun, db, peers, back.say, log); err != nil {
				return endOf(ctx, err)
			}
		}
		return takePart(ctx, &cfg, id, member, back, db, peers, slots, restored, registry, log)
	})
	return g.Wait()
}

// serve answers other sidecars at listen.peer until ctx ends.
func serve(ctx context.Context, cfg *config.Config, register func(*grpc.Server)) error {
	server := grpc.NewServer(peer.ServerOptions()...)
	register(server)
	listener, err := net.Listen("tcp", cfg.Listen.Peer)
	if err != nil {
		return fmt.Errorf("listen.peer: %w: if another process has the address, stop it, or give listen.peer another; it must be this machine's", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := server.Serve(listener); err != nil && ctx.Err() == nil {
			return fmt.Errorf("listen.peer: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		server.Stop()
		return nil
	})
	return g.Wait()
}

// enter returns this sidecar's identity once it has one. Meanwhile it answers
// who it is and nothing else.
func enter(ctx context.Context, cfg *config.Config, member *membership, first *firstLook, say func(string)) (id identity, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return serve(ctx, cfg, func(server *grpc.Server) { sidecarpb.RegisterClusterServer(server, member) })
	})
	g.Go(func() error { return first.run(ctx) })
	g.Go(func() error {
		defer stop()
		var err error
		id, err = member.await(ctx, say)
		return err
	})
	err = g.Wait()
	return id, err
}

// join gives a sidecar that lost its disk an image of the database, and a log
// that starts where the image stands.
func join(ctx context.Context, cfg *config.Config, id *identity, member *membership, slots durableLog, begun bool, db *database, peers *regionClients, say func(string), log *slog.Logger) (durableLog, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	if begun {
		// An earlier try ended between the log's beginning and its being noted.
		// Nothing was ever promised in it.
		if err := slots.Close(); err != nil {
			return slots, nil, fmt.Errorf("log: %w", err)
		}
		if err := removeLog(cfg.Log); err != nil {
			return slots, nil, fmt.Errorf("log: %w", err)
		}
		again, _, err := openLog(cfg, log)
		if err != nil {
			return slots, nil, err
		}
		slots = again
	}
	var base paxosgroup.Base
	var err error
	if db == nil {
		for {
			if base, err = witnessBase(ctx, cfg, peers, id.ClusterID, 0); err == nil {
				break
			}
			say("waiting for where to begin the log: " + err.Error())
			select {
			case <-ctx.Done():
				return slots, nil, ctx.Err()
			case <-time.After(500 * time.Millisecond):
			}
		}
	} else if base, _, err = seed(ctx, cfg, db, peers, id.ClusterID, 0, member, log, say); err != nil {
		return slots, nil, err
	}
	if err := startLog(slots, base); err != nil {
		return slots, nil, err
	}
	if err := slots.Close(); err != nil {
		return slots, nil, fmt.Errorf("log: %w", err)
	}
	again, restored, err := openLog(cfg, log)
	if err != nil {
		return slots, nil, err
	}
	slots = again
	err = member.update(func(now *identity) (*identity, error) {
		joined := *now
		joined.Life, joined.Began = sidecarpb.Life_LIFE_MEMBER, true
		*id = joined
		return &joined, nil
	})
	return slots, restored, err
}

// startLog makes the group's log begin at a base, durably.
func startLog(slots durableLog, base paxosgroup.Base) error {
	flushed := make(chan error, 1)
	slots.Append(mainGroup, []paxosgroup.Record{{Kind: paxosgroup.RecordBase, Base: &base}}, func(err error) { flushed <- err })
	if err := <-flushed; err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return nil
}

// takePart runs the consensus group and the database of a member.
func takePart(ctx context.Context, cfg *config.Config, id identity, member *membership, back *backend, db *database, peers *regionClients,
	slots durableLog, restored map[paxosgroup.GroupID]paxosgroup.Restored, registry *prometheus.Registry, log *slog.Logger) error {
	first, err := paxosgroup.DecodeMembership(id.Membership)
	if err != nil {
		return fmt.Errorf("%s: %w", identityFile, err)
	}
	if _, has := restored[mainGroup]; !has {
		if err := startLog(slots, paxosgroup.Base{Membership: first}); err != nil {
			return err
		}
	}
	known, err := loadLives(cfg.DataDir)
	if err != nil {
		return err
	}
	var past peer.Life // with this start
	err = member.mark(func(id *identity) {
		id.Began = true
		id.Start++
		id.Nonces = append([]uint64{uint64(newIncarnation())}, id.Nonces[:min(len(id.Nonces), peer.NoncesMax-1)]...)
		past = peer.Life{Start: id.Start, Nonces: id.Nonces}
	})
	if err != nil {
		return err
	}
	tracer, err := tracing.New(ctx, tracing.Config{
		URL: cfg.Tracing.OTLP, ClusterID: fmt.Sprintf("%016x", id.ClusterID), Region: cfg.Region, SampleRatio: cfg.Tracing.SampleRatio, Logger: log,
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		tracer.Shutdown(ctx)
	}()

	m := newMetrics(registry)
	s := newShard(cfg, tracer, m, log)
	s.clusterID, s.others = id.ClusterID, back
	s.logBytes = func() int64 { return int64(slots.Stats().Segments) * int64(cfg.Log.SegmentBytes) }
	s.logRoom = func() (full, low bool) { return roomOf(slots) }
	var run *runner.Runner
	superseded := make(chan string, 1)
	transport, err := peer.New(peer.Config{
		ClusterID: fmt.Sprintf("%016x", id.ClusterID), Self: id.ReplicaID, Logger: log,
		Deliver: func(from paxosgroup.ReplicaID, batch []peer.GroupMessage) { run.Deliver(from, batch) },
		Life:    past, Meet: known.meet, LeaseDuration: cfg.Consensus.LeaseDuration,
		Superseded: func(by paxosgroup.ReplicaID, why string) {
			select {
			case superseded <- fmt.Sprintf("replica %d refused this one: %s", by, why):
			default: // told already
			}
		},
	})
	if err != nil {
		return err
	}
	var accepted func(paxosgroup.GroupID, paxosgroup.SlotEntry, time.Time, time.Time, time.Time)
	if tracer != nil {
		accepted = s.noteAccepted
	}
	run, err = runner.New(runner.Config{
		Accepted: accepted,
		Log:      slots, Restored: restored, Transport: transport, Logger: log,
		Groups: []runner.GroupConfig{{
			Core: paxosgroup.Config{
				Group: mainGroup, ID: id.ReplicaID, Region: cfg.Region,
				HeartbeatInterval: cfg.Consensus.HeartbeatInterval, ElectionTimeoutMin: cfg.Consensus.ElectionTimeoutMin,
				LeaseDuration: cfg.Consensus.LeaseDuration, ClockDriftPPMMax: cfg.Consensus.ClockDriftPPMMax,
				WindowSlotsMax: cfg.Consensus.WindowSlotsMax, WindowBytesMax: int(cfg.Consensus.WindowBytesMax),
				PreferredRegion: cfg.PreferredLeader, HandBack: cfg.LeaderHandBack, Seed: uint64(newIncarnation()),
			},
			Bootstrap: first, // of no account once the log holds a base
		}},
	})
	if err != nil {
		return err
	}
	group := run.Group(mainGroup)
	s.group = group
	// Not before its database is known to be able to lead.
	group.SetElectable(false)

	m.watch(registry, slots, run, group)
	images, err := snapshot.NewServer(snapshot.ServerConfig{Source: s, ClusterID: fmt.Sprintf("%016x", id.ClusterID), Logger: log})
	if err != nil {
		return err
	}
	back.run(s, id)
	member.serve(s)

	asked := ctx // ends when the sidecar is asked to end; what runs below goes on until it has left
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, ctx := errgroup.WithContext(life)
	g.Go(func() error {
		defer end()
		select {
		case <-asked.Done():
			s.leave(ctx)
		case <-ctx.Done():
		}
		return nil
	})
	g.Go(func() error {
		return serve(ctx, cfg, func(server *grpc.Server) {
			sidecarpb.RegisterClusterServer(server, member)
			transport.Register(server)
			images.Register(server)
		})
	})
	g.Go(func() error { return run.Run(ctx) })
	g.Go(func() error {
		select {
		case why := <-superseded:
			// Returning ends all that answers for this replica. That it is not begun
			// again is on disk as soon as that can be.
			return errors.Join(fmt.Errorf("%w: %s", errSuperseded, why), member.mark(func(id *identity) { id.Superseded = why }))
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error { return transport.Run(ctx) })
	g.Go(func() error { return followMembership(ctx, cfg, group, transport) })
	g.Go(func() error { return s.admit(ctx) })
	g.Go(func() error { return s.makeSpans(ctx) })
	if cfg.LeaderHandBack {
		g.Go(func() error { return s.handBack(ctx) })
	}
	if db == nil {
		g.Go(func() error { return s.witness(ctx) })
	} else {
		g.Go(func() error { return s.live(ctx, db, member) })
		g.Go(func() error { return s.leadElsewhere(ctx) })
	}
	if cfg.Feed.Enabled && db != nil {
		g.Go(func() error { return s.runFeed(ctx) })
	}
	return g.Wait()
}

// followMembership tells the transport where the group's members are.
func followMembership(ctx context.Context, cfg *config.Config, group *runner.Group, transport *peer.Transport) error {
	addresses := map[string]string{}
	for _, r := range cfg.Regions {
		addresses[r.Name] = r.Peer
	}
	for {
		changed := group.StatusChanged()
		members := map[paxosgroup.ReplicaID]string{}
		st := group.Status()
		for _, m := range st.Contacts {
			if addr, ok := addresses[m.Region]; ok && m.ID != st.ID {
				members[m.ID] = addr
			}
		}
		transport.SetPeers(members)
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// live is the succession of incarnations of this region's database.
func (s *shard) live(ctx context.Context, db *database, member *membership) error {
	for ctx.Err() == nil {
		inc, err := s.begin(ctx, db, member)
		if err == nil {
			err = s.incarnate(ctx, db, member, inc)
		}
		// What follows begins with nothing proposed in the term under way.
		s.group.SetElectable(false)
		s.group.Resign()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errReplace) {
			if err = s.replace(ctx, db, member); err == nil {
				err = member.markReplace("")
			}
		}
		if err != nil && ctx.Err() == nil {
			s.fail(err)
			select {
			case <-ctx.Done():
			case <-time.After(500 * time.Millisecond):
			}
		}
	}
	return nil
}

// fail says what is wrong where operators look.
func (s *shard) fail(err error) {
	news := false // it is found anew at every try
	s.set(func() {
		news = s.health != err.Error()
		s.state, s.health = admin.StateStopped, err.Error()
	})
	if news {
		s.log.Error("the database is not served", "err", err)
	}
}

// replace seeds this region anew. Where the image stands above what the log
// holds, which others have cut, the log begins there.
func (s *shard) replace(ctx context.Context, db *database, member *membership) error {
	// What the database had on disk is not counted on from now on: it is wrong, or gone.
	s.set(func() { s.state, s.health, s.durable = admin.StateSeeding, "", 0 })
	st := s.group.Status()
	above := st.Base
	if s.group.NeedsSnapshot() {
		above = st.Chosen + 1
	}
	base, _, err := seed(ctx, s.cfg, db, s.others.peers, s.clusterID, above, member, s.log, func(note string) { s.log.Info(note) })
	if err != nil {
		return err
	}
	return s.group.Restart(ctx, base)
}

// watchBehind ends an incarnation when the others have cut their logs past what
// is missing here.
func (s *shard) watchBehind(ctx context.Context) error {
	tick := time.NewTicker(behindEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if s.group.NeedsSnapshot() {
			s.log.Warn("the other regions have cut their logs past what is missing here: this region is seeded anew", "chosen", s.group.Status().Chosen)
			return fmt.Errorf("%w: it is behind the others' logs", errReplace)
		}
	}
}

// begin returns the incarnation of the database, having set it up if it is new,
// or errReplace if it must come from another region.
func (s *shard) begin(ctx context.Context, db *database, member *membership) (inc paxosgroup.Incarnation, err error) {
	setup, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if id, _ := member.current(); id.Replace != "" {
		if err := db.refuseConnections(setup); err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("%w: %s", errReplace, id.Replace)
	}
	shut, err := db.openForSession(setup)
	if err != nil {
		return 0, err
	}
	if shut {
		// The session that follows must find it as it was.
		defer func() {
			again, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			err = errors.Join(err, db.refuseConnections(again))
		}()
	}
	conn, err := db.connect(setup, "set-up")
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := db.check(setup, conn, "", func(string) {}); err != nil {
		return 0, err
	}
	st, err := db.readState(setup, conn)
	if err != nil {
		return 0, err
	}
	id, _ := member.current()
	clusterID := fmt.Sprintf("%016x", id.ClusterID)
	if st.incarnation != 0 {
		// Also brings an older schema up to date, and finds a stranger's.
		if err := catalog.Install(setup, conn, catalog.Options{ClusterID: clusterID, Region: s.cfg.Region, Shard: mainShard}); err != nil {
			return 0, err
		}
		if err := member.markFounded(); err != nil {
			return 0, err
		}
		return st.incarnation, db.tidy(setup)
	}
	empty, err := db.empty(setup, conn)
	if err != nil {
		return 0, err
	}
	if id.Founded || id.Origin != "" && id.Origin != s.cfg.Region {
		if !empty {
			return 0, fmt.Errorf("database %s holds tables, but none of this cluster's: empty it (drop and create it), and it will be seeded from another region", db.base.Database)
		}
		conn.Close(setup)
		return 0, errReplace
	}
	// The cluster's beginning: an empty database, or the one that all start from.
	inc = newIncarnation()
	if err := db.withMaintenance(setup, func(m *pgx.Conn) error { return dropSlots(setup, m, db.base.Database) }); err != nil {
		return 0, err
	}
	if err := db.found(setup, conn, id.ClusterID, s.cfg.Region, inc, 0); err != nil {
		return 0, err
	}
	return inc, member.markFounded()
}

// incarnate lives with one incarnation of the database: the learner for as long
// as that lasts, sessions as PostgreSQL comes and goes. It returns errReplace
// when the database must be replaced.
func (s *shard) incarnate(ctx context.Context, db *database, member *membership, inc paxosgroup.Incarnation) error {
	base, err := s.lowestBase()
	if err != nil {
		return err
	}
	id, _ := member.current()
	ground, err := footingAt(id, inc, base)
	if err != nil {
		s.log.Error("this database must be replaced", "why", err)
		if err := member.markReplace(err.Error()); err != nil {
			return err
		}
		return fmt.Errorf("%w: %w", errReplace, err)
	}
	s.set(func() {
		s.incarnation = inc
		s.ground, s.foreign, s.large, s.durable = ground, nil, nil, 0
		s.learned, s.applied, s.effectiveLSN = base.Slot, 0, ground.EffectiveLSN
		s.lastForeign, s.opened, s.own = ground.LastForeign, opening{}, ownCommits{cut: ground.EffectiveLSN}
		// Where the log begins within a term, its opening is cut.
		s.term = termInfo{}
		if j := base.Judge; !j.Term.IsZero() {
			s.term = termInfo{ballot: j.Term, region: j.Region, incarnation: j.Incarnation, slot: base.Slot}
		}
		s.divergent, s.tracker, s.sequences, s.held = "", nil, false, false
		s.arrivals, s.covered, s.wanted, s.sampling, s.pending, s.ddl = 0, 0, 0, 0, nil, 0
		s.conflict, s.progress = false, 0
		s.proposedIn, s.capturing, s.unproposed = paxosgroup.Ballot{}, capturing{}, false
		s.shut = false
	})
	s.group.SetIncarnation(inc)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.learn(ctx, base.Slot+1) })
	g.Go(func() error { return s.watchBehind(ctx) })
	g.Go(func() error {
		for {
			err := s.runSession(ctx, db, member)
			if ctx.Err() != nil || errors.Is(err, errReplace) || errors.Is(err, errBeginAgain) {
				return err
			}
			if err == nil {
				err = errors.New("the connections to PostgreSQL ended")
			}
			s.fail(err)
			// Without its database this region can do nothing for a client.
			s.group.Resign()
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	return g.Wait()
}

// firstLook tells what the database holds before the sidecar has a cluster.
type firstLook struct {
	db   *database
	mu   sync.Mutex
	last lookResult
}

type lookResult struct {
	empty   bool
	problem string // why the region cannot take part yet
}

func newFirstLook(db *database) *firstLook {
	if db == nil { // a witness: nothing is in the way, and there is nothing to start from
		return &firstLook{last: lookResult{empty: true}}
	}
	return &firstLook{db: db, last: lookResult{problem: "its database was not looked at yet"}}
}

func (f *firstLook) state() (empty bool, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last.empty, f.last.problem
}

// run looks again and again until ctx ends.
func (f *firstLook) run(ctx context.Context) error {
	if f.db == nil {
		<-ctx.Done()
		return nil
	}
	for {
		r := f.look(ctx)
		f.mu.Lock()
		f.last = r
		f.mu.Unlock()
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

func (f *firstLook) look(ctx context.Context) lookResult {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := f.db.connect(ctx, "set-up")
	if err != nil {
		return lookResult{problem: err.Error()}
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := f.db.check(ctx, conn, "", func(string) {}); err != nil {
		return lookResult{problem: err.Error()}
	}
	empty, err := f.db.empty(ctx, conn)
	if err != nil {
		return lookResult{problem: err.Error()}
	}
	return lookResult{empty: empty}
}
