package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

// figure is one result beside its peer's.
type figure struct {
	name          string
	quorate, peer float64
	target        string // "<=1.25" or ">=2.5", of the ratio; empty: none
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

// cost is what the turns of one contender at one load came to.
type cost struct {
	contender, place string
	size, proposers  int
	turns            []turn
}

func (c *cost) of(f func(turn) float64) float64 {
	var all []float64
	for _, t := range c.turns {
		all = append(all, f(t))
	}
	return median(all)
}

func (c *cost) rate() float64 { return c.of(turn.rate) }

func (c *cost) p50() time.Duration {
	return time.Duration(c.of(func(t turn) float64 { return float64(t.P50) }))
}

func (c *cost) p99() time.Duration {
	return time.Duration(c.of(func(t turn) float64 { return float64(t.P99) }))
}

// per is the median of a sum over all processes, for each entry.
func (c *cost) per(f func(counters) float64) float64 {
	return c.of(func(t turn) float64 { return f(t.all) / float64(t.Operations) })
}

// report collects what is to be printed.
type report struct {
	machine string
	figures []figure
	costs   []cost
	logs    []*logFigures
	notes   []string
}

func (r *report) add(f figure) { r.figures = append(r.figures, f) }

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// write prints tables in Markdown and then a line for each figure.
func (r *report) write(w io.Writer) {
	if r.machine != "" {
		fmt.Fprintf(w, "%s.\n\n", r.machine)
	}
	if len(r.figures) > 0 {
		fmt.Fprintln(w, "| figure | quorate | peer | unit | ratio | target | | peer is |\n|---|---|---|---|---|---|---|---|")
		for _, f := range r.figures {
			verdict := ""
			switch {
			case f.target == "":
			case f.met():
				verdict = "met"
			default:
				verdict = "behind"
			}
			fmt.Fprintf(w, "| `%s` | %s | %s | %s | %.3f | %s | %s | %s |\n", f.name, number(f.quorate), number(f.peer), f.unit, f.ratio(), f.target, verdict, f.peerIs)
		}
		fmt.Fprintln(w)
	}
	r.writeCosts(w)
	r.writeLogs(w)
	for _, n := range r.notes {
		fmt.Fprintln(w, "-", n)
	}
	if len(r.notes) > 0 {
		fmt.Fprintln(w)
	}
	for _, f := range r.figures {
		target := f.target
		if target == "" {
			target = "none"
		}
		fmt.Fprintf(w, "bench %s quorate=%s peer=%s ratio=%.3f target=%s unit=%s\n", f.name, number(f.quorate), number(f.peer), f.ratio(), target, f.unit)
	}
}

func (r *report) writeCosts(w io.Writer) {
	if len(r.costs) == 0 {
		return
	}
	fmt.Fprintf(w, "Of all five processes together, for each entry; theory asks for 2f+1 = %d messages (f = %d: an accept to each of the f others a quorum needs, f answers, one notice), and %d where all four others are asked, answer and are told.\n\n",
		replicas, replicas/2, 3*(replicas-1))
	fmt.Fprintln(w, "| where | bytes | proposers | contender | per s | p50 ms | p99 ms | entries a flush, leader | flushes | messages | frames | written a payload byte | sent a payload byte | allocations | CPU s a million |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
	for i := range r.costs {
		c := &r.costs[i]
		messages, frames := "", ""
		if n := c.per(func(c counters) float64 { return float64(c.Messages) }); n > 0 {
			messages = number(n)
			frames = number(c.per(func(c counters) float64 { return float64(c.Frames) }))
		}
		size := float64(c.size)
		fmt.Fprintf(w, "| %s | %d | %d | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n",
			c.place, c.size, c.proposers, c.contender, number(c.rate()), number(micros(c.p50())/1000), number(micros(c.p99())/1000),
			number(c.of(func(t turn) float64 { return float64(t.Operations) / float64(t.leader.Flushes) })),
			number(c.per(func(c counters) float64 { return float64(c.Flushes) })), messages, frames,
			number(c.per(func(c counters) float64 { return float64(c.StorageBytes) })/size),
			number(c.per(func(c counters) float64 { return float64(c.NetBytes) })/size),
			number(c.per(func(c counters) float64 { return float64(c.Allocs) })),
			number(c.per(func(c counters) float64 { return c.CPU.Seconds() * 1e6 })))
	}
	fmt.Fprintln(w)
}

// number writes four significant digits or the whole number.
func number(v float64) string {
	if math.Abs(v) >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
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

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
