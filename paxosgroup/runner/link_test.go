package runner

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"quorate/deploy/sandbox/relay"
	"quorate/paxosgroup"
)

// linked is five replicas, of which 1 leads and reaches 5, and 5 it, over a wire
// that can be slowed and cut.
type linked struct {
	*cluster
	wire *relay.Wire
	lead *Group
	last *Group
}

func startLinked(t *testing.T) *linked {
	t.Helper()
	l := &linked{wire: relay.NewWire(0)}
	l.cluster = startCluster(t, 5, 1, func(gc *GroupConfig) { gc.Core.PreferredRegion = "r1" })
	for _, way := range [][2]paxosgroup.ReplicaID{{1, 5}, {5, 1}} {
		r, err := relay.Listen("127.0.0.1:0", l.addresses[way[1]], l.wire)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Close)
		addresses := make(map[paxosgroup.ReplicaID]string)
		for id, address := range l.addresses {
			addresses[id] = address
		}
		addresses[way[1]] = r.Addr()
		l.nodes[way[0]-1].transport.SetPeers(addresses)
	}
	l.lead, l.last = l.nodes[0].runner.Group(1), l.nodes[4].runner.Group(1)
	eventually(t, "replica 1 leads and all are connected", 20*time.Second, func() bool {
		for _, n := range l.nodes {
			for _, p := range n.transport.Peers() {
				if !p.Connected || !p.Bulk.Connected {
					return false
				}
			}
		}
		return l.lead.Status().Role == paxosgroup.Leader
	})
	return l
}

// load has proposers work until the test ends or stop is called.
type load struct {
	chosen    atomic.Int64
	mu        sync.Mutex
	latencies []time.Duration
	stop      func()
}

func (l *linked) load(t *testing.T, proposers, size int) *load {
	w := &load{}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for range proposers {
		running.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				if _, err := l.lead.ProposeAndWait(ctx, make([]byte, size)); err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				w.chosen.Add(1)
				w.mu.Lock()
				w.latencies = append(w.latencies, time.Since(began))
				w.mu.Unlock()
			}
		})
	}
	w.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(w.stop)
	return w
}

// during lets d pass and returns how much was chosen and the 99th percentile.
func (w *load) during(d time.Duration, look func()) (chosen int64, p99 time.Duration) {
	before := w.chosen.Load()
	w.mu.Lock()
	w.latencies = nil
	w.mu.Unlock()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		look()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	slices.Sort(w.latencies)
	if len(w.latencies) > 0 {
		p99 = w.latencies[len(w.latencies)*99/100]
	}
	return w.chosen.Load() - before, p99
}

func (l *linked) follower() paxosgroup.PeerStatus {
	for _, p := range l.lead.Status().Peers {
		if p.ID == 5 {
			return p
		}
	}
	return paxosgroup.PeerStatus{}
}

// caughtUp reports whether 5 is sent everything as it is proposed.
func (l *linked) caughtUp() bool {
	have, _ := l.last.Chosen()
	want, _ := l.lead.Chosen()
	return have+1024 > want && !l.follower().Behind
}

func TestSlowLinkHoldsUpNobody(t *testing.T) {
	l := startLinked(t)
	w := l.load(t, 32, 2000)
	nothing := func() {}
	w.during(500*time.Millisecond, nothing)
	before, p99 := w.during(time.Second, nothing)
	t.Logf("before: %d chosen in 1 s, p99 %v, %+v", before, p99, l.follower())

	l.wire.SetRate(250_000) // 2 Mbit/s
	window := l.follower().WindowBytes
	queued, inFlight := 0, 0
	check := func() {
		// A window that shrinks leaves what was sent before; it is never exceeded
		// by more.
		p := l.follower()
		window = max(p.WindowBytes, p.InFlightBytes, window)
		for _, s := range l.nodes[0].transport.Peers() {
			if s.ID == 5 {
				queued = max(queued, s.QueuedBytes)
			}
		}
		inFlight = max(inFlight, p.InFlightBytes)
	}
	slow, p99Slow := w.during(3*time.Second, check)
	p := l.follower()
	t.Logf("slow: %d chosen in 3 s, p99 %v, at most %d bytes queued and %d under way, %+v", slow, p99Slow, queued, inFlight, p)
	if slow < before {
		t.Errorf("%d chosen in 3 s over a slow link, %d in 1 s before", slow, before)
	}
	const besides = 64 << 10 // heartbeats and notices
	if queued > window+besides {
		t.Errorf("%d bytes queued for a window of %d", queued, window)
	}
	if p.WindowBytes > 1<<20 {
		t.Errorf("the window is still %d bytes at 250000 bytes a second", p.WindowBytes)
	}

	l.wire.SetRate(0)
	eventually(t, "full rate again", 5*time.Second, l.caughtUp)
	if after, _ := w.during(time.Second, nothing); after < before/4 {
		t.Errorf("%d chosen in 1 s after, %d in 1 s before", after, before)
	}
	w.stop()
	eventually(t, "all are equal", 5*time.Second, func() bool {
		have, _ := l.last.Chosen()
		want, _ := l.lead.Chosen()
		return have == want
	})
}

func TestSilentFollowerCostsNoMemory(t *testing.T) {
	l := startLinked(t)
	w := l.load(t, 32, 2000)
	nothing := func() {}
	w.during(500*time.Millisecond, nothing)
	before, _ := w.during(time.Second, nothing)
	l.wire.Cut() // it takes nothing, and its connections stay
	most := 0
	silent, _ := w.during(3*time.Second, func() {
		for _, s := range l.nodes[0].transport.Peers() {
			if s.ID == 5 {
				most = max(most, s.QueuedBytes+s.Bulk.QueuedBytes)
			}
		}
	})
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	p := l.follower()
	t.Logf("%d chosen in 1 s, then %d in 3 s; at most %d bytes queued; %d MiB in use; %+v", before, silent, most, m.HeapInuse>>20, p)
	if silent < before {
		t.Errorf("%d chosen in 3 s without replica 5, %d in 1 s with it", silent, before)
	}
	if bound := max(p.WindowBytes, p.InFlightBytes, 4<<20); most > bound {
		t.Errorf("%d bytes queued", most)
	}
	l.wire.Mend()
	eventually(t, "it catches up", 10*time.Second, l.caughtUp)
}
