package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"quorate/paxosgroup"
	"quorate/paxosgroup/paxospb"
)

// sender is one outgoing stream to one peer.
type sender struct {
	transport *Transport
	id        paxosgroup.ReplicaID
	address   string
	bulk      bool
	wake      chan struct{} // holds a token when the queue has something that kick did not send

	// sending is held while a frame is handed to gRPC, which may block unless
	// track says that it cannot. Taken before mu, if both.
	sending sync.Mutex
	out     paxospb.Peer_MessagesClient // nil while there is none
	track   *tracker                    // of out
	frame   frame

	mu        sync.Mutex
	connected bool
	lastError string
	queue     []outgoing
	bytes     int // of queue
	sent      uint64
	frames    uint64
	dropped   uint64
}

// outgoing is a message in a queue.
type outgoing struct {
	GroupMessage
	entries *encodedEntries // nil: encoded with the message
	weight  int
}

func newSender(t *Transport, id paxosgroup.ReplicaID, address string, bulk bool) *sender {
	return &sender{transport: t, id: id, address: address, bulk: bulk, wake: make(chan struct{}, 1)}
}

func (s *sender) state() PeerState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return PeerState{
		ID: s.id, Address: s.address, Connected: s.connected, LastError: s.lastError,
		Sent: s.sent, Frames: s.frames, Dropped: s.dropped, Queued: len(s.queue), QueuedBytes: s.bytes,
	}
}

// Weight is about how many bytes a message takes in memory and on the wire.
func (m *GroupMessage) Weight() int { return weight(&m.Message) }

func weight(m *paxosgroup.Message) int {
	n := 128 + 8*len(m.Slots)
	for i := range m.Accepted {
		n += 96 + len(m.Accepted[i].Entry.Payload)
	}
	for i := range m.Entries {
		n += 96 + len(m.Entries[i].Entry.Payload)
	}
	return n
}

// enqueue reports whether there was room. Whoever calls it calls kick afterwards.
func (s *sender) enqueue(m outgoing) bool {
	cfg := &s.transport.cfg
	bytesMax := cfg.QueueBytesMax
	if s.bulk {
		bytesMax = cfg.BulkBytesMax
	}
	m.weight = m.Weight()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.connected || len(s.queue) >= cfg.QueueMessagesMax || len(s.queue) > 0 && s.bytes+m.weight > bytesMax {
		s.dropped++
		return false
	}
	s.queue = append(s.queue, m)
	s.bytes += m.weight
	return true
}

// inlineBytesMax is how much is sent by whoever calls Send.
const inlineBytesMax = 64 << 10

