package tracing

import "time"

// Stage is a part of a commit's way. The numbers go into span ids, which
// regions of different versions must compute alike.
type Stage uint8

// The stages, see the package comment.
const (
	Committed Stage = 1
	Capture   Stage = 2
	Propose   Stage = 3
	Accept    Stage = 4
	Flush     Stage = 5
	Chosen    Stage = 6
	Release   Stage = 7
	Apply     Stage = 8
)

func (s Stage) String() string {
	switch s {
	case Committed:
		return "commit"
	case Capture:
		return "capture"
	case Propose:
		return "propose"
	case Accept:
		return "accept"
	case Flush:
		return "flush"
	case Chosen:
		return "chosen"
	case Release:
		return "release"
	case Apply:
		return "apply"
	}
	return "unknown"
}

// parent is the stage whose span is a stage's parent.
func (s Stage) parent() Stage {
	if s == Flush {
		return Accept
	}
	return Committed
}

// Interval is when something happened, by this region's wall clock.
type Interval struct{ Start, End time.Time }
