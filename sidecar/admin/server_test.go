package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"quorate/paxosgroup"
	"quorate/sidecar/admin"
	"quorate/sidecar/admin/adminpb"
	"quorate/sidecar/admin/admintest"
)

func connect(t *testing.T, r *admintest.Region) adminpb.AdminClient {
	t.Helper()
	conn, err := grpc.NewClient(r.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return adminpb.NewAdminClient(conn)
}

func get(t *testing.T, r *admintest.Region, path string) (int, string) {
	t.Helper()
	response, err := http.Get("http://" + r.Address + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

func TestPages(t *testing.T) {
	c := admintest.Start(t, "r1", "r2")
	c.Append(admin.LogEntry{Kind: "opening"}, admin.LogEntry{Kind: "transaction"})
	c.Change("r2", func(s *admin.RegionStatus) { s.CaughtUp, s.Applied = false, 1 })
	for _, tc := range []struct {
		region, path string
		code         int
		body         string
	}{
		{"r1", "/leader", 200, "r1\n"},
		{"r2", "/leader", 503, "r1\n"},
		{"r1", "/readyz", 200, "leading, applied 2 of 2 chosen: ok\n"},
		{"r2", "/readyz", 503, "following, applied 1 of 2 chosen: ok\n"},
		{"r2", "/healthz", 200, "ok\n"},
		{"r2", "/nothing", 404, "404 page not found\n"},
	} {
		if code, body := get(t, c.Region(tc.region), tc.path); code != tc.code || body != tc.body {
			t.Errorf("%s %s: got %d %q, want %d %q", tc.region, tc.path, code, body, tc.code, tc.body)
		}
	}
	if code, body := get(t, c.Region("r2"), "/metrics"); code != 200 || !strings.Contains(body, "\nadmintest_replica_id 2\n") {
		t.Errorf("metrics: got %d %q", code, body)
	}
	code, body := get(t, c.Region("r1"), "/status")
	var got map[string]any
	if err := json.Unmarshal([]byte(body), &got); code != 200 || err != nil {
		t.Fatalf("status: got %d %q (%v)", code, body, err)
	}
	want := map[string]any{
		"cluster": "demo", "region": "r1", "role": "leader", "leader": "r1", "writable": true, "state": "leading",
		"healthy": true, "health": "ok", "caught_up": true, "ballot": "1.1", "replica_id": 1.0, "incarnation": "0000000000000abc",
		"lease_left_ms": 1200.0, "chosen": 2.0, "applied": 2.0, "lag_slots": 0.0, "lag_seconds": 0.0,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("status: got  %v\nwant %v", got, want)
	}
}

func TestStatusOfAllAndOfOne(t *testing.T) {
	c := admintest.Start(t, "r1", "r2", "r3")
	c.Change("r3", func(s *admin.RegionStatus) { s.Reachable, s.Lag, s.Void = false, 1500*time.Millisecond, 4 })
	client := connect(t, c.Region("r2"))
	one, err := client.Status(t.Context(), &adminpb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(one.GetRegions()) != 1 || one.GetRegion() != "r2" || one.GetLeader() != "r1" || one.GetDurabilityRegions() != 1 {
		t.Errorf("of one: %v", one)
	}
	all, err := client.Status(t.Context(), &adminpb.StatusRequest{All: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(all.GetRegions()) != 3 {
		t.Fatalf("of all: %v", all)
	}
	if r := all.GetRegions()[2]; r.GetReachable() || r.GetLagSeconds() != 1.5 || r.GetVoidEntries() != 4 || r.GetIncarnation() != 0xabc {
		t.Errorf("r3: %v", r)
	}
	if r := all.GetRegions()[0]; !r.GetWritable() || r.GetRole() != admin.RoleLeader || r.GetLeaseLeftMs() != 1200 {
		t.Errorf("r1: %v", r)
	}
	version, err := client.Version(t.Context(), &adminpb.VersionRequest{})
	if err != nil || version.GetVersion() != "v1.2.3" || version.GetPostgres() != "15.18" {
		t.Errorf("version: %v, %v", version, err)
	}
}

func TestTransferMeasuresThePause(t *testing.T) {
	c := admintest.Start(t, "r1", "r2")
	c.TransferPause = 120 * time.Millisecond
	client := connect(t, c.Region("r1"))
	begun := time.Now()
	r, err := client.Transfer(t.Context(), &adminpb.TransferRequest{To: "r2"})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(begun)
	pause := time.Duration(r.GetPauseMs() * float64(time.Millisecond))
	// The polling sees the closing a little late: up to its interval and what
	// the scheduler adds on a busy machine.
	if !r.GetPauseMeasured() || pause < c.TransferPause/2 || pause > took {
		t.Errorf("pause of %v measured (%v) as %v, in a call of %v", c.TransferPause, r.GetPauseMeasured(), pause, took)
	}
	if r.GetFrom() != "r1" {
		t.Errorf("from %q", r.GetFrom())
	}
	leader, err := client.Leader(t.Context(), &adminpb.LeaderRequest{})
	if err != nil || leader.GetRegion() != "r2" || leader.GetWritable() {
		t.Errorf("afterwards r1 says %v, %v", leader, err)
	}
	// Handing over to whoever leads already changes nothing.
	if r, err := client.Transfer(t.Context(), &adminpb.TransferRequest{To: "r2"}); err != nil || r.GetPauseMeasured() || r.GetFrom() != "r2" {
		t.Errorf("again: %v, %v", r, err)
	}
}

func TestErrorsKeepTheirMeaning(t *testing.T) {
	c := admintest.Start(t, "r1", "r2")
	c.Append(admin.LogEntry{}, admin.LogEntry{}, admin.LogEntry{})
	c.Compact(2)
	transfer := func(region, to string) error {
		_, err := connect(t, c.Region(region)).Transfer(t.Context(), &adminpb.TransferRequest{To: to})
		return err
	}
	expect := func(what string, err error, want codes.Code) {
		t.Helper()
		if status.Code(err) != want {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	}
	expect("unknown region", transfer("r1", "r7"), codes.InvalidArgument)
	_, err := readAll(t, c.Region("r1"), &adminpb.LogReadRequest{From: 2})
	expect("cut from the log", err, codes.OutOfRange)
	c.Stop("r1")
	expect("no leader", transfer("r2", "r2"), codes.NotFound)
	_, err = connect(t, c.Region("r2")).Leader(t.Context(), &adminpb.LeaderRequest{})
	expect("no leader", err, codes.NotFound)
}

func TestTransferAskedOfAFollower(t *testing.T) {
	c := admintest.Start(t, "r1", "r2", "r3")
	_, err := connect(t, c.Region("r2")).Transfer(t.Context(), &adminpb.TransferRequest{To: "r3"})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "ask region r1") {
		t.Errorf("got %v", err)
	}
}

func readAll(t *testing.T, r *admintest.Region, request *adminpb.LogReadRequest) ([]*adminpb.LogEntry, error) {
	t.Helper()
	stream, err := connect(t, r).LogRead(t.Context(), request)
	if err != nil {
		return nil, err
	}
	var entries []*adminpb.LogEntry
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return entries, err
		}
		entries = append(entries, e)
	}
}

func TestLogRead(t *testing.T) {
	c := admintest.Start(t, "r1")
	at := time.Date(2026, 11, 23, 3, 4, 5, 678900_000, time.UTC)
	c.Append(
		admin.LogEntry{Kind: "opening", Term: paxosgroup.Ballot{Counter: 1, Replica: 1}, Region: "r1", Effective: true},
		admin.LogEntry{Kind: "transaction", Term: paxosgroup.Ballot{Counter: 1, Replica: 1}, Number: 1, Region: "r1", Effective: true,
			Time: at, Xid: 1 << 33, EndLSN: 0x1_0000_00ff, Tables: []admin.TableRows{{Table: "public.t", Rows: 3}}, Bytes: 99, Trace: "4bf9", Changes: []string{"INSERT public.t id=1"}},
		admin.LogEntry{Kind: "noop"},
	)
	entries, err := readAll(t, c.Region("r1"), &adminpb.LogReadRequest{})
	if err != nil || len(entries) != 3 {
		t.Fatalf("got %v, %v", entries, err)
	}
	if e := entries[0]; e.GetVerdict() != "effective" || e.GetTime() != nil {
		t.Errorf("opening: %v", e)
	}
	if e := entries[2]; e.GetVerdict() != "void" || e.GetSlot() != 3 {
		t.Errorf("no-op: %v", e)
	}
	if e := entries[1]; !e.GetTime().AsTime().Equal(at) || e.GetXid() != 1<<33 || e.GetEndLsn() != 0x1_0000_00ff ||
		len(e.GetTables()) != 1 || e.GetTables()[0].GetRows() != 3 || len(e.GetChanges()) != 0 || e.GetTermReplica() != 1 {
		t.Errorf("transaction: %v", e)
	}
	entries, err = readAll(t, c.Region("r1"), &adminpb.LogReadRequest{From: 2, Limit: 1, Changes: true})
	if err != nil || len(entries) != 1 || entries[0].GetSlot() != 2 || len(entries[0].GetChanges()) != 1 {
		t.Errorf("one with its changes: %v, %v", entries, err)
	}
}

func TestLogReadFollows(t *testing.T) {
	c := admintest.Start(t, "r1")
	c.Append(admin.LogEntry{Kind: "opening"})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := connect(t, c.Region("r1")).LogRead(ctx, &adminpb.LogReadRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	for slot := uint64(1); slot <= 4; slot++ {
		e, err := stream.Recv()
		if err != nil || e.GetSlot() != slot {
			t.Fatalf("got %v, %v; want slot %d", e, err, slot)
		}
		c.Append(admin.LogEntry{Kind: "noop"})
	}
	limited, err := readAll(t, c.Region("r1"), &adminpb.LogReadRequest{From: 2, Follow: true, Limit: 3})
	if err != nil || len(limited) != 3 || limited[2].GetSlot() != 4 {
		t.Errorf("with a limit: %v, %v", limited, err)
	}
}

// The end of a server ends what follows its log, and does not wait for it.
func TestRunEndsWithItsStreams(t *testing.T) {
	c := admintest.Start(t, "r1")
	c.Append(admin.LogEntry{Kind: "opening"})
	stream, err := connect(t, c.Region("r1")).LogRead(t.Context(), &adminpb.LogReadRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	c.Stop("r1")
	if took := time.Since(begun); took > time.Second {
		t.Errorf("the server took %v to end", took)
	}
	if _, err := stream.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v", err)
	}
}

func TestListenTellsWhoseAddressIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	c := admintest.Start(t, "r1")
	s, err := admin.NewServer(admin.Config{Address: taken.Addr().String(), Backend: c.Region("r1"), Gatherer: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "listen.admin") || !strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v", err)
	}
}

func TestNewServerTellsAllThatIsMissing(t *testing.T) {
	_, err := admin.NewServer(admin.Config{})
	for _, field := range []string{"address", "backend", "gatherer", "logger"} {
		if err == nil || !strings.Contains(err.Error(), field+": missing") {
			t.Errorf("%s is not told missing: %v", field, err)
		}
	}
}
