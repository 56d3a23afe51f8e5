package peer

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"quorate/paxosgroup"
)

// node is a transport behind a real server on the loopback interface.
type node struct {
	*Transport
	address string
	server  *grpc.Server
	mu      sync.Mutex
	got     []GroupMessage
	arrived chan struct{}
}

func startNode(t testing.TB, cluster string, self paxosgroup.ReplicaID, address string, change func(*Config)) *node {
	t.Helper()
	n := &node{arrived: make(chan struct{}, 1)}
	cfg := Config{ClusterID: cluster, Self: self, Deliver: func(_ paxosgroup.ReplicaID, batch []GroupMessage) {
		n.mu.Lock()
		n.got = append(n.got, batch...)
		n.mu.Unlock()
		select {
		case n.arrived <- struct{}{}:
		default:
		}
	}}
	if change != nil {
		change(&cfg)
	}
	var err error
	if n.Transport, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	n.address = listener.Addr().String()
	n.server = grpc.NewServer(ServerOptions()...)
	n.Register(n.server)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { n.server.Serve(listener) })
	running.Go(func() { n.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		n.server.Stop()
		running.Wait()
	})
	return n
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func (n *node) messages() []GroupMessage {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.got)
}

func (n *node) connected() bool {
	return !slices.ContainsFunc(n.Peers(), func(p PeerState) bool { return !p.Connected })
}

func message(from, to paxosgroup.ReplicaID, slot paxosgroup.Slot, payload []byte) paxosgroup.Message {
	return paxosgroup.Message{Kind: paxosgroup.MsgAccept, From: from, To: to, Slot: slot,
		Entries: []paxosgroup.SlotEntry{{Slot: slot, Entry: paxosgroup.Entry{Kind: paxosgroup.KindData, Payload: payload}}}}
}

func TestMessagesArriveInOrderAndInFewerFrames(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", nil)
	b := startNode(t, "c", 2, "127.0.0.1:0", nil)
	a.SetPeers(map[paxosgroup.ReplicaID]string{1: a.address, 2: b.address})
	eventually(t, "connect", 5*time.Second, a.connected)
	const count = 20_000
	for i := range count {
		a.Send(paxosgroup.GroupID(i%100), []paxosgroup.Message{message(1, 2, paxosgroup.Slot(i), []byte("x"))})
	}
	eventually(t, "all arrive", 10*time.Second, func() bool { return len(b.messages()) == count })
	for i, m := range b.messages() {
		if m.Message.Slot != paxosgroup.Slot(i) || m.Group != paxosgroup.GroupID(i%100) {
			t.Fatalf("message %d is %+v", i, m)
		}
	}
	if p := a.Peers()[0]; p.Frames >= count/2 || p.Dropped != 0 {
		t.Fatalf("%d messages in %d frames, %d dropped", count, p.Frames, p.Dropped)
	}
}

func TestMessageLargerThanAFramePasses(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", nil)
	b := startNode(t, "c", 2, "127.0.0.1:0", nil)
	a.SetPeers(map[paxosgroup.ReplicaID]string{2: b.address})
	eventually(t, "connect", 5*time.Second, a.connected)
	payload := make([]byte, 40<<20)
	a.Send(1, []paxosgroup.Message{message(1, 2, 1, payload), message(1, 2, 2, nil)})
	eventually(t, "both arrive", 20*time.Second, func() bool { return len(b.messages()) == 2 })
	if got := len(b.messages()[0].Message.Entries[0].Entry.Payload); got != len(payload) {
		t.Fatalf("%d bytes arrived", got)
	}
}

func TestHelloOfAnotherClusterIsRefused(t *testing.T) {
	for _, tc := range []struct {
		name    string
		cluster string
		self    paxosgroup.ReplicaID
		want    []string
	}{
		{"another cluster", "staging", 2, []string{`"staging"`, `"production"`, "mend"}},
		{"another replica", "production", 3, []string{"replica 2", "replica 3", "mend"}},
		{"its own id", "production", 1, []string{"replica 1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := startNode(t, "production", 1, "127.0.0.1:0", nil)
			b := startNode(t, tc.cluster, tc.self, "127.0.0.1:0", nil)
			a.SetPeers(map[paxosgroup.ReplicaID]string{2: b.address})
			var text string
			eventually(t, "refusal", 5*time.Second, func() bool {
				text = a.Peers()[0].LastError
				return text != ""
			})
			for _, want := range tc.want {
				if !strings.Contains(text, want) {
					t.Errorf("%q does not name %s", text, want)
				}
			}
			a.Send(1, []paxosgroup.Message{message(1, 2, 1, nil)})
			if p := a.Peers()[0]; p.Dropped != 1 || p.Connected {
				t.Errorf("state %+v", p)
			}
			if n := len(b.messages()); n != 0 {
				t.Errorf("%d messages crossed", n)
			}
		})
	}
}

