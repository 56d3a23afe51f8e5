package slotlog

import (
	"encoding/hex"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write testdata/format.hex anew")

// TestFormatIsStable compares a log's bytes with those of the version that is
// documented, so that nobody's log becomes unreadable by accident.
func TestFormatIsStable(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, Config{Dir: dir, SegmentBytes: 4 << 10})
	for _, r := range records() {
		appendWait(t, l, 3, r)
	}
	l.Close()
	image, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	got := strings.TrimRight(hex.Dump(image), "\n") + "\n"
	path := filepath.Join("testdata", "format.hex")
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the log is written as\n%s\nand not as in %s: a change of the format needs a new version", got, path)
	}
}
