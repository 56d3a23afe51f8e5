package sidecar

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"quorate/paxosgroup/runner"
)

// metrics are what Prometheus is told beside what admin derives from status.
type metrics struct {
	commitSeconds prometheus.Histogram
	applied       prometheus.Counter
}

func newMetrics(reg *prometheus.Registry) *metrics {
	f := promauto.With(reg)
	return &metrics{
		commitSeconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "quorate_commit_seconds",
			Help:    "From the capture of a local commit to its confirmation to PostgreSQL.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
		}),
		applied: f.NewCounter(prometheus.CounterOpts{
			Name: "quorate_replayed_transactions_total",
			Help: "Transactions of other regions applied to this region's database.",
		}),
	}
}

func (m *metrics) watch(reg *prometheus.Registry, log durableLog, run *runner.Runner, group *runner.Group) {
	f := promauto.With(reg)
	counter := func(name, help string, v func() float64) {
		f.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, v)
	}
	counter("quorate_log_flushes_total", "Flushes of the durable log.", func() float64 { return float64(log.Stats().Flushes) })
	counter("quorate_log_records_total", "Records written to the durable log.", func() float64 { return float64(log.Stats().Records) })
	counter("quorate_log_bytes_total", "Bytes written to the durable log.", func() float64 { return float64(log.Stats().Bytes) })
	gauge := func(name, help string, v func() float64) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, v)
	}
	gauge("quorate_log_base_slot", "The log begins behind this slot.", func() float64 { return float64(group.Status().Base) })
	gauge("quorate_log_segments", "Files of the durable log, each of log.segment_bytes.", func() float64 { return float64(log.Stats().Segments) })
	gauge("quorate_log_full", "1: the disk of the log is full and this region accepts nothing; 0.5: there is no room for the log's next file; 0: there is.", func() float64 {
		switch full, low := roomOf(log); {
		case full:
			return 1
		case low:
			return 0.5
		}
		return 0
	})
	counter("quorate_entries_total", "Entries of the log delivered since start.", func() float64 { return float64(run.Stats().Delivered) })
	counter("quorate_void_entries_total", "Entries delivered void since start.", func() float64 { return float64(group.Status().Void) })
	counter("quorate_openings_total", "Terms that this region opened since start.", func() float64 { return float64(group.Status().Openings) })
	counter("quorate_opening_seconds_total", "From the beginning of a candidacy to its opening chosen, of all terms that this region opened.", func() float64 { return group.Status().OpeningTotal.Seconds() })
	counter("quorate_put_off_messages_total", "Messages not taken because the disk of the log was full or behind.", func() float64 { return float64(run.Stats().Unstored) })
	reg.MustRegister(batchSizes{run})
}

// batchSizes shows how many entries are accepted, and flushed, together.
type batchSizes struct{ run *runner.Runner }

var batchDesc = prometheus.NewDesc("quorate_batch_entries", "Entries accepted at once, to share a flush.", nil, nil)

// Describe implements prometheus.Collector.
func (batchSizes) Describe(out chan<- *prometheus.Desc) { out <- batchDesc }

// Collect implements prometheus.Collector.
func (b batchSizes) Collect(out chan<- prometheus.Metric) {
	st := b.run.Stats()
	buckets, count := make(map[float64]uint64), uint64(0)
	for i, n := range st.BatchSizes {
		count += n
		if i < runner.BatchBuckets-1 { // the last is without a bound
			buckets[float64(uint64(1)<<i)] = count
		}
	}
	out <- prometheus.MustNewConstHistogram(batchDesc, count, float64(st.Accepted), buckets)
}
