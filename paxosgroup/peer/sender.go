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

// sender is the outgoing stream to one peer.
type sender struct {
	transport *Transport
	id        paxosgroup.ReplicaID
	address   string
	wake      chan struct{} // holds a token when the queue has something

	mu        sync.Mutex
	connected bool
	lastError string
	queue     []GroupMessage
	bytes     int // of queue
	sent      uint64
	frames    uint64
	dropped   uint64
}

func newSender(t *Transport, id paxosgroup.ReplicaID, address string) *sender {
	return &sender{transport: t, id: id, address: address, wake: make(chan struct{}, 1)}
}

func (s *sender) state() PeerState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return PeerState{
		ID: s.id, Address: s.address, Connected: s.connected, LastError: s.lastError,
		Sent: s.sent, Frames: s.frames, Dropped: s.dropped, Queued: len(s.queue),
	}
}

// Weight is about how many bytes a message takes in memory and on the wire.
func (m *GroupMessage) Weight() int {
	n := 128 + 8*len(m.Message.Slots)
	for i := range m.Message.Accepted {
		n += 96 + len(m.Message.Accepted[i].Entry.Payload)
	}
	for i := range m.Message.Entries {
		n += 96 + len(m.Message.Entries[i].Entry.Payload)
	}
	return n
}

func (s *sender) enqueue(m GroupMessage) {
	cfg := &s.transport.cfg
	w := m.Weight()
	s.mu.Lock()
	if !s.connected || len(s.queue) >= cfg.QueueMessagesMax || len(s.queue) > 0 && s.bytes+w > cfg.QueueBytesMax {
		s.dropped++
		s.mu.Unlock()
		return
	}
	s.queue = append(s.queue, m)
	s.bytes += w
	first := len(s.queue) == 1
	s.mu.Unlock()
	if first {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// take moves what is queued, up to a frame's size, into f and reports whether
// there was anything.
func (s *sender) take(f *frame) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return false
	}
	n, size := 0, 0
	for n < len(s.queue) {
		w := s.queue[n].Weight()
		if n > 0 && size+w > s.transport.cfg.FrameBytesMax {
			break
		}
		size += w
		n++
	}
	clear(f.messages)
	f.messages = append(f.messages[:0], s.queue[:n]...)
	rest := copy(s.queue, s.queue[n:])
	clear(s.queue[rest:])
	s.queue = s.queue[:rest]
	s.bytes -= size
	s.sent += uint64(n)
	s.frames++
	return true
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
	log := s.transport.cfg.Logger.With("peer", s.id, "address", s.address)
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
		if status.Code(err) == codes.FailedPrecondition {
			backoff = refusedBackoff
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
	f := &frame{hello: &paxospb.Hello{
		ClusterId: cfg.ClusterID, Sender: uint32(cfg.Self), Receiver: uint32(s.id), Version: protocolVersion,
	}}
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
	watchdog.Reset(deadAfter)
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

	f.hello = nil
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wake:
			for s.take(f) {
				if err := stream.SendMsg(f); err != nil {
					<-ctx.Done()
					return context.Cause(ctx)
				}
			}
		case <-ping.C:
			clear(f.messages)
			f.messages = f.messages[:0]
			if err := stream.SendMsg(f); err != nil {
				<-ctx.Done()
				return context.Cause(ctx)
			}
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
