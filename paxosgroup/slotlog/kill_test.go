package slotlog

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"quorate/paxosgroup"
)

// TestMain turns the test binary into the process that TestKilledProcess kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("SLOTLOG_WRITE_UNTIL_KILLED"); dir != "" {
		writeUntilKilled(dir)
	}
	os.Exit(m.Run())
}

// writeUntilKilled goes on where the log ends, and prints each slot of group 1
// once it is flushed.
func writeUntilKilled(dir string) {
	l, restored, err := Open(Config{Dir: dir, SegmentBytes: 64 << 10})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	slot := restored[1].Chosen
	if n := len(restored[1].Accepted); n > 0 {
		slot = restored[1].Accepted[n-1].Slot
	}
	fmt.Println("found", slot)
	out := make(chan paxosgroup.Slot, 1<<16)
	go func() {
		for s := range out {
			fmt.Println("flushed", s)
		}
	}()
	for {
		slot++
		s := slot
		payload := strings.Repeat(string(rune('a'+s%26)), int(s*37%3000))
		l.Append(1, []paxosgroup.Record{accept(s, 1, payload), chosen(s - 1)}, func(err error) {
			if err == nil {
				out <- s
			}
		})
		l.Append(2, []paxosgroup.Record{accept(s, 1, payload)}, func(error) {})
	}
}

func TestKilledProcessLosesNothingThatWasFlushed(t *testing.T) {
	dir := t.TempDir()
	highest := paxosgroup.Slot(0)
	for round := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SLOTLOG_WRITE_UNTIL_KILLED="+dir)
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(100+50*round)*time.Millisecond, func() { cmd.Process.Kill() })
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var s paxosgroup.Slot
			if _, err := fmt.Sscanf(lines.Text(), "found %d", &s); err == nil {
				if s < highest {
					t.Fatalf("round %d: found up to slot %d, %d was flushed", round, s, highest)
				}
				continue
			}
			if _, err := fmt.Sscanf(lines.Text(), "flushed %d", &s); err != nil {
				t.Fatalf("round %d: the process said %q", round, lines.Text())
			}
			highest = max(highest, s)
		}
		cmd.Wait()
		timer.Stop()
	}
	if highest == 0 {
		t.Fatal("nothing was flushed")
	}
	l, restored := open(t, Config{Dir: dir, SegmentBytes: 64 << 10})
	last := restored[1].Chosen + paxosgroup.Slot(len(restored[1].Accepted))
	if last < highest {
		t.Fatalf("restored up to slot %d, %d was flushed", last, highest)
	}
	for i, p := range payloads(t, l, 1, 1, last) {
		s := i + 1
		if want := strings.Repeat(string(rune('a'+s%26)), s*37%3000); p != want {
			t.Fatalf("slot %d holds %.20q, want %.20q", s, p, want)
		}
	}
	t.Logf("%d slots flushed, %d restored, %d segments", highest, last, l.Stats().Segments)
}
