package peer

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// proxy forwards connections to a target, or swallows what passes.
type proxy struct {
	address string
	swallow atomic.Bool
}

func startProxy(t testing.TB, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: listener.Addr().String()}
	var running sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	closing := false
	track := func(c net.Conn) {
		mu.Lock()
		defer mu.Unlock()
		open = append(open, c)
		if closing {
			c.Close()
		}
	}
	pump := func(dst, src net.Conn) {
		defer dst.Close()
		defer src.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 && !p.swallow.Load() {
				if _, err := dst.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	running.Go(func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			track(in)
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			track(out)
			running.Go(func() { pump(out, in) })
			running.Go(func() { pump(in, out) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		closing = true
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return p
}
