package cluster

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Appender is a workload whose every transaction can be told apart: clients
// append rows (client, number) to table appended and remember which commits were
// acknowledged. A client follows the leader, as an application would, by trying
// the regions in turn.
//
// A row's place gives the order in which the leader committed: each transaction
// also takes the next place from a counter row of its client, so that a lost,
// doubled or reordered transaction shows.
type Appender struct {
	c       *Cluster
	stop    context.CancelFunc
	wait    sync.WaitGroup
	mu      sync.Mutex
	acked   map[int][]int // by client: numbers acknowledged, ascending
	tried   map[int]int   // by client: highest number tried
	lastAck time.Time
	gap     time.Duration // longest time between two acknowledgements of anybody
}

// AppenderSchema makes the tables.
func AppenderSchema(c *Cluster, leader string) {
	c.Exec(leader, `CREATE TABLE appended (client int, number int, at timestamptz DEFAULT clock_timestamp(), PRIMARY KEY (client, number))`,
		`CREATE TABLE clients (client int PRIMARY KEY, last int NOT NULL, appended int NOT NULL)`,
		`INSERT INTO clients SELECT n, 0, 0 FROM generate_series(0, 63) n`)
}

// StartAppender runs clients until Stop.
func StartAppender(c *Cluster, clients int) *Appender {
	ctx, cancel := context.WithCancel(context.Background())
	a := &Appender{c: c, stop: cancel, acked: map[int][]int{}, tried: map[int]int{}, lastAck: time.Now()}
	for id := range clients {
		a.wait.Go(func() { a.client(ctx, id) })
	}
	return a
}

func (a *Appender) client(ctx context.Context, id int) {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			conn.Close(context.Background())
		}
	}()
	region := id
	number := 0
	for ctx.Err() == nil {
		if conn == nil || conn.IsClosed() {
			region++
			dialCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
			var err error
			conn, err = pgx.Connect(dialCtx, a.c.DSN(a.c.Names[region%len(a.c.Names)]))
			cancel()
			if err != nil {
				conn = nil
				sleep(ctx, 20*time.Millisecond)
				continue
			}
		}
		number++
		a.mu.Lock()
		a.tried[id] = number
		a.mu.Unlock()
		// A COMMIT may wait for as long as there is no quorum; the client gives up
		// after a while and does not know how it ended.
		opCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := a.append(opCtx, conn, id, number)
		cancel()
		if err != nil {
			conn.Close(context.Background())
			conn = nil
			sleep(ctx, 10*time.Millisecond)
			continue
		}
		a.mu.Lock()
		a.acked[id] = append(a.acked[id], number)
		now := time.Now()
		a.gap = max(a.gap, now.Sub(a.lastAck))
		a.lastAck = now
		a.mu.Unlock()
	}
}

func (a *Appender) append(ctx context.Context, conn *pgx.Conn, id, number int) error {
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "INSERT INTO appended (client, number) VALUES ($1, $2)", id, number); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE clients SET last = $2, appended = appended + 1 WHERE client = $1 AND last < $2", id, number)
		return err
	})
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Acked returns how many commits were acknowledged so far.
func (a *Appender) Acked() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, numbers := range a.acked {
		n += len(numbers)
	}
	return n
}

// AwaitProgress waits until so many more commits were acknowledged.
func (a *Appender) AwaitProgress(t testing.TB, more int, within time.Duration) {
	t.Helper()
	before := a.Acked()
	Eventually(t, within, fmt.Sprintf("%d more commits", more), func(context.Context) error {
		if n := a.Acked() - before; n < more {
			return fmt.Errorf("%d were acknowledged", n)
		}
		return nil
	})
}

// Gap returns the longest time in which nobody's commit was acknowledged.
func (a *Appender) Gap() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.gap
}

// Stop ends the clients.
func (a *Appender) Stop() {
	a.stop()
	a.wait.Wait()
}

// Check fails the test unless every region given holds each acknowledged commit
// exactly once, nothing that was never tried, and whole transactions only.
func (a *Appender) Check(t testing.TB, regions ...string) {
	t.Helper()
	if len(regions) == 0 {
		regions = a.c.Names
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	total := 0
	for _, region := range regions {
		conn := a.c.Connect(region)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		have := map[int]map[int]bool{}
		rows, err := conn.Query(ctx, "SELECT client, number FROM appended")
		if err != nil {
			t.Fatal(err)
		}
		var client, number int
		_, err = pgx.ForEachRow(rows, []any{&client, &number}, func() error {
			if have[client] == nil {
				have[client] = map[int]bool{}
			}
			if have[client][number] { // the primary key forbids it, were it enforced
				t.Errorf("%s holds (%d, %d) twice", region, client, number)
			}
			have[client][number] = true
			if number > a.tried[client] {
				t.Errorf("%s holds (%d, %d), which nobody wrote", region, client, number)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		total = 0
		for client, numbers := range a.acked {
			total += len(numbers)
			for _, n := range numbers {
				if !have[client][n] {
					t.Errorf("%s lost the acknowledged commit (%d, %d)", region, client, n)
				}
			}
		}
		var torn int
		err = conn.QueryRow(ctx, `SELECT count(*) FROM clients c WHERE appended <> (SELECT count(*) FROM appended a WHERE a.client = c.client)
			OR last <> (SELECT coalesce(max(number), 0) FROM appended a WHERE a.client = c.client)`).Scan(&torn)
		if err != nil {
			t.Fatal(err)
		}
		if torn != 0 {
			t.Errorf("%s: %d clients' counters do not agree with their rows: a transaction was doubled, torn or reordered", region, torn)
		}
		cancel()
		conn.Close(context.Background())
	}
	if total == 0 {
		t.Error("nothing was acknowledged: the test has shown nothing")
	}
	t.Logf("%d acknowledged commits are in %v; longest pause %v", total, regions, a.gap.Round(time.Millisecond))
}
