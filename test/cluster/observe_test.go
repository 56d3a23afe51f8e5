package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"quorate/deploy/sandbox"
)

// TestTraceAndFeed: one transaction's trace is read back from a real Jaeger, and
// a table's changes from JetStream, across a change of leader.
func TestTraceAndFeed(t *testing.T) {
	c := Start(t, Options{Regions: 3, Feed: true, Jaeger: true})
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE t (id int PRIMARY KEY, v text)")

	t.Run("one trace of three regions", func(t *testing.T) {
		const traceID, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
		c.Exec(leader, "BEGIN; SELECT quorate.trace('00-"+traceID+"-"+parent+"-01'); INSERT INTO t VALUES (0, 'traced'); COMMIT")
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		query := c.Status(ctx).JaegerURL
		var trace jaegerTrace
		// Spans leave in batches, each region's by itself.
		Eventually(t, 30*time.Second, "a whole trace", func(ctx context.Context) (err error) {
			trace, err = fetchTrace(ctx, query, traceID)
			if err == nil && (len(trace.regions("apply")) < 2 || len(trace.regions("accept")) < 3 || len(trace.regions("commit")) < 1) {
				err = fmt.Errorf("there are %d spans", len(trace.Spans))
			}
			return err
		})
		byName := map[string][]jaegerSpan{}
		byID := map[string]jaegerSpan{}
		for _, s := range trace.Spans {
			byName[s.OperationName] = append(byName[s.OperationName], s)
			byID[s.SpanID] = s
		}
		for name, want := range map[string]int{"commit": 1, "capture": 1, "propose": 1, "chosen": 1, "release": 1, "accept": 3, "flush": 3, "apply": 2} {
			if len(byName[name]) != want {
				t.Errorf("%d spans %q, want %d", len(byName[name]), name, want)
			}
		}
		if t.Failed() {
			t.Fatalf("spans: %+v", trace.Spans)
		}
		root := byName["commit"][0]
		if root.parent() != parent {
			t.Errorf("the parent of commit is %q, not the client's %q", root.parent(), parent)
		}
		for name, spans := range byName {
			for _, s := range spans {
				switch {
				case name == "commit":
				case name == "flush":
					if p := byID[s.parent()]; p.OperationName != "accept" || trace.region(p) != trace.region(s) {
						t.Errorf("flush of %s hangs under %s of %s", trace.region(s), p.OperationName, trace.region(p))
					}
				case s.parent() != root.SpanID:
					t.Errorf("%s of %s does not hang under commit", name, trace.region(s))
				}
				// One machine, one clock: nothing begins before its commit did.
				if s.StartTime < root.StartTime || s.Duration < 0 || s.Duration > 30_000_000 {
					t.Errorf("%s of %s: begins %d µs after commit, lasts %d µs", name, trace.region(s), s.StartTime-root.StartTime, s.Duration)
				}
			}
		}
		if chosen := byName["chosen"][0]; chosen.StartTime+chosen.Duration > root.StartTime+root.Duration {
			t.Error("commit ended before it was chosen")
		}
	})

	t.Run("each committed row once in commit order", func(t *testing.T) {
		for i := 1; i <= 50; i++ {
			c.Exec(leader, fmt.Sprintf("INSERT INTO t SELECT n, 'x' FROM generate_series(%d, %d) n", 3*i-2, 3*i))
		}
		c.KillNow(leader, sandbox.Both)
		next := c.Leader(c.without(leader)...)
		for i := 51; i <= 60; i++ {
			c.Exec(next, fmt.Sprintf("INSERT INTO t SELECT n, 'x' FROM generate_series(%d, %d) n", 3*i-2, 3*i))
		}
		rolledBack := c.Connect(next)
		if _, err := rolledBack.Exec(context.Background(), "BEGIN; INSERT INTO t VALUES (1000, 'never'); ROLLBACK"); err != nil {
			t.Fatal(err)
		}
		nc, err := nats.Connect(c.Region(next).NATSURL)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		var slots []uint64
		Eventually(t, 60*time.Second, "181 changes in the stream", func(ctx context.Context) error {
			got, slots = nil, nil
			// A request made while JetStream elects its leader is never answered.
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			stream, err := js.Stream(ctx, "quorate_demo_main")
			if err != nil {
				return err
			}
			info, err := stream.Info(ctx)
			if err != nil {
				return err
			}
			for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
				m, err := stream.GetMsg(ctx, seq)
				if err != nil {
					return err
				}
				if m.Subject != "quorate.demo.main.public.t" {
					continue
				}
				var change struct {
					Slot uint64
					Op   string
					New  map[string]string
				}
				if err := json.Unmarshal(m.Data, &change); err != nil {
					return err
				}
				if change.Op != "insert" {
					return fmt.Errorf("message %d is %q", seq, change.Op)
				}
				got = append(got, change.New["id"])
				slots = append(slots, change.Slot)
			}
			if len(got) < 181 {
				return fmt.Errorf("there are %d", len(got))
			}
			return nil
		})
		for i := range got {
			if i >= 181 || got[i] != fmt.Sprint(i) {
				t.Fatalf("message %d is row %s; %d messages in all", i, got[i], len(got))
			}
		}
		if !slices.IsSorted(slots) {
			t.Errorf("slots are out of order: %v", slots)
		}
	})
}

type jaegerTrace struct {
	Spans     []jaegerSpan
	Processes map[string]struct {
		Tags []struct {
			Key   string
			Value any
		}
	}
}

type jaegerSpan struct {
	SpanID, ProcessID, OperationName string
	StartTime, Duration              int64 // microseconds
	References                       []struct{ RefType, SpanID string }
}

func (s jaegerSpan) parent() string {
	for _, r := range s.References {
		if r.RefType == "CHILD_OF" {
			return r.SpanID
		}
	}
	return ""
}

func (t jaegerTrace) region(s jaegerSpan) string {
	for _, tag := range t.Processes[s.ProcessID].Tags {
		if tag.Key == "quorate.region" {
			return fmt.Sprint(tag.Value)
		}
	}
	return ""
}

// regions returns the regions that have a span of that name.
func (t jaegerTrace) regions(name string) []string {
	var regions []string
	for _, s := range t.Spans {
		if s.OperationName == name && !slices.Contains(regions, t.region(s)) {
			regions = append(regions, t.region(s))
		}
	}
	return regions
}

func fetchTrace(ctx context.Context, query, id string) (jaegerTrace, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, query+"/api/traces/"+id, nil)
	if err != nil {
		return jaegerTrace{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return jaegerTrace{}, err
	}
	defer resp.Body.Close()
	var answer struct{ Data []jaegerTrace }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return jaegerTrace{}, err
	}
	if len(answer.Data) != 1 {
		return jaegerTrace{}, fmt.Errorf("%d traces of that id", len(answer.Data))
	}
	return answer.Data[0], nil
}