func TestForgedSenderEndsTheStream(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", nil)
	b := startNode(t, "c", 2, "127.0.0.1:0", nil)
	a.SetPeers(map[paxosgroup.ReplicaID]string{2: b.address})
	eventually(t, "connect", 5*time.Second, a.connected)
	a.Send(1, []paxosgroup.Message{message(9, 2, 1, nil)})
	eventually(t, "the stream breaks and is opened again", 5*time.Second, func() bool {
		return a.Peers()[0].Connected && a.Peers()[0].Sent == 1
	})
	a.Send(1, []paxosgroup.Message{message(1, 2, 7, nil)})
	time.Sleep(10 * time.Millisecond)
	for _, m := range b.messages() {
		if m.Message.From != 1 {
			t.Fatalf("delivered %+v", m)
		}
	}
}

func TestReconnectsWhenThePeerReturns(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", nil)
	var address string
	t.Run("first life", func(t *testing.T) {
		b := startNode(t, "c", 2, "127.0.0.1:0", nil)
		address = b.address
		a.SetPeers(map[paxosgroup.ReplicaID]string{2: address})
		eventually(t, "connect", 5*time.Second, a.connected)
	})
	eventually(t, "disconnect", 5*time.Second, func() bool { return !a.connected() })
	b := startNode(t, "c", 2, address, nil)
	eventually(t, "reconnect", 2*time.Second, a.connected)
	a.Send(1, []paxosgroup.Message{message(1, 2, 5, nil)})
	eventually(t, "arrive", 5*time.Second, func() bool { return len(b.messages()) == 1 })
}

// TestSilentLinkIsGivenUp stands a listener that answers nothing in the place of
// a network that swallows everything.
func TestSilentLinkIsGivenUp(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", nil)
	b := startNode(t, "c", 2, "127.0.0.1:0", nil)
	proxy := startProxy(t, b.address)
	a.SetPeers(map[paxosgroup.ReplicaID]string{2: proxy.address})
	eventually(t, "connect", 5*time.Second, a.connected)
	proxy.swallow.Store(true)
	began := time.Now()
	eventually(t, "notice", 4*time.Second, func() bool { return !a.connected() })
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("noticed after %v", took)
	}
	proxy.swallow.Store(false)
	eventually(t, "reconnect after healing", 4*time.Second, a.connected)
}

func TestSendToABlockedPeerDropsAndDoesNotBlock(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", func(c *Config) { c.QueueMessagesMax = 10; c.QueueBytesMax = 1 << 20 })
	blocked := make(chan struct{})
	var release sync.Once
	free := func() { release.Do(func() { close(blocked) }) }
	t.Cleanup(free)
	b := startNode(t, "c", 2, "127.0.0.1:0", func(c *Config) {
		c.Deliver = func(paxosgroup.ReplicaID, []GroupMessage) { <-blocked }
	})
	t.Cleanup(free) // before b's own cleanup, which waits for Deliver
	a.SetPeers(map[paxosgroup.ReplicaID]string{2: b.address})
	eventually(t, "connect", 5*time.Second, a.connected)
	payload := make([]byte, 256<<10)
	for i := range 400 {
		began := time.Now()
		a.Send(1, []paxosgroup.Message{message(1, 2, paxosgroup.Slot(i), payload)})
		if took := time.Since(began); took > time.Second {
			t.Fatalf("Send took %v", took)
		}
	}
	p := a.Peers()[0]
	if p.Dropped == 0 || p.Queued > 10 {
		t.Fatalf("state %+v", p)
	}
}

