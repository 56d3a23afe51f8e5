package main

import (
	"context"
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// payloadBytesMin has room for the number of the proposer and of the operation.
const payloadBytesMin = 16

// load is closed-loop proposers at work.
type load struct {
	cancel  context.CancelFunc
	running sync.WaitGroup
	// phase is 0 until mark, 1 until finish, and then 2: only what ends in
	// phase 1 is counted.
	phase  atomic.Int32
	marked time.Time
	each   []proposerResult
}

type proposerResult struct {
	latencies []time.Duration
	failed    int
	lastError string
	_         [64]byte // of its own cache line
}

// loadResult is what a load did between mark and finish.
type loadResult struct {
	Operations int
	Failed     int
	LastError  string
	Elapsed    time.Duration
	P50, P99   time.Duration
	Max        time.Duration
}

func (r loadResult) rate() float64 { return float64(r.Operations) / r.Elapsed.Seconds() }

func startLoad(m member, proposers, size int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel, each: make([]proposerResult, proposers)}
	for i := range proposers {
		l.running.Go(func() { l.propose(ctx, m, i, size) })
	}
	return l
}

func (l *load) propose(ctx context.Context, m member, i, size int) {
	r := &l.each[i]
	for k := uint64(1); l.phase.Load() < 2; k++ {
		payload := make([]byte, size)
		binary.LittleEndian.PutUint32(payload, uint32(i))
		binary.LittleEndian.PutUint64(payload[4:], k)
		began := time.Now()
		err := m.propose(ctx, i, payload)
		took := time.Since(began)
		if l.phase.Load() != 1 {
			continue
		}
		if err != nil {
			r.failed++
			r.lastError = err.Error()
			time.Sleep(time.Millisecond) // no spinning on a replica that leads no more
			continue
		}
		r.latencies = append(r.latencies, took)
	}
}

// mark begins what is counted.
func (l *load) mark() {
	l.marked = time.Now()
	l.phase.Store(1)
}

// finish ends the load and returns when every proposer has.
func (l *load) finish() *loadResult {
	elapsed := time.Since(l.marked)
	l.phase.Store(2)
	stuck := time.AfterFunc(10*time.Second, l.cancel)
	l.running.Wait()
	stuck.Stop()
	l.cancel()
	res := &loadResult{Elapsed: elapsed}
	var all []time.Duration
	for i := range l.each {
		all = append(all, l.each[i].latencies...)
		res.Failed += l.each[i].failed
		if l.each[i].lastError != "" {
			res.LastError = l.each[i].lastError
		}
	}
	res.Operations = len(all)
	if len(all) > 0 {
		slices.Sort(all)
		res.P50, res.P99, res.Max = all[len(all)/2], all[len(all)*99/100], all[len(all)-1]
	}
	return res
}

// waiters wakes proposers of a contender that delivers entries in order: each
// has one operation at a time, so its number is enough to find it.
type waiters struct {
	done [proposersMax]chan struct{}
}

func newWaiters() *waiters {
	w := &waiters{}
	for i := range w.done {
		w.done[i] = make(chan struct{}, 1)
	}
	return w
}

// delivered wakes the proposer of a payload.
func (w *waiters) delivered(payload []byte) {
	if len(payload) < payloadBytesMin {
		return
	}
	if i := binary.LittleEndian.Uint32(payload); i < proposersMax {
		select {
		case w.done[i] <- struct{}{}:
		default: // nobody waits: this is a follower, or the proposer has given up
		}
	}
}

// clear forgets a token that an operation given up has left.
func (w *waiters) clear(i int) {
	select {
	case <-w.done[i]:
	default:
	}
}

func (w *waiters) wait(ctx context.Context, i int) error {
	select {
	case <-w.done[i]:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
