package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// metadataClusterID is the stream's metadata that says whose it is.
const metadataClusterID = "quorate-cluster-id"

func (p *Publisher) streamConfig() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:        StreamName(p.cfg.Cluster, p.cfg.Shard),
		Description: "changes of shard " + p.cfg.Shard + " in commit order",
		Subjects:    []string{p.subjects.all()},
		Retention:   jetstream.LimitsPolicy,
		Discard:     jetstream.DiscardOld,
		Storage:     jetstream.FileStorage,
		Compression: jetstream.S2Compression,
		MaxBytes:    p.cfg.MaxBytes,
		Replicas:    p.cfg.Replicas,
		Duplicates:  p.cfg.DuplicateWindow,
		// MaxAge is not here: see expire.
		Metadata: map[string]string{metadataClusterID: p.cfg.ClusterID},
	}
}

// call bounds one request to JetStream.
func (p *Publisher) call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, p.cfg.AckTimeout)
}

// openStream finds the shard's stream, makes it if there is none, and brings
// its limits up to date.
func (p *Publisher) openStream(ctx context.Context, js jetstream.JetStream) (jetstream.Stream, error) {
	p.update(func(s *Status) {
		if s.Err == nil {
			s.State = "opening the stream"
		}
	})
	want := p.streamConfig()
	ctx, cancel := p.call(ctx)
	defer cancel()
	stream, err := js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if stream, err = js.CreateStream(ctx, want); err != nil {
			return nil, fmt.Errorf("create stream %s with %d replicas: %w", want.Name, want.Replicas, err)
		}
		return stream, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up stream %s (JetStream may still be electing its leader): %w", want.Name, err)
	}
	have := stream.CachedInfo().Config
	if id := have.Metadata[metadataClusterID]; id != p.cfg.ClusterID {
		return nil, fmt.Errorf("stream %s belongs to cluster id %q, not %q: delete it, or name this cluster otherwise", want.Name, id, p.cfg.ClusterID)
	}
	if have.MaxBytes == want.MaxBytes && have.Replicas == want.Replicas && have.Duplicates == want.Duplicates && have.MaxAge == 0 {
		return stream, nil
	}
	updated, err := js.UpdateStream(ctx, want)
	if err != nil {
		// More replicas than servers are up, say. The stream is good as it is.
		p.cfg.Logger.Warn("feed cannot update the limits of its stream and goes on with the old ones", "stream", want.Name, "err", err)
		return stream, nil
	}
	return updated, nil
}

// tail is the end of a stream; all zero but next in a new one.
type tail struct {
	sequence uint64
	at       position // of the last message
	next     uint64   // the first slot of which something may be missing
}

// readTail reads the stream's last message.
func (p *Publisher) readTail(ctx context.Context, stream jetstream.Stream) (tail, error) {
	ctx, cancel := p.call(ctx)
	defer cancel()
	for {
		info, err := stream.Info(ctx)
		if err != nil {
			return tail{}, fmt.Errorf("read the stream's state: %w", err)
		}
		last := info.State.LastSeq
		if last == 0 {
			return tail{next: 1}, nil
		}
		msg, err := stream.GetMsg(ctx, last)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			// Gone between the two calls, if the stream is at its limit, or by
			// somebody's hand.
			if again, err := stream.Info(ctx); err == nil && again.State.LastSeq != last {
				continue
			}
			return tail{}, fmt.Errorf("the last message of stream %s, sequence %d, was deleted, and with it the feed's position; "+
				"delete the stream to have a new one begin where the log does", info.Config.Name, last)
		}
		if err != nil {
			return tail{}, fmt.Errorf("read the stream's last message, sequence %d: %w", last, err)
		}
		group, at, err := parseMessageID(msg.Header.Get(jetstream.MsgIDHeader))
		if err == nil && group != p.cfg.Group {
			err = fmt.Errorf("it is of group %d, not %d", group, p.cfg.Group)
		}
		if err != nil {
			return tail{}, fmt.Errorf("the stream's last message, sequence %d on %s, is not the feed's: %w", last, msg.Subject, err)
		}
		var said struct{ Last bool }
		if err := json.Unmarshal(msg.Data, &said); err != nil {
			return tail{}, fmt.Errorf("the stream's last message, sequence %d on %s, is not the feed's: %w", last, msg.Subject, err)
		}
		t := tail{sequence: last, at: at, next: at.Slot}
		if said.Last {
			t.next++ // that slot is complete, and need not be in the log any more
		}
		return t, nil
	}
}

// expireEvery is how often messages past their age are looked for.
const expireEvery = time.Minute

// expire deletes messages past their age, but never the last one, which holds
// the position. JetStream's own maximal age would delete it too.
func (r *run) expire(ctx context.Context) error {
	if time.Since(r.expired) < min(expireEvery, r.cfg.MaxAge/4) {
		return nil
	}
	r.expired = time.Now()
	oldest := r.expired.Add(-r.cfg.MaxAge)
	ctx, cancel := r.call(ctx)
	defer cancel()
	info, err := r.stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("read the stream's state: %w", err)
	}
	if info.State.Msgs <= 1 || !info.State.FirstTime.Before(oldest) {
		return nil
	}
	// The first message that stays is in (low, high].
	low, high := info.State.FirstSeq, info.State.LastSeq
	for high-low > 1 {
		middle := low + (high-low)/2
		msg, err := r.stream.GetMsg(ctx, middle)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			low = middle // deleted meanwhile, by the limit of bytes, and so all before
		case err != nil:
			return fmt.Errorf("read the age of message %d: %w", middle, err)
		case msg.Time.Before(oldest):
			low = middle
		default:
			high = middle
		}
	}
	if err := r.stream.Purge(ctx, jetstream.WithPurgeSequence(high)); err != nil {
		return fmt.Errorf("delete messages before %d, older than %v: %w", high, r.cfg.MaxAge, err)
	}
	return nil
}