// kick has the queue sent: at once, if the link is idle, which saves the way by
// another goroutine. gRPC makes a sender wait only while it holds more than
// 64 KiB of the stream unwritten; here it holds nothing.
func (s *sender) kick() {
	if s.sending.TryLock() {
		if s.out != nil && s.track.unwritten.Load() == 0 && s.take(inlineBytesMax) {
			// If it fails, the stream has ended, which its own goroutine sees.
			_ = s.out.SendMsg(&s.frame)
			s.frame.reset()
		}
		s.sending.Unlock()
	}
	s.mu.Lock()
	waiting := len(s.queue) > 0
	s.mu.Unlock()
	if waiting {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// take moves what is queued, up to a frame's size, into the frame and reports
// whether there was anything. With a limit it takes all or nothing. Called with
// sending held.
func (s *sender) take(limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 || limit > 0 && s.bytes > limit {
		return false
	}
	f := &s.frame
	f.reset()
	n, size := 0, 0
	for n < len(s.queue) {
		w := s.queue[n].weight
		if n > 0 && size+w > s.transport.cfg.FrameBytesMax {
			break
		}
		f.messages = append(f.messages, s.queue[n].GroupMessage)
		f.entries = append(f.entries, s.queue[n].entries)
		size += w
		n++
	}
	rest := copy(s.queue, s.queue[n:])
	clear(s.queue[rest:])
	s.queue = s.queue[:rest]
	if rest == 0 && cap(s.queue) > queueKeptMax {
		s.queue = nil
	}
	s.bytes -= size
	s.sent += uint64(n)
	s.frames++
	return true
}

const queueKeptMax = 1024

// reset empties f for another use.
func (f *frame) reset() {
	if cap(f.messages) > queueKeptMax {
		f.messages, f.entries = nil, nil
	}
	clear(f.messages)
	clear(f.entries)
	f.hello, f.messages, f.entries = nil, f.messages[:0], f.entries[:0]
}

// sendQueued sends until the queue is empty, waiting where gRPC makes it wait.
func (s *sender) sendQueued() error {
	s.sending.Lock()
	defer s.sending.Unlock()
	for s.take(0) {
		if err := s.out.SendMsg(&s.frame); err != nil {
			return err
		}
	}
	s.frame.reset()
	return nil
}

// ping sends a frame without messages.
func (s *sender) ping() error {
	s.sending.Lock()
	defer s.sending.Unlock()
	s.frame.reset()
	return s.out.SendMsg(&s.frame)
}

// setStream makes out the stream to send on. Messages of an earlier one are
// gone.
func (s *sender) setStream(out paxospb.Peer_MessagesClient, track *tracker) {
	s.sending.Lock()
	defer s.sending.Unlock()
	s.out, s.track = out, track
	s.frame.reset()
	s.frame.track = track
}

func (s *sender) setConnected(connected bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.connected = connected
	s.lastError = ""
	if err != nil {
		s.lastError = err.Error()
	}
	if !connected {
		s.dropped += uint64(len(s.queue))
		s.queue, s.bytes = nil, 0
	}
}

var (
	errDead     = errors.New("no reply within 2 s")
	errStopping = errors.New("transport is stopping")
)

// run connects, and connects again, until ctx ends.
func (s *sender) run(ctx context.Context) {
	log := s.transport.cfg.Logger.With("peer", s.id, "address", s.address, "bulk", s.bulk)
	backoff := reconnectMin
	logged := ""
	for {
		established := false
		err := s.stream(ctx, func() {
			established = true
			log.Info("peer connected")
			s.setConnected(true, nil)
		})
		s.setConnected(false, err)
		if ctx.Err() != nil {
			return
		}
		if established {
			backoff, logged = reconnectMin, ""
		}
		switch status.Code(err) {
		case codes.FailedPrecondition:
			backoff = refusedBackoff
		case codes.DataLoss:
			backoff = refusedBackoff
			if told := s.transport.cfg.Superseded; told != nil {
				told(s.id, status.Convert(err).Message())
			}
		}
		if text := err.Error(); text != logged {
			// Once for each cause, not for each attempt.
			log.Warn("peer is not connected", "err", err)
			logged = text
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff/2 + rand.N(backoff/2)):
		}
		backoff = min(2*backoff, reconnectMax)
	}
}

// stream opens one stream and sends on it until it breaks.
func (s *sender) stream(ctx context.Context, established func()) error {
	cfg := &s.transport.cfg
	conn, err := grpc.NewClient("passthrough:///"+s.address,
		grpc.WithTransportCredentials(cfg.Credentials),
		grpc.WithContextDialer(dial),
		grpc.WithDisableRetry(),
		grpc.WithReadBufferSize(32<<10),
		grpc.WithWriteBufferSize(128<<10),
		grpc.WithDefaultCallOptions(grpc.CallContentSubtype(codecName)))
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(deadAfter, func() { cancel(errDead) })
	defer watchdog.Stop()
	// An error of the stream is the effect of our own giving up, if we did.
	because := func(err error) error {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return err
	}

	stream, err := paxospb.NewPeerClient(conn).Messages(ctx)
	if err != nil {
		return because(err)
	}
	f := &frame{hello: s.transport.hello(s.id)}
	f.hello.Bulk = s.bulk
	// An error in sending is io.EOF: receiving tells why.
	_ = stream.SendMsg(f)
	reply, err := stream.Recv()
	if err != nil {
		return because(err)
	}
	if h := reply.GetHello(); h.GetClusterId() != cfg.ClusterID || h.GetSender() != uint32(s.id) || h.GetVersion() != protocolVersion {
		return status.Errorf(codes.FailedPrecondition, "expected replica %d of cluster %q in protocol version %d, but replica %d of cluster %q in version %d answered: mend the address or the cluster id",
			s.id, cfg.ClusterID, protocolVersion, h.GetSender(), h.GetClusterId(), h.GetVersion())
	}
	if err := s.transport.meet(reply.GetHello()); err != nil {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	watchdog.Reset(deadAfter)
	s.setStream(stream, new(tracker))
	defer s.setStream(nil, nil)
	established()

	received := make(chan struct{})
	go func() {
		defer close(received)
		for {
			if _, err := stream.Recv(); err != nil {
				cancel(err)
				return
			}
			watchdog.Reset(deadAfter)
		}
	}()
	defer func() { <-received }()
	defer cancel(nil)

	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wake:
			err = s.sendQueued()
		case <-ping.C:
			err = s.ping()
		}
		if err != nil {
			<-ctx.Done()
			return context.Cause(ctx)
		}
	}
}

// dial connects so that the kernel gives up on a connection whose bytes nobody
// acknowledges, which the replies of a half-open link cannot show.
func dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: dialTimeout,
		Control: func(_, _ string, c syscall.RawConn) error {
			var serr error
			err := c.Control(func(fd uintptr) {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
			})
			return errors.Join(err, serr)
		},
	}
	return d.DialContext(ctx, "tcp", address)
}
