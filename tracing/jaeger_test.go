package tracing

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"quorate/deploy/jaeger"
	"quorate/replication/entry"
)

// startJaeger runs a real Jaeger until the test ends. Without one the test fails,
// after an attempt to build it; `make test` has it built before.
func startJaeger(t *testing.T) (collector, query string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	binary, err := jaeger.Binary(ctx)
	if err != nil {
		t.Fatalf("no Jaeger to test with, see deploy/jaeger: %v", err)
	}
	addrs := make([]string, 7)
	held := make([]net.Listener, len(addrs)) // all until all are known, to be different
	for i := range addrs {
		if held[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		addrs[i] = held[i].Addr().String()
	}
	logPath := filepath.Join(t.TempDir(), "jaeger.log")
	out, err := os.Create(logPath)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(binary,
		"--collector.otlp.grpc.host-port="+addrs[0],
		"--query.http-server.host-port="+addrs[1],
		"--collector.otlp.http.host-port="+addrs[2],
		"--query.grpc-server.host-port="+addrs[3],
		"--admin.http.host-port="+addrs[4],
		"--collector.grpc-server.host-port="+addrs[5],
		"--collector.http-server.host-port="+addrs[6],
	)
	cmd.Env = append(os.Environ(), "SPAN_STORAGE_TYPE=memory")
	cmd.Stdout, cmd.Stderr = out, out
	for _, l := range held {
		l.Close()
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			text, _ := os.ReadFile(logPath)
			t.Logf("Jaeger's log:\n%s", text[max(0, len(text)-4000):])
		}
	})
	deadline := time.Now().Add(20 * time.Second)
	for {
		r, err := http.Get("http://" + addrs[1] + "/api/services")
		if err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return "http://" + addrs[0], "http://" + addrs[1]
			}
		}
		select {
		case <-ended:
			t.Fatal("Jaeger ended at once")
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("Jaeger does not answer: %v", err)
		}
	}
}

// jaegerSpan is a span as Jaeger's query API gives it.
type jaegerSpan struct {
	SpanID        string
	OperationName string
	References    []struct{ RefType, TraceID, SpanID string }
	StartTime     int64 // microseconds
	Duration      int64
	Tags          []struct {
		Key   string
		Value any
	}
	ProcessID string
}

func (s jaegerSpan) tag(key string) string {
	for _, t := range s.Tags {
		if t.Key == key {
			return fmt.Sprint(t.Value)
		}
	}
	return ""
}

type jaegerTrace struct {
	Spans     []jaegerSpan
	Processes map[string]struct {
		ServiceName string
		Tags        []struct {
			Key   string
			Value any
		}
	}
}

