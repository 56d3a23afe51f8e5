package feed

import (
	"fmt"
	"strconv"
	"strings"
)

// position is that of a message in the log, and its message id. Ordinal 0 is
// that of gaps and position messages: everything below the slot is published,
// as far as it is there.
type position struct {
	Slot    uint64
	Ordinal uint64
}

// messageID is group/slot/ordinal.
func (p position) messageID(group uint32) string {
	b := strconv.AppendUint(nil, uint64(group), 10)
	b = append(b, '/')
	b = strconv.AppendUint(b, p.Slot, 10)
	b = append(b, '/')
	return string(strconv.AppendUint(b, p.Ordinal, 10))
}

// parseMessageID is the inverse of messageID.
func parseMessageID(id string) (group uint32, p position, err error) {
	parts := strings.Split(id, "/")
	if len(parts) != 3 {
		return 0, position{}, fmt.Errorf("message id %q is not group/slot/ordinal", id)
	}
	var n [3]uint64
	for i, bits := range [3]int{32, 64, 64} {
		if n[i], err = strconv.ParseUint(parts[i], 10, bits); err != nil {
			return 0, position{}, fmt.Errorf("message id %q: %w", id, err)
		}
	}
	return uint32(n[0]), position{Slot: n[1], Ordinal: n[2]}, nil
}

// markEvery is the distance of position messages in slots. They keep a stream's
// last message from falling behind the log's cut in a shard where only marks
// and void entries are written. They appear at multiples of it, so that each
// publisher writes the same ones; see the package comment.
const markEvery = 256

// nextMark returns the slot of the first position message after a message of
// slot last: the first multiple of markEvery with a whole block of slots
// before it in which nothing was published.
func nextMark(last uint64) uint64 {
	return (last/markEvery + 2) * markEvery
}
