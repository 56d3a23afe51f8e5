package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test binary be a replica, as the command itself is.
func TestMain(m *testing.M) {
	if config, ok := os.LookupEnv(nodeEnv); ok {
		if err := runNode(config); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestEveryContenderWorksAndIsCounted(t *testing.T) {
	for _, contender := range []string{"quorate", "etcd", "hashicorp"} {
		t.Run(contender, func(t *testing.T) {
			c, err := startCluster(t.TempDir(), contender, 0, 1)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := c.stop(); err != nil {
					t.Error(err)
				}
			}()
			got, err := c.measure(context.Background(), 16, 128, 100*time.Millisecond, 300*time.Millisecond, "")
			if err != nil {
				t.Fatal(err)
			}
			if err := c.settle(10 * time.Second); err != nil {
				t.Fatal(err)
			}
			// A quorum of three has flushed whatever the leader's proposers saw end.
			if n := got.all.Flushes; n < 3 {
				t.Errorf("%d operations ended with %d flushes", got.Operations, n)
			}
			// Two followers at least were sent it, and as many processes wrote it.
			if n, least := got.all.NetBytes, uint64(2*128*got.Operations/2); n < least {
				t.Errorf("%d operations of 128 bytes ended with %d bytes sent, want %d at least", got.Operations, n, least)
			}
			if got.all.CPU <= 0 || got.all.Allocs == 0 || got.P50 <= 0 || got.P50 > got.P99 {
				t.Errorf("counted %+v", got)
			}
		})
	}
}

func TestDelayIsGiven(t *testing.T) {
	c, err := startCluster(t.TempDir(), "quorate", 5*time.Millisecond, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.stop()
	got, err := c.measure(context.Background(), 1, 128, 100*time.Millisecond, 300*time.Millisecond, "")
	if err != nil {
		t.Fatal(err)
	}
	if got.P50 < 10*time.Millisecond {
		t.Errorf("p50 of %v over a round trip of 10 ms", got.P50)
	}
}

func TestReport(t *testing.T) {
	r := report{figures: []figure{
		{name: "a", quorate: 250, peer: 100, target: ">=2.5", unit: "per_s"},
		{name: "b", quorate: 1.26, peer: 1, target: "<=1.25", unit: "us"},
		{name: "c", quorate: 1, peer: 2, unit: "s"},
	}}
	var out bytes.Buffer
	r.write(&out)
	for _, want := range []string{
		"bench a quorate=250 peer=100 ratio=2.500 target=>=2.5 unit=per_s\n",
		"bench b quorate=1.26 peer=1 ratio=1.260 target=<=1.25 unit=us\n",
		"bench c quorate=1 peer=2 ratio=0.500 target=none unit=s\n",
		"| >=2.5 | met |", "| <=1.25 | behind |",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, out.String())
		}
	}
}

func TestCallsOfStrace(t *testing.T) {
	table := "syscall              calls\n---------------- ---------\nfdatasync             1200\nfsync                    3\n---------------- ---------\ntotal                 1203\n"
	if n := callsIn([]byte(table)); n != 1203 {
		t.Errorf("got %d, want 1203", n)
	}
}
