package sim

import (
	"slices"
	"time"
)

// shrink looks for a smaller plan that fails as well, though perhaps otherwise:
// first it quietens whole kinds of trouble, then it leaves out faults, halves of
// them first (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing
// input", 2002).
func shrink(p plan, within time.Duration) (plan, error) {
	end := time.Now().Add(within)
	why := runPlan(p).err
	try := func(q plan) bool {
		if time.Now().After(end) {
			return false
		}
		err := runPlan(q).err
		if err != nil {
			p, why = q, err
		}
		return err != nil
	}
	for _, quieten := range []func(*plan){
		func(q *plan) { q.groups = 1 },
		func(q *plan) { q.clients = 0 },
		func(q *plan) { q.loss = 0 },
		func(q *plan) { q.repeat = 0 },
		func(q *plan) { q.slow = 0 },
		func(q *plan) { q.ppmMax = 0 },
		func(q *plan) { q.preferred = "" },
		func(q *plan) { q.delayMax = 2 * time.Millisecond },
		func(q *plan) { q.flushMax = time.Millisecond },
	} {
		q := p
		quieten(&q)
		try(q)
	}
	for _, k := range faultKinds {
		q := p
		q.faults = slices.DeleteFunc(slices.Clone(p.faults), func(f fault) bool { return f.kind == k.name })
		if len(q.faults) < len(p.faults) {
			try(q)
		}
	}
	for size := len(p.faults) / 2; size > 0; size /= 2 {
		for at := 0; at+size <= len(p.faults); {
			q := p
			q.faults = slices.Delete(slices.Clone(p.faults), at, at+size)
			if !try(q) {
				at += size
			}
		}
	}
	return p, why
}
