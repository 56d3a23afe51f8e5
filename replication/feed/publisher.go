package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Defaults of Config.
const (
	DefaultMaxAge          = 7 * 24 * time.Hour
	DefaultMaxBytes        = 1 << 30
	DefaultDuplicateWindow = 2 * time.Second
	DefaultPendingMax      = 512
	DefaultAckTimeout      = 5 * time.Second
)

// pendingBytesMax bounds the memory of messages that wait for their
// acknowledgement, beyond the first.
const pendingBytesMax = 16 << 20

// Config of a publisher.
type Config struct {
	Cluster   string // name of the cluster, in subjects
	ClusterID string // told apart from other clusters of that name
	Shard     string
	Group     uint32
	Source    Source

	// Either Server, the embedded one, or URL, one or more of an external
	// cluster, separated by commas.
	Server *Server
	URL    string

	Replicas int           // of the stream; see ReplicasFor. 0: 1
	MaxAge   time.Duration // of messages; but the last one is always kept. 0: DefaultMaxAge
	MaxBytes int64         // of the stream, in each replica; the oldest go first. 0: DefaultMaxBytes
	// DuplicateWindow is JetStream's; nothing relies on it. It is short because a
	// message whose first copy a stream's leader lost track of is refused for
	// as long. 0: DefaultDuplicateWindow
	DuplicateWindow time.Duration

	PendingMax int           // messages published and not acknowledged. 0: DefaultPendingMax
	AckTimeout time.Duration // after which a message counts as lost. 0: DefaultAckTimeout

	Logger *slog.Logger // nil: slog.Default()
}

// ReplicasFor is the number of replicas of a stream over the embedded servers
// of n regions.
func ReplicasFor(n int) int { return max(1, min(3, n)) }

func (c *Config) complete() error {
	var errs []error
	for _, f := range []struct{ name, value string }{
		{"cluster", c.Cluster}, {"cluster id", c.ClusterID}, {"shard", c.Shard},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s: missing", f.name))
		}
	}
	if c.Group == 0 {
		errs = append(errs, errors.New("group: missing"))
	}
	if c.Source == nil {
		errs = append(errs, errors.New("source: missing"))
	}
	if (c.Server == nil) == (c.URL == "") {
		errs = append(errs, errors.New("server, url: one of them, and only one"))
	}
	if c.Replicas == 0 {
		c.Replicas = 1
	}
	if c.MaxAge == 0 {
		c.MaxAge = DefaultMaxAge
	}
	if c.MaxBytes == 0 {
		c.MaxBytes = DefaultMaxBytes
	}
	if c.DuplicateWindow == 0 {
		c.DuplicateWindow = DefaultDuplicateWindow
	}
	if c.PendingMax == 0 {
		c.PendingMax = DefaultPendingMax
	}
	if c.AckTimeout == 0 {
		c.AckTimeout = DefaultAckTimeout
	}
	if c.Replicas < 1 || c.Replicas > 5 {
		errs = append(errs, fmt.Errorf("replicas: %d is not 1 to 5", c.Replicas))
	}
	if c.MaxAge < 0 || c.MaxBytes < 0 || c.DuplicateWindow < 0 || c.PendingMax < 0 || c.AckTimeout < 0 {
		errs = append(errs, errors.New("max age, max bytes, duplicate window, pending max, ack timeout: must not be negative"))
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return errors.Join(errs...)
}

// Status is how a publisher stands.
type Status struct {
	State     string // for people: "publishing", or what it waits for
	Running   bool
	Slot      uint64 // everything below is in the stream, or known to be nothing; 0 if not known
	Published uint64 // messages acknowledged since start; not those whose outcome a restart left open
	Refused   uint64 // times another publisher was found to have written
	Restarts  uint64 // times it went back to the stream's last message, for whatever reason
	Gaps      uint64 // stretches of the log that were cut before they were published
	Err       error  // of the last restart; nil once it publishes again
}