// TestIdleLinkSendsAtOnce: once gRPC has written what it was given, the next
// message goes without another goroutine.
func TestIdleLinkSendsAtOnce(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", nil)
	b := startNode(t, "c", 2, "127.0.0.1:0", nil)
	a.SetPeers(map[paxosgroup.ReplicaID]string{2: b.address})
	eventually(t, "connect", 5*time.Second, a.connected)
	s := (*a.senders.Load())[2].main
	for i, size := range []int{1, 1 << 10, 100 << 10, 1 << 20, 1} {
		a.Send(1, []paxosgroup.Message{message(1, 2, 1, make([]byte, size))})
		if size < inlineBytesMax && s.state().Queued != 0 {
			t.Fatalf("message %d waits for another goroutine", i)
		}
		eventually(t, "arrive", 5*time.Second, func() bool { return len(b.messages()) == i+1 })
		eventually(t, "nothing unwritten", time.Second, func() bool { return s.track.unwritten.Load() == 0 })
	}
}

// TestBulkTakesAStreamOfItsOwn: while a receiver takes nothing of the bulk,
// everything else goes on, and what waits is bounded.
func TestBulkTakesAStreamOfItsOwn(t *testing.T) {
	a := startNode(t, "c", 1, "127.0.0.1:0", func(c *Config) { c.BulkBytesMax = 4 << 20 })
	release := make(chan struct{})
	var once sync.Once
	free := func() { once.Do(func() { close(release) }) }
	t.Cleanup(free)
	var small atomic.Int64
	b := startNode(t, "c", 2, "127.0.0.1:0", func(c *Config) {
		c.Deliver = func(_ paxosgroup.ReplicaID, batch []GroupMessage) {
			for _, m := range batch {
				if m.Message.Kind == paxosgroup.MsgLearn {
					<-release
				} else {
					small.Add(1)
				}
			}
		}
	})
	t.Cleanup(free)
	a.SetPeers(map[paxosgroup.ReplicaID]string{2: b.address})
	eventually(t, "connect", 5*time.Second, func() bool { return a.connected() && a.Peers()[0].Bulk.Connected })
	for i := range 100 {
		learn := message(1, 2, 1, make([]byte, 1<<20))
		learn.Kind = paxosgroup.MsgLearn
		a.Send(1, []paxosgroup.Message{learn, message(1, 2, 1, nil)})
		eventually(t, "the Accept arrives", 5*time.Second, func() bool { return small.Load() == int64(i+1) })
		if p := a.Peers()[0]; p.Bulk.QueuedBytes > 4<<20 {
			t.Fatalf("%d bytes of bulk wait", p.Bulk.QueuedBytes)
		}
	}
	if p := a.Peers()[0]; p.Bulk.Dropped == 0 || p.Dropped != 0 {
		t.Errorf("state %+v", p)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	nodes := make([]*node, 2)
	for i := range nodes {
		nodes[i] = startNode(b, "c", paxosgroup.ReplicaID(i+1), "127.0.0.1:0", nil)
	}
	for i, n := range nodes {
		n.SetPeers(map[paxosgroup.ReplicaID]string{paxosgroup.ReplicaID(2 - i): nodes[1-i].address})
	}
	for _, n := range nodes {
		eventually(b, "connect", 5*time.Second, n.connected)
	}
	payload := make([]byte, 128)
	b.ReportAllocs()
	for b.Loop() {
		nodes[0].Send(1, []paxosgroup.Message{message(1, 2, 1, payload)})
		<-nodes[1].arrived
		nodes[1].Send(1, []paxosgroup.Message{message(2, 1, 1, nil)})
		<-nodes[0].arrived
	}
}

func BenchmarkFrame(b *testing.B) {
	for _, payload := range []int{128, 4096} {
		b.Run(fmt.Sprintf("payload=%d", payload), func(b *testing.B) {
			f := frame{messages: make([]GroupMessage, 64)}
			for i := range f.messages {
				f.messages[i] = GroupMessage{Group: 1, Message: message(1, 2, paxosgroup.Slot(i+1), make([]byte, payload))}
			}
			b.ReportAllocs()
			for b.Loop() {
				var got frame
				if err := (codec{}).Unmarshal(f.marshal(), &got); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(64*b.N)/b.Elapsed().Seconds(), "messages/s")
		})
	}
}
