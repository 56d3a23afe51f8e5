package sequence

import (
	"math/bits"
	"time"
)

// Sample is what all sequences of a database were at one time.
type Sample struct {
	At     time.Time
	States []State
}

// State is what one sequence was.
type State struct {
	OID          uint32
	Schema, Name string
	Increment    int64 // below zero: descending
	Min, Max     int64
	LastValue    int64
	LogCount     int64 // values that will be handed out without WAL
	Called       bool  // LastValue was handed out
	Locked       bool  // could not be read: LastValue is a bound, not a reading
}

// reach is the last value that is, or will be without WAL, handed out. If
// nothing was handed out, it is the value before which nothing is to be.
func (s *State) reach() int64 {
	if !s.Called {
		return s.LastValue
	}
	return s.ahead(s.LastValue, uint64(max(s.LogCount, 0)))
}

// ahead returns the value that many steps after v, at most the sequence's bound.
func (s *State) ahead(v int64, steps uint64) int64 {
	room, distance := s.room(v), s.stride()
	hi, lo := bits.Mul64(distance, steps)
	if hi != 0 || lo > room {
		lo = room
	}
	if s.Increment < 0 {
		return int64(uint64(v) - lo)
	}
	return int64(uint64(v) + lo)
}

// stride is the distance between values.
func (s *State) stride() uint64 {
	if s.Increment < 0 {
		return -uint64(s.Increment)
	}
	return uint64(s.Increment)
}

// room is the distance from v to the bound that the sequence runs towards.
func (s *State) room(v int64) uint64 {
	switch {
	case s.Increment < 0 && v > s.Min:
		return uint64(v) - uint64(s.Min)
	case s.Increment > 0 && v < s.Max:
		return uint64(s.Max) - uint64(v)
	}
	return 0
}

// beyond reports whether a comes after b in the direction of the sequence.
func (s *State) beyond(a, b int64) bool {
	if s.Increment < 0 {
		return a < b
	}
	return a > b
}

// distance is how far a lies beyond b, 0 if it does not.
func (s *State) distance(a, b int64) uint64 {
	if !s.beyond(a, b) {
		return 0
	}
	if s.Increment < 0 {
		return uint64(b) - uint64(a)
	}
	return uint64(a) - uint64(b)
}
