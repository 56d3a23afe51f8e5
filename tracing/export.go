package tracing

import (
	"context"
	"log/slog"
	"sync/atomic"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// countingExporter counts what leaves and keeps a collector's absence from
// filling the log: it says once that spans are being lost, and once that they
// flow again.
type countingExporter struct {
	sdktrace.SpanExporter
	logger *slog.Logger
	url    string

	made, exported, failed atomic.Uint64
	down                   bool // batches are exported one at a time
}

func (e *countingExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	if err != nil {
		e.failed.Add(uint64(len(spans)))
		if !e.down {
			e.down = true
			e.logger.Warn("spans cannot be exported and are dropped until the collector answers", "url", e.url, "err", err)
		}
		// The error ends here: the SDK would print it again for each batch.
		return nil
	}
	e.exported.Add(uint64(len(spans)))
	if e.down {
		e.down = false
		e.logger.Info("spans are exported again", "url", e.url)
	}
	return nil
}

func (e *countingExporter) stats() Stats {
	return Stats{Made: e.made.Load(), Exported: e.exported.Load(), Failed: e.failed.Load()}
}
