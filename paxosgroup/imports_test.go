package paxosgroup

import (
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The core does no I/O, starts nothing and reads no clock. What it may import
// is a short list; package time is there for Duration, and the functions of it
// that read the clock or wait are looked for by name.
func TestCoreImportsNoIO(t *testing.T) {
	allowed := []string{"bytes", "cmp", "encoding/binary", "errors", "fmt", "math/bits", "math/rand/v2", "slices", "strconv", "time"}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		seen++
		src, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		file, err := parser.ParseFile(token.NewFileSet(), f.Name(), src, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range file.Imports {
			if path, _ := strconv.Unquote(i.Path.Value); !slices.Contains(allowed, path) {
				t.Errorf("%s imports %s", f.Name(), path)
			}
		}
		for _, word := range []string{"time.Now", "time.Since", "time.Sleep", "time.After", "time.NewTimer", "\tgo func", "rand.IntN(", "rand.Uint64("} {
			if strings.Contains(string(src), word) {
				t.Errorf("%s uses %s", f.Name(), word)
			}
		}
	}
	if seen < 10 {
		t.Errorf("looked at %d files only", seen)
	}
}