// Publisher publishes one shard's changes. At most one of a cluster should run
// at a time, that of the leader's region; several do no harm but work.
type Publisher struct {
	cfg      Config
	subjects subjects

	mu     sync.Mutex
	status Status // guarded by mu
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Publisher, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("feed: %w", err)
	}
	return &Publisher{
		cfg:      cfg,
		subjects: newSubjects(cfg.Cluster, cfg.Shard),
		status:   Status{State: "not started"},
	}, nil
}

// Status returns how the publisher stands. It may be called at any time.
func (p *Publisher) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

func (p *Publisher) update(f func(*Status)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.status)
}

// Waits between sessions.
const (
	retryMin = 50 * time.Millisecond
	retryMax = 5 * time.Second
)

// Run publishes until ctx ends, and then returns nil. Nothing that happens
// makes it give up; Status says what it waits for. It may be called again.
func (p *Publisher) Run(ctx context.Context) error {
	p.update(func(s *Status) { s.Running, s.State = true, "connecting" })
	defer p.update(func(s *Status) { s.Running, s.State, s.Slot = false, "stopped", 0 })
	wait := retryMin
	logged := ""
	for {
		published := p.Status().Published
		err := p.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if p.Status().Published != published {
			wait, logged = retryMin, ""
		}
		p.update(func(s *Status) {
			s.Restarts++
			s.State, s.Err = "waiting to try again: "+err.Error(), err
			if errors.Is(err, errRefused) {
				s.Refused++
			}
		})
		// The same trouble again is not news.
		if text := err.Error(); text != logged {
			logged = text
			p.cfg.Logger.Warn("feed goes back to the stream's last message", "shard", p.cfg.Shard, "group", p.cfg.Group, "err", err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		wait = min(2*wait, retryMax)
	}
}

// session is one connection, from reading the stream's last message to the
// first thing that goes wrong. Nothing of it outlives it: a message that was
// sent late, by a connection's buffer, could only be refused.
func (p *Publisher) session(ctx context.Context) error {
	nc, err := p.connect()
	if err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc,
		jetstream.WithPublishAsyncMaxPending(p.cfg.PendingMax+1), // the window below is the bound
		jetstream.WithPublishAsyncTimeout(p.cfg.AckTimeout))
	if err != nil {
		return fmt.Errorf("open JetStream: %w", err)
	}
	stream, err := p.openStream(ctx, js)
	if err != nil {
		return err
	}
	tail, err := p.readTail(ctx, stream)
	if err != nil {
		return err
	}
	p.update(func(s *Status) { s.State, s.Slot = "publishing", tail.next })
	r := &run{
		Publisher: p,
		stream:    stream,
		window:    window{js: js, last: tail.sequence, max: p.cfg.PendingMax},
		at:        tail.at,
		// Headers count too; ours are far below this.
		renderer: newRenderer(p.subjects, int(nc.MaxPayload())-4096),
	}
	err = r.publish(ctx, tail.next)
	acked := r.window.takeAcked()
	p.update(func(s *Status) { s.Published += acked })
	return err
}

func (p *Publisher) connect() (*nats.Conn, error) {
	options := []nats.Option{
		nats.Name("quorate feed " + p.cfg.Shard),
		nats.NoReconnect(),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			p.cfg.Logger.Debug("feed's connection", "shard", p.cfg.Shard, "err", err)
		}),
		nats.Timeout(p.cfg.AckTimeout),
		nats.PingInterval(p.cfg.AckTimeout),
		nats.MaxPingsOutstanding(2),
	}
	if p.cfg.Server != nil {
		return nats.Connect("", append(options, nats.InProcessServer(p.cfg.Server.server))...)
	}
	return nats.Connect(p.cfg.URL, options...)
}

// run is the publishing of one session.
type run struct {
	*Publisher
	stream   jetstream.Stream
	window   window
	renderer *renderer

	at      position // of the last message published
	expired time.Time
}

