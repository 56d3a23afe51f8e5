package feed

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// errRefused says that the stream's last message is not the one expected:
// somebody else has published, or a message of ours was lost on its way.
var errRefused = errors.New("refused: the stream has moved on")

// window publishes messages in order ahead of their acknowledgements, up to a
// bound of messages and bytes; at the bound it waits for the oldest.
type window struct {
	js    jetstream.JetStream
	max   int
	last  uint64 // the stream's sequence after the latest message published
	queue []pending
	bytes int
	acked uint64
}

type pending struct {
	ack   jetstream.PubAckFuture
	seq   uint64
	bytes int
}

func (w *window) publish(ctx context.Context, group uint32, m message) error {
	for len(w.queue) > 0 && (len(w.queue) >= w.max || w.bytes+len(m.body) > pendingBytesMax) {
		if err := w.oldest(ctx); err != nil {
			return err
		}
	}
	// Notice a refusal early, and do not go on into a stream that moved on.
	for len(w.queue) > 0 && w.queue[0].done() {
		if err := w.oldest(ctx); err != nil {
			return err
		}
	}
	msg := nats.NewMsg(m.subject)
	msg.Data = m.body
	if m.traceparent != "" {
		msg.Header.Set("traceparent", m.traceparent)
	}
	ack, err := w.js.PublishMsgAsync(msg,
		jetstream.WithMsgID(m.at.messageID(group)),
		jetstream.WithExpectLastSequence(w.last),
		// A message sent again later would come out of turn.
		jetstream.WithRetryAttempts(0))
	if err != nil {
		return fmt.Errorf("publish %s: %w", m.at.messageID(group), err)
	}
	w.last++
	w.queue = append(w.queue, pending{ack: ack, seq: w.last, bytes: len(m.body)})
	w.bytes += len(m.body)
	return nil
}

// done reports whether the outcome is known.
func (p pending) done() bool { return len(p.ack.Ok())+len(p.ack.Err()) > 0 }

// oldest waits for the acknowledgement of the oldest message.
func (w *window) oldest(ctx context.Context) error {
	p := w.queue[0]
	select {
	case ack := <-p.ack.Ok():
		// A duplicate is one of ours that was taken for lost; it is in its
		// place if it is where it was meant to be.
		if ack.Sequence != p.seq {
			return fmt.Errorf("%w: %s went to sequence %d, not %d", errRefused, p.ack.Msg().Header.Get(jetstream.MsgIDHeader), ack.Sequence, p.seq)
		}
	case err := <-p.ack.Err():
		id := p.ack.Msg().Header.Get(jetstream.MsgIDHeader)
		if api, ok := errors.AsType[*jetstream.APIError](err); ok && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
			api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant) {
			return fmt.Errorf("%w: message %s expected to become sequence %d: %s", errRefused, id, p.seq, api.Description)
		}
		return fmt.Errorf("acknowledgement of message %s: %w", id, err)
	case <-ctx.Done():
		return ctx.Err()
	}
	w.queue = w.queue[1:]
	w.bytes -= p.bytes
	w.acked++
	return nil
}

// drain waits for all acknowledgements.
func (w *window) drain(ctx context.Context) error {
	for len(w.queue) > 0 {
		if err := w.oldest(ctx); err != nil {
			return err
		}
	}
	w.queue = nil
	return nil
}

// takeAcked returns how many messages were acknowledged since the last call.
func (w *window) takeAcked() uint64 {
	n := w.acked
	w.acked = 0
	return n
}
