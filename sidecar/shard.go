package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
	"quorate/replication/capture"
	"quorate/replication/entry"
	"quorate/replication/feed"
	"quorate/replication/sequence"
	"quorate/sidecar/admin"
	"quorate/sidecar/config"
	"quorate/tracing"
)

// The one shard there is so far, and its group.
const (
	mainShard                    = "main"
	mainGroup paxosgroup.GroupID = 1
)

// shard is the life of one shard's database in this region. Its goroutines:
//
//	learn    walks the log once, in order, as it is chosen: terms, own effective commits
//	replayer applies foreign entries to the database
//	sampler  covers positions by sequence marks
//	govern   moves the database between its roles, and runs all SQL of that
//
// and, while the database is up, capture, whose handler this type is. What they
// share lies under mu; whoever changes it calls notify, whoever waits for it
// uses await.
type shard struct {
	cfg     *config.Config
	log     *slog.Logger
	group   *runner.Group
	tracer  *tracing.Tracer
	metrics *metrics

	clusterID uint64
	now       func() paxosgroup.Instant // the clock by which leases are counted
	others    *backend                  // asks the other regions
	relations *entry.RelationCache      // of what is put into words

	mu      sync.Mutex
	changed chan struct{} // closed at the next change; nil if nobody waits
	turned  chan struct{} // closed at the next that may move the database's role; nil if nobody waits

	// What the log says, as far as it was learned.
	learned      paxosgroup.Slot
	term         termInfo          // the current effective term
	lastForeign  paxosgroup.Ballot // term of the last effective opening of another incarnation than ours
	effectiveLSN entry.LSN         // every own commit ending at or below it is effective
	own          ownCommits        // own effective commits, to recognise redelivered ones
	ground       footing           // what was known where the log begins
	foreign      []foreignTerm     // effective openings of other incarnations above that
	large        spans             // large transactions above that
	chosenAt     slotTimes         // when slots became chosen here, to tell lag in time

	// What the database is.
	incarnation paxosgroup.Incarnation
	state       string // an admin.State constant
	health      string // why it cannot go on; empty: it can
	applied     paxosgroup.Slot
	durable     paxosgroup.Slot   // everything up to here is on disk in this database, and whole
	open        bool              // the fence is open
	opened      opening           // the last time it was opened after another region's term
	proposing   paxosgroup.Ballot // term in which captured commits are proposed; zero: none
	settled     bool              // nothing local is left that could still commit or be divergent
	conflict    bool              // replay stopped at an entry that does not fit the database
	progress    uint64            // of the origin, when the last session ended; applied is good for it
	divergent   string            // why this database must be replaced; empty: it need not
	shut        bool              // clients are kept out of the database until it is settled
	session     *session          // with PostgreSQL, if connected
	synchronous bool              // COMMIT was seen to wait for us
	applying    chan struct{}     // holds a token while a batch is applied, or somebody must see the database between two

	// Of commits whose spans are to be made.
	spans    chan commitSpans
	accepted chan acceptedEntry

	images    []*heldImage    // shipped, or just now: the log is kept for them
	publisher *feed.Publisher // of this region; nil until there is one
	logBytes  func() int64    // that the log takes on disk
	logRoom   func() (full, low bool)

	// What capture handed over and PostgreSQL was not yet told.
	stream     *capture.Stream
	captured   entry.LSN // everything up to here was handed over
	pending    []pendingPosition
	held       bool              // confirm nothing: a proof is under way
	capturing  capturing         // the transaction that is being handed over
	unproposed bool              // commits were captured that nobody proposed
	proposedIn paxosgroup.Ballot // the last term in which a commit was proposed
	restart    paxosgroup.Ballot // the stream is to start over and propose in this term
	seen       []entry.LSN       // ends of the commits handed over since the session began, until it was looked whether one is missing
	looking    bool              // seen is being filled

	// Sequence coverage of positions: pending positions carry the number of
	// their arrival, and those up to covered need no further sample.
	arrivals  uint64
	covered   uint64
	wanted    uint64 // arrivals up to here are to be covered though nothing waits for them
	sampling  uint64 // arrivals up to here are covered by the sample that is being taken
	sequences bool   // there are sequences to be covered, or may be
	ddl       uint64 // xid of the last captured commit with DDL not known to be visible; 0: none
	tracker   *sequence.Tracker
}

