package runner

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"quorate/paxosgroup"
)

// BenchmarkPropose measures a proposal until it is chosen and readable at the
// leader: five replicas in this process, over loopback gRPC and real flushes.
func BenchmarkPropose(b *testing.B) {
	// A flush holds a scheduler slot: five replicas would stall each other.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(16, runtime.GOMAXPROCS(0))))
	for _, size := range []int{128, 1024} {
		for _, proposers := range []int{1, 64, 1024} {
			b.Run(fmt.Sprintf("bytes=%d/proposers=%d", size, proposers), func(b *testing.B) {
				benchmarkPropose(b, proposers, size)
			})
		}
	}
}

func benchmarkPropose(b *testing.B, proposers, size int) {
	c := startCluster(b, 5, 1, func(gc *GroupConfig) { gc.Core.PreferredRegion = "r1" })
	g := c.leader(1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	// Proposals are found by what they carry, as a sidecar finds its own.
	var mu sync.Mutex
	waiting := make(map[uint64]chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		next, moved := g.Chosen()
		next++
		for {
			entries, err := g.Read(next, 1<<20)
			if err != nil {
				b.Error(err)
				return
			}
			for _, d := range entries {
				next = d.Slot + 1
				if d.Entry.Kind == paxosgroup.KindData {
					mu.Lock()
					close(waiting[binary.LittleEndian.Uint64(d.Entry.Payload)])
					delete(waiting, binary.LittleEndian.Uint64(d.Entry.Payload))
					mu.Unlock()
				}
			}
			if len(entries) > 0 {
				_, moved = g.Chosen()
				if last, _ := g.Chosen(); last >= next {
					continue
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-moved:
				_, moved = g.Chosen()
			}
		}
	})

	var flushes uint64
	for _, n := range c.nodes {
		flushes -= n.log.Stats().Flushes
	}
	todo := make(chan uint64)
	var latencies []time.Duration
	var proposing sync.WaitGroup
	for range proposers {
		proposing.Go(func() {
			var own []time.Duration
			for k := range todo {
				payload := make([]byte, size)
				binary.LittleEndian.PutUint64(payload, k)
				done := make(chan struct{})
				mu.Lock()
				waiting[k] = done
				mu.Unlock()
				began := time.Now()
				if _, _, err := g.Propose(ctx, payload); err != nil {
					b.Error(err)
					return
				}
				<-done
				own = append(own, time.Since(began))
			}
			mu.Lock()
			latencies = append(latencies, own...)
			mu.Unlock()
		})
	}
	b.ReportAllocs()
	k := uint64(0)
	for b.Loop() {
		k++
		todo <- k
	}
	close(todo)
	proposing.Wait()
	for _, n := range c.nodes {
		flushes += n.log.Stats().Flushes
	}
	cancel()
	watching.Wait()
	slices.Sort(latencies)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
	b.ReportMetric(float64(flushes)/float64(b.N)/float64(len(c.nodes)), "flushes/entry")
	b.ReportMetric(float64(latencies[len(latencies)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(latencies[len(latencies)*99/100].Microseconds()), "p99-µs")
}