// publish goes through the log from slot next on.
func (r *run) publish(ctx context.Context, next uint64) error {
	for {
		batch, err := r.cfg.Source.Read(ctx, next)
		if cut, ok := errors.AsType[*CutError](err); ok {
			if next, err = r.reportGap(ctx, next, cut.Base); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("read the log from slot %d: %w", next, err)
		}
		if batch.Next <= next {
			panic(fmt.Sprintf("feed: a read from slot %d ended at %d", next, batch.Next))
		}
		// What a slot's messages are is a matter of the log alone. If the one
		// that the stream stands in has none, the stream is another log's.
		if r.at.Ordinal > 0 && next == r.at.Slot && (len(batch.Items) == 0 || batch.Items[0].Slot != next) {
			return fmt.Errorf("the stream ends with message %s, but slot %d holds no transaction: the stream is not of this log",
				r.at.messageID(r.cfg.Group), next)
		}
		item, err := r.items(ctx, batch.Items)
		if cut, ok := errors.AsType[*CutError](err); ok {
			// The commit is there, its fragments are not.
			if next, err = r.reportGap(ctx, item.Slot, max(cut.Base, item.Slot)); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		if err := r.marks(ctx, batch.Next); err != nil {
			return err
		}
		// Before a wait for more of the log, and before the batch's memory goes.
		if err := r.settle(ctx, batch.Next); err != nil {
			return err
		}
		next = batch.Next
		if err := r.expire(ctx); err != nil {
			return err
		}
	}
}

// settle waits until all that was published is acknowledged.
func (r *run) settle(ctx context.Context, next uint64) error {
	err := r.window.drain(ctx)
	acked := r.window.takeAcked()
	r.update(func(s *Status) {
		s.Published += acked
		if err == nil {
			s.Slot, s.Err = next, nil
		}
	})
	return err
}

// items publishes items; with an error it returns the one it happened at.
func (r *run) items(ctx context.Context, items []Item) (*Item, error) {
	for i := range items {
		if err := r.item(ctx, &items[i]); err != nil {
			return &items[i], err
		}
	}
	return nil, nil
}

func (r *run) item(ctx context.Context, item *Item) error {
	if err := r.marks(ctx, item.Slot); err != nil {
		return err
	}
	var skip uint64
	if item.Slot == r.at.Slot {
		skip = r.at.Ordinal
	}
	var seen uint64
	err := r.renderer.render(item, func(m message) error {
		seen = m.at.Ordinal
		if seen <= skip {
			return nil
		}
		return r.send(ctx, m)
	})
	if err == nil && seen < skip {
		return fmt.Errorf("the stream holds message %d of slot %d, which has only %d: the stream is not of this log", skip, item.Slot, seen)
	}
	return err
}

// marks publishes the position messages that are due up to slot.
func (r *run) marks(ctx context.Context, slot uint64) error {
	for m := nextMark(r.at.Slot); m <= slot; m = nextMark(r.at.Slot) {
		if err := r.send(ctx, positionMessage(r.subjects, m)); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) reportGap(ctx context.Context, from, base uint64) (next uint64, err error) {
	if base < from {
		return 0, fmt.Errorf("read the log from slot %d: said to be cut up to %d", from, base)
	}
	if err := r.send(ctx, gapMessage(r.subjects, from, base)); err != nil {
		return 0, err
	}
	if err := r.settle(ctx, base+1); err != nil {
		return 0, err
	}
	r.update(func(s *Status) { s.Gaps++ })
	r.cfg.Logger.Error("the log was cut before the feed had published it: consumers were told of a gap and must load anew",
		"shard", r.cfg.Shard, "group", r.cfg.Group, "from", from, "to", base)
	return base + 1, nil
}

func (r *run) send(ctx context.Context, m message) error {
	if m.at.Slot < r.at.Slot || m.at.Slot == r.at.Slot && m.at.Ordinal <= r.at.Ordinal && r.at != (position{}) {
		panic(fmt.Sprintf("feed: message %v after %v", m.at, r.at))
	}
	if err := r.window.publish(ctx, r.cfg.Group, m); err != nil {
		return err
	}
	r.at = m.at
	return nil
}