// fetch reads a trace once it has so many spans.
func fetch(t *testing.T, query string, id [16]byte, spans int) jaegerTrace {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		r, err := http.Get(query + "/api/traces/" + hex.EncodeToString(id[:]))
		if err != nil {
			t.Fatal(err)
		}
		var answer struct{ Data []jaegerTrace }
		err = json.NewDecoder(r.Body).Decode(&answer)
		r.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if len(answer.Data) == 1 && len(answer.Data[0].Spans) >= spans {
			return answer.Data[0]
		}
		if time.Now().After(deadline) {
			t.Fatalf("trace %x does not come to have %d spans: %+v", id, spans, answer.Data)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestJaeger has five regions, each with its own tracer, tell of one commit, and
// reads the tree back from a real Jaeger.
func TestJaeger(t *testing.T) {
	collector, query := startJaeger(t)
	regions := []string{"r1", "r2", "r3", "r4", "r5"}
	client := entry.Trace{TraceID: [16]byte{0xab, 15: 0xcd}, SpanID: [8]byte{0xef, 7: 1}, Flags: 1}
	commits := []Commit{
		{Incarnation: 0xa1, EndLSN: 0x1A2B3C8, Group: 1, Slot: 42, BallotCounter: 3, BallotReplica: 1},
		{Incarnation: 0xa1, EndLSN: 0x1A2B4D0, Group: 1, Slot: 43, BallotCounter: 3, BallotReplica: 1, Client: client},
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	t0 := time.Now().Truncate(time.Microsecond).Add(-time.Second)
	at := func(from, to int) Interval {
		return Interval{t0.Add(time.Duration(from) * time.Millisecond), t0.Add(time.Duration(to) * time.Millisecond)}
	}
	var traceIDs [2][16]byte
	// Followers first: no span needs to have been made before another.
	for i := len(regions) - 1; i >= 0; i-- {
		tr, err := New(ctx, Config{URL: collector, ClusterID: "c0ffee", Region: regions[i], SampleRatio: 1, BatchDelay: 10 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		for n, c := range commits {
			traceIDs[n] = tr.Context(c).TraceID
			tr.Span(c, Flush, at(12+i, 13+i), nil)
			tr.Span(c, Accept, at(10+i, 13+i), nil)
			if i > 0 {
				tr.Span(c, Apply, at(40+i, 50+i), nil)
				continue
			}
			tr.Span(c, Release, at(30, 31), nil)
			tr.Span(c, Chosen, at(9, 30), nil)
			tr.Span(c, Propose, at(5, 9), nil)
			tr.Span(c, Capture, at(0, 5), nil)
			tr.Span(c, Committed, at(0, 31), nil)
		}
		if err := tr.Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
		if st := tr.Stats(); st.Made != st.Exported || st.Made == 0 {
			t.Errorf("region %s: %+v after shutdown", regions[i], st)
		}
	}
	if traceIDs[1] != client.TraceID {
		t.Errorf("trace id %x is not the client's", traceIDs[1])
	}

	var want []string
	for _, stage := range []Stage{Committed, Capture, Propose, Chosen, Release} {
		want = append(want, stage.String()+" r1")
	}
	for i, region := range regions {
		want = append(want, "accept "+region, "flush "+region)
		if i > 0 {
			want = append(want, "apply "+region)
		}
	}
	slices.Sort(want)
	for n, c := range commits {
		trace := fetch(t, query, traceIDs[n], len(want))
		byName, byID := make(map[string]jaegerSpan), make(map[string]string)
		var got []string
		for _, s := range trace.Spans {
			process := trace.Processes[s.ProcessID]
			resource := make(map[string]any)
			for _, tag := range process.Tags {
				resource[tag.Key] = tag.Value
			}
			if process.ServiceName != "quorate" || resource["quorate.cluster"] != "c0ffee" || resource["quorate.region"] != s.tag("region") {
				t.Errorf("span %s of region %q comes from service %q, %v", s.OperationName, s.tag("region"), process.ServiceName, resource)
			}
			name := s.OperationName + " " + s.tag("region")
			got = append(got, name)
			byName[name], byID[s.SpanID] = s, name
			if s.tag("slot") != fmt.Sprint(c.Slot) || s.tag("group") != "1" || s.tag("ballot") != "3.1" ||
				s.tag("lsn") != c.EndLSN.String() || s.tag("incarnation") != "00000000000000a1" {
				t.Errorf("%s: attributes %v", name, s.Tags)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Fatalf("commit %d: spans\n%s\nwant\n%s", n, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		for name, s := range byName {
			var parent string
			for _, r := range s.References {
				if r.RefType == "CHILD_OF" {
					parent = r.SpanID
				}
			}
			wantParent := byName["commit r1"].SpanID
			switch {
			case name == "commit r1" && n == 0:
				wantParent = ""
			case name == "commit r1":
				wantParent = hex.EncodeToString(client.SpanID[:])
			case s.OperationName == "flush":
				wantParent = byName["accept "+s.tag("region")].SpanID
			}
			if parent != wantParent {
				t.Errorf("commit %d: parent of %s is %q (%s), want %q (%s)", n, name, parent, byID[parent], wantParent, byID[wantParent])
			}
		}
		if s := byName["apply r3"]; s.StartTime != at(42, 0).Start.UnixMicro() || s.Duration != 10_000 {
			t.Errorf("commit %d: apply in r3 starts at %d and takes %d µs, want %d and 10000", n, s.StartTime, s.Duration, at(42, 0).Start.UnixMicro())
		}
	}
}
