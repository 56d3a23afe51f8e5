package tracing

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// emit is apart from Span so that what it allocates is not charged to callers
// whose commit is not sampled.
func (t *Tracer) emit(id identity, c Commit, s Stage, at Interval, failure error) {
	t.exporter.made.Add(1)
	self := trace.SpanID(id.spanID(s, t.region))
	ctx := context.WithValue(context.Background(), idsKey{}, ids{trace: id.traceID, span: self})
	parent := trace.SpanContextConfig{TraceID: id.traceID, TraceFlags: trace.FlagsSampled, Remote: true}
	if s == Committed {
		parent.SpanID = c.Client.SpanID
		parent.TraceFlags |= trace.TraceFlags(c.Client.Flags)
	} else {
		parent.SpanID = id.spanID(s.parent(), t.region)
	}
	// A commit without a client's span is the root: an invalid parent makes it so.
	ctx = trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(parent))

	attrs := make([]attribute.KeyValue, 0, 8)
	attrs = append(attrs,
		attribute.String("region", t.region),
		attribute.String("incarnation", fmt.Sprintf("%016x", c.Incarnation)),
		attribute.String("lsn", c.EndLSN.String()),
	)
	if c.Group != 0 {
		attrs = append(attrs, attribute.Int64("group", int64(c.Group)))
	}
	if c.Slot != 0 {
		attrs = append(attrs, attribute.Int64("slot", int64(c.Slot)))
	}
	if c.BallotCounter != 0 {
		attrs = append(attrs, attribute.String("ballot", fmt.Sprintf("%d.%d", c.BallotCounter, c.BallotReplica)))
	}
	kind := trace.SpanKindInternal
	if s == Committed {
		kind = trace.SpanKindServer
	}
	_, span := t.tracer.Start(ctx, s.String(),
		trace.WithTimestamp(at.Start), trace.WithSpanKind(kind), trace.WithAttributes(attrs...))
	if failure != nil {
		span.SetStatus(codes.Error, failure.Error())
	}
	span.End(trace.WithTimestamp(at.End))
}

type idsKey struct{}

// ids are the ids of the span about to be started.
type ids struct {
	trace trace.TraceID
	span  trace.SpanID
}

// contextIDs gives spans the ids that emit put into the context.
type contextIDs struct{}

func (contextIDs) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	v := mustIDs(ctx)
	return v.trace, v.span
}

func (contextIDs) NewSpanID(ctx context.Context, _ trace.TraceID) trace.SpanID {
	return mustIDs(ctx).span
}

func mustIDs(ctx context.Context) ids {
	v, ok := ctx.Value(idsKey{}).(ids)
	if !ok {
		panic("tracing: a span was started without its ids")
	}
	return v
}
