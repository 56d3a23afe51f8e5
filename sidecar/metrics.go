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

func (m *metrics) watch(reg *prometheus.Registry, log durableLog, group *runner.Group) {
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
	counter("quorate_void_entries_total", "Entries delivered void since start.", func() float64 { return float64(group.Status().Void) })
}
