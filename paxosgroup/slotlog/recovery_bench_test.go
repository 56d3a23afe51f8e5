package slotlog

import (
	"strings"
	"testing"

	"quorate/paxosgroup"
)

// BenchmarkRecovery reports how long a start takes for each GiB of log, from the
// page cache.
func BenchmarkRecovery(b *testing.B) {
	cfg := Config{Dir: b.TempDir()}
	l, _ := open(b, cfg)
	payload := strings.Repeat("x", 1024)
	for s := paxosgroup.Slot(1); s < 200_000; s++ {
		l.Append(1, []paxosgroup.Record{accept(s, 1, payload), chosen(s - 1)}, func(error) {})
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	bytes := l.Stats().Bytes
	b.ReportAllocs()
	for b.Loop() {
		l, _, err := Open(cfg)
		if err != nil {
			b.Fatal(err)
		}
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(b.Elapsed().Seconds()/float64(b.N)/float64(bytes)*(1<<30), "s/GiB")
}
