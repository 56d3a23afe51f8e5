package paxosgroup

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// flock is processes that hold a replica of every group each, and share beats.
// Messages are delayed, lost, repeated and reordered; processes stop, are paused
// and come back; their clocks differ in rate.
type flock struct {
	t      *testing.T
	rng    *rand.Rand
	now    time.Duration
	seq    uint64
	queue  flockEvents
	procs  []*process
	groups int
	tune   func(*Config)
	beats  bool

	delay        func(a, b ReplicaID) time.Duration
	loss, repeat float64
	slow         float64
	flushMax     time.Duration
	cut          map[[2]ReplicaID]bool

	told     []Slot // by group: the highest slot anybody was handed
	reads    map[uint64]flockRead
	readsOK  int
	readsNo  int
	sent     map[MessageKind]int
	prepared map[Ballot]bool
	tenures  []int // by group: leaderships that opened
	lastTerm []Ballot
	looked   time.Duration
	err      error
}

type flockRead struct {
	group   int
	atLeast Slot
}

type process struct {
	id          ReplicaID
	offset      Instant
	ppm         int64
	lives       uint64
	up          bool
	pausedUntil time.Duration
	backlog     []func()
	beats       *Beats
	members     []*flockReplica
	wakeAt      time.Duration
}

type flockReplica struct {
	core     *Replica
	deadline Instant
	records  []Record
	flushed  int
	chosen   []SlotEntry
}

type flockEvent struct {
	at  time.Duration
	seq uint64
	do  func()
}

type flockEvents []flockEvent

func (e flockEvents) Len() int { return len(e) }
func (e flockEvents) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].seq < e[j].seq
}
func (e flockEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *flockEvents) Push(x any)   { *e = append(*e, x.(flockEvent)) }
func (e *flockEvents) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

func (x *flockReplica) Chosen(from, to Slot, _ int) ([]SlotEntry, error) {
	if from < 1 || to > Slot(len(x.chosen)) {
		return nil, errors.New("not stored")
	}
	return x.chosen[from-1 : to], nil
}

func (p *process) clock(t time.Duration) Instant {
	return p.offset + Instant(t) + Instant(int64(t)/1_000_000*p.ppm)
}

func newFlock(t *testing.T, seed uint64, procs, groups int, beats bool, tune func(*Config)) *flock {
	f := &flock{
		t: t, rng: rand.New(rand.NewPCG(seed, 7)), groups: groups, tune: tune, beats: beats,
		cut: map[[2]ReplicaID]bool{}, reads: map[uint64]flockRead{}, sent: map[MessageKind]int{}, prepared: map[Ballot]bool{},
		told: make([]Slot, groups), tenures: make([]int, groups), lastTerm: make([]Ballot, groups),
	}
	f.delay = func(a, b ReplicaID) time.Duration { return 100 * time.Microsecond }
	for i := range procs {
		p := &process{id: ReplicaID(i + 1), offset: Instant(1 + f.rng.Int64N(int64(time.Hour))), ppm: f.rng.Int64N(1801) - 900}
		for range groups {
			p.members = append(p.members, &flockReplica{})
		}
		f.procs = append(f.procs, p)
	}
	for _, p := range f.procs {
		f.start(p)
	}
	return f
}

func (f *flock) after(d time.Duration, do func()) {
	f.seq++
	heap.Push(&f.queue, flockEvent{f.now + d, f.seq, do})
}

