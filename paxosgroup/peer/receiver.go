package peer

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"quorate/paxosgroup"
	"quorate/paxosgroup/paxospb"
)

// server takes the streams of peers.
type server struct {
	paxospb.UnimplementedPeerServer
	transport *Transport
}

// receiver is one incoming stream.
type receiver struct {
	once  sync.Once
	ended chan struct{}
	err   error // why; set before ended is closed
}

func (r *receiver) end(err error) {
	r.once.Do(func() {
		r.err = err
		close(r.ended)
	})
}

// Messages serves one stream. The handler itself only waits, since nothing else
// ends a receive: returning from it does.
func (s *server) Messages(stream paxospb.Peer_MessagesServer) error {
	t := s.transport
	r := &receiver{ended: make(chan struct{})}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return status.Error(codes.Unavailable, errStopping.Error())
	}
	t.running.Add(1)
	t.mu.Unlock()

	idle := time.AfterFunc(idleAfter, func() { r.end(status.Error(codes.DeadlineExceeded, "no frame within 5 s")) })
	defer idle.Stop()
	welcome := make(chan paxosgroup.ReplicaID, 1)
	go func() {
		defer t.running.Done()
		r.end(t.receive(stream, r, idle, welcome))
	}()

	alive := time.NewTicker(pingInterval)
	defer alive.Stop()
	reply := &paxospb.Reply{}
	for {
		select {
		case <-r.ended:
			return r.err
		case <-t.stopping:
			return status.Error(codes.Unavailable, errStopping.Error())
		case from := <-welcome:
			reply.Hello = t.hello(from)
			if err := stream.Send(reply); err != nil {
				return err
			}
			reply.Hello = nil
		case <-alive.C:
			if err := stream.Send(reply); err != nil {
				return err
			}
		}
	}
}

// receive delivers what arrives until the stream ends.
func (t *Transport) receive(stream paxospb.Peer_MessagesServer, r *receiver, idle *time.Timer, welcome chan<- paxosgroup.ReplicaID) error {
	var f frame
	if err := stream.RecvMsg(&f); err != nil {
		return err
	}
	if err := t.checkHello(f.hello); err != nil {
		t.cfg.Logger.Warn("refused a peer", "err", err)
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	if err := t.meet(f.hello); err != nil {
		t.cfg.Logger.Warn("refused a peer", "err", err)
		if errors.Is(err, ErrSuperseded) {
			return status.Error(codes.DataLoss, err.Error())
		}
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	from := paxosgroup.ReplicaID(f.hello.GetSender())
	id := streamID{from, f.hello.GetBulk()}
	t.adopt(id, r)
	defer t.disown(id, r)
	welcome <- from
	for {
		if err := stream.RecvMsg(&f); err != nil {
			return err
		}
		idle.Reset(idleAfter)
		for i := range f.messages {
			if m := &f.messages[i].Message; m.From != from || m.To != t.cfg.Self {
				return status.Errorf(codes.InvalidArgument, "a message from replica %d to replica %d came on the stream from %d to %d",
					m.From, m.To, from, t.cfg.Self)
			}
		}
		if len(f.messages) > 0 {
			t.cfg.Deliver(from, f.messages)
		}
	}
}

func (t *Transport) checkHello(h *paxospb.Hello) error {
	self := t.cfg.Self
	switch {
	case h == nil:
		return fmt.Errorf("the stream did not begin with a hello: the caller is no sidecar of this version")
	case h.GetClusterId() != t.cfg.ClusterID:
		return fmt.Errorf("replica %d of cluster %q called, but this is replica %d of cluster %q: mend the caller's address for it",
			h.GetSender(), h.GetClusterId(), self, t.cfg.ClusterID)
	case h.GetVersion() != protocolVersion:
		return fmt.Errorf("replica %d speaks protocol version %d and this replica %d version %d: bring both to the same release",
			h.GetSender(), h.GetVersion(), self, protocolVersion)
	case h.GetReceiver() != uint32(self):
		return fmt.Errorf("replica %d called replica %d, but this is replica %d (cluster %q): mend the caller's address for it",
			h.GetSender(), h.GetReceiver(), self, t.cfg.ClusterID)
	case h.GetSender() == 0 || h.GetSender() == uint32(self):
		return fmt.Errorf("the caller names itself replica %d, and this is replica %d (cluster %q): every region needs its own replica id",
			h.GetSender(), self, t.cfg.ClusterID)
	}
	return nil
}

// adopt makes r the stream of a peer. An older one, which the peer has given up,
// ends, so that messages come from one at a time.
func (t *Transport) adopt(id streamID, r *receiver) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.receivers[id]; old != nil {
		old.end(status.Error(codes.Aborted, "the peer opened another stream"))
	}
	t.receivers[id] = r
}

func (t *Transport) disown(id streamID, r *receiver) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.receivers[id] == r {
		delete(t.receivers, id)
	}
}
