package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"quorate/deploy/sandbox"
	"quorate/deploy/sandbox/relay"
)

// physicalLimit is the least a commit can take: a flush here, the round trip to
// the replica that completes the majority, and a flush there, beside nothing
// else. Both are measured, the round trip through a relay as the contenders use.
func (b *bench) physicalLimit(ctx context.Context, wan string) (time.Duration, error) {
	flushes, err := probeFlush(ctx, b.dir, b.probeFlushes)
	if err != nil {
		return 0, err
	}
	flush := percentile(flushes, 0.5)
	b.report.note("fdatasync of 8 kB written over: p50 %.3f ms, p99 %.3f ms", millis(flush), millis(percentile(flushes, 0.99)))
	if wan == sandbox.WANNone {
		return 2 * flush, nil
	}
	var medians []time.Duration
	var told []string
	for i := 1; i < replicas; i++ {
		nominal := sandbox.RoundTrip(wan, 0, i)
		trips, err := probeRoundTrip(ctx, nominal, b.probeRoundTrips)
		if err != nil {
			return 0, err
		}
		medians = append(medians, percentile(trips, 0.5))
		told = append(told, fmt.Sprintf("%v: p50 %.2f, p99 %.2f ms", nominal, millis(percentile(trips, 0.5)), millis(percentile(trips, 0.99))))
	}
	b.report.note("round trips that the relays give: %s", strings.Join(told, "; "))
	slices.Sort(medians)
	return flush + medians[replicas/2-1] + flush, nil
}

// probeFlush times flushes of a page in a file made before, as PostgreSQL's WAL
// and the acceptors' log are.
func probeFlush(ctx context.Context, dir string, times int) ([]time.Duration, error) {
	f, err := os.CreateTemp(dir, "flush-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	const fileBytes = 16 << 20
	page := make([]byte, 8<<10)
	for at := int64(0); at < fileBytes; at += int64(len(page)) {
		if _, err := f.WriteAt(page, at); err != nil {
			return nil, err
		}
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	var took []time.Duration
	for i := range times {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		page[0] = byte(i)
		if _, err := f.WriteAt(page, int64(i*len(page))%fileBytes); err != nil {
			return nil, err
		}
		began := time.Now()
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return nil, fmt.Errorf("fdatasync in %s: %w", filepath.Dir(f.Name()), err)
		}
		took = append(took, time.Since(began))
	}
	return took, nil
}

// probeRoundTrip times small messages to and fro through a relay.
func probeRoundTrip(ctx context.Context, nominal time.Duration, times int) ([]time.Duration, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.Copy(conn, conn) // ends with the connection
	}()
	defer func() { l.Close(); <-echoed }()
	r, err := relay.Listen("127.0.0.1:0", l.Addr().String(), relay.NewWire(nominal/2))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", r.Addr())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	message := make([]byte, 256)
	var took []time.Duration
	for i := range times + 1 {
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return nil, err
		}
		began := time.Now()
		if _, err := conn.Write(message); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(conn, message); err != nil {
			return nil, fmt.Errorf("echo through the relay: %w", err)
		}
		if i > 0 { // the first bears the handshake
			took = append(took, time.Since(began))
		}
	}
	return took, nil
}