func (f *flock) start(p *process) {
	m := Membership{NextID: ReplicaID(len(f.procs) + 1)}
	for i := range f.procs {
		m.Members = append(m.Members, Member{ID: ReplicaID(i + 1), Region: fmt.Sprintf("r%d", i+1), Kind: Voter})
	}
	p.lives++
	p.up, p.backlog, p.pausedUntil, p.wakeAt = true, nil, 0, 1<<62
	if f.beats {
		p.beats = NewBeats(p.id, f.rng.Uint64()|1, 100*time.Millisecond)
	}
	for g, x := range p.members {
		cfg := Config{Group: GroupID(g + 1), ID: p.id, Region: fmt.Sprintf("r%d", p.id), Seed: f.rng.Uint64(), RestartedWithState: p.lives > 1}
		if f.tune != nil {
			f.tune(&cfg)
		}
		st := Restored{Base: Base{Membership: m}}
		accepted := map[Slot]AcceptedEntry{}
		for _, rec := range x.records {
			switch rec.Kind {
			case RecordPromise:
				st.Promised = rec.Ballot
			case RecordAccept:
				accepted[rec.Slot] = AcceptedEntry{rec.Slot, rec.Ballot, rec.Entry}
			case RecordChosen:
				st.Chosen = rec.Slot
			}
		}
		x.chosen = x.chosen[:st.Chosen]
		for s := st.Chosen + 1; s <= st.Chosen+10_000; s++ {
			if a, ok := accepted[s]; ok {
				st.Accepted = append(st.Accepted, a)
			}
		}
		core, err := New(cfg, st, x, p.clock(f.now))
		if err != nil {
			f.t.Fatal(err)
		}
		x.core = core
		if f.beats {
			core.Share(p.beats)
		}
		f.settle(p, g)
	}
	f.schedule(p)
}

func (f *flock) crash(p *process) {
	p.up = false
	p.lives++
	for _, x := range p.members {
		x.records = slices.Clone(x.records[:x.flushed])
		x.core = nil
	}
	for id := range f.reads {
		if ReplicaID(id>>48) == p.id {
			delete(f.reads, id)
		}
	}
}

// enter runs what happens to a process, or keeps it until its pause is over.
func (f *flock) enter(p *process, life uint64, do func()) {
	switch {
	case !p.up || p.lives != life:
	case f.now < p.pausedUntil:
		if len(p.backlog) == 0 {
			f.after(p.pausedUntil-f.now, func() {
				if p.lives == life {
					b := p.backlog
					p.backlog = nil
					for _, do := range b {
						f.enter(p, life, do)
					}
				}
			})
		}
		p.backlog = append(p.backlog, do)
	default:
		do()
		f.schedule(p)
	}
}

// schedule wakes the process for what its replicas and beats named as deadlines,
// and for nothing else.
func (f *flock) schedule(p *process) {
	now := p.clock(f.now)
	if p.beats != nil && p.beats.Woken() {
		for _, x := range p.members {
			x.deadline = x.core.NextDeadline()
		}
	}
	next := Instant(1 << 62)
	for _, x := range p.members {
		next = min(next, x.deadline)
	}
	if p.beats != nil {
		if at, ok := p.beats.NextDeadline(); ok {
			next = min(next, at)
		}
	}
	d := max(next.Sub(now), 0) + 10*time.Microsecond
	if p.wakeAt > f.now && p.wakeAt <= f.now+d {
		return
	}
	at := f.now + d
	p.wakeAt = at
	life := p.lives
	f.after(d, func() {
		if p.wakeAt != at {
			return // an earlier one was set since
		}
		p.wakeAt = 0
		f.enter(p, life, func() {
			now := p.clock(f.now)
			if p.beats != nil {
				f.post(p, 0, p.beats.Tick(now))
			}
			for g, x := range p.members {
				if x.deadline <= now {
					x.core.Tick(now)
					f.settle(p, g)
				}
			}
		})
	})
}

func (f *flock) settle(p *process, g int) {
	x := p.members[g]
	for {
		x.core.SetApplied(Slot(len(x.chosen)))
		rd, ok := x.core.Ready()
		if !ok {
			break
		}
		f.post(p, g+1, rd.Send)
		x.records = append(x.records, rd.Persist...)
		for _, d := range rd.Delivered {
			x.chosen = append(x.chosen, SlotEntry{d.Slot, d.Entry})
			if d.Slot > f.told[g] {
				f.told[g] = d.Slot
				if d.Entry.Kind == KindOpening && d.Verdict == Effective {
					f.tenures[g]++
					f.lastTerm[g] = d.Entry.Term
				}
			}
		}
		for _, q := range rd.Reads {
			f.read(q)
		}
		upTo, life := len(x.records), p.lives
		flushed := func() {
			x.flushed = max(x.flushed, upTo)
			f.post(p, g+1, rd.AfterSync)
			x.core.Persisted(p.clock(f.now), rd.Seq)
		}
		if f.flushMax == 0 {
			flushed()
			continue
		}
		f.after(time.Duration(f.rng.Int64N(int64(f.flushMax))), func() {
			f.enter(p, life, func() {
				// In order: an earlier one that is late comes first.
				if x.flushed < upTo {
					flushed()
					f.settle(p, g)
				} else {
					f.post(p, g+1, rd.AfterSync)
				}
			})
		})
	}
	x.deadline = x.core.NextDeadline()
}

