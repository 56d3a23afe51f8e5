package peer

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"quorate/paxosgroup"
	"quorate/paxosgroup/paxospb"
)

// GroupMessage is a message and the group it belongs to.
type GroupMessage struct {
	Group   paxosgroup.GroupID
	Message paxosgroup.Message
}

// Config says who is to be reached by whom.
type Config struct {
	ClusterID string
	Self      paxosgroup.ReplicaID
	// Deliver takes what arrived from one peer. It is called from one goroutine
	// a stream, of which a peer has two, and should not block: what waits behind it
	// are heartbeats too. The batch itself is used again when it returns; what its
	// messages refer to is not.
	Deliver func(from paxosgroup.ReplicaID, batch []GroupMessage)
	Logger  *slog.Logger // nil discards

	// Life is this start of the replica.
	Life Life
	// Meet, if set, is told the life of each peer before its hello is answered, and
	// after it answered ours, and refuses it by an error. It must have kept durably
	// what it accepted when it returns. It may be called from several goroutines.
	Meet func(from paxosgroup.ReplicaID, life Life) error
	// Superseded, if set, is called when a peer refuses this life of the replica.
	// From then on nothing this replica holds may count. It must not block.
	Superseded func(by paxosgroup.ReplicaID, why string)
	// LeaseDuration is refused in a peer if it is another there; 0: not looked at.
	LeaseDuration time.Duration

	Credentials      credentials.TransportCredentials // nil: plain text
	QueueMessagesMax int                              // a peer's; 0 means 65536
	QueueBytesMax    int                              // a peer's; 0 means 64 MiB
	BulkBytesMax     int                              // a peer's, of what goes by the stream for bulk; 0 means 16 MiB
	FrameBytesMax    int                              // from which a frame is not filled further; 0 means 4 MiB
}

const (
	protocolVersion = 1

	queueMessagesDefault = 1 << 16
	queueBytesDefault    = 64 << 20
	bulkBytesDefault     = 16 << 20
	bulkPromiseMin       = 64 << 10 // a larger Promise is bulk
	frameBytesDefault    = 4 << 20
	receiveBytesMax      = 64 << 20
	streamWindowBytes    = 8 << 20

	pingInterval   = 500 * time.Millisecond
	deadAfter      = 2 * time.Second // without a reply
	idleAfter      = 5 * time.Second // without a frame: a large one takes its time on a slow link
	dialTimeout    = time.Second
	reconnectMin   = 20 * time.Millisecond
	reconnectMax   = 500 * time.Millisecond
	refusedBackoff = 2 * time.Second // a hello that was refused seldom mends itself
)

// Transport sends to the peers it was told of and takes what they send.
type Transport struct {
	cfg     Config
	changed chan struct{} // holds a token when senders has changed

	senders atomic.Pointer[map[paxosgroup.ReplicaID]senders]

	mu        sync.Mutex
	receivers map[streamID]*receiver // the newest stream of each peer and purpose
	closed    bool
	running   sync.WaitGroup // receivers; Add under mu while not closed
	stopping  chan struct{}  // closed with closed
}

// senders are the outgoing streams to one peer. Each has a connection of its
// own, so that bytes in flight on one never hold up the other.
type senders struct{ main, bulk *sender }

// streamID is whose incoming stream it is, and which.
type streamID struct {
	from paxosgroup.ReplicaID
	bulk bool
}

