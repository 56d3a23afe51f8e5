package mutants

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	all   = flag.Bool("mutants.all", false, "look for each bug from the first seed on, in up to -mutants.seeds, and print the table")
	seeds = flag.Int("mutants.seeds", 2000, "with -mutants.all: seeds after which a bug counts as not caught")
	fresh = flag.Bool("mutants.fresh", false, "with -mutants.all: only bugs that no seed is recorded for")
	write = flag.Bool("mutants.record", false, "with -mutants.all: write the seeds into table_test.go, and the table into docs/verification.md")
	only  = flag.String("mutants.only", "", "only bugs whose name contains this")
)

const (
	root = "../../../paxosgroup"
	// The suite runs so many seeds from the recorded one on: itself and, since any
	// change of the code makes other worlds of the same seeds, some after it. A bug
	// that these do not catch is looked for in so many seeds from the first on.
	window = 60
	again  = 300
	doc    = "../../../docs/verification.md"
)

// packages are the ones that have bugs, by directory below root.
var packages = map[string]string{"": "paxosgroup", "runner": "runner", "slotlog": "slotlog"}

func variable(i int) string { return fmt.Sprintf("mutant%d", i) }

// buildMutants builds the simulator with every bug of the table in it, each
// switched on by its number in the environment.
func buildMutants(t *testing.T, dir string) string {
	t.Helper()
	sources := map[string]string{}
	var switches strings.Builder
	for i, m := range table {
		fmt.Fprintf(&switches, "\t%s = os.Getenv(\"QUORATE_MUTANT\") == \"%d\"\n", variable(i), i)
		for _, e := range m.edits {
			if sources[e.file] == "" {
				b, err := os.ReadFile(filepath.Join(root, e.file))
				if err != nil {
					t.Fatal(err)
				}
				sources[e.file] = string(b)
			}
			// Against the source as it is: one bug must not depend on another.
			b, _ := os.ReadFile(filepath.Join(root, e.file))
			if n := strings.Count(string(b), e.before); n != 1 {
				t.Errorf("%s: %s holds %d times, want once:\n%s", m.name, e.file, n, e.before)
				continue
			}
			if strings.Count(sources[e.file], e.before) != 1 {
				t.Errorf("%s: another bug changes the same lines of %s:\n%s", m.name, e.file, e.before)
				continue
			}
			after := regexp.MustCompile(`\bON\b`).ReplaceAllString(e.after, variable(i))
			sources[e.file] = strings.Replace(sources[e.file], e.before, after, 1)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	put := func(name, text string) {
		abs, err := filepath.Abs(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(dir, strings.ReplaceAll(name, "/", "_"))
		if err := os.WriteFile(copied, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		overlay.Replace[abs] = copied
	}
	for file, text := range sources {
		put(file, text)
	}
	for sub, name := range packages {
		put(filepath.Join(sub, "zz_mutants.go"), fmt.Sprintf("package %s\n\nimport \"os\"\n\nvar (\n%s)\n", name, switches.String()))
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(config, b, 0o600); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "sim.test")
	build := exec.Command("go", "test", "-c", "-overlay", config, "-o", binary, "quorate/test/sim")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the mutants: %v\n%s", err, out)
	}
	return binary
}

// verdict is what the simulator said of a mutant.
type verdict struct {
	caught bool
	seed   uint64
	why    string
}

var failedSeed = regexp.MustCompile(`(?m)seed (\d+): (.*)$`)

func run(binary string, number int, from uint64, n int) (verdict, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, binary, "-test.run", "^TestSafetyUnderFaults$", "-test.timeout", "19m",
		fmt.Sprintf("-sim.from=%d", from), fmt.Sprintf("-sim.seeds=%d", n), "-sim.first", "-sim.shrink=false", "-sim.coverage=false")
	c.Env = append(os.Environ(), fmt.Sprintf("QUORATE_MUTANT=%d", number), "GOMAXPROCS=1")
	out, err := c.CombinedOutput()
	if err == nil {
		return verdict{}, nil
	}
	if m := failedSeed.FindStringSubmatch(string(out)); m != nil {
		seed, _ := strconv.ParseUint(m[1], 10, 64)
		return verdict{caught: true, seed: seed, why: m[2]}, nil
	}
	return verdict{}, fmt.Errorf("%w\n%.2000s", err, out)
}

// TestMutants wants every bug of the table caught.
func TestMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a binary and runs it for each of the mutants")
	}
	binary := buildMutants(t, t.TempDir())
	verdicts := make([]verdict, len(table))
	var waiting sync.WaitGroup
	room := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i, m := range table {
		if !strings.Contains(m.name, *only) || m.seed != 0 && *fresh {
			continue
		}
		if m.seed == 0 && !*all {
			t.Errorf("%s: no seed that catches it is recorded (make mutants)", m.name)
			continue
		}
		waiting.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			from, n := uint64(1), *seeds
			if !*all {
				from, n = m.seed, window
			}
			v, err := run(binary, i, from, n)
			if err == nil && !v.caught && !*all {
				t.Logf("%s: no longer caught by seeds %d to %d; make mutants records anew", m.name, from, from+uint64(n)-1)
				from, n = 1, again
				v, err = run(binary, i, from, n)
			}
			verdicts[i] = v
			switch {
			case err != nil:
				t.Errorf("%s: %v", m.name, err)
			case !v.caught && *all:
				t.Errorf("%s: not caught by %d seeds: the simulator is blind to what it breaks: %s", m.name, n, m.breaks)
			case !v.caught:
				t.Errorf("%s: not caught by seeds %d to %d. If the code has changed since they were recorded: make mutants records anew, or shows that the simulator is blind by now to what this breaks: %s", m.name, from, from+uint64(n)-1, m.breaks)
			case *all:
				t.Logf("| %s | %s | %s | %d |", m.name, m.breaks, shorten(v.why), v.seed)
			}
		})
	}
	waiting.Wait()
	caught := 0
	for _, v := range verdicts {
		if v.caught {
			caught++
		}
	}
	t.Logf("mutants: %d of %d caught", caught, len(table))
	if *all && *write {
		record(t, verdicts)
	}
}

// record writes the seeds of those that were caught where the suite and readers
// look for them.
func record(t *testing.T, verdicts []verdict) {
	source, rows := readFile(t, "table_test.go"), readFile(t, doc)
	for i, m := range table {
		if !verdicts[i].caught {
			continue
		}
		entry := regexp.MustCompile(`(\{name: ` + regexp.QuoteMeta(strconv.Quote(m.name)) + `,)(?: seed: \d+,)?`)
		source = entry.ReplaceAllString(source, fmt.Sprintf("${1} seed: %d,", verdicts[i].seed))
		row := fmt.Sprintf("| %s | %s | %s | %d |\n", m.name, m.breaks, shorten(verdicts[i].why), verdicts[i].seed)
		if old := regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(m.name) + ` \|.*\n`); old.MatchString(rows) {
			rows = old.ReplaceAllLiteralString(rows, row)
		} else {
			rows = strings.Replace(rows, endOfTable, row+endOfTable, 1)
		}
	}
	for name, text := range map[string]string{"table_test.go": source, doc: rows} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const endOfTable = "<!-- end of the table -->\n"

func readFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// shorten leaves of what the simulator said what is of any run.
func shorten(why string) string {
	_, why, _ = strings.Cut(why, ": ")
	why = regexp.MustCompile(`group \d+: |paxosgroup: |panic: `).ReplaceAllString(why, "")
	why, _, _ = strings.Cut(why, ", before it was")
	return strings.ReplaceAll(why[:min(len(why), 110)], "|", "/")
}
