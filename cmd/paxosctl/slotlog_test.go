package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
)

// logFiles writes a log of two groups in two segments and returns its directory.
func logFiles(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	l, _, err := slotlog.Open(slotlog.Config{Dir: dir, SegmentBytes: 8 << 10, Manual: true})
	if err != nil {
		t.Fatal(err)
	}
	put := func(g paxosgroup.GroupID, records ...paxosgroup.Record) {
		l.Append(g, records, func(err error) {
			if err != nil {
				t.Error(err)
			}
		})
		for l.Flush() {
		}
	}
	term := paxosgroup.Ballot{Counter: 3, Replica: 2}
	put(1, paxosgroup.Record{Kind: paxosgroup.RecordPromise, Ballot: term})
	put(1, paxosgroup.Record{Kind: paxosgroup.RecordAccept, Slot: 1, Ballot: term,
		Entry: paxosgroup.Entry{Kind: paxosgroup.KindOpening, Term: term, Region: "r2", Incarnation: 0xabc}})
	put(2, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: 40}})
	slot := paxosgroup.Slot(1)
	for l.Stats().Segments < 2 {
		slot++
		put(1,
			paxosgroup.Record{Kind: paxosgroup.RecordChosen, Slot: slot - 1},
			paxosgroup.Record{Kind: paxosgroup.RecordAccept, Slot: slot, Ballot: term, Entry: paxosgroup.Entry{
				Kind: paxosgroup.KindData, Term: term, Number: uint64(slot - 1), Region: "r2", Incarnation: 0xabc,
				Session: 77, Sequence: uint64(slot), Payload: bytes.Repeat([]byte{byte(slot)}, 1500),
			}})
	}
	put(2, paxosgroup.Record{Kind: paxosgroup.RecordLearn, Slot: 41, Entry: paxosgroup.Entry{Kind: paxosgroup.KindNoOp}})
	put(2, paxosgroup.Record{Kind: paxosgroup.RecordLearn, Slot: 42, Entry: paxosgroup.Entry{Kind: paxosgroup.KindData, Term: term, Number: 9, Region: "r3", Payload: []byte("forty-two")}})
	put(3, paxosgroup.Record{Kind: paxosgroup.RecordAccept, Slot: 1, Ballot: term, Entry: paxosgroup.Entry{Kind: paxosgroup.KindData, Payload: bytes.Repeat([]byte("last "), 200)}})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// change alters bytes of a file.
func change(t *testing.T, path string, change func(b []byte)) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change(b)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLogFiles(t *testing.T) {
	sound, torn, damaged := logFiles(t), logFiles(t), logFiles(t)
	first, last := "0000000000000001.log", "0000000000000002.log"
	change(t, filepath.Join(torn, last), func(b []byte) {
		// As if of the last batch only the sectors behind the first had come to the disk.
		at := bytes.Index(b, []byte("last ")) / 512 * 512
		clear(b[at : at+512])
	})
	change(t, filepath.Join(damaged, first), func(b []byte) { b[3000] ^= 4 })
	names := strings.NewReplacer(sound, "SOUND", torn, "TORN", damaged, "DAMAGED")
	for _, tc := range []struct {
		file string
		code int
		args []string
	}{
		{"verify.txt", exitOK, []string{"verify", sound, torn}},
		{"verify.json", exitOK, []string{"verify", sound, "-o", "json"}},
		{"verify_damaged.txt", exitDamaged, []string{"verify", sound, damaged}},
		{"verify_damaged.json", exitDamaged, []string{"verify", damaged, "-o", "json"}},
		{"dump.txt", exitOK, []string{"dump", sound}},
		{"dump_slots.txt", exitOK, []string{"dump", sound, "--group", "1", "--from", "2", "--to", "3"}},
		{"dump_payload.json", exitOK, []string{"dump", sound, "--group", "2", "--payload", "base64", "-o", "json"}},
		{"dump_damaged.txt", exitDamaged, []string{"dump", damaged}},
	} {
		t.Run(tc.file, func(t *testing.T) {
			out, err := run(t, append([]string{"log"}, tc.args...)...)
			if got := exitCode(err); got != tc.code {
				t.Errorf("exit code %d, want %d (%v)", got, tc.code, err)
			}
			if err != nil {
				out += fmt.Sprintf("paxosctl: %v\n", err)
			}
			golden(t, tc.file, names.Replace(out))
		})
	}
}

func TestLogFilesThatCannotBeRead(t *testing.T) {
	dir := logFiles(t)
	l, _, err := slotlog.Open(slotlog.Config{Dir: dir, Manual: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	empty := t.TempDir()
	damaged := logFiles(t)
	change(t, filepath.Join(damaged, "0000000000000001.log"), func(b []byte) { b[3000] ^= 4 })
	for _, tc := range []struct {
		name string
		args []string
		want int
		text string
	}{
		{"in use", []string{"verify", dir}, exitError, "a running sidecar uses it (stop it first"},
		{"in use, to be dumped", []string{"dump", dir}, exitError, dir},
		{"empty", []string{"verify", empty}, exitError, "there is no slot log in " + empty},
		{"not there", []string{"verify", filepath.Join(empty, "x")}, exitError, "no such file"},
		{"damage counts more", []string{"verify", empty, damaged}, exitDamaged, "damaged: 1 of 2"},
		{"no directory", []string{"verify"}, exitUsage, "requires at least 1"},
		{"two to dump", []string{"dump", empty, empty}, exitUsage, "accepts 1"},
		{"a range upside down", []string{"dump", empty, "--from", "9", "--to", "8"}, exitUsage, "below"},
		{"no such encoding", []string{"dump", empty, "--payload", "octal"}, exitUsage, "neither hex"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := run(t, append([]string{"log"}, tc.args...)...)
			if got := exitCode(err); got != tc.want || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("exit code %d, want %d: %v", got, tc.want, err)
			}
		})
	}
}

// TestDumpIntoABrokenPipe: a reader that has seen enough is no error.
func TestDumpIntoABrokenPipe(t *testing.T) {
	for _, args := range [][]string{{"dump"}, {"verify"}, {"dump", "--payload", "hex", "-o", "json"}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		root := newRootCommand()
		root.SetOut(w)
		root.SetErr(new(bytes.Buffer))
		root.SetArgs(append([]string{"log", args[0], logFiles(t)}, args[1:]...))
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Errorf("%v: %v", args, err)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("the pipe was not broken: %v", err)
		}
		w.Close()
	}
}

func TestDumpedPayload(t *testing.T) {
	out, err := run(t, "log", "dump", logFiles(t), "--from", "42", "--payload", "hex", "-o", "json")
	var v recordView
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || v.Payload == nil || *v.Payload != "666f7274792d74776f" {
		t.Errorf("got %q, %v", out, err)
	}
}