// New returns a transport; it connects when Run is called and takes streams when
// the server it is registered with serves.
func New(cfg Config) (*Transport, error) {
	var errs []error
	if cfg.ClusterID == "" {
		errs = append(errs, errors.New("peer: no cluster id given"))
	}
	if cfg.Self == 0 {
		errs = append(errs, errors.New("peer: no replica id given"))
	}
	if cfg.Deliver == nil {
		errs = append(errs, errors.New("peer: nobody to deliver to"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Credentials == nil {
		cfg.Credentials = insecure.NewCredentials()
	}
	if cfg.QueueMessagesMax == 0 {
		cfg.QueueMessagesMax = queueMessagesDefault
	}
	if cfg.QueueBytesMax == 0 {
		cfg.QueueBytesMax = queueBytesDefault
	}
	if cfg.BulkBytesMax == 0 {
		cfg.BulkBytesMax = bulkBytesDefault
	}
	if cfg.FrameBytesMax == 0 {
		cfg.FrameBytesMax = frameBytesDefault
	}
	t := &Transport{
		cfg:       cfg,
		changed:   make(chan struct{}, 1),
		receivers: make(map[streamID]*receiver),
		stopping:  make(chan struct{}),
	}
	t.senders.Store(&map[paxosgroup.ReplicaID]senders{})
	return t, nil
}

// ServerOptions are what the gRPC server that the transport is registered with
// needs: room for a message of 64 MiB, and windows that fill a long link.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(receiveBytesMax),
		grpc.InitialWindowSize(streamWindowBytes),
		grpc.InitialConnWindowSize(streamWindowBytes),
		grpc.ReadBufferSize(128 << 10),
		grpc.WriteBufferSize(128 << 10),
	}
}

// Register makes the server take streams from peers.
func (t *Transport) Register(s grpc.ServiceRegistrar) {
	paxospb.RegisterPeerServer(s, &server{transport: t})
}

// SetPeers says where the peers are, as host:port. Connections to others end,
// those to the same address stay. Self is passed over.
func (t *Transport) SetPeers(addresses map[paxosgroup.ReplicaID]string) {
	t.mu.Lock()
	old := *t.senders.Load()
	next := make(map[paxosgroup.ReplicaID]senders, len(addresses))
	for id, address := range addresses {
		switch s := old[id]; {
		case id == t.cfg.Self:
		case s.main != nil && s.main.address == address:
			next[id] = s
		default:
			next[id] = senders{newSender(t, id, address, false), newSender(t, id, address, true)}
		}
	}
	t.senders.Store(&next)
	t.mu.Unlock()
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

// Send sends messages to the peers they are addressed to, or queues them. It
// never blocks. What it cannot queue is dropped and counted. The messages'
// contents must not be changed afterwards. Chosen entries for a peer that catches
// up and large promises go by a stream of their own.
func (t *Transport) Send(g paxosgroup.GroupID, msgs []paxosgroup.Message) {
	peers := *t.senders.Load()
	var encoded []*encodedEntries // what several peers are sent
	var touched [touchedMax]*sender
	n := 0
	for i := range msgs {
		m := &msgs[i]
		s := peers[m.To].main
		if s == nil {
			continue
		}
		if m.Kind == paxosgroup.MsgLearn || m.Kind == paxosgroup.MsgPromise && len(m.Accepted) > 0 && weight(m) > bulkPromiseMin {
			s = peers[m.To].bulk
		}
		x := outgoing{GroupMessage: GroupMessage{Group: g, Message: *m}}
		if len(m.Entries) > 0 && m.Kind == paxosgroup.MsgAccept {
			k := slices.IndexFunc(encoded, func(e *encodedEntries) bool {
				return &e.entries[0] == &m.Entries[0] && len(e.entries) == len(m.Entries)
			})
			if k < 0 {
				k = len(encoded)
				encoded = append(encoded, &encodedEntries{entries: m.Entries})
			}
			x.entries = encoded[k]
		}
		if s.enqueue(x) && !slices.Contains(touched[:n], s) {
			if n == touchedMax {
				s.kick()
				continue
			}
			touched[n] = s
			n++
		}
	}
	for _, s := range touched[:n] {
		s.kick()
	}
}

const touchedMax = 16

// Run keeps the connections to the peers until ctx ends.
func (t *Transport) Run(ctx context.Context) error {
	type running struct {
		cancel context.CancelFunc
		done   chan struct{}
	}
	started := make(map[*sender]running)
	stop := func(s *sender) {
		started[s].cancel()
		<-started[s].done
		delete(started, s)
	}
	for {
		var current []*sender
		for _, s := range *t.senders.Load() {
			current = append(current, s.main, s.bulk)
		}
		for s := range started {
			if !slices.Contains(current, s) {
				stop(s)
			}
		}
		for _, s := range current {
			if _, ok := started[s]; ok {
				continue
			}
			sctx, cancel := context.WithCancel(ctx)
			r := running{cancel: cancel, done: make(chan struct{})}
			started[s] = r
			go func() {
				defer close(r.done)
				s.run(sctx)
			}()
		}
		select {
		case <-ctx.Done():
			for s := range started {
				stop(s)
			}
			t.closeReceivers()
			return ctx.Err()
		case <-t.changed:
		}
	}
}

func (t *Transport) closeReceivers() {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		close(t.stopping)
	}
	t.mu.Unlock()
	t.running.Wait()
}

// PeerState is what is known of the connection to a peer.
type PeerState struct {
	ID        paxosgroup.ReplicaID
	Address   string
	Connected bool   // our messages reach it
	LastError string // why not, when Connected is false
	Sent      uint64 // messages handed to the connection
	Frames    uint64
	Dropped   uint64 // messages that met a full queue or no connection
	Queued    int    // messages waiting now
	// QueuedBytes counts payloads and about 100 a message and entry.
	QueuedBytes int
	Bulk        StreamState // of the stream for what may wait, not counted above
}

// StreamState is what is known of a stream.
type StreamState struct {
	Connected   bool
	Sent        uint64 // messages
	Dropped     uint64
	Queued      int
	QueuedBytes int
}

// Peers returns the state of every peer, in order of id.
func (t *Transport) Peers() []PeerState {
	var states []PeerState
	peers := *t.senders.Load()
	for _, id := range slices.Sorted(maps.Keys(peers)) {
		state, bulk := peers[id].main.state(), peers[id].bulk.state()
		state.Bulk = StreamState{
			Connected: bulk.Connected, Sent: bulk.Sent, Dropped: bulk.Dropped, Queued: bulk.Queued, QueuedBytes: bulk.QueuedBytes,
		}
		states = append(states, state)
	}
	return states
}
