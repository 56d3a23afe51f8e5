package tracing

import (
	"context"
	"errors"
	"testing"
	"time"

	"quorate/replication/entry"
)

// offline is a tracer whose collector is not there.
func offline(t testing.TB, region string, ratio float64) *Tracer {
	t.Helper()
	tr, err := New(context.Background(), Config{
		URL: "http://127.0.0.1:1", ClusterID: "c0ffee", Region: region, SampleRatio: ratio,
		QueueSpansMax: 64, ExportTimeout: 50 * time.Millisecond, BatchDelay: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := tr.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
	})
	return tr
}

// callSite is what a commit path does with a tracer.
func callSite(t *Tracer, c Commit, now time.Time, failure error) {
	if t.Sampled(c) {
		panic("not to be sampled")
	}
	t.Span(c, Accept, Interval{Start: now, End: now}, failure)
	_ = t.Context(c)
	_ = t.Stats()
}

func TestOffAllocatesNothing(t *testing.T) {
	off, err := New(context.Background(), Config{})
	if err != nil || off != nil {
		t.Fatalf("without an URL: %v, %v", off, err)
	}
	now := time.Now()
	unsampled := offline(t, "r1", 1e-18)
	for name, tr := range map[string]*Tracer{"off": nil, "not sampled": unsampled} {
		c := Commit{Incarnation: 1, EndLSN: 42, Slot: 7}
		if n := testing.AllocsPerRun(100, func() { c.EndLSN++; callSite(tr, c, now, nil) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if err := errors.Join(off.Flush(context.Background()), off.Shutdown(context.Background())); err != nil {
		t.Error(err)
	}
}

func BenchmarkOff(b *testing.B) {
	b.ReportAllocs()
	now := time.Now()
	for b.Loop() {
		callSite(nil, Commit{Incarnation: 1, EndLSN: 42}, now, nil)
	}
}

func BenchmarkNotSampled(b *testing.B) {
	b.ReportAllocs()
	tr, now := offline(b, "r1", 1e-18), time.Now()
	for b.Loop() {
		callSite(tr, Commit{Incarnation: 1, EndLSN: 42}, now, nil)
	}
}

func BenchmarkSampled(b *testing.B) {
	b.ReportAllocs()
	tr, now := offline(b, "r1", 1), time.Now()
	for b.Loop() {
		tr.Span(Commit{Incarnation: 1, EndLSN: 42, Group: 1, Slot: 9, BallotCounter: 3, BallotReplica: 1}, Accept, Interval{now, now}, nil)
	}
}

func TestRegionsComputeAlike(t *testing.T) {
	a, b := offline(t, "r1", 0.25), offline(t, "r2", 0.25)
	seen := make(map[entry.Trace]bool)
	sampled := 0
	const n = 20_000
	for lsn := range entry.LSN(n) {
		c := Commit{Incarnation: 0xa1, EndLSN: lsn}
		tr := a.Context(c)
		// What a region knows of group, slot and ballot must not matter.
		if other := b.Context(Commit{Incarnation: 0xa1, EndLSN: lsn, Group: 1, Slot: 5, BallotCounter: 2, BallotReplica: 2}); other != tr {
			t.Fatalf("regions disagree about %v: %x and %x", lsn, tr, other)
		}
		if seen[tr] {
			t.Fatalf("%x is the trace of two commits", tr)
		}
		seen[tr] = true
		if a.Sampled(c) != (tr.Flags&1 == 1) || a.Sampled(c) != b.Sampled(c) {
			t.Fatalf("regions disagree whether to sample %v", lsn)
		}
		if a.Sampled(c) {
			sampled++
		}
	}
	if share := float64(sampled) / n; share < 0.22 || share > 0.28 {
		t.Errorf("%.3f of the commits are sampled, want 0.25", share)
	}
	if a.Context(Commit{Incarnation: 0xa2, EndLSN: 1}) == a.Context(Commit{Incarnation: 0xa1, EndLSN: 1}) {
		t.Error("two incarnations share a trace")
	}
}

func TestClientDecides(t *testing.T) {
	client := entry.Trace{TraceID: [16]byte{1}, SpanID: [8]byte{2}, Flags: 1}
	c := Commit{Incarnation: 1, EndLSN: 42, Client: client}
	var off *Tracer
	if off.Context(c) != client {
		t.Error("without a tracer the client's context is not handed on")
	}
	never, always := offline(t, "r1", 1e-18), offline(t, "r1", 1)
	if !never.Sampled(c) {
		t.Error("sampled by the client, and not by us")
	}
	c.Client.Flags = 0
	if always.Sampled(c) {
		t.Error("not sampled by the client, but by us")
	}
	got := always.Context(c)
	if got.TraceID != client.TraceID || got.SpanID == client.SpanID || got.SpanID == [8]byte{} || got.Flags != 0 {
		t.Errorf("context %x does not go on from the client's", got)
	}
}

// A collector that is away costs spans, never time.
func TestCollectorAway(t *testing.T) {
	tr := offline(t, "r1", 1)
	start := time.Now()
	for lsn := range entry.LSN(5000) {
		tr.Span(Commit{Incarnation: 1, EndLSN: lsn}, Apply, Interval{start, start}, nil)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("5000 spans took %v with the collector away", d)
	}
	if st := tr.Stats(); st.Made != 5000 || st.Exported != 0 {
		t.Errorf("stats %+v", st)
	}
}

func TestConfig(t *testing.T) {
	good := Config{URL: "http://127.0.0.1:4317", ClusterID: "c", Region: "r1", SampleRatio: 1}
	for _, tc := range []struct {
		name  string
		spoil func(*Config)
	}{
		{"url without a scheme", func(c *Config) { c.URL = "127.0.0.1:4317" }},
		{"url of another scheme", func(c *Config) { c.URL = "udp://127.0.0.1:6831" }},
		{"no cluster", func(c *Config) { c.ClusterID = "" }},
		{"no region", func(c *Config) { c.Region = "" }},
		{"ratio 0", func(c *Config) { c.SampleRatio = 0 }},
		{"ratio above 1", func(c *Config) { c.SampleRatio = 1.5 }},
		{"negative queue", func(c *Config) { c.QueueSpansMax = -1 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := good
			tc.spoil(&cfg)
			if _, err := New(context.Background(), cfg); err == nil {
				t.Error("accepted")
			}
		})
	}
}