// termInfo is the current term.
type termInfo struct {
	ballot      paxosgroup.Ballot
	region      string
	incarnation paxosgroup.Incarnation
	slot        paxosgroup.Slot // of its opening
}

// opening is a time the fence opened after another region's term, or for the
// first time. It is kept in the database, flushed before the fence opens.
type opening struct {
	term    paxosgroup.Ballot
	horizon uint64 // the next xid then: commits of lower ones are divergent
}

// capturing is a local commit between its Begin and its pending position: a
// large one takes its time, and leadership may come and go meanwhile.
type capturing struct {
	open      bool
	commitLSN entry.LSN
	term      paxosgroup.Ballot // in which all of it is proposed; zero: it is not
	begun     time.Time
}

// pendingPosition is a position of the WAL that is not confirmed yet.
type pendingPosition struct {
	lsn     entry.LSN
	commit  bool // a commit that must be effective; else only what precedes it must
	arrival uint64
	header  entry.Header // of commits
	checked bool         // recognised as the commit the log holds
	at      time.Time    // of its arrival
	stamps  *stamps      // if its trace is wanted
}

func newShard(cfg *config.Config, tracer *tracing.Tracer, m *metrics, log *slog.Logger) *shard {
	return &shard{
		cfg: cfg, tracer: tracer, metrics: m, log: log.With("shard", mainShard),
		state: admin.StateStarting, spans: make(chan commitSpans, spansMax), accepted: make(chan acceptedEntry, spansMax), applying: make(chan struct{}, 1), relations: entry.NewRelationCache(), now: runner.BootTime,
	}
}

// notify wakes everyone in await. The caller holds mu.
func (s *shard) notify() { wake(&s.changed) }

// wake closes a channel that somebody waits for.
func wake(c *chan struct{}) {
	if *c != nil {
		close(*c)
		*c = nil
	}
}

// upon returns a channel that wake closes.
func upon(c *chan struct{}) <-chan struct{} {
	if *c == nil {
		*c = make(chan struct{})
	}
	return *c
}

// turn wakes govern as well. The caller holds mu.
func (s *shard) turn() {
	wake(&s.turned)
	s.notify()
}

