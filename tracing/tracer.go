package tracing

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"quorate/replication/entry"
)

// Defaults of Config.
const (
	DefaultQueueSpansMax = 8192
	DefaultBatchDelay    = time.Second
	DefaultExportTimeout = 5 * time.Second
)

// Config says where spans go.
type Config struct {
	// URL of an OTLP gRPC collector, such as http://127.0.0.1:4317. The scheme
	// http means without TLS, https with the system's roots. Empty: off.
	URL string

	ClusterID string // part of every trace id, and attribute quorate.cluster
	Region    string

	// SampleRatio is the share, above 0 and up to 1, of commits without a
	// client's traceparent that are traced. It must be the same in all regions,
	// or traces have holes. A client's sampled flag wins.
	SampleRatio float64

	QueueSpansMax int           // spans waiting for export; more are dropped. 0: DefaultQueueSpansMax
	BatchDelay    time.Duration // longest wait of a finished span. 0: DefaultBatchDelay
	ExportTimeout time.Duration // of one batch, with its retries. 0: DefaultExportTimeout

	Logger *slog.Logger // nil: slog.Default()
}

func (c *Config) complete() error {
	var errs []error
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		errs = append(errs, fmt.Errorf("url: %w", err))
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		errs = append(errs, fmt.Errorf("url: %q is not http://HOST:PORT or https://HOST:PORT", c.URL))
	}
	if c.ClusterID == "" {
		errs = append(errs, errors.New("cluster id: missing"))
	}
	if c.Region == "" {
		errs = append(errs, errors.New("region: missing"))
	}
	if !(c.SampleRatio > 0 && c.SampleRatio <= 1) {
		errs = append(errs, fmt.Errorf("sample ratio: %v is not above 0 and at most 1; to switch tracing off leave the url empty", c.SampleRatio))
	}
	if c.QueueSpansMax == 0 {
		c.QueueSpansMax = DefaultQueueSpansMax
	}
	if c.BatchDelay == 0 {
		c.BatchDelay = DefaultBatchDelay
	}
	if c.ExportTimeout == 0 {
		c.ExportTimeout = DefaultExportTimeout
	}
	if c.QueueSpansMax < 0 || c.BatchDelay < 0 || c.ExportTimeout < 0 {
		errs = append(errs, errors.New("queue size, batch delay, export timeout: must not be negative"))
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return errors.Join(errs...)
}

// Tracer makes spans of finished intervals. Its methods may be called from
// several goroutines at once and never block, Shutdown excepted. A nil Tracer
// does nothing.
type Tracer struct {
	cluster  [sha256.Size]byte
	region   string
	below    uint64 // see samplingBound
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	exporter *countingExporter
}

// New returns nil, which is a usable Tracer, if cfg.URL is empty. It does not
// wait for the collector, which may come and go.
func New(ctx context.Context, cfg Config) (*Tracer, error) {
	if cfg.URL == "" {
		return nil, nil
	}
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	otlp, err := otlptracegrpc.New(ctx,
		otlptracegrpc.WithEndpointURL(cfg.URL),
		otlptracegrpc.WithTimeout(cfg.ExportTimeout),
		otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{
			Enabled:         true,
			InitialInterval: 250 * time.Millisecond,
			MaxInterval:     time.Second,
			MaxElapsedTime:  cfg.ExportTimeout,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("tracing: exporter to %s: %w", cfg.URL, err)
	}
	exporter := &countingExporter{SpanExporter: otlp, logger: cfg.Logger, url: cfg.URL}
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "quorate"),
			attribute.String("service.instance.id", cfg.Region),
			attribute.String("quorate.region", cfg.Region),
			attribute.String("quorate.cluster", cfg.ClusterID),
		)),
		// Whether to sample is decided before a span is made.
		sdktrace.WithSampler(sdktrace.AlwaysSample()),
		sdktrace.WithIDGenerator(contextIDs{}),
		sdktrace.WithBatcher(exporter,
			sdktrace.WithMaxQueueSize(cfg.QueueSpansMax),
			sdktrace.WithMaxExportBatchSize(min(512, cfg.QueueSpansMax)),
			sdktrace.WithBatchTimeout(cfg.BatchDelay),
			sdktrace.WithExportTimeout(cfg.ExportTimeout),
		),
	)
	return &Tracer{
		cluster:  sha256.Sum256([]byte("quorate commit\x00" + cfg.ClusterID)),
		region:   cfg.Region,
		below:    samplingBound(cfg.SampleRatio),
		provider: provider,
		tracer:   provider.Tracer("quorate/tracing"),
		exporter: exporter,
	}, nil
}

// Sampled reports whether the commit's spans are wanted, alike in all regions:
// for call sites that would otherwise gather timestamps for nothing.
func (t *Tracer) Sampled(c Commit) bool {
	if t == nil {
		return false
	}
	return identify(t.cluster, c).sampled(c.Client, t.below)
}

// Context returns the context of the commit span, for whoever carries the
// trace on. Without a tracer it is the client's own.
func (t *Tracer) Context(c Commit) entry.Trace {
	if t == nil {
		return c.Client
	}
	id := identify(t.cluster, c)
	tr := entry.Trace{TraceID: id.traceID, SpanID: id.commitID, Flags: c.Client.Flags &^ flagSampled}
	if id.sampled(c.Client, t.below) {
		tr.Flags |= flagSampled
	}
	return tr
}

// Span hands over the finished span of a stage of commit c in this region. A
// non-nil failure makes it an error span.
func (t *Tracer) Span(c Commit, s Stage, at Interval, failure error) {
	if t == nil {
		return
	}
	id := identify(t.cluster, c)
	if !id.sampled(c.Client, t.below) {
		return
	}
	t.emit(id, c, s, at, failure)
}

// Stats counts spans since start. What is neither exported nor failed waits,
// or was dropped because too many waited.
type Stats struct {
	Made, Exported, Failed uint64
}

// Stats returns the counts; all are zero without a tracer.
func (t *Tracer) Stats() Stats {
	if t == nil {
		return Stats{}
	}
	return t.exporter.stats()
}

// Flush sends what waits, until ctx ends.
func (t *Tracer) Flush(ctx context.Context) error {
	if t == nil {
		return nil
	}
	if err := t.provider.ForceFlush(ctx); err != nil {
		return fmt.Errorf("flush spans: %w", err)
	}
	return nil
}

// Shutdown sends what waits and stops, at the latest when ctx ends. Spans
// handed over afterwards are dropped.
func (t *Tracer) Shutdown(ctx context.Context) error {
	if t == nil {
		return nil
	}
	if err := t.provider.Shutdown(ctx); err != nil {
		return fmt.Errorf("shut down tracing: %w", err)
	}
	return nil
}
