package relay

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// linksMax bounds the connections of one relay at a time; more are refused.
const linksMax = 512

// Relay listens on one address and carries each connection over its wire to
// its target.
type Relay struct {
	listener net.Listener
	target   string
	wire     *Wire
	done     chan struct{} // closed by Close
	running  sync.WaitGroup

	mu     sync.Mutex
	links  map[*link]struct{}
	closed bool
}

// Listen starts a relay from address to target over w.
func Listen(address, target string, w *Wire) (*Relay, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for the relay to %s: %w", target, err)
	}
	r := &Relay{listener: listener, target: target, wire: w, done: make(chan struct{}), links: map[*link]struct{}{}}
	r.running.Add(1)
	go r.accept()
	return r, nil
}

// Addr returns the address the relay listens on.
func (r *Relay) Addr() string { return r.listener.Addr().String() }

// Close ends the relay with all its connections, and returns when nothing of
// them is left.
func (r *Relay) Close() {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		r.running.Wait()
		return
	}
	r.closed = true
	close(r.done)
	r.listener.Close()
	for l := range r.links {
		l.close()
	}
	r.mu.Unlock()
	r.running.Wait()
}

func (r *Relay) accept() {
	defer r.running.Done()
	for {
		conn, err := r.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of file descriptors, say: pause rather than spin
			select {
			case <-r.done:
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		l := &link{relay: r, near: conn.(*net.TCPConn)}
		r.mu.Lock()
		if r.closed || len(r.links) >= linksMax {
			r.mu.Unlock()
			abort(l.near)
			continue
		}
		r.links[l] = struct{}{}
		r.running.Add(1)
		r.mu.Unlock()
		go func() {
			defer r.running.Done()
			l.run()
			r.mu.Lock()
			delete(r.links, l)
			r.mu.Unlock()
		}()
	}
}