// await returns when ok does, called under mu, or when ctx ends.
func (s *shard) await(ctx context.Context, ok func() bool) error {
	for {
		s.mu.Lock()
		if ok() {
			s.mu.Unlock()
			return nil
		}
		changed := upon(&s.changed)
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *shard) set(f func()) {
	s.mu.Lock()
	f()
	s.turn()
	s.mu.Unlock()
}

// learn walks the log in order until ctx ends.
func (s *shard) learn(ctx context.Context, from paxosgroup.Slot) error {
	next := from
	for {
		chosen, moved := s.group.Chosen()
		if next > chosen {
			select {
			case <-moved:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		batch, err := s.group.Read(next, 4<<20)
		if err != nil {
			return fmt.Errorf("learn from slot %d: %w", next, err)
		}
		s.mu.Lock()
		for i := range batch {
			if batch[i].Slot != next {
				s.mu.Unlock()
				return fmt.Errorf("learn: the log gave slot %d instead of %d", batch[i].Slot, next)
			}
			if err := s.learnOne(&batch[i]); err != nil {
				s.mu.Unlock()
				return err
			}
			next++
		}
		s.chosenAt.add(next-1, time.Now())
		s.confirm()
		s.notify()
		s.mu.Unlock()
	}
}

// learnOne takes note of one entry. The caller holds mu.
func (s *shard) learnOne(d *paxosgroup.Delivered) error {
	s.learned = d.Slot
	if d.Verdict != paxosgroup.Effective {
		return nil
	}
	switch d.Entry.Kind {
	case paxosgroup.KindOpening:
		s.large.finish(d.Slot) // what was under way in another term comes to nothing
		s.term = termInfo{ballot: d.Entry.Term, region: d.Entry.Region, incarnation: d.Entry.Incarnation, slot: d.Slot}
		if d.Entry.Incarnation != s.incarnation {
			s.lastForeign = d.Entry.Term
			s.foreign = append(s.foreign, foreignTerm{d.Slot, d.Entry.Term})
			s.proposing, s.restart = paxosgroup.Ballot{}, paxosgroup.Ballot{}
		}
		s.turn()
	case paxosgroup.KindData:
		p, err := entry.Decode(d.Entry.Payload)
		if err != nil {
			return fmt.Errorf("slot %d: %w", d.Slot, err)
		}
		switch {
		case p.Type == entry.TypeFragment && p.Fragment == 1:
			s.large.begin(d.Slot)
		case p.Type == entry.TypeCommit:
			s.large.finish(d.Slot)
		}
		if p.Type == entry.TypeMarks {
			if s.tracker != nil && d.Entry.Incarnation == s.incarnation {
				s.tracker.Chosen(p.Marks)
			}
			return nil
		}
		if d.Entry.Incarnation != s.incarnation || p.Type == entry.TypeFragment {
			return nil
		}
		if p.Header.EndLSN <= s.effectiveLSN {
			panic(fmt.Sprintf("slot %d: own commit at %s is effective after that at %s", d.Slot, p.Header.EndLSN, s.effectiveLSN))
		}
		s.effectiveLSN = p.Header.EndLSN
		s.own.add(d.Slot, p.Header)
		if s.tracer != nil {
			s.stampChosen(p.Header.EndLSN)
		}
	}
	return nil
}

// confirm makes everything pending that can be confirmed known to PostgreSQL.
// The caller holds mu.
func (s *shard) confirm() {
	// While it is not settled whether this region goes on in a term of its own or
	// follows another, nothing is confirmed: not even what seems to be nothing may
	// stand for sequence values that no mark covers.
	if s.held || s.stream == nil || !s.settled && s.proposing.IsZero() {
		return
	}
	var to entry.LSN
	n := 0
	for ; n < len(s.pending); n++ {
		p := &s.pending[n]
		if p.commit {
			if p.lsn > s.effectiveLSN {
				break
			}
			if !p.checked && !s.own.matches(p.header) {
				s.condemn(fmt.Sprintf("the commit of transaction %d at %s is not the one that the log holds there: the server was restored or replaced", p.header.Xid, p.lsn))
				break
			}
			p.checked = true
		}
		if p.arrival > s.covered && s.sequences {
			break
		}
		to = p.lsn
	}
	if n == 0 {
		return
	}
	now := time.Now()
	for i := range s.pending[:n] {
		if p := &s.pending[i]; p.commit {
			s.metrics.commitSeconds.Observe(now.Sub(p.at).Seconds())
			s.released(p, now)
		}
	}
	s.pending = append(s.pending[:0], s.pending[n:]...)
	s.stream.Confirm(to)
}

// condemn marks this database as one that must be replaced. Nothing is cut any
// more, here or elsewhere, because it is in this database. The caller holds mu.
func (s *shard) condemn(why string) {
	s.durable = 0
	if s.divergent == "" {
		s.divergent = why
		s.log.Error("this database must be replaced", "why", why)
		s.turn()
	}
}

// lineage reports whether no other region's opening is effective since the fence
// was last opened, so that local commits may still become effective: in a term
// this region opens anew. The caller holds mu.
func (s *shard) lineage() bool {
	return !s.opened.term.IsZero() && s.lastForeign.Less(s.opened.term)
}

// unresolved counts captured commits that are not effective, the one that is
// being handed over included. The caller holds mu.
func (s *shard) unresolved() int {
	n := 0
	for i := range s.pending {
		if s.pending[i].commit && s.pending[i].lsn > s.effectiveLSN {
			n++
		}
	}
	if s.capturing.open && s.capturing.commitLSN >= s.effectiveLSN {
		n++
	}
	return n
}

// Begin implements capture.Handler.
func (s *shard) Begin(b capture.Begin) capture.Disposition {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capturing = capturing{open: true, commitLSN: b.CommitLSN}
	if s.tracer != nil {
		s.capturing.begun = time.Now()
	}
	if s.proposing.IsZero() || b.CommitLSN < s.effectiveLSN || s.unproposed {
		return capture.Digest
	}
	if b.Xid < s.opened.horizon {
		s.condemn(fmt.Sprintf("transaction %d began before another region led and committed after it", b.Xid))
		return capture.Digest
	}
	s.capturing.term = s.proposing
	return capture.Propose
}

// Entry implements capture.Handler: it proposes a payload of a commit.
func (s *shard) Entry(ctx context.Context, p entry.Payload) error {
	s.mu.Lock()
	term, begun := s.capturing.term, s.capturing.begun
	s.mu.Unlock()
	var st *stamps
	if s.tracer != nil && p.Type != entry.TypeFragment && s.tracer.Sampled(s.traced(s.incarnation, 0, term, p.Header)) {
		st = &stamps{begun: begun, captured: time.Now()}
	}
	// All of it in the term in which it began, and no other: if leadership was lost
	// and won between, it is for settle and renew to say whether this commit has a
	// place in the new term.
	_, err := s.group.ProposeIn(ctx, term, p.Append(nil))
	if st != nil {
		st.proposed = time.Now()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.Type == entry.TypeCommit || bytes.Contains(p.Body, []byte(entry.DDLPrefix)) {
		s.sequences, s.ddl = true, p.Header.Xid // it may have made one
	}
	if err == nil {
		s.proposedIn = term
	}
	if p.Type != entry.TypeFragment {
		s.addPending(pendingPosition{lsn: p.Header.EndLSN, commit: true, header: p.Header, at: time.Now(), stamps: st})
	}
	if err != nil {
		if ctx.Err() != nil || !errors.Is(err, paxosgroup.ErrNotLeader) {
			return err
		}
		// Captured, but in no proposal: the stream starts over when this region
		// opens another term without a foreign one between.
		s.unproposed = true
		if s.proposing == term {
			s.proposing = paxosgroup.Ballot{}
		}
		s.turn()
		return nil
	}
	s.confirm()
	return nil
}

// Digest implements capture.Handler: a commit that is not proposed, either since
// the log holds it already or since this region may not propose it now.
func (s *shard) Digest(_ context.Context, h entry.Header) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.EndLSN > s.effectiveLSN {
		s.unproposed = true
		defer s.turn()
	}
	s.addPending(pendingPosition{lsn: h.EndLSN, commit: true, header: h, at: time.Now()})
	s.confirm()
	return nil
}

// Position implements capture.Handler.
func (s *shard) Position(_ context.Context, lsn entry.LSN) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addPending(pendingPosition{lsn: lsn, at: time.Now()})
	s.confirm()
	return nil
}

// addPending appends a position. The caller holds mu.
func (s *shard) addPending(p pendingPosition) {
	s.arrivals++
	p.arrival = s.arrivals
	if p.commit {
		s.capturing = capturing{}
		if s.looking {
			s.seen = append(s.seen, p.lsn)
		}
	}
	// Positions are merged, but not into one that the sample under way will cover:
	// it would have to wait for another, and another.
	if last := len(s.pending) - 1; !p.commit && last >= 0 && !s.pending[last].commit && s.pending[last].arrival > s.sampling {
		s.pending[last].lsn, s.pending[last].arrival = max(p.lsn, s.pending[last].lsn), p.arrival
	} else {
		s.pending = append(s.pending, p)
	}
	if p.lsn > s.captured {
		s.captured = p.lsn
	}
	s.notify()
}

// startOver forgets what capture handed over: the new stream hands over again
// everything that was not confirmed.
func (s *shard) startOver(stream *capture.Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stream = stream
	s.pending = s.pending[:0]
	s.seen = s.seen[:0]
	s.captured = 0
	s.unproposed = false
	s.capturing = capturing{}
	if !s.restart.IsZero() && s.restart == s.term.ballot && s.term.incarnation == s.incarnation {
		s.proposing = s.restart
	}
	s.restart = paxosgroup.Ballot{}
	s.turn()
}

// sampleInterval is how often sequences are sampled while nothing waits for it.
const sampleInterval = 100 * time.Millisecond

// sampler covers pending positions by sequence samples: a position is confirmed
// only when a chosen mark covers a sample taken after the position arrived. One
// sample serves all positions that wait for one.
func (s *shard) sampler(ctx context.Context, sampler *sequence.Sampler, visible func(context.Context, uint64) (bool, error)) error {
	for {
		var upTo, ddl uint64
		var term paxosgroup.Ballot
		idle, cancel := context.WithTimeout(ctx, sampleInterval)
		err := s.await(idle, func() bool {
			upTo, term, ddl = s.arrivals, s.proposing, s.ddl
			return s.sequences && (len(s.pending) > 0 || s.wanted > s.covered) && s.covered < upTo && (s.settled || !term.IsZero())
		})
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			// Nothing waits. Values may be handed out all the same, those that
			// another session's nextval wrote WAL for; marks are kept ahead of them.
			s.mu.Lock()
			wanted := s.sequences && !s.proposing.IsZero()
			s.mu.Unlock()
			if !wanted {
				continue
			}
		}
		if term.IsZero() {
			// Settled, and not leading: no client here is handed values that
			// another region must know.
			s.cover(upTo)
			continue
		}
		s.mu.Lock()
		s.sampling = upTo
		s.mu.Unlock()
		// A sequence is not seen before the commit that made it is released, so an
		// empty sample means something only when that commit was visible before.
		known := true
		if ddl != 0 {
			if known, err = visible(ctx, ddl); err != nil {
				return endOf(ctx, err)
			}
		}
		sample, err := sampler.Sample(ctx)
		if err != nil {
			return endOf(ctx, fmt.Errorf("sample sequences: %w", err))
		}
		s.mu.Lock()
		tracker := s.tracker
		marks := tracker.Need(sample)
		if known && s.ddl == ddl {
			s.ddl = 0
			// Nothing is to be covered until a commit with DDL is captured.
			s.sequences = len(sample.States) > 0
		}
		s.mu.Unlock()
		if len(marks) > 0 {
			p := entry.Payload{Type: entry.TypeMarks, Marks: marks}
			if _, err := s.group.ProposeIn(ctx, term, p.Append(nil)); err != nil {
				if !errors.Is(err, paxosgroup.ErrNotLeader) {
					return endOf(ctx, fmt.Errorf("propose sequence marks: %w", err))
				}
				if err := s.await(ctx, func() bool { return s.proposing != term }); err != nil {
					return nil
				}
				continue
			}
			var covered bool
			err := s.await(ctx, func() bool {
				covered = s.tracker == tracker && tracker.Covered(sample)
				return covered || s.proposing != term || s.tracker != tracker
			})
			if err != nil {
				return nil
			}
			if !covered {
				continue // the term was lost, or the marks are asked for anew
			}
		}
		s.mu.Lock()
		same := s.tracker == tracker
		s.mu.Unlock()
		if same {
			s.cover(upTo)
		}
	}
}

func (s *shard) cover(upTo uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.covered = max(s.covered, upTo)
	s.confirm()
	s.notify()
}

// ownCommits remembers own effective commits, so that a redelivered one is
// recognised by content. It holds the newest ownCommitsMax.
type ownCommits struct {
	ring  []ownCommit
	start int
	cut   entry.LSN // where the last of those ends that the log no longer holds

	// Of those that were forgotten, which the log may hold: every so many, and how many.
	forgotten []forgottenCommit
	forgot    uint64
}

type forgottenCommit struct {
	slot paxosgroup.Slot
	end  entry.LSN
}

const (
	forgottenEvery = 4096
	forgottenMax   = 1024
)

type ownCommit struct {
	slot   paxosgroup.Slot
	header entry.Header
}

const ownCommitsMax = 1 << 17

func (o *ownCommits) add(slot paxosgroup.Slot, h entry.Header) {
	c := ownCommit{slot: slot, header: h}
	if len(o.ring) < ownCommitsMax {
		o.ring = append(o.ring, c)
		return
	}
	if o.forgot%forgottenEvery == 0 {
		if len(o.forgotten) == forgottenMax {
			o.forgotten = append(o.forgotten[:0], o.forgotten[forgottenMax/2:]...)
		}
		old := &o.ring[o.start]
		o.forgotten = append(o.forgotten, forgottenCommit{old.slot, old.header.EndLSN})
	}
	o.forgot++
	o.ring[o.start] = c
	o.start = (o.start + 1) % len(o.ring)
}

func (o *ownCommits) at(i int) *ownCommit { return &o.ring[(o.start+i)%len(o.ring)] }

// search returns the index of the first commit that ends at or above lsn.
func (o *ownCommits) search(lsn entry.LSN) int {
	lo, hi := 0, len(o.ring)
	for lo < hi {
		mid := (lo + hi) / 2
		if o.at(mid).header.EndLSN < lsn {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

// matches reports whether the log holds exactly this commit. One older than the
// oldest remembered is taken as known by its position.
func (o *ownCommits) matches(h entry.Header) bool {
	i := o.search(h.EndLSN)
	if h.EndLSN <= o.cut || i == 0 && len(o.ring) == ownCommitsMax && h.EndLSN < o.at(0).header.EndLSN {
		return true
	}
	if i == len(o.ring) {
		return false
	}
	c := o.at(i)
	return c.header.EndLSN == h.EndLSN && c.header.Same(h)
}

// allIn reports whether every commit that ends above lsn is among ends, which are
// ascending.
func (o *ownCommits) allIn(lsn entry.LSN, ends []entry.LSN) bool {
	for i := o.search(lsn + 1); i < len(o.ring); i++ {
		if _, found := slices.BinarySearch(ends, o.at(i).header.EndLSN); !found {
			return false
		}
	}
	return true
}

// through returns a slot up to which every own commit ends at or below lsn: the
// highest, unless the first above it is forgotten.
func (o *ownCommits) through(lsn entry.LSN) paxosgroup.Slot {
	i := o.search(lsn + 1)
	switch {
	case i == 0 && o.forgot > 0:
		for j := len(o.forgotten) - 1; j >= 0; j-- {
			if o.forgotten[j].end <= lsn {
				return o.forgotten[j].slot
			}
		}
		return 0
	case i == len(o.ring):
		return math.MaxUint64
	}
	return o.at(i).slot - 1
}

// lastAt returns where the last own commit in a slot up to the given one ends.
func (o *ownCommits) lastAt(slot paxosgroup.Slot) (entry.LSN, bool) {
	lo, hi := 0, len(o.ring)
	for lo < hi {
		mid := (lo + hi) / 2
		if o.at(mid).slot <= slot {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return 0, false
	}
	return o.at(lo - 1).header.EndLSN, true
}

// slotAt returns the slot of the last own commit that ends at or below lsn.
func (o *ownCommits) slotAt(lsn entry.LSN) (paxosgroup.Slot, bool) {
	i := o.search(lsn + 1)
	if i == 0 {
		return 0, false
	}
	return o.at(i - 1).slot, true
}

// slotTimes remembers when slots became chosen here, coarsely, for as long as
// the lag of a region is worth telling.
type slotTimes struct {
	slots []paxosgroup.Slot
	times []time.Time
}

const slotTimesMax = 4096

func (t *slotTimes) add(slot paxosgroup.Slot, now time.Time) {
	if n := len(t.times); n > 0 && now.Sub(t.times[n-1]) < 100*time.Millisecond {
		return // the older time is the one that bounds the lag
	}
	if len(t.slots) == slotTimesMax {
		t.slots = append(t.slots[:0], t.slots[slotTimesMax/2:]...)
		t.times = append(t.times[:0], t.times[slotTimesMax/2:]...)
	}
	t.slots = append(t.slots, slot)
	t.times = append(t.times, now)
}

// lag tells for how long the slot after applied has been chosen.
func (t *slotTimes) lag(applied, learned paxosgroup.Slot, now time.Time) time.Duration {
	if applied >= learned {
		return 0
	}
	for i, s := range t.slots {
		if s > applied {
			return now.Sub(t.times[i])
		}
	}
	return 0
}