func (f *flock) read(q ReadResult) {
	asked, ok := f.reads[q.ID]
	delete(f.reads, q.ID)
	switch {
	case !ok:
	case !q.OK:
		f.readsNo++
	default:
		f.readsOK++
		if q.Slot < asked.atLeast && f.err == nil {
			f.err = fmt.Errorf("at %v a read of group %d is told slot %d, slot %d was known to be chosen when it was asked", f.now, asked.group+1, q.Slot, asked.atLeast)
		}
	}
}

// ask reads through a process.
func (f *flock) ask(p *process, g int) {
	f.enter(p, p.lives, func() {
		f.seq++
		id := uint64(p.id)<<48 | f.seq
		f.reads[id] = flockRead{g, f.told[g]}
		p.members[g].core.ReadIndex(p.clock(f.now), id)
		f.settle(p, g)
	})
}

func (f *flock) post(p *process, group int, msgs []Message) {
	for _, m := range msgs {
		f.sent[m.Kind]++
		if m.Kind == MsgPrepare {
			f.prepared[m.Ballot] = true
		}
		if f.cut[[2]ReplicaID{m.From, m.To}] {
			continue
		}
		copies := 1
		if f.rng.Float64() < f.loss {
			copies = 0
		} else if f.rng.Float64() < f.repeat {
			copies = 2
		}
		for range copies {
			d := f.delay(m.From, m.To)
			if f.rng.Float64() < f.slow {
				d += time.Duration(f.rng.Int64N(int64(4 * time.Second)))
			}
			f.after(d, func() {
				to := f.procs[m.To-1]
				f.enter(to, to.lives, func() {
					now := to.clock(f.now)
					if group == 0 {
						f.post(to, 0, to.beats.Step(now, m))
						return
					}
					x := to.members[group-1]
					if err := x.core.Step(now, m); err != nil {
						f.t.Fatal(err)
					}
					f.settle(to, group-1)
				})
			})
		}
	}
}

// run lets time pass until ok or for d.
func (f *flock) run(d time.Duration, ok func() bool) bool {
	end := f.now + d
	for len(f.queue) > 0 && f.queue[0].at <= end && f.err == nil {
		if ok != nil && ok() {
			return true
		}
		e := heap.Pop(&f.queue).(flockEvent)
		f.now = e.at
		e.do()
		f.look()
	}
	if f.err != nil {
		f.t.Fatal(f.err)
	}
	f.now = end
	return ok != nil && ok()
}

// look checks that each group's lease has one holder, also among the paused.
func (f *flock) look() {
	if f.now < f.looked+2*time.Millisecond {
		return
	}
	f.looked = f.now
	for g := range f.groups {
		var holder *process
		for _, p := range f.procs {
			if !p.up || p.members[g].core.role != Leader || p.members[g].core.Status().LeaseUntil <= p.clock(f.now) {
				continue
			}
			if holder != nil && f.err == nil {
				f.err = fmt.Errorf("replicas %d and %d of group %d both hold the lease at %v", holder.id, p.id, g+1, f.now)
			}
			holder = p
		}
	}
}

// leader returns the process that leads a group with a lease, or nil.
func (f *flock) leader(g int) *process {
	for _, p := range f.procs {
		if p.up && f.now >= p.pausedUntil && p.members[g].core.role == Leader && p.members[g].core.Status().LeaseUntil > p.clock(f.now) {
			return p
		}
	}
	return nil
}

func (f *flock) led() bool {
	for g := range f.groups {
		if f.leader(g) == nil {
			return false
		}
	}
	return true
}

func (f *flock) propose(p *process, g int) {
	f.enter(p, p.lives, func() {
		p.members[g].core.Propose(p.clock(f.now), []byte("x"))
		f.settle(p, g)
	})
}

