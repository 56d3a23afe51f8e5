package slotlog

import "quorate/paxosgroup"

const (
	chunkSlots = 1 << 12
	// slotsAheadMax bounds how far above all known slots a record may be, so
	// that a wild slot number cannot claim all memory.
	slotsAheadMax = 1 << 24
)

// location says where a slot's latest record is. The zero location is nowhere:
// sequence numbers start at 1.
type location struct {
	sequence uint32
	offset   uint32
	size     uint32 // of the frame
}

// index finds the latest record of each slot above first-1. Without pointers in
// its chunks it costs the collector nothing.
type index struct {
	firstChunk uint64
	chunks     []*[chunkSlots]location
	last       paxosgroup.Slot // highest slot with a location
}

func (x *index) get(s paxosgroup.Slot) location {
	c := uint64(s) / chunkSlots
	if c < x.firstChunk || c-x.firstChunk >= uint64(len(x.chunks)) {
		return location{}
	}
	chunk := x.chunks[c-x.firstChunk]
	if chunk == nil {
		return location{}
	}
	return chunk[uint64(s)%chunkSlots]
}

// set places l and returns what was there.
func (x *index) set(s paxosgroup.Slot, l location) location {
	c := uint64(s) / chunkSlots
	if len(x.chunks) == 0 {
		x.firstChunk = c
	}
	for c < x.firstChunk {
		x.chunks = append([]*[chunkSlots]location{nil}, x.chunks...)
		x.firstChunk--
	}
	for c-x.firstChunk >= uint64(len(x.chunks)) {
		x.chunks = append(x.chunks, nil)
	}
	chunk := x.chunks[c-x.firstChunk]
	if chunk == nil {
		chunk = new([chunkSlots]location)
		x.chunks[c-x.firstChunk] = chunk
	}
	old := chunk[uint64(s)%chunkSlots]
	chunk[uint64(s)%chunkSlots] = l
	x.last = max(x.last, s)
	return old
}

// dropThrough forgets every slot up to s and hands what it forgot to each.
func (x *index) dropThrough(s paxosgroup.Slot, each func(location)) {
	for len(x.chunks) > 0 {
		first := paxosgroup.Slot(x.firstChunk * chunkSlots)
		if first > s {
			return
		}
		chunk := x.chunks[0]
		if chunk != nil {
			for i := range chunk {
				if first+paxosgroup.Slot(i) > s {
					return
				}
				if chunk[i] != (location{}) {
					each(chunk[i])
					chunk[i] = location{}
				}
			}
		}
		if first+chunkSlots-1 > s {
			return
		}
		x.chunks = x.chunks[1:]
		x.firstChunk++
	}
}

// each hands every slot that has a location to visit, ascending, until that
// returns false.
func (x *index) each(visit func(paxosgroup.Slot, location) bool) {
	for i, chunk := range x.chunks {
		if chunk == nil {
			continue
		}
		first := paxosgroup.Slot((x.firstChunk + uint64(i)) * chunkSlots)
		for j, at := range chunk {
			if at != (location{}) && !visit(first+paxosgroup.Slot(j), at) {
				return
			}
		}
	}
}
