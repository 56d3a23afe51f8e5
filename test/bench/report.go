package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"
)

// figure is one result beside its peer's.
type figure struct {
	name          string
	quorate, peer float64
	target        string // "<=1.05" or ">=0.7", of the ratio; empty: none
	unit          string
	peerIs        string // in words, for the table
}

func (f figure) ratio() float64 { return f.quorate / f.peer }

// met tells whether the target is reached; with none it is.
func (f figure) met() bool {
	if f.target == "" {
		return true
	}
	var bound float64
	if _, err := fmt.Sscanf(f.target[2:], "%g", &bound); err != nil {
		panic(fmt.Sprintf("target %q of %s: %v", f.target, f.name, err))
	}
	if f.target[:2] == "<=" {
		return f.ratio() <= bound
	}
	return f.ratio() >= bound // false for a NaN, too
}

// report collects what is to be printed.
type report struct {
	machine string
	figures []figure
	notes   []string
}

func (r *report) add(f figure) { r.figures = append(r.figures, f) }

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func (r *report) write(w io.Writer) {
	fmt.Fprintln(w, r.machine)
	for _, n := range r.notes {
		fmt.Fprintln(w, n)
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "figure\tquorate\tpeer\tunit\tratio\ttarget\t\tpeer is")
	for _, f := range r.figures {
		verdict := ""
		switch {
		case f.target == "":
		case f.met():
			verdict = "met"
		default:
			verdict = "BEHIND"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%.3f\t%s\t%s\t%s\n", f.name, number(f.quorate), number(f.peer), f.unit, f.ratio(), f.target, verdict, f.peerIs)
	}
	t.Flush()
	fmt.Fprintln(w)
	for _, f := range r.figures {
		target := f.target
		if target == "" {
			target = "none"
		}
		fmt.Fprintf(w, "bench %s quorate=%s peer=%s ratio=%.3f target=%s unit=%s\n", f.name, number(f.quorate), number(f.peer), f.ratio(), target, f.unit)
	}
}

// number writes four significant digits or the whole number.
func number(v float64) string {
	if math.Abs(v) >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
}

// percentile of durations, which it sorts; p between 0 and 1.
func percentile(d []time.Duration, p float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(int(p*float64(len(d))), len(d)-1)]
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