func (f *flock) isolate(id ReplicaID, on bool) {
	for _, p := range f.procs {
		f.cut[[2]ReplicaID{id, p.id}], f.cut[[2]ReplicaID{p.id, id}] = on, on
	}
}

// fault does one thing at random.
func (f *flock) fault() {
	p := f.procs[f.rng.IntN(len(f.procs))]
	g := f.rng.IntN(f.groups)
	switch n := f.rng.IntN(20); {
	case n < 5:
		f.cut[[2]ReplicaID{p.id, ReplicaID(1 + f.rng.IntN(len(f.procs)))}] = true
	case n < 8:
		clear(f.cut)
	case n == 8:
		clear(f.cut)
		f.isolate(p.id, true)
	case n == 9 && p.up:
		f.crash(p)
		f.after(time.Duration(f.rng.Int64N(int64(3*time.Second))), func() {
			if !p.up {
				f.start(p)
			}
		})
	case n < 13:
		p.pausedUntil = f.now + time.Duration(f.rng.Int64N(int64(4*time.Second)))
	case n < 16:
		if l := f.leader(g); l != nil {
			f.enter(l, l.lives, func() {
				l.members[g].core.Transfer(l.clock(f.now), p.id)
				f.settle(l, g)
			})
		}
	case n < 17:
		if l := f.leader(g); l != nil {
			f.enter(l, l.lives, func() {
				l.members[g].core.Resign(l.clock(f.now))
				f.settle(l, g)
			})
		}
	}
}

func TestSharedLeasesAndReadsUnderFaults(t *testing.T) {
	seeds := uint64(12)
	if testing.Short() {
		seeds = 3
	}
	okReads, noReads, tenures := 0, 0, 0
	for seed := uint64(1); seed <= seeds; seed++ {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			f := newFlock(t, seed, 3+2*int(seed%2), 3, true, nil)
			f.loss, f.repeat, f.slow, f.flushMax = 0.02, 0.05, 0.02, 3*time.Millisecond
			f.delay = func(a, b ReplicaID) time.Duration {
				return time.Millisecond + time.Duration(f.rng.Int64N(int64(30*time.Millisecond)))
			}
			for range 120 {
				for range 5 {
					f.run(time.Duration(f.rng.Int64N(int64(200*time.Millisecond))), nil)
					for g := range f.groups {
						f.propose(f.procs[f.rng.IntN(len(f.procs))], g)
						if l := f.leader(g); l != nil {
							f.propose(l, g)
						}
						f.ask(f.procs[f.rng.IntN(len(f.procs))], g)
					}
				}
				f.fault()
			}
			clear(f.cut)
			for _, p := range f.procs {
				if !p.up {
					f.start(p)
				}
			}
			f.loss, f.slow = 0, 0
			f.run(5*time.Second, nil)
			if !f.run(20*time.Second, f.led) {
				t.Errorf("no leaders after all is well again")
			}
			okReads, noReads = okReads+f.readsOK, noReads+f.readsNo
			for _, n := range f.tenures {
				tenures += n
			}
		})
	}
	t.Logf("%d reads answered, %d refused, %d leaderships", okReads, noReads, tenures)
	if okReads < noReads {
		t.Error("more reads are refused than answered")
	}
}

func TestIdleGroupsAreCarriedByBeats(t *testing.T) {
	const groups = 20
	f := newFlock(t, 1, 5, groups, true, nil)
	if !f.run(20*time.Second, f.led) {
		t.Fatal("no leaders")
	}
	f.run(5*time.Second, nil)
	terms := slices.Clone(f.lastTerm)
	f.sent = map[MessageKind]int{}
	f.run(60*time.Second, func() bool { return !f.led() })
	if !f.led() {
		t.Fatalf("at %v a lease is gone", f.now)
	}
	total := 0
	for _, n := range f.sent {
		total += n
	}
	t.Logf("%d groups on 5 processes: %d messages in a minute, %v", groups, total, f.sent)
	if !slices.Equal(terms, f.lastTerm) {
		t.Error("leaders changed")
	}
	if f.sent[MsgHeartbeat] > 0 || f.sent[MsgPreVote] > 0 {
		t.Error("groups at rest send for themselves")
	}
	if most := 5 * 4 * 600 * 2; total > most {
		t.Errorf("more than %d, what one beat each way would take", most)
	}
}
