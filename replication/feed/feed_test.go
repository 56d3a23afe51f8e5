package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"quorate/replication/entry"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func startServer(t *testing.T) *Server {
	t.Helper()
	s, err := StartServer(ServerConfig{ListenAddr: "127.0.0.1:0", StoreDir: t.TempDir(), ServerName: "n1", Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func configOf(s *Server, l *log) Config {
	return Config{
		Cluster: "test", ClusterID: "c0ffee", Shard: "main", Group: 7,
		Source: l, Server: s, AckTimeout: time.Second, Logger: quiet(),
	}
}

// start runs a publisher until stop is called, or the test ends.
func start(t *testing.T, cfg Config) (p *Publisher, stop func()) {
	t.Helper()
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("publisher ended with %v", err)
		}
	}
	t.Cleanup(stop)
	return p, stop
}

// waitFor waits until the publisher has everything below slot in the stream.
func waitFor(t *testing.T, p *Publisher, slot uint64) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for p.Status().Slot < slot {
		if time.Now().After(deadline) {
			t.Fatalf("publisher does not reach slot %d: %+v", slot, p.Status())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// published is a message as a consumer sees it.
type published struct {
	Subject     string `json:"-"`
	ID          string `json:"-"`
	Traceparent string `json:"-"`

	Slot, Ordinal uint64
	Last          bool
	Transaction   struct {
		XID         uint64
		CommitTime  time.Time `json:"commit_time"`
		LSN         string
		Region      string
		Incarnation string
	}
	Trace     string
	Op        string
	Schema    string
	Table     string
	Tables    []struct{ Schema, Table string }
	Key       map[string]*string
	Old       map[string]*string
	New       map[string]*string
	Unchanged []string
	Omitted   map[string]int
	DDL       json.RawMessage
	From, To  uint64
}

func streamOf(t *testing.T, url string) jetstream.Stream {
	t.Helper()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		stream, err := js.Stream(ctx, StreamName("test", "main"))
		cancel()
		if err == nil {
			return stream
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// readAll reads the whole stream with an ordinary consumer.
func readAll(t *testing.T, url string) []published {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream := streamOf(t, url)
	info, err := stream.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n := int(info.State.Msgs)
	if n == 0 {
		return nil
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		t.Fatal(err)
	}
	defer messages.Stop()
	all := make([]published, n)
	for i := range all {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			t.Fatalf("message %d of %d: %v", i+1, n, err)
		}
		if err := json.Unmarshal(msg.Data(), &all[i]); err != nil {
			t.Fatalf("%s: %v", msg.Data(), err)
		}
		all[i].Subject, all[i].ID = msg.Subject(), msg.Headers().Get(jetstream.MsgIDHeader)
		all[i].Traceparent = msg.Headers().Get("traceparent")
	}
	return all
}

// values are column "id" of all inserts, in stream order.
func values(all []published) []string {
	var v []string
	for _, m := range all {
		if m.Op == "insert" {
			v = append(v, *m.New["id"])
		}
	}
	return v
}

func ids(all []published) []string {
	var v []string
	for _, m := range all {
		v = append(v, m.ID)
	}
	return v
}

// wantCount fails unless v is 1, 2, …, n: each once, in order.
func wantCount(t *testing.T, v []string, n int) {
	t.Helper()
	if len(v) != n {
		t.Errorf("%d rows in the stream, want %d", len(v), n)
	}
	for i := range v {
		if v[i] != fmt.Sprint(i+1) {
			t.Fatalf("row %d in the stream is %s: %v…", i+1, v[i], v[max(0, i-3):min(len(v), i+4)])
		}
	}
}

// counter makes transactions that insert 1, 2, 3, … into table t.
type counter struct {
	db *database
	n  int
}

func (c *counter) transactions(t *testing.T, n, rows int) []entry.Payload {
	t.Helper()
	var statements []string
	for range n {
		statements = append(statements, fmt.Sprintf("INSERT INTO t SELECT generate_series(%d, %d)", c.n+1, c.n+rows))
		c.n += rows
	}
	return c.db.exec(t, statements...)
}

// TestFeed has its scenarios share one PostgreSQL server; each has a log and a
// NATS server of its own.
func TestFeed(t *testing.T) {
	db := openDatabase(t)
	fresh := func(t *testing.T) *counter {
		t.Helper()
		db.exec(t, "DROP TABLE IF EXISTS t", "CREATE TABLE t (id int PRIMARY KEY)")
		return &counter{db: db}
	}

	t.Run("three_rows_one_slot_feed", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 1, 3)...)
		p, _ := start(t, configOf(s, l))
		waitFor(t, p, 2)
		all := readAll(t, s.URL())
		wantCount(t, values(all), 3)
		if got, want := ids(all), []string{"7/1/1", "7/1/2", "7/1/3"}; !slices.Equal(got, want) {
			t.Errorf("message ids %v, want %v", got, want)
		}
		for i, m := range all {
			if m.Last != (i == 2) {
				t.Errorf("message %d says last: %v", i+1, m.Last)
			}
		}
	})

	t.Run("changes", func(t *testing.T) { testChanges(t, db) })

	t.Run("restart resumes within a transaction", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 40, 100)...)
		cfg := configOf(s, l)
		cfg.PendingMax = 8
		cut := 0
		for range 12 {
			p, stop := start(t, cfg)
			for p.Status().State != "publishing" {
				time.Sleep(100 * time.Microsecond)
			}
			time.Sleep(2 * time.Millisecond)
			stop()
			if all := readAll(t, s.URL()); len(all) > 0 && !all[len(all)-1].Last {
				cut++
			}
		}
		if cut == 0 {
			t.Error("no stop fell within a transaction: the test tests nothing")
		}
		p, _ := start(t, cfg)
		waitFor(t, p, 41)
		wantCount(t, values(readAll(t, s.URL())), 4000)
	})

	t.Run("restart beyond the duplicate window", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 3, 2)...)
		cfg := configOf(s, l)
		cfg.DuplicateWindow = 100 * time.Millisecond // the least JetStream takes
		p, stop := start(t, cfg)
		waitFor(t, p, 4)
		stop()
		time.Sleep(3 * cfg.DuplicateWindow)
		l.add(rows.transactions(t, 1, 2)...)
		p, _ = start(t, cfg)
		waitFor(t, p, 5)
		wantCount(t, values(readAll(t, s.URL())), 8)
	})

	t.Run("deposed publisher is refused", func(t *testing.T) {
		rows, s := fresh(t), startServer(t)
		old, new := newLog(), newLog()
		first := rows.transactions(t, 1, 3)
		old.add(first...)
		new.add(first...)
		cfg := configOf(s, old)
		cfg.DuplicateWindow = 100 * time.Millisecond
		deposed, _ := start(t, cfg)
		waitFor(t, deposed, 2)
		// It hangs, while its successor publishes what it has not seen yet.
		gate := make(chan struct{})
		old.change(func() { old.gate = gate })
		second := rows.transactions(t, 5, 3)
		new.add(second...)
		cfg.Source = new
		successor, _ := start(t, cfg)
		waitFor(t, successor, 7)
		time.Sleep(3 * cfg.DuplicateWindow) // nothing but the sequence stands in its way now
		old.add(second...)
		old.change(func() { old.gate = nil })
		close(gate)
		waitFor(t, deposed, 7)
		if st := deposed.Status(); st.Refused == 0 || st.Published != 3 {
			t.Errorf("the deposed publisher was not refused: %+v", st)
		}
		wantCount(t, values(readAll(t, s.URL())), 18)
		if st := successor.Status(); st.Refused != 0 {
			t.Errorf("the successor was refused: %+v", st)
		}
	})

	t.Run("two publishers at once", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.max = 3
		cfg := configOf(s, l)
		cfg.DuplicateWindow = 100 * time.Millisecond
		a, _ := start(t, cfg)
		b, _ := start(t, cfg)
		for range 20 {
			l.add(rows.transactions(t, 5, 10)...)
		}
		waitFor(t, a, 101)
		waitFor(t, b, 101)
		wantCount(t, values(readAll(t, s.URL())), 1000)
		if a.Status().Refused+b.Status().Refused == 0 {
			t.Error("neither publisher was ever refused: the test tests nothing")
		}
	})

	t.Run("large transaction", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		const n = 30_000
		l.fragmented(rows.transactions(t, 1, n)[0], 10_007) // cuts fall within messages
		l.add(rows.transactions(t, 1, 1)...)
		p, _ := start(t, configOf(s, l))
		l.mu.Lock()
		next := l.next
		l.mu.Unlock()
		waitFor(t, p, next)
		all := readAll(t, s.URL())
		wantCount(t, values(all), n+1)
		if all[n-2].Last || !all[n-1].Last || all[n-1].Ordinal != n {
			t.Errorf("the transaction ends with %+v, %+v", all[n-2], all[n-1])
		}
	})

	t.Run("gap", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 2, 1)...)
		p, stop := start(t, configOf(s, l))
		waitFor(t, p, 3)
		stop()
		l.add(rows.transactions(t, 3, 1)...)

		// A cut up to where the feed is takes nothing away.
		l.cut(2)
		p, stop = start(t, configOf(s, l))
		waitFor(t, p, 6)
		wantCount(t, values(readAll(t, s.URL())), 5)
		stop()

		l.add(rows.transactions(t, 4, 1)...)
		l.cut(8)
		p, stop = start(t, configOf(s, l))
		waitFor(t, p, 10)
		stop()
		all := readAll(t, s.URL())
		if gap := all[5]; gap.Op != "gap" || gap.From != 6 || gap.To != 8 || gap.ID != "7/9/0" || gap.Subject != "quorate.test.main.gap" {
			t.Errorf("gap message %+v", gap)
		}
		if got := values(all[6:]); !slices.Equal(got, []string{"9"}) {
			t.Errorf("after the gap: %v", got)
		}
		if st := p.Status(); st.Gaps != 1 {
			t.Errorf("%d gaps counted", st.Gaps)
		}
	})

	t.Run("fragments cut from the log", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.fragmented(rows.transactions(t, 1, 100)[0], 500)
		l.add(rows.transactions(t, 1, 1)...)
		l.change(func() {
			whole, cut := l.items[0].Fragments, &CutError{Base: 3}
			l.items[0].Fragments = func(yield func([]byte) error) error {
				n := 0
				return errors.Join(whole(func(piece []byte) error {
					if n++; n == 3 {
						return cut
					}
					return yield(piece)
				}))
			}
		})
		p, _ := start(t, configOf(s, l))
		waitFor(t, p, l.items[1].Slot+1)
		all := readAll(t, s.URL())
		gap, after := all[len(all)-2], all[len(all)-1]
		if slot := l.items[0].Slot; gap.Op != "gap" || gap.From != slot || gap.To != slot {
			t.Errorf("gap message %+v, want one of slot %d", gap, slot)
		}
		if after.Op != "insert" || *after.New["id"] != "101" {
			t.Errorf("after the gap: %+v", after)
		}
	})

	t.Run("external server that restarts", func(t *testing.T) {
		rows, l, dir := fresh(t), newLog(), t.TempDir()
		launch := func(addr string) *Server {
			s, err := StartServer(ServerConfig{ListenAddr: addr, StoreDir: dir, ServerName: "external", Logger: quiet()})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		s := launch("127.0.0.1:0")
		defer func() { s.Close() }()
		cfg := configOf(s, l)
		cfg.Server, cfg.URL = nil, s.URL()
		l.add(rows.transactions(t, 3, 1)...)
		p, _ := start(t, cfg)
		waitFor(t, p, 4)
		s.Close()
		l.add(rows.transactions(t, 3, 1)...)
		wantState(t, p, "connect to NATS")
		s = launch(strings.TrimPrefix(cfg.URL, "nats://"))
		waitFor(t, p, 7)
		wantCount(t, values(readAll(t, cfg.URL)), 6)
	})

	t.Run("positions in a quiet shard", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 1, 1)...)
		l.void(1300)
		p, stop := start(t, configOf(s, l))
		waitFor(t, p, 1302)
		stop()
		if got, want := ids(readAll(t, s.URL())), []string{"7/1/1", "7/512/0", "7/1024/0"}; !slices.Equal(got, want) {
			t.Errorf("message ids %v, want %v", got, want)
		}
		l.cut(1023)
		l.add(rows.transactions(t, 1, 1)...)
		p, _ = start(t, configOf(s, l))
		waitFor(t, p, 1303)
		wantCount(t, values(readAll(t, s.URL())), 2)
		if st := p.Status(); st.Gaps != 0 {
			t.Errorf("a gap was reported where nothing was: %+v", st)
		}
	})

	t.Run("age spares the last message", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		cfg := configOf(s, l)
		cfg.MaxAge = 400 * time.Millisecond
		l.add(rows.transactions(t, 5, 4)...)
		p, stop := start(t, cfg)
		waitFor(t, p, 6)
		stop()
		time.Sleep(2 * cfg.MaxAge)
		if n := len(readAll(t, s.URL())); n != 20 {
			t.Fatalf("%d messages before the purge", n)
		}
		l.void(1)
		p, stop = start(t, cfg)
		waitFor(t, p, 7)
		deadline := time.Now().Add(5 * time.Second)
		for len(readAll(t, s.URL())) > 1 {
			if time.Now().After(deadline) {
				t.Fatal("old messages are not purged")
			}
			l.void(1)
			time.Sleep(20 * time.Millisecond)
		}
		stop()
		if got := values(readAll(t, s.URL())); !slices.Equal(got, []string{"20"}) {
			t.Fatalf("left in the stream: %v", got)
		}
		l.add(rows.transactions(t, 1, 1)...)
		cfg.MaxAge = time.Hour
		p, _ = start(t, cfg)
		l.mu.Lock()
		next := l.next
		l.mu.Unlock()
		waitFor(t, p, next)
		if got := values(readAll(t, s.URL())); !slices.Equal(got, []string{"20", "21"}) {
			t.Errorf("after the pause: %v", got)
		}
	})

	t.Run("a stream that is not ours", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 1, 1)...)
		p, stop := start(t, configOf(s, l))
		waitFor(t, p, 2)
		stop()
		cfg := configOf(s, l)
		cfg.ClusterID = "decaf"
		p, _ = start(t, cfg)
		wantState(t, p, `belongs to cluster id "c0ffee"`)
	})

	t.Run("the last message deleted by hand", func(t *testing.T) {
		rows, l, s := fresh(t), newLog(), startServer(t)
		l.add(rows.transactions(t, 2, 1)...)
		p, stop := start(t, configOf(s, l))
		waitFor(t, p, 3)
		stop()
		if err := streamOf(t, s.URL()).Purge(context.Background()); err != nil {
			t.Fatal(err)
		}
		p, _ = start(t, configOf(s, l))
		wantState(t, p, "delete the stream")
		if n := len(readAll(t, s.URL())); n != 0 {
			t.Errorf("%d messages published without knowing the position", n)
		}
	})

	t.Run("cluster", func(t *testing.T) { testCluster(t, fresh(t)) })
}

func wantState(t *testing.T, p *Publisher, text string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for !strings.Contains(p.Status().State, text) {
		if time.Now().After(deadline) {
			t.Fatalf("state %q does not say %q", p.Status().State, text)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// testCluster has three servers hold the stream, and loses one after the other.
func testCluster(t *testing.T, rows *counter) {
	const n = 3
	dir := t.TempDir()
	addrs := make([]string, n)
	for i := range addrs {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addrs[i] = l.Addr().String()
		l.Close()
	}
	servers := make([]*Server, n)
	launch := func(i int) {
		t.Helper()
		s, err := StartServer(ServerConfig{
			ListenAddr: "127.0.0.1:0", StoreDir: filepath.Join(dir, fmt.Sprint(i)), ServerName: fmt.Sprintf("r%d", i+1),
			ClusterName: "test", ClusterListen: addrs[i],
			Routes: slices.Concat(addrs[:i], addrs[i+1:]),
			Logger: quiet(),
		})
		if err != nil {
			t.Fatal(err)
		}
		servers[i] = s
	}
	t.Cleanup(func() {
		for _, s := range servers {
			if s != nil {
				s.Close()
			}
		}
	})
	l := newLog()
	config := func(s *Server) Config {
		cfg := configOf(s, l)
		cfg.Replicas = ReplicasFor(5)
		return cfg
	}
	launch(0)
	// Alone, it says what it waits for.
	if state := servers[0].State(); state != "JetStream waits for a leader: 0 of 2 routes are up" {
		t.Errorf("state of a lone server: %q", state)
	}
	l.add(rows.transactions(t, 10, 5)...)
	p, stop := start(t, config(servers[0])) // started too early
	launch(1)
	launch(2)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, s := range servers {
		if err := s.Ready(ctx); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, p, 11)
	stream := streamOf(t, servers[0].URL())
	info, err := stream.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if info.Config.Replicas != 3 {
		t.Fatalf("stream with %d replicas", info.Config.Replicas)
	}

	// The publisher's region changes, and the stream's leader dies under it.
	stop()
	leader := slices.IndexFunc(servers, func(s *Server) bool { return s.server.Name() == info.Cluster.Leader })
	if leader < 0 {
		t.Fatalf("no server is the stream's leader %q", info.Cluster.Leader)
	}
	survivor := (leader + 1) % n
	l.max = 2
	p, stop = start(t, config(servers[survivor]))
	l.add(rows.transactions(t, 200, 5)...)
	waitFor(t, p, 60)
	servers[leader].Close()
	servers[leader] = nil
	l.add(rows.transactions(t, 50, 5)...)
	waitFor(t, p, 261)
	stop()
	wantCount(t, values(readAll(t, servers[survivor].URL())), 1300)

	// It returns and the publisher's own server goes.
	launch(leader)
	if err := servers[leader].Ready(ctx); err != nil {
		t.Fatal(err)
	}
	servers[survivor].Close()
	servers[survivor] = nil
	l.add(rows.transactions(t, 20, 5)...)
	p, _ = start(t, config(servers[leader]))
	waitFor(t, p, 281)
	wantCount(t, values(readAll(t, servers[leader].URL())), 1400)
}
